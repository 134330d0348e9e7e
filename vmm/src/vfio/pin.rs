//! The interrupt pin of a device of the host: from the device to the guest, and the guest's answer back, without an exit.
//!
//! ```text
//! device ──VFIO──▶ event ──irqfd──▶ KVM raises the line          VFIO masks the device's pin as it tells of it
//! device ◀──VFIO── answer ◀──────── KVM: end of interrupt        the line goes down; VFIO unmasks, and tells again if the device still pulls
//! ```

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::host::HostDevice;
use super::ioctl::{self, Irq};

/// A pin that is in use.
pub(super) struct Pin {
    event: EventFd,
    /// Written by KVM, read by VFIO.
    answer: EventFd,
    host: Arc<HostDevice>,
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Pin {
    /// Connects it to the line at `gsi`. The device has no other interrupts.
    pub(super) fn connect(host: &Arc<HostDevice>, vm: &Arc<VmFd>, gsi: u32) -> io::Result<Self> {
        let new = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let (event, answer) = (new()?, new()?);
        vm.register_irqfd_with_resample(&event, &answer, gsi)?;
        // From here on its end undoes everything.
        let pin = Self { event, answer, host: Arc::clone(host), vm: Arc::clone(vm), gsi };
        pin.host.with(|device| {
            ioctl::lead(device, Irq::Intx, 0, pin.event.as_raw_fd())?;
            ioctl::unmask_by(device, pin.answer.as_raw_fd())
        })?;
        Ok(pin)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Err(error) = self.host.with(|device| ioctl::disable(device, Irq::Intx)) {
            tracing::warn!(device = %self.host.address(), "its pin stays on: {error}");
        }
        // The line goes down with it.
        let _ = self.vm.unregister_irqfd(&self.event, self.gsi);
    }
}
