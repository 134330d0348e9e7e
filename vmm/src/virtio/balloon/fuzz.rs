//! For the fuzz targets only: page numbers and statistics that the guest tells.

use super::PAGE;
use super::pages::Pages;
use super::stats::Stats;

/// Pages come into the balloon (`true`) and leave it, with host pages of `page_size` bytes and `ram` balloon pages of RAM. What goes to
/// the host is RAM, whole pages of the host.
pub fn pages(page_size: u64, ram: u64, rounds: impl IntoIterator<Item = (bool, Vec<u32>)>) {
    let mut pages = Pages::new(page_size);
    for (enter, mut numbers) in rounds {
        if !enter {
            pages.leave(&numbers);
            continue;
        }
        pages.enter(
            &mut numbers,
            |n| n < ram,
            |start, len| {
                assert!(start % page_size == 0 && len % page_size == 0 && len > 0, "{start:#x}+{len:#x}");
                assert!(start + len <= ram * PAGE, "{start:#x}+{len:#x} is not RAM");
            },
        );
    }
}

/// Reads statistics.
pub fn stats(bytes: &[u8]) {
    assert!(Stats::parse(bytes).named().count() <= 10);
}
