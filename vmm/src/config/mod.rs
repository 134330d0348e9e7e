//! What a VM is, as plain data: owns the types that the command line is parsed into and that a machine is built from.
//!
//! Nothing here touches the host: a [`VmConfig`] is a wish. Paths are opened by the rooms that use them. The parser
//! (`cmdline`) and the validation (`validate`) live beside this file; every rule about values is in `validate`, once.

pub mod cmdline;
mod device;
mod host_address;
mod incoming;
mod invalid;
mod memory_backend;
mod memory_devices;
mod numa;
mod pci;
mod serial_ports;
mod smbios;
mod validate;
mod vhost_user;

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;

pub use device::{AutoBalloon, Device, DeviceDriver, RngLimit};
pub use host_address::HostAddress;
pub use incoming::Incoming;
pub use invalid::InvalidConfig;
pub use memory_backend::{MemoryBackend, MemoryBackendKind, Placement, PlacementPolicy};
pub use memory_devices::MEMORY_BLOCK_MIN;
pub use numa::{LOCAL_DISTANCE, Numa, NumaNode, REMOTE_DISTANCE};
pub use pci::{PciAddr, PciPlace, ROOT_BUS};
pub use serial_ports::SerialPort;
pub use smbios::SmbiosText;

/// Smallest guest RAM, in bytes.
pub const MEMORY_MIN: u64 = 128 << 20;
/// Largest guest RAM, in bytes.
pub const MEMORY_MAX: u64 = 512 << 30;
/// Most vCPUs of one VM.
pub const MAX_CPUS: u8 = 254;
/// Replaceable block slots of a microvm: `vda` to `vdf`.
pub const MICROVM_BLOCK_SLOTS: usize = 6;
/// Replaceable network slots of a microvm: `eth0` and `eth1`.
pub const MICROVM_NET_SLOTS: usize = 2;

/// Most ports of a virtio-serial device.
pub const SERIAL_PORTS_MAX: u8 = 31;

/// One virtual machine, as the command line describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// `-name`: shown in logs and thread names; at most 255 bytes.
    pub name: Option<String>,
    /// `-uuid`: reported by `query-uuid`; nothing else depends on it.
    pub uuid: Option<uuid::Uuid>,
    /// `-machine`.
    pub machine: MachineConfig,
    /// `-smp`.
    pub smp: Smp,
    /// `-m`, `-mem-path`, `-mem-prealloc`.
    pub memory: MemoryConfig,
    /// Memory objects that devices bring (`memdev=` of virtio-mem and virtio-pmem): not guest RAM.
    pub device_memory: Vec<MemoryBackend>,
    /// `-numa`.
    pub numa: Numa,
    /// `-smbios`.
    pub smbios: Vec<SmbiosText>,
    /// `-kernel`, `-initrd`, `-append`.
    pub boot: BootConfig,
    /// `-drive`, in command-line order.
    pub drives: Vec<Drive>,
    /// `-drive if=pflash`: where firmware lies. No device uses them.
    pub flash: Vec<Drive>,
    /// `-netdev`, in command-line order.
    pub netdevs: Vec<Netdev>,
    /// `-chardev`, in command-line order.
    pub chardevs: Vec<Chardev>,
    /// `-serial`; without it the machine has no serial port.
    pub serial: Option<ChardevKind>,
    /// `-device`, in command-line order: that order decides addresses and interrupts.
    pub devices: Vec<Device>,
    /// `-global pcie-root-port.fast-unplug=1`: a guest that is asked to let a device go need not wait for a second press of the button.
    pub fast_unplug: bool,
    /// `-object iothread,id=…`.
    pub iothreads: Vec<String>,
    /// `-object rng-random,…`.
    pub rngs: Vec<RngSource>,
    /// `-qmp` and `-mon`: where QMP clients connect.
    pub monitors: Vec<Monitor>,
    /// `-incoming`: the snapshot that the VM goes on from instead of booting.
    pub incoming: Option<Incoming>,
    /// `-S`: create the vCPUs paused.
    pub start_paused: bool,
    /// How the process presents itself to the host.
    pub process: ProcessConfig,
}

impl Default for VmConfig {
    /// What an empty command line means: a microvm with one vCPU and 256 MiB, and nothing else.
    fn default() -> Self {
        Self {
            name: None,
            uuid: None,
            machine: MachineConfig { kind: MachineKind::Microvm, dump_guest_core: true, mem_share: false },
            smp: Smp { cpus: 1, max_cpus: 1, sockets: 1, dies: 1, clusters: 1, cores: 1, threads: 1 },
            memory: MemoryConfig { size: 256 << 20, path: None, prealloc: false, backends: Vec::new() },
            device_memory: Vec::new(),
            numa: Numa::default(),
            smbios: Vec::new(),
            boot: BootConfig::default(),
            drives: Vec::new(),
            flash: Vec::new(),
            netdevs: Vec::new(),
            chardevs: Vec::new(),
            serial: None,
            devices: Vec::new(),
            fast_unplug: false,
            iothreads: Vec::new(),
            rngs: Vec::new(),
            monitors: Vec::new(),
            incoming: None,
            start_paused: false,
            process: ProcessConfig::default(),
        }
    }
}

