//! virtio over PCI (virtio 1.2 §4.1), modern only: owns one function's configuration space and the mapping of its BAR onto `registers`.
//!
//! ```text
//! BAR 1, 32 bits   4 KiB    MSI-X table and pending bits
//! BAR 4, 64 bits   16 KiB   0x0000 common configuration (§4.1.4.3)    0x1000 ISR status (§4.1.4.5)
//!                           0x2000 device configuration (§4.1.4.6)    0x3000 notifications (§4.1.4.4), 4 bytes a queue
//! ```
//!
//! A driver without MSI-X hears of everything through the interrupt pin and the ISR status. The capability for access through configuration space
//! (§4.1.4.9) leads into the same two BARs.
//!
//! A device touches guest memory only while its driver lets it master the bus. A function-level reset (PCIe 5.0 §6.6.2) is one of the whole
//! function, its registers in configuration space included.
//!
//! Locks: `registers`, as in `mmio`; then `config`, which is held for the time of one copy; then those of the interrupts, which take neither
//! of the two.

mod common;
mod signals;
mod state;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::registers::{Link, Registers};
use super::status::{DEVICE_NEEDS_RESET, DRIVER, Effect};
use super::{Doorbell, Interrupt, VirtioDevice};
use crate::bus::BusDevice;
use crate::irq::{Level, Messages};
use crate::memory::GuestMemory;
use crate::pci::config::{
    BarKind, CAP_EXPRESS, CAP_VENDOR, COMMAND, COMMAND_INTX_DISABLE, ConfigSpace, Identity, touches,
};
use crate::pci::{Function, Intx, Mapping, Msix, TABLE_SIZE};
use signals::Signals;

const VENDOR: u16 = 0x1af4;
/// Device id of device type 0 (§4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// Not a transitional device.
const REVISION: u8 = 1;
const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);

const MSIX_BAR: u8 = 1;
const MODERN_BAR: u8 = 4;
const MODERN_SIZE: u64 = 0x4000;
/// Each part of the modern BAR has a page of its own.
const PART: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_MULTIPLIER: u32 = 4;

// cfg_type (§4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// Bytes of `struct virtio_pci_cap`.
const CAP_SIZE: u16 = 16;

/// In the PCI Express capability (PCIe 5.0 §7.5.3.4); of its upper byte, the bit that resets the function.
const DEVICE_CONTROL: u16 = 8;
const RESET: u8 = 0x80;

/// BAR 4 is mapped nowhere.
const UNMAPPED: u64 = u64::MAX;

/// Where a transport is connected.
pub struct Wires {
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// For notifications.
    pub doorbell: Arc<dyn Doorbell>,
    /// For MSI-X.
    pub messages: Arc<dyn Messages>,
    /// The interrupt pin.
    pub line: Arc<dyn Level>,
}

/// Where a function sits, as far as its own registers tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Behind a root port, and not on the root bus.
    pub behind_port: bool,
    /// The device has more functions.
    pub multifunction: bool,
}

/// What the device's vCPU side shares.
struct Shared {
    memory: Arc<GuestMemory>,
    doorbell: Arc<dyn Doorbell>,
    signals: Arc<Signals>,
    registers: Mutex<Registers>,
    /// Of BAR 4.
    base: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_link<T>(&self, action: impl FnOnce(&Link<'_>) -> T) -> T {
        let interrupt = Arc::clone(&self.signals) as Arc<dyn Interrupt>;
        let base = self.base.load(Ordering::Acquire);
        let bell = |queue: u16| {
            let offset = NOTIFY + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER);
            (base != UNMAPPED).then(|| base.saturating_add(offset))
        };
        action(&Link { memory: &self.memory, doorbell: &*self.doorbell, interrupt, bell: &bell })
    }

    fn write_status(&self, value: u8) {
        let mut registers = self.lock();
        if self.with_link(|link| registers.write_status(value, link)) == Effect::Reset {
            self.signals.reset();
        }
    }

    fn reset(&self) {
        let mut registers = self.lock();
        registers.reset(&*self.doorbell);
        self.with_link(|link| registers.set_master(false, false, link));
        self.signals.reset();
    }

    fn status(&self) -> u8 {
        self.lock().status.bits() | if self.signals.is_broken() { DEVICE_NEEDS_RESET } else { 0 }
    }

    /// `offset` counts in units of the multiplier; what is written there does not matter (§4.1.4.4: without NOTIFICATION_DATA, the number).
    fn notify(&self, offset: u64) {
        let Ok(queue) = u32::try_from(offset / u64::from(NOTIFY_MULTIPLIER)) else { return };
        let fd = self.with_link(|link| self.lock().notified(queue, link));
        if let Some(fd) = fd {
            // Fails only when the counter is full; the device has more than enough notifications then.
            let _ = fd.write(1);
        }
    }
}

