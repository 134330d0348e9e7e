//! The split virtqueue (virtio 1.2 §2.7): owns one ring's indices and the set of requests in flight.
//!
//! Built once per DRIVER_OK from what the registers said, and never changed by them again. The three areas are looked up in guest
//! RAM at that moment; from then on an access is an atomic load or store at a fixed host address. Only the thread that owns the
//! queue calls it.
//!
//! Written here rather than taken from a crate because this must hold: a malformed chain is an error and not a short chain; the
//! same head twice in flight is an error; interrupts are suppressed as the driver asks, with EVENT_IDX and without.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use serde::{Deserialize, Serialize};

pub use super::chain::{Buffers, Chain, LastByte, MAX_BUFFERS, QueueError};
use super::chain::{Piece, Table, host_address, walk};
use super::{F_EVENT_IDX, F_INDIRECT_DESC};
use crate::memory::GuestMemory;

/// Largest queue that any device may offer.
pub const MAX_SIZE: u16 = MAX_BUFFERS as u16;

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Where a ring stands with nothing in flight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Of the next request to take.
    pub avail: u16,
    /// Of the next used entry.
    pub used: u16,
}

/// What the driver wrote to the queue's registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Entries.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub desc: u64,
    /// Guest physical address of the driver area (available ring).
    pub driver: u64,
    /// Guest physical address of the device area (used ring).
    pub device: u64,
}

/// A ring that somebody else serves; see [`Queue::lend`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lent {
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) base: u16,
}

/// A running ring.
pub struct Queue {
    memory: Arc<GuestMemory>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    table: Table,
    piece: Piece,
    avail: *const AtomicU16,
    used: *const AtomicU16,
    /// Position of the next request to take, and how far the driver's index was known to be.
    next_avail: u16,
    avail_seen: u16,
    /// Position of the next used entry, and how far the driver has been told.
    next_used: u16,
    published: u16,
    /// How far the index that the driver sees has got.
    shown: u16,
    in_flight: Box<[u64]>,
}

// SAFETY: the pointers lead into guest RAM, which `memory` keeps mapped and which any thread may touch.
unsafe impl Send for Queue {}

