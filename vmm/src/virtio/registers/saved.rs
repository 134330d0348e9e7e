//! Saving the registers of a transport, and giving them to those of another one. What is particular to a kind of transport is that one's business.

use std::sync::Arc;

use super::super::queue::Queue;
use super::super::state::{QueueState, StateError, TransportState, same};
use super::super::status::{DRIVER_OK, FEATURES_OK, Status};
use super::super::{ActivateError, F_VERSION_1};
use super::{QueueSetup, Registers};
use crate::memory::GuestMemory;

/// Interrupt status: a queue, the configuration.
const INTERRUPTS: u32 = 3;

impl Registers {
    /// All but the transport's own.
    pub(in crate::virtio) fn saved(&self) -> Result<TransportState, StateError> {
        let positions = self.suspended.as_deref().unwrap_or_default();
        let queues = (0u16..).zip(&self.queues).map(|(index, queue)| QueueState {
            layout: queue.layout,
            ready: queue.ready,
            position: positions.iter().find(|(i, _)| *i == index).map(|(_, p)| *p).unwrap_or_default(),
        });
        Ok(TransportState {
            device_type: self.device.device_type(),
            status: self.status.bits(),
            needs_reset: false,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: 0,
            config_generation: 0,
            claimed: false,
            queues: queues.collect(),
            pci: None,
            device: self.device.save()?,
        })
    }

    /// Takes what was saved; `is_pci` says of which kind this transport is.
    pub(in crate::virtio) fn take_saved(
        &mut self,
        state: &TransportState,
        is_pci: bool,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), StateError> {
        let bus = |pci: bool| if pci { "PCI" } else { "MMIO" };
        same("the device's bus", &bus(state.pci.is_some()), &bus(is_pci))?;
        same("the virtio device type", &state.device_type, &self.device.device_type())?;
        same("the number of queues", &state.queues.len(), &self.queues.len())?;
        self.device.restore(&state.device)?;
        let status = Status::from_saved(state.status).ok_or(StateError::Malformed("device status"))?;
        if status.has(FEATURES_OK)
            && (state.driver_features & !self.device.features() != 0
                || state.driver_features & F_VERSION_1 == 0)
        {
            return Err(StateError::Mismatch {
                field: "the set of features",
                saved: format!("{:#x}", state.driver_features),
                here: format!("{:#x}", self.device.features()),
            });
        }
        if state.interrupt_status & !INTERRUPTS != 0 {
            return Err(StateError::Malformed("interrupt status"));
        }
        self.status = status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            *queue = QueueSetup { layout: saved.layout, ready: saved.ready };
        }
        if status.has(DRIVER_OK) {
            let positions = (0u16..).zip(&state.queues).filter(|(_, q)| q.ready);
            self.suspended = Some(positions.map(|(index, q)| (index, q.position)).collect());
            // Now, where it is an error of the snapshot, and not when the device is to go on. One that has broken down does not.
            for ((index, queue), max) in (0u16..).zip(&self.queues).zip(self.device.queue_sizes()) {
                if queue.ready && !state.needs_reset {
                    Queue::new(memory, queue.layout, *max, state.driver_features)
                        .map_err(|e| ActivateError::BadQueue(index, e))?;
                }
            }
        }
        Ok(())
    }
}
