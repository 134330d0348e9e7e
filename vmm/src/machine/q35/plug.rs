//! Hot-plug on a q35: named back ends, devices that come into root ports and leave them. The slot's own protocol with the guest is the
//! port's (`pci::slot`).
//!
//! ```text
//! back end:  add ──▶ idle ──plug──▶ used ──the device has left──▶ idle ──remove──▶ (unknown)
//! device:    plug ──▶ in its slot ──device_del──▶ asked ──the guest lets it go──▶ off the bus ──device_left──▶ gone
//! ```
//!
//! A back end is opened when it is added, so that its errors come where a client can name their cause; after its device has left, the next
//! one opens it again.

use std::collections::HashMap;

use super::bus::{Body, End, HOST_DEVICE, Seat, disk_queues};
use super::cpus::{self, HotCpus};
use super::served::Sockets;
use super::{Departure, Q35};
use crate::block::Disk;
use crate::config::{BackingImage, Drive, HostAddress, Netdev, PciAddr, ROOT_BUS, VmConfig};
use crate::event::LoopHandle;
use crate::inherit::Inherited;
use crate::machine::backends::{forget_descriptors, is_spent, open_disk, open_netdev, replace_tap};
use crate::machine::hotplug::{NewDevice, Refusal, SlotKind};
use crate::machine::plugging::{BlockDevice, Hotplug, HotplugError, NetDevice, PlugError, Plugged};
use crate::net::{self, Backend};
use crate::virtio::blk::{self, Blk, BlkOptions};
use crate::virtio::net::{Net, NetOptions};
use crate::virtio::pci::Place;
use crate::virtio::{VirtioDevice, Worker, vhost_user};

/// Named back ends of one kind: more could never be plugged, and each holds a file.
const BACKENDS_MAX: usize = 64;
/// A disk that another process serves.
const SERVED_DISK: &str = "vhost-user-blk-pci";
/// Of a queue of a device that is plugged.
const QUEUE_SIZE: u16 = 256;

struct Named<C> {
    config: C,
    /// The device on it.
    user: Option<String>,
}

/// Named back ends of one kind.
struct Shelf<C>(Vec<(String, Named<C>)>);

impl<C> Shelf<C> {
    fn find(&self, name: &str) -> Option<&Named<C>> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, named)| named)
    }

    fn check_new(&self, name: &str, kind: SlotKind) -> Result<(), Refusal> {
        if self.find(name).is_some() {
            return Err(Refusal::Registered(name.to_owned()));
        }
        if self.0.len() >= BACKENDS_MAX { Err(Refusal::TooMany(kind)) } else { Ok(()) }
    }

    fn add(&mut self, name: &str, config: C) {
        self.0.push((name.to_owned(), Named { config, user: None }));
    }

    fn remove(&mut self, name: &str, missing: Refusal) -> Result<(), Refusal> {
        match self.find(name) {
            None => Err(missing),
            Some(Named { user: Some(device), .. }) => {
                Err(Refusal::InUse { name: name.to_owned(), device: device.clone() })
            }
            Some(_) => {
                self.0.retain(|(n, _)| n != name);
                Ok(())
            }
        }
    }

    /// The configuration of a back end that no device uses.
    fn idle(&self, name: &str) -> Result<Option<&C>, Refusal> {
        match self.find(name) {
            None => Ok(None),
            Some(Named { user: Some(device), .. }) => {
                Err(Refusal::InUse { name: name.to_owned(), device: device.clone() })
            }
            Some(named) => Ok(Some(&named.config)),
        }
    }

    fn config_mut(&mut self, name: &str) -> Option<&mut C> {
        self.0.iter_mut().find(|(n, _)| n == name).map(|(_, named)| &mut named.config)
    }

    fn use_by(&mut self, name: &str, device: Option<&str>) {
        if let Some((_, named)) = self.0.iter_mut().find(|(n, _)| n == name) {
            named.user = device.map(str::to_owned);
        }
    }
}

/// All back ends that have names.
pub(super) struct Shelves {
    drives: Shelf<Drive>,
    nets: Shelf<Netdev>,
    /// Open, and on no device.
    disks: HashMap<String, Disk>,
    backends: HashMap<String, Backend>,
    /// Of other processes that serve devices.
    sockets: Sockets,
    /// NICs so far: their addresses count on.
    nics: u8,
    /// Of a disk that does not say how many.
    disk_queues: u16,
}

