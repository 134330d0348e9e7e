//! qcow2 images, version 2 and 3: owns one image file's tables, and what each guest cluster is.
//!
//! ```text
//! stack      the image and what lies under it, as one disk     engine   requests of the guest, for `virtio::blk`
//! header     parsing and refusing (pure)                       cache    tables in memory
//! refcount   use counts, allocation                            inflate  compressed clusters (pure)
//! ```
//!
//! Tables are kept in memory and written at a flush, or when memory for them runs out, in an order that leaves the file whole at every
//! moment: counts that rise, data; *sync*; L2 tables; *sync*; L1 entries; *sync*; then counts that fall. A power cut leaks clusters at
//! worst, and loses what the guest has not flushed. Clusters that were given up are used again only after that.
//!
//! The file is hostile: an offset is used only when it is aligned, inside the file and (for a writer) not one of the metadata in use.

use std::io;

mod cache;
mod engine;
mod header;
mod inflate;
mod refcount;
mod stack;
mod store;

#[cfg(test)]
mod tests;

use cache::{Tables, entry};
pub(super) use engine::{QcowEngine, lock};
pub use header::FormatError;
use header::{HEADER_READ, Header};
use refcount::Refcounts;
pub(super) use stack::Layer;
pub(crate) use stack::Stack;
pub(super) use store::Store;

/// Bytes of L2 tables in memory, unless the drive says something else: enough for 16 GiB of disk with clusters of 64 KiB.
const DEFAULT_L2_CACHE: u64 = 2 << 20;
/// Clusters given up that wait for a flush; more of them make one.
const MAX_PENDING: usize = 1 << 16;
/// Where a version 3 header has the features that a writer must clear.
const AUTOCLEAR_FIELD: u64 = 88;

/// Offset in a table entry.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Refcount is exactly one: may be written in place.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Reads as zeroes (version 3).
const ZERO: u64 = 1;

/// What a guest cluster, or a run of alike ones, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Whatever lies under the image.
    Nothing,
    /// Zeroes.
    Zeroes,
    /// Data from here on in the file; `copied`: ours alone.
    Data { at: u64, copied: bool },
    /// A compressed cluster: the entry that says where.
    Compressed(u64),
}

fn corrupt(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the qcow2 image is damaged: {what}"))
}

/// The offset in `entry`, which must be a cluster inside the file.
fn cluster_offset(entry: u64, cluster_bits: u32, file_len: u64) -> io::Result<u64> {
    let offset = entry & OFFSET_MASK;
    if offset == 0 || offset & ((1 << cluster_bits) - 1) != 0 || offset >= file_len {
        return Err(corrupt("an offset is misaligned or beyond the end of the file"));
    }
    Ok(offset)
}

pub(super) struct Image {
    store: Store,
    header: Header,
    l1: Vec<u64>,
    /// First and last + 1 entry to write.
    l1_dirty: Option<(usize, usize)>,
    /// By index into `l1`.
    l2: Tables,
    /// A writer's.
    refcounts: Option<Refcounts>,
    /// Clusters with one user less, once that is on the medium.
    pending: Vec<u64>,
}

