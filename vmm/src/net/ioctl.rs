//! The kernel's tap interface (`linux/if_tun.h`): owns its numbers and structures.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

// _IOW('T', n, int) and _IOR('T', n, unsigned int); the same on x86_64 and aarch64.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

const IFF_TAP: i32 = 0x0002;
const IFF_NO_PI: i32 = 0x1000;
const IFF_VNET_HDR: i32 = 0x4000;

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

/// Connects a fresh `/dev/net/tun` descriptor to the tap `name`.
pub(super) fn attach(fd: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as libc::c_short;
    // SAFETY: an open descriptor and the argument that the call takes.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) })
}

/// Whether the descriptor is connected to a tap in the mode that we use.
pub(super) fn is_usable_tap(fd: &OwnedFd) -> bool {
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and the argument that the call takes.
    if unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) } < 0 {
        return false;
    }
    let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    // SAFETY: the call has just filled this member in.
    i32::from(unsafe { request.ifr_ifru.ifru_flags }) & wanted == wanted
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
