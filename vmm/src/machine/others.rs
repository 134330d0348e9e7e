//! Devices besides disks and NICs: how each is made from its configuration, and the handles that the machine keeps of them.

use std::collections::HashMap;
use std::sync::Arc;

use super::MachineError;
use super::slots::no_such;
use crate::chardev::CharBackend;
use crate::config::{DeviceDriver, SerialPort, VmConfig};
use crate::event::LoopHandle;
use crate::inherit::Inherited;
use crate::virtio::balloon::{self, Balloon, BalloonOptions};
use crate::virtio::console::{Console, PortOptions};
use crate::virtio::rng::{Rng, RngOptions, Source};
use crate::virtio::vsock::{Vsock, VsockOptions};
use crate::virtio::{VirtioDevice, Worker};

/// What they are made from, and what the machine keeps of them.
pub(super) struct Others {
    /// Host ends by the name of their `-chardev`.
    pub(super) chardevs: HashMap<String, Arc<dyn CharBackend>>,
    pub(super) main_loop: LoopHandle,
    pub(super) balloon: Option<Arc<balloon::Port>>,
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
            driver => Err(MachineError::UnsupportedDevice { device: id.into(), driver: driver.name() }),
        }
    }
}
