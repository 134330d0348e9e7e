//! Block requests: owns their parsing, from a chain to something that is known to be within the disk.

use crate::block::SECTOR;
use crate::virtio::queue::{Buffers, Chain, LastByte};

/// Length of the answer to GET_ID (virtio 1.2 §5.2.6).
pub(super) const ID_BYTES: usize = 20;
/// 1 GiB: what one discard may cover.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// 32 MiB: what one write of zeroes may cover. Less than a discard, because a file system may really have to write them.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;

const HEADER_BYTES: usize = 16;
const SEGMENT_BYTES: usize = 16;
const UNMAP: u32 = 1;

/// The status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// What a request asks for. Ranges are in bytes, within the disk, whole sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard { len: u64 },
    WriteZeroes { len: u64, unmap: bool },
}

/// What the device allows.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rules {
    /// Bytes; 0 for an empty slot.
    pub(super) size: u64,
    pub(super) read_only: bool,
    /// DISCARD was negotiated.
    pub(super) unmap: bool,
    /// WRITE_ZEROES was negotiated.
    pub(super) zero: bool,
}

/// A request to carry out.
#[derive(Default)]
pub(super) struct Request {
    /// Which ring it came from.
    pub(super) lane: usize,
    pub(super) chain: Chain,
    pub(super) status: Option<LastByte>,
    /// Where on the disk the rest of it lies.
    pub(super) offset: u64,
    /// Bytes written to the guest's buffers so far.
    pub(super) written: u32,
    /// Times that the kernel has asked to try again.
    pub(super) tries: u32,
    /// What it turned out to be, and how many bytes of the disk it covers; for statistics.
    pub(super) counted: Option<(Kind, u64)>,
}

impl Request {
    /// Reads the header and takes the status byte off. `Err`: answer with that status (if there is room for one).
    pub(super) fn parse(&mut self, rules: Rules) -> Result<Kind, Status> {
        (self.offset, self.written, self.tries) = (0, 0, 0);
        self.counted = None;
        self.status = self.chain.writable.split_last_byte();
        let kind = self.parse_kind(rules)?;
        let bytes = match kind {
            Kind::Read | Kind::Write => self.buffers(kind).len(),
            Kind::Discard { len } | Kind::WriteZeroes { len, .. } => len,
            Kind::Flush | Kind::GetId => 0,
        };
        self.counted = Some((kind, bytes));
        Ok(kind)
    }

    fn parse_kind(&mut self, rules: Rules) -> Result<Kind, Status> {
        let mut header = [0; HEADER_BYTES];
        if self.chain.readable.take(&mut header) < HEADER_BYTES {
            return Err(Status::IoErr);
        }
        // type le32, reserved le32, sector le64
        let [kind, _] = words(&header);
        let sector = u64::from_le_bytes([
            header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15],
        ]);
        if rules.size == 0 {
            return Err(Status::IoErr);
        }
        match kind {
            0 => self.data(Kind::Read, sector, rules),
            1 if rules.read_only => Err(Status::IoErr),
            1 => self.data(Kind::Write, sector, rules),
            4 => Ok(Kind::Flush),
            8 => Ok(Kind::GetId),
            11 if rules.unmap => self.segment(true, rules),
            13 if rules.zero => self.segment(false, rules),
            _ => Err(Status::Unsupported),
        }
    }

    fn data(&mut self, kind: Kind, sector: u64, rules: Rules) -> Result<Kind, Status> {
        let len = if kind == Kind::Read { self.chain.writable.len() } else { self.chain.readable.len() };
        self.offset = within(sector, len, rules.size).ok_or(Status::IoErr)?;
        Ok(kind)
    }

    /// DISCARD and WRITE_ZEROES: one segment, as the configuration space says.
    fn segment(&mut self, discard: bool, rules: Rules) -> Result<Kind, Status> {
        if rules.read_only {
            return Err(Status::IoErr);
        }
        let mut segment = [0; SEGMENT_BYTES];
        if self.chain.readable.take(&mut segment) < SEGMENT_BYTES || !self.chain.readable.is_empty() {
            return Err(Status::IoErr);
        }
        // sector le64, sectors le32, flags le32
        let [low, high] = words(&segment);
        let sector = u64::from(low) | u64::from(high) << 32;
        let [sectors, flags] = words(&segment[8..]);
        // §5.2.6.2: unknown flags, and "unmap" on a discard, are not supported.
        if flags & !UNMAP != 0 || (discard && flags != 0) {
            return Err(Status::Unsupported);
        }
        if sectors > if discard { MAX_DISCARD_SECTORS } else { MAX_WRITE_ZEROES_SECTORS } {
            return Err(Status::IoErr);
        }
        let len = u64::from(sectors) * SECTOR;
        self.offset = within(sector, len, rules.size).ok_or(Status::IoErr)?;
        Ok(if discard { Kind::Discard { len } } else { Kind::WriteZeroes { len, unmap: flags & UNMAP != 0 } })
    }

    /// Whether all that is to be written is zeroes. The guest can still change it: then it gets what it wrote, or zeroes.
    pub(super) fn writes_zeroes(&self) -> bool {
        let mut piece = [0u8; SECTOR as usize];
        self.chain.readable.parts().iter().all(|part| {
            (0..part.iov_len).step_by(piece.len()).all(|at| {
                let n = piece.len().min(part.iov_len - at);
                // SAFETY: the range is inside this part of guest RAM, and host memory does not overlap it.
                unsafe {
                    piece.as_mut_ptr().copy_from_nonoverlapping(part.iov_base.cast::<u8>().add(at), n);
                }
                piece[..n].iter().all(|b| *b == 0)
            })
        })
    }

    /// The buffers that data moves through.
    pub(super) fn buffers(&mut self, kind: Kind) -> &mut Buffers {
        if kind == Kind::Read { &mut self.chain.writable } else { &mut self.chain.readable }
    }
}

/// Byte offset of a range of whole sectors inside the disk.
fn within(sector: u64, len: u64, size: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(len)?;
    (len.is_multiple_of(SECTOR) && end <= size).then_some(offset)
}

/// The first two little-endian 32-bit words.
fn words(bytes: &[u8]) -> [u32; 2] {
    let mut words = [0; 2];
    for (word, four) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_range_within_the_disk_is_within_the_disk(sector: u64, len in 0..u64::from(u32::MAX), size: u64) {
            if let Some(offset) = within(sector, len, size) {
                prop_assert_eq!(u128::from(offset), u128::from(sector) * 512);
                prop_assert!(u128::from(offset) + u128::from(len) <= u128::from(size));
                prop_assert_eq!(len % SECTOR, 0);
            }
        }
    }

    #[test]
    fn ranges_at_the_edges() {
        let cases = [
            (0, 512, 512, Some(0)),
            (1, 512, 512, None),
            (1, 0, 512, Some(512)),
            (0, 511, 512, None),
            (0, 1024, 512, None),
            (u64::MAX, 512, u64::MAX, None),
            (u64::MAX / 512, 512, u64::MAX, None),
        ];
        for (sector, len, size, expected) in cases {
            assert_eq!(within(sector, len, size), expected, "{sector} {len} {size}");
        }
    }
}