impl VmConfig {
    /// Checks every rule that needs more than one value to be known, and every range. A machine is only built from what passes.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        validate::validate(self)
    }

    /// The ports of the virtio-serial device by number, which the command line may leave open.
    pub fn serial_ports(&self) -> Result<Vec<SerialPort>, InvalidConfig> {
        serial_ports::number(self)
    }

    /// Where each device of a machine with PCI is, in their order; `None` for those that are on no bus.
    pub fn pci_places(&self) -> Result<Vec<Option<PciPlace>>, InvalidConfig> {
        pci::places(self)
    }

    /// The chardev that `kind` stands for: itself, or the one its [`ChardevKind::Ref`] names.
    pub fn resolve_chardev<'a>(&'a self, kind: &'a ChardevKind) -> Option<&'a ChardevKind> {
        match kind {
            ChardevKind::Ref(id) => self.chardevs.iter().find(|c| c.id == *id).map(|c| &c.kind),
            kind => Some(kind),
        }
    }
}

/// `-machine`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// Which board.
    pub kind: MachineKind,
    /// `dump-guest-core`: include guest RAM in core dumps (default on).
    pub dump_guest_core: bool,
    /// `mem-share`: map guest RAM shared (default off).
    pub mem_share: bool,
}

/// The boards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineKind {
    /// QMP only, no guest: what libvirt probes.
    None,
    /// virtio-mmio only, no PCI.
    Microvm,
    /// PCIe (x86_64).
    Q35,
    /// PCIe (aarch64).
    Virt,
}

impl fmt::Display for MachineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Microvm => "microvm",
            Self::Q35 => "q35",
            Self::Virt => "virt",
        })
    }
}

/// `-smp`. Invariant (checked in `validate`): `sockets * dies * clusters * cores * threads == max_cpus`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smp {
    /// vCPUs at boot, 1 to 254.
    pub cpus: u8,
    /// vCPUs at most; those above `cpus` can be hot-plugged.
    pub max_cpus: u8,
    /// Sockets.
    pub sockets: u8,
    /// Dies per socket.
    pub dies: u8,
    /// Clusters per die.
    pub clusters: u8,
    /// Cores per cluster.
    pub cores: u8,
    /// Threads per core.
    pub threads: u8,
}

/// Guest RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Bytes; 128 MiB to 512 GiB.
    pub size: u64,
    /// `-mem-path`: a file, or a directory of a hugetlbfs, that backs guest RAM.
    pub path: Option<PathBuf>,
    /// `-mem-prealloc`: touch every page before the guest starts.
    pub prealloc: bool,
    /// `-object memory-backend-*`. One whose size is that of guest RAM, or one for each NUMA node.
    pub backends: Vec<MemoryBackend>,
}

/// `-object rng-random`: where a virtio-rng device gets its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngSource {
    /// Name that devices refer to.
    pub id: String,
    /// A character device of the host.
    pub filename: PathBuf,
}

/// What the guest starts with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BootConfig {
    /// bzImage, ELF vmlinux or raw "PE" kernel.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line as the user gave it.
    pub append: String,
}

/// `-drive`: a block back end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// Name that devices refer to.
    pub id: String,
    /// Image file or block device.
    pub file: PathBuf,
    /// `readonly` (default off).
    pub readonly: bool,
    /// `direct`: open with `O_DIRECT` (default on, as StratoVirt has it).
    pub direct: bool,
    /// `aio`; `None` leaves the choice to the block room.
    pub aio: Option<Aio>,
    /// `format` (default raw; never guessed).
    pub format: ImageFormat,
    /// `throttling.iops-total`, at most 1 000 000.
    pub iops_total: Option<u64>,
    /// `discard=unmap`.
    pub discard: bool,
    /// `detect-zeroes`.
    pub detect_zeroes: DetectZeroes,
    /// `if=pflash,unit=N`.
    pub pflash_unit: Option<u8>,
    /// `cache.no-flush` of QMP: the guest's flushes are answered and not carried out (default off).
    pub no_flush: bool,
    /// `backing`: what lies under a qcow2 image, nearest first; opened read-only. The name in an image's header is never opened.
    pub backing: Vec<BackingImage>,
    /// `l2-cache-size` in bytes, at most 32 MiB; `None` leaves it to the block room.
    pub l2_cache_size: Option<u64>,
    /// `refcount-cache-size` in bytes, at most 32 MiB; `None` leaves it to the block room.
    pub refcount_cache_size: Option<u64>,
}

