//! Saving a machine and building one from what was saved: owns which sections there are, and in which order the parts of a machine come to
//! a stand and go on.
//!
//! ```text
//! save:     (vCPUs are out of the guest) · devices suspended · controllers, clock, vCPUs, devices · memory · devices go on
//! restore:  memory mapped, vCPUs and devices made as for any VM · serial port · controllers · clock · vCPUs · the board's own registers,
//!           and those of devices
//!           ... the machine is started: devices go on · vCPUs
//! ```
//!
//! Devices go on last, because they write to memory and interrupt. They are started from a vCPU's thread, so that their I/O threads are
//! born with the sandbox of one.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Board, Machine, MachineError};
use crate::config::{Incoming, Smp, VmConfig};
use crate::cpu::x86_64::state::{self, Part, VcpuState};
use crate::cpu::{CpuError, Vcpu, Vcpus};
use crate::device::{SavedSerial, SerialDevice};
use crate::inherit::Inherited;
use crate::irq::saved;
use crate::memory::{self, GuestMemory};
use crate::snapshot::{Draft, Format, Opened, Pages, SnapshotError, StateWriter, Target};
use crate::virtio::state::{StateError, Suspend, TransportState};

/// Of every section that this version writes.
const VERSION: u16 = 1;

/// Section names.
const MACHINE: &str = "machine";
const CLOCK: &str = "clock";
const SERIAL: &str = "serial";
const SLOT: &str = "slot";

/// What must be the same in the VM that is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    machine: String,
    arch: String,
    topology: SavedSmp,
    memory: u64,
    serial: bool,
    slots: usize,
    /// Where each device is and what it is, of a board on which that is not always the same.
    #[serde(default)]
    layout: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedSmp {
    cpus: u8,
    max_cpus: u8,
    sockets: u8,
    dies: u8,
    clusters: u8,
    cores: u8,
    threads: u8,
}

#[derive(Serialize, Deserialize)]
struct SavedMachine {
    identity: Identity,
    /// Pages of guest memory that are not zero, and their checksum.
    pages: u64,
    checksum: u32,
    /// The device in each replaceable slot.
    #[serde(default)]
    occupants: Vec<Option<String>>,
}

impl Identity {
    pub(super) fn new(config: &VmConfig, has_serial: bool) -> Self {
        let Smp { cpus, max_cpus, sockets, dies, clusters, cores, threads } = config.smp.clone();
        Self {
            machine: config.machine.kind.to_string(),
            arch: std::env::consts::ARCH.into(),
            topology: SavedSmp { cpus, max_cpus, sockets, dies, clusters, cores, threads },
            memory: config.memory.size,
            serial: has_serial,
            slots: 0,
            layout: Vec::new(),
        }
    }

    /// The same with so many devices, in these places.
    pub(super) fn with_devices(&self, slots: usize, layout: Vec<String>) -> Self {
        Self { slots, layout, ..self.clone() }
    }

    /// Compares what can be known before anything is built; `self` is what was saved.
    fn check(&self, config: &VmConfig) -> Result<(), MachineError> {
        let here = Self::new(config, config.serial.is_some());
        differs("-machine", &self.machine, &here.machine)?;
        differs("the architecture", &self.arch, &here.arch)?;
        differs("-smp cpus", &self.topology.cpus, &here.topology.cpus)?;
        differs("the topology of -smp", &self.topology, &here.topology)?;
        differs("-m", &self.memory, &here.memory)?;
        differs("-serial", &self.serial, &here.serial)
    }
}

fn differs<T: PartialEq + std::fmt::Debug>(
    field: &'static str,
    saved: &T,
    here: &T,
) -> Result<(), MachineError> {
    if saved == here {
        return Ok(());
    }
    Err(MachineError::Mismatch { field, saved: format!("{saved:?}"), here: format!("{here:?}") })
}

/// A snapshot that a machine is being built from.
pub(super) struct Source {
    opened: Opened,
    pages: Pages,
    identity: Identity,
    occupants: Vec<Option<String>>,
    mapped: bool,
    /// This is another VM than the one that was saved.
    fresh: bool,
}

impl Source {
    /// Opens the snapshot, and refuses one of another machine.
    pub(super) fn open(
        incoming: &Incoming,
        config: &VmConfig,
        inherited: &Inherited,
    ) -> Result<Self, MachineError> {
        let mut opened = Opened::open(&incoming.dir, inherited)?;
        let saved: SavedMachine = take_json(&mut opened, MACHINE, 0)?;
        saved.identity.check(config)?;
        let pages = Pages { size: config.memory.size, count: saved.pages, checksum: saved.checksum };
        if incoming.verify {
            opened.verify(&pages)?;
        }
        let SavedMachine { identity, occupants, .. } = saved;
        Ok(Self { opened, pages, identity, occupants, mapped: incoming.mapped, fresh: incoming.fresh })
    }

    /// The device that was in each replaceable slot.
    pub(super) fn occupants(&self) -> &[Option<String>] {
        &self.occupants
    }

