//! What devices that another process serves (vhost-user) need of the rest of a VM: a socket of their own, and guest memory that can be
//! shared. Pure.

use super::invalid::bad;
use super::{
    ChardevKind, Device, DeviceDriver, InvalidConfig, MachineKind, MemoryBackend, MemoryBackendKind,
    NetBackend, Netdev, VmConfig,
};

/// Most bytes of a file system's tag (virtio 1.2 §5.11.4).
const TAG_MAX: usize = 36;

impl Netdev {
    /// The chardev, of a netdev that another process serves.
    pub fn vhost_user_chardev(&self) -> Option<&str> {
        match &self.backend {
            NetBackend::VhostUser { chardev, .. } => Some(chardev),
            NetBackend::Tap { .. } => None,
        }
    }

    /// Pairs of queues that it has, of which a device uses several with `mq=on`.
    pub fn queue_pairs(&self) -> u16 {
        match &self.backend {
            NetBackend::Tap { queues, .. } | NetBackend::VhostUser { queues, .. } => *queues,
        }
    }
}

impl VmConfig {
    /// The chardev through which another process serves a device of this driver.
    pub fn vhost_user_chardev<'a>(&'a self, driver: &'a DeviceDriver) -> Option<&'a str> {
        match driver {
            DeviceDriver::VhostUserFs { chardev, .. } | DeviceDriver::VhostUserBlk { chardev, .. } => {
                Some(chardev)
            }
            DeviceDriver::VirtioNet { netdev, .. } => {
                self.netdevs.iter().find(|n| n.id == *netdev)?.vhost_user_chardev()
            }
            _ => None,
        }
    }

    /// Whether a chardev is such a process's: it carries no characters.
    pub fn is_vhost_user(&self, chardev: &str) -> bool {
        let devices = self.devices.iter().filter_map(|d| self.vhost_user_chardev(&d.driver));
        devices.chain(self.netdevs.iter().filter_map(Netdev::vhost_user_chardev)).any(|id| id == chardev)
    }

    /// Whether devices that other processes serve may come while the VM runs.
    pub fn may_get_vhost_user(&self) -> bool {
        self.machine.kind == MachineKind::Q35 && self.memory_is_shared() && !self.monitors.is_empty()
    }

    /// Whether what a device brings can be given to another process. `-mem-path` is not for it.
    pub fn shares_device_memory(&self, object: &MemoryBackend) -> bool {
        object.share || self.machine.mem_share && !matches!(object.kind, MemoryBackendKind::File(_))
    }

    /// Whether another process can be given all of guest memory: it is that of a file, and writes go there.
    pub fn memory_is_shared(&self) -> bool {
        let (memory, backends) = (&self.memory, &self.memory.backends);
        let anonymous = |kind: &MemoryBackendKind| *kind == MemoryBackendKind::Ram && memory.path.is_none();
        let shared = |b: &MemoryBackend| b.share || self.machine.mem_share && anonymous(&b.kind);
        let ram = if backends.is_empty() { self.machine.mem_share } else { backends.iter().all(shared) };
        // Devices may be told to use what other devices bring.
        ram && self.device_memory.iter().all(|b| self.shares_device_memory(b))
    }
}

/// Checks all of them. That each chardev is there and has one user is checked with the chardevs.
pub(super) fn validate(config: &VmConfig) -> Result<(), InvalidConfig> {
    for Device { id, driver, .. } in &config.devices {
        let Some(chardev) = config.vhost_user_chardev(driver) else { continue };
        check_socket(config, &format!("device \"{id}\""), chardev)?;
        if !config.memory_is_shared() {
            return bad(format!(
                "device \"{id}\": another process serves it and needs guest memory: add mem-share=on to -machine"
            ));
        }
        if let DeviceDriver::VhostUserFs { tag, .. } = driver
            && !(1..=TAG_MAX).contains(&tag.len())
        {
            return bad(format!("device \"{id}\": tag={tag}: write 1 to {TAG_MAX} bytes"));
        }
    }
    for netdev in &config.netdevs {
        if let NetBackend::VhostUser { chardev, .. } = &netdev.backend {
            check_socket(config, &format!("netdev \"{}\"", netdev.id), chardev)?;
        }
    }
    Ok(())
}

fn check_socket(config: &VmConfig, user: &str, chardev: &str) -> Result<(), InvalidConfig> {
    match config.chardevs.iter().find(|c| c.id == chardev).map(|c| &c.kind) {
        Some(ChardevKind::UnixSocket { server: false, .. }) | None => Ok(()),
        Some(ChardevKind::UnixSocket { .. }) => bad(format!(
            "{user}: chardev \"{chardev}\": the back end is the server: leave out 'server' and 'nowait'"
        )),
        Some(_) => bad(format!(
            "{user}: chardev \"{chardev}\" is no unix socket, which a vhost-user back end needs: write socket,id={chardev},path=PATH"
        )),
    }
}
