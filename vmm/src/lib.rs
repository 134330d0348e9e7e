//! `flotilla-vmm`: one process, one virtual machine.
//!
//! The rooms, top floor first. A room imports only from rooms below it:
//!
//! ```text
//! main.rs    arguments -> config -> machine -> run; exit codes
//! qmp        socket server, codec, command table, events: text in, `control::Command` out
//! control    the one owner of a VM's life: who may do what when
//! machine    microvm (later q35, virt): what is wired where
//! boot       kernels, initrd, command line, ACPI, MP table         snapshot  the directory that a VM is saved to
//! virtio     queues, transports, devices        device   legacy devices (serial, ACPI sleep, i8042)
//! vfio       devices of the host, as functions on the PCI bus
//! pci        configuration space, BARs, MSI-X, root ports
//! block net  host back ends of virtio (over vhost)  chardev  host back ends of serial lines and QMP
//! cpu irq memory bus                            the processor, its interrupts, guest RAM, dispatch
//! process sandbox event inherit                 log, daemon, signals; seccomp; the event loop; descriptors handed to us
//! config     what a VM is, as plain data
//! ```

pub mod block;
pub mod boot;
pub mod bus;
pub mod chardev;
pub mod config;
pub mod control;
pub mod cpu;
pub mod device;
pub mod event;
pub mod inherit;
pub mod irq;
pub mod machine;
pub mod memory;
pub mod net;
pub mod pci;
pub mod process;
pub mod qmp;
pub mod sandbox;
pub mod snapshot;
pub mod vfio;
pub mod vhost;
pub mod virtio;
