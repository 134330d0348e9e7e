//! Memory that devices bring (virtio-mem, virtio-pmem): owns where it lies, its mappings in this process, and what of it the guest can reach.
//!
//! It is not RAM: nothing that loads, clears, renews or saves RAM sees it. Devices see both, so that rings and buffers may lie in it.
//!
//! ```text
//!   4 GiB                 RAM's end     aligned                      aligned
//!   | the rest of RAM     |             | chunk 0 | chunk 1 | ...    | a file (one chunk) |     64-bit BARs (q35)
//!                                         KVM knows a chunk while a    KVM knows it from the
//!                                         block in it is plugged       start
//! ```
//!
//! A slot of KVM can be neither shortened nor split while the guest runs without that it misses its memory for a moment, and making one
//! takes a millisecond or several: hence chunks, which are as large as what Linux takes into use at once. In a chunk that has a block in use
//! a guest reaches the others as well, as it does with pages in a balloon; what it keeps there goes when the last block of the chunk does. So do
//! transfers of its devices, which see all of it at any time. In no way does a guest get more memory than RAM and the objects have together.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::fs::{FlockOperation, SeekFrom};
use vm_memory::{GuestMemoryRegion as _, GuestRegionMmap};

use super::backing::Backing;
use super::discard::Discarder;
use super::layout::{self, GAP_END, Range};
use super::{GuestMemory, MemoryError, Wish, gap, map};
use crate::config::{Device, DeviceDriver, MEMORY_BLOCK_MIN, MemoryBackend, MemoryBackendKind, VmConfig};
use crate::inherit::Inherited;

/// KVM's numbers of slots for it begin here, behind those of RAM and ROM.
const FIRST_SLOT: u32 = 1024;
/// What KVM learns of at once, at least: a memory block of Linux on x86.
const CHUNK_MIN: u64 = 128 << 20;
/// Chunks of one device at most, so that a request for all of them ends soon.
const CHUNKS_MAX: u64 = 512;
/// No processor has more than 52 bits of physical address (Intel SDM 3A §4.1.4).
const ADDRESS_END: u64 = 1 << 52;

/// What one device wants.
struct Want<'a> {
    device: &'a str,
    at: Option<u64>,
    size: u64,
    align: u64,
}

/// Where each lies, in their order: where it says, or behind RAM and everything else that was placed before.
fn place(wants: &[Want<'_>], ram_end: u64) -> Result<Vec<Range>, MemoryError> {
    let refuse = |want: &Want<'_>, base, what| MemoryError::Place {
        device: want.device.to_owned(),
        base,
        size: want.size,
        what,
    };
    let lowest = ram_end.max(GAP_END);
    let overlaps = |a: &Range, base: u64, size: u64| base < a.base + a.size && a.base < base + size;
    let mut fixed: Vec<Range> = Vec::with_capacity(wants.len());
    for want in wants {
        let Some(base) = want.at else { continue };
        if base < lowest {
            return Err(refuse(want, base, "lies in guest RAM, or below 4 GiB"));
        }
        if base.checked_add(want.size).is_none_or(|end| end > ADDRESS_END) {
            return Err(refuse(want, base, "is beyond what a processor can address"));
        }
        if fixed.iter().any(|other| overlaps(other, base, want.size)) {
            return Err(refuse(want, base, "overlaps that of another device"));
        }
        fixed.push(Range { base, size: want.size });
    }
    let mut taken = fixed;
    let mut places = Vec::with_capacity(wants.len());
    for want in wants {
        let Want { size, align, .. } = *want;
        let base = match want.at {
            Some(base) => base,
            None => {
                let mut base = lowest.next_multiple_of(align);
                // Each round leaves one range behind for good.
                while let Some(other) = taken.iter().find(|other| overlaps(other, base, size)) {
                    base = (other.base + other.size).next_multiple_of(align);
                }
                if base + size > ADDRESS_END {
                    return Err(refuse(want, base, "is beyond what a processor can address"));
                }
                taken.push(Range { base, size });
                base
            }
        };
        places.push(Range { base, size });
    }
    Ok(places)
}

/// The memory of one device.
pub struct DeviceRegion {
    device: String,
    chunk: u64,
    first_slot: u32,
    read_only: bool,
    /// There once the machine has it; goes before the mapping.
    vm: OnceLock<Arc<VmFd>>,
    discarder: Discarder,
    region: Arc<GuestRegionMmap>,
    /// What lies under it, of a file that the guest's data are to reach.
    file: Option<File>,
}

