//! Memory that the guest reads and cannot write: what it writes comes to the device there. Not RAM: no device reads or writes it.

use std::io;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{Bytes as _, MmapRegion, VolatileMemory as _};

use super::MemoryError;

/// KVM's numbers of slots for it begin here; RAM's begin at 0.
const FIRST_SLOT: u32 = 256;

/// One stretch of it.
pub struct Rom {
    slot: u32,
    base: u64,
    region: MmapRegion,
}

impl Rom {
    /// Stretch `number` of a VM: `size` bytes of zeroes at `base`, whole pages.
    pub fn new(number: u8, base: u64, size: usize) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::Map { size: size as u64, source };
        let region = MmapRegion::new(size).map_err(|e| failed(io::Error::other(e)))?;
        Ok(Self { slot: FIRST_SLOT + u32::from(number), base, region })
    }

    /// First guest physical address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Lets the guest read it, or not: then reads come to the device, too. KVM waits some milliseconds once a VM has interrupt controllers.
    pub fn map(&self, vm: &VmFd, mapped: bool) -> io::Result<()> {
        let slot = kvm_userspace_memory_region {
            slot: self.slot,
            flags: if mapped { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: self.base,
            memory_size: if mapped { self.region.size() as u64 } else { 0 },
            userspace_addr: self.region.as_ptr() as u64,
        };
        // SAFETY: the slot describes one live mapping, which nothing else changes the place of. Whoever has the slot mapped keeps this, and no
        // vCPU runs when it goes.
        unsafe { vm.set_user_memory_region(slot) }.map_err(io::Error::from)
    }

    /// Reads at `offset`; zeroes beyond the end.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        // Fails only beyond the end.
        let _ = self.region.as_volatile_slice().read_slice(data, offset);
    }

    /// Writes at `offset`; nothing beyond the end.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let _ = self.region.as_volatile_slice().write_slice(data, offset);
    }
}
