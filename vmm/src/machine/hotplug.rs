//! Hot-plug bookkeeping: which back ends have names, which device is in which replaceable slot, and what may follow what. Pure: opens
//! nothing and touches no device. `replaceable` is the only caller.
//!
//! ```text
//!            add                 plug                 unplug
//! (unknown) ─────▶ Idle ────────────────▶ Plugged ────────────▶ Spent ──▶ (forgotten, oldest first)
//!      ▲            │  ◀── a failed plug      ▲                   │
//!      └─ remove ───┘                         └────── plug ───────┤
//!      └───────────────────────── remove, add ────────────────────┘
//! ```
//!
//! A microvm's `device_del` also gives the back end back, so a client may use the name again at once. Clients written for machines
//! where it does not send `blockdev-del` or `netdev_del` afterwards: `Spent` is what such a request still finds.

use crate::config::{Drive, MICROVM_BLOCK_SLOTS, MICROVM_NET_SLOTS, Netdev, VmConfig};

/// Named back ends of one kind, spent ones not counted: more could never be plugged, and each holds a file.
const BACKENDS_MAX: usize = 64;
/// Spent names that are remembered.
const SPENT_MAX: usize = 16;

/// Kinds of replaceable slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// `vda` to `vdf`.
    Block,
    /// `eth0` and `eth1`.
    Net,
}

impl SlotKind {
    fn word(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Net => "net",
        }
    }
    fn slots(self) -> usize {
        match self {
            Self::Block => MICROVM_BLOCK_SLOTS,
            Self::Net => MICROVM_NET_SLOTS,
        }
    }
}

/// `device_add`, as far as a replaceable slot has a use for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewDevice {
    /// Name of the device.
    pub id: String,
    /// Driver; `virtio-blk-*` and `virtio-net-*` can be plugged.
    pub driver: String,
    /// Name of the block node; `id` without it.
    pub drive: Option<String>,
    /// Name of the network back end; `id` without it.
    pub netdev: Option<String>,
    /// Name of the chardev behind which another process serves it; machines with PCI only.
    pub chardev: Option<String>,
    /// Slot, decimal or hexadecimal.
    pub addr: Option<String>,
    /// Root port to plug it into; machines with PCI only.
    pub bus: Option<String>,
    /// Slot minus one.
    pub lun: Option<u64>,
    /// Serial number of a disk, at most 20 bytes.
    pub serial: Option<String>,
    /// Address of a NIC.
    pub mac: Option<[u8; 6]>,
    /// Queues of a disk, 1 to 32; machines with PCI only.
    pub num_queues: Option<u16>,
    /// Size of each queue, a power of two that the driver allows; machines with PCI only.
    pub queue_size: Option<u16>,
    /// A NIC uses all the queues of its back end; machines with PCI only.
    pub multi_queue: bool,
    /// Address of a device of the host; machines with PCI only.
    pub host: Option<String>,
    /// Number of a vCPU.
    pub cpu_id: Option<u64>,
    /// Thread that serves it; the one of devices that name none without it.
    pub iothread: Option<String>,
}

