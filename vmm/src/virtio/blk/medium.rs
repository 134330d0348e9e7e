//! A disk as the guest has it, with what has been done with it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::request::ID_BYTES;
use crate::block::Disk;

/// What has been done with the disk in a slot since it was inserted. Requests that failed count only as such.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Reads that succeeded.
    pub read_ops: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub write_ops: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes that succeeded.
    pub flush_ops: u64,
    /// Discards and writes of zeroes that succeeded.
    pub unmap_ops: u64,
    /// Bytes that they covered.
    pub unmap_bytes: u64,
    /// Requests of any kind that failed.
    pub failed_ops: u64,
}

/// Counted by the I/O thread alone, read by any.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) read: [AtomicU64; 2],
    pub(super) write: [AtomicU64; 2],
    pub(super) flush: [AtomicU64; 2],
    pub(super) unmap: [AtomicU64; 2],
    pub(super) failed: [AtomicU64; 2],
}

impl Counters {
    /// One more operation, of this many bytes. Not an atomic addition, which one writer does not need.
    pub(super) fn add(counter: &[AtomicU64; 2], bytes: u64) {
        for (word, n) in counter.iter().zip([1, bytes]) {
            word.store(word.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        }
    }

    pub(super) fn read_out(&self) -> Stats {
        let get = |counter: &[AtomicU64; 2], at: usize| counter[at].load(Ordering::Relaxed);
        Stats {
            read_ops: get(&self.read, 0),
            read_bytes: get(&self.read, 1),
            write_ops: get(&self.write, 0),
            write_bytes: get(&self.write, 1),
            flush_ops: get(&self.flush, 0),
            unmap_ops: get(&self.unmap, 0),
            unmap_bytes: get(&self.unmap, 1),
            failed_ops: get(&self.failed, 0),
        }
    }
}

/// A disk as the guest has it.
pub(super) struct Medium {
    pub(super) disk: Disk,
    pub(super) serial: [u8; ID_BYTES],
    pub(super) read_only: bool,
    pub(super) counters: Counters,
}

impl Medium {
    pub(super) fn new(disk: Disk, serial: Option<String>, read_only: bool) -> Self {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.unwrap_or_default().into_bytes()) {
            *to = from;
        }
        let read_only = read_only || disk.read_only();
        Self { disk, serial: id, read_only, counters: Counters::default() }
    }
}
