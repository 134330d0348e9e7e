//! One vCPU as KVM knows it. `run` runs the guest on it, on a thread of its own; whoever sets or reads its state gets it while it is out of
//! the guest.

use kvm_ioctls::VcpuFd;

/// One vCPU.
pub struct Vcpu {
    pub(super) index: u8,
    pub(super) fd: VcpuFd,
}

impl Vcpu {
    pub(super) fn new(index: u8, fd: VcpuFd) -> Self {
        Self { index, fd }
    }

    /// For setting its state before it runs.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// From 0.
    pub fn index(&self) -> u8 {
        self.index
    }
}
