//! The parts of BARs that a guest reaches by itself: owns their mappings, and KVM's memory slots that show them.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{MapFlags, ProtFlags};

use super::host::{Container, HostDevice};

const PAGE: u64 = 4096;

/// The whole pages of `areas` that have no byte of a hole. Both as offset and size.
pub(super) fn outside(areas: impl Iterator<Item = (u64, u64)>, holes: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut rest: Vec<(u64, u64)> =
        areas.map(|(at, len)| (at.next_multiple_of(PAGE), at.saturating_add(len) / PAGE * PAGE)).collect();
    for (at, len) in holes {
        let (from, to) = (at / PAGE * PAGE, at.saturating_add(*len).next_multiple_of(PAGE));
        let around = |(a, b): (u64, u64)| [(a, b.min(from)), (a.max(to), b)];
        rest = rest.into_iter().flat_map(around).collect();
    }
    rest.into_iter().filter(|(a, b)| a < b).map(|(a, b)| (a, b - a)).collect()
}

/// A part of a BAR that the guest reaches by itself.
pub(super) struct Area {
    pub(super) bar: u8,
    offset: u64,
    size: u64,
    host: NonNull<u8>,
    slot: u32,
    at: Option<u64>,
    container: Arc<Container>,
    vm: Arc<VmFd>,
}

// SAFETY: the pointer is that of a mapping which the area owns, and which only KVM and the device use.
unsafe impl Send for Area {}

impl Area {
    /// Maps `size` bytes at `offset` of a BAR whose region begins at `region` of the device's file; the guest does not see them yet.
    pub(super) fn new(
        host: &HostDevice,
        bar: u8,
        region: u64,
        offset: u64,
        size: u64,
        container: &Arc<Container>,
        vm: &Arc<VmFd>,
    ) -> io::Result<Self> {
        let len = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let (rights, at) = (ProtFlags::READ | ProtFlags::WRITE, region + offset);
        let mapped = host.with(|device| {
            // SAFETY: a new mapping, anywhere.
            let mapped =
                unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, rights, MapFlags::SHARED, device, at) };
            Ok(mapped?)
        })?;
        let mapped = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let (container, vm) = (Arc::clone(container), Arc::clone(vm));
        let slot = container.take_slot();
        Ok(Self { bar, offset, size, host: mapped, slot, at: None, container, vm })
    }

    /// Shows it to the guest in the BAR that begins at `base`, or nowhere.
    pub(super) fn place(&mut self, base: Option<u64>) {
        let at = base.map(|base| base + self.offset);
        if at == self.at {
            return;
        }
        // A slot does not move with its memory.
        if self.at.take().is_some() {
            self.set(0, 0);
        }
        if let Some(at) = at
            && self.set(at, self.size)
        {
            self.at = Some(at);
        }
    }

    fn set(&self, at: u64, size: u64) -> bool {
        let slot = kvm_userspace_memory_region {
            slot: self.slot,
            flags: 0,
            guest_phys_addr: at,
            memory_size: size,
            userspace_addr: self.host.as_ptr() as u64,
        };
        // SAFETY: the slot describes one live mapping, and goes before it does.
        let set = unsafe { self.vm.set_user_memory_region(slot) };
        if let Err(error) = &set {
            // The guest still reaches it, by way of the bus.
            tracing::error!("a BAR of a device of the host cannot be mapped: {error}");
        }
        set.is_ok()
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        self.place(None);
        self.container.give_slot(self.slot);
        // SAFETY: the mapping is the area's own, and no slot shows it any more.
        let _ = unsafe { rustix::mm::munmap(self.host.as_ptr().cast(), self.size as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_ours_is_mapped() {
        let cut = |areas: &[(u64, u64)], holes: &[(u64, u64)]| outside(areas.iter().copied(), holes);
        assert_eq!(cut(&[(0, 0x4000)], &[]), [(0, 0x4000)]);
        assert_eq!(cut(&[(0, 0x4000)], &[(0, 0x50), (0x2000, 8)]), [(0x1000, 0x1000), (0x3000, 0x1000)]);
        assert_eq!(cut(&[(0, 0x1000)], &[(0x800, 0x50)]), []);
        assert_eq!(cut(&[(0, 0x800)], &[]), [], "less than a page");
        assert_eq!(cut(&[(0x1000, 0x1000), (0x3000, 0x2000)], &[(0x3fff, 2)]), [(0x1000, 0x1000)]);
    }

    proptest! {
        /// No page with a byte of a hole is mapped, and every other whole page of an area is.
        #[test]
        fn every_page_is_ours_or_mapped(
            pages in 0u64..16, holes in prop::collection::vec((0u64..0x1_0000, 1u64..0x3000), 0..4)
        ) {
            let mapped = outside([(0, pages * PAGE)].into_iter(), &holes);
            for page in 0..16 {
                let (a, b) = (page * PAGE, (page + 1) * PAGE);
                let is_mapped = mapped.iter().filter(|(at, len)| *at <= a && b <= at + len).count();
                let is_hole = holes.iter().any(|(at, len)| *at < b && a < at + len);
                prop_assert_eq!(is_mapped, usize::from(page < pages && !is_hole));
            }
        }
    }
}
