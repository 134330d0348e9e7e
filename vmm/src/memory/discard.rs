//! Giving guest pages back to the host: owns how, which depends on what lies under guest RAM.
//!
//! | under guest RAM              | what frees a page                                                            |
//! |------------------------------|------------------------------------------------------------------------------|
//! | nothing, or a private file   | `MADV_DONTNEED`: our copy goes                                               |
//! | a memfd or file, shared      | `MADV_REMOVE`: a hole in the file, for everybody who has it mapped           |
//! | either, on hugetlbfs         | the same, for whole huge pages only                                          |
//!
//! What the guest reads there next is zeroes, or what a private file holds. KVM follows by itself.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use rustix::mm::Advice;
use vm_memory::{Address as _, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap};

use super::GuestMemory;

/// `f_type` of a hugetlbfs (linux/magic.h).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// How many hold all of guest RAM where it is. There is one VM in this process. Whoever gives pages back holds the lock meanwhile.
static PINS: RwLock<u32> = RwLock::new(0);

/// Guest RAM stays where it is while there is one: a device of the host writes to its pages past the page tables of this process, and would
/// go on writing to pages that were given back.
#[derive(Debug)]
pub struct Pin(());

impl Pin {
    /// Holds guest RAM, as soon as no page is on its way back.
    #[expect(clippy::new_without_default, reason = "it does something")]
    pub fn new() -> Self {
        *PINS.write().unwrap_or_else(PoisonError::into_inner) += 1;
        Self(())
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        *PINS.write().unwrap_or_else(PoisonError::into_inner) -= 1;
    }
}

/// Gives pages of one guest's RAM back.
pub struct Discarder {
    memory: Arc<GuestMemory>,
    page: u64,
}

impl Discarder {
    /// For all of `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let page = memory.iter().filter_map(huge_page).max().unwrap_or_else(ordinary_page);
        Self { memory, page }
    }

    /// Whose pages they are.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The smallest unit that can be given back, in bytes: a power of two.
    pub fn page_size(&self) -> u64 {
        self.page
    }

    /// Gives back the whole pages inside `len` bytes at guest physical `addr`, as far as they are RAM. Returns how many bytes.
    pub fn discard(&self, addr: u64, len: u64) -> io::Result<u64> {
        let Some(end) = addr.checked_add(len) else { return Ok(0) };
        let mut given = 0;
        for region in self.memory.iter() {
            let base = region.start_addr().raw_value();
            let (from, to) = (addr.max(base), end.min(base.saturating_add(region.len())));
            if from < to {
                given += self.discard_in(region, from - base, to - base)?;
            }
        }
        Ok(given)
    }

    /// As [`discard`](Self::discard), for `len` bytes at `host` in this process, which lie in one region of guest RAM or are left alone.
    pub fn discard_host(&self, host: *const u8, len: usize) -> io::Result<u64> {
        let host = host as u64;
        for region in self.memory.iter() {
            let base = region.as_ptr() as u64;
            if let Some(from) = host.checked_sub(base)
                && let Some(to) = from.checked_add(len as u64).filter(|to| *to <= region.len())
            {
                return self.discard_in(region, from, to);
            }
        }
        Ok(0)
    }

    /// `from` and `to` are offsets into `region`, both inside it.
    fn discard_in(&self, region: &GuestRegionMmap, from: u64, to: u64) -> io::Result<u64> {
        let from = from.next_multiple_of(self.page);
        let to = to - to % self.page;
        let pins = PINS.read().unwrap_or_else(PoisonError::into_inner);
        if from >= to || *pins > 0 {
            return Ok(0);
        }
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let advice = if shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        // SAFETY: [from, to) lies in the mapping of `region`, which `memory` keeps. Nobody holds a Rust reference into guest RAM:
        // all accesses go through raw pointers and atomics, and to them it is as if the guest had written zeroes.
        unsafe {
            let start = region.as_ptr().wrapping_add(from as usize);
            rustix::mm::madvise(start.cast(), (to - from) as usize, advice)?;
        }
        Ok(to - from)
    }
}

