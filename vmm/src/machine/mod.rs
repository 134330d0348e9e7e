//! Machines: owns the wiring of one VM (memory map, interrupts, slots, vCPUs) and builds it from a [`VmConfig`].
//!
//! ```text
//!   build ──▶ built ──start(paused)──▶ paused ◀──pause/resume──▶ running
//!               │                        │                          │
//!               └────────────────────────┴──────── shut_down ───────┘ (or drop: the same, without the flush)
//! ```
//!
//! A reset leads from paused to paused.
//!
//! Only the thread that owns the VM's life calls a [`Machine`]. What the guest does comes back through
//! [`Environment::guest_events`], from vCPU threads.

mod backends;
mod devices;
mod doorbell;
mod guest;
mod hotplug;
mod microvm;
mod others;
mod plugging;
mod q35;
mod replaceable;
mod seating;
mod slots;
mod snapshot;
mod workers;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress};

use crate::block::BlockError;
use crate::boot::BootError;
use crate::bus::BusError;
use crate::chardev::CharBackend;
use crate::config::{InvalidConfig, MachineKind, VmConfig};
use crate::cpu::{CpuError, Vcpus};
use crate::event::LoopHandle;
use crate::inherit::Inherited;
use crate::irq::IrqError;
use crate::memory::MemoryError;
use crate::net::NetError;
use crate::pci::RootError;
use crate::snapshot::SnapshotError;
use crate::vfio::VfioError;
use crate::virtio::rng::RngError;
use crate::virtio::state::StateError;
use crate::virtio::vhost_user::VhostUserError;
use crate::virtio::vsock::VsockError;
use crate::virtio::{balloon, mem};
pub use hotplug::{NewDevice, Refusal, SlotKind};
use microvm::Microvm;
pub use plugging::{BlockDevice, Hotplug, HotplugError, NetDevice, PlugError, Plugged};
pub use q35::FirmwareError;
use q35::Q35;
use snapshot::Stand;

/// What the guest did that ends, or should end, its run. Sent from vCPU threads to the control room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// Power-off through ACPI S5.
    PowerOff,
    /// Reset request (ACPI reset register, i8042 0xFE).
    Reset,
    /// Triple fault: how a kernel with `reboot=t`, or a lost one, ends.
    TripleFault,
    /// KVM could not go on.
    InternalError(String),
}

/// One online vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuInfo {
    /// From 0.
    pub index: u8,
    /// Topology.
    pub socket_id: u8,
    /// Topology.
    pub die_id: u8,
    /// Topology; counts on through the clusters of a die.
    pub core_id: u8,
    /// Topology.
    pub thread_id: u8,
    /// The host's thread that runs it; 0 before the machine is started.
    pub host_tid: i32,
}

/// What a guest has let go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Departure {
    /// The device in the slot of the root port of this name.
    Port(String),
    /// The vCPU of this number.
    Cpu(u8),
}

/// Told what has left.
pub type OnLeft = Arc<dyn Fn(Departure) + Send + Sync>;

/// What a machine gets from the process around it.
pub struct Environment {
    /// Descriptors passed by the launcher.
    pub inherited: Arc<Inherited>,
    /// The main loop.
    pub main_loop: LoopHandle,
    /// Told, from vCPU threads, what the guest did. Must not block. A guest may do the same thing more than once.
    pub guest_events: Arc<dyn Fn(GuestEvent) + Send + Sync>,
    /// Told what the guest has let go, from vCPU threads or while the machine is reset. Must not block.
    pub device_left: OnLeft,
    /// What the serial port is connected to; `None` means that there is no serial port.
    pub serial: Option<Arc<dyn CharBackend>>,
    /// The host ends of `-chardev`, by id.
    pub chardevs: HashMap<String, Arc<dyn CharBackend>>,
}

