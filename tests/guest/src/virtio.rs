//! virtio over MMIO, version 2 registers (virtio 1.2 §4.2), with split queues (§2.7). Drivers wait through `irq`, they do not spin.
//!
//! A device on PCI (§4.1) is driven by the names of the same registers; [`Window`] finds each in the common configuration. With the word `pci` on the
//! command line only: to look for one takes hundreds of exits.

use core::sync::atomic::{Ordering, fence};

use crate::boot::BootInfo;
use crate::pci::{self, Parts};
use crate::{cpu, irq, memory, text};

/// VIRTIO_F_VERSION_1: without it a device of this register layout cannot be driven (§6.1).
pub const VERSION_1: u64 = 1 << 32;
/// Descriptors that we use of each queue at most; three areas of a queue of this size fit one page.
pub const QUEUE_SIZE: u16 = 64;

const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_FAILED: u32 = 128;

/// Register offsets, named as in virtio 1.2 §4.2.2.
pub mod reg {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG: u64 = 0x100;
}

/// One register window, as the command line announces it.
#[derive(Clone, Copy)]
pub struct Window {
    /// First byte.
    pub address: u64,
    /// Interrupt line.
    pub irq: u32,
    /// Of a device on PCI, whose common configuration is at the address.
    pub pci: Option<Parts>,
}

/// What is wrong with a device, in words.
pub type Problem = &'static str;

/// Windows from `virtio_mmio.device=SIZE@ADDRESS:IRQ[:ID]`, those that do not lie in the device window (3 to 4 GiB) left out, and what is on PCI.
pub fn windows(boot: &BootInfo) -> impl Iterator<Item = Window> {
    let on_pci = boot.flag("pci").then(pci::virtio).into_iter().flatten();
    let on_pci =
        on_pci.map(|parts| Window { address: parts.common, irq: parts.function.line(), pci: Some(parts) });
    let announced = boot.options("virtio_mmio.device").filter_map(|value| {
        let (address, rest) = value.split_once('@')?.1.split_once(':')?;
        let irq = rest.split(':').next()?;
        let window = Window { address: text::number(address)?, irq: text::number(irq)? as u32, pci: None };
        (3 << 30..(4 << 30) - 0x200).contains(&window.address).then_some(window)
    });
    announced.chain(on_pci)
}

// The common configuration (§4.1.4.3).
const PCI_STATUS: u64 = 0x14;
const PCI_QUEUE_SELECT: u64 = 0x16;
const PCI_QUEUE_SIZE: u64 = 0x18;
const PCI_QUEUE_ENABLE: u64 = 0x1c;
const PCI_QUEUE_NOTIFY_OFF: u64 = 0x1e;

/// Where a register of four bytes that both buses have is in the common configuration.
fn wide(register: u64) -> Option<u64> {
    Some(match register {
        reg::DEVICE_FEATURES_SEL => 0x00,
        reg::DEVICE_FEATURES => 0x04,
        reg::DRIVER_FEATURES_SEL => 0x08,
        reg::DRIVER_FEATURES => 0x0c,
        0x80 | 0x84 => register - reg::QUEUE_DESC + 0x20,
        0x90 | 0x94 => register - reg::QUEUE_DRIVER + 0x28,
        0xa0 | 0xa4 => register - reg::QUEUE_DEVICE + 0x30,
        _ => return None,
    })
}

/// A register of a device on PCI.
fn pci_read(parts: Parts, register: u64) -> u32 {
    // SAFETY: in the device window, as `Window::read`.
    unsafe {
        match register {
            reg::MAGIC => 0x7472_6976,
            reg::VERSION => 2,
            reg::DEVICE_ID => parts.kind,
            reg::STATUS => cpu::read8(parts.common + PCI_STATUS).into(),
            reg::QUEUE_NUM_MAX => cpu::read16(parts.common + PCI_QUEUE_SIZE).into(),
            reg::QUEUE_READY => cpu::read16(parts.common + PCI_QUEUE_ENABLE).into(),
            // Reading takes note, too.
            reg::INTERRUPT_STATUS => cpu::read8(parts.isr).into(),
            reg::CONFIG.. => cpu::read32(parts.device + register - reg::CONFIG),
            _ => wide(register).map_or(0, |at| cpu::read32(parts.common + at)),
        }
    }
}

