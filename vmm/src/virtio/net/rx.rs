//! To the guest: owns the buffers that the driver has given us and no packet has filled yet.
//!
//! Packets are read straight into the guest. How large the next packet is nobody knows, so the list of buffers ends with one
//! of our own: what does not fit into the guest's first buffers lands there and is copied on. A NIC that gets large
//! packets offers more of the guest's buffers per read, so that nothing has to be copied.
//!
//! One `readv` takes one packet. While ordinary ones keep coming, a [`Burst`] takes many, each into one of the driver's chains:
//!
//! ```text
//!            often many between two empty reads                        few, large ones, small buffers
//!   one by one ───────────────────────────────▶ bursts, while there are many ─────────────────────────▶ one by one
//! ```

use std::collections::VecDeque;
use std::io;

use super::feature;
use super::turn::{BATCH, Ended, PUBLISH_EVERY, is_gone};
use crate::net::{Burst, HEADER_BYTES, Tap, is_unknown};
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
/// Packets that a burst asks for.
const PLACES: usize = 16;
/// Parts of a chain that a burst reads into.
const FEW_PARTS: usize = 32;
/// Times that there were many before the ring has bursts.
const OFTEN: u32 = 64;

/// What became of a burst.
enum Many {
    /// So many packets, at least one.
    Came(usize),
    /// Not tried: the driver's chains are too few or too small.
    NotNow,
    TapGone,
}

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
    /// Packets since a read came back empty, and between the two before.
    since: usize,
    before: usize,
    /// Times that there were many.
    many: u32,
    burst: Option<Box<Places>>,
}

/// Where the packets of a burst go.
struct Places {
    burst: Burst,
    lists: Vec<Buffers>,
    /// What came, by place: bytes.
    came: Vec<usize>,
    /// As the receiver's, one for each place.
    overflow: Box<[u8]>,
}

