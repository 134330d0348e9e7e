//! Guest RAM: owns its mapping in this process and its registration with KVM. Memory that devices bring is in `device_memory`.
//!
//! The machine calls [`build`] and then [`register`], before it creates the interrupt controllers: a slot created after them
//! waits for an RCU grace period (about 8 ms). Everyone else sees RAM through [`GuestMemory`], whose accesses are checked.

mod backing;
mod device_memory;
pub mod discard;
pub mod layout;
mod rom;
mod sparse;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::Advice;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap, MmapRegion};

use crate::config::{
    MachineConfig, MachineKind, MemoryBackendKind, MemoryConfig, Placement, PlacementPolicy,
};
use backing::Backing;
pub use device_memory::{DeviceMemory, DeviceRegion};
pub use rom::Rom;
pub use sparse::data_in;

/// Guest RAM as every device sees it. Built once, before the vCPUs start.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The kernel refused the mapping.
    #[error(
        "-m: cannot map {size} bytes of guest memory: {source}; give the VM less, or check the limits of this process (ulimit -v, MemoryMax)"
    )]
    Map {
        /// Bytes asked for.
        size: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The file behind `-mem-path`, or the anonymous one behind `mem-share=on`, could not be made ready.
    #[error("-mem-path {}: {source}", path.display())]
    File {
        /// As given; `memfd` for `mem-share=on` without a path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A hugetlbfs without as many free pages.
    #[error(
        "-mem-path {}: the host has not enough free huge pages for {size} bytes: reserve more (vm.nr_hugepages), or leave -mem-path out",
        path.display()
    )]
    HugePages {
        /// The hugetlbfs.
        path: PathBuf,
        /// Bytes wanted.
        size: u64,
    },
    /// The size does not fit the file system's pages.
    #[error("-mem-path {}: guest memory of {size} bytes is not a multiple of its {page} byte pages", path.display())]
    PageSize {
        /// The directory or file.
        path: PathBuf,
        /// Guest RAM in bytes.
        size: u64,
        /// Page size in bytes.
        page: u64,
    },
    /// The host has not the nodes, or does not let this process choose.
    #[error(
        "memory object: policy on host-nodes {nodes:#x} (one bit each): {source}; name nodes that the host has, or leave policy out"
    )]
    Placement {
        /// The nodes asked for.
        nodes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Pages could not be allocated up front.
    #[error("-mem-prealloc: cannot allocate {size} bytes now: {source}; give the VM less memory")]
    Prealloc {
        /// Bytes asked for.
        size: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Memory that a device brings cannot lie there.
    #[error(
        "device \"{device}\": its memory at {base:#x}+{size:#x} {what}: write another memaddr, or leave it out"
    )]
    Place {
        /// Which device.
        device: String,
        /// Guest physical address.
        base: u64,
        /// Bytes.
        size: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Memory that a device brings could not be had.
    #[error("device \"{device}\": {source}")]
    OfDevice {
        /// Which device.
        device: String,
        /// Why not.
        #[source]
        source: Box<Self>,
    },
    /// Blocks that are smaller than what can be given back.
    #[error("block-size of {block} bytes is smaller than the {page} byte pages under it: make it as large")]
    BlockSize {
        /// Bytes of a block.
        block: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// KVM refused a memory slot.
    #[error("KVM refused guest memory at {base:#x}+{size:#x}: {source}")]
    Slot {
        /// Guest physical address.
        base: u64,
        /// Bytes.
        size: u64,
        /// KVM's answer.
        #[source]
        source: io::Error,
    },
}

/// What `-mem-*`, `-machine` and a memory object together ask for.
struct Wish<'a> {
    size: u64,
    path: Option<&'a Path>,
    /// Wanted even where nothing is shared.
    memfd: bool,
    shared: bool,
    prealloc: bool,
    dump_guest_core: bool,
    placement: Option<Placement>,
}

impl<'a> Wish<'a> {
    fn new(memory: &'a MemoryConfig, machine: &MachineConfig) -> Self {
        let mut wish = Self {
            size: memory.size,
            path: memory.path.as_deref(),
            memfd: false,
            shared: machine.mem_share,
            prealloc: memory.prealloc,
            dump_guest_core: machine.dump_guest_core,
            placement: None,
        };
        if let Some(backend) = memory.backends.first() {
            match &backend.kind {
                MemoryBackendKind::Ram => {}
                MemoryBackendKind::File(path) => wish.path = Some(path),
                MemoryBackendKind::Memfd => wish.memfd = true,
            }
            wish.shared |= backend.share;
            wish.prealloc |= backend.prealloc;
            wish.dump_guest_core &= backend.dump_guest_core;
            wish.placement = backend.placement;
        }
        wish
    }
}

