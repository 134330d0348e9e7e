//! Descriptor chains: owns the walk from a head to a list of host buffers, the checks on the way, and the list of what can be wrong.
//!
//! The driver is an enemy: each descriptor is read exactly once, every buffer is wholly in guest RAM before anybody sees it, and
//! a chain is either whole and in order (readable parts before writable ones, virtio 1.2 §2.7.4.2) or an error. Work per chain
//! is bounded by [`MAX_BUFFERS`], whatever the driver writes.

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestMemory;

/// Buffers in one chain at most, indirect ones included: what `readv` takes in one call (IOV_MAX), and as much as any
/// driver may use, because a chain must not be longer than its queue (§2.7.5.3.1), whose size we limit to the same.
pub const MAX_BUFFERS: usize = 1024;

const DESC_BYTES: u32 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Why a ring, or a chain in it, makes no sense. The device answers with DEVICE_NEEDS_RESET and stops.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum QueueError {
    /// Zero, not a power of two, or more than the device offered.
    #[error("size {0} is not a power of two that the device offers")]
    BadSize(u16),
    /// An area is misaligned or not wholly in guest RAM.
    #[error("{0} area at {1:#x} is misaligned or not in guest memory")]
    BadArea(&'static str, u64),
    /// The available index is further ahead than the queue is long.
    #[error("available index jumped from {from} to {to}")]
    IndexJumped {
        /// The next entry that the device would take.
        from: u16,
        /// What the driver wrote.
        to: u16,
    },
    /// A descriptor number beyond its table.
    #[error("descriptor {0} is beyond its table")]
    BadIndex(u32),
    /// The head of a request that the device has not given back yet.
    #[error("descriptor {0} was made available twice")]
    HeadInFlight(u16),
    /// A chain that comes back to itself.
    #[error("chain at {0} has a loop")]
    Loop(u16),
    /// An indirect descriptor that may not be here, or whose table has an impossible length.
    #[error("chain at {0} has a bad indirect descriptor")]
    BadIndirect(u16),
    /// A device-readable part after a device-writable one.
    #[error("chain at {0} has a readable part after a writable one")]
    OutOfOrder(u16),
    /// Too many parts, or 4 GiB or more.
    #[error("chain at {0} is too long")]
    TooLong(u16),
    /// A buffer that is not in guest RAM.
    #[error("buffer {addr:#x}+{len:#x} is not in guest memory")]
    NotRam {
        /// Guest physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
}

/// Parts of guest RAM, as the host's kernel wants them.
#[derive(Default)]
pub struct Buffers {
    parts: Vec<libc::iovec>,
    /// Parts before this one are used up.
    first: usize,
}

// SAFETY: the pointers lead into guest RAM, which every thread of the process may touch, or into memory whose owner (see
// `prepend`) moves together with this value.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Forgets all parts; keeps the memory for them.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.first = 0;
    }

    /// For `readv` and friends. Valid as long as the guest memory is.
    pub fn parts(&self) -> &[libc::iovec] {
        &self.parts[self.first..]
    }

    /// Bytes in all parts. Cannot overflow: the walk has checked the sum.
    pub fn len(&self) -> u64 {
        self.parts().iter().map(|p| p.iov_len as u64).sum()
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.parts().iter().all(|p| p.iov_len == 0)
    }

    /// Adds the parts of `other` at the end.
    pub fn append(&mut self, other: &Self) {
        self.parts.extend_from_slice(other.parts());
    }

    /// Adds one part at the end.
    ///
    /// # Safety
    /// `base` must be good for `len` bytes, reading and writing, for as long as this value is used.
    pub unsafe fn push(&mut self, base: *mut u8, len: usize) {
        self.parts.push(libc::iovec { iov_base: base.cast(), iov_len: len });
    }

    /// Puts one part in front.
    ///
    /// # Safety
    /// As for [`push`](Self::push).
    pub unsafe fn prepend(&mut self, base: *mut u8, len: usize) {
        let part = libc::iovec { iov_base: base.cast(), iov_len: len };
        match self.first.checked_sub(1) {
            Some(before) => {
                self.parts[before] = part;
                self.first = before;
            }
            None => self.parts.insert(0, part),
        }
    }

    /// Drops the first `n` bytes.
    pub fn advance(&mut self, mut n: usize) {
        while let Some(part) = self.parts.get_mut(self.first) {
            if n < part.iov_len {
                // SAFETY: `n` is inside this part.
                part.iov_base = unsafe { part.iov_base.cast::<u8>().add(n) }.cast();
                part.iov_len -= n;
                return;
            }
            n -= part.iov_len;
            self.first += 1;
        }
    }

    /// Copies bytes from the front into `to` and drops them; returns how many there were.
    pub fn take(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for part in self.parts() {
            let n = part.iov_len.min(to.len() - done);
            // SAFETY: `n` bytes are good on both sides, and host memory does not overlap guest RAM. The guest may write at
            // the same time; the copy then holds some mixture, which is checked like any other guest data.
            unsafe { to.as_mut_ptr().add(done).copy_from_nonoverlapping(part.iov_base.cast(), n) };
            done += n;
        }
        self.advance(done);
        done
    }

    /// Copies `from` to the front of the parts and drops what was filled; returns how much fitted.
    pub fn fill(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        for part in self.parts() {
            let n = part.iov_len.min(from.len() - done);
            // SAFETY: as in `take`.
            unsafe { part.iov_base.cast::<u8>().copy_from_nonoverlapping(from.as_ptr().add(done), n) };
            done += n;
        }
        self.advance(done);
        done
    }

    /// Copies `from` over the bytes at `offset`, as far as there are any.
    pub fn write_at(&self, mut offset: usize, from: &[u8]) {
        let mut done = 0;
        for part in self.parts() {
            if offset < part.iov_len && done < from.len() {
                let n = (part.iov_len - offset).min(from.len() - done);
                // SAFETY: as in `take`; the range is inside this part.
                unsafe {
                    let to = part.iov_base.cast::<u8>().add(offset);
                    to.copy_from_nonoverlapping(from.as_ptr().add(done), n);
                }
                done += n;
                offset = 0;
            } else {
                offset = offset.saturating_sub(part.iov_len);
            }
        }
    }

    /// Cuts off the last byte and gives a place to write it.
    pub fn split_last_byte(&mut self) -> Option<LastByte> {
        let part = self.parts.last_mut().filter(|p| p.iov_len > 0)?;
        part.iov_len -= 1;
        // SAFETY: the byte just cut off is the last one of this part.
        let last = LastByte(unsafe { part.iov_base.cast::<u8>().add(part.iov_len) });
        if part.iov_len == 0 {
            // Most drivers give the byte a part of its own: what is left must not look like misaligned data.
            self.parts.pop();
        }
        Some(last)
    }
}

