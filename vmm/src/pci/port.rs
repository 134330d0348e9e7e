//! `pcie-root-port`, 1b36:000c: a bridge from the root bus to one slot. Owns the bridge's registers, the device in the slot, and the slot's
//! registers, whose rules are in `slot`.
//!
//! A device that leaves does so in two steps. On the guest's write it is taken off the bus, here, on the vCPU's thread; then
//! [`PortEvents`] gives it to the thread that owns the machine, which ends it (that may wait for the host's disk). One in a slot without power
//! is in its place and not on the bus.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::config::{
    BarKind, CAP_EXPRESS, COMMAND, COMMAND_INTX_DISABLE, ConfigSpace, Identity, bridge, touches,
};
use super::msix::{Msix, SavedVector, TABLE_SIZE};
use super::slot::{Effects, Input, Pending, Slot};
use super::{Function, Intx, Mapping};
use crate::irq::{Level, Messages};

/// The one vector.
const VECTOR: u16 = 0;
/// BAR with the table of MSI-X.
const MSIX_BAR: u8 = 0;

// Within the PCI Express capability (PCIe 5.0 §7.5.3).
const LINK_STATUS: u16 = 0x12;
const SLOT_CONTROL: u16 = 0x18;
const SLOT_STATUS: u16 = 0x1a;
const EXPRESS_SIZE: usize = 0x3c;

/// Speed 2.5 GT/s, width x1.
const LINK: u16 = 1 | 1 << 4;
const LINK_ACTIVE: u16 = 1 << 13;

/// What a port is made from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortOptions {
    /// The physical slot's number as the guest shows it.
    pub number: u8,
    /// The device has more functions than this.
    pub multifunction: bool,
    /// A device that is to leave also looks gone, so that the guest does not wait for a second press of the button.
    pub fast_unplug: bool,
}

/// What the port tells the machine.
pub trait PortEvents: Send + Sync {
    /// The guest has let the device in this port's slot go, or has never taken it; it is off the bus. Called on a vCPU's thread, or on the one
    /// that resets the machine or asks the device to leave. Must not block.
    fn left(&self, device: Arc<dyn Function>);
}

/// A port's registers, to be saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedPort {
    config: Vec<u8>,
    msix: Vec<SavedVector>,
    slot: Slot,
}

impl SavedPort {
    /// Whether there was a device in the slot.
    pub fn occupied(&self) -> bool {
        self.slot.occupied()
    }
}

struct State {
    config: ConfigSpace,
    slot: Slot,
    device: Option<Arc<dyn Function>>,
}

/// A root port.
pub struct RootPort {
    state: Mutex<State>,
    fast_unplug: bool,
    express: u16,
    msix: Arc<Msix>,
    msix_capability: u16,
    intx: Intx,
    events: Arc<dyn PortEvents>,
}

impl RootPort {
    /// A port with an empty slot.
    pub fn new(
        PortOptions { number, multifunction, fast_unplug }: PortOptions,
        messages: Arc<dyn Messages>,
        line: Arc<dyn Level>,
        events: Arc<dyn PortEvents>,
    ) -> Arc<Self> {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x000c,
            revision: 0,
            class: 0x06_04_00,
            subsystem: (0, 0),
            multifunction,
        };
        let mut config =
            ConfigSpace::bridge(&identity).with_bar(MSIX_BAR, TABLE_SIZE, BarKind::Memory32).with_pin(1);
        // A new space has room for both.
        let (body, writable) = express(number);
        let express = config.add_capability(CAP_EXPRESS, &body, &writable).unwrap_or_default();
        let msix = Msix::new(1, messages);
        let msix_capability = msix.add_capability(&mut config, MSIX_BAR).unwrap_or_default();
        let slot = Slot::new(false);
        let state = Mutex::new(State { config, slot, device: None });
        Arc::new(Self { state, fast_unplug, express, msix, msix_capability, intx: Intx::new(line), events })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a device there before the machine starts, or gives it back where the slot is occupied.
    pub fn insert_cold(&self, device: Arc<dyn Function>) -> Result<(), Arc<dyn Function>> {
        let mut state = self.lock();
        if state.device.is_some() {
            return Err(device);
        }
        state.device = Some(device);
        state.slot = Slot::new(true);
        Ok(())
    }

