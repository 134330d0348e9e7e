//! The kernel's tap interface (`linux/if_tun.h`): owns its numbers and structures.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

// _IOW('T', n, int) and _IOR('T', n, unsigned int); the same on x86_64 and aarch64.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

const IFF_TAP: i32 = 0x0002;
const IFF_NO_PI: i32 = 0x1000;
const IFF_VNET_HDR: i32 = 0x4000;
const IFF_MULTI_QUEUE: i32 = 0x0100;
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;

const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// What the guest can take from the tap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets whose checksum is not filled in. Without it the others mean nothing.
    pub checksum: bool,
    /// TCP over IPv4 in one piece of up to 64 KiB.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
}

fn result(code: libc::c_int) -> io::Result<()> {
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An `ifreq` for `name`, which must be shorter than IFNAMSIZ.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|b| b == 0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface name has 1 to 15 bytes"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// Whether the network namespace of this process has the interface.
pub(super) fn interface_exists(name: &str) -> io::Result<bool> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: a terminated string.
    if unsafe { libc::if_nametoindex(name.as_ptr()) } != 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => Ok(false),
        e => Err(e),
    }
}

/// Connects a fresh `/dev/net/tun` descriptor to the tap `name`, as its only queue or as one of several.
pub(super) fn attach(fd: &OwnedFd, name: &str, several: bool) -> io::Result<()> {
    let mut request = request(name)?;
    let queues = if several { IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | queues) as libc::c_short;
    // SAFETY: an open descriptor and the argument that the call takes.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) })
}

/// What a tap's descriptor is connected to.
pub(super) struct Attached {
    /// Interface name, padded with zeroes.
    pub(super) name: [libc::c_char; libc::IFNAMSIZ],
    /// In the mode that we use.
    pub(super) usable: bool,
    /// The interface can have several queues.
    pub(super) several: bool,
}

/// Fails when the descriptor is no tap's.
pub(super) fn attached(fd: &OwnedFd) -> io::Result<Attached> {
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and the argument that the call takes.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
    let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    // SAFETY: the call has just filled this member in.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    Ok(Attached {
        name: request.ifr_name,
        usable: flags & wanted == wanted,
        several: flags & IFF_MULTI_QUEUE != 0,
    })
}

/// Lets the interface use a queue, or not; an error if that is so already.
pub(super) fn set_queue(fd: &OwnedFd, on: bool) -> io::Result<()> {
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = if on { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
    // SAFETY: an open descriptor and the argument that the call takes.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETQUEUE, &raw mut request) })
}

pub(super) fn set_header_size(fd: &OwnedFd, bytes: usize) -> io::Result<()> {
    let bytes = bytes as libc::c_int;
    // SAFETY: as in `attach`.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) })
}

pub(super) fn set_offloads(fd: &OwnedFd, offloads: Offloads) -> io::Result<()> {
    let mut flags = 0;
    if offloads.checksum {
        flags |= TUN_F_CSUM;
        flags |= if offloads.tso4 { TUN_F_TSO4 } else { 0 };
        flags |= if offloads.tso6 { TUN_F_TSO6 } else { 0 };
    }
    // SAFETY: an open descriptor; the argument is a number.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}
