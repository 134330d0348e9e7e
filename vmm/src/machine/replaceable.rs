//! The replaceable slots of a running microvm: opens and closes back ends, and moves them into and out of the slots' ports.
//! What may follow what is in `hotplug`.
//!
//! A back end is opened when it is added, so that its errors come where a client can name their cause, and waits here until a device takes it.
//! After a device was refused, the next one opens it again.

use std::collections::HashMap;
use std::sync::Arc;

use super::backends::{forget_descriptors, is_spent, open_disk, open_netdev, replace_tap};
use super::hotplug::{NewDevice, Refusal, Removal, SlotKind, Table};
use super::plugging::{BlockDevice, Hotplug, HotplugError, NetDevice};
use super::seating::Seating;
use super::workers::Workers;
use crate::block::Disk;
use crate::config::{BackingImage, DeviceDriver, MICROVM_BLOCK_SLOTS, MICROVM_NET_SLOTS, VmConfig};
use crate::inherit::Inherited;
use crate::net::Backend;
use crate::virtio::net::NotInserted;
use crate::virtio::{blk, net};

/// The slots and what is or may come into them.
pub(super) struct Replaceable {
    table: Table,
    ports: Ports,
    /// Open, and in no slot.
    disks: HashMap<String, Disk>,
    /// Open, and in no slot.
    backends: HashMap<String, Backend>,
    inherited: Arc<Inherited>,
    workers: Workers,
}

/// The ports of all slots, in order.
#[derive(Default)]
pub(super) struct Ports {
    pub(super) blocks: Vec<Arc<blk::Port>>,
    pub(super) nets: Vec<Arc<net::Port>>,
}

impl Replaceable {
    /// As the command line has filled the slots.
    pub(super) fn new(
        config: &VmConfig,
        seating: &Seating,
        ports: Ports,
        inherited: Arc<Inherited>,
        workers: Workers,
    ) -> Result<Self, Refusal> {
        let (mut blocks, mut nets) = (0, 0);
        let plugged = config.devices.iter().filter_map(|device| {
            let (kind, slot, count, backend) = match &device.driver {
                DeviceDriver::VirtioBlk { drive, .. } => {
                    (SlotKind::Block, seating.block(blocks), &mut blocks, drive)
                }
                driver @ DeviceDriver::VirtioNet { netdev, .. }
                    if config.vhost_user_chardev(driver).is_none() =>
                {
                    (SlotKind::Net, seating.net(nets), &mut nets, netdev)
                }
                _ => return None,
            };
            *count += 1;
            Some((kind, slot, device.id.clone(), backend.clone()))
        });
        let mut table = Table::new(config, plugged)?;
        let used: Vec<String> = table.nets.plugged().map(|(_, _, netdev)| netdev.to_owned()).collect();
        for name in &used {
            table.nets.config_mut(name).into_iter().for_each(forget_descriptors);
        }
        Ok(Self { table, ports, disks: HashMap::new(), backends: HashMap::new(), inherited, workers })
    }

    pub(super) fn apply(&mut self, request: Hotplug) -> Result<(), HotplugError> {
        match request {
            Hotplug::AddDrive { mut drive, node, files } => {
                self.table.blocks.check_new(&drive.id)?;
                if let Some(node) = node {
                    drive.backing.extend(self.lay_under(&node)?);
                }
                let disk = open_disk(&drive, files, &self.inherited)?;
                let id = drive.id.clone();
                self.table.blocks.add(&id, *drive)?;
                self.disks.insert(id, disk);
            }
            Hotplug::RemoveDrive(name) => {
                self.table.blocks.remove(&name)?;
                self.disks.remove(&name);
            }
            Hotplug::AddChardev { .. } | Hotplug::RemoveChardev(_) => return Err(Refusal::NoChardevs.into()),
            Hotplug::AddNetdev { netdev, .. } if netdev.vhost_user_chardev().is_some() => {
                return Err(Refusal::NotReplaceable(netdev.id).into());
            }
            Hotplug::AddNetdev { mut netdev, fds, vhost_fds } => {
                self.table.nets.check_new(&netdev.id)?;
                let backend = open_netdev(&mut netdev, fds, vhost_fds, &self.inherited)?;
                let id = netdev.id.clone();
                self.table.nets.add(&id, netdev)?;
                self.backends.insert(id, backend);
            }
            Hotplug::RemoveNetdev(name) => {
                self.table.nets.remove(&name)?;
                self.backends.remove(&name);
            }
            Hotplug::ReplaceTap { id, ifname, path } => {
                let (netdev, port) = self.nic(&id)?;
                let port = Arc::clone(port);
                let netdev = self.table.nets.config_mut(&netdev).ok_or(Refusal::NoNic(id))?;
                replace_tap(netdev, &port, ifname, path, &self.inherited)?;
            }
            Hotplug::SetLink { id, up } => self.nic(&id)?.1.set_link(up)?,
            Hotplug::Plug(device) => self.plug(device)?,
            Hotplug::Unplug(id) => self.unplug(&id)?,
        }
        Ok(())
    }

    /// The netdev and the port of a NIC, by the name of either.
    fn nic(&self, id: &str) -> Result<(String, &Arc<net::Port>), Refusal> {
        let mut nics = self.table.nets.plugged();
        let found = nics.find(|(_, device, netdev)| *device == id || *netdev == id);
        let port = found.and_then(|(slot, _, netdev)| Some((netdev.to_owned(), self.ports.nets.get(slot)?)));
        port.ok_or_else(|| Refusal::NoNic(id.to_owned()))
    }