/// One byte of guest RAM that the device owes the driver.
pub struct LastByte(*mut u8);

// SAFETY: leads into guest RAM, as `Buffers` does.
unsafe impl Send for LastByte {}

impl LastByte {
    /// Writes it.
    pub fn write(&self, value: u8) {
        // SAFETY: valid as long as the guest memory is, which the queue that the chain came from keeps.
        unsafe { self.0.write_volatile(value) };
    }
}

/// One request as the driver laid it out.
#[derive(Default)]
pub struct Chain {
    /// Names the request to the queue when it is done.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
}

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct RawDescriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A table of descriptors: the queue's own or an indirect one.
#[derive(Clone, Copy)]
pub(super) struct Table {
    base: *const RawDescriptor,
    entries: u32,
}

impl Table {
    /// The table at `addr` in guest RAM, or `None` if it is not wholly there.
    pub(super) fn find(memory: &GuestMemory, addr: u64, entries: u32) -> Option<Self> {
        let bytes = usize::try_from(entries.checked_mul(DESC_BYTES)?).ok()?;
        Some(Self { base: host_address(memory, addr, bytes)?.cast_const().cast(), entries })
    }

    /// In this process.
    pub(super) fn address(self) -> u64 {
        self.base as u64
    }

    fn get(self, index: u32) -> Option<RawDescriptor> {
        // SAFETY: the table is wholly in guest RAM and `index` is inside it; the type has no alignment. Volatile, so that the
        // compiler reads it here, once.
        (index < self.entries).then(|| unsafe { self.base.add(index as usize).read_volatile() })
    }
}

/// The piece of guest RAM that a buffer was last found in: the next one mostly lies there, too.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    start: u64,
    len: u64,
    base: *mut u8,
}

impl Piece {
    /// None yet.
    pub(super) const NONE: Self = Self { start: 0, len: 0, base: std::ptr::null_mut() };

