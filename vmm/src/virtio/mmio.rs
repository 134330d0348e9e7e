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

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{Layout, Position, Queue};
use super::status::{DEVICE_NEEDS_RESET, Effect, Status};
use super::{
    ActivateError, Activation, ActiveQueue, Doorbell, F_VERSION_1, Interrupt, VirtioDevice, complain,
};
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

#[derive(Default, Clone, Copy)]
struct QueueRegisters {
    layout: Layout,
    ready: bool,
}

#[derive(Default)]
struct Running {
    /// By queue number; `None` where the driver has not enabled the queue.
    notify: Vec<Option<Arc<EventFd>>>,
    /// Where doorbells are attached, by queue number.
    bells: Vec<(u64, u16, Arc<EventFd>)>,
    /// Doorbells have been asked for: not a second time, also where that failed.
    has_bells: bool,
}

impl Running {
    /// Attaches a doorbell to every enabled queue.
    fn attach(&mut self, doorbell: &dyn Doorbell, base: u64) {
        self.has_bells = true;
        let addr = base + reg::QUEUE_NOTIFY;
        for (queue, fd) in (0u16..).zip(&self.notify) {
            let Some(fd) = fd else { continue };
            match doorbell.attach(addr, queue, fd) {
                Ok(()) => self.bells.push((addr, queue, Arc::clone(fd))),
                // Slower, but it works: the driver's writes come to `notify` below.
                Err(error) => tracing::warn!("no virtio doorbell at {addr:#x}/{queue}: {error}"),
            }
        }
    }
}

