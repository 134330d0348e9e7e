//! How each queue is used by the book: the good request that has to be served after every misuse, and what makes a device answer
//! that does not answer by itself.

use super::rig::{Desc, NEXT, Rig, SIZE, WRITE};
use super::{BALLOON, BLK, CONSOLE, MEM, NET, PMEM, RNG, VSOCK};
use crate::virtio::reg;

/// What makes a device give requests of a queue back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Prompt {
    /// Their being there.
    None,
    /// A message on another queue, which it answers on this one.
    Message {
        /// The other queue.
        queue: u16,
    },
    /// One more request: the device keeps the last one (§5.5.6.3).
    Another,
    /// Buffers on another queue: it takes no more here while it cannot answer there.
    Feed {
        /// The other queue.
        queue: u16,
    },
}

/// Bytes of one entry of the balloon's statistics.
const ENTRY: u32 = 10;
/// `struct virtio_vsock_hdr`.
pub const VSOCK_HEADER: usize = 44;
/// VIRTIO_VSOCK_OP_REQUEST and _RST.
pub const REQUEST: u16 = 1;
/// As above.
pub const RST: u16 = 3;

/// A vsock packet's header as the guest sends it to the host: from its own address, port 1000, to address 2, port 4000000.
pub fn vsock_header(rig: &Rig, operation: u16, length: u32) -> [u8; VSOCK_HEADER] {
    let mut header = [0; VSOCK_HEADER];
    let cid = u64::from(rig.window.config32(4)) << 32 | u64::from(rig.window.config32(0));
    header[..8].copy_from_slice(&cid.to_le_bytes());
    header[8..16].copy_from_slice(&2u64.to_le_bytes());
    header[16..20].copy_from_slice(&1000u32.to_le_bytes());
    header[20..24].copy_from_slice(&4_000_000u32.to_le_bytes());
    header[24..28].copy_from_slice(&length.to_le_bytes());
    header[28..30].copy_from_slice(&1u16.to_le_bytes());
    header[30..32].copy_from_slice(&operation.to_le_bytes());
    header[36..40].copy_from_slice(&(64u32 << 10).to_le_bytes());
    header
}