    /// Guest memory, as it was saved.
    pub(super) fn memory(&self, config: &VmConfig) -> Result<GuestMemory, MachineError> {
        if self.mapped {
            let file = self.opened.memory(&self.pages)?;
            return Ok(memory::restore(&config.memory, &config.machine, file)?);
        }
        let memory = memory::build(&config.memory, &config.machine)?;
        self.opened.read_into(&memory, &self.pages)?;
        Ok(memory)
    }

    /// Gives what every board has its state: first of all, before anything can interrupt.
    pub(super) fn apply_core(
        &mut self,
        vm: &VmFd,
        vcpus: &[Vcpu],
        serial: Option<&SerialDevice>,
    ) -> Result<(), MachineError> {
        if let Some(serial) = serial {
            let saved: SavedSerial = self.take(SERIAL, 0)?;
            if !serial.restore(&saved) {
                return Err(self.nonsense(SERIAL, 0));
            }
        }
        for name in saved::PARTS {
            saved::write_controller(vm, name, &self.need(name, 0)?)?;
        }
        state::write_clock(vm, &self.need(CLOCK, 0)?)?;
        for (vcpu, instance) in vcpus.iter().zip(0..) {
            let state = VcpuState::from_parts(|name| self.need(name, instance))?;
            if instance == 0 {
                state.check_features(vcpu.fd())?;
            }
            state.write(vcpu.fd())?;
        }
        Ok(())
    }

    /// Gives the devices their state, which stand still until [`wake`]; then nothing must be left.
    pub(super) fn apply_devices(mut self, here: &Identity, devices: &[Stand]) -> Result<(), MachineError> {
        self.check_devices(here)?;
        for Stand { name, instance, transport } in devices {
            let mut saved: TransportState = self.take(SLOT, *instance)?;
            let result = if self.fresh {
                transport.save().and_then(|here| {
                    saved.device.take_identity(&here.device);
                    transport.restore(&saved)
                })
            } else {
                transport.restore(&saved)
            };
            result.map_err(|source| MachineError::State { device: name.clone(), source })?;
        }
        let sections = std::mem::take(&mut self.opened.sections);
        sections.finish().map_err(|format| self.opened.damaged(format))?;
        Ok(())
    }

    /// Refuses another set of devices.
    pub(super) fn check_devices(&self, here: &Identity) -> Result<(), MachineError> {
        differs("the set of devices", &self.identity.layout, &here.layout)?;
        differs("the number of devices", &self.identity.slots, &here.slots)
    }

    /// Takes one of the board's own sections.
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        instance: u32,
    ) -> Result<T, MachineError> {
        take_json(&mut self.opened, name, instance)
    }

    fn need(&mut self, name: &'static str, instance: u32) -> Result<Vec<u8>, MachineError> {
        need(&mut self.opened, name, instance)
    }

    /// A section that no VM has written.
    pub(super) fn nonsense(&self, name: &str, instance: u32) -> MachineError {
        let format = Format::Malformed(format!("section {name}.{instance} makes no sense"));
        self.opened.damaged(format).into()
    }
}

fn need(opened: &mut Opened, name: &'static str, instance: u32) -> Result<Vec<u8>, MachineError> {
    let section = opened.sections.need(name, instance, VERSION);
    Ok(section.map_err(|format| opened.damaged(format))?.bytes)
}

fn take_json<T: DeserializeOwned>(
    opened: &mut Opened,
    name: &'static str,
    instance: u32,
) -> Result<T, MachineError> {
    let bytes = need(opened, name, instance)?;
    serde_json::from_slice(&bytes).map_err(|e| {
        let format = Format::Malformed(format!("section {name}.{instance} makes no sense: {e}"));
        opened.damaged(format).into()
    })
}

/// A device as a snapshot sees it.
pub(super) struct Stand {
    /// For errors.
    pub(super) name: String,
    /// Of its section: the same in the VM that is restored.
    pub(super) instance: u32,
    pub(super) transport: Arc<dyn Suspend>,
}

impl Stand {
    fn error(&self, source: StateError) -> MachineError {
        MachineError::State { device: self.name.clone(), source }
    }
}

/// A section of a board's own.
pub(super) type Section = (&'static str, u32, Vec<u8>);

/// What a board has, as far as it is saved.
pub(super) struct Parts<'a> {
    pub(super) identity: Identity,
    /// What it has that no snapshot can hold.
    pub(super) excluded: Option<&'a String>,
    /// The device in each replaceable slot.
    pub(super) occupants: Vec<Option<String>>,
    pub(super) devices: Vec<Stand>,
    pub(super) vcpus: &'a Vcpus,
    pub(super) vm: &'a VmFd,
    pub(super) memory: &'a GuestMemory,
    pub(super) serial: Option<&'a SerialDevice>,
    /// The vCPUs do not run, so nothing changes it.
    pub(super) own: Vec<Section>,
}

