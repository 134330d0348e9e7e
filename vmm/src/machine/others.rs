//! Devices besides disks and NICs: how each is made from its configuration, and the handles that the machine keeps of them.

use std::collections::HashMap;
use std::sync::Arc;

use super::MachineError;
use super::workers::no_such;
use crate::chardev::CharBackend;
use crate::config::{ChardevKind, DeviceDriver, MICROVM_NET_SLOTS, Netdev, SerialPort, VmConfig};
use crate::event::LoopHandle;
use crate::inherit::Inherited;
use crate::memory::DeviceMemory;
use crate::net;
use crate::virtio::balloon::{self, Balloon, BalloonOptions};
use crate::virtio::console::{Console, PortOptions};
use crate::virtio::mem::{self, Mem, MemOptions};
use crate::virtio::pmem::{Pmem, PmemOptions};
use crate::virtio::rng::{Rng, RngOptions, Source};
use crate::virtio::vhost_user::{Model, VhostUser, VhostUserOptions};
use crate::virtio::vsock::{Vsock, VsockOptions};
use crate::virtio::{VirtioDevice, Worker};

/// Entries of each queue of a file system, as QEMU has it.
const FS_QUEUE: u16 = 128;

/// The option that says what such memory is.
const MEMORY_OBJECT: &str = "-object memory-backend-…";

/// The address of a NIC that another process serves.
pub(super) fn served_mac(config: &VmConfig, id: &str, wanted: Option<[u8; 6]>) -> [u8; 6] {
    // By default it is behind those of the NICs that are not served so, however many there are.
    let nics = config.devices.iter().filter(|d| matches!(d.driver, DeviceDriver::VirtioNet { .. }));
    let number = nics.clone().position(|d| d.id == id).unwrap_or(0) + MICROVM_NET_SLOTS.max(nics.count());
    wanted.unwrap_or_else(|| net::default_mac(number as u8))
}

/// What they are made from, and what the machine keeps of them.
pub(super) struct Others {
    /// Host ends by the name of their `-chardev`.
    pub(super) chardevs: HashMap<String, Arc<dyn CharBackend>>,
    pub(super) main_loop: LoopHandle,
    pub(super) balloon: Option<Arc<balloon::Port>>,
    /// Memory that they bring.
    pub(super) memory: DeviceMemory,
    /// Those that hand it out, by id.
    pub(super) mems: Vec<(String, Arc<mem::Port>)>,
}

impl Others {
    /// Makes the device `id`, served by `worker`.
    pub(super) fn make(
        &mut self,
        id: &str,
        driver: &DeviceDriver,
        config: &VmConfig,
        inherited: &Inherited,
        worker: &Worker,
    ) -> Result<Box<dyn VirtioDevice>, MachineError> {
        let worker = worker.clone();
        match driver {
            DeviceDriver::VirtioRng { rng, limit } => {
                let wanted = config.rngs.iter().find(|r| r.id == *rng);
                let rng = wanted.ok_or_else(|| no_such(id, "rng", rng, "-object rng-random"))?;
                let source = Source::open(rng, inherited)?;
                Ok(Box::new(Rng::new(RngOptions { source, limit: *limit, worker })))
            }
            DeviceDriver::VirtioBalloon { deflate_on_oom, free_page_reporting, auto } => {
                let device = Balloon::new(BalloonOptions {
                    memory: config.memory.size,
                    deflate_on_oom: *deflate_on_oom,
                    free_page_reporting: *free_page_reporting,
                    auto: *auto,
                    worker,
                });
                self.balloon = Some(device.port());
                Ok(Box::new(device))
            }
            DeviceDriver::VirtioSerial { .. } => {
                let ports = config.serial_ports()?.into_iter().map(|port| {
                    let SerialPort { nr, chardev, console, name } = port;
                    let backend = self.chardevs.get(&chardev).cloned();
                    let backend = backend.ok_or_else(|| no_such(id, "chardev", &chardev, "-chardev …"))?;
                    Ok(PortOptions { nr, console, name, backend })
                });
                let ports = ports.collect::<Result<_, MachineError>>()?;
                Ok(Box::new(Console::new(ports, self.main_loop.clone())))
            }
            DeviceDriver::VhostVsock { guest_cid, vhost_fd } => {
                let (guest_cid, vhost_fd) = (*guest_cid, *vhost_fd);
                let options = VsockOptions { device: id, guest_cid, vhost_fd, inherited, worker };
                Ok(Box::new(Vsock::open(options)?))
            }
            DeviceDriver::VirtioMem { memdev, requested_size, block_size, node, .. } => {
                let store =
                    self.memory.get(id).ok_or_else(|| no_such(id, "memdev", memdev, MEMORY_OBJECT))?;
                let device = Mem::new(MemOptions {
                    store,
                    block_size: *block_size,
                    // Tables without nodes say nothing that the number could mean.
                    node: (!config.numa.nodes.is_empty()).then_some(*node),
                    requested_size: *requested_size,
                    worker: Worker::new(id),
                });
                self.mems.push((id.to_owned(), device.port()));
                Ok(Box::new(device))
            }
            DeviceDriver::VirtioPmem { memdev, .. } => {
                let region =
                    self.memory.get(id).ok_or_else(|| no_such(id, "memdev", memdev, MEMORY_OBJECT))?;
                let (device, worker) = (id.to_owned(), Worker::new(id));
                let (base, size) = (region.base(), region.size());
                let flush = Arc::new(move || region.flush());
                Ok(Box::new(Pmem::new(PmemOptions { device, base, size, flush, worker })))
            }
            driver => match config.vhost_user_chardev(driver) {
                Some(chardev) => self.vhost_user(id, driver, chardev, config),
                None => Err(MachineError::UnsupportedDevice { device: id.into(), driver: driver.name() }),
            },
        }
    }

    /// A device that the process behind `chardev` serves.
    fn vhost_user(
        &self,
        id: &str,
        driver: &DeviceDriver,
        chardev: &str,
        config: &VmConfig,
    ) -> Result<Box<dyn VirtioDevice>, MachineError> {
        let found = config.chardevs.iter().find(|c| c.id == chardev).map(|c| &c.kind);
        let Some(ChardevKind::UnixSocket { path, .. }) = found else {
            return Err(no_such(id, "chardev", chardev, "-chardev socket,path=…"));
        };
        let (model, queue_size) = match driver {
            DeviceDriver::VhostUserFs { tag, .. } => (Model::Fs { tag: tag.clone() }, FS_QUEUE),
            DeviceDriver::VhostUserBlk { num_queues, queue_size, .. } => {
                (Model::Blk { queues: *num_queues }, *queue_size)
            }
            DeviceDriver::VirtioNet { mac, queue_size, netdev, multi_queue, .. } => {
                let netdev = config.netdevs.iter().find(|n| n.id == *netdev).filter(|_| *multi_queue);
                let (mac, pairs) = (served_mac(config, id, *mac), netdev.map_or(1, Netdev::queue_pairs));
                (Model::Net { mac, pairs }, *queue_size)
            }
            driver => {
                return Err(MachineError::UnsupportedDevice { device: id.into(), driver: driver.name() });
            }
        };
        Ok(Box::new(VhostUser::open(VhostUserOptions {
            device: id.to_owned(),
            chardev: chardev.to_owned(),
            socket: path.clone(),
            model,
            queue_size,
            main_loop: self.main_loop.clone(),
        })?))
    }
}
