//! The device as the rest of the process sees it: how much memory the guest is to have, and how much it has. Owns the blocks, and carries
//! requests out.
//!
//! Locks: `blocks`, held while KVM and the host's kernel do what a request needs (milliseconds for each chunk): only the device's I/O
//! thread takes it, and the machine while it is reset. `live`, held for a moment. Everyone else reads atomic numbers and waits for nobody.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::blocks::Blocks;
use super::request::{Answer, Request, State, Stretch};
use crate::memory::DeviceRegion;
use crate::virtio::{Interrupt, complain};

/// The memory that blocks are made of: what the machine has to do with it.
pub trait Store: Send + Sync {
    /// Guest physical address of the first block.
    fn base(&self) -> u64;
    /// Bytes in all.
    fn size(&self) -> u64;
    /// Bytes that the guest can reach, or not, together; a multiple of a block.
    fn chunk(&self) -> u64;
    /// Lets the guest reach a chunk, or not.
    fn expose(&self, chunk: usize, exposed: bool) -> io::Result<()>;
    /// Gives pages back to the host: `len` bytes at `offset`.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
}

impl Store for DeviceRegion {
    fn base(&self) -> u64 {
        Self::base(self)
    }

    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn chunk(&self) -> u64 {
        Self::chunk(self)
    }

    fn expose(&self, chunk: usize, exposed: bool) -> io::Result<()> {
        Self::expose(self, chunk, exposed)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        Self::discard(self, offset, len)
    }
}

/// Why the guest cannot be asked to have so much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSize {
    /// Parts of a block.
    #[error("requested-size {size} is not a multiple of block-size, {block} bytes")]
    Blocks {
        /// Bytes asked for.
        size: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// More than there is.
    #[error("requested-size {size} is more than the device has, {most} bytes")]
    TooMuch {
        /// Bytes asked for.
        size: u64,
        /// Bytes that there are.
        most: u64,
    },
}

/// How things stand, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// Bytes of a block.
    pub block_size: u64,
    /// The guest's NUMA node that the memory belongs to.
    pub node: u16,
    /// What the guest has.
    pub plugged_size: u64,
    /// What it is to have.
    pub requested_size: u64,
    /// What it could have.
    pub size: u64,
}

