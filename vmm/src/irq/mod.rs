//! Interrupt routing: owns the in-kernel interrupt controllers, the GSI table, and the lines that devices pull.
//!
//! The machine creates the controllers after the memory slots and before the vCPUs. KVM installs the routing table itself
//! (x86: GSI n goes to pin n of the IOAPIC, and to the PIC for n < 16), so setting one here would only cost a grace period.

#[cfg(target_arch = "x86_64")]
mod routes;
#[cfg(target_arch = "x86_64")]
pub mod saved;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

#[cfg(target_arch = "x86_64")]
pub use routes::{Message, Routes};
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

/// Message-signalled interrupts into the guest.
pub trait Messages: Send + Sync {
    /// Delivers one: `data` written to `address`, as the guest has programmed them. Callable from any thread.
    fn send(&self, address: u64, data: u32);
}

/// Messages by `KVM_SIGNAL_MSI`: one system call for each, as a write to an irqfd would be, and no routing table, whose every change KVM waits
/// out a grace period for (about 8 ms).
pub struct KvmMessages(Arc<VmFd>);

impl KvmMessages {
    /// Messages to the vCPUs of `vm`.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self(vm)
    }
}

impl Messages for KvmMessages {
    fn send(&self, address: u64, data: u32) {
        let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
        // Fails where the guest's message reaches no processor: its own doing, and nobody to tell.
        let _ = self.0.signal_msi(kvm_msi { address_lo, address_hi, data, ..Default::default() });
    }
}

/// A share in a level-triggered line. The line is up while any of its shares is.
pub trait Level: Send + Sync {
    /// Asserts or releases this share. Callable from any thread.
    fn set(&self, asserted: bool);
}

/// A level-triggered line at one GSI, which any number of devices share.
pub struct SharedLine {
    vm: Arc<VmFd>,
    gsi: u32,
    /// Shares that are asserted. Held over the change of the line, so that the last change is the one that stays.
    asserted: Mutex<u32>,
}

impl SharedLine {
    /// The line of `gsi`, down.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Arc<Self> {
        Arc::new(Self { vm, gsi, asserted: Mutex::new(0) })
    }

    /// A share of its own for one device.
    pub fn share(self: &Arc<Self>) -> Arc<dyn Level> {
        Arc::new(Share { line: Arc::clone(self), asserted: Mutex::new(false) })
    }

    fn count(&self, up: bool) {
        let mut asserted = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *asserted;
        *asserted = if up { before.saturating_add(1) } else { before.saturating_sub(1) };
        if (before == 0) != (*asserted == 0)
            && let Err(error) = self.vm.set_irq_line(self.gsi, *asserted > 0)
        {
            tracing::error!(gsi = self.gsi, %error, "interrupt line stuck");
        }
    }
}

struct Share {
    line: Arc<SharedLine>,
    asserted: Mutex<bool>,
}

impl Level for Share {
    fn set(&self, asserted: bool) {
        let mut mine = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *mine, asserted) != asserted {
            self.line.count(asserted);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // A device that leaves takes its interrupt along.
        self.set(false);
    }
}
