//! Doorbells of virtio devices as KVM ioeventfds: the driver's write is answered in the kernel.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::Doorbell;

/// Attaches descriptors to writes of a queue's number.
pub(super) struct KvmDoorbell(pub(super) Arc<VmFd>);

impl Doorbell for KvmDoorbell {
    fn attach(&self, addr: u64, queue: u16, fd: &EventFd) -> io::Result<()> {
        // The register is four bytes wide (virtio 1.2 §4.2.2), and so is the value compared.
        Ok(self.0.register_ioevent(fd, &IoEventAddress::Mmio(addr), u32::from(queue))?)
    }

    fn detach(&self, addr: u64, queue: u16, fd: &EventFd) -> io::Result<()> {
        Ok(self.0.unregister_ioevent(fd, &IoEventAddress::Mmio(addr), u32::from(queue))?)
    }
}

/// Attaches descriptors to writes of anything: on PCI each queue has an address of its own, and KVM need not look at the instruction.
pub(super) struct KvmPciDoorbell(pub(super) Arc<VmFd>);

impl Doorbell for KvmPciDoorbell {
    fn attach(&self, addr: u64, _: u16, fd: &EventFd) -> io::Result<()> {
        Ok(self.0.register_ioevent(fd, &IoEventAddress::Mmio(addr), NoDatamatch)?)
    }

    fn detach(&self, addr: u64, _: u16, fd: &EventFd) -> io::Result<()> {
        Ok(self.0.unregister_ioevent(fd, &IoEventAddress::Mmio(addr), NoDatamatch)?)
    }
}