    /// The images of a node that no device uses, nearest first. It is only read from now on, so it gives its own hold of the image up.
    fn lay_under(&mut self, node: &str) -> Result<Vec<BackingImage>, Refusal> {
        let drive = self.table.blocks.idle(node)?;
        let mut images = vec![BackingImage { file: drive.file.clone(), format: drive.format }];
        images.extend_from_slice(&drive.backing);
        self.disks.remove(node);
        Ok(images)
    }

    fn plug(&mut self, device: NewDevice) -> Result<(), HotplugError> {
        let plan = self.table.plan(&device)?;
        let worker = self.workers.find(device.iothread.as_ref());
        let worker =
            worker.ok_or_else(|| Refusal::NoIothread(device.iothread.clone().unwrap_or_default()))?;
        match plan.kind {
            SlotKind::Block => {
                let port = self.ports.blocks.get(plan.slot).ok_or(Refusal::NoSuchSlot(plan.kind))?;
                let disk = match self.disks.remove(&plan.backend) {
                    Some(disk) => disk,
                    None => {
                        let drive =
                            self.table.blocks.config(&plan.backend).ok_or(Refusal::NoConfiguration)?;
                        Disk::open(drive, &self.inherited)?
                    }
                };
                port.serve_on(worker)?;
                port.insert(disk, device.serial)?;
                self.table.blocks.plug(&device.id, &plan.backend, plan.slot)?;
            }
            SlotKind::Net => {
                let port = self.ports.nets.get(plan.slot).ok_or(Refusal::NoSuchSlot(plan.kind))?;
                let backend = match self.backends.remove(&plan.backend) {
                    Some(backend) => backend,
                    None => {
                        let netdev =
                            self.table.nets.config_mut(&plan.backend).ok_or(Refusal::NoConfiguration)?;
                        if is_spent(netdev) {
                            return Err(Refusal::DescriptorsGone(plan.backend).into());
                        }
                        let opened = Backend::open(netdev, &self.inherited);
                        forget_descriptors(netdev);
                        opened?
                    }
                };
                let moved = port.serve_on(worker).map_err(HotplugError::from);
                let inserted = match moved {
                    Ok(()) => port.insert(backend, device.mac),
                    Err(error) => {
                        self.backends.insert(plan.backend, backend);
                        return Err(error);
                    }
                };
                if let Err(NotInserted { error, backend }) = inserted {
                    // For the next try: descriptors that a client has sent cannot be opened again.
                    self.backends.extend(backend.map(|backend| (plan.backend, backend)));
                    return Err(error.into());
                }
                self.table.nets.plug(&device.id, &plan.backend, plan.slot)?;
            }
        }
        Ok(())
    }

    fn unplug(&mut self, id: &str) -> Result<(), HotplugError> {
        match self.table.removal(id)? {
            Removal::Slot(SlotKind::Block, slot) => {
                let left = self.ports.blocks.get(slot).map_or(Ok(()), |port| port.eject());
                // After a flush that failed the disk has left all the same.
                if matches!(left, Ok(()) | Err(blk::PortError::Flush(..))) {
                    self.table.blocks.unplug(slot);
                }
                left?;
            }
            Removal::Slot(SlotKind::Net, slot) => {
                if let Some(port) = self.ports.nets.get(slot) {
                    port.eject()?;
                }
                self.table.nets.unplug(slot);
            }
            Removal::Backend(SlotKind::Block) => {
                self.table.blocks.remove(id)?;
                self.disks.remove(id);
            }
            Removal::Backend(SlotKind::Net) => {
                self.table.nets.remove(id)?;
                self.backends.remove(id);
            }
        }
        Ok(())
    }

    /// The device in each slot, disks first.
    pub(super) fn occupants(&self) -> Vec<Option<String>> {
        let mut devices = vec![None; MICROVM_BLOCK_SLOTS + MICROVM_NET_SLOTS];
        let nets = self.table.nets.plugged().map(|(slot, id, _)| (MICROVM_BLOCK_SLOTS + slot, id));
        for (slot, id) in self.table.blocks.plugged().map(|(slot, id, _)| (slot, id)).chain(nets) {
            if let Some(place) = devices.get_mut(slot) {
                *place = Some(id.to_owned());
            }
        }
        devices
    }

    /// All devices of the machine with their drivers.
    pub(super) fn devices(&self) -> Vec<(String, &'static str)> {
        self.table.devices()
    }

    /// Network back ends: those in slots first, in their order.
    pub(super) fn net_devices(&self) -> Vec<NetDevice> {
        let nets = &self.table.nets;
        let mut list = Vec::new();
        for (slot, device, name) in nets.plugged() {
            if let (Some(netdev), Some(port)) = (nets.config(name), self.ports.nets.get(slot)) {
                let device = Some((device.to_owned(), "virtio-net-device", port.mac()));
                list.push(NetDevice { device, netdev: netdev.clone() });
            }
        }
        for (name, netdev) in nets.live() {
            if !nets.plugged().any(|(_, _, used)| used == name) {
                list.push(NetDevice { device: None, netdev: netdev.clone() });
            }
        }
        list
    }

    /// Block nodes: those in slots first, in their order.
    pub(super) fn block_devices(&self) -> Vec<BlockDevice> {
        let blocks = &self.table.blocks;
        let plugged: Vec<(usize, &str, &str)> = blocks.plugged().collect();
        let mut list = Vec::new();
        for (slot, device, node) in &plugged {
            if let (Some(drive), Some(port)) = (blocks.config(node), self.ports.blocks.get(*slot)) {
                let (device, drive) = (Some((*device).to_owned()), drive.clone());
                list.push(BlockDevice { device, drive, stats: port.stats() });
            }
        }
        for (name, drive) in blocks.live() {
            if !plugged.iter().any(|(_, _, node)| *node == name) {
                list.push(BlockDevice { device: None, drive: drive.clone(), stats: blk::Stats::default() });
            }
        }
        list
    }
}
