//! Drivers that only count: they keep a device as busy as it can be, and poll. They measure the VMM, so they copy nothing, take no
//! interrupt, and ring the doorbell only when the device asks for it (virtio 1.2 §2.7.10).
//!
//! Their rings and buffers lie at the start of the arena, and each run takes the device over for itself.

use core::sync::atomic::{Ordering, fence};

use crate::boot::BootInfo;
use crate::virtio::{Problem, Window, reg};
use crate::{blk, clock, cpu, memory};

/// VIRTIO_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_BLK_F_FLUSH: without it a device may have to make each write durable (§5.2.6.2).
const FLUSH: u64 = 1 << 9;
/// Longest queue that is used.
const SIZE: u16 = 256;
/// Table, driver area and device area, one page each.
const RING: u64 = 3 * memory::PAGE;
/// No answer for so long, in microseconds, is none.
const PATIENCE: u64 = 5_000_000;
/// What a processor fetches at once.
const LINE: u64 = 64;
const NEXT: u16 = 1;
const FOR_DEVICE: u16 = 2;

/// What a run did, after its first fifth, which only warms up.
pub struct Done {
    /// Requests or frames.
    pub count: u64,
    /// In so many microseconds.
    pub microseconds: u64,
    /// Doorbells rung for them.
    pub bells: u64,
    /// Requests or frames from the very start to the very end.
    pub total: u64,
}

/// What a disk is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Reads anywhere.
    Read,
    /// Writes anywhere.
    Write,
    /// Reads from the start on, round and round.
    Scan,
}

fn poke<T>(address: u64, value: T) {
    // SAFETY: callers pass addresses in the arena, which nothing else uses, and aligned. Volatile: the device looks at it.
    unsafe { (address as *mut T).write_volatile(value) };
}

fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: as in `poke`; `T` is a plain number.
    unsafe { (address as *const T).read_volatile() }
}

/// The start of the arena, if it has this many bytes in one piece; zero.
fn space(boot: &BootInfo, bytes: u64) -> Result<u64, Problem> {
    let region = memory::arena(boot).find(|r| r.size >= bytes).ok_or("not enough memory")?;
    for at in (region.start..region.start + bytes).step_by(8) {
        poke(at, 0u64);
    }
    Ok(region.start)
}

/// A queue whose used ring is polled.
struct Ring {
    window: Window,
    index: u16,
    size: u16,
    event_idx: bool,
    base: u64,
    next: u16,
    /// What the device knows of `next`.
    shown: u16,
    seen: u16,
    bells: u64,
}

impl Ring {
    fn new(window: Window, index: u16, features: u64, base: u64) -> Result<Self, Problem> {
        window.write(reg::QUEUE_SEL, u32::from(index));
        let size = window.read(reg::QUEUE_NUM_MAX).min(u32::from(SIZE)) as u16;
        if size < 4 || !size.is_power_of_two() {
            return Err("it lacks a queue");
        }
        let event_idx = features & EVENT_IDX != 0;
        let ring = Self { window, index, size, event_idx, base, next: 0, shown: 0, seen: 0, bells: 0 };
        window.write(reg::QUEUE_NUM, u32::from(size));
        for (register, address) in [
            (reg::QUEUE_DESC, base),
            (reg::QUEUE_DRIVER, ring.driver(0)),
            (reg::QUEUE_DEVICE, ring.device(0)),
        ] {
            window.write(register, address as u32);
            window.write(register + 4, (address >> 32) as u32);
        }
        // No interrupts; with EVENT_IDX the flag means nothing, and `took` keeps the event out of reach.
        poke(ring.driver(0), 1u16);
        ring.took();
        window.write(reg::QUEUE_READY, 1);
        Ok(ring)
    }

    fn driver(&self, at: u64) -> u64 {
        self.base + memory::PAGE + at
    }

    fn device(&self, at: u64) -> u64 {
        self.base + 2 * memory::PAGE + at
    }

    fn describe(&self, descriptor: u16, address: u64, length: u32, flags: u16) {
        let at = self.base + 16 * u64::from(descriptor);
        poke(at, address);
        poke(at + 8, length);
        poke(at + 12, flags);
        poke(at + 14, descriptor + 1);
    }

    /// The device sees it after [`show`](Self::show).
    fn offer(&mut self, head: u16) {
        poke(self.driver(4 + 2 * u64::from(self.next % self.size)), head);
        self.next = self.next.wrapping_add(1);
    }