/// Whether guest RAM may hold something else than zeroes when it is mapped: that of a file with a name may.
pub fn may_be_dirty(memory: &MemoryConfig) -> bool {
    let object = memory.backends.first().map(|b| &b.kind);
    memory.path.is_some() || matches!(object, Some(MemoryBackendKind::File(_)))
}

/// Maps guest RAM as the configuration asks. No page is touched unless `-mem-prealloc` says so.
pub fn build(memory: &MemoryConfig, machine: &MachineConfig) -> Result<GuestMemory, MemoryError> {
    let wish = Wish::new(memory, machine);
    let backing = Backing::open(&wish)?;
    map_all(memory, gap(machine), &wish, &backing)
}

/// Where RAM below 4 GiB ends at the latest.
fn gap(machine: &MachineConfig) -> u64 {
    match machine.kind {
        MachineKind::Q35 => layout::Q35_GAP_START,
        MachineKind::Microvm | MachineKind::Virt | MachineKind::None => layout::GAP_START,
    }
}

/// Maps guest RAM that was saved to `file`, which has exactly its size: privately, so that pages come in when the guest needs them and are
/// its own only once it writes.
pub fn restore(
    memory: &MemoryConfig,
    machine: &MachineConfig,
    file: &File,
) -> Result<GuestMemory, MemoryError> {
    let failed = |source| MemoryError::Map { size: memory.size, source };
    let wish = Wish::new(memory, machine);
    let ram = map_all(memory, gap(machine), &wish, &Backing::snapshot(file).map_err(failed)?)?;
    let holes = sparse::Holes::of(file, memory.size).map_err(failed)?;
    let mut offset = 0;
    for region in ram.iter() {
        for hole in holes.within(offset..offset + region.len()) {
            renew_part(region, hole, wish.dump_guest_core)?;
        }
        offset += region.len();
    }
    Ok(ram)
}

/// Puts new pages, all zero, in place of guest RAM, whatever lay under it. Nobody may use RAM meanwhile.
pub fn renew(memory: &GuestMemory, dump_guest_core: bool) -> Result<(), MemoryError> {
    memory.iter().try_for_each(|region| renew_part(region, 0..region.len(), dump_guest_core))
}

/// The same for bytes of one region.
fn renew_part(
    region: &GuestRegionMmap,
    part: std::ops::Range<u64>,
    dump_guest_core: bool,
) -> Result<(), MemoryError> {
    let failed = |source| MemoryError::Map { size: region.len(), source };
    if part.end > region.len() || part.start > part.end {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let number = |n| usize::try_from(n).map_err(|e| failed(io::Error::other(e)));
    let (start, size) = (number(part.start)?, number(part.end - part.start)?);
    let place = region.as_ptr().wrapping_add(start).cast();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: replaces a part of the region's own mapping by one of the same size and access, which the region goes on to own. KVM follows
    // by itself (MMU notifiers).
    if unsafe { libc::mmap(place, size, access, flags, -1, 0) } == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    if !dump_guest_core {
        // SAFETY: as above, and the advice changes core dumps only.
        unsafe { rustix::mm::madvise(place, size, Advice::LinuxDontDump) }.map_err(|e| failed(e.into()))?;
    }
    Ok(())
}

/// Says on which of the host's nodes the pages of a mapping are taken, before any is.
///
/// # Safety
/// The range is a mapping of the caller's. Nothing in it is read or written.
unsafe fn settle(start: *mut u8, size: usize, placement: Placement) -> Result<(), MemoryError> {
    // linux/mempolicy.h
    let mode: libc::c_long = match placement.policy {
        PlacementPolicy::Preferred => 1,
        PlacementPolicy::Bind => 2,
        PlacementPolicy::Interleave => 3,
    };
    // The kernel looks at one bit less than it is told of.
    let (nodes, bits, flags): (u64, libc::c_ulong, libc::c_long) = (placement.nodes, 65, 0);
    // SAFETY: the range is as the caller promises, and the kernel reads one word of node bits.
    let done = unsafe { libc::syscall(libc::SYS_mbind, start, size, mode, &raw const nodes, bits, flags) };
    if done == 0 {
        return Ok(());
    }
    Err(MemoryError::Placement { nodes, source: io::Error::last_os_error() })
}

fn map_all(
    memory: &MemoryConfig,
    gap: u64,
    wish: &Wish<'_>,
    backing: &Backing,
) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::with_capacity(2);
    // The second range continues in the file where the first ended, so the file holds RAM without the hole.
    let mut offset = 0;
    for range in layout::ram(memory.size, gap) {
        regions.push(map(range, offset, backing, wish)?);
        offset += range.size;
    }
    if wish.prealloc {
        for region in &regions {
            prealloc(region)?;
        }
    }
    GuestMemory::from_regions(regions)
        .map_err(|e| MemoryError::Map { size: memory.size, source: io::Error::other(e) })
}