/// Why a request does not fit what there is. The texts that StratoVirt's clients know are theirs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The name of a back end is taken.
    #[error("{0} is already registered.")]
    Registered(String),
    /// Too many back ends.
    #[error("too many {what} back ends: a VM has at most {BACKENDS_MAX}; remove one first", what = .0.word())]
    TooMany(SlotKind),
    /// No block node of that name.
    #[error("Drive {0} not found")]
    NoDrive(String),
    /// No netdev of that name.
    #[error("Netdev {0} not found")]
    NoNetdev(String),
    /// No NIC of that name, or on a netdev of that name.
    #[error("no net dev {0}")]
    NoNic(String),
    /// Another process moves the packets.
    #[error("{0} is served by another process: its link and its network are that one's")]
    Served(String),
    /// A device uses it.
    #[error("{name} is in use by device {device}: remove the device first (device_del)")]
    InUse {
        /// The back end.
        name: String,
        /// The device.
        device: String,
    },
    /// The name of the device is taken.
    #[error("Device id {0} already existed.")]
    DeviceExists(String),
    /// Nothing to make the device from.
    #[error("Failed to find device configuration.")]
    NoConfiguration,
    /// A disk on a netdev, or a NIC on a block node.
    #[error("The device type is {kind}, but the target config is not for this type.", kind = .0.word())]
    WrongKind(SlotKind),
    /// A driver that has no replaceable slots.
    #[error("Unsupported replaceable device type.")]
    Unsupported,
    /// No number.
    #[error("Invalid addr for device {0}")]
    BadAddr(String),
    /// Beyond the last slot.
    #[error("A maximum of {kind} {slots} replaceable devices are supported.", kind = .0.word(), slots = .0.slots())]
    NoSuchSlot(SlotKind),
    /// Another device is there.
    #[error("The slot {0} is occupied already.")]
    Occupied(usize),
    /// No device of that name.
    #[error("Device {0} not found")]
    NoDevice(String),
    /// No I/O thread of that name.
    #[error("iothread {0} not found: a VM has those of its command line (-object iothread,id=…)")]
    NoIothread(String),
    /// The descriptors of a netdev have been used and closed.
    #[error("netdev {0} was made from descriptors that are closed: send new ones (getfd, netdev_add)")]
    DescriptorsGone(String),
    /// `chardev-add` and `chardev-remove` on a machine whose slots have no use for them.
    #[error(
        "chardev_add not supported yet for microVM: write -chardev on the command line, or use -machine q35"
    )]
    NoChardevs,
    /// What another process serves is in no replaceable slot.
    #[error(
        "netdev {0}: a vhost-user netdev cannot come to a running microvm: use type tap, or write -netdev vhost-user on the command line"
    )]
    NotReplaceable(String),
    /// A device that sits in no replaceable slot.
    #[error("Device {0} cannot be unplugged: only disks and network devices can")]
    Fixed(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Plugged,
    Spent,
}

#[derive(Debug)]
struct Backend<C> {
    name: String,
    config: C,
    state: State,
}

#[derive(Debug)]
struct Plugged {
    device: String,
    backend: String,
}

/// The back ends and slots of one kind.
#[derive(Debug)]
pub(super) struct Bank<C> {
    kind: SlotKind,
    /// Oldest first.
    backends: Vec<Backend<C>>,
    slots: Vec<Option<Plugged>>,
}

impl<C> Bank<C> {
    fn new(kind: SlotKind) -> Self {
        let slots = (0..kind.slots()).map(|_| None).collect();
        Self { kind, backends: Vec::new(), slots }
    }

    fn find(&self, name: &str) -> Option<&Backend<C>> {
        self.backends.iter().find(|b| b.name == name)
    }

    fn set(&mut self, name: &str, state: State) {
        if let Some(backend) = self.backends.iter_mut().find(|b| b.name == name) {
            backend.state = state;
        }
    }

    /// Whether [`add`](Self::add) would take the name.
    pub(super) fn check_new(&self, name: &str) -> Result<(), Refusal> {
        if self.find(name).is_some_and(|b| b.state != State::Spent) {
            return Err(Refusal::Registered(name.to_owned()));
        }
        let live = self.backends.iter().filter(|b| b.state != State::Spent).count();
        if live >= BACKENDS_MAX { Err(Refusal::TooMany(self.kind)) } else { Ok(()) }
    }

    pub(super) fn add(&mut self, name: &str, config: C) -> Result<(), Refusal> {
        self.check_new(name)?;
        self.backends.retain(|b| b.name != name);
        self.backends.push(Backend { name: name.to_owned(), config, state: State::Idle });
        Ok(())
    }

    /// Forgets a back end that no device uses.
    pub(super) fn remove(&mut self, name: &str) -> Result<(), Refusal> {
        let backend = self.find(name).ok_or_else(|| self.missing(name))?;
        if backend.state == State::Plugged {
            return Err(self.in_use(name));
        }
        self.backends.retain(|b| b.name != name);
        Ok(())
    }

    /// What the back end is made from.
    pub(super) fn config(&self, name: &str) -> Option<&C> {
        self.find(name).map(|b| &b.config)
    }

    /// The same, to be changed.
    pub(super) fn config_mut(&mut self, name: &str) -> Option<&mut C> {
        self.backends.iter_mut().find(|b| b.name == name).map(|b| &mut b.config)
    }

