//! What a snapshot holds of a q35 besides what every board has: the power management registers, what the root ports are set to, and where
//! each device is.
//!
//! Devices are told apart by their place, so it does not matter in which order they have come: one that was plugged is given on the command
//! line of the VM that is restored, in the slot of the same root port.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use super::Q35;
use super::bus::{Body, HOST_DEVICE, Seat, Slot};
use super::cpus::HotCpus;
use super::firmware::{Firmware, SavedFirmware};
use crate::config::PciAddr;
use crate::device::{PmRegisters, Rtc, SavedPm, SavedRtc};
use crate::machine::MachineError;
use crate::machine::snapshot::{Identity, Parts, Section, Source, Stand, json};
use crate::pci::{HostBridge, Root, SavedPort};
use crate::virtio::state::StateError;

/// Section names.
const CHIPSET: &str = "q35";
const PORT: &str = "root-port";
/// Added to the instance of a device behind the port there.
const BEHIND: u32 = 0x100;

#[derive(Serialize, Deserialize)]
struct Chipset {
    pm: SavedPm,
    /// What port 0xcf8 holds.
    selected: u32,
    /// Not in what the first versions saved: they had none of these.
    #[serde(default)]
    bridge: Option<Vec<u8>>,
    #[serde(default)]
    rtc: Option<SavedRtc>,
    #[serde(default)]
    firmware: Option<SavedFirmware>,
}

fn number(addr: PciAddr) -> u32 {
    u32::from(addr.slot) << 3 | u32::from(addr.function)
}

/// Identity with the places of all devices.
pub(super) fn identify(base: &Identity, flash: &[String], slots: &[Slot], seats: &[Seat]) -> Identity {
    let port = |slot: &Slot| (number(slot.addr), "pcie-root-port");
    let mut places: Vec<_> =
        slots.iter().map(port).chain(seats.iter().map(|s| (instance(s), s.driver))).collect();
    places.sort_unstable();
    let text = |(place, driver): (u32, &str)| {
        let (slot, function) = (place >> 3 & 0x1f, place & 7);
        let behind = if place & BEHIND != 0 { "behind " } else { "" };
        format!("{driver} {behind}{slot:#x}.{function}")
    };
    let devices = flash.iter().cloned().chain(places.into_iter().map(text));
    base.with_devices(seats.len(), devices.collect())
}

fn instance(seat: &Seat) -> u32 {
    number(seat.addr) | if seat.port.is_some() { BEHIND } else { 0 }
}

/// The devices by place.
pub(super) fn stands(seats: &[Seat]) -> Vec<Stand> {
    let stand = |seat: &Seat| {
        // A device of the host is in no snapshot.
        let Body::Virtio(transport) = &seat.body else { return None };
        Some(Stand {
            name: format!("device \"{}\"", seat.id),
            instance: instance(seat),
            transport: Arc::clone(transport) as _,
        })
    };
    seats.iter().filter_map(stand).collect()
}

/// What has registers besides the devices.
pub(super) struct Board<'a> {
    pub(super) root: &'a Root,
    pub(super) bridge: &'a HostBridge,
    pub(super) pm: &'a PmRegisters,
    pub(super) rtc: &'a Arc<Rtc>,
    pub(super) firmware: Option<&'a Firmware>,
    pub(super) layout: &'a [String],
}

impl Board<'_> {
    fn take(&self, saved: &Chipset) -> Option<()> {
        if let Some(bridge) = &saved.bridge {
            self.bridge.restore(bridge)?;
        }
        if let Some(rtc) = &saved.rtc {
            self.rtc.restore(rtc)?;
        }
        match (self.firmware, &saved.firmware) {
            (Some(firmware), Some(saved)) => firmware.restore(saved),
            // The layouts agree, so this was never written.
            (Some(_), None) | (None, Some(_)) => None,
            (None, None) => Some(()),
        }
    }
}

/// Gives a new board and its devices their state; BARs are mapped afterwards.
pub(super) fn restore(
    mut source: Source,
    identity: &Identity,
    (slots, seats): (&[Slot], &[Seat]),
    chipset: &Board<'_>,
) -> Result<(), MachineError> {
    let here = identify(identity, chipset.layout, slots, seats);
    source.check_devices(&here)?;
    let saved: Chipset = source.take(CHIPSET, 0)?;
    let root = chipset.root;
    root.select(saved.selected);
    chipset.pm.restore(&saved.pm);
    chipset.take(&saved).ok_or_else(|| source.nonsense(CHIPSET, 0))?;
    for slot in slots {
        let instance = number(slot.addr);
        let saved: SavedPort = source.take(PORT, instance)?;
        slot.port.restore(&saved).ok_or_else(|| source.nonsense(PORT, instance))?;
    }
    source.apply_devices(&here, &stands(seats))?;
    root.sync();
    Ok(())
}

impl Q35 {
    /// What a snapshot holds of it.
    pub(in crate::machine) fn parts(&self) -> Result<Parts<'_>, MachineError> {
        for seat in self.seats.iter().filter(|seat| seat.port.is_some()) {
            let slot = self.slots.iter().find(|slot| Some(&slot.id) == seat.port.as_ref());
            if slot.is_none_or(|slot| slot.port.device().is_none()) {
                let device = format!("device \"{}\"", seat.id);
                return Err(MachineError::State { device, source: StateError::Leaving });
            }
        }
        if let Some(seat) = self.seats.iter().find(|seat| matches!(seat.body, Body::Host(_))) {
            let source = StateError::Excluded(HOST_DEVICE);
            return Err(MachineError::State { device: format!("device \"{}\"", seat.id), source });
        }
        if let Some(id) = self.hot_cpus.iter().flat_map(HotCpus::ids).next() {
            let source = StateError::Excluded("a vCPU that was plugged");
            return Err(MachineError::State { device: format!("device \"{id}\""), source });
        }
        let chipset = Chipset {
            pm: self.pm.saved(),
            selected: self.root.selected(),
            bridge: Some(self.bridge.saved()),
            rtc: Some(self.rtc.saved()),
            firmware: self.start.firmware().map(Firmware::saved),
        };
        let mut own: Vec<Section> = vec![(CHIPSET, 0, json(&chipset)?)];
        for slot in &self.slots {
            own.push((PORT, number(slot.addr), json(&slot.port.saved())?));
        }
        Ok(Parts {
            identity: identify(&self.identity, &self.layout, &self.slots, &self.seats),
            excluded: self.excluded.as_ref(),
            occupants: Vec::new(),
            devices: self.stands(),
            vcpus: &self.vcpus,
            vm: &self.vm,
            memory: &self.memory,
            serial: self.serial.as_deref(),
            own,
        })
    }
}