struct Registers {
    device: Box<dyn VirtioDevice>,
    status: Status,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    running: Option<Running>,
    /// The device has been stopped to be saved, or not been started after it was restored: where its queues stand.
    suspended: Option<Vec<(u16, Position)>>,
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
        let queues = vec![QueueRegisters::default(); device.queue_sizes().len()];
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
            registers: Mutex::new(Registers {
                device,
                status: Status::default(),
                device_features_sel: 0,
                driver_features_sel: 0,
                driver_features: 0,
                queue_sel: 0,
                queues,
                running: None,
                suspended: None,
            }),
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
        self.reset_registers(&mut self.lock());
        self.claimed.store(false, Ordering::Release);
    }

    /// The machine goes down: the device stops, and what the guest has written to it is made durable. Waits with a deadline.
    pub fn shut_down(&self) -> io::Result<()> {
        let mut registers = self.lock();
        self.reset_registers(&mut registers);
        registers.device.shut_down()
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset_registers(&self, r: &mut Registers) {
        if let Some(running) = r.running.take() {
            // First no new notification, then no more work.
            self.detach(&running);
            r.device.reset();
        }
        r.suspended = None;
        r.status = Status::default();
        r.device_features_sel = 0;
        r.driver_features_sel = 0;
        r.driver_features = 0;
        r.queue_sel = 0;
        r.queues.fill(QueueRegisters::default());
        self.signals.pending.store(0, Ordering::Release);
        self.signals.needs_reset.store(false, Ordering::Release);
    }

    fn detach(&self, running: &Running) {
        for (addr, queue, fd) in &running.bells {
            if let Err(error) = self.doorbell.detach(*addr, *queue, fd) {
                tracing::warn!("virtio doorbell {addr:#x}/{queue} stays: {error}");
            }
        }
    }

    /// Builds the queues, which begin at zero or where `positions` say, and starts the device. Returns what notifies it; what did so
    /// `before`, if it ran, does so again.
    fn start(
        &self,
        r: &mut Registers,
        before: &Running,
        positions: &[(u16, Position)],
    ) -> Result<Vec<Option<Arc<EventFd>>>, ActivateError> {
        let features = r.driver_features;
        let (mut queues, mut notifies) = (Vec::new(), Vec::new());
        let sizes = r.device.queue_sizes();
        for (index, (registers, max)) in (0u16..).zip(r.queues.iter().zip(sizes)) {
            if !registers.ready {
                notifies.push(None);
                continue;
            }
            let mut queue = Queue::new(&self.memory, registers.layout, *max, features)
                .map_err(|e| ActivateError::BadQueue(index, e))?;
            if let Some((_, position)) = positions.iter().find(|(i, _)| *i == index) {
                queue.go_on_at(*position);
            }
            let notify = match before.notify.get(usize::from(index)) {
                Some(Some(notify)) => Arc::clone(notify),
                _ => Arc::new(EventFd::new(EFD_NONBLOCK).map_err(ActivateError::Host)?),
            };
            notifies.push(Some(Arc::clone(&notify)));
            queues.push(ActiveQueue { index, queue, notify });
        }
        let interrupt = Arc::clone(&self.signals) as Arc<dyn Interrupt>;
        let memory = Arc::clone(&self.memory);
        r.device.activate(Activation { memory, features, queues, interrupt })?;
        Ok(notifies)
    }

    fn activate(&self, r: &mut Registers, base: u64) -> Result<(), ActivateError> {
        let mut running = Running { notify: self.start(r, &Running::default(), &[])?, ..Running::default() };
        if r.device.wants_doorbell() {
            running.attach(&*self.doorbell, base);
        }
        r.running = Some(running);
        Ok(())
    }

    fn write_status(&self, value: u8, base: u64) {
        let mut guard = self.lock();
        let r = &mut *guard;
        let offered = r.device.features();
        let fine = r.driver_features & !offered == 0 && r.driver_features & F_VERSION_1 != 0;
        let (next, effect) = r.status.write(value, fine);
        r.status = next;
        match effect {
            Effect::None => {}
            Effect::Reset => self.reset_registers(r),
            Effect::Activate => {
                if let Err(error) = self.activate(r, base) {
                    complain(|| tracing::warn!("virtio device {}: {error}", r.device.device_type()));
                    self.signals.needs_reset();
                }
            }
        }
    }

    fn notify(&self, queue: u32, base: u64) {
        let mut guard = self.lock();
        let r = &mut *guard;
        let Some(running) = &mut r.running else { return };
        // A slot that was empty at DRIVER_OK has been filled since.
        if !running.has_bells && r.device.wants_doorbell() {
            running.attach(&*self.doorbell, base);
        }
        let fd = usize::try_from(queue).ok().and_then(|q| running.notify.get(q)?.clone());
        drop(guard);
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
        let queue = usize::try_from(r.queue_sel).ok();
        match offset {
            reg::DEVICE_ID => r.device.device_type(),
            reg::DEVICE_FEATURES => match r.device_features_sel {
                0 => r.device.features() as u32,
                1 => (r.device.features() >> 32) as u32,
                _ => 0,
            },
            reg::QUEUE_SIZE_MAX => {
                queue.and_then(|q| r.device.queue_sizes().get(q)).map_or(0, |max| u32::from(*max))
            }
            reg::QUEUE_READY => queue.and_then(|q| r.queues.get(q)).map_or(0, |q| u32::from(q.ready)),
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
            reg::DRIVER_FEATURES if r.status.features_open() => match r.driver_features_sel {
                0 => set_low(&mut r.driver_features, value),
                1 => set_high(&mut r.driver_features, value),
                // Bits 64 and up: we offer none. A driver that sets one anyway must not get FEATURES_OK.
                _ if value != 0 => r.driver_features &= !F_VERSION_1,
                _ => {}
            },
            reg::QUEUE_SEL => r.queue_sel = value,
            _ if r.status.queues_open() => {
                if let Some(queue) = usize::try_from(r.queue_sel).ok().and_then(|q| r.queues.get_mut(q)) {
                    queue.write(offset, value);
                }
            }
            _ => {}
        }
    }
}

impl QueueRegisters {
    fn write(&mut self, offset: u64, value: u32) {
        let l = &mut self.layout;
        match offset {
            // A size that does not fit is no size: activation refuses 0.
            reg::QUEUE_SIZE => l.size = u16::try_from(value).unwrap_or(0),
            reg::QUEUE_READY => self.ready = value == 1,
            reg::QUEUE_DESC_LOW => set_low(&mut l.desc, value),
            reg::QUEUE_DESC_HIGH => set_high(&mut l.desc, value),
            reg::QUEUE_DRIVER_LOW => set_low(&mut l.driver, value),
            reg::QUEUE_DRIVER_HIGH => set_high(&mut l.driver, value),
            reg::QUEUE_DEVICE_LOW => set_low(&mut l.device, value),
            reg::QUEUE_DEVICE_HIGH => set_high(&mut l.device, value),
            _ => {}
        }
    }
}

fn set_low(to: &mut u64, value: u32) {
    *to = *to & !0xffff_ffff | u64::from(value);
}

fn set_high(to: &mut u64, value: u32) {
    *to = *to & 0xffff_ffff | u64::from(value) << 32;
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
