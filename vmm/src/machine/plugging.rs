//! The words of hot-plug, the same for both boards: what a client can ask for, what was done, why not, and what queries show. No behaviour
//! here: `replaceable` carries it out on a microvm, `q35` on a q35.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use super::hotplug::{NewDevice, Refusal};
use crate::block::BlockError;
use crate::config::{Drive, HostAddress, Netdev};
use crate::cpu::CpuError;
use crate::net::NetError;
use crate::pci::Pending;
use crate::vfio::VfioError;
use crate::virtio::vhost_user::VhostUserError;
use crate::virtio::{blk, net};

/// What a client can ask for.
#[derive(Debug)]
pub enum Hotplug {
    /// `blockdev-add`.
    AddDrive {
        /// The block node.
        drive: Box<Drive>,
        /// The block node that lies under the last of its images.
        node: Option<String>,
        /// Descriptors that stand for files of these images.
        files: Vec<(PathBuf, OwnedFd)>,
    },
    /// `blockdev-del`.
    RemoveDrive(String),
    /// `netdev_add`, with the descriptors that stand for its taps and its vhost ends.
    AddNetdev {
        /// The back end. Descriptors in it are ignored in favour of the following ones.
        netdev: Netdev,
        /// Taps.
        fds: Vec<OwnedFd>,
        /// vhost-net.
        vhost_fds: Vec<OwnedFd>,
    },
    /// `netdev_del`.
    RemoveNetdev(String),
    /// `netdev_replace`: another tap for a netdev that a NIC uses.
    ReplaceTap {
        /// The netdev, or its NIC.
        id: String,
        /// The tap.
        ifname: String,
        /// The device that it is opened through.
        path: Option<PathBuf>,
    },
    /// `netlink_set`: a NIC's link.
    SetLink {
        /// The NIC, or its netdev.
        id: String,
        /// Up, or down.
        up: bool,
    },
    /// `chardev-add`: the socket of a process that is to serve a device.
    AddChardev {
        /// Its name.
        id: String,
        /// The socket.
        path: PathBuf,
    },
    /// `chardev-remove`.
    RemoveChardev(String),
    /// `device_add`.
    Plug(NewDevice),
    /// `device_del`: the device is gone when this returns.
    Unplug(String),
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plugged {
    /// As asked.
    Done,
    /// The guest has been told that there are other vCPUs than before.
    CpusResized,
}

/// Why it was not done. Everything is then as it was before.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// It does not fit.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The disk image.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The tap.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The slot of a disk.
    #[error(transparent)]
    Disk(#[from] blk::PortError),
    /// The slot of a NIC.
    #[error(transparent)]
    Nic(#[from] net::PortError),
    /// A device that cannot come or go on PCI.
    #[error(transparent)]
    Pci(#[from] PlugError),
    /// A device of the host.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// A vCPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The process that is to serve a device.
    #[error(transparent)]
    Served(#[from] VhostUserError),
    /// A machine without slots.
    #[error("this machine has no replaceable slots")]
    NoSlots,
}

/// One occupied block slot, as queries show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Name of the device; none for a block node that no device uses.
    pub device: Option<String>,
    /// The block node.
    pub drive: Drive,
    /// Transfers so far.
    pub stats: blk::Stats,
}

/// One network back end, as queries show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetDevice {
    /// Name, driver and address of the device; none for a back end that no device uses.
    pub device: Option<(String, &'static str, [u8; 6])>,
    /// The back end.
    pub netdev: Netdev,
}

/// Why a device cannot come or go. The texts that StratoVirt's clients know are theirs.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The name of the device is taken.
    #[error("Device id {0} existed")]
    DeviceExists(String),
    /// A driver that cannot be plugged.
    #[error("Failed to add device: Driver {0} is not support")]
    Driver(String),
    /// Memory that a device brings has its place before anything runs.
    #[error(
        "Failed to add device: Driver {0} is not support: give the VM the device with -device; a virtio-mem-pci with requested-size=0 hands out memory later (set-viomem)"
    )]
    Memory(&'static str),
    /// No block node of that name.
    #[error("Failed to add virtio pci blk: No drive configured matched for blk device")]
    NoDrive,
    /// No network back end of that name.
    #[error("Failed to add virtio pci net: Netdev: \"{0}\" not found for net device")]
    NoNetdev(String),
    /// Nowhere to plug it.
    #[error("Failed to add virtio pci {kind}: Failed to add virtio pci device: {why}")]
    Place {
        /// blk or net.
        kind: &'static str,
        /// What is wrong with the place.
        why: String,
    },
    /// No address.
    #[error("Failed to add virtio pci {0}: Should set addr.")]
    NoAddr(&'static str),
    /// A guest has one device once.
    #[error("Failed to add device: host device {0} is used by device \"{1}\" already")]
    HostTaken(HostAddress, String),
    /// The IOMMU does not know memory that devices bring.
    #[error(
        "Failed to add device: device \"{0}\": a device of the host does not reach the memory that device \"{1}\" brings"
    )]
    BesideMemory(String, String),
    /// No address of a device of the host.
    #[error("Failed to add device: host \"{0}\": write DDDD:BB:SS.F, like 0000:1a:00.3")]
    Host(String),
    /// Another place than the one behind a root port.
    #[error("Failed to plug device: HotPlug is not supported for device with devfn {0}")]
    Function(u8),
    /// The root bus.
    #[error("Failed to plug device: No hot plug controller found for bus pcie.0 when plug")]
    RootBus,
    /// No such device.
    #[error("Can not find parent device from pci bus")]
    NoDevice,
    /// A device on the root bus.
    #[error("No hot plug controller found for bus pcie.0 when unplug request")]
    Fixed,
    /// The guest has not finished with the slot.
    #[error(transparent)]
    Pending(#[from] Pending),
    /// The name of a chardev is taken.
    #[error("Chardev {0} is already registered.")]
    ChardevExists(String),
    /// No chardev of that name.
    #[error("Chardev {0} not found: add it first (chardev-add)")]
    NoChardev(String),
    /// Something uses it.
    #[error("chardev {0} is in use by {1}: remove that first")]
    ChardevInUse(String, String),
    /// More than any VM needs.
    #[error("too many chardevs: a VM has at most {0}; remove one first (chardev-remove)")]
    TooManyChardevs(usize),
    /// A device that another process serves has no chardev.
    #[error(
        "Failed to add vhost-user device: 'chardev' is missing: name the socket of its process (chardev-add)"
    )]
    NoChardevGiven,
    /// The process would not see what the guest writes.
    #[error(
        "Failed to add vhost-user device: guest memory is not shared: start the VM with mem-share=on in -machine"
    )]
    PrivateMemory,
    /// The name of a vCPU is taken.
    #[error("Device id {0} already existed.")]
    CpuDeviceExists(String),
    /// All vCPUs are there from the start.
    #[error("There is no hotpluggable cpu-id for this VM.")]
    NoCpuSlots,
    /// The tables of a guest with NUMA nodes say who belongs where for good.
    #[error("Not support to hotplug/hotunplug cpu in numa architecture now.")]
    Numa,
    /// No number.
    #[error("Argument cpu-id is required.")]
    NoCpuId,
    /// A number beyond the last.
    #[error("Max cpu-id is {0}")]
    CpuIdMax(u8),
    /// The number of a vCPU that has been there from the start.
    #[error("Cpu-id {0} already exist.")]
    CpuIdExists(u8),
    /// The number of a vCPU that has been plugged.
    #[error("Cpu-id {0} is running, device id is {1}.")]
    CpuIdRuns(u8, String),
}
