//! A device of the host as a function on the guest's bus: owns what the guest has set it to, its BARs in the guest, and which interrupts it has.
//!
//! ```text
//! BAR, what can be mapped   a memory slot: the guest reaches the device without us
//! BAR, the rest             exits, and the device's file
//! MSI-X table, MSI, pin     ours; interrupts themselves go past us (`vectors`, `pin`)
//! ```
//!
//! States of the interrupts: off, pin, MSI, MSI-X; VFIO has one at a time, so each change goes by way of off. Lock order: state, then areas, then
//! vectors, then the device's file.

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::area::{Area, outside};
use super::host::{BARS, Container, HostDevice, VfioError};
use super::ioctl::{self, Irq, REGION_CONFIG};
use super::pin::Pin;
use super::vectors::{ENTRY, PENDING, Plant, Vectors, Wanted};
use super::view::{MsixPlace, SIZE, View};
use crate::bus::BusDevice;
use crate::config::HostAddress;
use crate::irq::{Message, Routes};
use crate::pci::{Function, Mapping};

const COMMAND: u64 = 4;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK: u16 = 1 << 14;

/// What the function is connected to.
pub struct Wires {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// Where messages go.
    pub routes: Arc<Routes>,
    /// GSI of the pin.
    pub gsi: u32,
}

struct State {
    view: View,
    /// While it is in use.
    pin: Option<Pin>,
    /// It cannot be had; it is tried again when the guest has wanted something else.
    pin_failed: bool,
    /// It has been taken away; nothing starts any more.
    ended: bool,
    /// The host's error has been logged; a guest can cause it without end.
    complained: bool,
}

/// The function.
pub struct HostFunction {
    host: Arc<HostDevice>,
    wires: Wires,
    has_msix: bool,
    vectors: Arc<Vectors>,
    bars: Vec<(u8, Arc<Bar>)>,
    areas: Mutex<Vec<Area>>,
    state: Mutex<State>,
    has_pin: bool,
}

impl HostFunction {
    /// Takes the device at this address, resets it, and lets it reach guest memory. `behind_port`: it comes into the slot of a root port.
    pub fn open(
        container: &Arc<Container>,
        address: &HostAddress,
        behind_port: bool,
        multifunction: bool,
        wires: Wires,
    ) -> Result<Arc<Self>, VfioError> {
        let host = Arc::new(container.device(address)?);
        host.reset();
        let mut registers = [0; SIZE];
        host.read(REGION_CONFIG, 0, &mut registers);
        let mut sizes = [0; BARS as usize];
        for (index, size) in (0..).zip(&mut sizes) {
            *size = host.region(index).map_or(0, |region| region.size);
        }
        let view = View::new(&registers, &sizes, behind_port, multifunction);
        let place = view.msix().filter(|place| host.irqs(Irq::Msix) >= place.vectors.into());
        let (vm, routes) = (Arc::clone(&wires.vm), Arc::clone(&wires.routes));
        let plant = Box::new(Lines { host: Arc::clone(&host), vm, routes });
        let vectors = Arc::new(Vectors::new(place.map_or(0, |place| place.vectors), plant));
        let mut areas = Vec::new();
        let mut bars = Vec::new();
        for (index, size) in view.bars() {
            let Some(region) = host.region(index.into()) else { continue };
            let mapped = region
                .areas
                .iter()
                .copied()
                .filter(|(at, len)| at.checked_add(*len).is_some_and(|end| end <= size));
            for (offset, len) in outside(mapped, &holes(index, place)) {
                let area = Area::new(&host, index, region.offset, offset, len, container, &wires.vm);
                areas.push(area.map_err(|source| VfioError::Host {
                    device: address.clone(),
                    what: "map a BAR",
                    source,
                })?);
            }
            let table = place.map(|place| (Arc::clone(&vectors), place));
            bars.push((index, Arc::new(Bar { index, host: Arc::clone(&host), table })));
        }
        let has_pin = host.irqs(Irq::Intx) > 0;
        let state = State { view, pin: None, pin_failed: false, ended: false, complained: false };
        let function = Self {
            host,
            wires,
            has_msix: place.is_some(),
            vectors,
            bars,
            areas: Mutex::new(areas),
            state: Mutex::new(state),
            has_pin,
        };
        function.settle(&mut function.lock());
        Ok(Arc::new(function))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn areas(&self) -> MutexGuard<'_, Vec<Area>> {
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its address on the host.
    pub fn address(&self) -> &HostAddress {
        self.host.address()
    }

    /// Takes it away from the guest, for good. When this returns the device is the host's again, whoever may still hold this.
    pub fn shut_down(&self) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.ended, true) {
            return;
        }
        self.rest(&mut state);
        self.areas().clear();
        self.host.close();
    }

    /// No interrupts, nothing mapped, no access to memory, and reset.
    fn rest(&self, state: &mut State) {
        (state.pin, state.pin_failed) = (None, false);
        self.vectors.reset();
        self.hide();
        self.host.write(REGION_CONFIG, COMMAND, &[0; 2]);
        self.host.reset();
        state.view.reset();
    }

    /// The guest's accesses come to us.
    fn hide(&self) {
        self.areas().iter_mut().for_each(|area| area.place(None));
    }

    /// Interrupts go the way that the registers say.
    fn settle(&self, state: &mut State) {
        let control = state.view.msix_control();
        let wanted = if state.ended {
            Wanted::Off
        } else if self.has_msix && control & MSIX_ENABLE != 0 {
            Wanted::Msix { masked: control & MSIX_MASK != 0 }
        } else if let Some((address, data, count)) = state.view.msi() {
            let count = u32::from(count).min(self.host.irqs(Irq::Msi)).max(1) as u16;
            Wanted::Msi { message: Message { address, data: data.into() }, count }
        } else {
            Wanted::Off
        };
        let pin = !state.ended && wanted == Wanted::Off && self.has_pin && state.view.uses_pin();
        if !pin {
            (state.pin, state.pin_failed) = (None, false);
        }
        self.vectors.set(wanted);
        if pin && state.pin.is_none() && !state.pin_failed {
            match Pin::connect(&self.host, &self.wires.vm, self.wires.gsi) {
                Ok(pin) => state.pin = Some(pin),
                Err(error) => {
                    state.pin_failed = true;
                    if !std::mem::replace(&mut state.complained, true) {
                        tracing::error!(device = %self.host.address(), "its pin cannot be had: {error}");
                    }
                }
            }
        }
    }
}