impl Machine {
    /// Saves the machine, which must be paused, and leaves it as it was. After an error what was in a directory before is still there.
    pub fn save(&mut self, target: &Target) -> Result<(), MachineError> {
        let parts = match &self.board {
            Board::Microvm(board) => board.parts(),
            Board::Q35(board) => board.parts()?,
            Board::None => return Err(MachineError::Excluded("-machine none".into())),
        };
        parts.check_exclusions()?;
        // Before the devices stand still: what is most likely to fail.
        let draft = Draft::create(target)?;
        let result = parts.suspend().and_then(|()| parts.write(&draft));
        let resumed = go_on(&parts.devices);
        draft.finish(result?)?;
        resumed
    }
}

/// The machine is paused: has the devices that other processes serve stand still.
pub(super) fn hold(devices: &[Stand]) -> Result<(), MachineError> {
    devices.iter().try_for_each(|stand| stand.transport.hold().map_err(|source| stand.error(source)))
}

/// Lets all devices go on; the first failure is returned, the others are logged.
pub(super) fn go_on(devices: &[Stand]) -> Result<(), MachineError> {
    let mut result = Ok(());
    for stand in devices {
        if let Err(source) = stand.transport.resume() {
            let error = stand.error(source);
            tracing::error!("{error}");
            result = result.and(Err(error));
        }
    }
    result
}

/// After the vCPUs' threads have started and before they run: the devices of a restored machine go on.
pub(super) fn wake(vcpus: &Vcpus, devices: Vec<Stand>) -> Result<(), MachineError> {
    let failure = Arc::new(Mutex::new(None));
    let (devices, told) = (Arc::new(devices), Arc::clone(&failure));
    vcpus.each(move |vcpu| {
        if vcpu.index() == 0
            && let Err(error) = go_on(&devices)
        {
            *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
        Ok(())
    })?;
    let failure = failure.lock().unwrap_or_else(PoisonError::into_inner).take();
    failure.map_or(Ok(()), Err)
}

impl Parts<'_> {
    fn check_exclusions(&self) -> Result<(), MachineError> {
        if let Some(what) = self.excluded {
            return Err(MachineError::Excluded(what.clone()));
        }
        // What has been plugged since.
        for stand in &self.devices {
            stand.transport.save().map_err(|source| stand.error(source))?;
        }
        Ok(())
    }

    fn suspend(&self) -> Result<(), MachineError> {
        for stand in &self.devices {
            stand.transport.suspend().map_err(|source| stand.error(source))?;
        }
        Ok(())
    }

    /// Reads the whole state of the machine, whose vCPUs and devices stand still, and writes its memory.
    fn write(&self, draft: &Draft) -> Result<StateWriter, MachineError> {
        let pages = draft.write_memory(self.memory)?;
        let mut writer = StateWriter::default();
        let mut add = |name: &'static str, instance: u32, bytes: &[u8]| {
            let result = writer.add(name, instance, VERSION, bytes);
            result.map_err(|format| SnapshotError::Damaged { path: draft.target().join("state"), format })
        };
        let machine = SavedMachine {
            identity: self.identity.clone(),
            pages: pages.count,
            checksum: pages.checksum,
            occupants: self.occupants.clone(),
        };
        add(MACHINE, 0, &json(&machine)?)?;
        if let Some(serial) = self.serial {
            add(SERIAL, 0, &json(&serial.saved())?)?;
        }
        for (name, bytes) in saved::read_controllers(self.vm)? {
            add(name, 0, &bytes)?;
        }
        add(CLOCK, 0, &state::read_clock(self.vm)?)?;
        for (instance, parts) in (0..).zip(self.vcpu_states()?) {
            for (name, bytes) in parts {
                add(name, instance, &bytes)?;
            }
        }
        for (name, instance, bytes) in &self.own {
            add(name, *instance, bytes)?;
        }
        for stand in &self.devices {
            let state = stand.transport.save().map_err(|source| stand.error(source))?;
            add(SLOT, stand.instance, &json(&state)?)?;
        }
        Ok(writer)
    }

    /// By vCPU. Each is read on its own thread.
    fn vcpu_states(&self) -> Result<Vec<Vec<Part>>, MachineError> {
        let states = Arc::new(Mutex::new(vec![Vec::new(); usize::from(self.identity.topology.cpus)]));
        let told = Arc::clone(&states);
        self.vcpus.each(move |vcpu| -> Result<(), CpuError> {
            let parts = VcpuState::read(vcpu.fd())?.parts();
            let mut states = told.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(place) = states.get_mut(usize::from(vcpu.index())) {
                *place = parts;
            }
            Ok(())
        })?;
        let states = std::mem::take(&mut *states.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(states)
    }
}

/// The bytes of a section of a board's own.
pub(super) fn json(value: &impl Serialize) -> Result<Vec<u8>, MachineError> {
    serde_json::to_vec(value).map_err(|e| MachineError::Encode(e.into()))
}