impl DeviceRegion {
    /// First guest physical address.
    pub fn base(&self) -> u64 {
        self.region.start_addr().0
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.region.len()
    }

    /// Bytes of a chunk; the last may be smaller.
    pub fn chunk(&self) -> u64 {
        self.chunk
    }

    /// Lets the guest reach a chunk, or not. KVM waits for a grace period, some milliseconds.
    pub fn expose(&self, chunk: usize, exposed: bool) -> io::Result<()> {
        let Some(vm) = self.vm.get() else { return Err(io::ErrorKind::NotConnected.into()) };
        self.set_slot(vm, chunk, exposed)
    }

    fn set_slot(&self, vm: &VmFd, chunk: usize, exposed: bool) -> io::Result<()> {
        let number = u32::try_from(chunk).map_err(io::Error::other)?;
        let offset = self.chunk.checked_mul(chunk as u64).filter(|offset| *offset < self.size());
        let offset = offset.ok_or(io::ErrorKind::InvalidInput)?;
        let size = self.chunk.min(self.size() - offset);
        let slot = kvm_userspace_memory_region {
            slot: self.first_slot + number,
            flags: if self.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: self.base() + offset,
            memory_size: if exposed { size } else { 0 },
            userspace_addr: self.region.as_ptr() as u64 + offset,
        };
        // SAFETY: the slot describes a part of one live mapping, which stays where it is; whoever has the VM file keeps this value, and no
        // vCPU runs when it goes.
        unsafe { vm.set_user_memory_region(slot) }.map_err(io::Error::from)
    }

    /// Gives the pages of `len` bytes at `offset` back to the host: what is read there next are zeroes, or what a private file holds.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.discarder.discard(self.base().saturating_add(offset), len).map(|_| ())
    }

    /// Makes what the guest has written to the file durable; returns when it is.
    pub fn flush(&self) -> io::Result<()> {
        match &self.file {
            // What was stored through the mapping is in the page cache, of which this file's part is written.
            Some(file) if !self.read_only => Ok(rustix::fs::fdatasync(file)?),
            _ => Ok(()),
        }
    }
}

/// All of it.
#[derive(Default)]
pub struct DeviceMemory {
    regions: Vec<Arc<DeviceRegion>>,
}

impl DeviceMemory {
    /// Maps the memory of all devices, and touches no page of it.
    pub fn open(config: &VmConfig, inherited: &Inherited) -> Result<Self, MemoryError> {
        if config.device_memory.is_empty() {
            return Ok(Self::default());
        }
        let found: Vec<(&Device, &MemoryBackend, Want<'_>)> = config
            .devices
            .iter()
            .filter_map(|device| {
                let (memdev, at) = device.driver.memory()?;
                let object = config.device_memory.iter().find(|b| b.id == memdev)?;
                let block = match device.driver {
                    DeviceDriver::VirtioMem { block_size, .. } => block_size,
                    _ => MEMORY_BLOCK_MIN,
                };
                let align = block.max(CHUNK_MIN);
                Some((device, object, Want { device: &device.id, at, size: object.size, align }))
            })
            .collect();
        let ram = layout::ram(config.memory.size, gap(&config.machine));
        let ram_end = ram.last().map_or(0, |range| range.base + range.size);
        let mut regions = Vec::with_capacity(found.len());
        let mut first_slot = FIRST_SLOT;
        let (devices, wants): (Vec<_>, Vec<_>) =
            found.into_iter().map(|(device, object, want)| ((device, object), want)).unzip();
        for ((device, object), range) in devices.into_iter().zip(place(&wants, ram_end)?) {
            let Device { id, driver, .. } = device;
            let failed = |source| MemoryError::OfDevice { device: id.clone(), source: Box::new(source) };
            let region = match driver {
                DeviceDriver::VirtioMem { block_size, .. } => {
                    open_blocks(config, id, object, *block_size, range, first_slot)
                }
                _ => open_file(config, id, object, range, first_slot, inherited),
            };
            let region = region.map_err(failed)?;
            first_slot +=
                u32::try_from(region.size().div_ceil(region.chunk)).unwrap_or(u32::MAX - first_slot);
            regions.push(Arc::new(region));
        }
        Ok(Self { regions })
    }

    /// Device that brings some, if any.
    pub fn device(&self) -> Option<&str> {
        self.regions.first().map(|r| r.device.as_str())
    }

    /// That of the device of this name.
    pub fn get(&self, device: &str) -> Option<Arc<DeviceRegion>> {
        self.regions.iter().find(|r| r.device == device).cloned()
    }

    /// Where the last of it ends; 0 if there is none.
    pub fn end(&self) -> u64 {
        self.regions.iter().map(|r| r.base() + r.size()).max().unwrap_or(0)
    }

    /// What devices see: RAM and all of this.
    pub fn with(&self, ram: &Arc<GuestMemory>) -> Result<Arc<GuestMemory>, MemoryError> {
        if self.regions.is_empty() {
            return Ok(Arc::clone(ram));
        }
        let mut all = GuestMemory::clone(ram);
        for region in &self.regions {
            all = all.insert_region(Arc::clone(&region.region)).map_err(|_| MemoryError::Place {
                device: region.device.clone(),
                base: region.base(),
                size: region.size(),
                what: "overlaps other memory",
            })?;
        }
        Ok(Arc::new(all))
    }

    /// Gives KVM what the guest reaches from the start. Like RAM it comes before the interrupt controllers.
    pub fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        let (files, _) = self.by_kind();
        for region in files {
            region.set_slot(vm, 0, true).map_err(|source| MemoryError::Slot {
                base: region.base(),
                size: region.size(),
                source,
            })?;
        }
        Ok(())
    }