/// BAR 4.
impl BusDevice for Shared {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % PART;
        match offset - within {
            COMMON => common::read(self, within, data),
            ISR if within == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.signals.take_isr();
                }
            }
            DEVICE => self.lock().device.read_config(within, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let within = offset % PART;
        match offset - within {
            COMMON => common::write(self, within, data),
            DEVICE => {
                let mut registers = self.lock();
                if registers.status.has(DRIVER) {
                    registers.device.write_config(within, data);
                }
            }
            NOTIFY => self.notify(within),
            _ => {}
        }
    }
}

/// Where the capabilities lie.
#[derive(Default, Clone, Copy)]
struct Capabilities {
    msix: u16,
    pci: u16,
    express: u16,
}

/// One virtio device as a PCI function.
pub struct PciTransport {
    shared: Arc<Shared>,
    msix: Arc<Msix>,
    config: Mutex<ConfigSpace>,
    at: Capabilities,
}

impl PciTransport {
    /// A function at reset. Makes no descriptor and no thread: those come with DRIVER_OK.
    pub fn new(device: Box<dyn VirtioDevice>, place: Place, wires: Wires) -> Arc<Self> {
        let Wires { memory, doorbell, messages, line } = wires;
        let queues = device.queue_sizes().len() as u16;
        // One for each queue, and one for the configuration.
        let msix = Msix::new(queues.saturating_add(1), messages);
        let (config, at) = describe(device.device_type(), place, &msix);
        let signals = Arc::new(Signals::new(Arc::clone(&msix), Intx::new(line), queues));
        let registers = Mutex::new(Registers::new(device, true));
        let shared = Shared { memory, doorbell, signals, registers, base: AtomicU64::new(UNMAPPED) };
        Arc::new(Self { shared: Arc::new(shared), msix, config: Mutex::new(config), at })
    }

