//! What hostile cases are made with: owns the memory of rings and buffers, which is used again by each case, and drives the
//! device's registers one by one, with no check of its own.

use core::cell::Cell;
use core::sync::atomic::{Ordering, fence};

use super::good::Prompt;
use super::{BALLOON, BLK, MEM, Outcome, Target};
use crate::boot::BootInfo;
use crate::virtio::{Problem, VERSION_1, Window, reg};
use crate::{clock, cpu, memory};

/// VIRTIO_F_INDIRECT_DESC.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// Descriptor flags (§2.7.5).
pub const NEXT: u16 = 1;
/// As above.
pub const WRITE: u16 = 2;
/// As above.
pub const INDIRECT: u16 = 4;
/// Entries of the queues as cases set them up.
pub const SIZE: u16 = 64;
/// ACKNOWLEDGE, DRIVER, FEATURES_OK.
pub const FEATURES_OK: u32 = 11;
/// The same and DRIVER_OK.
pub const DRIVER_OK: u32 = 15;
/// Set by the device.
pub const DEVICE_NEEDS_RESET: u32 = 64;

const QUEUES: u64 = 8;
const RING: u64 = 32 << 10;
const DATA: u64 = 512 << 10;
/// How long a device may take to answer, on a machine that does other things too.
const PATIENCE: u64 = 10_000_000;
/// Between two prompts of a device that speaks when it is spoken to.
const PROMPT: u64 = 1000;

/// Memory that all cases share.
#[derive(Clone, Copy)]
pub struct Space {
    rings: u64,
    table: u64,
    data: u64,
    /// First address behind RAM.
    pub ram_end: u64,
}

impl Space {
    /// Takes it from the allocator, which only gives.
    pub fn new(boot: &BootInfo) -> Result<Self, Problem> {
        let pages = |bytes: u64| {
            memory::pages(bytes / memory::PAGE).map(|p| p.as_mut_ptr() as u64).ok_or("out of memory")
        };
        let below = |r: crate::boot::Region| r.start.saturating_add(r.size);
        let ram_end = boot.ram().map(below).filter(|end| *end <= 3 << 30).max().unwrap_or(0);
        let ram_end = ram_end.next_multiple_of(1 << 20);
        Ok(Self { rings: pages(QUEUES * RING)?, table: pages(RING)?, data: pages(DATA)?, ram_end })
    }
}

/// Where a queue's areas are and how long it is, as the registers say it.
#[derive(Clone, Copy)]
pub struct Layout {
    /// Value of the size register.
    pub size: u32,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub driver: u64,
    /// Used ring.
    pub device: u64,
    /// Value of the ready register.
    pub ready: u32,
}

/// A descriptor as it stands in memory.
#[derive(Clone, Copy, Default)]
pub struct Desc(pub u64, pub u32, pub u16, pub u16);

/// Writes to memory that a device may be looking at.
fn poke<T>(address: u64, value: T) {
    // SAFETY: callers pass addresses in the space's own pages only.
    unsafe { (address as *mut T).write_volatile(value) };
}

/// Reads memory that a device may be writing.
fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: as in `poke`; `T` is a plain number.
    unsafe { (address as *const T).read_volatile() }
}

/// The device under attack.
pub struct Rig {
    space: Space,
    /// Its registers.
    pub window: Window,
    /// Which queue.
    pub target: &'static Target,
    /// Used entries that were waited for.
    seen: u16,
    /// The status byte of the last request that has one.
    status_byte: Option<u64>,
    /// Requests that were made available, one after the other, since the reset.
    offered: Cell<u16>,
}

impl Rig {
    /// A rig for one queue of the device in `window`.
    pub fn new(space: Space, window: Window, target: &'static Target) -> Self {
        Self { space, window, target, seen: 0, status_byte: None, offered: Cell::new(0) }
    }

    /// First address behind RAM.
    pub fn ram_end(&self) -> u64 {
        self.space.ram_end
    }

    /// `offset` bytes into the buffers, 512 KiB.
    pub fn data(&self, offset: u64) -> u64 {
        self.space.data + offset % DATA
    }

