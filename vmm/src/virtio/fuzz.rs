//! For the fuzz targets only: what a device's session needs besides its rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::Queue;
use super::{ActiveQueue, Interrupt};

/// Remembers whether the device has asked for a reset.
#[derive(Default)]
pub(super) struct Flag(AtomicBool);

impl Flag {
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Interrupt for Flag {
    fn queue(&self, _: u16) {}

    fn config(&self) {}

    fn needs_reset(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// `queues`, numbered from 0 on; one descriptor stands for all notifications.
pub(super) fn active(queues: Vec<Queue>) -> Option<Vec<ActiveQueue>> {
    let notify = Arc::new(EventFd::new(EFD_NONBLOCK).ok()?);
    let active = |(index, queue)| ActiveQueue { index, queue, notify: Arc::clone(&notify) };
    Some((0..).zip(queues).map(active).collect())
}
