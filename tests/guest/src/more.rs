//! virtio-mem (virtio 1.2 §5.15): asks for blocks and gives them back exactly as it is told, whatever the device wants; and looks at what is
//! where they are, or are not.

use crate::virtio::{Piece, Problem, Queue, Window};
use crate::{cpu, memory, paging};

/// Device type.
pub const KIND: u32 = 24;

const REQUEST: u32 = 24;
const ANSWER: u32 = 10;
/// Where the answer is in our page.
const ANSWER_AT: usize = 64;
const TIMEOUT: u64 = 30_000_000;
/// One word is looked at in so many bytes.
const STRIDE: u64 = 64 << 10;
/// What is written: with the address, so that no word is another's.
const MARK: u32 = 0x5eed_0000;

fn mark(address: u64) -> u32 {
    MARK | u32::from((address / STRIDE) as u16)
}

/// What the words of some blocks hold.
#[derive(Default)]
pub struct Seen {
    /// What was written.
    pub kept: u64,
    /// Zeroes.
    pub zero: u64,
    /// All ones, as where nothing is.
    pub absent: u64,
    /// Anything else.
    pub other: u64,
}

/// A device that is driven.
pub struct More {
    queue: Queue,
    page: &'static mut [u8],
    block: u64,
    base: u64,
    size: u64,
    /// Set when a request did not come back: the page is the device's for good.
    lost: bool,
}

impl More {
    /// Takes the device over, and maps where its memory is or could be.
    pub fn open(window: Window) -> Result<Self, Problem> {
        window.negotiate(0)?;
        let queue = window.queue(0)?;
        queue.interrupts(false);
        let page = memory::pages(1).ok_or("out of memory")?;
        let field = |at| u64::from(window.config32(at)) | u64::from(window.config32(at + 4)) << 32;
        let (block, base, size) = (field(0), field(16), field(24));
        if block == 0 || !paging::map_more(base, size) {
            return Err("its memory is not where we can map it");
        }
        window.start();
        Ok(Self { queue, page, block, base, size, lost: false })
    }

    /// Sends a request for `count` blocks from number `first` on; the answer's type and state.
    pub fn ask(&mut self, kind: u16, first: u64, count: u16) -> Result<(u16, u16), Problem> {
        if self.lost {
            return Err("an earlier request did not come back");
        }
        let address = self.base.wrapping_add(first.wrapping_mul(self.block));
        let (request, answer) = self.page.split_at_mut(ANSWER_AT);
        request.fill(0);
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        let chain = [
            Piece { address: request.as_ptr() as u64, length: REQUEST, for_device: false },
            Piece { address: answer.as_mut_ptr() as u64, length: ANSWER, for_device: true },
        ];
        self.queue.offer(0, &chain);
        self.queue.notify();
        if !self.queue.wait(TIMEOUT) {
            self.lost = true;
            return Err("no answer");
        }
        match self.queue.take() {
            Some((0, ANSWER)) => {}
            _ => return Err("an answer of another length"),
        }
        // SAFETY: our page; volatile, because the device has written it.
        let word =
            |at: usize| unsafe { self.page.as_ptr().add(ANSWER_AT + at).cast::<u16>().read_volatile() };
        Ok((word(0), word(8)))
    }

    fn words(&self, first: u64, count: u64) -> Option<impl Iterator<Item = u64> + use<>> {
        let start = first.checked_mul(self.block)?;
        let end = count.checked_mul(self.block)?.checked_add(start).filter(|end| *end <= self.size)?;
        let base = self.base;
        Some((start..end).step_by(STRIDE as usize).map(move |offset| base + offset))
    }

    /// Writes to the blocks; how many words. `None`: they are beyond the end.
    pub fn fill(&self, first: u64, count: u64) -> Option<u64> {
        let mut written = 0;
        for address in self.words(first, count)? {
            // SAFETY: mapped, and nothing of ours lies there. Where no memory is the write has no effect.
            unsafe { cpu::write32(address, mark(address)) };
            written += 1;
        }
        Some(written)
    }

    /// Looks at the same words.
    pub fn look(&self, first: u64, count: u64) -> Option<Seen> {
        let mut seen = Seen::default();
        for address in self.words(first, count)? {
            // SAFETY: mapped; a read changes nothing.
            let word = unsafe { cpu::read32(address) };
            let place = match word {
                0 => &mut seen.zero,
                u32::MAX => &mut seen.absent,
                word if word == mark(address) => &mut seen.kept,
                _ => &mut seen.other,
            };
            *place += 1;
        }
        Some(seen)
    }
}
