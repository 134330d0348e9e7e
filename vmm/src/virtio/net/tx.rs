//! From the guest: owns the check of packet headers, and the packets between the ring and the tap.
//!
//! They leave straight from the guest's buffers, small ones by a copy: a packet in one part costs the kernel less than one in two. Those
//! that wait together go together (`writev` for a few, a [`Burst`] for many, once a ring has often had many).

use std::io;

use super::feature;
use super::turn::{BATCH, Ended, PUBLISH_EVERY, is_gone};
use crate::net::{Burst, HEADER_BYTES, Tap, is_unknown};
use crate::virtio::queue::{Chain, MAX_BUFFERS, QueueError};
use crate::virtio::{ActiveQueue, Interrupt};

/// Largest packet: 64 KiB of IP in an Ethernet frame with a VLAN tag.
const LARGEST: u64 = 65_535 + 18;
/// An Ethernet header: anything shorter is not a packet.
const SHORTEST: u64 = 14;
/// Packets that are copied.
const SMALL: usize = 256;
/// Packets that are worth a burst.
const MANY: usize = 8;
/// Times that there were so many before the ring has bursts.
const OFTEN: u32 = 64;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

type Head = [u8; HEADER_BYTES + SMALL];

/// A packet that was taken from the ring.
struct Packet {
    /// Its readable part begins with `head`, if it is to be sent.
    chain: Chain,
    /// The header, and all of a small packet. Of its own, so that it stays where it is.
    head: Box<Head>,
    fine: bool,
}

pub(super) struct Sender {
    pub(super) queue: ActiveQueue,
    features: u64,
    /// As many as have ever been taken together.
    packets: Vec<Packet>,
    /// Times that there were many.
    many: u32,
    burst: Option<Burst>,
}

impl Sender {
    pub(super) fn new(queue: ActiveQueue, features: u64) -> Self {
        Self { queue, features, packets: Vec::new(), many: 0, burst: None }
    }

