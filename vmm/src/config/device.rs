//! The devices of a VM: owns their drivers' names and properties.

use std::os::fd::RawFd;
use std::time::Duration;

use super::{HostAddress, PciAddr};

/// `-device`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// `id=`, or one made up from the driver and its position: unique in the VM.
    pub id: String,
    /// `bus=` (PCI only).
    pub bus: Option<String>,
    /// `addr=` (PCI only): slot and function.
    pub addr: Option<PciAddr>,
    /// `multifunction=on`.
    pub multifunction: bool,
    /// Driver and its properties.
    pub driver: DeviceDriver,
}

impl Device {
    /// Says whether the device was asked for on a PCI bus.
    pub fn is_pci(&self) -> bool {
        self.bus.is_some() || self.addr.is_some()
    }
}

/// Device models and their properties. `-device` (`*-device`) and `-pci` spellings share one variant;
/// which was written is in [`Device::addr`] and [`Device::bus`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceDriver {
    /// `virtio-blk-*`.
    VirtioBlk {
        /// `drive=`.
        drive: String,
        /// `serial=`, at most 20 bytes.
        serial: Option<String>,
        /// `iothread=`.
        iothread: Option<String>,
        /// `num-queues=`, 1 to 32; one if it is left out. One I/O thread serves them all, and on a microvm one interrupt tells of all.
        num_queues: Option<u16>,
        /// `queue-size=`, a power of two, 4 to 1024.
        queue_size: u16,
        /// `bootindex=`.
        boot_index: Option<u8>,
    },
    /// `virtio-net-*`.
    VirtioNet {
        /// `netdev=`.
        netdev: String,
        /// `mac=`.
        mac: Option<[u8; 6]>,
        /// `iothread=`.
        iothread: Option<String>,
        /// `mq=on`.
        multi_queue: bool,
        /// `queue-size=`, a power of two, 256 to 4096.
        queue_size: u16,
    },
    /// `virtio-serial-*`: what virtconsole and virtserialport plug into.
    VirtioSerial {
        /// `max_ports=`, 1 to 31.
        max_ports: u8,
    },
    /// `virtconsole`: a terminal (`hvc0` and on in Linux) on the virtio-serial device.
    VirtConsole {
        /// `chardev=`.
        chardev: String,
        /// `nr=`: port number.
        nr: Option<u8>,
    },
    /// `virtserialport`: a stream of bytes (`/dev/vport0p1` and on in Linux) on the virtio-serial device.
    VirtSerialPort {
        /// `chardev=`.
        chardev: String,
        /// `nr=`: port number, not 0.
        nr: Option<u8>,
        /// `name=`: how the guest finds it (`/dev/virtio-ports/NAME`).
        name: Option<String>,
    },
    /// `virtio-balloon-*`.
    VirtioBalloon {
        /// `deflate-on-oom=on`: the guest may take pages back when it runs out of memory.
        deflate_on_oom: bool,
        /// `free-page-reporting=on`: the guest tells which pages it does not use.
        free_page_reporting: bool,
        /// `auto-balloon=on`: what the balloon holds follows what the guest could spare.
        auto: Option<AutoBalloon>,
    },
    /// `virtio-rng-*`.
    VirtioRng {
        /// `rng=`.
        rng: String,
        /// `max-bytes=` and `period=`; `None` for no limit.
        limit: Option<RngLimit>,
    },
    /// `pcie-root-port`: a slot that devices can be plugged into while the guest runs.
    PcieRootPort {
        /// `port=`: number of the slot as the guest shows it.
        port: u8,
    },
    /// `vhost-user-fs-*`: a directory of the host, served by another process.
    VhostUserFs {
        /// `chardev=`: where that process listens.
        chardev: String,
        /// `tag=`: by which name the guest mounts it; 1 to 36 bytes.
        tag: String,
    },
    /// `vhost-user-blk-*`: a disk that another process serves.
    VhostUserBlk {
        /// `chardev=`: where that process listens.
        chardev: String,
        /// `num-queues=`, 1 to 32.
        num_queues: u16,
        /// `queue-size=`, a power of two, 4 to 1024.
        queue_size: u16,
    },
    /// `virtio-mem-*`: memory that the guest gets, and gives back, while it runs.
    VirtioMem {
        /// `memdev=`: the memory object, whose size is the most that there can be.
        memdev: String,
        /// `memaddr=`: guest physical address; behind RAM if it is left out.
        memaddr: Option<u64>,
        /// `requested-size=`: bytes that the guest is to have at first.
        requested_size: u64,
        /// `block-size=`: what comes and goes at once, in bytes; a power of two, 2 MiB at least.
        block_size: u64,
        /// `node=`: the guest's NUMA node that it belongs to.
        node: u16,
    },
    /// `virtio-pmem-*`: a file that the guest sees as memory.
    VirtioPmem {
        /// `memdev=`: the memory object.
        memdev: String,
        /// `memaddr=`: guest physical address; behind RAM if it is left out.
        memaddr: Option<u64>,
    },
    /// `vfio-pci`: a device of the host, whole.
    VfioPci {
        /// `host=`, or the last part of `sysfsdev=`.
        host: HostAddress,
    },
    /// `vhost-vsock-*`.
    VhostVsock {
        /// `guest-cid=`, 3 to 0xffff_fffe.
        guest_cid: u32,
        /// `vhostfd=`: an inherited `/dev/vhost-vsock`.
        vhost_fd: Option<RawFd>,
    },
}

