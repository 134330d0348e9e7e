//! `-incoming`: what a VM is restored from, and what no VM may have that is saved or restored.

use std::path::PathBuf;

use super::{DeviceDriver, MachineKind, MemoryBackendKind, NetBackend, Netdev, VmConfig};

/// `-incoming file:DIR`: the VM goes on from a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// The directory of the snapshot; absolute.
    pub dir: PathBuf,
    /// `mapped`: guest memory comes in as it is needed, and is shared with other VMs until it is written (default on); else it is read at
    /// the start.
    pub mapped: bool,
    /// `verify`: compare all of guest memory with its checksum before the start (default off).
    pub verify: bool,
    /// `identity=new`: this VM is another one than the one that was saved. Its NICs have the addresses of the command line, and a read-only disk may
    /// be another one, or lie in a slot that was empty; the guest is told of both (default: it is the same VM).
    pub fresh: bool,
}

/// Why a netdev cannot be part of a snapshot.
fn netdev_exclusion(netdev: &Netdev) -> Option<&'static str> {
    match &netdev.backend {
        NetBackend::Tap { vhost: true, .. } => Some("vhost=on"),
        NetBackend::VhostUser { .. } => Some("vhost-user"),
        NetBackend::Tap { .. } => None,
    }
}

impl VmConfig {
    /// The option or device, if there is one, that keeps this VM from being saved or restored.
    pub fn snapshot_exclusion(&self) -> Option<String> {
        let memory = &self.memory;
        let backend = memory.backends.first();
        if !matches!(self.machine.kind, MachineKind::Microvm | MachineKind::Q35) {
            return Some(format!("-machine {}", self.machine.kind));
        }
        if self.machine.mem_share {
            return Some("-machine mem-share=on".into());
        }
        if memory.path.is_some() {
            return Some("-mem-path".into());
        }
        if let Some(backend) = backend.filter(|b| b.share || b.kind != MemoryBackendKind::Ram) {
            return Some(format!("memory object \"{}\": guest memory in a file, or shared", backend.id));
        }
        // A reset after a restore takes new pages when nothing may choose nodes any more.
        if let Some(backend) = backend.filter(|b| b.placement.is_some()) {
            return Some(format!("memory object \"{}\": a policy for the host's nodes", backend.id));
        }
        self.devices.iter().find_map(|device| {
            let what = match &device.driver {
                DeviceDriver::VirtioNet { netdev, .. } => {
                    netdev_exclusion(self.netdevs.iter().find(|n| n.id == *netdev)?)?
                }
                driver @ (DeviceDriver::VirtioBalloon { .. }
                | DeviceDriver::VirtioMem { .. }
                | DeviceDriver::VirtioPmem { .. }
                | DeviceDriver::VfioPci { .. }
                | DeviceDriver::VhostVsock { .. }
                | DeviceDriver::VhostUserFs { .. }
                | DeviceDriver::VhostUserBlk { .. }) => driver.name(),
                _ => return None,
            };
            Some(format!("device \"{}\": {what}", device.id))
        })
    }
}