    /// As [`host_address`], in the same memory each time.
    fn host_address(&mut self, memory: &GuestMemory, addr: u64, len: u64) -> Option<*mut u8> {
        if self.offset(addr, len).is_none() {
            let region = memory.find_region(GuestAddress(addr))?;
            *self = Self { start: region.start_addr().raw_value(), len: region.len(), base: region.as_ptr() };
        }
        // SAFETY: the offset is inside the piece, which is mapped as long as the memory is there.
        self.offset(addr, len).map(|at| unsafe { self.base.add(at) })
    }

    /// Where in the piece the range begins that is wholly in it.
    fn offset(&self, addr: u64, len: u64) -> Option<usize> {
        let at = addr.checked_sub(self.start)?;
        (at.checked_add(len)? <= self.len).then_some(at as usize)
    }
}

/// Where the host has the guest's `len` bytes at `addr`, if all of them are in one piece of RAM.
pub(super) fn host_address(memory: &GuestMemory, addr: u64, len: usize) -> Option<*mut u8> {
    Some(memory.get_slice(GuestAddress(addr), len).ok()?.ptr_guard_mut().as_ptr())
}

/// Follows the chain that starts at `head` of `table` into `chain`.
pub(super) fn walk(
    memory: &GuestMemory,
    piece: &mut Piece,
    mut table: Table,
    head: u16,
    indirect_allowed: bool,
    chain: &mut Chain,
) -> Result<(), QueueError> {
    chain.head = head;
    chain.readable.clear();
    chain.writable.clear();
    let mut index = u32::from(head);
    let mut in_indirect = false;
    // Counts down over both tables, so a loop ends here at the latest.
    let mut left = table.entries;
    let mut total = 0u64;
    loop {
        let desc = table.get(index).ok_or(QueueError::BadIndex(index))?;
        left = left.checked_sub(1).ok_or(QueueError::Loop(head))?;
        let (addr, len, flags, next) = (desc.addr, desc.len, desc.flags, desc.next);
        let (addr, len) = (u64::from_le(addr), u32::from_le(len));
        let (flags, next) = (u16::from_le(flags), u16::from_le(next));
        if flags & INDIRECT != 0 {
            // §2.7.5.3.1: not negotiated, nested, or together with NEXT. §2.7.5.3.2: WRITE is ignored here.
            if !indirect_allowed || in_indirect || flags & NEXT != 0 {
                return Err(QueueError::BadIndirect(head));
            }
            let entries = len / DESC_BYTES;
            if len % DESC_BYTES != 0 || entries == 0 || entries as usize > MAX_BUFFERS {
                return Err(QueueError::BadIndirect(head));
            }
            table = Table::find(memory, addr, entries).ok_or(QueueError::NotRam { addr, len })?;
            left = entries;
            in_indirect = true;
            index = 0;
            continue;
        }
        total += u64::from(len);
        if total > u64::from(u32::MAX) {
            // §2.7.4.2: a chain is at most 2^32 bytes long; the used length has 32 bits.
            return Err(QueueError::TooLong(head));
        }
        let part = if flags & WRITE != 0 {
            &mut chain.writable
        } else if chain.writable.parts.is_empty() {
            &mut chain.readable
        } else {
            return Err(QueueError::OutOfOrder(head));
        };
        add_part(memory, piece, part, addr, len)?;
        if chain.readable.parts.len() + chain.writable.parts.len() > MAX_BUFFERS {
            return Err(QueueError::TooLong(head));
        }
        if flags & NEXT == 0 {
            return Ok(());
        }
        index = u32::from(next);
    }
}

/// Adds a guest range, which may lie in several pieces of host memory. Empty ones add nothing.
fn add_part(
    memory: &GuestMemory,
    piece: &mut Piece,
    to: &mut Buffers,
    addr: u64,
    len: u32,
) -> Result<(), QueueError> {
    if len == 0 {
        return Ok(());
    }
    let not_ram = || QueueError::NotRam { addr, len };
    let bytes = usize::try_from(len).map_err(|_| not_ram())?;
    if let Some(base) = piece.host_address(memory, addr, u64::from(len)) {
        // SAFETY: the range was just found in guest RAM, which lives as long as the queue.
        unsafe { to.push(base, bytes) };
        return Ok(());
    }
    for slice in memory.get_slices(GuestAddress(addr), bytes) {
        let slice = slice.map_err(|_| not_ram())?;
        // SAFETY: as above.
        unsafe { to.push(slice.ptr_guard_mut().as_ptr(), slice.len()) };
    }
    Ok(())
}