impl DeviceDriver {
    /// What is written after `-device` for a microvm.
    pub fn name(&self) -> &'static str {
        match self {
            Self::VirtioBlk { .. } => "virtio-blk-device",
            Self::VirtioNet { .. } => "virtio-net-device",
            Self::VirtioSerial { .. } => "virtio-serial-device",
            Self::VirtConsole { .. } => "virtconsole",
            Self::VirtSerialPort { .. } => "virtserialport",
            Self::VirtioBalloon { .. } => "virtio-balloon-device",
            Self::VirtioRng { .. } => "virtio-rng-device",
            Self::PcieRootPort { .. } => "pcie-root-port",
            Self::VhostUserFs { .. } => "vhost-user-fs-device",
            Self::VhostUserBlk { .. } => "vhost-user-blk-device",
            Self::VirtioMem { .. } => "virtio-mem-device",
            Self::VirtioPmem { .. } => "virtio-pmem-device",
            Self::VfioPci { .. } => "vfio-pci",
            Self::VhostVsock { .. } => "vhost-vsock-device",
        }
    }

    /// What is written after `-device` for a machine with PCI.
    pub fn pci_name(&self) -> &'static str {
        match self {
            Self::VirtioBlk { .. } => "virtio-blk-pci",
            Self::VirtioNet { .. } => "virtio-net-pci",
            Self::VirtioSerial { .. } => "virtio-serial-pci",
            Self::VirtioBalloon { .. } => "virtio-balloon-pci",
            Self::VirtioRng { .. } => "virtio-rng-pci",
            Self::VhostUserFs { .. } => "vhost-user-fs-pci",
            Self::VhostUserBlk { .. } => "vhost-user-blk-pci",
            Self::VirtioMem { .. } => "virtio-mem-pci",
            Self::VirtioPmem { .. } => "virtio-pmem-pci",
            Self::VhostVsock { .. } => "vhost-vsock-pci",
            Self::VirtConsole { .. }
            | Self::VirtSerialPort { .. }
            | Self::PcieRootPort { .. }
            | Self::VfioPci { .. } => self.name(),
        }
    }
}

/// `auto-balloon=on`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AutoBalloon {
    /// `membuf-percent=`, 20 to 80: what the guest keeps of the memory that it could spare.
    pub percent: u8,
    /// `monitor-interval=`, 5 to 300 seconds: how often the guest is asked what it could spare.
    pub interval: Duration,
}

/// How fast a guest may draw random bytes: from 64 bytes to 10^9 bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RngLimit {
    /// Bytes in each period; not 0.
    pub max_bytes: u64,
    /// Length of a period in milliseconds; not 0.
    pub period_ms: u64,
}