    /// From now on devices may let the guest reach what they hand out.
    pub fn attach(&self, vm: &Arc<VmFd>) {
        let (_, handed_out) = self.by_kind();
        for region in handed_out {
            // Once per machine.
            let _ = region.vm.set(Arc::clone(vm));
        }
    }

    /// What is there from the start, and what is handed out.
    fn by_kind(&self) -> (Vec<&DeviceRegion>, Vec<&DeviceRegion>) {
        self.regions.iter().map(|region| &**region).partition(|region| region.file.is_some())
    }
}

fn wish<'a>(config: &VmConfig, object: &'a MemoryBackend) -> Wish<'a> {
    let path = match &object.kind {
        MemoryBackendKind::File(path) => Some(path.as_path()),
        MemoryBackendKind::Ram | MemoryBackendKind::Memfd => None,
    };
    Wish {
        size: object.size,
        path,
        memfd: object.kind == MemoryBackendKind::Memfd,
        shared: config.shares_device_memory(object),
        prealloc: false,
        dump_guest_core: object.dump_guest_core && config.machine.dump_guest_core,
        placement: object.placement,
    }
}

/// Memory that is handed out in blocks.
fn open_blocks(
    config: &VmConfig,
    device: &str,
    object: &MemoryBackend,
    block: u64,
    range: Range,
    first_slot: u32,
) -> Result<DeviceRegion, MemoryError> {
    let wish = wish(config, object);
    let region = map(range, 0, &Backing::open(&wish)?, &wish)?;
    let chunk = CHUNK_MIN.max(block).max(range.size.div_ceil(CHUNKS_MAX).next_power_of_two());
    let region = region_of(device, region, chunk, first_slot, None)?;
    let page = region.discarder.page_size();
    if !block.is_multiple_of(page) {
        return Err(MemoryError::BlockSize { block, page });
    }
    Ok(region)
}