impl Shelves {
    /// As the command line has it.
    pub(super) fn new(config: &VmConfig, seats: &[Seat], main_loop: LoopHandle) -> Self {
        let (mut drives, mut nets) = (Shelf(Vec::new()), Shelf(Vec::new()));
        config.drives.iter().for_each(|drive| drives.add(&drive.id, drive.clone()));
        config.netdevs.iter().for_each(|netdev| nets.add(&netdev.id, netdev.clone()));
        let sockets = Sockets::new(config, main_loop);
        let mut nics = 0;
        for seat in seats {
            match &seat.end {
                End::Disk(node, _) => drives.use_by(node, Some(&seat.id)),
                End::Nic(netdev, _) => {
                    nets.use_by(netdev, Some(&seat.id));
                    nets.config_mut(netdev).into_iter().for_each(forget_descriptors);
                    nics += 1;
                }
                End::ServedNic(netdev, _) => {
                    nets.use_by(netdev, Some(&seat.id));
                    nics += 1;
                }
                End::Served(_) | End::Other => {}
            }
        }
        let disk_queues = disk_queues(&config.smp);
        Self { drives, nets, disks: HashMap::new(), backends: HashMap::new(), sockets, nics, disk_queues }
    }

    /// The images of a node that no device uses, nearest first. It is only read from now on, so it gives its own hold of the image up.
    fn lay_under(&mut self, node: &str) -> Result<Vec<BackingImage>, Refusal> {
        let drive = self.drives.idle(node)?.ok_or_else(|| Refusal::NoDrive(node.to_owned()))?;
        let mut images = vec![BackingImage { file: drive.file.clone(), format: drive.format }];
        images.extend_from_slice(&drive.backing);
        self.disks.remove(node);
        Ok(images)
    }

    fn release(&mut self, end: &End) {
        match end {
            End::Disk(node, _) => self.drives.use_by(node, None),
            End::Nic(netdev, _) | End::ServedNic(netdev, _) => self.nets.use_by(netdev, None),
            End::Served(chardev) => self.sockets.use_by(chardev, None),
            End::Other => {}
        }
    }

    /// Block nodes: those that devices use first.
    pub(super) fn block_devices(&self, seats: &[Seat]) -> Vec<BlockDevice> {
        let used = seats.iter().filter_map(|seat| {
            let End::Disk(node, port) = &seat.end else { return None };
            let drive = self.drives.find(node)?.config.clone();
            Some(BlockDevice { device: Some(seat.id.clone()), drive, stats: port.stats() })
        });
        let idle = self.drives.0.iter().filter(|(_, named)| named.user.is_none());
        let idle = idle.map(|(_, named)| BlockDevice {
            device: None,
            drive: named.config.clone(),
            stats: blk::Stats::default(),
        });
        used.chain(idle).collect()
    }
}

impl Shelves {
    /// Network back ends: those that devices use first.
    pub(super) fn net_devices(&self, seats: &[Seat]) -> Vec<NetDevice> {
        let used = seats.iter().filter_map(|seat| {
            let (name, mac) = match &seat.end {
                End::Nic(name, port) => (name, port.mac()),
                End::ServedNic(name, mac) => (name, *mac),
                End::Disk(..) | End::Served(_) | End::Other => return None,
            };
            let netdev = self.nets.find(name)?.config.clone();
            Some(NetDevice { device: Some((seat.id.clone(), seat.driver, mac)), netdev })
        });
        let idle = self.nets.0.iter().filter(|(_, named)| named.user.is_none());
        let idle = idle.map(|(_, named)| NetDevice { device: None, netdev: named.config.clone() });
        used.chain(idle).collect()
    }
}

