//! The processor: owns the opening of KVM, the vCPUs with their threads, and (in one module per architecture) their state at boot.
//!
//! The machine builds [`Vcpu`]s, gives the first one the state that the `boot` room asks for, and hands them to [`Vcpus`], which
//! runs, pauses and stops them. Nothing here knows devices: accesses go to a [`Bus`](crate::bus::Bus), the end of a
//! vCPU's run to a callback.

mod kvm;
mod run;
mod shared;
mod threads;
mod topology;
mod vcpu;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

use std::io;
use std::time::Duration;

pub use kvm::{KVM_PATH, open};
pub use run::{Buses, Ended, OnEnd};
pub use threads::Vcpus;
pub use topology::{Place, Topology};
pub use vcpu::Vcpu;

/// Why there are no vCPUs, or why they do not do as they are told.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// No `/dev/kvm`.
    #[error(
        "/dev/kvm: no such file: this host has no KVM; load the module (modprobe kvm_intel or kvm_amd) and check that virtualization is enabled in the firmware"
    )]
    NoKvm,
    /// No right to `/dev/kvm`.
    #[error(
        "/dev/kvm: permission denied: add the user to the group \"kvm\" (usermod -aG kvm USER), then log in again"
    )]
    Permission,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("/dev/kvm: {0}")]
    Open(#[source] io::Error),
    /// Not the KVM that has been stable since Linux 2.6.22, or not KVM at all.
    #[error("/dev/kvm speaks version {0} of the KVM interface; version 12 is needed: this is no usable KVM")]
    ApiVersion(i32),
    /// The host's KVM is too old or too limited.
    #[error("the host's KVM lacks {0}; a newer kernel is needed")]
    Missing(&'static str),
    /// A call into KVM failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was being done.
        what: &'static str,
        /// KVM's answer.
        #[source]
        source: io::Error,
    },
    /// The topology needs APIC ids that do not exist.
    #[error(
        "-smp: this topology needs APIC id {0}, above the largest, 254: make cores and threads powers of two"
    )]
    ApicId(u32),
    /// More vCPUs than the host's KVM runs.
    #[error("-smp: this host's KVM runs at most {0} vCPUs in a VM")]
    TooMany(usize),
    /// A thread could not be started.
    #[error("cannot start the thread of vCPU {index}: {source}")]
    Thread {
        /// Which vCPU.
        index: usize,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A saved vCPU state that is none.
    #[error("section {0} is not the state of a vCPU")]
    BadState(&'static str),
    /// A saved vCPU state with a value that KVM refuses.
    #[error("KVM does not take the saved value {value:#x} of MSR {index:#x}")]
    Msr {
        /// Which register.
        index: u32,
        /// Its value.
        value: u64,
    },
    /// A VM that was saved on another kind of host.
    #[error("the VM was saved on a host with a processor of another vendor")]
    Vendor,
    /// A VM that was saved on a better host.
    #[error(
        "the VM was saved with processor features that this host does not have (CPUID leaf {leaf:#x}, index {index}, {register}: {missing:#x})"
    )]
    Features {
        /// CPUID leaf.
        leaf: u32,
        /// CPUID sub-leaf.
        index: u32,
        /// Register of the leaf.
        register: &'static str,
        /// Bits that this host lacks.
        missing: u32,
    },
    /// A VM that was saved on a host with another clock.
    #[error(
        "the VM's time-stamp counter runs at {saved} kHz, this host's at {host} kHz, and this host cannot scale it"
    )]
    TscFrequency {
        /// Of the VM.
        saved: u64,
        /// Of this host.
        host: u64,
    },
    /// vCPUs did not leave the guest in time.
    #[error("{missing} of {total} vCPUs did not stop within {deadline:?}")]
    Deadline {
        /// Those that did not stop.
        missing: usize,
        /// All of them.
        total: usize,
        /// How long was waited.
        deadline: Duration,
    },
}

impl CpuError {
    fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |e| Self::Kvm { what, source: e.into() }
    }
}
