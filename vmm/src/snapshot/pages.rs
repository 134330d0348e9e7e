//! The file `memory`: owns which pages of guest RAM are worth writing, and the checksum of those that are.
//!
//! Guest RAM lies in the file as on the command line: without the hole of the address map. Pages that the guest never touched are found by
//! what this process has mapped (`/proc/self/pagemap`) and, in a VM that was restored, by where the file under its RAM has data; those that
//! are zero all the same by looking. None of them is written: the file has holes there.
//!
//! The checksum covers each page that is not zero, with its number: a copy of the file with other holes has the same.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap};

use super::checksum::Crc32c;
use crate::memory::{GuestMemory, data_in};

/// Granularity of holes and of the checksum, whatever the host's pages are.
const PAGE: usize = 4096;
/// Most bytes per write.
const WRITE_MAX: usize = 4 << 20;
/// Pages looked up at a time: 128 KiB of the page map, 64 MiB of RAM.
const LOOKUP: usize = 16 << 10;

/// Of an entry of the page map (Documentation/admin-guide/mm/pagemap.rst): in RAM, or in swap.
const HERE: u64 = 0b11 << 62;

/// What the file `memory` holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Bytes of guest RAM, and of the file.
    pub size: u64,
    /// Pages of 4096 bytes that are not zero.
    pub count: u64,
    /// CRC-32C over each of them: its number, then its bytes.
    pub checksum: u32,
}

struct Tally {
    count: u64,
    crc: Crc32c,
}

impl Tally {
    fn new() -> Self {
        Self { count: 0, crc: Crc32c::new() }
    }

    fn add(&mut self, number: u64, page: &[u8]) {
        self.count += 1;
        self.crc.update(&number.to_le_bytes());
        self.crc.update(page);
    }

    fn done(self, size: u64) -> Pages {
        Pages { size, count: self.count, checksum: self.crc.value() }
    }
}

fn is_zero(page: &[u8]) -> bool {
    // Most pages that are not zero show it at once.
    let (first, rest) = page.split_at(page.len().min(64));
    let quiet = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum | byte) == 0;
    quiet(first) && rest.chunks(512).all(quiet)
}

/// Writes all of guest RAM to an empty file. Nothing else may write to RAM meanwhile.
pub(super) fn write(memory: &GuestMemory, to: &File) -> io::Result<Pages> {
    let size = memory.iter().map(GuestRegionMmap::len).sum::<u64>();
    to.set_len(size)?;
    // Without it every page has to be looked at, which is slow and not wrong.
    let map = File::open("/proc/self/pagemap").ok();
    let (mut tally, mut base) = (Tally::new(), 0);
    for region in memory.iter() {
        write_region(region, base, map.as_ref(), to, &mut tally)?;
        base += region.len();
    }
    Ok(tally.done(size))
}

fn write_region(
    region: &GuestRegionMmap,
    base: u64,
    map: Option<&File>,
    to: &File,
    tally: &mut Tally,
) -> io::Result<()> {
    let length = usize::try_from(region.len()).map_err(io::Error::other)?;
    // SAFETY: the region's mapping, alive as long as `region`; the guest is paused and its devices are suspended, so nobody writes to it.
    let ram = unsafe { std::slice::from_raw_parts(region.as_ptr().cast_const(), length) };
    let below = match region.file_offset() {
        Some(place) => data_in(place.file(), place.start()..place.start() + region.len())?,
        None => Vec::new(),
    };
    let mut touched = vec![0u8; 8 * LOOKUP];
    let mut run: Range<usize> = 0..0;
    for (chunk, pages) in ram.chunks(LOOKUP * PAGE).enumerate() {
        let first = chunk * LOOKUP;
        let known = map.and_then(|map| look_up(map, pages, &mut touched));
        for (at, page) in pages.chunks(PAGE).enumerate() {
            let offset = (first + at) * PAGE;
            let touched = known.as_ref().is_none_or(|known| known(at, &touched));
            if !(touched || overlaps(&below, offset as u64..(offset + PAGE) as u64)) || is_zero(page) {
                continue;
            }
            tally.add(base / PAGE as u64 + (first + at) as u64, page);
            if run.end != offset || run.len() >= WRITE_MAX {
                flush(ram, run, base, to)?;
                run = offset..offset;
            }
            run.end = offset + page.len();
        }
    }
    flush(ram, run, base, to)
}

fn flush(ram: &[u8], run: Range<usize>, base: u64, to: &File) -> io::Result<()> {
    let offset = base + run.start as u64;
    to.write_all_at(ram.get(run).unwrap_or_default(), offset)
}

/// Reads the page map for `pages` into `entries`; returns whether page number `at` of them may hold something.
fn look_up(map: &File, pages: &[u8], entries: &mut [u8]) -> Option<impl Fn(usize, &[u8]) -> bool + use<>> {
    // SAFETY: asks for a constant of this process.
    let host_page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
    let start = pages.as_ptr().addr();
    let count = pages.len().div_ceil(host_page);
    map.read_exact_at(entries.get_mut(..8 * count)?, 8 * (start / host_page) as u64).ok()?;
    Some(move |at: usize, entries: &[u8]| {
        let entry = entries.get(8 * (at * PAGE / host_page)..).and_then(|e| e.first_chunk::<8>());
        entry.is_none_or(|entry| u64::from_le_bytes(*entry) & HERE != 0)
    })
}