    /// The machine goes down, or the device leaves it: it stops, and what the guest has written is made durable. Waits with a deadline.
    pub fn shut_down(&self) -> io::Result<()> {
        let mut registers = self.shared.lock();
        let result = registers.shut_down(&*self.shared.doorbell);
        self.shared.signals.reset();
        result
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an access to the window in configuration space means: BAR, offset, length. None for what a driver must not do (§4.1.4.9.1).
    fn window(&self) -> Option<(u8, u64, usize)> {
        let config = self.config();
        let at = self.at.pci;
        let (bar, offset, length) = (config.u8(at + 4), config.u32(at + 8), config.u32(at + 12));
        let size = match bar {
            MSIX_BAR => TABLE_SIZE,
            MODERN_BAR => MODERN_SIZE,
            _ => return None,
        };
        let fits = u64::from(offset) + u64::from(length) <= size;
        (matches!(length, 1 | 2 | 4) && offset % length == 0 && fits).then_some((
            bar,
            offset.into(),
            length as usize,
        ))
    }

    fn bar(&self, bar: u8) -> Arc<dyn BusDevice> {
        if bar == MSIX_BAR { Arc::clone(&self.msix) as _ } else { Arc::clone(&self.shared) as _ }
    }
}

/// What a write of `data` at `offset` puts into the byte at `at`.
fn written(offset: u16, data: &[u8], at: u16) -> Option<u8> {
    data.get(usize::from(at.checked_sub(offset)?)).copied()
}

/// Class, subclass and interface of a device type.
fn class(device_type: u32) -> u32 {
    match device_type {
        1 => 0x02_00_00,       // network
        2 => 0x01_00_00,       // mass storage: SCSI, as QEMU has it
        3 => 0x07_80_00,       // communication, other
        24 | 27 => 0x05_80_00, // memory, other
        19 => 0x02_80_00,      // network, other: sockets
        _ => 0x00_ff_00,       // unclassified, other
    }
}

/// One `struct virtio_pci_cap` without its first two bytes.
fn capability(kind: u8, bar: u8, offset: u64, length: u64, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![CAP_SIZE as u8 + extra.len() as u8, kind, bar, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(extra);
    body
}

fn describe(device_type: u32, place: Place, msix: &Msix) -> (ConfigSpace, Capabilities) {
    let identity = Identity {
        vendor: VENDOR,
        // Types are small numbers (§5).
        device: DEVICE_BASE + device_type as u16,
        revision: REVISION,
        class: class(device_type),
        subsystem: SUBSYSTEM,
        multifunction: place.multifunction,
    };
    let mut config = ConfigSpace::endpoint(&identity)
        .with_bar(MSIX_BAR, TABLE_SIZE, BarKind::Memory32)
        .with_bar(MODERN_BAR, MODERN_SIZE, BarKind::Memory64)
        .with_pin(1);
    let msix = msix.add_capability(&mut config, MSIX_BAR).unwrap_or_default();
    let mut at = Capabilities { msix, ..Capabilities::default() };
    for (kind, offset, length) in
        [(CFG_COMMON, COMMON, common::SIZE), (CFG_ISR, ISR, 1), (CFG_DEVICE, DEVICE, PART)]
    {
        config.add_capability(CAP_VENDOR, &capability(kind, MODERN_BAR, offset, length, &[]), &[]);
    }
    let notify = capability(CFG_NOTIFY, MODERN_BAR, NOTIFY, PART, &NOTIFY_MULTIPLIER.to_le_bytes());
    config.add_capability(CAP_VENDOR, &notify, &[]);
    let window = capability(CFG_PCI, 0, 0, 0, &[0; 4]);
    // BAR, offset and length are the driver's.
    let writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    at.pci = config.add_capability(CAP_VENDOR, &window, &writable).unwrap_or_default();
    let writable = [0, 0, 0, 0, 0, 0, 0xff, 0x7f];
    at.express = config.add_capability(CAP_EXPRESS, &express(place), &writable).unwrap_or_default();
    (config, at)
}

/// The PCI Express capability (PCIe 5.0 §7.5.3), version 2: an endpoint, behind a port or integrated into the root complex, which has no link.
fn express(place: Place) -> Vec<u8> {
    let mut body = vec![0; 0x3a];
    let link: u8 = 1 | 1 << 4;
    let kind = if place.behind_port { 0 } else { 9 };
    body[0] = 2 | kind << 4;
    // Role-based error reporting; function-level reset.
    (body[3], body[5]) = (0x80, 0x10);
    if place.behind_port {
        // Capability, status, and speeds: 2.5 GT/s, x1.
        (body[0xa], body[0x10], body[0x2a]) = (link, link, 1 << 1);
    }
    body
}

impl Function for PciTransport {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut config = self.config();
        config.set_interrupt_status(self.shared.signals.pin_wanted());
        config.read(offset, data);
        drop(config);
        let window = self.at.pci + CAP_SIZE;
        if !touches(offset, data.len(), window, 4) {
            return;
        }
        let mut value = [0; 4];
        if let Some((bar, at, length)) = self.window()
            && let Some(bytes) = value.get_mut(..length)
        {
            self.bar(bar).read(at, bytes);
        }
        for (i, byte) in data.iter_mut().enumerate() {
            let within = (usize::from(offset) + i).checked_sub(window.into());
            if let Some(from) = within.and_then(|at| value.get(at)) {
                *byte = *from;
            }
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        if written(offset, data, self.at.express + DEVICE_CONTROL + 1).is_some_and(|byte| byte & RESET != 0) {
            self.reset();
            return true;
        }
        let mut config = self.config();
        config.write(offset, data);
        let is_command = touches(offset, data.len(), COMMAND, 2);
        if is_command || touches(offset, data.len(), self.at.msix + 2, 2) {
            self.shared.signals.allow_pin(config.u16(COMMAND) & COMMAND_INTX_DISABLE == 0);
            self.msix.set_control(config.u16(self.at.msix + 2), config.is_master());
            self.shared.signals.update();
        }
        drop(config);
        if is_command {
            let mut registers = self.shared.lock();
            let (master, broken) = (self.config().is_master(), self.shared.signals.is_broken());
            self.shared.with_link(|link| registers.set_master(master, broken, link));
        }
        // Accesses through the window are those of the length that the driver has announced, and start at its start.
        if offset == self.at.pci + CAP_SIZE
            && let Some((bar, at, length)) = self.window()
            && let Some(bytes) = data.get(..length)
        {
            self.bar(bar).write(at, bytes);
        }
        // The header up to the last BAR: command and BARs.
        offset < 0x28
    }

    fn mappings(&self) -> Vec<Mapping> {
        let config = self.config();
        let bars = config.bars();
        bars.map(|(bar, base, size)| Mapping { bar, base, size, device: self.bar(bar) }).collect()
    }

    fn mapped(&self, bar: u8, base: Option<u64>) {
        if bar == MODERN_BAR {
            let mut registers = self.shared.lock();
            self.shared.base.store(base.unwrap_or(UNMAPPED), Ordering::Release);
            self.shared.with_link(|link| registers.moved(link));
        }
    }

    fn reset(&self) {
        self.config().reset();
        self.shared.reset();
        self.msix.reset();
        self.shared.signals.allow_pin(true);
    }
}

#[cfg(test)]
mod tests;
