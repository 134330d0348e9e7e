//! `/dev/net/tun`: the only way to make a tap. RTM_NEWLINK answers EOPNOTSUPP for kind "tun" (linux `tun_validate`), and
//! rtnetlink cannot set the owner or persistence either.
//!
//! All calls here block for as long as the kernel holds its RTNL lock: run them on a blocking thread.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use crate::error::NetError;

/// TUNSETIFF refuses to attach to a link that exists (`IFF_TUN_EXCL`).
const IFF_TUN_EXCL: libc::c_int = 0x8000;
/// Frames carry a virtio-net header: what a VMM wants, and the kernel fixes it when the tap is made.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// `_IOW('T', 202, int)`: the argument is the value itself, not a pointer; so are the two below.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOWNER: libc::c_ulong = 0x4004_54cc;

/// Makes a tap that is gone when the descriptor is closed, unless [`keep`] is called first.
pub(crate) fn create(name: &str) -> Result<OwnedFd, NetError> {
    attach_with(name, FLAGS | IFF_TUN_EXCL)
}

/// Attaches to the tap `name`. **Makes it, not persistent, if it is not there**: the caller compares link indexes.
pub(crate) fn attach(name: &str) -> Result<OwnedFd, NetError> {
    attach_with(name, FLAGS)
}

/// Makes the tap outlive its descriptors.
pub(crate) fn keep(name: &str, tap: &OwnedFd) -> Result<(), NetError> {
    set(name, "make it persistent", tap, TUNSETPERSIST, 1)
}

/// Lets user `owner` attach to the tap without privilege.
pub(crate) fn give(name: &str, tap: &OwnedFd, owner: u32) -> Result<(), NetError> {
    set(name, "set its owner", tap, TUNSETOWNER, owner.into())
}

fn attach_with(name: &str, flags: libc::c_int) -> Result<OwnedFd, NetError> {
    let tun =
        rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
            .map_err(|errno| NetError::TunDevice { source: errno.into() })?;
    // SAFETY: `ifreq` is plain old data (an array and a union of integers and pointers): all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // `check_name` bounds the name to 15 bytes; the zeroed 16th ends it.
    for (to, from) in request.ifr_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // The flags word is 16 bits in this interface; IFF_TUN_EXCL is its top bit.
    request.ifr_ifru.ifru_flags = flags as u16 as libc::c_short;
    // SAFETY: `tun` is open, and TUNSETIFF reads and writes one `ifreq`, which `request` is and outlives the call.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if done < 0 {
        let source = io::Error::last_os_error();
        let name = name.to_owned();
        return Err(match source.raw_os_error() {
            Some(libc::EBUSY) => NetError::Busy { name },
            Some(libc::EINVAL) => NetError::TapMode { name },
            _ => NetError::Refused { what: "attach to the tap", name, source },
        });
    }
    Ok(tun)
}

fn set(
    name: &str,
    what: &'static str,
    tap: &OwnedFd,
    request: libc::c_ulong,
    value: libc::c_ulong,
) -> Result<(), NetError> {
    // SAFETY: `tap` is an open tun descriptor; these requests take an integer and touch no memory of ours.
    let done = unsafe { libc::ioctl(tap.as_raw_fd(), request, value) };
    if done < 0 {
        return Err(NetError::Refused { what, name: name.to_owned(), source: io::Error::last_os_error() });
    }
    Ok(())
}