/// A file that the guest sees as memory.
fn open_file(
    config: &VmConfig,
    device: &str,
    object: &MemoryBackend,
    range: Range,
    first_slot: u32,
    inherited: &Inherited,
) -> Result<DeviceRegion, MemoryError> {
    let wish = wish(config, object);
    let path = wish.path.unwrap_or(Path::new(""));
    let failed = |source| MemoryError::File { path: path.into(), source };
    let file = match inherited.take_path(path).map(File::from) {
        Some(file) => file,
        None => File::options().read(true).write(!object.readonly).open(path).map_err(failed)?,
    };
    // Not the protocol of images: nobody mounts this as a disk. It goes with the descriptor.
    let lock = if object.readonly {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    rustix::fs::flock(&file, lock).map_err(|e| match e {
        rustix::io::Errno::WOULDBLOCK => failed(io::Error::other("another VM uses it")),
        e => failed(e.into()),
    })?;
    // Of a block device, too. What is beyond the end cannot be touched: the VMM would end with SIGBUS.
    let len = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
    if len < range.size {
        return Err(failed(io::Error::other(format!(
            "it has {len} bytes, and size= says {}: make it larger, or the size smaller",
            range.size
        ))));
    }
    // A guest that may only read must not write through its disks either: what they put there is this VM's own copy.
    let backing = if object.readonly { Backing::snapshot(&file) } else { Backing::shared(&file) };
    let region = map(range, 0, &backing.map_err(failed)?, &wish)?;
    let mut region = region_of(device, region, range.size, first_slot, Some(file))?;
    region.read_only = object.readonly;
    Ok(region)
}

fn region_of(
    device: &str,
    region: GuestRegionMmap,
    chunk: u64,
    first_slot: u32,
    file: Option<File>,
) -> Result<DeviceRegion, MemoryError> {
    let region = Arc::new(region);
    let size = region.len();
    let alone = GuestMemory::from_arc_regions(vec![Arc::clone(&region)])
        .map_err(|e| MemoryError::Map { size, source: io::Error::other(e) })?;
    Ok(DeviceRegion {
        device: device.to_owned(),
        chunk,
        first_slot,
        read_only: false,
        vm: OnceLock::new(),
        discarder: Discarder::new(Arc::new(alone)),
        region,
        file,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MachineKind;
    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    fn want(at: Option<u64>, size: u64) -> Want<'static> {
        Want { device: "d", at, size, align: CHUNK_MIN }
    }

    fn bases(wants: &[Want<'_>], ram_end: u64) -> Result<Vec<u64>, String> {
        let places = place(wants, ram_end).map_err(|e| e.to_string())?;
        Ok(places.iter().map(|range| range.base).collect())
    }

    #[test]
    fn devices_lie_behind_ram_in_order_and_where_they_say() {
        let behind = |wants: &[Want<'_>], ram_end| bases(wants, ram_end).unwrap();
        assert_eq!(behind(&[want(None, GIB)], 256 * MIB), [4 * GIB]);
        assert_eq!(
            behind(&[want(None, GIB), want(None, 2 * MIB), want(None, GIB)], 5 * GIB + MIB),
            [5 * GIB + 128 * MIB, 6 * GIB + 128 * MIB, 6 * GIB + 256 * MIB]
        );
        // Around one that says where it lies, though it comes later.
        let around = [want(None, GIB), want(None, 128 * MIB), want(Some(4 * GIB + 256 * MIB), GIB)];
        assert_eq!(behind(&around, GIB), [5 * GIB + 256 * MIB, 4 * GIB, 4 * GIB + 256 * MIB]);
        for (wants, ram_end, what) in [
            (vec![want(Some(3 * GIB), GIB)], GIB, "lies in guest RAM"),
            (vec![want(Some(4 * GIB), GIB)], 5 * GIB, "lies in guest RAM"),
            (vec![want(Some(u64::MAX - MIB), GIB)], GIB, "beyond what a processor"),
            (vec![want(Some(ADDRESS_END), GIB)], GIB, "beyond what a processor"),
            (vec![want(Some(8 * GIB), GIB), want(Some(9 * GIB - MIB), GIB)], GIB, "overlaps that of another"),
        ] {
            let error = bases(&wants, ram_end).unwrap_err();
            assert!(error.starts_with("device \"d\": its memory at") && error.contains(what), "{error}");
        }
    }

    proptest! {
        #[test]
        fn nothing_overlaps(
            ram_end in 0..32u64,
            wants in proptest::collection::vec((proptest::option::of(16..64u64), 1..16u64), 1..6),
        ) {
            let unit = CHUNK_MIN;
            let wants: Vec<_> =
                wants.iter().map(|(at, size)| want(at.map(|at| 4 * GIB + at * unit), size * unit)).collect();
            let ram_end = 4 * GIB + ram_end * unit / 2;
            if let Ok(places) = place(&wants, ram_end) {
                for (number, a) in places.iter().enumerate() {
                    prop_assert!(a.base >= ram_end && a.base % unit == 0);
                    for b in places.iter().skip(number + 1) {
                        prop_assert!(a.base + a.size <= b.base || b.base + b.size <= a.base);
                    }
                }
            } else {
                prop_assert!(wants.iter().any(|w| w.at.is_some()));
            }
        }
    }

    fn object(kind: MemoryBackendKind, size: u64, readonly: bool) -> MemoryBackend {
        MemoryBackend {
            id: "m".into(),
            share: kind != MemoryBackendKind::Ram && !readonly,
            kind,
            size,
            readonly,
            prealloc: false,
            dump_guest_core: true,
            placement: None,
        }
    }

    fn config(driver: DeviceDriver, object: MemoryBackend) -> VmConfig {
        let mut config = VmConfig::default();
        config.machine.kind = MachineKind::Q35;
        config.memory.size = 3 * GIB;
        config.device_memory.push(object);
        config.devices.push(Device { id: "d".into(), bus: None, addr: None, multifunction: false, driver });
        config
    }

    fn mem(block_size: u64) -> DeviceDriver {
        DeviceDriver::VirtioMem { memdev: "m".into(), memaddr: None, requested_size: 0, block_size, node: 0 }
    }

    #[test]
    fn blocks_can_be_used_and_given_back_and_ram_is_untouched() {
        for kind in [MemoryBackendKind::Ram, MemoryBackendKind::Memfd] {
            let config = config(mem(MEMORY_BLOCK_MIN), object(kind, 256 * MIB, false));
            let memory = DeviceMemory::open(&config, &Inherited::default()).unwrap();
            let region = memory.get("d").unwrap();
            assert_eq!((region.base(), region.size(), region.chunk()), (5 * GIB, 256 * MIB, CHUNK_MIN));
            assert_eq!(memory.end(), region.base() + region.size());
            let ram = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
            let all = memory.with(&ram).unwrap();
            assert_eq!((ram.num_regions(), all.num_regions()), (1, 2));
            all.write_obj(7u8, GuestAddress(region.base() + 2 * MIB)).unwrap();
            region.discard(4 * MIB, 2 * MIB).unwrap();
            assert_eq!(all.read_obj::<u8>(GuestAddress(region.base() + 2 * MIB)).unwrap(), 7);
            region.discard(2 * MIB, 2 * MIB).unwrap();
            assert_eq!(all.read_obj::<u8>(GuestAddress(region.base() + 2 * MIB)).unwrap(), 0);
            // No machine has it yet.
            assert!(region.expose(0, true).is_err());
        }
    }

    #[test]
    fn large_memory_has_larger_chunks() {
        let config = config(mem(MEMORY_BLOCK_MIN), object(MemoryBackendKind::Ram, 256 * GIB, false));
        let region = DeviceMemory::open(&config, &Inherited::default()).unwrap().get("d").unwrap();
        assert_eq!(region.chunk(), 512 * MIB);
    }

    #[test]
    fn a_file_is_written_by_one_and_read_by_many() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let driver = || DeviceDriver::VirtioPmem { memdev: "m".into(), memaddr: None };
        let open = |size, readonly| {
            let object = object(MemoryBackendKind::File(path.clone()), size, readonly);
            DeviceMemory::open(&config(driver(), object), &Inherited::default())
        };
        let text = |size, readonly| open(size, readonly).err().unwrap().to_string();
        assert!(text(4 * MIB, false).contains("No such file"), "{}", text(4 * MIB, false));
        File::create(&path).unwrap().set_len(4 * MIB).unwrap();
        assert!(text(6 * MIB, false).contains("it has 4194304 bytes, and size= says 6291456"));
        let ram = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
        {
            let memory = open(4 * MIB, false).unwrap();
            let region = memory.get("d").unwrap();
            memory.with(&ram).unwrap().write_obj(7u8, GuestAddress(region.base() + 9)).unwrap();
            region.flush().unwrap();
            assert!(text(4 * MIB, true).contains("another VM uses it"));
        }
        let (one, two) = (open(4 * MIB, true).unwrap(), open(4 * MIB, true).unwrap());
        let base = one.get("d").unwrap().base();
        let (mine, theirs) = (one.with(&ram).unwrap(), two.with(&ram).unwrap());
        mine.write_obj(8u8, GuestAddress(base + 9)).unwrap();
        assert_eq!(theirs.read_obj::<u8>(GuestAddress(base + 9)).unwrap(), 7);
        assert_eq!(std::fs::read(&path).unwrap()[9], 7);
    }
}
