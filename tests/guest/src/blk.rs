//! virtio-blk (virtio 1.2 §5.2): one request at a time, up to 128 KiB each.

use crate::memory;
use crate::virtio::{Piece, Problem, Queue, Window};

/// Device type.
pub const KIND: u32 = 2;
/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Sectors of the largest request.
pub const BATCH: usize = 256;

const F_READ_ONLY: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const TIMEOUT: u64 = 30_000_000;

/// Sectors of the disk in `window`; 0 is an empty slot. Allowed before it is driven.
pub fn capacity(window: Window) -> u64 {
    u64::from(window.config32(0)) | u64::from(window.config32(4)) << 32
}

/// Whether the disk in `window` refuses writes. Allowed before it is driven.
pub fn read_only(window: Window) -> bool {
    window.features() & F_READ_ONLY != 0
}

/// A disk that is driven.
pub struct Disk {
    window: Window,
    queue: Queue,
    features: u64,
    /// Header, status byte.
    control: &'static mut [u8],
    data: &'static mut [u8],
    /// Set when a request did not come back: its buffers are the device's for good.
    lost: bool,
}

impl Disk {
    /// Takes the device over.
    pub fn open(window: Window) -> Result<Self, Problem> {
        let features = window.negotiate(F_READ_ONLY | F_FLUSH)?;
        let queue = window.queue(0)?;
        queue.interrupts(false);
        let control = memory::pages(1).ok_or("out of memory")?;
        let data = memory::pages((BATCH * SECTOR) as u64 / memory::PAGE).ok_or("out of memory")?;
        window.start();
        Ok(Self { window, queue, features, control, data, lost: false })
    }

    /// Sectors now; changes when the slot gets another disk.
    pub fn capacity(&self) -> u64 {
        capacity(self.window)
    }

    /// Reads up to [`BATCH`] sectors.
    pub fn read(&mut self, sector: u64, count: usize) -> Result<&[u8], Problem> {
        let bytes = count.min(BATCH) * SECTOR;
        self.request(T_IN, sector, bytes)?;
        Ok(&self.data[..bytes])
    }

    /// Writes up to [`BATCH`] sectors that `fill` makes.
    pub fn write(&mut self, sector: u64, count: usize, fill: impl FnOnce(&mut [u8])) -> Result<(), Problem> {
        if self.features & F_READ_ONLY != 0 {
            return Err("it is read-only");
        }
        let bytes = count.min(BATCH) * SECTOR;
        fill(&mut self.data[..bytes]);
        self.request(T_OUT, sector, bytes)
    }

    /// Makes what was written durable; nothing to do for a device that writes through.
    pub fn flush(&mut self) -> Result<(), Problem> {
        if self.features & F_FLUSH == 0 {
            return Ok(());
        }
        self.request(T_FLUSH, 0, 0)
    }

    fn request(&mut self, kind: u32, sector: u64, bytes: usize) -> Result<(), Problem> {
        if self.lost {
            return Err("an earlier request never came back");
        }
        self.control[..4].copy_from_slice(&kind.to_le_bytes());
        self.control[4..8].fill(0);
        self.control[8..16].copy_from_slice(&sector.to_le_bytes());
        self.control[16] = 0xff;
        let address = self.control.as_mut_ptr() as u64;
        let header = Piece { address, length: 16, for_device: false };
        let status = Piece { address: address + 16, length: 1, for_device: true };
        if bytes == 0 {
            self.queue.offer(0, &[header, status]);
        } else {
            let data = Piece {
                address: self.data.as_mut_ptr() as u64,
                length: bytes as u32,
                for_device: kind == T_IN,
            };
            self.queue.offer(0, &[header, data, status]);
        }
        self.queue.notify();
        if !self.queue.wait(TIMEOUT) {
            self.lost = true;
            return Err("no answer in 30 seconds");
        }
        self.queue.take();
        // SAFETY: our page; volatile, because the device wrote it.
        match unsafe { self.control.as_ptr().add(16).read_volatile() } {
            0 => Ok(()),
            1 => Err("I/O error"),
            2 => Err("the device does not know this request"),
            _ => Err("the device gave no status"),
        }
    }
}