fn map(
    range: layout::Range,
    offset: u64,
    backing: &Backing,
    wish: &Wish<'_>,
) -> Result<GuestRegionMmap, MemoryError> {
    let failed = |source| MemoryError::Map { size: range.size, source };
    let size = usize::try_from(range.size).map_err(|e| failed(io::Error::other(e)))?;
    // Without MAP_NORESERVE a host with overcommit off would refuse VMs that will never touch all their memory.
    let (file, flags) = backing.mapping(offset);
    let flags = if backing.huge() { flags } else { flags | libc::MAP_NORESERVE };
    let region = MmapRegion::build(file, size, libc::PROT_READ | libc::PROT_WRITE, flags).map_err(|e| {
        let source = mmap_error(e);
        match (&source.raw_os_error(), wish.path) {
            (Some(libc::ENOMEM), Some(path)) if backing.huge() => {
                MemoryError::HugePages { path: path.into(), size: range.size }
            }
            _ => failed(source),
        }
    })?;
    if !wish.dump_guest_core {
        // SAFETY: the range is the mapping made above, and the advice changes core dumps only.
        unsafe { rustix::mm::madvise(region.as_ptr().cast(), size, Advice::LinuxDontDump) }
            .map_err(|e| failed(e.into()))?;
    }
    if let Some(placement) = wish.placement {
        // SAFETY: the range is the mapping made above.
        unsafe { settle(region.as_ptr(), size, placement) }?;
    }
    GuestRegionMmap::new(region, GuestAddress(range.base))
        .ok_or_else(|| failed(io::Error::other("address overflow")))
}

fn mmap_error(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(e) => e,
        e => io::Error::other(e),
    }
}

fn prealloc(region: &GuestRegionMmap) -> Result<(), MemoryError> {
    let size = region.len();
    // One thread fills about 1 GiB a second: more of them for a large guest, but no more than the host has processors.
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(16)) as u64;
    // Whole gigabytes, so that each part is aligned whatever the page size.
    let part = size.div_ceil(threads).next_multiple_of(1 << 30);
    let start = region.as_ptr() as usize;
    std::thread::scope(|scope| {
        let fillers: Vec<_> = (0..size)
            .step_by(usize::try_from(part).unwrap_or(usize::MAX))
            .map(|at| {
                let len = part.min(size - at);
                scope.spawn(move || {
                    // SAFETY: [start + at, + len) lies inside the mapping, which outlives this scope; populating
                    // pages changes no data.
                    unsafe {
                        rustix::mm::madvise(
                            (start + at as usize) as *mut _,
                            len as usize,
                            Advice::LinuxPopulateWrite,
                        )
                    }
                })
            })
            .collect();
        fillers
            .into_iter()
            .try_for_each(|f| f.join().unwrap_or(Err(rustix::io::Errno::FAULT)))
            .map_err(|e| MemoryError::Prealloc { size, source: e.into() })
    })
}

