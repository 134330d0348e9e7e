//! virtio-rng (virtio 1.2 §5.4): owns the device's start and stop. `source` is the host's end, `limit` says how fast bytes may
//! go, `serve` fills the guest's buffers, on the I/O thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::queue::Position;
use super::state::{DeviceState, SUSPEND_DEADLINE, StateError};
use super::worker::{Gate, RESET_DEADLINE, Session, Worker};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice, fd_of,
    fd_of_timer, read_config_bytes,
};
use crate::config::RngLimit;
use crate::event::{EventFlags, Ops};

#[cfg(fuzzing)]
pub mod fuzz;
mod limit;
mod serve;
mod source;

#[cfg(test)]
mod tests;

use limit::Limiter;
use serve::Server;
pub use source::{RngError, Source};

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZE: u16 = 256;

/// What a device is made from.
pub struct RngOptions {
    /// Where its bytes come from.
    pub source: Source,
    /// How many it may give in a time.
    pub limit: Option<RngLimit>,
    /// The thread that serves it.
    pub worker: Worker,
}

/// The device.
pub struct Rng {
    source: Arc<Source>,
    /// Outlives sessions: a guest that resets the device gains no bytes by it.
    limiter: Option<Arc<Mutex<Limiter>>>,
    worker: Worker,
    session: Option<Session<Server>>,
}

impl Rng {
    /// A device that nobody drives yet: starts no thread.
    pub fn new(options: RngOptions) -> Self {
        let RngOptions { source, limit, worker } = options;
        let limiter = limit.map(|l| Arc::new(Mutex::new(Limiter::new(l))));
        Self { source: Arc::new(source), limiter, worker, session: None }
    }

    fn stop(&mut self, wait: Duration) -> bool {
        Session::end(&mut self.session, wait)
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.stop(Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let Activation { queues, interrupt, .. } = activation;
        let ActiveQueue { index: _, queue, notify } =
            queues.into_iter().find(|q| q.index == 0).ok_or(ActivateError::MissingQueue(0))?;
        let timer = match &self.limiter {
            Some(_) => Some(TimerFd::new().map_err(|e| ActivateError::Host(e.into()))?),
            None => None,
        };
        let io_thread = self.worker.start().map_err(ActivateError::Host)?;
        let server = Server::new(serve::Parts {
            source: Arc::clone(&self.source),
            limiter: self.limiter.clone(),
            timer,
            queue,
            notify,
            interrupt: Arc::clone(&interrupt),
        });
        self.session = Some(Session::start(io_thread, server, "virtio-rng", interrupt, start));
        Ok(())
    }

    fn suspend(&mut self) -> Result<Vec<(u16, Position)>, StateError> {
        let left = Session::take(&mut self.session, SUSPEND_DEADLINE, |server| vec![(0, server.position())]);
        left.ok_or(StateError::Busy)
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::Rng)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        if *state == DeviceState::Rng { Ok(()) } else { Err(StateError::Malformed("device")) }
    }

    /// A guest draws some bytes a minute.
    fn wants_doorbell(&self) -> bool {
        false
    }

    fn reset(&mut self) {
        if !self.stop(RESET_DEADLINE) {
            tracing::error!("a source of random bytes hangs; the device stays down until it does not");
        }
    }
}

/// On the I/O thread: watches what can wake the device, and serves what has come before.
fn start(server: &mut Server, gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>) -> io::Result<()> {
    let mut watch = |fd: BorrowedFd<'_>| {
        let on_ready = Arc::clone(gate);
        // Edge-triggered: neither the notification nor the timer has to be read back.
        gate.watch(ops, fd, EventFlags::IN | EventFlags::ET, move |_, _: &mut Ops<'_>| {
            on_ready.enter(Server::run);
        })
    };
    watch(fd_of(&server.notify))?;
    if let Some(timer) = &server.timer {
        watch(fd_of_timer(timer))?;
    }
    match watch(server.source.as_fd()) {
        // A device that cannot be waited for never has to be.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
        watched => drop(watched?),
    }
    server.run();
    Ok(())
}
