//! Saving a transport, and giving its registers to another one.

use std::sync::atomic::Ordering;

use super::super::ActivateError;
use super::super::F_VERSION_1;
use super::super::queue::Queue;
use super::super::registers::QueueSetup;
use super::super::state::{QueueState, StateError, TransportState, same};
use super::super::status::{DRIVER_OK, Status};
use super::{INT_CONFIG, INT_QUEUE, MmioTransport};

impl MmioTransport {
    /// Stops the device where it stands; the driver must not run. After an error it goes on.
    pub fn suspend(&self) -> Result<(), StateError> {
        self.lock().suspend()
    }

    /// The state of a transport that was suspended.
    pub fn save(&self) -> Result<TransportState, StateError> {
        let r = self.lock();
        let positions = r.suspended.as_deref().unwrap_or_default();
        let queues = (0u16..).zip(&r.queues).map(|(index, queue)| QueueState {
            layout: queue.layout,
            ready: queue.ready,
            position: positions.iter().find(|(i, _)| *i == index).map(|(_, p)| *p).unwrap_or_default(),
        });
        Ok(TransportState {
            device_type: r.device.device_type(),
            status: r.status.bits(),
            needs_reset: self.signals.needs_reset.load(Ordering::Acquire),
            device_features_sel: r.device_features_sel,
            driver_features_sel: r.driver_features_sel,
            driver_features: r.driver_features,
            queue_sel: r.queue_sel,
            interrupt_status: self.signals.pending.load(Ordering::Acquire),
            config_generation: self.signals.generation.load(Ordering::Acquire),
            claimed: self.claimed.load(Ordering::Acquire),
            queues: queues.collect(),
            device: r.device.save()?,
        })
    }

    /// Gives a new transport, whose device has not been driven, what was saved. The device stands still until [`resume`](Self::resume).
    pub fn restore(&self, state: &TransportState) -> Result<(), StateError> {
        let mut guard = self.lock();
        let r = &mut *guard;
        same("the virtio device type", &state.device_type, &r.device.device_type())?;
        same("the number of queues", &state.queues.len(), &r.queues.len())?;
        r.device.restore(&state.device)?;
        let status = Status::from_saved(state.status).ok_or(StateError::Malformed("device status"))?;
        if status.has(super::super::status::FEATURES_OK)
            && (state.driver_features & !r.device.features() != 0 || state.driver_features & F_VERSION_1 == 0)
        {
            return Err(StateError::Mismatch {
                field: "the set of features",
                saved: format!("{:#x}", state.driver_features),
                here: format!("{:#x}", r.device.features()),
            });
        }
        if state.interrupt_status & !(INT_QUEUE | INT_CONFIG) != 0 {
            return Err(StateError::Malformed("interrupt status"));
        }
        r.status = status;
        r.device_features_sel = state.device_features_sel;
        r.driver_features_sel = state.driver_features_sel;
        r.driver_features = state.driver_features;
        r.queue_sel = state.queue_sel;
        for (queue, saved) in r.queues.iter_mut().zip(&state.queues) {
            *queue = QueueSetup { layout: saved.layout, ready: saved.ready };
        }
        if status.has(DRIVER_OK) {
            let positions = (0u16..).zip(&state.queues).filter(|(_, q)| q.ready);
            r.suspended = Some(positions.map(|(index, q)| (index, q.position)).collect());
            // Now, where it is an error of the snapshot, and not when the device is to go on. One that has broken down does not.
            for ((index, queue), max) in (0u16..).zip(&r.queues).zip(r.device.queue_sizes()) {
                if queue.ready && !state.needs_reset {
                    Queue::new(&self.memory, queue.layout, *max, state.driver_features)
                        .map_err(|e| ActivateError::BadQueue(index, e))?;
                }
            }
        }
        self.signals.pending.store(state.interrupt_status, Ordering::Release);
        self.signals.needs_reset.store(state.needs_reset, Ordering::Release);
        self.signals.generation.store(state.config_generation, Ordering::Release);
        self.claimed.store(state.claimed, Ordering::Release);
        Ok(())
    }

    /// Lets a suspended device go on, with the queues where they stood. Interrupts may come from now on.
    pub fn resume(&self) -> Result<(), StateError> {
        let broken = self.signals.needs_reset.load(Ordering::Acquire);
        let mut registers = self.lock();
        // Doorbells stay where they are, so it does not matter by which window they were found.
        self.with_link(0, |link| registers.resume(broken, link))
    }
}