impl Places {
    fn new() -> io::Result<Box<Self>> {
        let lists = (0..PLACES).map(|_| Buffers::default()).collect();
        let (burst, overflow) = (Burst::new()?, vec![0; PLACES * LARGEST].into());
        Ok(Box::new(Self { burst, lists, came: vec![0; PLACES], overflow }))
    }
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
            since: 0,
            before: 0,
            many: 0,
            burst: None,
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
        let (mut packet, mut told) = (0, 0);
        while packet < BATCH {
            if !self.tap_ready {
                return Ok(Ended::Idle);
            }
            if packet - told >= PUBLISH_EVERY {
                self.publish(interrupt);
                told = packet;
            }
            if self.expects_many() {
                match self.read_many(tap)? {
                    Many::Came(count) => {
                        packet += count as u32;
                        continue;
                    }
                    Many::TapGone => return Ok(Ended::TapGone),
                    Many::NotNow => {}
                }
            }
            packet += 1;
            if self.gather(self.want)? == 0 {
                // Out of buffers: the driver tells us when it has given some, and the tap keeps its packets until then.
                if self.queue.queue.enable_notify()? {
                    self.queue.queue.disable_notify();
                    continue;
                }
                return Ok(Ended::Idle);
            }
            let (read, room) = self.read(tap);
            match read {
                // The end of a stream; a tap has none.
                Ok(0) => self.ran_dry(),
                Ok(n) => {
                    self.since = self.since.saturating_add(1);
                    self.deliver(n, room)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.ran_dry(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_gone(&e) => return Ok(Ended::TapGone),
                // An interface that is down, or a packet too large for the list: nothing to deliver. Another
                // packet makes another edge.
                Err(_) => self.ran_dry(),
            }
        }
        Ok(Ended::Full)
    }

    /// The tap has no more packets for now.
    fn ran_dry(&mut self) {
        (self.tap_ready, self.before, self.since) = (false, self.since, 0);
    }

    /// Whether a burst is worth its while.
    fn expects_many(&mut self) -> bool {
        if self.want != ORDINARY || (self.since < PLACES && self.before < 2 * PLACES) {
            return false;
        }
        if self.burst.is_none() {
            self.many = self.many.saturating_add(1);
            if self.many == OFTEN {
                // Without one it goes on as before.
                self.burst = Places::new().ok();
            }
        }
        self.burst.is_some()
    }

    /// Reads a packet into each of some chains.
    fn read_many(&mut self, tap: &Tap) -> Result<Many, QueueError> {
        let fits = |c: &Chain| c.writable.len() as usize >= ORDINARY && c.writable.parts().len() <= FEW_PARTS;
        while self.chains.len() < PLACES && self.chains.back().is_none_or(fits) && self.take_chain()? {}
        let count = self.chains.iter().take(PLACES).take_while(|c| fits(c)).count();
        if count < 2 {
            return Ok(Many::NotNow);
        }
        let Some(mut places) = self.burst.take() else { return Ok(Many::NotNow) };
        let Places { burst, lists, came, overflow } = &mut *places;
        came.fill(0);
        for ((list, chain), over) in
            lists.iter_mut().zip(&self.chains).zip(overflow.chunks_exact_mut(LARGEST))
        {
            list.clear();
            list.append(&chain.writable);
            // SAFETY: ours, and not touched until the list is cleared.
            unsafe { list.push(over.as_mut_ptr(), over.len()) };
        }
        let (mut dry, mut gone, mut unknown) = (false, false, false);
        let filled = lists.get(..count).unwrap_or_default().iter().map(Buffers::parts);
        let note = |place: usize, result: io::Result<usize>| match result {
            Ok(n) => {
                dry |= n == 0;
                came.get_mut(place).into_iter().for_each(|came| *came = n);
            }
            Err(e) => {
                dry |= e.kind() != io::ErrorKind::Interrupted;
                gone |= is_gone(&e);
                unknown |= is_unknown(&e);
            }
        };
        // SAFETY: guest RAM, kept by the queue, and our own buffers.
        if unsafe { burst.receive(tap, filled, note) }.is_err() {
            // Never seen. What the kernel may still write to, and from where, stays for good.
            std::mem::forget(places);
            return Ok(Many::NotNow);
        }
        if unknown {
            return Ok(Many::NotNow);
        }
        let arrived = came.iter().filter(|n| **n > 0).count();
        let delivered = self.deliver_many(&mut places, count);
        self.burst = Some(places);
        delivered?;
        self.since = self.since.saturating_add(arrived);
        if dry {
            self.ran_dry();
        }
        Ok(if gone { Many::TapGone } else { Many::Came(arrived.max(1)) })
    }

    /// Gives the driver the packets of a burst, in their order. Chains that are left over stay in hand, in theirs: they are always the last
    /// that were taken from the ring.
    fn deliver_many(&mut self, places: &mut Places, count: usize) -> Result<(), QueueError> {
        let Places { lists, came, .. } = places;
        let mut came = lists.iter_mut().zip(came.iter().copied()).take(count).peekable();
        while let Some((_, n)) = came.peek() {
            let n = *n;
            let fits = self.chains.front().is_some_and(|c| n <= c.writable.len() as usize);
            if n < HEADER_BYTES || !fits {
                break;
            }
            came.next();
            self.adapt(n);
            let Some(chain) = self.chains.pop_front() else { break };
            chain.writable.write_at(NUM_BUFFERS_AT, &1u16.to_le_bytes());
            self.queue.queue.complete(chain.head, n as u32);
            self.spare.push(chain);
        }
        // Seldom: a large packet, or one that came when the place before had just found none. Chains must not be given back over others,
        // so from here on packets are copied.
        let mut rest = Vec::new();
        for (list, n) in came.filter(|(_, n)| *n >= HEADER_BYTES) {
            let mut bytes = vec![0; n];
            list.take(&mut bytes);
            rest.push(bytes);
        }
        for bytes in rest {
            let n = bytes.len().min(self.overflow.len());
            self.overflow[..n].copy_from_slice(&bytes[..n]);
            self.deliver(n, 0)?;
        }
        Ok(())
    }

    /// Takes one more chain of the driver's into hand. False: it has none.
    fn take_chain(&mut self) -> Result<bool, QueueError> {
        loop {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !self.queue.queue.pop(&mut chain)? {
                self.spare.push(chain);
                return Ok(false);
            }
            if chain.writable.len() as usize >= HEADER_BYTES {
                self.chains.push_back(chain);
                return Ok(true);
            }
            // Of no use to anybody (§5.1.6.3.1 asks for more): give it back rather than let the driver run out.
            self.queue.queue.complete(chain.head, 0);
            self.spare.push(chain);
        }
    }

    /// Chains that one packet may lie in.
    fn span(&self) -> usize {
        if self.mergeable { usize::MAX } else { 1 }
    }

    /// Takes buffers from the driver until `want` bytes are in hand. Returns how many there are: those of one chain, or with
    /// mergeable buffers of all.
    fn gather(&mut self, want: usize) -> Result<usize, QueueError> {
        let (mut room, mut parts) = (0, 0);
        for chain in self.chains.iter().take(self.span()) {
            room += chain.writable.len() as usize;
            parts += chain.writable.parts().len();
        }
        while self.chains.is_empty() || (self.mergeable && room < want && parts < MAX_BUFFERS / 2) {
            if !self.take_chain()? {
                break;
            }
            if let Some(chain) = self.chains.back() {
                room += chain.writable.len() as usize;
                parts += chain.writable.parts().len();
            }
        }
        Ok(room)
    }

    /// Reads one packet. Also says how many bytes of the driver's buffers it was offered.
    fn read(&mut self, tap: &Tap) -> (io::Result<usize>, usize) {
        self.parts.clear();
        let mut room = 0;
        for chain in self.chains.iter().take(self.span()) {
            // Short ones and then a very long one: more than a list can hold.
            if room > 0 && self.parts.parts().len() + chain.writable.parts().len() > MAX_BUFFERS {
                break;
            }
            self.parts.append(&chain.writable);
            room += chain.writable.len() as usize;
        }
        // A single chain may be as long as a list can be; it has no room for our own buffer then, and needs none.
        if self.parts.parts().len() < MAX_BUFFERS {
            // SAFETY: ours, and not touched until the list is cleared.
            unsafe { self.parts.push(self.overflow.as_mut_ptr(), self.overflow.len()) };
        }
        // SAFETY: guest RAM, kept by the queue, and our own buffer.
        (unsafe { tap.read(self.parts.parts()) }, room)
    }

    /// Gives the driver a packet of `n` bytes, header included, that was read into `room` bytes of its buffers and our own.
    fn deliver(&mut self, n: usize, room: usize) -> Result<(), QueueError> {
        self.adapt(n);
        if n < HEADER_BYTES {
            return Ok(());
        }
        if n > room && self.gather(n)? < n {
            // Does not fit: dropped, as any NIC does. The buffers are used for the next packet.
            return Ok(());
        }
        let mut used = 0u16;
        let mut at = 0;
        for chain in self.chains.iter().take(self.span()) {
            if at >= n {
                break;
            }
            at += chain.writable.len() as usize;
            used += 1;
        }
        if room == 0 {
            // The header is about to be copied from there.
            self.overflow[NUM_BUFFERS_AT..HEADER_BYTES].copy_from_slice(&used.to_le_bytes());
        } else if let Some(first) = self.chains.front() {
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
