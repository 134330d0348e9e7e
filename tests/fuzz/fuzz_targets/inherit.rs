//! The text of FLOTILLA_FDS. Descriptors 900 to 903 are open; whatever the text says, each is handed out at most once.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Once;

use libfuzzer_sys::fuzz_target;

static ALONE: Once = Once::new();

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // What this process got from its parent is not for the texts to take.
    // SAFETY: nothing here has opened a descriptor yet; libFuzzer keeps none open.
    ALONE.call_once(|| assert_eq!(unsafe { close_range(3, u32::MAX, 0) }, 0));
    {
        let null = File::open("/dev/null").expect("/dev/null");
        for fd in 900..904 {
            // SAFETY: numbers that nothing else in this process uses.
            unsafe { dup2(null.as_raw_fd(), fd) };
        }
    }
    if let Ok(table) = vmm::inherit::fuzz::parse(text) {
        let mut taken = Vec::new();
        while let Some(fd) = table.take_tap("tap") {
            assert!((900..904).contains(&fd.as_raw_fd()) && !taken.contains(&fd.as_raw_fd()));
            // Kept open: a number that is handed out twice would show.
            taken.push(std::os::fd::IntoRawFd::into_raw_fd(fd));
        }
        table.take_path(Path::new("/a"));
    }
});

unsafe extern "C" {
    fn dup2(old: i32, new: i32) -> i32;
    fn close_range(first: u32, last: u32, flags: i32) -> i32;
}