impl Drive {
    /// A raw, writable drive with every other option at its default.
    pub fn new(id: impl Into<String>, file: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            file: file.into(),
            readonly: false,
            direct: true,
            aio: None,
            format: ImageFormat::Raw,
            iops_total: None,
            discard: false,
            detect_zeroes: DetectZeroes::Off,
            pflash_unit: None,
            no_flush: false,
            backing: Vec::new(),
            l2_cache_size: None,
            refcount_cache_size: None,
        }
    }
}

/// One image under a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingImage {
    /// Image file or block device.
    pub file: PathBuf,
    /// Its format (never guessed).
    pub format: ImageFormat,
}

/// How block requests reach the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// Linux native asynchronous I/O; needs `direct`.
    Native,
    /// io_uring.
    IoUring,
    /// A pool of threads.
    Threads,
    /// Synchronously, on the thread of the device.
    Off,
}

/// Image formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// Plain bytes.
    Raw,
    /// QEMU copy-on-write, version 2 and 3.
    Qcow2,
}

/// `detect-zeroes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Write zeroes as they come.
    Off,
    /// Turn writes of zeroes into write-zeroes.
    On,
    /// Turn writes of zeroes into discards where allowed.
    Unmap,
}

/// `-netdev`: a network back end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netdev {
    /// Name that devices refer to.
    pub id: String,
    /// Where packets go.
    pub backend: NetBackend,
}

/// Kinds of network back end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetBackend {
    /// A tap interface.
    Tap {
        /// By name, or as inherited descriptors (one per queue pair).
        source: TapSource,
        /// Queue pairs, 1 to 16.
        queues: u16,
        /// Use the kernel's vhost-net.
        vhost: bool,
        /// Inherited `/dev/vhost-net` descriptors.
        vhost_fds: Vec<RawFd>,
        /// `path=`: the device that taps are opened through; `/dev/net/tun` if it is left out.
        path: Option<PathBuf>,
    },
    /// A vhost-user back end behind a chardev.
    VhostUser {
        /// The chardev's id.
        chardev: String,
        /// Queue pairs, 1 to 16.
        queues: u16,
    },
}

/// How a tap is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapSource {
    /// Interface name, shorter than IFNAMSIZ (16).
    Name(String),
    /// Open descriptors inherited by this process.
    Fds(Vec<RawFd>),
}

/// `-chardev`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chardev {
    /// Name that devices and monitors refer to.
    pub id: String,
    /// What it is connected to.
    pub kind: ChardevKind,
}

/// Where the bytes of a character device go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChardevKind {
    /// This process's standard input and output; they need not be a terminal.
    Stdio,
    /// A new pseudo-terminal, its name printed to the log.
    Pty,
    /// Output to a file, created or appended to; no input.
    File(PathBuf),
    /// A unix socket.
    UnixSocket {
        /// Path of the socket.
        path: PathBuf,
        /// Listen rather than connect.
        server: bool,
        /// Do not wait for the first client.
        nowait: bool,
    },
    /// A TCP socket.
    TcpSocket {
        /// Address to listen on or connect to.
        addr: SocketAddr,
        /// Listen rather than connect.
        server: bool,
        /// Do not wait for the first client.
        nowait: bool,
    },
    /// Lines go to the log of this process.
    Log,
    /// Another chardev by id (`-serial chardev:ID`).
    Ref(String),
}

impl ChardevKind {
    /// Whether the VM waits for the first client before it is made.
    pub fn awaits_client(&self) -> bool {
        matches!(
            self,
            Self::UnixSocket { server: true, nowait: false, .. }
                | Self::TcpSocket { server: true, nowait: false, .. }
        )
    }
}

/// Where QMP clients connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Monitor {
    /// `-qmp unix:PATH,server,nowait`.
    Unix(PathBuf),
    /// `-qmp tcp:IP:PORT,server,nowait`.
    Tcp(SocketAddr),
    /// `-mon chardev=ID,mode=control`.
    Chardev(String),
}

/// How the process presents itself to the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProcessConfig {
    /// `-daemonize`.
    pub daemonize: bool,
    /// `-pidfile`.
    pub pidfile: Option<PathBuf>,
    /// `-D FILE`; `None` logs to standard error.
    pub log_file: Option<PathBuf>,
    /// `-disable-seccomp`.
    pub disable_seccomp: bool,
    /// `-trace`: trace points that are on from the start.
    pub trace: Option<Trace>,
}

/// `-trace`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trace {
    /// `type=all` or `type=events`: every point.
    All,
    /// `file=`: the points that this file names.
    File(PathBuf),
}