/// A handle on one device; works whether a driver is there or not.
pub struct Port {
    store: Arc<dyn Store>,
    block: u64,
    node: u16,
    blocks: Mutex<Blocks>,
    requested: AtomicU64,
    plugged: AtomicU64,
    live: Mutex<Option<Arc<dyn Interrupt>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port {
    pub(super) fn new(store: Arc<dyn Store>, block: u64, node: u16, requested: u64) -> Arc<Self> {
        let block = block.max(1);
        let number = |bytes: u64| usize::try_from(bytes / block).unwrap_or(usize::MAX);
        let blocks = Mutex::new(Blocks::new(number(store.size()), number(store.chunk())));
        let (requested, plugged) = (AtomicU64::new(requested), AtomicU64::new(0));
        Arc::new(Self { store, block, node, blocks, requested, plugged, live: Mutex::new(None) })
    }

    /// Asks the guest to have `bytes` of this memory. It does so by and by; one without a driver hears of it when it has one.
    pub fn request(&self, bytes: u64) -> Result<(), BadSize> {
        let (block, most) = (self.block, self.store.size());
        if !bytes.is_multiple_of(block) {
            return Err(BadSize::Blocks { size: bytes, block });
        }
        if bytes > most {
            return Err(BadSize::TooMuch { size: bytes, most });
        }
        if self.requested.swap(bytes, Ordering::AcqRel) != bytes {
            let interrupt = lock(&self.live).clone();
            if let Some(interrupt) = interrupt {
                interrupt.config();
            }
        }
        Ok(())
    }

    /// How things stand.
    pub fn info(&self) -> Info {
        Info {
            block_size: self.block,
            node: self.node,
            plugged_size: self.plugged.load(Ordering::Acquire),
            requested_size: self.requested.load(Ordering::Acquire),
            size: self.store.size(),
        }
    }

    /// Takes all of it away from the guest. For a machine that is reset: what runs next knows of no block, and no driver is there.
    pub fn unplug_all(&self) {
        let mut blocks = match self.blocks.try_lock() {
            Ok(blocks) => blocks,
            Err(TryLockError::Poisoned(blocks)) => blocks.into_inner(),
            // A request of the driver before hangs in KVM: waiting for it would hang the machine, too.
            Err(TryLockError::WouldBlock) => {
                tracing::error!("virtio-mem: memory stays plugged over the reset: a request has not ended");
                return;
            }
        };
        let all = blocks.all();
        self.take(&mut blocks, all);
    }

    pub(super) fn base(&self) -> u64 {
        self.store.base()
    }

    pub(super) fn connect(&self, interrupt: Arc<dyn Interrupt>) {
        *lock(&self.live) = Some(interrupt);
    }

    pub(super) fn disconnect(&self) {
        *lock(&self.live) = None;
    }

    /// Carries a request out.
    pub(super) fn carry_out(&self, request: Request) -> Answer {
        let mut blocks = lock(&self.blocks);
        if request == Request::UnplugAll {
            let all = blocks.all();
            self.take(&mut blocks, all);
            return Answer::Ack;
        }
        let (Request::Plug(stretch) | Request::Unplug(stretch) | Request::State(stretch)) = request else {
            return Answer::Error;
        };
        let Some(range) = self.range(&blocks, stretch) else { return Answer::Error };
        let state = blocks.state(range.clone());
        match request {
            Request::Plug(_) if state == State::Unplugged => self.give(&mut blocks, range),
            Request::Unplug(_) if state == State::Plugged => {
                self.take(&mut blocks, range);
                Answer::Ack
            }
            Request::State(_) => Answer::State(state),
            // What is to be plugged must not be plugged in part, and the other way round (§5.15.6.2, §5.15.6.3).
            _ => Answer::Error,
        }
    }

    /// The blocks of a stretch that begins where a block does.
    fn range(&self, blocks: &Blocks, stretch: Stretch) -> Option<Range<usize>> {
        let offset = stretch.addr.checked_sub(self.store.base())?;
        if !offset.is_multiple_of(self.block) {
            return None;
        }
        blocks.range(offset / self.block, stretch.blocks)
    }

    /// Plugs blocks, none of which is.
    fn give(&self, blocks: &mut Blocks, range: Range<usize>) -> Answer {
        let after = (blocks.plugged() + range.len()) as u64;
        if after.checked_mul(self.block).is_none_or(|bytes| bytes > self.requested.load(Ordering::Acquire)) {
            return Answer::Nack;
        }
        for (chunk, part) in blocks.parts(range.clone()) {
            if !blocks.is_in_use(chunk)
                && let Err(error) = self.store.expose(chunk, true)
            {
                complain(|| tracing::warn!("virtio-mem: the guest gets no more memory for now: {error}"));
                self.take(blocks, range.start..part.start);
                return Answer::Busy;
            }
            blocks.plug(part);
        }
        self.publish(blocks);
        Answer::Ack
    }

    /// Unplugs those of a range that are plugged. What the host does not take back for some reason is not the guest's any more all the same.
    fn take(&self, blocks: &mut Blocks, range: Range<usize>) {
        for (chunk, part) in blocks.parts(range) {
            if !blocks.is_in_use(chunk) {
                continue;
            }
            blocks.unplug(part.clone());
            // First out of reach, so that nothing comes back behind our back; then away, with what lay in blocks that were not plugged.
            let (offset, len) = if blocks.is_in_use(chunk) {
                (part.start as u64 * self.block, part.len() as u64 * self.block)
            } else {
                if let Err(error) = self.store.expose(chunk, false) {
                    complain(|| {
                        tracing::error!("virtio-mem: memory stays within the guest's reach: {error}");
                    });
                }
                let offset = chunk as u64 * self.store.chunk();
                (offset, self.store.chunk().min(self.store.size().saturating_sub(offset)))
            };
            if let Err(error) = self.store.discard(offset, len) {
                complain(|| tracing::error!("virtio-mem: the host does not get memory back: {error}"));
            }
        }
        self.publish(blocks);
    }

    fn publish(&self, blocks: &Blocks) {
        self.plugged.store(blocks.plugged() as u64 * self.block, Ordering::Release);
    }
}