fn pci_write(parts: Parts, register: u64, value: u32) {
    // SAFETY: as above.
    unsafe {
        match register {
            reg::STATUS => cpu::write8(parts.common + PCI_STATUS, value as u8),
            reg::QUEUE_SEL => cpu::write16(parts.common + PCI_QUEUE_SELECT, value as u16),
            reg::QUEUE_NUM => cpu::write16(parts.common + PCI_QUEUE_SIZE, value as u16),
            reg::QUEUE_READY => cpu::write16(parts.common + PCI_QUEUE_ENABLE, value as u16),
            reg::QUEUE_NOTIFY => {
                let selected = cpu::read16(parts.common + PCI_QUEUE_SELECT);
                cpu::write16(parts.common + PCI_QUEUE_SELECT, value as u16);
                let at = u64::from(cpu::read16(parts.common + PCI_QUEUE_NOTIFY_OFF)) * parts.step;
                cpu::write16(parts.common + PCI_QUEUE_SELECT, selected);
                cpu::write16(parts.notify + at, value as u16);
            }
            reg::CONFIG.. => cpu::write32(parts.device + register - reg::CONFIG, value),
            _ => {
                if let Some(at) = wide(register) {
                    cpu::write32(parts.common + at, value);
                }
            }
        }
    }
}

impl Window {
    /// Reads a register.
    pub fn read(self, register: u64) -> u32 {
        if let Some(parts) = self.pci {
            return pci_read(parts, register);
        }
        // SAFETY: in the device window, which `paging` maps; reads of these registers change nothing of ours.
        unsafe { cpu::read32(self.address + register) }
    }

    /// Writes a register.
    pub fn write(self, register: u64, value: u32) {
        if let Some(parts) = self.pci {
            return pci_write(parts, register, value);
        }
        // SAFETY: as above; the device only ever learns addresses of pages that drivers own.
        unsafe { cpu::write32(self.address + register, value) };
    }

    /// Device type (§5); 0 is an empty place, `None` no device of version 2 at all.
    pub fn kind(self) -> Option<u32> {
        (self.read(reg::MAGIC) == 0x7472_6976 && self.read(reg::VERSION) == 2)
            .then(|| self.read(reg::DEVICE_ID))
    }

    /// A 32-bit field of the configuration space.
    pub fn config32(self, offset: u64) -> u32 {
        self.read(reg::CONFIG + offset)
    }

    /// An 8-bit field of the configuration space.
    pub fn config8(self, offset: u64) -> u8 {
        let config = self.pci.map_or(self.address + reg::CONFIG, |parts| parts.device);
        // SAFETY: as in `read`.
        unsafe { cpu::read8(config + offset) }
    }

    /// The features that the device offers. Allowed before it is driven.
    pub fn features(self) -> u64 {
        let mut features = 0;
        for half in 0..2 {
            self.write(reg::DEVICE_FEATURES_SEL, half);
            features |= u64::from(self.read(reg::DEVICE_FEATURES)) << (32 * half);
        }
        features
    }