impl Q35 {
    /// Adds, removes, plugs or unplugs. After an error everything is as before.
    pub(in crate::machine) fn hotplug(&mut self, request: Hotplug) -> Result<Plugged, HotplugError> {
        let shelves = &mut self.shelves;
        match request {
            Hotplug::AddDrive { mut drive, node, files } => {
                shelves.drives.check_new(&drive.id, SlotKind::Block)?;
                if let Some(node) = node {
                    drive.backing.extend(shelves.lay_under(&node)?);
                }
                let disk = open_disk(&drive, files, &self.inherited)?;
                shelves.disks.insert(drive.id.clone(), disk);
                shelves.drives.add(&drive.id.clone(), *drive);
            }
            Hotplug::RemoveDrive(name) => {
                shelves.drives.remove(&name, Refusal::NoDrive(name.clone()))?;
                shelves.disks.remove(&name);
            }
            Hotplug::AddChardev { id, path } => shelves.sockets.add(id, path)?,
            Hotplug::RemoveChardev(id) => shelves.sockets.remove(&id)?,
            Hotplug::AddNetdev { mut netdev, fds, vhost_fds } => {
                shelves.nets.check_new(&netdev.id, SlotKind::Net)?;
                if let Some(chardev) = netdev.vhost_user_chardev().map(str::to_owned) {
                    shelves.sockets.check(&chardev)?;
                    shelves.sockets.use_by(&chardev, Some(format!("netdev {}", netdev.id)));
                    shelves.nets.add(&netdev.id.clone(), netdev);
                    return Ok(Plugged::Done);
                }
                let backend = open_netdev(&mut netdev, fds, vhost_fds, &self.inherited)?;
                shelves.backends.insert(netdev.id.clone(), backend);
                shelves.nets.add(&netdev.id.clone(), netdev);
            }
            Hotplug::RemoveNetdev(name) => {
                let netdev = shelves.nets.find(&name).map(|named| named.config.vhost_user_chardev());
                let chardev = netdev.flatten().map(str::to_owned);
                shelves.nets.remove(&name, Refusal::NoNetdev(name.clone()))?;
                shelves.backends.remove(&name);
                if let Some(chardev) = chardev {
                    shelves.sockets.use_by(&chardev, None);
                }
            }
            Hotplug::ReplaceTap { id, ifname, path } => {
                let (name, port) = nic(&self.seats, &id)?;
                let netdev = shelves.nets.config_mut(name).ok_or(Refusal::NoNic(id))?;
                replace_tap(netdev, port, ifname, path, &self.inherited)?;
            }
            Hotplug::SetLink { id, up } => nic(&self.seats, &id)?.1.set_link(up)?,
            Hotplug::Plug(device) if device.driver == cpus::DRIVER => {
                self.plug_cpu(&device)?;
                return Ok(Plugged::CpusResized);
            }
            Hotplug::Plug(device) => self.plug(&device)?,
            Hotplug::Unplug(id) => {
                let cpu = self.hot_cpus.as_ref().map_or(Ok(false), |cpus| cpus.ask_removal(&id))?;
                if cpu {
                    return Ok(Plugged::CpusResized);
                }
                self.ask_removal(&id)?;
            }
        }
        Ok(Plugged::Done)
    }

    fn plug_cpu(&mut self, new: &NewDevice) -> Result<(), HotplugError> {
        if self.is_taken(&new.id) {
            return Err(PlugError::CpuDeviceExists(new.id.clone()).into());
        }
        if !self.wiring.standard.numa.is_empty() {
            return Err(PlugError::Numa.into());
        }
        let cpus = self.hot_cpus.as_mut().ok_or(PlugError::NoCpuSlots)?;
        cpus.plug(new, &self.vm, &self.wiring.topology, &mut self.vcpus)
    }

    /// Whether a device has this name.
    fn is_taken(&self, id: &str) -> bool {
        self.seats.iter().any(|s| s.id == id)
            || self.slots.iter().any(|s| s.id == id)
            || self.hot_cpus.iter().flat_map(HotCpus::ids).any(|known| known == id)
    }

    /// Devices by id with their drivers, root ports first.
    pub(in crate::machine) fn devices(&self) -> Vec<(String, &'static str)> {
        let ports = self.slots.iter().map(|slot| (slot.id.clone(), "pcie-root-port"));
        let seats = self.seats.iter().map(|seat| (seat.id.clone(), seat.driver));
        let cpus = self.hot_cpus.iter().flat_map(HotCpus::ids);
        ports.chain(seats).chain(cpus.map(|id| (id.to_owned(), cpus::DRIVER))).collect()
    }

