//! virtio over MMIO (virtio 1.2 §4.2, register layout version 2): owns the register file of one device.
//!
//! Guests reach a device through one of two windows that show the same registers: one announced on the kernel command line, one
//! described in ACPI. Once a kernel has asked ACPI for the device (`claim_acpi`), the command-line window shows
//! the placeholder DeviceID 0, which drivers skip without a word (§4.2.2.2): no kernel sees a device twice.
//!
//! Locks: `registers`, taken by vCPU threads and by the thread that owns the machine. It is held over `activate` and `reset` of the
//! device, so a device's threads must never wait for it: interrupts go through `Signals`, which has no lock. The interrupt registers,
//! the only ones that a running driver touches, are served without the lock too.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::registers::{Link, QueueSetup, Registers, set_high, set_low};
use super::status::{DEVICE_NEEDS_RESET, Effect};
use super::{Doorbell, Interrupt, VirtioDevice};
use crate::bus::BusDevice;
use crate::irq::Line;
use crate::memory::GuestMemory;

mod state;

/// Bytes that one window takes.
pub const WINDOW_SIZE: u64 = 0x200;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// No PCI vendor: as StratoVirt has it.
const VENDOR: u32 = 0;

mod reg {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    /// Length and base of a shared memory region, of which we have none: all ones (§4.2.2).
    pub(super) const SHM_FIRST: u64 = 0x0b0;
    pub(super) const SHM_LAST: u64 = 0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

const INT_QUEUE: u32 = 1;
const INT_CONFIG: u32 = 2;

/// What the device says to the driver; shared with the device's threads, without a lock.
struct Signals {
    line: Arc<dyn Line>,
    pending: AtomicU32,
    needs_reset: AtomicBool,
    generation: AtomicU32,
}

impl Signals {
    fn raise(&self, bit: u32) {
        self.pending.fetch_or(bit, Ordering::AcqRel);
        // Also when the bit was set already: the line is edge-triggered, and a driver may acknowledge after it has looked
        // at the rings instead of before; only a new edge then brings it back.
        self.line.trigger();
    }
}

impl Signals {
    /// After a reset of the device.
    fn clear(&self) {
        self.pending.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }
}

impl Interrupt for Signals {
    fn queue(&self, _: u16) {
        self.raise(INT_QUEUE);
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(INT_CONFIG);
    }

    fn needs_reset(&self) {
        // Devices run only while DRIVER_OK is set, so the driver always wants to know (§2.1.2). Once is enough.
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.config();
        }
    }
}

/// One virtio device behind MMIO registers.
pub struct MmioTransport {
    memory: Arc<GuestMemory>,
    doorbell: Arc<dyn Doorbell>,
    signals: Arc<Signals>,
    /// A kernel has found this device in ACPI.
    claimed: AtomicBool,
    registers: Mutex<Registers>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Announced {
    CommandLine,
    Acpi,
}

struct Window {
    transport: Arc<MmioTransport>,
    base: u64,
    announced: Announced,
}

impl MmioTransport {
    /// A transport at reset. Makes no descriptor and no thread: those come with DRIVER_OK.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        line: Arc<dyn Line>,
        doorbell: Arc<dyn Doorbell>,
    ) -> Arc<Self> {
        Arc::new(Self {
            memory,
            doorbell,
            signals: Arc::new(Signals {
                line,
                pending: AtomicU32::new(0),
                needs_reset: AtomicBool::new(false),
                generation: AtomicU32::new(0),
            }),
            claimed: AtomicBool::new(false),
            registers: Mutex::new(Registers::new(device, false)),
        })
    }

    /// The window, [`WINDOW_SIZE`] bytes at guest physical `base`, that the kernel command line announces.
    pub fn command_line_window(self: &Arc<Self>, base: u64) -> Arc<dyn BusDevice> {
        Arc::new(Window { transport: Arc::clone(self), base, announced: Announced::CommandLine })
    }

    /// The window, [`WINDOW_SIZE`] bytes at guest physical `base`, that ACPI describes.
    pub fn acpi_window(self: &Arc<Self>, base: u64) -> Arc<dyn BusDevice> {
        Arc::new(Window { transport: Arc::clone(self), base, announced: Announced::Acpi })
    }

    /// A kernel has found the device in ACPI: the command-line window becomes a placeholder until [`reset`](Self::reset).
    pub fn claim_acpi(&self) {
        self.claimed.store(true, Ordering::Release);
    }

    /// The machine is reset: the device stops, every register is as new, and both windows work again.
    pub fn reset(&self) {
        let mut registers = self.lock();
        registers.reset(&*self.doorbell);
        self.signals.clear();
        drop(registers);
        self.claimed.store(false, Ordering::Release);
    }