    /// Brings the device up to FEATURES_OK with those of `wanted` that it offers (§3.1.1), and returns these.
    pub fn negotiate(self, wanted: u64) -> Result<u64, Problem> {
        self.write(reg::STATUS, 0);
        if !irq::wait(1_000_000, || (), || self.read(reg::STATUS) == 0) {
            return Err("it does not reset");
        }
        self.write(reg::STATUS, STATUS_ACKNOWLEDGE);
        self.write(reg::STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        let features = self.features() & (wanted | VERSION_1);
        if features & VERSION_1 == 0 {
            self.write(reg::STATUS, STATUS_FAILED);
            return Err("it is a legacy device");
        }
        for half in 0..2 {
            self.write(reg::DRIVER_FEATURES_SEL, half);
            self.write(reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        self.write(reg::STATUS, status);
        if self.read(reg::STATUS) & STATUS_FEATURES_OK == 0 {
            return Err("it refuses our features");
        }
        Ok(features)
    }

    /// Sets up queue `index` (§4.2.3.2).
    pub fn queue(self, index: u16) -> Result<Queue, Problem> {
        self.write(reg::QUEUE_SEL, u32::from(index));
        if self.read(reg::QUEUE_READY) != 0 {
            return Err("a queue of it is in use");
        }
        let size = self.read(reg::QUEUE_NUM_MAX).min(u32::from(QUEUE_SIZE)) as u16;
        if size < 4 || !size.is_power_of_two() {
            return Err("it lacks a queue");
        }
        let page = memory::pages(1).ok_or("out of memory")?.as_mut_ptr();
        let queue = Queue { window: self, index, size, page, next: 0, seen: 0 };
        self.write(reg::QUEUE_NUM, u32::from(size));
        for (register, area) in
            [(reg::QUEUE_DESC, 0), (reg::QUEUE_DRIVER, Queue::AVAILABLE), (reg::QUEUE_DEVICE, Queue::USED)]
        {
            let address = page as u64 + area as u64;
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
        Ok(queue)
    }

    /// Sets DRIVER_OK, after the queues.
    pub fn start(self) {
        irq::open(self.irq);
        self.write(reg::STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    }

    /// Takes note of an interrupt, so that the device may send the next one where lines are level-triggered.
    pub fn acknowledge(self) {
        let status = self.read(reg::INTERRUPT_STATUS);
        if status != 0 {
            self.write(reg::INTERRUPT_ACK, status);
        }
    }
}

/// One buffer of a chain.
pub struct Piece {
    /// Its address.
    pub address: u64,
    /// Its bytes.
    pub length: u32,
    /// The device writes it.
    pub for_device: bool,
}

/// A split queue in one page of its own.
pub struct Queue {
    window: Window,
    index: u16,
    size: u16,
    page: *mut u8,
    next: u16,
    seen: u16,
}

impl Queue {
    const AVAILABLE: usize = QUEUE_SIZE as usize * 16;
    const USED: usize = 2048;
    const NO_INTERRUPT: u16 = 1;
    const NO_NOTIFY: u16 = 1;

    /// Descriptors in the table.
    pub fn size(&self) -> u16 {
        self.size
    }

    fn write<T>(&self, at: usize, value: T) {
        // SAFETY: all offsets used are in our page. Volatile: the device reads it.
        unsafe { self.page.add(at).cast::<T>().write_volatile(value) };
    }

    fn read<T: Copy>(&self, at: usize) -> T {
        // SAFETY: as in `write`; `T` is a plain number.
        unsafe { self.page.add(at).cast::<T>().read_volatile() }
    }

    /// Offers a chain whose descriptors are those from `first` on. The caller keeps chains that are on their way apart.
    pub fn offer(&mut self, first: u16, chain: &[Piece]) {
        for (i, piece) in chain.iter().enumerate() {
            let this = first + i as u16;
            let at = usize::from(this % self.size) * 16;
            let more = i + 1 < chain.len();
            self.write(at, piece.address);
            self.write(at + 8, piece.length);
            self.write(at + 12, u16::from(more) | u16::from(piece.for_device) << 1);
            self.write(at + 14, (this + 1) % self.size);
        }
        self.write(Self::AVAILABLE + 4 + 2 * usize::from(self.next % self.size), first);
        fence(Ordering::SeqCst);
        self.next = self.next.wrapping_add(1);
        self.write(Self::AVAILABLE + 2, self.next);
        fence(Ordering::SeqCst);
    }

    /// Rings the doorbell, unless the device is looking anyway.
    pub fn notify(&self) {
        if self.read::<u16>(Self::USED) & Self::NO_NOTIFY == 0 {
            self.window.write(reg::QUEUE_NOTIFY, u32::from(self.index));
        }
    }

    /// Whether the device has given a chain back.
    pub fn ready(&self) -> bool {
        self.read::<u16>(Self::USED + 2) != self.seen
    }

    /// The next chain given back: its first descriptor and the bytes written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if !self.ready() {
            return None;
        }
        fence(Ordering::SeqCst);
        let at = Self::USED + 4 + 8 * usize::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((self.read::<u32>(at) as u16, self.read::<u32>(at + 4)))
    }

    /// Asks for interrupts, or for none.
    pub fn interrupts(&self, on: bool) {
        self.write(Self::AVAILABLE, if on { 0 } else { Self::NO_INTERRUPT });
        fence(Ordering::SeqCst);
    }

    /// Waits for a chain to come back.
    pub fn wait(&mut self, microseconds: u64) -> bool {
        let mut armed = false;
        let done = irq::wait(
            microseconds,
            || {
                armed = true;
                self.interrupts(true);
            },
            || self.ready(),
        );
        if armed {
            self.interrupts(false);
            self.window.acknowledge();
        }
        done
    }
}