    fn plug(&mut self, new: &NewDevice) -> Result<(), HotplugError> {
        let (kind, driver) = match new.driver.as_str() {
            "virtio-blk-pci" => ("blk", "virtio-blk-pci"),
            "virtio-net-pci" => ("net", "virtio-net-pci"),
            SERVED_DISK => ("blk", SERVED_DISK),
            HOST_DEVICE => ("vfio", HOST_DEVICE),
            "virtio-mem-pci" => return Err(PlugError::Memory("virtio-mem-pci").into()),
            "virtio-pmem-pci" => return Err(PlugError::Memory("virtio-pmem-pci").into()),
            other => return Err(PlugError::Driver(other.to_owned()).into()),
        };
        if self.is_taken(&new.id) {
            return Err(PlugError::DeviceExists(new.id.clone()).into());
        }
        let wrong = |why: String| PlugError::Place { kind, why };
        let addr = new.addr.as_ref().ok_or(PlugError::NoAddr(kind))?;
        let addr: PciAddr = addr.parse().map_err(|()| wrong(format!("addr \"{addr}\" is none")))?;
        let bus = new.bus.as_ref().ok_or_else(|| wrong("bus is missing: name a root port".to_owned()))?;
        if bus == ROOT_BUS {
            return Err(PlugError::RootBus.into());
        }
        let slot = self.slots.iter().find(|slot| slot.id == *bus);
        let slot = slot.ok_or_else(|| wrong(format!("bus {bus} not found")))?;
        if addr != (PciAddr { slot: 0, function: 0 }) {
            return Err(PlugError::Function(addr.slot << 3 | addr.function).into());
        }
        // One that the guest has let go and that has not ended yet still has its name and its back end.
        let occupied = || wrong(format!("{bus} is occupied"));
        if slot.port.device().is_some() || self.seats.iter().any(|s| s.port.as_deref() == Some(bus)) {
            return Err(occupied().into());
        }
        let (place, id) = (Place { behind_port: true, multifunction: false }, new.id.clone());
        let (body, end) = if driver == HOST_DEVICE {
            let host = new.host.as_deref().unwrap_or_default();
            let host: HostAddress = host.parse().map_err(|()| PlugError::Host(host.to_owned()))?;
            if let Some(other) = self.device_memory.device() {
                return Err(PlugError::BesideMemory(new.id.clone(), other.to_owned()).into());
            }
            let same = |seat: &&Seat| matches!(&seat.body, Body::Host(other) if *other.address() == host);
            if let Some(seat) = self.seats.iter().find(same) {
                return Err(PlugError::HostTaken(host, seat.id.clone()).into());
            }
            (self.fixtures.take(&host, slot.addr, place)?, End::Other)
        } else {
            let worker = self.workers.find(new.iothread.as_ref());
            let worker =
                worker.ok_or_else(|| Refusal::NoIothread(new.iothread.clone().unwrap_or_default()))?;
            let (device, end) = self.shelves.take(new, kind, &self.inherited, worker.clone())?;
            (Body::Virtio(self.fixtures.connect(device, slot.addr, place)), end)
        };
        slot.port.plug(body.function()).map_err(|_| occupied())?;
        match &end {
            End::Disk(node, _) => self.shelves.drives.use_by(node, Some(&id)),
            End::Nic(netdev, _) | End::ServedNic(netdev, _) => self.shelves.nets.use_by(netdev, Some(&id)),
            End::Served(chardev) => self.shelves.sockets.use_by(chardev, Some(format!("device {id}"))),
            End::Other => {}
        }
        let addr = slot.addr;
        self.seats.push(Seat { id, driver, body, end, addr, port: Some(bus.clone()) });
        Ok(())
    }

    fn ask_removal(&self, id: &str) -> Result<(), PlugError> {
        let Some(seat) = self.seats.iter().find(|s| s.id == id) else {
            let is_port = self.slots.iter().any(|s| s.id == id);
            return Err(if is_port { PlugError::Fixed } else { PlugError::NoDevice });
        };
        let name = seat.port.as_ref().ok_or(PlugError::Fixed)?;
        let slot = self.slots.iter().find(|slot| slot.id == *name).ok_or(PlugError::NoDevice)?;
        Ok(slot.port.ask_removal()?)
    }

    /// The guest has let this go: ends it, and returns its name.
    pub(in crate::machine) fn device_left(&mut self, departure: &Departure) -> Option<String> {
        let port = match departure {
            Departure::Cpu(index) => {
                return self.hot_cpus.as_mut()?.left(*index, &self.wiring.topology, &mut self.vcpus);
            }
            Departure::Port(port) => port,
        };
        let slot = self.slots.iter().find(|slot| slot.id == *port)?;
        if slot.port.device().is_some() {
            return None;
        }
        let seat = self.seats.remove(self.seats.iter().position(|s| s.port.as_deref() == Some(port))?);
        if let Err(error) = seat.body.shut_down() {
            tracing::error!(device = seat.id, "data that the guest has written may be lost: {error}");
        }
        // No file stays open, and no tap stays taken, whoever may still hold the device for a moment.
        let closed = match &seat.end {
            End::Disk(_, port) => port.eject().map_err(HotplugError::from),
            End::Nic(_, port) => port.eject().map_err(HotplugError::from),
            // Its connection has ended when it was shut down.
            End::Served(_) | End::ServedNic(..) | End::Other => Ok(()),
        };
        if let Err(error) = closed {
            tracing::error!(device = seat.id, "{error}");
        }
        self.shelves.release(&seat.end);
        Some(seat.id)
    }
}

