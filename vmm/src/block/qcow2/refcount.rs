//! Who uses each cluster of the file: owns the refcount table, its blocks, and the allocation of clusters.
//!
//! Order of writes: a block is on the medium before the table points to it, and a new table before the header does. Counts that rise are
//! written before anything refers to the cluster, those that fall after nothing does (`Image::flush` sees to both): a crash leaks clusters
//! at worst.

use std::collections::HashSet;
use std::io;

use super::cache::Tables;
use super::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use super::store::Store;
use super::{cluster_offset, corrupt};

/// Bytes of refcount blocks in memory, unless the drive says something else.
const DEFAULT_CACHE: u64 = 1 << 20;
/// Where the header has offset (8 bytes) and clusters (4 bytes) of the table.
const HEADER_FIELD: u64 = 48;

pub(super) struct Refcounts {
    cluster_bits: u32,
    order: u32,
    /// Logarithm of the counts in one block.
    block_bits: u32,
    table: Vec<u64>,
    table_offset: u64,
    blocks: Tables,
    /// No cluster before this one is free.
    hint: u64,
    /// Clusters that hold metadata in use, by number: never data, never given out, whatever the counts of a hostile image say.
    pub(super) metadata: HashSet<u64>,
}

impl Refcounts {
    pub(super) fn open(store: &mut Store, header: &Header, budget: Option<u64>) -> io::Result<Self> {
        let cluster = 1u64 << header.cluster_bits;
        let bytes = header.refcount_table_clusters * cluster;
        let mut raw = vec![0; bytes as usize];
        store.read(header.refcount_table_offset, &mut raw)?;
        let table: Vec<u64> = raw.chunks_exact(8).map(|c| super::cache::entry(c, 0)).collect();
        let mut metadata = HashSet::from([0]);
        let first = header.refcount_table_offset >> header.cluster_bits;
        metadata.extend(first..first + header.refcount_table_clusters);
        metadata.extend(table.iter().filter(|e| **e != 0).map(|e| e >> header.cluster_bits));
        Ok(Self {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            block_bits: header.cluster_bits + 3 - header.refcount_order,
            table,
            table_offset: header.refcount_table_offset,
            blocks: Tables::new(budget.unwrap_or(DEFAULT_CACHE), cluster),
            hint: 1,
            metadata,
        })
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The slot of an existing block; `None`: there is none.
    fn slot(&mut self, store: &mut Store, block: u64) -> io::Result<Option<usize>> {
        if let Some(slot) = self.blocks.find(block) {
            return Ok(Some(slot));
        }
        let entry = usize::try_from(block).ok().and_then(|b| self.table.get(b)).copied().unwrap_or(0);
        if entry == 0 {
            return Ok(None);
        }
        let offset = cluster_offset(entry, self.cluster_bits, store.len())?;
        if self.blocks.is_stuck() {
            // Rising counts may be written at any time, and only such wait here.
            self.blocks.write(store)?;
        }
        self.blocks.load(store, block, offset, false).map(Some)
    }

    fn get(&self, slot: usize, index: usize) -> u64 {
        let bytes = self.blocks.bytes(slot);
        match self.order {
            // Below a byte, the first count is in the lowest bits.
            0..=2 => {
                let (bits, per_byte) = (1 << self.order, 8usize >> self.order);
                let byte = bytes.get(index / per_byte).copied().unwrap_or(0);
                u64::from(byte >> (index % per_byte * bits)) & ((1 << bits) - 1)
            }
            order => {
                let width = 1usize << (order - 3);
                let at = index * width;
                bytes.get(at..at + width).unwrap_or_default().iter().fold(0, |n, b| n << 8 | u64::from(*b))
            }
        }
    }

    fn put(&mut self, slot: usize, index: usize, value: u64) {
        match self.order {
            0..=2 => {
                let (bits, per_byte) = (1u32 << self.order, 8usize >> self.order);
                let (at, shift) = (index / per_byte, (index % per_byte) as u32 * bits);
                let byte = &mut self.blocks.change(slot, at, at + 1)[0];
                let mask = (((1u16 << bits) - 1) as u8) << shift;
                *byte = *byte & !mask | (value as u8) << shift;
            }
            order => {
                let width = 1usize << (order - 3);
                let bytes = value.to_be_bytes();
                self.blocks
                    .change(slot, index * width, (index + 1) * width)
                    .copy_from_slice(&bytes[8 - width..]);
            }
        }
    }

    fn split(&self, number: u64) -> (u64, usize) {
        (number >> self.block_bits, (number & ((1 << self.block_bits) - 1)) as usize)
    }

    /// One user of cluster `number` less.
    pub(super) fn release(&mut self, store: &mut Store, number: u64) -> io::Result<()> {
        let (block, index) = self.split(number);
        let slot = self.slot(store, block)?.ok_or_else(|| corrupt("a cluster in use has no refcount"))?;
        let count = self.get(slot, index);
        if count == 0 {
            return Err(corrupt("a cluster in use has refcount 0"));
        }
        self.put(slot, index, count - 1);
        if count == 1 {
            self.metadata.remove(&number);
            self.hint = self.hint.min(number);
        }
        Ok(())
    }

    /// A free cluster, now in use once. Returns its offset in the file.
    pub(super) fn allocate(&mut self, store: &mut Store) -> io::Result<u64> {
        loop {
            let number = self.hint;
            // Entries have 56 bits for offsets.
            if number >> (56 - self.cluster_bits) != 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let (block, start) = self.split(number);
            let Some(slot) = self.slot(store, block)? else {
                self.add_block(store, block, number)?;
                continue;
            };
            let end = 1usize << self.block_bits;
            let Some(index) = (start..end).find(|i| self.get(slot, *i) == 0) else {
                self.hint = (block + 1) << self.block_bits;
                continue;
            };
            let number = block << self.block_bits | index as u64;
            if self.metadata.contains(&number) {
                return Err(corrupt("a cluster with metadata has refcount 0"));
            }
            self.put(slot, index, 1);
            self.hint = number + 1;
            return Ok(number << self.cluster_bits);
        }
    }

    /// Makes a block for counts that have none: cluster `number`, the first free one of its range, describes itself.
    fn add_block(&mut self, store: &mut Store, block: u64, number: u64) -> io::Result<()> {
        if block >= self.table.len() as u64 {
            return self.grow(store, block + 1);
        }
        if self.metadata.contains(&number) {
            return Err(corrupt("a cluster with metadata has no refcount"));
        }
        if self.blocks.is_stuck() {
            self.blocks.write(store)?;
        }
        let offset = number << self.cluster_bits;
        let slot = self.blocks.load(store, block, offset, true)?;
        let (_, index) = self.split(number);
        self.put(slot, index, 1);
        self.blocks.write(store)?;
        store.sync()?;
        let at = block as usize;
        store.write(self.table_offset + 8 * block, &offset.to_be_bytes())?;
        self.table[at] = offset;
        self.metadata.insert(number);
        Ok(())
    }

    /// Moves the table to where there is room for `entries` and more.
    fn grow(&mut self, store: &mut Store, entries: u64) -> io::Result<()> {
        let cluster = self.cluster();
        let old = (self.table_offset >> self.cluster_bits, self.table.len() as u64 * 8 / cluster);
        // Beyond all that the old table covers, so every block of the new place is new.
        let start = store.len().div_ceil(cluster).max((self.table.len() as u64) << self.block_bits);
        let first_block = start >> self.block_bits;
        let (mut tables, mut blocks) = (1u64, 1u64);
        let new_entries = loop {
            let last_block = (start + tables + blocks - 1) >> self.block_bits;
            let want = entries.max(last_block + 1);
            let want = want + want / 2;
            let (t, b) = ((want * 8).div_ceil(cluster), last_block - first_block + 1);
            if t <= tables && b <= blocks {
                break tables * cluster / 8;
            }
            (tables, blocks) = (tables.max(t), blocks.max(b));
        };
        if new_entries * 8 > MAX_REFCOUNT_TABLE_BYTES {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut table = self.table.clone();
        table.resize(new_entries as usize, 0);
        for i in 0..blocks {
            let number = start + tables + i;
            table[(first_block + i) as usize] = number << self.cluster_bits;
        }
        self.blocks.write(store)?;
        for i in 0..blocks {
            if self.blocks.is_stuck() {
                self.blocks.write(store)?;
            }
            let offset = (start + tables + i) << self.cluster_bits;
            let slot = self.blocks.load(store, first_block + i, offset, true)?;
            for number in start..start + tables + blocks {
                let (block, index) = self.split(number);
                if block == first_block + i {
                    self.put(slot, index, 1);
                }
            }
        }
        self.blocks.write(store)?;
        let offset = start << self.cluster_bits;
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        store.write(offset, &bytes)?;
        store.sync()?;
        let mut field = [0; 12];
        field[..8].copy_from_slice(&offset.to_be_bytes());
        field[8..].copy_from_slice(&(tables as u32).to_be_bytes());
        store.write(HEADER_FIELD, &field)?;
        store.sync()?;
        (self.table, self.table_offset) = (table, offset);
        self.metadata.extend(start..start + tables + blocks);
        for number in old.0..old.0 + old.1 {
            self.release(store, number)?;
        }
        Ok(())
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.blocks.is_dirty()
    }

    pub(super) fn write(&mut self, store: &mut Store) -> io::Result<()> {
        self.blocks.write(store)
    }
}
