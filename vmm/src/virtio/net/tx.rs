//! From the guest: owns the check of packet headers. One `writev` per packet, straight from the guest's buffers.

use std::io;

use super::feature;
use super::turn::{BATCH, Ended, PUBLISH_EVERY, is_gone};
use crate::net::{HEADER_BYTES, Tap};
use crate::virtio::queue::{Chain, MAX_BUFFERS, QueueError};
use crate::virtio::{ActiveQueue, Interrupt};

/// Largest packet: 64 KiB of IP in an Ethernet frame with a VLAN tag.
const LARGEST: u64 = 65_535 + 18;
/// An Ethernet header: anything shorter is not a packet.
const SHORTEST: u64 = 14;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

pub(super) struct Sender {
    pub(super) queue: ActiveQueue,
    features: u64,
    chain: Chain,
    header: [u8; HEADER_BYTES],
}

impl Sender {
    pub(super) fn new(queue: ActiveQueue, features: u64) -> Self {
        Self { queue, features, chain: Chain::default(), header: [0; HEADER_BYTES] }
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
        let mut packet = 0;
        loop {
            while self.queue.queue.pop(&mut self.chain)? {
                let gone = tap.is_some_and(|tap| self.send(tap));
                self.queue.queue.complete(self.chain.head, 0);
                if gone {
                    return Ok(Ended::TapGone);
                }
                packet += 1;
                if packet % PUBLISH_EVERY == 0 {
                    self.publish(interrupt);
                }
                if packet == BATCH {
                    return Ok(Ended::Full);
                }
            }
            if !self.queue.queue.enable_notify()? {
                return Ok(Ended::Idle);
            }
            self.queue.queue.disable_notify();
        }
    }

    /// Sends or drops the packet in `chain`. True: the tap is gone.
    fn send(&mut self, tap: &Tap) -> bool {
        let packet = &mut self.chain.readable;
        if packet.take(&mut self.header) < HEADER_BYTES {
            return false;
        }
        let len = packet.len();
        // The header is checked in, and sent from, our own copy: the guest could change its own in between.
        if !(SHORTEST..=LARGEST).contains(&len) || !header_is_fine(&self.header, len, self.features) {
            return false;
        }
        self.header[10..].fill(0);
        // SAFETY: `header` lives in this value and is not touched before the chain is used up.
        unsafe { packet.prepend(self.header.as_mut_ptr(), HEADER_BYTES) };
        if packet.parts().len() > MAX_BUFFERS {
            return false;
        }
        loop {
            // SAFETY: guest RAM, kept by the queue, and the header.
            match unsafe { tap.write(packet.parts()) } {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return is_gone(&e),
                // The kernel takes a packet whole or not at all. One that it refuses (interface down, no memory) is dropped.
                Ok(_) => return false,
            }
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