    /// Sends what the driver has queued; drops it when there is no tap.
    pub(super) fn run(&mut self, tap: Option<&Tap>, interrupt: &dyn Interrupt) -> Result<Ended, QueueError> {
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

    fn batch(&mut self, tap: Option<&Tap>, interrupt: &dyn Interrupt) -> Result<Ended, QueueError> {
        let (mut left, mut untold) = (BATCH as usize, 0);
        loop {
            let (count, broken) = self.take(left.min(Burst::MOST));
            let gone = tap.is_some_and(|tap| self.send(count, tap));
            for packet in &self.packets[..count] {
                self.queue.queue.complete(packet.chain.head, 0);
            }
            broken?;
            if gone {
                return Ok(Ended::TapGone);
            }
            left -= count;
            if left == 0 {
                return Ok(Ended::Full);
            }
            if count > 0 {
                untold += count;
                if untold >= PUBLISH_EVERY as usize {
                    self.publish(interrupt);
                    untold = 0;
                } else {
                    self.queue.queue.show();
                }
                continue;
            }
            if !self.queue.queue.enable_notify()? {
                return Ok(Ended::Idle);
            }
            self.queue.queue.disable_notify();
        }
    }

    /// Takes up to `most` packets from the ring; how many, and whether the ring made no sense then.
    fn take(&mut self, most: usize) -> (usize, Result<(), QueueError>) {
        for count in 0..most {
            if count == self.packets.len() {
                self.packets.push(Packet { chain: Chain::default(), head: empty(), fine: false });
            }
            let Some(packet) = self.packets.get_mut(count) else { return (count, Ok(())) };
            match self.queue.queue.pop(&mut packet.chain) {
                Ok(true) => packet.fine = packet.prepare(self.features),
                Ok(false) => return (count, Ok(())),
                Err(error) => return (count, Err(error)),
            }
        }
        (most, Ok(()))
    }

    /// Sends the first `count` packets, without those that make no sense. True: the tap is gone.
    fn send(&mut self, count: usize, tap: &Tap) -> bool {
        if count >= MANY {
            self.many = self.many.saturating_add(1);
            if self.many == OFTEN {
                // Without one it goes on as before.
                self.burst = Burst::new().ok();
            }
        }
        if count >= MANY
            && let Some(gone) = self.send_many(count, tap)
        {
            return gone;
        }
        let mut gone = false;
        for packet in self.packets[..count].iter().filter(|p| p.fine) {
            // SAFETY: guest RAM, kept by the queue, and the header.
            gone |= unsafe { write(tap, packet.chain.readable.parts()) };
        }
        gone
    }

    /// The same by one call. `None`: there are no bursts, and nothing was sent.
    fn send_many(&mut self, count: usize, tap: &Tap) -> Option<bool> {
        let fine = self.packets[..count].iter().filter(|p| p.fine).map(|p| p.chain.readable.parts());
        let (mut gone, mut unknown) = (false, false);
        let note = |error: &io::Error| {
            gone |= is_gone(error);
            unknown |= is_unknown(error);
        };
        // SAFETY: guest RAM, kept by the queue, and the headers.
        if unsafe { self.burst.as_mut()?.send(tap, fine, note) }.is_err() {
            // Never seen. What the kernel may still read, and from where, stays for good.
            std::mem::forget(self.burst.take());
            for packet in &mut self.packets {
                std::mem::forget(std::mem::replace(&mut packet.head, empty()));
            }
        }
        if unknown {
            self.burst = None;
            return None;
        }
        Some(gone)
    }
}

fn empty() -> Box<Head> {
    Box::new([0; HEADER_BYTES + SMALL])
}

impl Packet {
    /// Puts it together; false: it makes no sense.
    fn prepare(&mut self, features: u64) -> bool {
        let packet = &mut self.chain.readable;
        let Some((header, small)) = self.head.split_first_chunk_mut() else { return false };
        if packet.take(header) < HEADER_BYTES {
            return false;
        }
        let len = packet.len();
        // The header is checked in, and sent from, our own copy: the guest could change its own in between.
        if !(SHORTEST..=LARGEST).contains(&len) || !header_is_fine(header, len, features) {
            return false;
        }
        header[10..].fill(0);
        let copied = small.get_mut(..len as usize).map_or(0, |small| packet.take(small));
        // SAFETY: `head` lives as long as this value, which does not leave its place before the packet is sent, and is not touched.
        unsafe { packet.prepend(self.head.as_mut_ptr(), HEADER_BYTES + copied) };
        packet.parts().len() <= MAX_BUFFERS
    }
}

/// Writes one packet. True: the tap is gone.
///
/// # Safety
/// Each part must be good for reading.
unsafe fn write(tap: &Tap, parts: &[libc::iovec]) -> bool {
    loop {
        // SAFETY: passed on.
        match unsafe { tap.write(parts) } {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return is_gone(&e),
            // The kernel takes a packet whole or not at all. One that it refuses (interface down, no memory) is dropped.
            Ok(_) => return false,
        }
    }
}

/// Whether the kernel may see this header with a packet of `len` bytes (§5.1.6.2.1): only what was negotiated, and offsets inside
/// the packet.
pub(super) fn header_is_fine(header: &[u8; HEADER_BYTES], len: u64, features: u64) -> bool {
    let field = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let [flags, gso_type, ..] = *header;
    let (header_len, gso_size, checksum_start, checksum_offset) = (field(2), field(4), field(6), field(8));
    let checksum = flags & NEEDS_CSUM != 0;
    if flags & !NEEDS_CSUM != 0 || (checksum && features & feature::CSUM == 0) {
        return false;
    }
    if checksum && checksum_start + checksum_offset + 2 > len {
        return false;
    }
    let allowed = match gso_type {
        GSO_NONE => return true,
        GSO_TCPV4 => feature::HOST_TSO4,
        GSO_TCPV6 => feature::HOST_TSO6,
        _ => return false,
    };
    features & allowed != 0 && checksum && gso_size > 0 && header_len <= len
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u8, gso: u8, fields: [u16; 4]) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        (header[0], header[1]) = (flags, gso);
        for (to, from) in header[2..10].chunks_exact_mut(2).zip(fields) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        header
    }

    #[test]
    fn headers_that_the_kernel_may_and_may_not_see() {
        let all = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6;
        // flags, gso type, [header length, gso size, checksum start, checksum offset], features
        let cases = [
            (0, 0, [0, 0, 0, 0], 0, true),
            (1, 0, [0, 0, 34, 16], all, true),
            (1, 0, [0, 0, 34, 16], 0, false),
            (1, 0, [0, 0, 84, 14], all, true),
            (1, 0, [0, 0, 84, 15], all, false),
            (1, 0, [0, 0, u16::MAX, u16::MAX], all, false),
            (2, 0, [0, 0, 0, 0], all, false),
            (0x80, 0, [0, 0, 0, 0], all, false),
            (1, 1, [54, 1448, 34, 16], all, true),
            (1, 4, [54, 1448, 34, 16], all, true),
            (1, 4, [54, 1448, 34, 16], feature::CSUM | feature::HOST_TSO4, false),
            (0, 1, [54, 1448, 34, 16], all, false),
            (1, 1, [54, 0, 34, 16], all, false),
            (1, 1, [101, 1448, 34, 16], all, false),
            (1, 3, [54, 1448, 34, 16], all, false),
            (1, 0x81, [54, 1448, 34, 16], all, false),
            (1, 5, [54, 1448, 34, 16], all, false),
        ];
        for (flags, gso, fields, features, fine) in cases {
            let header = header(flags, gso, fields);
            assert_eq!(header_is_fine(&header, 100, features), fine, "{header:?}");
        }
    }
}