    /// The machine goes down: the device stops, and what the guest has written to it is made durable. Waits with a deadline.
    pub fn shut_down(&self) -> io::Result<()> {
        let mut registers = self.lock();
        let result = registers.shut_down(&*self.doorbell);
        self.signals.clear();
        result
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_link<T>(&self, base: u64, action: impl FnOnce(&Link<'_>) -> T) -> T {
        let interrupt = Arc::clone(&self.signals) as Arc<dyn Interrupt>;
        let bell = |_| Some(base + reg::QUEUE_NOTIFY);
        action(&Link { memory: &self.memory, doorbell: &*self.doorbell, interrupt, bell: &bell })
    }

    fn write_status(&self, value: u8, base: u64) {
        let mut registers = self.lock();
        if self.with_link(base, |link| registers.write_status(value, link)) == Effect::Reset {
            self.signals.clear();
        }
    }

    fn notify(&self, queue: u32, base: u64) {
        let fd = self.with_link(base, |link| self.lock().notified(queue, link));
        if let Some(fd) = fd {
            // Fails only when the counter is full; the device has more than enough notifications then.
            let _ = fd.write(1);
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::MAGIC => return MAGIC,
            reg::VERSION => return VERSION,
            reg::VENDOR_ID => return VENDOR,
            reg::INTERRUPT_STATUS => return self.signals.pending.load(Ordering::Acquire),
            reg::CONFIG_GENERATION => return self.signals.generation.load(Ordering::Acquire),
            reg::SHM_FIRST..=reg::SHM_LAST => return u32::MAX,
            _ => {}
        }
        let r = self.lock();
        match offset {
            reg::DEVICE_ID => r.device.device_type(),
            reg::DEVICE_FEATURES => r.device_features(),
            reg::QUEUE_SIZE_MAX => u32::from(r.queue_max()),
            reg::QUEUE_READY => r.queue().map_or(0, |q| u32::from(q.ready)),
            reg::STATUS => {
                let broken = self.signals.needs_reset.load(Ordering::Acquire);
                u32::from(r.status.bits() | if broken { DEVICE_NEEDS_RESET } else { 0 })
            }
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32, base: u64) {
        match offset {
            reg::QUEUE_NOTIFY => return self.notify(value, base),
            reg::INTERRUPT_ACK => {
                self.signals.pending.fetch_and(!value, Ordering::AcqRel);
                return;
            }
            // The field has 8 bits; a write with others set is not a status.
            reg::STATUS => return u8::try_from(value).map_or((), |v| self.write_status(v, base)),
            _ => {}
        }
        let mut guard = self.lock();
        let r = &mut *guard;
        match offset {
            reg::DEVICE_FEATURES_SEL => r.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => r.driver_features_sel = value,
            reg::DRIVER_FEATURES => r.set_driver_features(value),
            reg::QUEUE_SEL => r.queue_sel = value,
            _ => {
                if let Some(queue) = r.open_queue() {
                    write_queue(queue, offset, value);
                }
            }
        }
    }
}

fn write_queue(queue: &mut QueueSetup, offset: u64, value: u32) {
    let l = &mut queue.layout;
    match offset {
        // A size that does not fit is no size: activation refuses 0.
        reg::QUEUE_SIZE => l.size = u16::try_from(value).unwrap_or(0),
        reg::QUEUE_READY => queue.ready = value == 1,
        reg::QUEUE_DESC_LOW => set_low(&mut l.desc, value),
        reg::QUEUE_DESC_HIGH => set_high(&mut l.desc, value),
        reg::QUEUE_DRIVER_LOW => set_low(&mut l.driver, value),
        reg::QUEUE_DRIVER_HIGH => set_high(&mut l.driver, value),
        reg::QUEUE_DEVICE_LOW => set_low(&mut l.device, value),
        reg::QUEUE_DEVICE_HIGH => set_high(&mut l.device, value),
        _ => {}
    }
}

impl Window {
    fn is_placeholder(&self) -> bool {
        self.announced == Announced::CommandLine && self.transport.claimed.load(Ordering::Acquire)
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            if !self.is_placeholder() {
                self.transport.lock().device.read_config(offset, data);
            }
            return;
        }
        // §4.2.2.2: registers are 32 bits wide and aligned; anything else reads as zero.
        let Ok(word) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match offset {
            reg::MAGIC => MAGIC,
            reg::VERSION => VERSION,
            _ if !offset.is_multiple_of(4) || self.is_placeholder() => 0,
            _ => self.transport.read_register(offset),
        };
        *word = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.is_placeholder() {
            return;
        }
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            let mut registers = self.transport.lock();
            // §2.5: not before FEATURES_OK... but drivers do, and for us a write is only data.
            if registers.status.has(super::status::DRIVER) {
                registers.device.write_config(offset, data);
            }
            return;
        }
        if let Ok(word) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.transport.write_register(offset, u32::from_le_bytes(word), self.base);
        }
    }
}

#[cfg(test)]
mod tests;