impl Queue {
    /// A ring that starts from zero. `max_size` is what the device offered; `features` are those the driver accepted.
    pub fn new(
        memory: &Arc<GuestMemory>,
        layout: Layout,
        max_size: u16,
        features: u64,
    ) -> Result<Self, QueueError> {
        let Layout { size, desc, driver, device } = layout;
        if !size.is_power_of_two() || size > max_size.min(MAX_SIZE) {
            return Err(QueueError::BadSize(size));
        }
        let entries = usize::from(size);
        // §2.7: alignments 16, 2 and 4; sizes 16, 2 and 8 per entry, plus flags, index and the event word at the end.
        let area = |name, addr: u64, align: u64, len| {
            let host = addr.is_multiple_of(align).then(|| host_address(memory, addr, len)).flatten();
            host.filter(|h| (*h as usize as u64).is_multiple_of(align)).ok_or(QueueError::BadArea(name, addr))
        };
        area("descriptor", desc, 16, 16 * entries)?;
        let table =
            Table::find(memory, desc, u32::from(size)).ok_or(QueueError::BadArea("descriptor", desc))?;
        let avail = area("driver", driver, 2, 6 + 2 * entries)?;
        let used = area("device", device, 4, 6 + 8 * entries)?;
        Ok(Self {
            memory: Arc::clone(memory),
            size,
            event_idx: features & F_EVENT_IDX != 0,
            indirect: features & F_INDIRECT_DESC != 0,
            table,
            piece: Piece::NONE,
            avail: avail.cast_const().cast(),
            used: used.cast_const().cast(),
            next_avail: 0,
            avail_seen: 0,
            next_used: 0,
            published: 0,
            shown: 0,
            in_flight: vec![0; entries.div_ceil(64)].into(),
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// 16-bit word `index` of the driver area; `index` < size + 3.
    fn avail(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < usize::from(self.size) + 3);
        // SAFETY: the area has size + 3 aligned words in guest RAM, and all accesses by this process are atomic.
        unsafe { &*self.avail.add(index) }
    }

    /// 16-bit word at `index` words into the device area; `index` < 4 * size + 3.
    fn used(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 4 * usize::from(self.size) + 3);
        // SAFETY: as in `avail`.
        unsafe { &*self.used.add(index) }
    }

    /// 32-bit word `index` of the used entries; `index` < 2 * size.
    fn used_entry(&self, index: usize) -> &AtomicU32 {
        debug_assert!(index < 2 * usize::from(self.size));
        // SAFETY: the entries start 4 bytes into an area aligned to 4; else as in `avail`.
        unsafe { &*self.used.add(2).cast::<AtomicU32>().add(index) }
    }

    fn slot(&self, position: u16) -> usize {
        usize::from(position & (self.size - 1))
    }

    fn in_flight_bit(head: u16) -> (usize, u64) {
        (usize::from(head / 64), 1 << (head % 64))
    }

    fn load_avail_index(&mut self) -> Result<(), QueueError> {
        // Acquire: what the driver wrote before the index is visible after it.
        let to = u16::from_le(self.avail(1).load(Ordering::Acquire));
        if to.wrapping_sub(self.next_avail) > self.size {
            return Err(QueueError::IndexJumped { from: self.next_avail, to });
        }
        self.avail_seen = to;
        Ok(())
    }

    /// Takes the next request into `chain`, whose memory is used again. False: there is none.
    ///
    /// The request is in flight until [`complete`](Self::complete). After an error the queue must not be used again.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.next_avail == self.avail_seen {
            self.load_avail_index()?;
            if self.next_avail == self.avail_seen {
                return Ok(false);
            }
        }
        let head = u16::from_le(self.avail(2 + self.slot(self.next_avail)).load(Ordering::Relaxed));
        if head >= self.size {
            return Err(QueueError::BadIndex(u32::from(head)));
        }
        let (word, bit) = Self::in_flight_bit(head);
        if self.in_flight[word] & bit != 0 {
            return Err(QueueError::HeadInFlight(head));
        }
        walk(&self.memory, &mut self.piece, self.table, head, self.indirect, chain)?;
        self.in_flight[word] |= bit;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Gives request `head` back, with the number of bytes written to its buffers from the first one on.
    /// The driver sees it after [`show`](Self::show) or [`publish`](Self::publish).
    pub fn complete(&mut self, head: u16, written: u32) {
        let (word, bit) = Self::in_flight_bit(head);
        if head >= self.size || self.in_flight[word] & bit == 0 {
            debug_assert!(false, "head {head} is not in flight");
            return;
        }
        self.in_flight[word] &= !bit;
        let slot = self.slot(self.next_used);
        self.used_entry(2 * slot).store(u32::from(head).to_le(), Ordering::Relaxed);
        self.used_entry(2 * slot + 1).store(written.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all completed requests, so that one that looks can go on. One that waits for an interrupt gets it with
    /// [`publish`](Self::publish), which must follow.
    pub fn show(&mut self) {
        if self.shown != self.next_used {
            self.used(1).store(self.next_used.to_le(), Ordering::Release);
            self.shown = self.next_used;
        }
    }

    /// Shows the driver all completed requests. True: it wants an interrupt for them.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        self.show();
        self.published = new;
        // §2.7.7.2: the index must be visible before we look whether the driver wants to be told, else both sides sleep.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = u16::from_le(self.avail(2 + usize::from(self.size)).load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u16::from_le(self.avail(0).load(Ordering::Relaxed)) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Where the ring is, for somebody else to serve it: addresses in this process of the three areas, and the position of
    /// the next request, with the last `unserved` requests not taken. All that was completed must have been published.
    pub(crate) fn lend(&self, unserved: u16) -> Lent {
        Lent {
            size: self.size,
            desc: self.table.address(),
            avail: self.avail as u64,
            used: self.used as u64,
            base: self.next_avail.wrapping_sub(unserved),
        }
    }

    /// Where the ring stands when the last `unserved` requests count as not taken. The others must have been completed and published.
    pub(crate) fn position(&self, unserved: u16) -> Position {
        Position { avail: self.next_avail.wrapping_sub(unserved), used: self.next_used }
    }

    /// Goes on at `position`, with nothing in flight. One that makes no sense shows when the next request is looked for.
    pub(crate) fn go_on_at(&mut self, position: Position) {
        self.in_flight.fill(0);
        (self.next_avail, self.avail_seen) = (position.avail, position.avail);
        (self.next_used, self.published, self.shown) = (position.used, position.used, position.used);
    }

    /// Goes on where somebody else has stopped: at request `base`, with none in flight.
    pub(crate) fn take_back(&mut self, base: u16) {
        self.in_flight.fill(0);
        (self.next_avail, self.avail_seen) = (base, base);
        // What a driver has written over it harms only itself: any value is a position.
        self.next_used = u16::from_le(self.used(1).load(Ordering::Acquire));
        (self.published, self.shown) = (self.next_used, self.next_used);
    }

    /// Whether the driver has made requests available that were not taken yet. Cheap; to be asked again and again.
    pub fn waits(&self) -> bool {
        u16::from_le(self.avail(1).load(Ordering::Relaxed)) != self.next_avail
    }

    /// Asks the driver not to notify while the device looks by itself.
    pub fn disable_notify(&mut self) {
        // With EVENT_IDX nothing to do: the event index stays behind, so at most one more notification comes.
        if !self.event_idx {
            self.used(0).store(USED_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// Asks the driver to notify again. True: requests have come meanwhile, go on instead of waiting.
    pub fn enable_notify(&mut self) -> Result<bool, QueueError> {
        if self.event_idx {
            self.used(2 + 4 * usize::from(self.size)).store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.used(0).store(0, Ordering::Relaxed);
        }
        // §2.7.10.1: the wish must be visible before the index is read again.
        fence(Ordering::SeqCst);
        self.load_avail_index()?;
        Ok(self.next_avail != self.avail_seen)
    }
}

#[cfg(test)]
mod tests;
