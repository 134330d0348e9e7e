//! To the guest: owns the buffers that the driver has given us and no packet has filled yet.
//!
//! One `readv` per packet, straight into the guest. How large the next packet is nobody knows, so the list of buffers ends with one
//! of our own: what does not fit into the guest's first buffers lands there and is copied on. A NIC that gets large
//! packets offers more of the guest's buffers per read, so that nothing has to be copied.

use std::collections::VecDeque;
use std::io;

use super::feature;
use super::turn::{BATCH, Ended, PUBLISH_EVERY, is_gone};
use crate::net::{HEADER_BYTES, Tap};
use crate::virtio::queue::{Buffers, Chain, Lent, MAX_BUFFERS, Position, QueueError};
use crate::virtio::{ActiveQueue, Interrupt};

/// Header and largest packet (§5.1.6.3.1), with a VLAN tag.
const LARGEST: usize = 65_562 + 4;
/// Header and an ordinary Ethernet frame.
const ORDINARY: usize = HEADER_BYTES + 1518;
/// Ordinary packets in a row after which large ones are not expected any more.
const CALM_AFTER: u32 = 256;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS_AT: usize = 10;

pub(super) struct Receiver {
    pub(super) queue: ActiveQueue,
    /// The tap may have packets: no read has come back empty since it last told us.
    pub(super) tap_ready: bool,
    mergeable: bool,
    /// The driver's buffers in hand, in its order.
    chains: VecDeque<Chain>,
    spare: Vec<Chain>,
    parts: Buffers,
    overflow: Box<[u8]>,
    /// Bytes of buffers to offer per read.
    want: usize,
    calm: u32,
}

impl Receiver {
    pub(super) fn new(queue: ActiveQueue, features: u64) -> Self {
        Self {
            queue,
            tap_ready: false,
            mergeable: features & feature::MRG_RXBUF != 0,
            chains: VecDeque::new(),
            spare: Vec::new(),
            parts: Buffers::default(),
            // Zeroed memory from the allocator: pages that no packet reaches cost nothing.
            overflow: vec![0; LARGEST].into(),
            want: ORDINARY,
            calm: 0,
        }
    }

    /// Where the ring stands, buffers in hand not counted as taken.
    pub(super) fn position(&self) -> Position {
        self.queue.queue.position(self.chains.len() as u16)
    }

    /// For the kernel to serve: buffers in hand count as not taken.
    pub(super) fn lend(&mut self) -> Lent {
        let unserved = self.chains.len() as u16;
        self.spare.extend(self.chains.drain(..));
        let lent = self.queue.queue.lend(unserved);
        self.queue.queue.take_back(lent.base);
        lent
    }

    pub(super) fn run(&mut self, tap: &Tap, interrupt: &dyn Interrupt) -> Result<Ended, QueueError> {
        self.queue.queue.disable_notify();
        let result = self.batch(tap, interrupt);
        self.publish(interrupt);
        result
    }

    fn publish(&mut self, interrupt: &dyn Interrupt) {
        if self.queue.queue.publish() {
            interrupt.queue(self.queue.index);
        }
    }

    fn batch(&mut self, tap: &Tap, interrupt: &dyn Interrupt) -> Result<Ended, QueueError> {
        for packet in 1..=BATCH {
            if !self.tap_ready {
                return Ok(Ended::Idle);
            }
            let room = self.gather(self.want)?;
            if room == 0 {
                // Out of buffers: the driver tells us when it has given some, and the tap keeps its packets until then.
                if self.queue.queue.enable_notify()? {
                    self.queue.queue.disable_notify();
                    continue;
                }
                return Ok(Ended::Idle);
            }
            match self.read(tap) {
                // The end of a stream; a tap has none.
                Ok(0) => self.tap_ready = false,
                Ok(n) => self.deliver(n, room)?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.tap_ready = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_gone(&e) => return Ok(Ended::TapGone),
                // An interface that is down, or a packet too large for the list: nothing to deliver. Another
                // packet makes another edge.
                Err(_) => self.tap_ready = false,
            }
            if packet % PUBLISH_EVERY == 0 {
                self.publish(interrupt);
            }
        }
        Ok(Ended::Full)
    }

    /// Takes buffers from the driver until `want` bytes are in hand. Returns how many there are: those of one chain, or with
    /// mergeable buffers of all.
    fn gather(&mut self, want: usize) -> Result<usize, QueueError> {
        let (mut room, mut parts) = (0, 0);
        for chain in &self.chains {
            room += chain.writable.len() as usize;
            parts += chain.writable.parts().len();
        }
        while self.chains.is_empty() || (self.mergeable && room < want && parts < MAX_BUFFERS / 2) {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !self.queue.queue.pop(&mut chain)? {
                self.spare.push(chain);
                break;
            }
            let len = chain.writable.len() as usize;
            if len < HEADER_BYTES {
                // Of no use to anybody (§5.1.6.3.1 asks for more): give it back rather than let the driver run out.
                self.queue.queue.complete(chain.head, 0);
                self.spare.push(chain);
                continue;
            }
            room += len;
            parts += chain.writable.parts().len();
            self.chains.push_back(chain);
        }
        Ok(room)
    }

    fn read(&mut self, tap: &Tap) -> io::Result<usize> {
        self.parts.clear();
        for chain in &self.chains {
            self.parts.append(&chain.writable);
        }
        // A single chain may be as long as a list can be; it has no room for our own buffer then, and needs none.
        if self.parts.parts().len() < MAX_BUFFERS {
            // SAFETY: ours, and not touched until the list is cleared.
            unsafe { self.parts.push(self.overflow.as_mut_ptr(), self.overflow.len()) };
        }
        // SAFETY: guest RAM, kept by the queue, and our own buffer.
        unsafe { tap.read(self.parts.parts()) }
    }

    /// Gives the driver a packet of `n` bytes, header included, that was read into `room` bytes of its buffers and our own.
    fn deliver(&mut self, n: usize, room: usize) -> Result<(), QueueError> {
        self.adapt(n);
        if n < HEADER_BYTES {
            return Ok(());
        }
        if n > room && (!self.mergeable || self.gather(n)? < n) {
            // Does not fit: dropped, as any NIC does. The buffers are used for the next packet.
            return Ok(());
        }
        let mut used = 0u16;
        let mut at = 0;
        for chain in &self.chains {
            if at >= n {
                break;
            }
            at += chain.writable.len() as usize;
            used += 1;
        }
        if let Some(first) = self.chains.front() {
            first.writable.write_at(NUM_BUFFERS_AT, &used.to_le_bytes());
        }
        let mut at = 0;
        for _ in 0..used {
            let Some(mut chain) = self.chains.pop_front() else { break };
            let len = (chain.writable.len() as usize).min(n - at);
            if at >= room {
                chain.writable.fill(&self.overflow[at - room..at - room + len]);
            }
            self.queue.queue.complete(chain.head, len as u32);
            self.spare.push(chain);
            at += len;
        }
        Ok(())
    }

    fn adapt(&mut self, n: usize) {
        if n > ORDINARY {
            (self.want, self.calm) = (LARGEST, 0);
        } else {
            self.calm = self.calm.saturating_add(1);
            if self.calm >= CALM_AFTER {
                self.want = ORDINARY;
            }
        }
    }
}