    /// The table that indirect descriptors point to, 32 KiB.
    pub fn table(&self) -> u64 {
        self.space.table
    }

    /// WRITE where the queue's requests are for the device to write.
    pub fn way(&self) -> u16 {
        if self.target.writable { WRITE } else { 0 }
    }

    /// Puts bytes into the buffers.
    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            poke(self.data(offset + i as u64), *byte);
        }
    }

    /// Puts bytes at an address of the rig's own memory.
    pub fn put_bytes(&self, at: u64, bytes: &[u8]) {
        bytes.iter().zip(at..).for_each(|(byte, at)| poke(at, *byte));
    }

    /// One byte of the buffers.
    pub fn byte(&self, offset: u64) -> u8 {
        peek(self.data(offset))
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        self.window.read(reg::STATUS)
    }

    /// Writes 0 to the status; false if the device does not take it.
    pub fn reset(&mut self) -> bool {
        self.window.write(reg::STATUS, 0);
        (self.seen, self.status_byte) = (0, None);
        self.offered.set(0);
        let end = clock::deadline(PATIENCE);
        while self.status() != 0 {
            if cpu::tsc() > end {
                return false;
            }
        }
        for word in 0..(QUEUES * RING) / 8 {
            poke(self.space.rings + word * 8, 0u64);
        }
        if self.target.kind == BALLOON {
            // What requests hold are numbers of pages that the device takes from us: only ever this one, unless a case says so.
            let page = (self.data(0x7_e000) >> 12) as u32;
            (0..DATA / 4).for_each(|word| poke(self.space.data + 4 * word, page));
        }
        true
    }

    /// Runs a case on a device that was reset.
    pub fn attempt(&mut self, run: fn(&mut Self) -> Outcome) -> Outcome {
        if self.reset() { run(self) } else { Outcome::Wrong("no-reset-before") }
    }

    /// A reset, a driver by the book, and one good request.
    pub fn recover(&mut self) -> Outcome {
        if !self.reset() {
            return Outcome::Wrong("no-reset-after");
        }
        self.start();
        self.good()
    }

    /// Features that cases use, of those that are offered.
    pub fn features(&self) -> u64 {
        self.window.features() & (VERSION_1 | INDIRECT_DESC | self.target.features)
    }

    /// Chooses features and sets FEATURES_OK; whether the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.window.write(reg::STATUS, 1);
        self.window.write(reg::STATUS, 3);
        for half in 0..2 {
            self.window.write(reg::DRIVER_FEATURES_SEL, half);
            self.window.write(reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.window.write(reg::STATUS, FEATURES_OK);
        self.status() & 8 != 0
    }

    /// As a driver would lay queue `queue` out.
    pub fn layout(&self, queue: u16) -> Layout {
        let base = self.space.rings + u64::from(queue) % QUEUES * RING;
        Layout { size: u32::from(SIZE), desc: base, driver: base + 0x4000, device: base + 0x5000, ready: 1 }
    }

    /// As a driver would lay the queue under attack out.
    pub fn own(&self) -> Layout {
        self.layout(self.target.queue)
    }

    /// Writes a queue's registers.
    pub fn set_queue(&self, queue: u16, layout: Layout) {
        self.window.write(reg::QUEUE_SEL, u32::from(queue));
        self.window.write(reg::QUEUE_NUM, layout.size);
        for (register, address) in [
            (reg::QUEUE_DESC, layout.desc),
            (reg::QUEUE_DRIVER, layout.driver),
            (reg::QUEUE_DEVICE, layout.device),
        ] {
            self.window.write(register, address as u32);
            self.window.write(register + 4, (address >> 32) as u32);
        }
        self.window.write(reg::QUEUE_READY, layout.ready);
    }

    /// Sets all queues up, that under attack as `change` makes it.
    pub fn queues(&self, change: impl FnOnce(&mut Layout)) {
        let mut own = self.own();
        change(&mut own);
        for queue in 0..self.target.queues {
            self.set_queue(queue, if queue == self.target.queue { own } else { self.layout(queue) });
        }
    }

    /// Writes DRIVER_OK.
    pub fn go(&self) {
        fence(Ordering::SeqCst);
        self.window.write(reg::STATUS, DRIVER_OK);
    }

    /// By the book, up to DRIVER_OK, with empty rings.
    pub fn start(&mut self) {
        self.negotiate(self.features());
        self.queues(|_| ());
        self.go();
    }

    /// Everything by the book but what `prepare` puts into the ring before DRIVER_OK; then `count` requests have to come back.
    pub fn ring(&mut self, features: u64, count: u16, prepare: impl FnOnce(&mut Self)) -> Outcome {
        if !self.negotiate(features) {
            return Outcome::Refused;
        }
        self.queues(|_| ());
        prepare(self);
        self.go();
        self.notify();
        self.settle(count)
    }

    /// As [`Rig::ring`], with one chain of `descriptors` from number 0 on.
    pub fn chain(&mut self, descriptors: &[Desc]) -> Outcome {
        self.ring(self.features(), 1, |rig| {
            rig.put(0, descriptors);
            rig.offer(0);
        })
    }

    /// As [`Rig::ring`], with one descriptor that points to a table.
    pub fn indirect(&mut self, bytes: u32, table: &[Desc]) -> Outcome {
        self.ring(self.features(), 1, |rig| {
            rig.put_table(table);
            rig.put(0, &[Desc(rig.table(), bytes, INDIRECT, 0)]);
            rig.offer(0);
        })
    }

    /// Writes descriptors of the queue's table as they are.
    pub fn put(&self, first: u16, descriptors: &[Desc]) {
        self.put_at(self.own().desc + 16 * u64::from(first), descriptors);
    }

    /// Writes the indirect table.
    pub fn put_table(&self, descriptors: &[Desc]) {
        self.put_at(self.table(), descriptors);
    }

    fn put_at(&self, at: u64, descriptors: &[Desc]) {
        for (i, Desc(address, length, flags, next)) in descriptors.iter().enumerate() {
            let at = at + 16 * i as u64;
            poke(at, *address);
            poke(at + 8, *length);
            poke(at + 12, *flags);
            poke(at + 14, *next);
        }
    }

    /// The driver's index.
    pub fn index(&self) -> u16 {
        peek(self.own().driver + 2)
    }

    /// Writes the driver's index.
    pub fn set_index(&self, index: u16) {
        fence(Ordering::SeqCst);
        poke(self.own().driver + 2, index);
        fence(Ordering::SeqCst);
    }

    /// Writes the driver's flags.
    pub fn set_flags(&self, flags: u16) {
        poke(self.own().driver, flags);
    }

    /// Writes the word behind the available entries: with EVENT_IDX, when to interrupt.
    pub fn set_used_event(&self, value: u16) {
        poke(self.own().driver + 4 + 2 * u64::from(SIZE), value);
    }

    /// Scribbles over the device's area.
    pub fn scribble(&self, value: u16) {
        for word in 0..u64::from(SIZE) * 4 + 3 {
            poke(self.own().device + 2 * word, value);
        }
        self.set_used_index(0);
    }

    /// Writes the device's index.
    pub fn set_used_index(&self, value: u16) {
        poke(self.own().device + 2, value);
    }

    /// Makes `head` available.
    pub fn offer(&self, head: u16) {
        let index = self.index();
        poke(self.own().driver + 4 + 2 * u64::from(index % SIZE), head);
        self.set_index(index.wrapping_add(1));
        self.offered.set(self.offered.get().wrapping_add(1));
    }

    /// Makes one buffer available on another queue, and rings that queue's doorbell. Does nothing while the device has many of
    /// them.
    pub fn send(&self, queue: u16, buffer: Desc) {
        let Layout { desc, driver, device, .. } = self.layout(queue);
        let index: u16 = peek(driver + 2);
        if index.wrapping_sub(peek(device + 2)) >= SIZE / 2 {
            return;
        }
        let head = index % SIZE;
        self.put_at(desc + 16 * u64::from(head), &[buffer]);
        poke(driver + 4 + 2 * u64::from(head), head);
        fence(Ordering::SeqCst);
        poke(driver + 2, index.wrapping_add(1));
        fence(Ordering::SeqCst);
        self.window.write(reg::QUEUE_NOTIFY, u32::from(queue));
    }

    /// Whether the driver's index is the number of requests that were made available: no case has made it something else.
    pub fn index_is_right(&self) -> bool {
        self.index() == self.offered.get()
    }

    /// Whether nobody has written descriptor `number` since the reset, or it is `desc` already.
    pub fn is_free(&self, number: u16, desc: Desc) -> bool {
        let at = self.own().desc + 16 * u64::from(number);
        let (address, length): (u64, u32) = (peek(at), peek(at + 8));
        (address, length) == (0, 0) || (address, length) == (desc.0, desc.1)
    }

    /// Rings the doorbell of the queue under attack.
    pub fn notify(&self) {
        self.prompt();
        self.window.write(reg::QUEUE_NOTIFY, u32::from(self.target.queue));
    }

    /// Entries that the device has used.
    pub fn used(&self) -> u16 {
        peek(self.own().device + 2)
    }

    /// Bytes written, by used entry `position`.
    pub fn used_bytes(&self, position: u16) -> u32 {
        peek(self.own().device + 8 + 8 * u64::from(position % SIZE))
    }

    /// Waits until `count` more requests have come back, or the device needs a reset.
    pub fn settle(&mut self, count: u16) -> Outcome {
        let (unanswered, end) = (clock::deadline(200_000), clock::deadline(PATIENCE));
        let goal = match self.target.prompt {
            // The last one stays with the device.
            Prompt::Another if self.index_is_right() => self.index().wrapping_sub(1),
            _ => self.seen.wrapping_add(count),
        };
        let mut again = clock::deadline(PROMPT);
        loop {
            if self.status() & DEVICE_NEEDS_RESET != 0 {
                return Outcome::NeedsReset;
            }
            let used = self.used();
            if used.wrapping_sub(self.seen) > SIZE {
                return Outcome::Wrong("more-used-than-offered");
            }
            if used.wrapping_sub(goal) <= SIZE {
                self.seen = used;
                fence(Ordering::SeqCst);
                return self.answer();
            }
            let now = cpu::tsc();
            if now > unanswered && !self.is_enabled() {
                return Outcome::Ignored;
            }
            if now > end {
                return Outcome::Stuck;
            }
            if now > again {
                self.remind();
                again = clock::deadline(PROMPT);
            }
            cpu::pause();
        }
    }

    /// Whether the device knows the queue under attack as ready.
    fn is_enabled(&self) -> bool {
        self.window.write(reg::QUEUE_SEL, u32::from(self.target.queue));
        self.window.read(reg::QUEUE_READY) != 0
    }

    /// What the last request that came back says.
    fn answer(&self) -> Outcome {
        let written = self.used_bytes(self.seen.wrapping_sub(1));
        match self.status_byte {
            Some(at) => match peek::<u8>(at) {
                0 => Outcome::Served,
                1 | 2 | 0xff => Outcome::Refused,
                // VIRTIO_MEM_RESP_ERROR.
                3 if self.target.kind == MEM => Outcome::Refused,
                _ => Outcome::Wrong("no-such-status"),
            },
            None if self.target.kind == BLK => Outcome::Refused,
            // Pages that are reported are not written to.
            None if self.target.kind == BALLOON => Outcome::Served,
            None if self.target.writable && written == 0 => Outcome::Refused,
            None => Outcome::Served,
        }
    }

    /// Where the status byte of the next block request is.
    pub fn expect_status(&mut self, offset: u64) -> u64 {
        let at = self.data(offset);
        poke(at, 0xffu8);
        self.status_byte = Some(at);
        at
    }

    /// A good request to a running device, from descriptor 0 on.
    pub fn good(&mut self) -> Outcome {
        self.put_good(0);
        self.offer(0);
        self.notify();
        self.settle(1)
    }
}