impl Rig {
    /// Writes a good request for this queue, from descriptor `first` on, with buffers of its own; not yet available.
    pub fn put_good(&mut self, first: u16) {
        let place = 0x4_0000 + u64::from(first) * 0x1000;
        let at = self.data(place);
        match (self.target.kind, self.target.queue) {
            (BLK, _) => {
                self.fill(place, &[0; 16]);
                let status = self.expect_status(place + 16);
                self.put(
                    first,
                    &[
                        Desc(at, 16, NEXT, first + 1),
                        Desc(at + 0x200, 512, NEXT | WRITE, first + 2),
                        Desc(status, 1, WRITE, 0),
                    ],
                );
            }
            (NET, 1) => {
                // Header without offloads; a broadcast of an EtherType for experiments (IEEE 802).
                self.fill(place, &[0; 72]);
                self.fill(place + 12, &[0xff; 6]);
                self.fill(place + 18, &[2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
                self.put(first, &[Desc(at, 72, 0, 0)]);
            }
            (NET, 2) => {
                // Promiscuous mode, off.
                self.fill(place, &[0; 3]);
                let ack = self.expect_status(place + 16);
                let next = (first + 1) % SIZE;
                self.put(first, &[Desc(at, 3, NEXT, next)]);
                self.put(next, &[Desc(ack, 1, WRITE, 0)]);
            }
            (NET, _) => self.put(first, &[Desc(at, 2048, WRITE, 0)]),
            (RNG, _) | (CONSOLE, 0 | 2) => self.put(first, &[Desc(at, 64, WRITE, 0)]),
            (CONSOLE, 3) => {
                // VIRTIO_CONSOLE_PORT_READY of port 0.
                self.fill(place, &[0, 0, 0, 0, 3, 0, 1, 0]);
                self.put(first, &[Desc(at, 8, 0, 0)]);
            }
            (CONSOLE, _) => {
                self.fill(place, b"hostile\n");
                self.put(first, &[Desc(at, 8, 0, 0)]);
            }
            (BALLOON, 0 | 1) => {
                let page = (self.data(0x7_e000) >> 12) as u32;
                self.fill(place, &page.to_le_bytes());
                self.put(first, &[Desc(at, 4, 0, 0)]);
            }
            (BALLOON, 2) => self.put(first, &[self.statistics(place)]),
            (BALLOON, _) => self.put(first, &[Desc(at, 4096, WRITE, 0)]),
            (MEM, _) => {
                // VIRTIO_MEM_REQ_STATE of the first block, wherever that is.
                let base = [self.window.config32(16), self.window.config32(20)].map(u32::to_le_bytes);
                self.fill(place, &[3, 0, 0, 0, 0, 0, 0, 0]);
                self.fill(place + 8, base.as_flattened());
                self.fill(place + 16, &[1, 0, 0, 0, 0, 0, 0, 0]);
                self.put_question(first, Desc(at, 24, NEXT, 0), 10, place + 64);
            }
            (PMEM, _) => {
                self.fill(place, &[0; 4]);
                self.put_question(first, Desc(at, 4, NEXT, 0), 4, place + 64);
            }
            (VSOCK, 1) => {
                // Of a connection that does not exist: the host says nothing to that.
                self.fill(place, &vsock_header(self, RST, 0));
                self.put(first, &[Desc(at, VSOCK_HEADER as u32, 0, 0)]);
            }
            (VSOCK, _) => self.put(first, &[Desc(at, 4096, WRITE, 0)]),
            _ => {}
        }
    }

    /// A request and, behind it in the table, the place of its answer, whose first byte is a status.
    fn put_question(&mut self, first: u16, request: Desc, room: u32, place: u64) {
        let answer = self.expect_status(place);
        let next = (first + 1) % SIZE;
        self.put(first, &[Desc(request.0, request.1, request.2, next)]);
        self.put(next, &[Desc(answer, room, WRITE, 0)]);
    }

    /// VIRTIO_BALLOON_S_MEMFREE, whatever the number.
    fn statistics(&self, place: u64) -> Desc {
        self.fill(place, &[4, 0]);
        Desc(self.data(place), ENTRY, 0, 0)
    }

    /// Before the doorbell.
    pub fn prompt(&self) {
        match self.target.prompt {
            Prompt::Another if self.index_is_right() => {
                // Two take turns. Where a case has use for their descriptors, the last one is the end of its chain.
                let head = SIZE - 2 + self.index() / 2 % 2;
                let desc = self.statistics(0x7_d000);
                let free = (SIZE - 2..SIZE).all(|number| self.is_free(number, desc));
                if free {
                    self.put(head, &[desc]);
                }
                self.offer(if free { head } else { SIZE - 1 });
            }
            // A device that does not run yet is not spoken to.
            Prompt::Message { .. } if self.window.read(reg::STATUS) & 4 != 0 => self.remind(),
            _ => {}
        }
    }

    /// While an answer is waited for.
    pub fn remind(&self) {
        if let Prompt::Feed { queue } = self.target.prompt {
            for _ in 0..SIZE / 2 {
                self.send(queue, Desc(self.table() + 0x7000, 1024, WRITE, 0));
            }
        }
        let Prompt::Message { queue } = self.target.prompt else { return };
        // Behind all that cases put into tables.
        let place = self.table() + 0x7800;
        match self.target.kind {
            // VIRTIO_CONSOLE_DEVICE_READY: every port is made known anew.
            CONSOLE => {
                self.put_bytes(place, &[0, 0, 0, 0, 0, 0, 1, 0]);
                self.send(queue, Desc(place, 8, 0, 0));
            }
            // Nobody listens at that port: the host resets the connection.
            _ => {
                self.put_bytes(place, &vsock_header(self, REQUEST, 0));
                self.send(queue, Desc(place, VSOCK_HEADER as u32, 0, 0));
            }
        }
    }
}
