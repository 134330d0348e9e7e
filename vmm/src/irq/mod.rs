//! Interrupt routing: owns the in-kernel interrupt controllers, the GSI table, and the lines that devices pull.
//!
//! The machine creates the controllers after the memory slots and before the vCPUs. KVM installs the routing table itself
//! (x86: GSI n goes to pin n of the IOAPIC, and to the PIC for n < 16), so setting one here would only cost a grace period.

#[cfg(target_arch = "x86_64")]
pub mod saved;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::VmFd;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{IOAPIC_BASE, IOAPIC_PINS, LAPIC_BASE, create_controllers, reset_controllers};

/// An edge-triggered interrupt line into the guest.
pub trait Line: Send + Sync {
    /// Raises one edge. Callable from any thread; errors are logged once, not returned: no device could act on them.
    fn trigger(&self);
}

/// Why the interrupt controllers could not be created, or not be given a state.
#[derive(Debug, thiserror::Error)]
#[error("KVM: {what}: {source}")]
pub struct IrqError {
    /// Which controller.
    pub what: &'static str,
    /// KVM's answer.
    #[source]
    pub source: io::Error,
}

/// A line that pulls one GSI with `KVM_IRQ_LINE`: no descriptor and no set-up cost, unlike an irqfd.
pub struct KvmLine {
    vm: Arc<VmFd>,
    gsi: u32,
    failed: AtomicBool,
}

impl KvmLine {
    /// The line of `gsi`.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi, failed: AtomicBool::new(false) }
    }
}

impl Line for KvmLine {
    fn trigger(&self) {
        let edge = self.vm.set_irq_line(self.gsi, true).and_then(|()| self.vm.set_irq_line(self.gsi, false));
        if let Err(error) = edge
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            tracing::error!(gsi = self.gsi, %error, "interrupt lost (further losses on this line are not logged)");
        }
    }
}
