//! The network of the load lines: a tap in a network namespace of its own, with no route to anywhere, and a flood of frames into it.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::Result;

/// The tap's name.
pub(crate) const TAP: &str = "bench0";
/// An EtherType for local experiments, which nobody answers.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
/// Frames given to the kernel at once.
const BATCH: usize = 32;

/// Runs `work` on a thread in a new network namespace that holds the tap.
pub(crate) fn within<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let run = || -> std::result::Result<T, String> {
        // SAFETY: affects this thread alone, and what it starts.
        check(unsafe { libc::unshare(libc::CLONE_NEWNET) })
            .and_then(|()| make_tap())
            .map_err(|e| format!("cannot make a tap in a network namespace: {e}"))?;
        work().map_err(|e| e.to_string())
    };
    let joined = std::thread::scope(|scope| scope.spawn(run).join());
    Ok(joined.map_err(|_| "the thread in the network namespace panicked")??)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn named(flags: i32) -> libc::ifreq {
    // SAFETY: plain numbers and text, for which zero is a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as i16;
    request
}

/// A tap that stays as long as the namespace does, up.
fn make_tap() -> io::Result<()> {
    let tun = std::fs::File::options().read(true).write(true).open("/dev/net/tun")?;
    let request = named(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    // SAFETY: TUNSETIFF reads and writes one ifreq; TUNSETPERSIST takes a number.
    unsafe {
        check(libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request))?;
        check(libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1))?;
    }
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    let request = named(libc::IFF_UP | libc::IFF_RUNNING);
    // SAFETY: reads one ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}

fn socket(family: i32, kind: i32) -> io::Result<OwnedFd> {
    // SAFETY: makes a descriptor, which becomes ours.
    unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, 0);
        check(fd)?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Frames that have come out of the tap so far, sent by the guest.
pub(crate) fn arrived() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let fields = text.lines().find_map(|l| l.trim().strip_prefix(TAP)?.strip_prefix(':'));
    Ok(fields.and_then(|f| f.split_whitespace().nth(1)).ok_or("the tap has no counters")?.parse()?)
}

/// How the flood goes on.
#[derive(Default)]
pub(crate) struct Flood {
    /// Bytes of each frame, 60 to 1514.
    pub(crate) length: AtomicUsize,
    /// Ends it.
    pub(crate) stop: AtomicBool,
}

impl Flood {
    /// Sends frames into the tap, as many as it takes, until told to stop. From a thread in the namespace.
    pub(crate) fn run(&self) -> io::Result<()> {
        let socket = socket(libc::AF_PACKET, libc::SOCK_RAW)?;
        // SAFETY: plain numbers, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        let on = 1i32;
        // SAFETY: each call reads what it is given: a name that ends with 0, an address and a number with their sizes.
        unsafe {
            address.sll_ifindex = libc::if_nametoindex(c"bench0".as_ptr()).cast_signed();
            let size = size_of_val(&address) as u32;
            check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size))?;
            // Straight to the tap, which then says when it is full.
            let size = size_of_val(&on) as u32;
            let fd = socket.as_raw_fd();
            check(libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const on).cast(),
                size,
            ))?;
        }
        let mut frame = [0u8; 1514];
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        frame[12..14].copy_from_slice(&EXPERIMENT);
        while !self.stop.load(Ordering::Relaxed) {
            let length = self.length.load(Ordering::Relaxed);
            let mut part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: length };
            // SAFETY: plain numbers and pointers, for which zero is a value.
            let mut messages: [libc::mmsghdr; BATCH] = unsafe { zeroed() };
            for message in &mut messages {
                (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (&raw mut part, 1);
            }
            // SAFETY: reads the frame through the list, both of which outlive the call.
            let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), BATCH as u32, 0) };
            if sent < BATCH as i32 {
                // Full, or nobody has opened it yet. It holds a thousand frames: they last longer than this.
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    }
}