/// VFIO and KVM, for messages.
struct Lines {
    host: Arc<HostDevice>,
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
}

impl Plant for Lines {
    fn start(&self, irq: Irq, count: u32) -> io::Result<u32> {
        let room = self.host.with(|device| ioctl::start(device, irq, count))?;
        if room < count {
            tracing::warn!(device = %self.host.address(), "the host has room for {room} of its {count} interrupts");
        }
        Ok(room)
    }

    fn stop(&self, irq: Irq) -> io::Result<()> {
        self.host.with(|device| ioctl::disable(device, irq))
    }

    fn lead(&self, irq: Irq, vector: u32, event: &EventFd) -> io::Result<()> {
        self.host.with(|device| ioctl::lead(device, irq, vector, event.as_raw_fd()))
    }

    fn take_gsi(&self) -> Option<u32> {
        self.routes.take()
    }

    fn give_gsi(&self, gsi: u32) {
        self.routes.give(gsi);
    }

    fn route(&self, gsi: u32, message: Message) -> io::Result<()> {
        self.routes.set(gsi, message)
    }

    fn open(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.vm.register_irqfd(event, gsi)?)
    }

    fn close(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.vm.unregister_irqfd(event, gsi)?)
    }
}

impl Drop for HostFunction {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl Function for HostFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let state = self.lock();
        if state.view.needs_device(offset, data.len()) {
            self.host.read(REGION_CONFIG, offset.into(), data);
        }
        state.view.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        let mut state = self.lock();
        let decoded = !state.view.placed().is_empty();
        let changed = state.view.write(offset, data);
        if decoded && state.view.placed().is_empty() {
            // Before the device stops answering: an access that still came through would end the VM.
            self.hide();
        }
        if !state.ended {
            for (offset, data) in state.view.passed(offset, data) {
                self.host.write(REGION_CONFIG, offset.into(), &data);
            }
        }
        if changed.interrupts {
            self.settle(&mut state);
        }
        changed.bars
    }

    fn mappings(&self) -> Vec<Mapping> {
        let placed = self.lock().view.placed();
        let mapping = |(bar, base, size): (u8, u64, u64)| {
            let (_, device) = self.bars.iter().find(|(index, _)| *index == bar)?;
            Some(Mapping { bar, base, size, device: Arc::clone(device) as _ })
        };
        placed.into_iter().filter_map(mapping).collect()
    }

    fn mapped(&self, bar: u8, base: Option<u64>) {
        let state = self.lock();
        let base = base.filter(|_| !state.ended && !state.view.placed().is_empty());
        self.areas().iter_mut().filter(|area| area.bar == bar).for_each(|area| area.place(base));
    }

    fn reset(&self) {
        let mut state = self.lock();
        self.rest(&mut state);
        self.settle(&mut state);
    }
}

/// What of a BAR the guest does not reach by itself.
struct Bar {
    index: u8,
    host: Arc<HostDevice>,
    table: Option<(Arc<Vectors>, MsixPlace)>,
}

impl Bar {
    /// The table or the pending bits, if they are there.
    fn table(&self, offset: u64) -> Option<(&Vectors, u64)> {
        let (vectors, place) = self.table.as_ref()?;
        let within = |(bar, first): (u8, u64), size: u64| {
            offset.checked_sub(first).filter(|at| bar == self.index && *at < size)
        };
        let (table, pending) = sizes(place);
        let at = within(place.table, table).or_else(|| Some(PENDING + within(place.pending, pending)?))?;
        Some((vectors, at))
    }
}

impl BusDevice for Bar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.table(offset) {
            Some((vectors, at)) => vectors.read(at, data),
            None => self.host.read(self.index.into(), offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self.table(offset) {
            Some((vectors, at)) => vectors.write(at, data),
            None => self.host.write(self.index.into(), offset, data),
        }
    }
}

/// Bytes of the table, and of the pending bits.
fn sizes(place: &MsixPlace) -> (u64, u64) {
    let vectors = u64::from(place.vectors);
    (ENTRY * vectors, vectors.div_ceil(64) * 8)
}

/// What of BAR `index` must come to us.
fn holes(index: u8, place: Option<MsixPlace>) -> Vec<(u64, u64)> {
    let Some(place) = place else { return Vec::new() };
    let (table, pending) = sizes(&place);
    let all = [(place.table, table), (place.pending, pending)];
    all.into_iter().filter(|((bar, _), _)| *bar == index).map(|((_, offset), size)| (offset, size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_found_in_their_bars() {
        let place = MsixPlace { vectors: 5, table: (3, 0), pending: (3, 0x2000) };
        assert_eq!(holes(3, Some(place)), [(0, 80), (0x2000, 8)]);
        assert_eq!((holes(2, Some(place)), holes(3, None)), (vec![], vec![]));
    }
}