    /// What a back end that no device uses is made from.
    pub(super) fn idle(&self, name: &str) -> Result<&C, Refusal> {
        match self.find(name) {
            Some(Backend { state: State::Plugged, .. }) => Err(self.in_use(name)),
            Some(Backend { state: State::Idle, config, .. }) => Ok(config),
            _ => Err(self.missing(name)),
        }
    }

    fn missing(&self, name: &str) -> Refusal {
        match self.kind {
            SlotKind::Block => Refusal::NoDrive(name.to_owned()),
            SlotKind::Net => Refusal::NoNetdev(name.to_owned()),
        }
    }

    fn in_use(&self, name: &str) -> Refusal {
        let device = self.slots.iter().flatten().find(|p| p.backend == name);
        let device = device.map(|p| p.device.clone()).unwrap_or_default();
        Refusal::InUse { name: name.to_owned(), device }
    }

    /// The slot of `device`.
    pub(super) fn slot_of(&self, device: &str) -> Option<usize> {
        self.slots.iter().position(|s| s.as_ref().is_some_and(|p| p.device == device))
    }

    /// Whether a device may come into `slot` on this back end.
    fn check_plug(&self, backend: &str, slot: usize) -> Result<(), Refusal> {
        match self.slots.get(slot) {
            None => return Err(Refusal::NoSuchSlot(self.kind)),
            Some(Some(_)) => return Err(Refusal::Occupied(slot)),
            Some(None) => {}
        }
        match self.find(backend) {
            None => Err(Refusal::NoConfiguration),
            Some(b) if b.state == State::Plugged => Err(self.in_use(backend)),
            Some(_) => Ok(()),
        }
    }

    /// The device is in its slot.
    pub(super) fn plug(&mut self, device: &str, backend: &str, slot: usize) -> Result<(), Refusal> {
        self.check_plug(backend, slot)?;
        self.set(backend, State::Plugged);
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(Plugged { device: device.to_owned(), backend: backend.to_owned() });
        }
        Ok(())
    }

    /// The slot is empty; what was in it is spent.
    pub(super) fn unplug(&mut self, slot: usize) {
        let Some(Plugged { backend, .. }) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        // To the end of the list: the newest of the spent.
        if let Some(at) = self.backends.iter().position(|b| b.name == backend) {
            let mut backend = self.backends.remove(at);
            backend.state = State::Spent;
            self.backends.push(backend);
        }
        let spent = self.backends.iter().filter(|b| b.state == State::Spent).count();
        if spent > SPENT_MAX
            && let Some(oldest) = self.backends.iter().position(|b| b.state == State::Spent)
        {
            self.backends.remove(oldest);
        }
    }

    /// Occupied slots with their device and back end.
    pub(super) fn plugged(&self) -> impl Iterator<Item = (usize, &str, &str)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(slot, p)| p.as_ref().map(|p| (slot, p.device.as_str(), p.backend.as_str())))
    }

    /// Names and configurations of the back ends that are open or in use.
    pub(super) fn live(&self) -> impl Iterator<Item = (&str, &C)> {
        self.backends.iter().filter(|b| b.state != State::Spent).map(|b| (b.name.as_str(), &b.config))
    }
}

/// Where a device is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) kind: SlotKind,
    pub(super) slot: usize,
    pub(super) backend: String,
}

/// What `device_del` means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Removal {
    /// Empty this slot.
    Slot(SlotKind, usize),
    /// A back end that was never plugged: forget it.
    Backend(SlotKind),
}

/// All of it.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) blocks: Bank<Drive>,
    pub(super) nets: Bank<Netdev>,
    /// Devices in other slots, with their drivers.
    fixed: Vec<(String, &'static str)>,
}

impl Table {
    /// As the command line has it. `plugged` says, in order of the slots, which device is on which back end.
    pub(super) fn new(
        config: &VmConfig,
        plugged: impl IntoIterator<Item = (SlotKind, usize, String, String)>,
    ) -> Result<Self, Refusal> {
        let mut table = Self {
            blocks: Bank::new(SlotKind::Block),
            nets: Bank::new(SlotKind::Net),
            fixed: config.devices.iter().map(|d| (d.id.clone(), d.driver.name())).collect(),
        };
        for drive in &config.drives {
            table.blocks.add(&drive.id, drive.clone())?;
        }
        // One that another process serves is in no replaceable slot.
        for netdev in config.netdevs.iter().filter(|n| n.vhost_user_chardev().is_none()) {
            table.nets.add(&netdev.id, netdev.clone())?;
        }
        for (kind, slot, device, backend) in plugged {
            table.fixed.retain(|(id, _)| *id != device);
            match kind {
                SlotKind::Block => table.blocks.plug(&device, &backend, slot)?,
                SlotKind::Net => table.nets.plug(&device, &backend, slot)?,
            }
        }
        Ok(table)
    }