    /// Shows the device what was offered, and rings its bell if it wants that.
    fn show(&mut self) {
        if self.next == self.shown {
            return;
        }
        fence(Ordering::Release);
        poke(self.driver(2), self.next);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = peek(self.device(4 + 8 * u64::from(self.size)));
            self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(self.shown)
        } else {
            peek::<u16>(self.device(0)) & 1 == 0
        };
        self.shown = self.next;
        if wanted {
            self.bells += 1;
            self.window.write(reg::QUEUE_NOTIFY, u32::from(self.index));
        }
    }

    /// The next head that came back, and the bytes written to it.
    fn take(&mut self) -> Option<(u16, u32)> {
        if peek::<u16>(self.device(2)) == self.seen {
            return None;
        }
        fence(Ordering::Acquire);
        let at = self.device(4 + 8 * u64::from(self.seen % self.size));
        self.seen = self.seen.wrapping_add(1);
        Some((peek::<u32>(at) as u16, peek(at + 4)))
    }

    /// Once some were taken, before more are shown: the event goes half the way round, where the device does not get before the next call.
    fn took(&self) {
        poke(self.driver(4 + 2 * u64::from(self.size)), self.seen.wrapping_add(1 << 15));
    }
}

/// When to warm up, to measure, and to give up.
struct Watch {
    start: u64,
    measured_from: u64,
    end: u64,
    patience: u64,
    alive: u64,
    before: [u64; 2],
}

impl Watch {
    fn new(milliseconds: u64) -> Self {
        let now = cpu::tsc();
        let end = clock::deadline(milliseconds.saturating_mul(1000));
        let patience = clock::deadline(PATIENCE) - now;
        Self { start: now, measured_from: 0, end, patience, alive: now + patience, before: [0; 2] }
    }

    /// Whether to go on, when `total` are done; `idle`: none just now.
    fn on(&mut self, total: u64, bells: u64, idle: bool) -> Result<bool, Problem> {
        let now = cpu::tsc();
        if idle && now > self.alive {
            return Err("no answer in 5 seconds");
        }
        if !idle {
            self.alive = now + self.patience;
        }
        if self.measured_from == 0 && now - self.start > (self.end - self.start) / 5 {
            (self.measured_from, self.before) = (now, [total, bells]);
        }
        Ok(now < self.end)
    }

    fn done(&self, total: u64, bells: u64) -> Done {
        let ticks = cpu::tsc() - self.measured_from;
        Done {
            count: total - self.before[0],
            microseconds: clock::to_microseconds(ticks),
            bells: bells - self.before[1],
            total,
        }
    }
}

/// Keeps `depth` requests of `kib` KiB each on their way to the disk in `window`.
pub fn disk(
    boot: &BootInfo,
    window: Window,
    pattern: Pattern,
    [depth, kib, milliseconds]: [u64; 3],
) -> Result<Done, Problem> {
    let bytes = kib.clamp(1, 1024) * 1024;
    let features = window.negotiate(EVENT_IDX | FLUSH)?;
    let sectors = blk::capacity(window);
    let (places, step) = (sectors * 512 / bytes, bytes / 512);
    if places == 0 {
        return Err("the disk is too small");
    }
    let depth = depth.clamp(1, 64);
    let base = space(boot, RING + memory::PAGE + depth * bytes)?;
    let mut ring = Ring::new(window, 0, features, base)?;
    let depth = depth.min(u64::from(ring.size / 3));
    let (requests, data) = (base + RING, base + RING + memory::PAGE);
    // As drivers of real systems have them: each request's header and status lie together, and apart from those of others.
    let header = |i: u64| requests + LINE * i;
    let status = |i: u64| header(i) + 16;
    let writes = pattern == Pattern::Write;
    for i in 0..depth {
        let first = 3 * i as u16;
        poke(header(i), u32::from(writes));
        ring.describe(first, header(i), 16, NEXT);
        ring.describe(first + 1, data + bytes * i, bytes as u32, NEXT | if writes { 0 } else { FOR_DEVICE });
        ring.describe(first + 2, status(i), 1, FOR_DEVICE);
    }
    window.start();
    let (mut random, mut position) = (0x9e37_79b9_7f4a_7c15u64, 0);
    let mut ask = |ring: &mut Ring, i: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        position = if pattern == Pattern::Scan { (position + 1) % places } else { random % places };
        poke(header(i) + 8, position * step);
        poke(status(i), 0xffu8);
        ring.offer(3 * i as u16);
    };
    (0..depth).for_each(|i| ask(&mut ring, i));
    let (mut watch, mut total) = (Watch::new(milliseconds), 0);
    loop {
        ring.show();
        let before = total;
        while let Some((head, _)) = ring.take() {
            let i = u64::from(head / 3) % depth;
            if peek::<u8>(status(i)) != 0 {
                return Err("a request failed");
            }
            total += 1;
            ask(&mut ring, i);
        }
        if total != before {
            ring.took();
        }
        if !watch.on(total, ring.bells, total == before)? {
            break;
        }
    }
    let done = watch.done(total, ring.bells);
    // What is still on its way would come back to a ring that the next run uses.
    window.write(reg::STATUS, 0);
    Ok(done)
}

