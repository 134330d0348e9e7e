//! Tables of one cluster each, in memory: owns a bounded number of them, and what of each has still to be written.

use std::collections::HashMap;
use std::io;

use super::store::Store;

pub(super) struct Tables {
    slots: Vec<Slot>,
    by_key: HashMap<u64, usize>,
    most: usize,
    cluster: usize,
    clock: u64,
}

struct Slot {
    key: u64,
    offset: u64,
    bytes: Box<[u8]>,
    /// First and last + 1 byte to write.
    dirty: Option<(usize, usize)>,
    used: u64,
}

impl Tables {
    /// Holds `budget` bytes, but two tables at least.
    pub(super) fn new(budget: u64, cluster: u64) -> Self {
        let most = usize::try_from(budget / cluster).unwrap_or(usize::MAX).max(2);
        Self { slots: Vec::new(), by_key: HashMap::new(), most, cluster: cluster as usize, clock: 0 }
    }

    /// The slot of table `key`, if it is here.
    pub(super) fn find(&mut self, key: u64) -> Option<usize> {
        let slot = *self.by_key.get(&key)?;
        self.clock += 1;
        self.slots[slot].used = self.clock;
        Some(slot)
    }

    /// Whether the next [`load`](Self::load) needs a table to be written first.
    pub(super) fn is_stuck(&self) -> bool {
        self.slots.len() >= self.most
            && self.slots.iter().min_by_key(|s| s.used).is_some_and(|s| s.dirty.is_some())
    }

    /// Brings table `key` in, from `offset` of the file or (`fresh`) as zeroes. Not while [`is_stuck`](Self::is_stuck).
    pub(super) fn load(
        &mut self,
        store: &mut Store,
        key: u64,
        offset: u64,
        fresh: bool,
    ) -> io::Result<usize> {
        let slot = if self.slots.len() < self.most {
            let bytes = vec![0; self.cluster].into();
            self.slots.push(Slot { key: u64::MAX, offset: 0, bytes, dirty: None, used: 0 });
            self.slots.len() - 1
        } else {
            let oldest = self.slots.iter().enumerate().min_by_key(|(_, s)| s.used).map(|(at, _)| at);
            let at = oldest.ok_or(io::ErrorKind::OutOfMemory)?;
            self.by_key.remove(&self.slots[at].key);
            self.slots[at].key = u64::MAX;
            at
        };
        let place = &mut self.slots[slot];
        if fresh {
            place.bytes.fill(0);
        } else {
            store.read(offset, &mut place.bytes)?;
        }
        (place.key, place.offset) = (key, offset);
        place.dirty = fresh.then_some((0, self.cluster));
        self.by_key.insert(key, slot);
        self.find(key);
        Ok(slot)
    }

    pub(super) fn bytes(&self, slot: usize) -> &[u8] {
        &self.slots[slot].bytes
    }

    /// For a change to bytes `from..to`.
    pub(super) fn change(&mut self, slot: usize, from: usize, to: usize) -> &mut [u8] {
        let place = &mut self.slots[slot];
        let (first, last) = place.dirty.unwrap_or((from, to));
        place.dirty = Some((first.min(from), last.max(to)));
        &mut place.bytes[from..to]
    }

    /// The table has moved: all of it must be written there.
    pub(super) fn relocate(&mut self, slot: usize, offset: u64) {
        let cluster = self.cluster;
        let place = &mut self.slots[slot];
        (place.offset, place.dirty) = (offset, Some((0, cluster)));
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.slots.iter().any(|s| s.dirty.is_some())
    }

    /// Writes what has changed.
    pub(super) fn write(&mut self, store: &mut Store) -> io::Result<()> {
        for slot in &mut self.slots {
            if let Some((from, to)) = slot.dirty {
                // Whole sectors, so that none is torn on its way to the medium.
                let (from, to) = (from / 512 * 512, to.next_multiple_of(512));
                store.write(slot.offset + from as u64, &slot.bytes[from..to])?;
                slot.dirty = None;
            }
        }
        Ok(())
    }
}

pub(super) fn entry(bytes: &[u8], index: usize) -> u64 {
    let at = index * 8;
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}
