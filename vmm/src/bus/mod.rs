//! Dispatch of guest accesses to devices: owns the map from address ranges (memory-mapped or port) to devices.
//!
//! Called by vCPU threads on every exit, so a look-up takes no lock: the map is an immutable sorted vector that is
//! swapped whole when a device comes or goes. Devices bring their own interior locking.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::process::trace;

/// A device that answers guest accesses in one address range.
///
/// `offset` counts from the start of the range. `data` holds 1 to 8 bytes of any width, aligned or not: a device must
/// accept every combination (return zeroes or all ones, ignore writes), never panic.
pub trait BusDevice: Send + Sync {
    /// The guest reads; every byte of `data` must be written.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or wraps around the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or overflows")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device lives there.
    #[error("bus range {base:#x}+{len:#x} overlaps another device")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

#[derive(Clone)]
struct Entry {
    base: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space of devices.
#[derive(Default)]
pub struct Bus {
    entries: ArcSwap<Vec<Entry>>,
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base`, `len` bytes. Called by the thread that owns the machine.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last =
            len.checked_sub(1).and_then(|l| base.checked_add(l)).ok_or(BusError::BadRange { base, len })?;
        let mut entries = Vec::clone(&self.entries.load());
        let at = entries.partition_point(|e| e.base <= base);
        let before = at.checked_sub(1).and_then(|i| entries.get(i));
        if before.is_some_and(|e| e.last >= base) || entries.get(at).is_some_and(|e| e.base <= last) {
            return Err(BusError::Overlap { base, len });
        }
        entries.insert(at, Entry { base, last, device });
        self.entries.store(Arc::new(entries));
        Ok(())
    }

    /// Takes away the device whose range starts at `base`; accesses under way on other threads may still finish.
    pub fn remove(&self, base: u64) {
        let mut entries = Vec::clone(&self.entries.load());
        entries.retain(|e| e.base != base);
        self.entries.store(Arc::new(entries));
    }

    /// Reads; an address that no device claims, or an access that leaves its device's range, gives all ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        match find(&self.entries.load(), addr, data.len()) {
            Some(e) => e.device.read(addr - e.base, data),
            None => {
                data.fill(0xff);
                tracing::trace!(target: trace::BUS_UNCLAIMED, "read of {} bytes at {addr:#x}", data.len());
            }
        }
    }

    /// Writes; dropped where no device is.
    pub fn write(&self, addr: u64, data: &[u8]) {
        match find(&self.entries.load(), addr, data.len()) {
            Some(e) => e.device.write(addr - e.base, data),
            None => {
                tracing::trace!(target: trace::BUS_UNCLAIMED, "write of {} bytes at {addr:#x}", data.len());
            }
        }
    }
}

fn find(entries: &[Entry], addr: u64, len: usize) -> Option<&Entry> {
    let at = entries.partition_point(|e| e.base <= addr).checked_sub(1)?;
    let entry = entries.get(at)?;
    let last = addr.checked_add(len.checked_sub(1)? as u64)?;
    (last <= entry.last).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn finds_the_right_device_and_refuses_overlaps() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, Arc::new(Echo)).unwrap();
        bus.insert(0x110, 0x10, Arc::new(Echo)).unwrap();
        assert_eq!(bus.insert(0x10f, 1, Arc::new(Echo)), Err(BusError::Overlap { base: 0x10f, len: 1 }));
        assert_eq!(bus.insert(0xff, 2, Arc::new(Echo)), Err(BusError::Overlap { base: 0xff, len: 2 }));
        assert_eq!(bus.insert(0, 0, Arc::new(Echo)), Err(BusError::BadRange { base: 0, len: 0 }));
        assert_eq!(
            bus.insert(u64::MAX, 2, Arc::new(Echo)),
            Err(BusError::BadRange { base: u64::MAX, len: 2 })
        );
        let mut byte = [0];
        bus.read(0x11f, &mut byte);
        assert_eq!(byte, [0xf]);
    }

    #[test]
    fn an_access_across_the_end_or_outside_reads_ones() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, Arc::new(Echo)).unwrap();
        let mut data = [0; 4];
        for addr in [0x10e, 0x110, 0xff, u64::MAX] {
            bus.read(addr, &mut data);
            assert_eq!(data, [0xff; 4], "{addr:#x}");
        }
        bus.remove(0x100);
        bus.read(0x100, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