/// virtio_net_hdr of version 1.
const HEADER: u64 = 12;
/// An EtherType for local experiments (IEEE 802), by which frames of a run are known.
const EXPERIMENT: u16 = 0x88b5;
const BUFFER: u64 = 2048;

/// Sends frames of `length` bytes on the card in `window`.
pub fn transmit(boot: &BootInfo, window: Window, [length, milliseconds]: [u64; 2]) -> Result<Done, Problem> {
    let length = length.clamp(60, 1514);
    let (mut ring, buffers) = card(boot, window, 1)?;
    for i in 0..ring.size {
        let at = buffers + BUFFER * u64::from(i);
        for (offset, byte) in [(0, 2u8), (5, 1), (6, 2), (11, 2)] {
            poke(at + HEADER + offset, byte);
        }
        poke(at + HEADER + 12, EXPERIMENT.to_be());
        ring.describe(i, at, (HEADER + length) as u32, 0);
        ring.offer(i);
    }
    let (mut watch, mut total) = (Watch::new(milliseconds), 0);
    loop {
        ring.show();
        let before = total;
        while let Some((head, _)) = ring.take() {
            total += 1;
            ring.offer(head);
        }
        if total != before {
            ring.took();
        }
        if !watch.on(total, ring.bells, total == before)? {
            break;
        }
    }
    let done = watch.done(total, ring.bells);
    // Those on their way are sent all the same, and counted by the host: wait for them.
    let end = clock::deadline(PATIENCE);
    while ring.seen != ring.shown && cpu::tsc() < end {
        total += u64::from(ring.take().is_some());
    }
    window.write(reg::STATUS, 0);
    Ok(Done { total, ..done })
}

/// Takes frames from the card in `window`; the time runs from the first one. Those of other kinds do not count.
pub fn receive(boot: &BootInfo, window: Window, milliseconds: u64) -> Result<Done, Problem> {
    let (mut ring, buffers) = card(boot, window, 0)?;
    for i in 0..ring.size {
        ring.describe(i, buffers + BUFFER * u64::from(i), BUFFER as u32, FOR_DEVICE);
        ring.offer(i);
    }
    ring.show();
    let end = clock::deadline(2 * PATIENCE);
    while peek::<u16>(ring.device(2)) == 0 {
        if cpu::tsc() > end {
            return Err("no frame in 10 seconds");
        }
    }
    let (mut watch, mut total) = (Watch::new(milliseconds), 0);
    loop {
        let before = total;
        while let Some((head, length)) = ring.take() {
            let kind: u16 = peek(buffers + BUFFER * u64::from(head % ring.size) + HEADER + 12);
            total += u64::from(kind == EXPERIMENT.to_be() && u64::from(length) > HEADER + 14);
            ring.offer(head);
        }
        ring.took();
        ring.show();
        if !watch.on(total, ring.bells, total == before)? {
            break;
        }
    }
    let done = watch.done(total, ring.bells);
    window.write(reg::STATUS, 0);
    Ok(done)
}

/// Takes a card over. Its queue `index`, and room for a buffer for each entry.
fn card(boot: &BootInfo, window: Window, index: u16) -> Result<(Ring, u64), Problem> {
    let features = window.negotiate(EVENT_IDX)?;
    let base = space(boot, 2 * RING + BUFFER * u64::from(SIZE))?;
    // Some devices want both queues; the other one stays empty.
    let _other = Ring::new(window, 1 - index, features, base)?;
    let ring = Ring::new(window, index, features, base + RING)?;
    window.start();
    Ok((ring, base + 2 * RING))
}