fn overlaps(sorted: &[Range<u64>], page: Range<u64>) -> bool {
    let at = sorted.partition_point(|r| r.end <= page.start);
    sorted.get(at).is_some_and(|r| r.start < page.end)
}

/// Reads the whole of `file`, which has `size` bytes, and gives each page that is not zero to `each` with its offset.
fn scan(file: &File, size: u64, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<Pages> {
    let mut tally = Tally::new();
    let mut buffer = vec![0; WRITE_MAX.min(usize::try_from(size).unwrap_or(WRITE_MAX))];
    for data in data_in(file, 0..size)? {
        // Whole pages: a hole may begin within one.
        let mut at = data.start - data.start % PAGE as u64;
        let end = data.end.next_multiple_of(PAGE as u64).min(size);
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            let part = buffer.get_mut(..length).unwrap_or_default();
            file.read_exact_at(part, at)?;
            for page in part.chunks(PAGE) {
                if !is_zero(page) {
                    tally.add(at / PAGE as u64, page);
                    each(at, page)?;
                }
                at += page.len() as u64;
            }
        }
    }
    Ok(tally.done(size))
}

/// What `file` holds, to be compared with what was saved.
pub(super) fn examine(file: &File, size: u64) -> io::Result<Pages> {
    scan(file, size, |_, _| Ok(()))
}

/// Copies the file into guest RAM, which is all zero. The file has as many bytes as RAM.
pub(super) fn read(file: &File, memory: &GuestMemory) -> io::Result<Pages> {
    let size = memory.iter().map(GuestRegionMmap::len).sum::<u64>();
    scan(file, size, |offset, page| {
        let mut base = 0;
        for region in memory.iter() {
            if let Some(inside) = offset.checked_sub(base).filter(|i| *i < region.len()) {
                let slice =
                    vm_memory::Bytes::write_slice(region, page, vm_memory::MemoryRegionAddress(inside));
                return slice.map_err(io::Error::other);
            }
            base += region.len();
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek as _, Write as _};
    use std::os::unix::fs::MetadataExt as _;
    use vm_memory::{Bytes as _, GuestAddress};

    fn ram() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20), (GuestAddress(1 << 32), 1 << 20)]).unwrap()
    }

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    #[test]
    fn only_pages_that_hold_something_are_written() {
        let memory = ram();
        let to = file();
        let empty = write(&memory, &to).unwrap();
        assert_eq!((empty.size, empty.count, to.metadata().unwrap().blocks()), (17 << 20, 0, 0));
        // One page of zeroes, one at an end, a run, and one above the hole.
        memory.write_slice(&[0; PAGE], GuestAddress(8 << 20)).unwrap();
        memory.write_obj(1u8, GuestAddress((16 << 20) - 1)).unwrap();
        memory.write_slice(&[5; 3 * PAGE], GuestAddress(PAGE as u64)).unwrap();
        memory.write_obj(9u8, GuestAddress((1 << 32) + 5)).unwrap();
        let to = file();
        let pages = write(&memory, &to).unwrap();
        assert_eq!(pages.count, 5);
        assert!(to.metadata().unwrap().blocks() <= 16 * 8, "{}", to.metadata().unwrap().blocks());
        assert_eq!(examine(&to, pages.size).unwrap(), pages);
        let again = ram();
        assert_eq!(read(&to, &again).unwrap(), pages);
        assert_eq!(again.read_obj::<u8>(GuestAddress((1 << 32) + 5)).unwrap(), 9);
        assert_eq!(write(&again, &file()).unwrap(), pages);
        // Without holes it is the same to the checksum.
        let (mut dense, mut bytes) = (file(), vec![0; 17 << 20]);
        to.read_exact_at(&mut bytes, 0).unwrap();
        dense.write_all(&bytes).unwrap();
        assert_eq!(examine(&dense, pages.size).unwrap(), pages);
        bytes[16 << 20 | 5] = 8;
        dense.rewind().unwrap();
        dense.write_all(&bytes).unwrap();
        assert_ne!(examine(&dense, pages.size).unwrap(), pages);
    }

    #[test]
    fn what_a_file_below_holds_counts_as_touched() {
        let below = file();
        below.set_len(1 << 20).unwrap();
        below.write_all_at(&[3; PAGE], 40 * PAGE as u64).unwrap();
        let region = vm_memory::MmapRegion::build(
            Some(vm_memory::FileOffset::new(below, 0)),
            1 << 20,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE,
        );
        let region = GuestRegionMmap::new(region.unwrap(), GuestAddress(0)).unwrap();
        let memory = GuestMemory::from_regions(vec![region]).unwrap();
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        assert_eq!(write(&memory, &file()).unwrap().count, 2);
    }

    #[test]
    fn a_file_that_is_shorter_than_it_should_be_is_an_error() {
        let short = file();
        short.write_all_at(&[1; PAGE], 0).unwrap();
        short.set_len(PAGE as u64 / 2).unwrap();
        assert!(examine(&short, PAGE as u64).is_err());
    }
}
