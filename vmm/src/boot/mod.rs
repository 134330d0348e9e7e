//! What the guest starts with: owns kernels and initrds on their way into guest memory, the command line, and the tables that tell a
//! kernel what machine it is on (boot parameters, ACPI, MP table).
//!
//! The machine describes itself in a [`Platform`] and calls [`load`], before any vCPU runs. Files are read straight into guest
//! memory. Everything read from them is checked first: a kernel is whatever the user pointed at.

mod cmdline;
mod file;

#[cfg(target_arch = "x86_64")]
mod acpi;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::io;
use std::path::PathBuf;

pub use cmdline::CmdlineError;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{AcpiFiles, Board, BootFiles, FirmwareFiles, acpi_files, items, load, shadow};

use crate::device::GenerationId;

/// A virtio-mmio device with its two register windows; a kernel drives it through exactly one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioSlot {
    /// Window announced on the kernel command line.
    pub cmdline_base: u64,
    /// Window described in the DSDT.
    pub acpi_base: u64,
    /// Bytes of each window.
    pub size: u32,
    /// Interrupt (GSI).
    pub irq: u32,
}

/// A serial port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SerialPort {
    /// First of its 8 I/O ports.
    pub port: u16,
    /// Interrupt (GSI).
    pub irq: u32,
}

/// I/O ports of the ACPI registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcpiPorts {
    /// Sleep control register (ACPI 6.4 §4.8.3.7).
    pub sleep_control: u16,
    /// Sleep status register.
    pub sleep_status: u16,
    /// Reset register (ACPI 6.4 §4.8.3.6).
    pub reset: u16,
    /// The number of a virtio-mmio device whose `_STA` has run is written here.
    pub claim: u16,
}

/// What a microvm's tables describe: a hardware-reduced ACPI platform with virtio-mmio devices.
#[derive(Debug, Clone, Copy)]
pub struct Reduced<'a> {
    /// virtio-mmio devices in order.
    pub slots: &'a [MmioSlot],
    /// ACPI registers.
    pub acpi: AcpiPorts,
    /// Interrupt (GSI) of the power button.
    pub button_irq: u32,
}

/// Where the registers of [`EventRegister`](crate::device::EventRegister) and [`CpuController`](crate::device::CpuController) are.
#[derive(Debug, Clone, Copy)]
pub struct EventRegisters {
    /// Address of the events.
    pub events: u64,
    /// Address of the processors' registers.
    pub cpus: u64,
    /// Interrupt (GSI) that says that there are events.
    pub gsi: u32,
}

/// What a q35's tables describe: ACPI hardware and a PCI Express root.
#[derive(Debug, Clone, Copy)]
pub struct Pcie {
    /// First of the I/O ports of the power management registers: events, +4 control, +8 timer.
    pub pm_base: u16,
    /// Interrupt (GSI) of those registers.
    pub sci: u32,
    /// Sleep control register, beside the one in `pm_base`.
    pub sleep: u16,
    /// Reset register.
    pub reset: u16,
    /// ECAM of 256 buses: 256 MiB at this address.
    pub ecam: u64,
    /// Where BARs may lie below 4 GiB: first address and bytes.
    pub window32: (u64, u64),
    /// And above it, if the processors can address that much.
    pub window64: Option<(u64, u64)>,
    /// What tells of processors that come and go.
    pub events: EventRegisters,
    /// GSI of INTA# of slot 0; the four pins of the slots take this one and the next three in turn.
    pub first_pin: u32,
}

/// What kind of platform the tables describe.
#[derive(Debug, Clone, Copy)]
pub enum Hardware<'a> {
    /// microvm.
    Reduced(Reduced<'a>),
    /// q35.
    Pcie(Pcie),
}

/// One NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NumaNode {
    /// Processors by number.
    pub cpus: Vec<u8>,
    /// Stretches of RAM: address and bytes.
    pub memory: Vec<(u64, u64)>,
    /// Where memory may come and go while the guest runs: address and bytes.
    pub device_memory: Vec<(u64, u64)>,
    /// How far every node is from this one, in their order.
    pub distances: Vec<u8>,
}

/// What a standard machine says of itself beyond its devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standard {
    /// NUMA nodes; none where all is one.
    pub numa: Vec<NumaNode>,
    /// SMBIOS.
    pub board: Board,
}

/// What the loader has to know about the machine.
pub struct Platform<'a> {
    /// The first so many processors are always there.
    pub boot_cpus: u8,
    /// Whether each processor that there can be is there now, by its number.
    pub processors: &'a [bool],
    /// Gives their APIC ids.
    pub topology: &'a crate::cpu::Topology,
    /// What else there is.
    pub hardware: Hardware<'a>,
    /// What only a standard machine says of itself.
    pub standard: Option<&'a Standard>,
    /// The serial port, if there is one.
    pub serial: Option<SerialPort>,
    /// Which VM this is, to the guest.
    pub generation: GenerationId,
    /// Guest RAM may hold old data (it is backed by a file, or a guest has run), so what must be zero has to be written.
    pub dirty_memory: bool,
}

/// Why the guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The VM has no kernel.
    #[error("-kernel is missing: a machine without firmware boots a kernel directly")]
    NoKernel,
    /// There is no such file.
    #[error("{option} {}: no such file", path.display())]
    Missing {
        /// `-kernel` or `-initrd`.
        option: &'static str,
        /// As given.
        path: PathBuf,
    },
    /// This process may not read the file.
    #[error("{option} {}: permission denied: let the user of this process read it", path.display())]
    Denied {
        /// `-kernel` or `-initrd`.
        option: &'static str,
        /// As given.
        path: PathBuf,
    },
    /// A file could not be opened or read.
    #[error("{option} {}: {source}", path.display())]
    File {
        /// `-kernel` or `-initrd`.
        option: &'static str,
        /// As given.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The file is not a plain one.
    #[error("{option} {}: is {what}, not a file", path.display())]
    NotAFile {
        /// `-kernel` or `-initrd`.
        option: &'static str,
        /// As given.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The file is not a kernel, or one that cannot run here.
    #[error("-kernel {}: {reason}", path.display())]
    NotAKernel {
        /// As given.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Kernel or initrd do not fit.
    #[error("{option} {}: needs guest memory up to {needed:#x}, but usable memory ends at {end:#x}: give the VM more memory (-m)", path.display())]
    TooLarge {
        /// `-kernel` or `-initrd`.
        option: &'static str,
        /// As given.
        path: PathBuf,
        /// One past the last byte needed.
        needed: u64,
        /// One past the last byte that it may use.
        end: u64,
    },
    /// The command line cannot be passed on.
    #[error("-append: {0}")]
    Cmdline(#[from] CmdlineError),
    /// Guest memory could not be written: the machine's own layout does not fit.
    #[error("cannot write {what} to guest memory: {source}")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// Why not.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}
