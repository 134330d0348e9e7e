//! Alignment of direct I/O: owns what the kernel demands of buffers and offsets, and the way around for guests that do not comply.

use std::alloc::{Layout, alloc, dealloc};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::ptr::NonNull;

use super::{SECTOR, raw};

/// Bytes that go through the bounce buffer at a time; also how much of a hostile request is held in host memory.
const BOUNCE_BYTES: usize = 256 << 10;
/// Larger demands than this make no sense and are not believed.
const MAX_ALIGN: u32 = 64 << 10;

/// What direct I/O on one file demands. Buffered I/O demands nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Alignment {
    direct: bool,
    /// Of the address and length of each buffer.
    memory: usize,
    /// Of the offset and the total length.
    offset: u64,
}

impl Alignment {
    pub(super) fn of(file: &File, direct: bool, metadata: &Metadata) -> Self {
        let fine = |n: u32| n.is_power_of_two() && n <= MAX_ALIGN;
        if let Some((memory, offset)) = ask(file).filter(|(m, o)| fine(*m) && fine(*o)) {
            return Self { direct, memory: memory as usize, offset: u64::from(offset).max(SECTOR) };
        }
        // Kernels before 6.1 do not say. The block size of a file system is a safe guess; a device's sector may be smaller.
        let guess = u32::try_from(metadata.blksize()).ok().filter(|n| fine(*n)).unwrap_or(4096);
        let offset = match metadata.file_type().is_block_device() {
            true => sector_size(file).filter(|n| fine(*n)).unwrap_or(guess),
            false => guess,
        };
        Self { direct, memory: offset as usize, offset: u64::from(offset).max(SECTOR) }
    }

    pub(super) fn direct(&self) -> bool {
        self.direct
    }

    /// What the guest is told as the block size.
    pub(super) fn block_size(&self) -> u64 {
        if self.direct { self.offset } else { SECTOR }
    }

    pub(super) fn refuses(&self, parts: &[libc::iovec], offset: u64) -> bool {
        if !self.direct {
            return false;
        }
        let total: u64 = parts.iter().map(|p| p.iov_len as u64).sum();
        let memory = parts.iter().fold(0, |all, p| all | p.iov_base as usize | p.iov_len);
        !self.whole_blocks(offset, total) || memory & (self.memory - 1) != 0
    }

    fn whole_blocks(&self, offset: u64, len: u64) -> bool {
        (offset | len) & (self.offset - 1) == 0
    }
}

/// Alignment of memory and offset, if the kernel tells.
fn ask(file: &File) -> Option<(u32, u32)> {
    // SAFETY: all zeroes is a valid `statx`.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor, an empty path with the flag that goes with it, and a buffer of the right type.
    let done = unsafe {
        libc::statx(raw(file), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut answer)
    };
    let told = done == 0 && answer.stx_mask & libc::STATX_DIOALIGN != 0;
    (told && answer.stx_dio_offset_align != 0)
        .then_some((answer.stx_dio_mem_align.max(1), answer.stx_dio_offset_align))
}

fn sector_size(file: &File) -> Option<u32> {
    rustix::fs::ioctl_blksszget(file).ok()
}

/// Moves data between misaligned buffers and a file opened for direct I/O. Synchronous, and slow: for the odd request.
pub(crate) struct Bounce {
    buffer: NonNull<u8>,
    layout: Layout,
    alignment: Alignment,
}

// SAFETY: owns its buffer.
unsafe impl Send for Bounce {}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.buffer.as_ptr(), self.layout) };
    }
}

impl Bounce {
    pub(super) fn new(alignment: &Alignment) -> io::Result<Self> {
        let align = alignment.memory.max(alignment.offset as usize).max(4096);
        let layout = Layout::from_size_align(BOUNCE_BYTES, align).map_err(io::Error::other)?;
        // SAFETY: the size is not zero.
        let buffer = NonNull::new(unsafe { alloc(layout) }).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: just allocated with that size. Initialised, because parts of it are lent as a slice.
        unsafe { buffer.write_bytes(0, BOUNCE_BYTES) };
        Ok(Self { buffer, layout, alignment: *alignment })
    }

    /// Whether a request here reads and writes back blocks that it covers in part, so that no other may be in flight.
    pub(crate) fn needs_quiet(&self, offset: u64, len: u64) -> bool {
        !self.alignment.whole_blocks(offset, len)
    }

    /// Reads `len` bytes at `offset` piece by piece, and gives the pieces to `take` in order.
    pub(crate) fn read(
        &mut self,
        file: &File,
        offset: u64,
        len: u64,
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.pieces(offset, len, |buffer, block, from, to| {
            read_at_least(file, buffer, block, to)?;
            take(&buffer[from..to]);
            Ok(())
        })
    }

    /// Writes `len` bytes at `offset` piece by piece, from pieces that `give` fills in order.
    pub(crate) fn write(
        &mut self,
        file: &File,
        offset: u64,
        len: u64,
        mut give: impl FnMut(&mut [u8]),
    ) -> io::Result<()> {
        let block_size = self.alignment.offset;
        self.pieces(offset, len, |buffer, block, from, to| {
            let whole = buffer.len();
            // Blocks that are covered only in part keep the rest of what they hold.
            if from != 0 || to != whole {
                let last = whole - block_size as usize;
                read_at_least(file, &mut buffer[..block_size as usize], block, 1)?;
                if last > 0 {
                    read_at_least(file, &mut buffer[last..], block + last as u64, 1)?;
                }
            }
            give(&mut buffer[from..to]);
            file.write_all_at(buffer, block)
        })
    }

    /// Cuts the range into pieces of whole blocks; calls `work(blocks, their offset, first wanted byte, end of wanted bytes)`.
    fn pieces(
        &mut self,
        offset: u64,
        len: u64,
        mut work: impl FnMut(&mut [u8], u64, usize, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let block_size = self.alignment.offset;
        // SAFETY: the buffer is ours alone, initialised, and this long.
        let buffer = unsafe { std::slice::from_raw_parts_mut(self.buffer.as_ptr(), BOUNCE_BYTES) };
        let (mut at, end) = (offset, offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?);
        while at < end {
            let block = at - at % block_size;
            let piece_end = end.min(block + BOUNCE_BYTES as u64);
            let to = (piece_end - block) as usize;
            let whole = to.next_multiple_of(block_size as usize);
            work(&mut buffer[..whole], block, (at - block) as usize, to)?;
            at = piece_end;
        }
        Ok(())
    }
}

/// Fills `buffer` from `offset`; the file may end early, but not before `least` bytes.
fn read_at_least(file: &File, buffer: &mut [u8], offset: u64, least: usize) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    if done < least { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}