    /// Puts a device into the slot and tells the guest, or gives it back where the slot is occupied.
    pub fn plug(&self, device: Arc<dyn Function>) -> Result<(), Arc<dyn Function>> {
        let mut state = self.lock();
        if state.device.is_some() {
            return Err(device);
        }
        state.device = Some(device);
        self.step(state, Input::Plug);
        Ok(())
    }

    /// Asks the guest to let the device go. One that the guest has not taken yet goes at once.
    pub fn ask_removal(&self) -> Result<(), Pending> {
        let state = self.lock();
        if state.slot.pending() {
            return Err(Pending);
        }
        self.step(state, Input::AskRemoval { fast: self.fast_unplug });
        Ok(())
    }

    /// The registers.
    pub fn saved(&self) -> SavedPort {
        let state = self.lock();
        SavedPort { config: state.config.saved(), msix: self.msix.saved(), slot: state.slot }
    }

    /// Gives a port that nobody has driven what was saved of one with a device in its slot if this has one. `None`: it makes no sense.
    pub fn restore(&self, saved: &SavedPort) -> Option<()> {
        let mut state = self.lock();
        if !saved.slot.makes_sense() || saved.occupied() != state.device.is_some() {
            return None;
        }
        state.config.restore(&saved.config)?;
        self.msix.restore(&saved.msix)?;
        state.slot = saved.slot;
        self.msix.set_control(state.config.u16(self.msix_capability + 2), state.config.is_master());
        self.intx.allow(state.config.u16(COMMAND) & COMMAND_INTX_DISABLE == 0);
        self.intx.want(state.slot.interrupt() && !self.msix.enabled());
        Some(())
    }

    /// Applies an input and lets the lock go before anybody is told.
    fn step(&self, mut state: MutexGuard<'_, State>, input: Input) {
        let (slot, Effects { detach, cut, message }) = state.slot.step(input);
        state.slot = slot;
        let cut = cut.then(|| state.device.clone()).flatten();
        let device = if detach { state.device.take() } else { None };
        let uses_messages = self.msix.enabled();
        // Under the lock, so that the last level is the one that stays.
        self.intx.want(slot.interrupt() && !uses_messages);
        if message && uses_messages {
            self.msix.notify(VECTOR);
        }
        drop(state);
        if let Some(device) = cut {
            device.reset();
        }
        if let Some(device) = device {
            self.events.left(device);
        }
    }

    /// The device in the slot.
    pub fn device(&self) -> Option<Arc<dyn Function>> {
        self.lock().device.clone()
    }

    /// The device in the slot if that has power.
    pub(super) fn powered(&self) -> Option<Arc<dyn Function>> {
        let state = self.lock();
        state.device.clone().filter(|_| state.slot.powered())
    }

    /// The bus behind the port; 0 while the guest has not numbered it.
    pub(super) fn secondary(&self) -> u8 {
        self.lock().config.u8(bridge::SECONDARY)
    }

    /// Where the guest lets memory accesses through to the bus behind.
    pub(super) fn windows(&self) -> [Option<(u64, u64)>; 2] {
        self.lock().config.bridge_windows()
    }
}