    fn is_fixed(&self, device: &str) -> bool {
        self.fixed.iter().any(|(id, _)| id == device)
    }

    /// All devices with their drivers, those in replaceable slots first.
    pub(super) fn devices(&self) -> Vec<(String, &'static str)> {
        let blocks = self.blocks.plugged().map(|(_, id, _)| (id.to_owned(), "virtio-blk-device"));
        let nets = self.nets.plugged().map(|(_, id, _)| (id.to_owned(), "virtio-net-device"));
        blocks.chain(nets).chain(self.fixed.iter().cloned()).collect()
    }

    /// Finds slot and back end for a new device; changes nothing.
    pub(super) fn plan(&self, device: &NewDevice) -> Result<Plan, Refusal> {
        let NewDevice { id, driver, drive, netdev, addr, lun, .. } = device;
        let kind = if driver.starts_with("virtio-blk") {
            SlotKind::Block
        } else if driver.starts_with("virtio-net") {
            SlotKind::Net
        } else {
            return Err(Refusal::Unsupported);
        };
        if self.blocks.slot_of(id).is_some() || self.nets.slot_of(id).is_some() || self.is_fixed(id) {
            return Err(Refusal::DeviceExists(id.clone()));
        }
        let slot = match (addr, lun) {
            (Some(text), _) => parse_slot(text).ok_or_else(|| Refusal::BadAddr(id.clone()))?,
            (None, Some(lun)) => lun.checked_add(1).ok_or_else(|| Refusal::BadAddr(id.clone()))?,
            (None, None) => 0,
        };
        let slot = usize::try_from(slot).map_err(|_| Refusal::NoSuchSlot(kind))?;
        let (named, here, elsewhere) = match kind {
            SlotKind::Block => {
                let name = drive.as_ref().unwrap_or(id);
                (name, self.blocks.find(name).is_some(), self.nets.find(name).is_some())
            }
            SlotKind::Net => {
                let name = netdev.as_ref().unwrap_or(id);
                (name, self.nets.find(name).is_some(), self.blocks.find(name).is_some())
            }
        };
        if !here && elsewhere {
            return Err(Refusal::WrongKind(kind));
        }
        match kind {
            SlotKind::Block => self.blocks.check_plug(named, slot)?,
            SlotKind::Net => self.nets.check_plug(named, slot)?,
        }
        Ok(Plan { kind, slot, backend: named.clone() })
    }

    /// Finds what `device_del` is to remove; changes nothing.
    pub(super) fn removal(&self, id: &str) -> Result<Removal, Refusal> {
        let idle = |state: Option<State>| state == Some(State::Idle);
        if let Some(slot) = self.blocks.slot_of(id) {
            Ok(Removal::Slot(SlotKind::Block, slot))
        } else if let Some(slot) = self.nets.slot_of(id) {
            Ok(Removal::Slot(SlotKind::Net, slot))
        } else if self.is_fixed(id) {
            Err(Refusal::Fixed(id.to_owned()))
        } else if idle(self.blocks.find(id).map(|b| b.state)) {
            Ok(Removal::Backend(SlotKind::Block))
        } else if idle(self.nets.find(id).map(|b| b.state)) {
            Ok(Removal::Backend(SlotKind::Net))
        } else {
            Err(Refusal::NoDevice(id.to_owned()))
        }
    }
}

/// `3`, `0x3`, or as PCI addresses are written: `0x3.0x0`. There are no functions but the first.
fn parse_slot(text: &str) -> Option<u64> {
    let number = |text: &str| match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16).ok(),
        None if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    };
    match text.split_once('.') {
        Some((slot, function)) => number(slot).filter(|_| number(function) == Some(0)),
        None => number(text),
    }
}

#[cfg(test)]
mod tests;