/// Gives guest RAM to KVM, one slot for each region, numbered from 0.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in memory.iter().enumerate() {
        let (base, size) = (region.start_addr().0, region.len());
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: base,
            memory_size: size,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the slot describes exactly one live mapping; the machine drops its VM file, and with it the slot,
        // before the mapping.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|e| MemoryError::Slot {
            base,
            size,
            source: e.into(),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    fn machine(mem_share: bool) -> MachineConfig {
        MachineConfig { kind: MachineKind::Microvm, dump_guest_core: false, mem_share }
    }

    #[test]
    fn huge_pages_are_there_before_the_guest_or_the_vm_is_refused() {
        use std::os::fd::AsRawFd;
        let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
        // A kernel without huge pages has none to test.
        let Ok(file) = rustix::fs::memfd_create("huge", flags) else { return };
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        // More than any host has.
        let size = 1 << 44;
        let config = MemoryConfig { size, path: Some(path.clone()), prealloc: false, backends: Vec::new() };
        match build(&config, &machine(true)) {
            Err(MemoryError::HugePages { path: named, .. }) => assert_eq!(named, path),
            other => panic!("{:?}", other.map(|_| ())),
        }
    }

    #[test]
    fn pages_are_taken_where_the_object_says() {
        let backend = |nodes| crate::config::MemoryBackend {
            id: "m".into(),
            kind: MemoryBackendKind::Ram,
            size: 2 << 20,
            share: false,
            readonly: false,
            prealloc: true,
            dump_guest_core: true,
            placement: Some(Placement { policy: PlacementPolicy::Bind, nodes }),
        };
        let build = |nodes| {
            let backends = vec![backend(nodes)];
            build(&MemoryConfig { size: 2 << 20, path: None, prealloc: false, backends }, &machine(false))
        };
        // No host has that node.
        match build(1 << 63) {
            Err(MemoryError::Placement { nodes, .. }) => assert_eq!(nodes, 1 << 63),
            other => panic!("{:?}", other.map(|_| ())),
        }
        match build(1) {
            Ok(memory) => {
                let place = memory.iter().next().unwrap().as_ptr();
                let (mut mode, mut nodes) = (0i32, 0u64);
                const MPOL_F_ADDR: libc::c_long = 2;
                // SAFETY: the kernel writes a number and one word of node bits, and looks at a mapping that is there.
                let asked = unsafe {
                    libc::syscall(
                        libc::SYS_get_mempolicy,
                        &raw mut mode,
                        &raw mut nodes,
                        65u64,
                        place,
                        MPOL_F_ADDR,
                    )
                };
                assert!(asked != 0 || (mode, nodes) == (2, 1), "{mode} {nodes:#x}");
            }
            // A container may keep the call from us, and a kernel may not have it.
            Err(MemoryError::Placement { source, .. }) => {
                let code = source.raw_os_error();
                assert!([Some(libc::EPERM), Some(libc::ENOSYS)].contains(&code), "{source}");
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn maps_private_shared_and_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ram");
        for (path, share) in [
            (None, false),
            (None, true),
            (Some(file.clone()), false),
            (Some(file.clone()), true),
            (Some(dir.path().to_owned()), true),
        ] {
            let config = MemoryConfig { size: 16 << 20, path, prealloc: share, backends: Vec::new() };
            let memory = build(&config, &machine(share)).unwrap();
            memory.write_obj(0x55u8, GuestAddress((16 << 20) - 1)).unwrap();
            assert!(memory.write_obj(0u8, GuestAddress(16 << 20)).is_err());
        }
        assert_eq!(std::fs::metadata(&file).unwrap().len(), 16 << 20);
        // Only the file that was asked for by name stays.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_snapshot_is_mapped_privately_and_gone_when_renewed() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7], 4096).unwrap();
        let config = MemoryConfig { size: 16 << 20, path: None, prealloc: false, backends: Vec::new() };
        let memory = restore(&config, &machine(false), &file).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(4096)).unwrap(), 7);
        memory.write_obj(8u8, GuestAddress(4096)).unwrap();
        let again = restore(&config, &machine(false), &file).unwrap();
        assert_eq!(again.read_obj::<u8>(GuestAddress(4096)).unwrap(), 7);
        renew(&again, false).unwrap();
        assert_eq!(again.read_obj::<u8>(GuestAddress(4096)).unwrap(), 0);
    }

    #[test]
    fn holes_of_a_snapshot_on_a_full_tmpfs_can_be_touched() {
        let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
        let file = File::create_new(dir.path().join("memory")).unwrap();
        file.set_len(16 << 20).unwrap();
        let write = |at: u64| std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], at).unwrap();
        [0, 2, 4, 4000].into_iter().for_each(|page| write(page * 4096));
        let file = File::open(dir.path().join("memory")).unwrap();
        let before = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let config = MemoryConfig { size: 16 << 20, path: None, prealloc: false, backends: Vec::new() };
        let memory = restore(&config, &machine(false), &file).unwrap();
        for page in 0..4096u64 {
            let byte: u8 = memory.read_obj(GuestAddress(page * 4096)).unwrap();
            assert_eq!(byte, if [0, 2, 4, 4000].contains(&page) { 7 } else { 0 }, "page {page}");
            memory.write_obj(1u8, GuestAddress(page * 4096 + 1)).unwrap();
        }
        // Nothing came into the file: on a file system that is full it could not have.
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()), before);
    }

    #[test]
    fn the_part_above_the_hole_is_memory_too() {
        let config = MemoryConfig { size: 5 << 30, path: None, prealloc: false, backends: Vec::new() };
        let memory = build(&config, &machine(false)).unwrap();
        memory.write_obj(1u8, GuestAddress(6 << 30)).unwrap_err();
        memory.write_obj(1u8, GuestAddress((6 << 30) - 1)).unwrap();
        memory.write_obj(1u8, GuestAddress(layout::GAP_START)).unwrap_err();
    }

    #[test]
    fn says_what_is_wrong_with_a_backing_file() {
        let config = MemoryConfig {
            size: 16 << 20,
            path: Some("/nonexistent/ram".into()),
            prealloc: false,
            backends: Vec::new(),
        };
        let error = build(&config, &machine(false)).unwrap_err().to_string();
        assert!(error.starts_with("-mem-path /nonexistent/ram: No such file"), "{error}");
    }
}