/// Body of the PCI Express capability, and the bits of it that a driver may change.
fn express(number: u8) -> (Vec<u8>, Vec<u8>) {
    let mut body = vec![0; EXPRESS_SIZE - 2];
    let mut writable = body.clone();
    let put = |to: &mut Vec<u8>, at: usize, value: u32| {
        for (byte, value) in to.iter_mut().skip(at - 2).zip(value.to_le_bytes()) {
            *byte = value;
        }
    };
    // Capability version 2, root port, with a slot.
    put(&mut body, 0x02, 2 | 4 << 4 | 1 << 8);
    // Device: role-based error reporting.
    put(&mut body, 0x04, 1 << 15);
    put(&mut writable, 0x08, 0x7fff);
    // Link: 2.5 GT/s, x1, reports whether it is active.
    put(&mut body, 0x0c, u32::from(LINK) | 1 << 20 | u32::from(number) << 24);
    put(&mut writable, 0x10, 0x01db);
    // Slot: button, power controller, both indicators, surprise, hot-plug; 13 bits of slot number.
    put(&mut body, 0x14, 0x7b | u32::from(number) << 19);
    // Root control.
    put(&mut writable, 0x1c, 0x1f);
    // Link 2: the speeds that there are.
    put(&mut body, 0x2c, 1 << 1);
    put(&mut body, 0x30, 1);
    (body, writable)
}

impl Function for RootPort {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.lock();
        let (slot, express) = (state.slot, self.express);
        let link = LINK | if slot.link() { LINK_ACTIVE } else { 0 };
        state.config.set_u16(express + LINK_STATUS, link);
        state.config.set_u16(express + SLOT_CONTROL, slot.control());
        state.config.set_u16(express + SLOT_STATUS, slot.status());
        state.config.set_interrupt_status(self.intx.wanted());
        state.config.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        let mut state = self.lock();
        let was_held = state.config.u16(bridge::CONTROL) & bridge::CONTROL_RESET != 0;
        state.config.write(offset, data);
        let held = state.config.u16(bridge::CONTROL) & bridge::CONTROL_RESET != 0;
        let behind = (held && !was_held).then(|| state.device.clone()).flatten();
        if touches(offset, data.len(), COMMAND, 2) || touches(offset, data.len(), self.msix_capability + 2, 2)
        {
            self.intx.allow(state.config.u16(COMMAND) & COMMAND_INTX_DISABLE == 0);
            self.msix.set_control(state.config.u16(self.msix_capability + 2), state.config.is_master());
        }
        // A driver that writes one of the two with another width than its own means only the bytes that it writes.
        let merged = |at: u16, old: u16| {
            let mut bytes = old.to_le_bytes();
            for (i, byte) in bytes.iter_mut().enumerate() {
                let written = (usize::from(at) + i).checked_sub(offset.into()).and_then(|i| data.get(i));
                *byte = written.copied().unwrap_or(*byte);
            }
            u16::from_le_bytes(bytes)
        };
        let control = touches(offset, data.len(), self.express + SLOT_CONTROL, 2)
            .then(|| merged(self.express + SLOT_CONTROL, state.slot.control()));
        // Bytes that are not written clear nothing.
        let status = touches(offset, data.len(), self.express + SLOT_STATUS, 2)
            .then(|| merged(self.express + SLOT_STATUS, 0));
        drop(state);
        if let Some(device) = behind {
            device.reset();
        }
        // Status first: a driver that writes both at once means events from before its command.
        if let Some(value) = status {
            self.step(self.lock(), Input::Status(value));
        }
        if let Some(value) = control {
            self.step(self.lock(), Input::Control(value));
        }
        true
    }

    fn mappings(&self) -> Vec<Mapping> {
        let state = self.lock();
        let bars = state.config.bars();
        bars.map(|(bar, base, size)| Mapping { bar, base, size, device: Arc::clone(&self.msix) as _ })
            .collect()
    }

    fn mapped(&self, _: u8, _: Option<u64>) {}

    fn reset(&self) {
        let mut state = self.lock();
        state.config.reset();
        self.msix.reset();
        self.intx.allow(true);
        let device = state.device.clone();
        self.step(state, Input::Reset);
        // Also one that has just left.
        if let Some(device) = device {
            device.reset();
        }
    }
}