/// Why there is no machine, or why it does not do as it is told.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A board that does not exist yet.
    #[error("-machine {0}: not supported in this version; use -machine microvm or q35")]
    Unsupported(MachineKind),
    /// A device that does not exist yet.
    #[error("device \"{device}\": {driver} is not supported in this version")]
    UnsupportedDevice {
        /// Which device.
        device: String,
        /// Its driver.
        driver: &'static str,
    },
    /// KVM or a vCPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Interrupt controllers.
    #[error(transparent)]
    Irq(#[from] IrqError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// Firmware.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// A device of the host.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// A tap.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A source of random bytes.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// Ports of the serial device that do not fit together.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// The guest's address on the host.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// Another process that is to serve a device.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// More devices than slots.
    #[error("device \"{device}\": too many {what}: a microvm has {slots} slots for them")]
    TooMany {
        /// The first without a slot.
        device: String,
        /// What kind.
        what: &'static str,
        /// How many there may be.
        slots: usize,
    },
    /// A device refers to something that the command line does not define.
    #[error("device \"{device}\": {what} \"{id}\" not found: add {option},id={id}")]
    NoSuch {
        /// Which device.
        device: String,
        /// What it refers to.
        what: &'static str,
        /// By which name.
        id: String,
        /// The option that would define it.
        option: &'static str,
    },
    /// What the guest has written could not be made durable.
    #[error("device \"{device}\": data that the guest has written may be lost: {source}")]
    Flush {
        /// Which device.
        device: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// What a snapshot cannot hold.
    #[error("{0} cannot be used with snapshots")]
    Excluded(String),
    /// The snapshot, or the place for one.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The snapshot is of another machine.
    #[error("-incoming: {field} differs: {saved} in the snapshot, {here} in this VM")]
    Mismatch {
        /// What differs.
        field: &'static str,
        /// As it was.
        saved: String,
        /// As it is.
        here: String,
    },
    /// A device cannot be saved or restored.
    #[error("{device}: {source}")]
    State {
        /// Which one.
        device: String,
        /// Why not.
        #[source]
        source: StateError,
    },
    /// What was to be written down.
    #[error("cannot write the state down: {0}")]
    Encode(#[source] io::Error),
    /// Devices that do not fit the slots.
    #[error(transparent)]
    Hotplug(#[from] Refusal),
    /// Two functions in one place of the root bus.
    #[error(transparent)]
    Pci(#[from] RootError),
    /// Two devices in one place: a mistake in the machine's own map.
    #[error("the machine's address map is wrong: {0}")]
    Map(#[from] BusError),
}

/// What the machine is built on.
enum Board {
    /// `-machine none`, which has no guest.
    None,
    Microvm(Box<Microvm>),
    Q35(Box<Q35>),
}

impl Board {
    fn vcpus(&self) -> Option<&Vcpus> {
        match self {
            Self::None => None,
            Self::Microvm(board) => Some(&board.vcpus),
            Self::Q35(board) => Some(&board.vcpus),
        }
    }

    fn stands(&self) -> Vec<Stand> {
        match self {
            Self::None => Vec::new(),
            Self::Microvm(board) => board.stands(),
            Self::Q35(board) => board.stands(),
        }
    }
}

/// One virtual machine.
pub struct Machine {
    board: Board,
}

impl Machine {
    /// Builds the machine: after this the guest's memory, vCPUs and devices exist, and no thread of it.
    ///
    /// An error says what was wrong and what to do, and leaves nothing behind.
    pub fn build(config: &VmConfig, environment: Environment) -> Result<Self, MachineError> {
        let board = match config.machine.kind {
            MachineKind::None => Board::None,
            MachineKind::Microvm => Board::Microvm(Box::new(Microvm::build(config, environment)?)),
            MachineKind::Q35 => Board::Q35(Box::new(Q35::build(config, environment)?)),
            kind @ MachineKind::Virt => return Err(MachineError::Unsupported(kind)),
        };
        Ok(Self { board })
    }

    /// Starts the vCPUs, once. With `paused` they stay out of the guest until [`resume`](Self::resume).
    pub fn start(&mut self, paused: bool) -> Result<(), MachineError> {
        match &mut self.board {
            Board::None => Ok(()),
            Board::Microvm(board) => board.start(paused),
            Board::Q35(board) => board.start(paused),
        }
    }

    /// Returns when no vCPU runs the guest and no other process that serves a device touches its memory. After an error (one did not stop
    /// within its time) all of them go on.
    pub fn pause(&self) -> Result<(), MachineError> {
        let Some(vcpus) = self.board.vcpus() else { return Ok(()) };
        vcpus.pause()?;
        snapshot::hold(&self.board.stands()).inspect_err(|_| self.resume())
    }

    /// Lets the vCPUs run the guest. A device that does not go on needs a reset, and a line in the log says why.
    pub fn resume(&self) {
        if let Some(vcpus) = self.board.vcpus() {
            // Each failure is logged.
            let _ = snapshot::go_on(&self.board.stands());
            vcpus.resume();
        }
    }

    /// Puts the machine back to where it was after [`start`](Self::start), paused; it must be paused. After an error it cannot go on.
    pub fn reset(&mut self) -> Result<(), MachineError> {
        match &mut self.board {
            Board::None => Ok(()),
            Board::Microvm(board) => board.reset(),
            Board::Q35(board) => board.reset(),
        }
    }

    /// Presses the power button: the guest decides what follows.
    pub fn press_power_button(&self) {
        match &self.board {
            Board::None => {}
            Board::Microvm(board) => board.press_power_button(),
            Board::Q35(board) => board.press_power_button(),
        }
    }

    /// Adds, removes, plugs or unplugs a back end or device. After an error everything is as before.
    pub fn hotplug(&mut self, request: Hotplug) -> Result<Plugged, HotplugError> {
        match &mut self.board {
            Board::Microvm(board) => board.replaceable.apply(request).map(|()| Plugged::Done),
            Board::Q35(board) => board.hotplug(request),
            Board::None => Err(HotplugError::NoSlots),
        }
    }

    /// The guest has let this go: ends it, and returns the device's name.
    pub fn device_left(&mut self, departure: &Departure) -> Option<String> {
        match &mut self.board {
            Board::None | Board::Microvm(_) => None,
            Board::Q35(board) => board.device_left(departure),
        }
    }

    /// Block nodes: those that devices use first, in order of their slots.
    pub fn block_devices(&self) -> Vec<BlockDevice> {
        match &self.board {
            Board::None => Vec::new(),
            Board::Microvm(board) => board.replaceable.block_devices(),
            Board::Q35(board) => board.block_devices(),
        }
    }

    /// Network back ends: those that devices use first, in order of their slots.
    pub fn net_devices(&self) -> Vec<NetDevice> {
        match &self.board {
            Board::None => Vec::new(),
            Board::Microvm(board) => board.replaceable.net_devices(),
            Board::Q35(board) => board.net_devices(),
        }
    }

    /// Devices by id, with what `-device` calls their driver.
    pub fn devices(&self) -> Vec<(String, &'static str)> {
        match &self.board {
            Board::None => Vec::new(),
            Board::Microvm(board) => board.replaceable.devices(),
            Board::Q35(board) => board.devices(),
        }
    }

    /// I/O threads that the command line names, each with the host's thread; 0 while it has not been needed.
    pub fn iothreads(&self) -> Vec<(String, i32)> {
        match &self.board {
            Board::None => Vec::new(),
            Board::Microvm(board) => board.iothreads(),
            Board::Q35(board) => board.iothreads(),
        }
    }

    /// The online vCPUs in order.
    pub fn cpus(&self) -> Vec<CpuInfo> {
        match &self.board {
            Board::None => Vec::new(),
            Board::Microvm(board) => board.cpus(),
            Board::Q35(board) => board.cpus(),
        }
    }

    /// The balloon, if the machine has one: its target, what the guest has, and word of changes.
    pub fn balloon(&self) -> Option<Arc<balloon::Port>> {
        match &self.board {
            Board::None => None,
            Board::Microvm(board) => board.balloon.clone(),
            Board::Q35(board) => board.balloon.clone(),
        }
    }

    /// The four bytes of guest RAM at an address, the lowest first.
    pub fn peek(&self, address: u64) -> Option<u32> {
        let memory = match &self.board {
            Board::None => return None,
            Board::Microvm(board) => &board.memory,
            Board::Q35(board) => &board.memory,
        };
        memory.read_obj(GuestAddress(address)).ok().map(u32::from_le)
    }

    /// The device of this name that hands memory out: how much the guest has, and is to have.
    pub fn memory_device(&self, id: &str) -> Option<Arc<mem::Port>> {
        let mems = match &self.board {
            Board::None => return None,
            Board::Microvm(board) => &board.mems,
            Board::Q35(board) => &board.mems,
        };
        mems.iter().find(|(name, _)| name == id).map(|(_, port)| Arc::clone(port))
    }

    /// Ends the machine: stops the vCPUs, resets the devices, and makes durable what the guest has written.
    pub fn shut_down(self) -> Result<(), MachineError> {
        match self.board {
            Board::None => Ok(()),
            Board::Microvm(board) => board.shut_down(),
            Board::Q35(board) => board.shut_down(),
        }
    }
}

#[cfg(test)]
mod tests;
