//! virtio-balloon (virtio 1.2 §5.5): owns the device's features, its configuration space, and its starts and stops.
//!
//! The host says in the configuration how many pages it wants (`num_pages`); the guest takes them out of use, names them on the
//! inflate queue, and says how many it has given up (`actual`). `port` is how the rest of the process sees that; `serve` gives the
//! pages to the host, on the I/O thread; `pages` knows which of them can go; `follow` decides for the automatic.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::worker::{Gate, RESET_DEADLINE, Session, Worker};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice,
    complain, fd_of, fd_of_timer, read_config_bytes,
};
use crate::config::AutoBalloon;
use crate::event::{EventFlags, Ops};
use crate::memory::discard::Discarder;

mod follow;
#[cfg(fuzzing)]
pub mod fuzz;
mod pages;
mod port;
mod serve;
mod stats;

#[cfg(test)]
mod tests;

pub use port::Port;
use serve::{Follower, Role, Server};
pub use stats::Stats;

const DEVICE_TYPE: u32 = 5;
/// Free page reporting in Linux wants 32 at least.
const QUEUE_SIZE: u16 = 128;
/// Unit of `num_pages`, `actual` and of the page numbers on the queues, whatever the pages of host and guest (§5.5.6).
const PAGE: u64 = 4096;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const THIRD: u16 = 2;

/// VIRTIO_BALLOON_F_*.
mod feature {
    pub(super) const MUST_TELL_HOST: u64 = 1 << 0;
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const PAGE_REPORTING: u64 = 1 << 5;
}

/// `struct virtio_balloon_config`: num_pages and actual; the fields after them belong to features that we do not offer.
const CONFIG_BYTES: usize = 8;
const ACTUAL: usize = 4;

/// What a device is made from.
pub struct BalloonOptions {
    /// Guest RAM at boot, in bytes.
    pub memory: u64,
    /// Let the guest take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Let the guest tell which pages it does not use.
    pub free_page_reporting: bool,
    /// Let the balloon follow what the guest could spare.
    pub auto: Option<AutoBalloon>,
    /// The thread that serves it.
    pub worker: Worker,
}

/// The device.
pub struct Balloon {
    port: Arc<Port>,
    features: u64,
    queue_sizes: Vec<u16>,
    auto: Option<AutoBalloon>,
    worker: Worker,
    session: Option<Session<Server>>,
}

impl Balloon {
    /// A device that nobody drives yet: starts no thread.
    pub fn new(options: BalloonOptions) -> Self {
        let BalloonOptions { memory, deflate_on_oom, free_page_reporting, auto, worker } = options;
        // MUST_TELL_HOST: a huge page goes to the host when all its parts are in the balloon, so it must be known of each
        // part when it has left.
        let mut features = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
        features |= feature::MUST_TELL_HOST | feature::STATS_VQ;
        let mut queues = 3;
        if deflate_on_oom {
            features |= feature::DEFLATE_ON_OOM;
        }
        if free_page_reporting {
            features |= feature::PAGE_REPORTING;
            // The reporting queue has number 4 in the specification (§5.5.2). Linux counts only the queues of features that
            // were negotiated, so for it the number is 3. Both work.
            queues = 5;
        }
        Self {
            port: Port::new(memory),
            features,
            queue_sizes: vec![QUEUE_SIZE; queues],
            auto,
            worker,
            session: None,
        }
    }

    /// How the rest of the process reaches the device.
    pub fn port(&self) -> Arc<Port> {
        Arc::clone(&self.port)
    }

    fn stop(&mut self, wait: Duration) -> bool {
        self.port.disconnect();
        Session::end(&mut self.session, wait)
    }
}

/// What queue `index` is for, with the features that the driver accepted.
fn role(index: u16, features: u64) -> Option<Role> {
    let reporting = (features & feature::PAGE_REPORTING != 0).then_some(Role::Reporting);
    match index {
        INFLATE => Some(Role::Inflate),
        DEFLATE => Some(Role::Deflate),
        THIRD if features & feature::STATS_VQ != 0 => Some(Role::Stats),
        _ => reporting,
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.config();
        for (at, to) in (0u64..).zip(&mut config).skip(ACTUAL) {
            let written = at.checked_sub(offset).and_then(|n| data.get(usize::try_from(n).ok()?));
            *to = written.copied().unwrap_or(*to);
        }
        let actual = config.last_chunk::<4>().map_or(0, |a| u32::from_le_bytes(*a));
        self.port.set_actual_pages(actual);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.stop(Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let Activation { memory, features, queues, interrupt } = activation;
        for needed in [INFLATE, DEFLATE] {
            if !queues.iter().any(|q| q.index == needed) {
                return Err(ActivateError::MissingQueue(needed));
            }
        }
        let queues: Vec<(Role, ActiveQueue)> =
            queues.into_iter().filter_map(|q| Some((role(q.index, features)?, q))).collect();
        let refresh = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(ActivateError::Host)?);
        let follower = match self.auto {
            Some(auto) => {
                if features & feature::STATS_VQ == 0 {
                    complain(|| {
                        tracing::warn!(
                            "the guest tells nothing of its memory: auto-balloon=on has no effect"
                        );
                    });
                }
                let mut timer = TimerFd::new().map_err(|e| ActivateError::Host(e.into()))?;
                timer.reset(auto.interval, None).map_err(|e| ActivateError::Host(e.into()))?;
                Some(Follower { timer, interval: auto.interval, percent: auto.percent, waits: false })
            }
            None => None,
        };
        let io_thread = self.worker.start().map_err(ActivateError::Host)?;
        self.port.connect(Arc::clone(&interrupt), Arc::clone(&refresh));
        let server = Server::new(serve::Parts {
            discarder: Discarder::new(memory),
            queues,
            port: Arc::clone(&self.port),
            refresh,
            follower,
            interrupt: Arc::clone(&interrupt),
        });
        self.session = Some(Session::start(io_thread, server, "virtio-balloon", interrupt, start));
        Ok(())
    }

    /// A guest gives 256 pages with each notification, and only while the balloon changes.
    fn wants_doorbell(&self) -> bool {
        false
    }

    fn reset(&mut self) {
        if !self.stop(RESET_DEADLINE) {
            tracing::error!("guest memory cannot be given back; the balloon stays down until it can");
        }
        // All pages are the guest's again.
        self.port.set_actual_pages(0);
    }
}

impl Balloon {
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        config[..ACTUAL].copy_from_slice(&self.port.wanted_pages().to_le_bytes());
        config[ACTUAL..].copy_from_slice(&self.port.actual_pages().to_le_bytes());
        config
    }
}

/// On the I/O thread: watches the queues, and serves what has come before.
fn start(server: &mut Server, gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>) -> io::Result<()> {
    let edge = EventFlags::IN | EventFlags::ET;
    for (number, notify) in server.notifies().into_iter().enumerate() {
        let notified = Arc::clone(gate);
        gate.watch(ops, fd_of(&notify), edge, move |_, _: &mut Ops<'_>| {
            notified.enter(|server| server.run(number));
        })?;
        server.run(number);
    }
    let asked = Arc::clone(gate);
    gate.watch(ops, fd_of(&server.refresh()), edge, move |_, _: &mut Ops<'_>| {
        asked.enter(Server::refresh_stats);
    })?;
    if let Some(follower) = server.follower() {
        let timed = Arc::clone(gate);
        gate.watch(ops, fd_of_timer(&follower.timer), edge, move |_, _: &mut Ops<'_>| {
            timed.enter(Server::look);
        })?;
    }
    Ok(())
}
