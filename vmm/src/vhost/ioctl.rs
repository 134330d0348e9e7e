//! The kernel's vhost interface (`linux/vhost.h`): owns its numbers and structures. The same on x86_64 and aarch64.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

const GET_FEATURES: libc::c_ulong = 0x8008_af00;
const SET_FEATURES: libc::c_ulong = 0x4008_af00;
const SET_OWNER: libc::c_ulong = 0xaf01;
const SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const GET_VRING_BASE: libc::c_ulong = 0xc008_af12;
const SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const SET_VRING_CALL: libc::c_ulong = 0x4008_af21;
const SET_VRING_ERR: libc::c_ulong = 0x4008_af22;
const NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;
const VSOCK_SET_GUEST_CID: libc::c_ulong = 0x4008_af60;
const VSOCK_SET_RUNNING: libc::c_ulong = 0x4004_af61;

/// `struct vhost_vring_state` and, with a descriptor for a number, `struct vhost_vring_file`.
#[repr(C)]
struct RingValue {
    index: u32,
    value: u32,
}

/// `struct vhost_vring_addr`; addresses are those of this process.
#[repr(C)]
#[derive(Default)]
pub(super) struct RingAddress {
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) desc: u64,
    pub(super) used: u64,
    pub(super) avail: u64,
    pub(super) log: u64,
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Region {
    pub(super) guest: u64,
    pub(super) size: u64,
    pub(super) host: u64,
    pub(super) flags: u64,
}

/// `struct vhost_memory` with room for all regions that a machine has.
#[repr(C)]
struct Memory {
    count: u32,
    padding: u32,
    regions: [Region; REGIONS],
}

/// Guest RAM has at most two pieces on any machine.
const REGIONS: usize = 8;

fn call<T>(fd: &OwnedFd, request: libc::c_ulong, argument: *const T) -> io::Result<()> {
    // SAFETY: an open descriptor; each caller passes what its request takes, and the kernel keeps no pointer to it.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

pub(super) fn features(fd: &OwnedFd) -> io::Result<u64> {
    let mut features = 0u64;
    call(fd, GET_FEATURES, &raw mut features)?;
    Ok(features)
}

pub(super) fn set_features(fd: &OwnedFd, features: u64) -> io::Result<()> {
    call(fd, SET_FEATURES, &raw const features)
}

pub(super) fn set_owner(fd: &OwnedFd) -> io::Result<()> {
    call::<u8>(fd, SET_OWNER, std::ptr::null())
}

pub(super) fn set_memory(fd: &OwnedFd, regions: impl Iterator<Item = Region>) -> io::Result<()> {
    let mut memory = Memory { count: 0, padding: 0, regions: [Region::default(); REGIONS] };
    for region in regions {
        let place = memory.regions.get_mut(memory.count as usize);
        *place.ok_or_else(|| io::Error::other("guest memory has too many pieces"))? = region;
        memory.count += 1;
    }
    call(fd, SET_MEM_TABLE, &raw const memory)
}

fn set(fd: &OwnedFd, request: libc::c_ulong, index: u32, value: u32) -> io::Result<()> {
    let value = RingValue { index, value };
    call(fd, request, &raw const value)
}

pub(super) fn set_size(fd: &OwnedFd, index: u32, size: u16) -> io::Result<()> {
    set(fd, SET_VRING_NUM, index, u32::from(size))
}

pub(super) fn set_base(fd: &OwnedFd, index: u32, base: u16) -> io::Result<()> {
    set(fd, SET_VRING_BASE, index, u32::from(base))
}

pub(super) fn base(fd: &OwnedFd, index: u32) -> io::Result<u16> {
    let mut value = RingValue { index, value: 0 };
    call(fd, GET_VRING_BASE, &raw mut value)?;
    Ok(value.value as u16)
}

pub(super) fn set_address(fd: &OwnedFd, address: &RingAddress) -> io::Result<()> {
    call(fd, SET_VRING_ADDR, std::ptr::from_ref(address))
}

/// The descriptors that the driver signals, that the kernel signals, and that it signals when the ring makes no sense.
pub(super) fn set_events(
    fd: &OwnedFd,
    index: u32,
    kick: BorrowedFd<'_>,
    called: BorrowedFd<'_>,
    error: BorrowedFd<'_>,
) -> io::Result<()> {
    for (request, event) in [(SET_VRING_CALL, called), (SET_VRING_ERR, error), (SET_VRING_KICK, kick)] {
        set(fd, request, index, event.as_raw_fd().cast_unsigned())?;
    }
    Ok(())
}

/// `None` stops the ring; the call returns when the kernel no longer touches it.
pub(super) fn set_net_backend(fd: &OwnedFd, index: u32, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
    set(fd, NET_SET_BACKEND, index, tap.map_or(-1, |t| t.as_raw_fd()).cast_unsigned())
}

pub(super) fn set_cid(fd: &OwnedFd, cid: u64) -> io::Result<()> {
    call(fd, VSOCK_SET_GUEST_CID, &raw const cid)
}

pub(super) fn set_running(fd: &OwnedFd, running: bool) -> io::Result<()> {
    let running = libc::c_int::from(running);
    call(fd, VSOCK_SET_RUNNING, &raw const running)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        // The size is part of each request's number.
        assert_eq!(size_of::<RingValue>(), (SET_VRING_NUM >> 16 & 0x3fff) as usize);
        assert_eq!(size_of::<RingAddress>(), (SET_VRING_ADDR >> 16 & 0x3fff) as usize);
        assert_eq!(size_of::<Region>(), 32);
        assert_eq!(std::mem::offset_of!(Memory, regions), 8);
    }
}