/// The netdev and the port of a NIC, by the name of either.
fn nic<'a>(seats: &'a [Seat], id: &str) -> Result<(&'a str, &'a crate::virtio::net::Port), Refusal> {
    for seat in seats {
        match &seat.end {
            End::Nic(netdev, port) if seat.id == id || netdev == id => return Ok((netdev, port)),
            End::ServedNic(netdev, _) if seat.id == id || netdev == id => {
                return Err(Refusal::Served(id.to_owned()));
            }
            _ => {}
        }
    }
    Err(Refusal::NoNic(id.to_owned()))
}

impl Shelves {
    /// Makes the device that a client has described, from a back end that no other uses.
    fn take(
        &mut self,
        new: &NewDevice,
        kind: &str,
        inherited: &Inherited,
        worker: Worker,
    ) -> Result<(Box<dyn VirtioDevice>, End), HotplugError> {
        if new.driver == SERVED_DISK {
            let chardev = new.chardev.clone().ok_or(PlugError::NoChardevGiven)?;
            self.sockets.check(&chardev)?;
            let model = vhost_user::Model::Blk { queues: new.num_queues.unwrap_or(1) };
            let queue_size = new.queue_size.unwrap_or(QUEUE_SIZE);
            let disk = self.sockets.open(&new.id, &chardev, model, queue_size)?;
            return Ok((Box::new(disk), End::Served(chardev)));
        }
        if kind == "blk" {
            let node = new.drive.as_ref().unwrap_or(&new.id).clone();
            let drive = self.drives.idle(&node)?.ok_or(PlugError::NoDrive)?;
            let disk = match self.disks.remove(&node) {
                Some(disk) => disk,
                None => Disk::open(drive, inherited)?,
            };
            let (backend, serial, read_only) = (Some(disk), new.serial.clone(), drive.readonly);
            let queues = new.num_queues.unwrap_or(self.disk_queues);
            let queue_size = new.queue_size.unwrap_or(QUEUE_SIZE);
            let blk = Blk::new(BlkOptions { backend, serial, read_only, queue_size, queues, worker });
            let end = End::Disk(node, blk.port());
            return Ok((Box::new(blk), end));
        }
        let name = new.netdev.as_ref().unwrap_or(&new.id).clone();
        let netdev = self.nets.idle(&name)?.ok_or_else(|| PlugError::NoNetdev(name.clone()))?;
        if let Some(chardev) = netdev.vhost_user_chardev() {
            let mac = new.mac.unwrap_or_else(|| net::default_mac(self.nics));
            let queue_size = new.queue_size.unwrap_or(QUEUE_SIZE);
            let pairs = if new.multi_queue { netdev.queue_pairs() } else { 1 };
            let model = vhost_user::Model::Net { mac, pairs };
            let nic = self.sockets.open(&new.id, chardev, model, queue_size)?;
            self.nics = self.nics.wrapping_add(1);
            return Ok((Box::new(nic), End::ServedNic(name, mac)));
        }
        let backend = match (self.backends.remove(&name), self.nets.config_mut(&name)) {
            (Some(backend), _) => backend,
            (None, Some(netdev)) if !is_spent(netdev) => {
                let opened = Backend::open(netdev, inherited);
                forget_descriptors(netdev);
                opened?
            }
            (None, _) => return Err(Refusal::DescriptorsGone(name).into()),
        };
        let mac = new.mac.unwrap_or_else(|| net::default_mac(self.nics));
        self.nics = self.nics.wrapping_add(1);
        let (multi_queue, queue_size) = (new.multi_queue, new.queue_size.unwrap_or(QUEUE_SIZE));
        let options = NetOptions { backend: Some(backend), mac, multi_queue, queue_size, worker };
        let nic = Net::new(options);
        let end = End::Nic(name, nic.port());
        Ok((Box::new(nic), end))
    }
}