fn ordinary_page() -> u64 {
    // SAFETY: asks for a constant of this process.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// The page size of a region on a hugetlbfs.
fn huge_page(region: &GuestRegionMmap) -> Option<u64> {
    let file = region.file_offset()?;
    let fs = rustix::fs::fstatfs(file.file()).ok()?;
    let page = u64::try_from(fs.f_bsize).ok()?;
    (fs.f_type as u64 & 0xffff_ffff == HUGETLBFS_MAGIC && page.is_power_of_two()).then_some(page)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::{MachineConfig, MachineKind, MemoryConfig};
    use vm_memory::{Bytes as _, GuestAddress};

    const SIZE: u64 = 64 << 20;

    pub(crate) fn ram(path: Option<std::path::PathBuf>, mem_share: bool) -> Arc<GuestMemory> {
        let config = MemoryConfig { size: SIZE, path, prealloc: false, backends: Vec::new() };
        let machine = MachineConfig { kind: MachineKind::Microvm, dump_guest_core: true, mem_share };
        Arc::new(crate::memory::build(&config, &machine).unwrap())
    }

    /// Kilobytes of guest RAM that this process has in memory, from smaps.
    pub(crate) fn resident(memory: &GuestMemory) -> u64 {
        use std::os::unix::fs::FileExt;
        // One word for each page of this process, whatever mappings the kernel has merged (proc_pid_pagemap(5)).
        const PRESENT: u64 = 1 << 63;
        let map = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut pages = 0;
        for region in memory.iter() {
            let mut words = vec![0; region.len() as usize / 4096 * 8];
            map.read_exact_at(&mut words, region.as_ptr() as u64 / 4096 * 8).unwrap();
            let words = words.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word));
            pages += words.filter(|word| word & PRESENT != 0).count() as u64;
        }
        pages * 4
    }

    #[test]
    fn memory_falls_for_each_kind_of_ram() {
        let dir = tempfile::tempdir().unwrap();
        for (path, share) in [
            (None, false),
            (None, true),
            (Some(dir.path().to_owned()), false),
            (Some(dir.path().to_owned()), true),
        ] {
            let memory = ram(path.clone(), share);
            for at in (0..SIZE).step_by(4096) {
                memory.write_obj(7u8, GuestAddress(at)).unwrap();
            }
            assert!(resident(&memory) >= SIZE >> 10);
            let discarder = Discarder::new(Arc::clone(&memory));
            assert_eq!(discarder.page_size(), 4096);
            // A page and two halves: only the page goes.
            assert_eq!(discarder.discard((1 << 20) - 2048, 8192).unwrap(), 4096);
            assert_eq!(memory.read_obj::<u8>(GuestAddress(1 << 20)).unwrap(), 0);
            assert_eq!(memory.read_obj::<u8>(GuestAddress((1 << 20) - 4096)).unwrap(), 7);
            // Over the end of RAM, and far from it.
            assert_eq!(discarder.discard(SIZE / 2, u64::MAX / 2).unwrap(), SIZE / 2);
            assert_eq!(discarder.discard(u64::MAX - 4096, 8192).unwrap(), 0);
            assert_eq!(discarder.discard(SIZE, 4096).unwrap(), 0);
            let after = resident(&memory);
            assert!(after <= (SIZE / 2) >> 10, "{path:?} {share}: {after} kB");
            if share {
                // A hole in the file: the pages are gone for the file as well.
                let file = memory.iter().next().unwrap().file_offset().unwrap().file().metadata().unwrap();
                assert!(std::os::unix::fs::MetadataExt::blocks(&file) * 512 <= SIZE / 2);
            }
        }
    }

    #[test]
    fn addresses_of_this_process_are_taken_if_they_are_guest_ram() {
        let memory = ram(None, false);
        memory.write_obj(7u8, GuestAddress(8192)).unwrap();
        let discarder = Discarder::new(Arc::clone(&memory));
        let base = memory.iter().next().unwrap().as_ptr();
        assert_eq!(discarder.discard_host(base.wrapping_add(8192), 4096).unwrap(), 4096);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(8192)).unwrap(), 0);
        for (host, len) in [
            (base.wrapping_add(SIZE as usize), 4096),
            (base.wrapping_sub(4096), 8192),
            (base, usize::MAX),
            (std::ptr::null_mut(), 4096),
        ] {
            assert_eq!(discarder.discard_host(host, len).unwrap(), 0);
        }
    }
}
