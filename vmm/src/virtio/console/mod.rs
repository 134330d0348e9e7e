//! virtio-serial (virtio 1.2 §5.3): owns the device's features, its configuration space, and its starts and stops.
//!
//! `port` is the host's side of each port; `control` knows what driver and device have told each other about the ports (pure);
//! `serve` moves bytes. All of it runs on the main loop, where the character devices are too, so nothing here waits for another thread.

use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::queue::Position;
use super::state::{DeviceState, SUSPEND_DEADLINE, StateError};
use super::worker::{Gate, RESET_DEADLINE};
use super::{
    ActivateError, Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice, fd_of,
    read_config_bytes,
};
use crate::chardev::CharBackend;
use crate::event::{EventFlags, LoopHandle, Ops};

mod control;
#[cfg(fuzzing)]
pub mod fuzz;
mod port;
pub(super) mod saved;
mod serve;
mod state;

#[cfg(test)]
mod tests;

use port::PortEnd;
use serve::Server;

const DEVICE_TYPE: u32 = 3;
const QUEUE_SIZE: u16 = 128;
/// VIRTIO_CONSOLE_F_MULTIPORT: more than one port, and a control queue in each direction.
const F_MULTIPORT: u64 = 1 << 1;

/// Queue numbers (§5.3.2).
const CONTROL_TO_DRIVER: u16 = 2;
const CONTROL_FROM_DRIVER: u16 = 3;

/// `struct virtio_console_config`: cols, rows, max_nr_ports, emerg_wr.
const CONFIG_BYTES: usize = 12;
const MAX_NR_PORTS: usize = 4;

/// A port to be.
pub struct PortOptions {
    /// Its number; each once.
    pub nr: u8,
    /// A terminal, of which the newest output counts, and not a stream of which nothing may be lost.
    pub console: bool,
    /// How the guest finds it.
    pub name: Option<String>,
    /// The host's side.
    pub backend: Arc<dyn CharBackend>,
}

/// The device.
pub struct Console {
    ports: Vec<Arc<PortEnd>>,
    queue_sizes: Vec<u16>,
    main_loop: LoopHandle,
    session: Option<Arc<Gate<Server>>>,
    /// How the ports of a suspended device stood.
    carried: Option<Vec<saved::Carried>>,
}

/// The queues of port `nr`: (to the driver, from the driver).
fn queues_of(nr: u8) -> (u16, u16) {
    let first = if nr == 0 { 0 } else { 2 * (u16::from(nr) + 1) };
    (first, first + 1)
}

impl Console {
    /// A device that nobody drives yet. Ports in any order.
    pub fn new(ports: Vec<PortOptions>, main_loop: LoopHandle) -> Self {
        let ports: Vec<_> = ports.into_iter().map(PortEnd::new).collect();
        // As many queues as there are ports, and not as there could be: a driver sets all of them up.
        let (_, last) = queues_of(ports.iter().map(|p| p.nr).max().unwrap_or(0));
        let queues = usize::from(last.max(CONTROL_FROM_DRIVER)) + 1;
        Self { ports, queue_sizes: vec![QUEUE_SIZE; queues], main_loop, session: None, carried: None }
    }

    fn stop(&mut self, wait: Duration) -> bool {
        for port in &self.ports {
            port.connect(None);
        }
        let Some(gate) = &self.session else { return true };
        let stopped = gate.close(&self.main_loop, Instant::now() + wait, |_| true);
        if stopped {
            self.session = None;
        }
        stopped
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_BYTES];
        let ports = u32::from(self.ports.iter().map(|p| p.nr).max().unwrap_or(0)) + 1;
        config[MAX_NR_PORTS..MAX_NR_PORTS + 4].copy_from_slice(&ports.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {
        // The only writable field, `emerg_wr`, comes with a feature that we do not offer.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.stop(Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let Activation { features, queues, interrupt, .. } = activation;
        let multiport = features & F_MULTIPORT != 0;
        if multiport {
            for needed in [CONTROL_TO_DRIVER, CONTROL_FROM_DRIVER] {
                if !queues.iter().any(|q| q.index == needed) {
                    return Err(ActivateError::MissingQueue(needed));
                }
            }
        }
        let mut server = Server::new(&self.ports, queues, multiport, Arc::clone(&interrupt));
        if let Some(carried) = self.carried.take() {
            server.go_on(carried);
        }
        let gate = Gate::new(server);
        let session = Arc::downgrade(&gate);
        for port in &self.ports {
            port.connect(Some(session.clone() as Weak<dyn port::Session>));
        }
        let (on_loop, ports) = (Arc::clone(&gate), self.ports.clone());
        self.main_loop.post(move |ops: &mut Ops<'_>| {
            if let Some(Err(error)) = on_loop.enter(|server| start(server, &on_loop, ops)) {
                tracing::error!("virtio-serial: cannot watch descriptors: {error}");
                interrupt.needs_reset();
            }
            for port in ports {
                port.backend.front_end_ready();
            }
        });
        self.session = Some(gate);
        Ok(())
    }

    /// Keys and lines.
    fn wants_doorbell(&self) -> bool {
        false
    }

    fn suspend(&mut self) -> Result<Vec<(u16, Position)>, StateError> {
        let gate = self.session.clone().ok_or(StateError::Busy)?;
        let mut stood = None;
        // No handler runs: they run on the main loop, like this.
        gate.close(&self.main_loop, Instant::now() + SUSPEND_DEADLINE, |server| {
            stood = Some(server.stand());
            true
        });
        let (positions, carried) = stood.ok_or(StateError::Busy)?;
        for port in &self.ports {
            port.connect(None);
        }
        (self.session, self.carried) = (None, Some(carried));
        Ok(positions)
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::Console(self.saved()))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Console(saved) => self.take_saved(saved),
            _ => Err(StateError::Malformed("device")),
        }
    }

    fn reset(&mut self) {
        self.carried = None;
        if !self.stop(RESET_DEADLINE) {
            tracing::error!("a character device hangs; virtio-serial stays down until it does not");
        }
    }
}

/// On the main loop: watches the queues, and serves what has come before.
fn start(server: &mut Server, gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>) -> io::Result<()> {
    server.look_at_hosts();
    for (queue, notify) in server.notifies() {
        let notified = Arc::clone(gate);
        gate.watch(ops, fd_of(&notify), EventFlags::IN | EventFlags::ET, move |_, _: &mut Ops<'_>| {
            notified.enter(|server| server.notified(queue));
        })?;
        server.notified(queue);
    }
    Ok(())
}
