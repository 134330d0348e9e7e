//! Devices besides disks and NICs: how each is made from its configuration, and the handles that the machine keeps of them.

use std::sync::Arc;

use super::MachineError;
use super::slots::no_such;
use crate::config::{DeviceDriver, VmConfig};
use crate::inherit::Inherited;
use crate::virtio::balloon::{self, Balloon, BalloonOptions};
use crate::virtio::rng::{Rng, RngOptions, Source};
use crate::virtio::{VirtioDevice, Worker};

/// What the machine keeps of them.
#[derive(Default)]
pub(super) struct Others {
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
            DeviceDriver::VirtioBalloon { deflate_on_oom, free_page_reporting } => {
                let device = Balloon::new(BalloonOptions {
                    memory: config.memory.size,
                    deflate_on_oom: *deflate_on_oom,
                    free_page_reporting: *free_page_reporting,
                    worker,
                });
                self.balloon = Some(device.port());
                Ok(Box::new(device))
            }
            driver => Err(MachineError::UnsupportedDevice { device: id.into(), driver: driver.name() }),
        }
    }
}