impl Image {
    pub(super) fn open(
        mut store: Store,
        write: bool,
        l2: Option<u64>,
        refcounts: Option<u64>,
    ) -> Result<Self, super::Problem> {
        let host = |e| super::Problem::Host("read its qcow2 tables", e);
        let mut bytes = vec![0; store.len().min(HEADER_READ as u64) as usize];
        store.read(0, &mut bytes).map_err(host)?;
        let header = Header::parse(&bytes, store.len(), write)?;
        let cluster = 1u64 << header.cluster_bits;
        let mut raw = vec![0; header.l1_size * 8];
        store.read(header.l1_offset, &mut raw).map_err(host)?;
        let l1: Vec<u64> = raw.chunks_exact(8).map(|c| entry(c, 0)).collect();
        let mut counts = None;
        if write {
            // Others leave the last cluster short. Whole clusters are what we write.
            let whole = store.len().next_multiple_of(cluster);
            store.extend(whole).map_err(host)?;
            let mut open = Refcounts::open(&mut store, &header, refcounts).map_err(host)?;
            let l1_first = header.l1_offset >> header.cluster_bits;
            open.metadata.extend(l1_first..l1_first + (raw.len() as u64).div_ceil(cluster));
            open.metadata.extend(l1.iter().map(|e| (e & OFFSET_MASK) >> header.cluster_bits));
            counts = Some(open);
            if header.autoclear != 0 {
                store.write(AUTOCLEAR_FIELD, &[0; 8]).map_err(host)?;
            }
        }
        Ok(Self {
            store,
            l1,
            l1_dirty: None,
            l2: Tables::new(l2.unwrap_or(DEFAULT_L2_CACHE), cluster),
            refcounts: counts,
            pending: Vec::new(),
            header,
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.header.size
    }

    pub(super) fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    pub(super) fn backing_name(&self) -> Option<&str> {
        self.header.backing.as_deref()
    }

    pub(super) fn has_zero_clusters(&self) -> bool {
        self.header.version >= 3
    }

    pub(super) fn store(&mut self) -> &mut Store {
        &mut self.store
    }

    /// Index into L1 and into the L2 table.
    fn split(&self, offset: u64) -> (usize, usize) {
        let l2_bits = self.header.cluster_bits - 3;
        let number = offset >> self.header.cluster_bits;
        ((number >> l2_bits) as usize, (number & ((1 << l2_bits) - 1)) as usize)
    }

    fn classify(&self, entry: u64) -> io::Result<Found> {
        if entry & COMPRESSED != 0 {
            return Ok(Found::Compressed(entry));
        }
        if self.has_zero_clusters() && entry & ZERO != 0 {
            return Ok(Found::Zeroes);
        }
        if entry & OFFSET_MASK == 0 {
            return Ok(Found::Nothing);
        }
        let at = cluster_offset(entry, self.header.cluster_bits, self.store.len())?;
        if let Some(counts) = &self.refcounts
            && counts.metadata.contains(&(at >> self.header.cluster_bits))
        {
            return Err(corrupt("data and metadata share a cluster"));
        }
        Ok(Found::Data { at, copied: entry & COPIED != 0 })
    }

    /// The slot of an L2 table, for reading; `None`: there is none.
    fn table(&mut self, l1_index: usize) -> io::Result<Option<usize>> {
        if let Some(slot) = self.l2.find(l1_index as u64) {
            return Ok(Some(slot));
        }
        let entry = self.l1.get(l1_index).copied().unwrap_or(0);
        if entry & OFFSET_MASK == 0 {
            return Ok(None);
        }
        let offset = cluster_offset(entry, self.header.cluster_bits, self.store.len())?;
        if self.l2.is_stuck() {
            self.write_tables()?;
        }
        self.l2.load(&mut self.store, l1_index as u64, offset, false).map(Some)
    }

    /// What the disk has at `offset`, and for how many of `len` bytes. Beyond the end of the image there is nothing.
    pub(super) fn find(&mut self, offset: u64, len: u64) -> io::Result<(Found, u64)> {
        let Some(len) = self.header.size.checked_sub(offset).filter(|n| *n > 0).map(|n| n.min(len)) else {
            return Ok((Found::Zeroes, len));
        };
        let cluster = self.cluster();
        let inside = offset & (cluster - 1);
        let (l1_index, first) = self.split(offset);
        let entries = (cluster / 8) as usize;
        let Some(slot) = self.table(l1_index)? else {
            let rest = (entries - first) as u64 * cluster - inside;
            return Ok((Found::Nothing, len.min(rest)));
        };
        let found = self.classify(entry(self.l2.bytes(slot), first))?;
        let mut run = cluster - inside;
        let mut index = first + 1;
        while run < len && index < entries {
            let next = self.classify(entry(self.l2.bytes(slot), index))?;
            let goes_on = match (found, next) {
                (Found::Nothing, Found::Nothing) | (Found::Zeroes, Found::Zeroes) => true,
                (Found::Data { at, copied }, Found::Data { at: next, copied: same }) => {
                    same == copied && next == at + (index - first) as u64 * cluster
                }
                _ => false,
            };
            if !goes_on {
                break;
            }
            run += cluster;
            index += 1;
        }
        let run = run.min(len);
        let Found::Data { at, copied } = found else { return Ok((found, run)) };
        let at = at + inside;
        // The last cluster of a file that was made by somebody else may be short.
        match self.store.len().saturating_sub(at) {
            0 => Ok((Found::Zeroes, run.min(cluster - inside))),
            there => Ok((Found::Data { at, copied }, run.min(there))),
        }
    }

    /// Where a compressed cluster's bytes are: offset and length.
    fn compressed_range(&self, entry: u64) -> (u64, u64) {
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & !(COMPRESSED | COPIED)) >> offset_bits;
        (offset, (sectors + 1) * 512 - (offset & 511))
    }

    pub(super) fn read_compressed(&mut self, entry: u64, cluster: &mut [u8]) -> io::Result<()> {
        let (offset, len) = self.compressed_range(entry);
        let there = self.store.len().saturating_sub(offset).min(len);
        if there == 0 {
            return Err(corrupt("a compressed cluster lies beyond the end of the file"));
        }
        let mut packed = vec![0; there as usize];
        self.store.read(offset, &mut packed)?;
        inflate::inflate(&packed, cluster).ok_or_else(|| corrupt("a compressed cluster cannot be unpacked"))
    }

    fn counts(&mut self) -> io::Result<(&mut Refcounts, &mut Store)> {
        match &mut self.refcounts {
            Some(counts) => Ok((counts, &mut self.store)),
            None => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }

    fn allocate(&mut self) -> io::Result<u64> {
        let (counts, store) = self.counts()?;
        counts.allocate(store)
    }

    /// The slot of an L2 table that is ours alone: made, or copied from one that a snapshot has too, if need be.
    fn own_table(&mut self, l1_index: usize) -> io::Result<usize> {
        let found = self.table(l1_index)?;
        let old = self.l1.get(l1_index).copied().ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(slot) = found.filter(|_| old & COPIED != 0) {
            return Ok(slot);
        }
        let bits = self.header.cluster_bits;
        let offset = self.allocate()?;
        let slot = match found {
            Some(_) => {
                // Loaded again: to allocate may have written tables, but never throws one out.
                let slot = self.table(l1_index)?.ok_or(io::ErrorKind::NotFound)?;
                self.l2.relocate(slot, offset);
                self.give_up((old & OFFSET_MASK) >> bits);
                slot
            }
            None => {
                if self.l2.is_stuck() {
                    self.write_tables()?;
                }
                self.l2.load(&mut self.store, l1_index as u64, offset, true)?
            }
        };
        // The table must exist in the file before anybody takes the file's length for its end.
        self.store.extend(offset + self.cluster())?;
        self.counts()?.0.metadata.insert(offset >> bits);
        self.l1[l1_index] = offset | COPIED;
        let (first, last) = self.l1_dirty.unwrap_or((l1_index, l1_index + 1));
        self.l1_dirty = Some((first.min(l1_index), last.max(l1_index + 1)));
        Ok(slot)
    }

    fn set_entry(&mut self, offset: u64, value: u64) -> io::Result<()> {
        let (l1_index, index) = self.split(offset);
        let slot = self.own_table(l1_index)?;
        self.l2.change(slot, index * 8, index * 8 + 8).copy_from_slice(&value.to_be_bytes());
        Ok(())
    }

    fn get_entry(&mut self, offset: u64) -> io::Result<u64> {
        let (l1_index, index) = self.split(offset);
        Ok(self.table(l1_index)?.map_or(0, |slot| entry(self.l2.bytes(slot), index)))
    }

    fn give_up(&mut self, number: u64) {
        self.pending.push(number);
    }

    /// What `entry` refers to has one user less.
    fn give_up_entry(&mut self, entry: u64) {
        let bits = self.header.cluster_bits;
        if entry & COMPRESSED != 0 {
            let (offset, len) = self.compressed_range(entry);
            for number in offset >> bits..=(offset + len - 1) >> bits {
                self.give_up(number);
            }
        } else if entry & OFFSET_MASK != 0 {
            self.give_up((entry & OFFSET_MASK) >> bits);
        }
    }

    /// Gives the guest cluster at `offset` new content: `bytes`, one cluster.
    pub(super) fn put_cluster(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let old = self.get_entry(offset)?;
        let own = old & COMPRESSED == 0 && old & COPIED != 0 && old & OFFSET_MASK != 0;
        if own {
            let at = cluster_offset(old, self.header.cluster_bits, self.store.len())?;
            // Checks that it is no metadata; a zero cluster may have a place of its own.
            self.classify(old & !ZERO)?;
            self.store.write(at, bytes)?;
            return if old & ZERO != 0 { self.set_entry(offset, at | COPIED) } else { Ok(()) };
        }
        let at = self.allocate()?;
        if let Err(error) = self.store.write(at, bytes).and_then(|()| self.set_entry(offset, at | COPIED)) {
            let number = at >> self.header.cluster_bits;
            let (counts, store) = self.counts()?;
            counts.release(store, number)?;
            return Err(error);
        }
        self.give_up_entry(old);
        self.limit_pending()
    }

    /// Writes into a cluster that is ours alone. `at` comes from [`find`](Self::find).
    pub(super) fn write_in_place(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.store.write(at, bytes)
    }

    /// Makes the whole guest cluster at `offset` read as zeroes. `over`: there is something under the image that would show
    /// through. `keep`: keeps its place in the file. False: this image cannot say so, zeroes have to be written.
    pub(super) fn zero_cluster(&mut self, offset: u64, over: bool, keep: bool) -> io::Result<bool> {
        let old = self.get_entry(offset)?;
        let found = self.classify(old)?;
        if found == Found::Zeroes || (found == Found::Nothing && !over) {
            return Ok(true);
        }
        if !self.has_zero_clusters() {
            if over || keep {
                return Ok(false);
            }
            self.set_entry(offset, 0)?;
            self.give_up_entry(old);
        } else if keep && matches!(found, Found::Data { copied: true, .. }) {
            self.set_entry(offset, old | ZERO)?;
        } else {
            self.set_entry(offset, if over { ZERO } else { 0 })?;
            self.give_up_entry(old);
        }
        self.limit_pending()?;
        Ok(true)
    }

    fn limit_pending(&mut self) -> io::Result<()> {
        if self.pending.len() > MAX_PENDING { self.write_tables() } else { Ok(()) }
    }

    /// Whether [`flush`](Self::flush) has more to do than to sync the file.
    pub(super) fn is_dirty(&self) -> bool {
        self.refcounts.as_ref().is_some_and(Refcounts::is_dirty)
            || self.l1_dirty.is_some()
            || self.l2.is_dirty()
            || !self.pending.is_empty()
    }

    /// Writes the tables so that they are whole at every moment. All of it is on the medium when this returns.
    fn write_tables(&mut self) -> io::Result<()> {
        if let Some(counts) = &mut self.refcounts {
            counts.write(&mut self.store)?;
        }
        self.store.sync()?;
        self.l2.write(&mut self.store)?;
        if let Some((first, last)) = self.l1_dirty {
            self.store.sync()?;
            let bytes: Vec<u8> = self.l1[first..last].iter().flat_map(|e| e.to_be_bytes()).collect();
            self.store.write(self.header.l1_offset + 8 * first as u64, &bytes)?;
            self.l1_dirty = None;
        }
        self.store.sync()
    }

    /// Makes everything durable. `quiet`: no request is in flight, so what was given up may be used again.
    pub(super) fn flush(&mut self, quiet: bool) -> io::Result<()> {
        self.write_tables()?;
        if quiet && !self.pending.is_empty() {
            let pending = std::mem::take(&mut self.pending);
            let (counts, store) = self.counts()?;
            for number in pending {
                counts.release(store, number)?;
            }
            // Not synced: until it is on the medium, these clusters are only leaked.
            counts.write(store)?;
        }
        Ok(())
    }
}
