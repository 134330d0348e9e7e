//! The host's side of a port: what a character device talks to. Lives as long as the device; the way to a driver comes and goes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::PortOptions;
use super::serve::Server;
use crate::chardev::{CharBackend, FrontEnd};
use crate::virtio::worker::Gate;

pub(super) struct PortEnd {
    pub(super) nr: u8,
    pub(super) console: bool,
    pub(super) name: Option<String>,
    pub(super) backend: Arc<dyn CharBackend>,
    /// Somebody is at the other end of `backend`.
    connected: AtomicBool,
    gate: Mutex<Option<Weak<Gate<Server>>>>,
}

impl PortEnd {
    pub(super) fn new(options: PortOptions) -> Arc<Self> {
        let PortOptions { nr, console, name, backend } = options;
        let port = Arc::new(Self {
            nr,
            console,
            name,
            backend,
            connected: AtomicBool::new(false),
            gate: Mutex::new(None),
        });
        port.backend.attach(Arc::clone(&port) as Arc<dyn FrontEnd>);
        port
    }

    /// The session that serves the port from now on.
    pub(super) fn connect(&self, gate: Option<&Arc<Gate<Server>>>) {
        *self.gate.lock().unwrap_or_else(PoisonError::into_inner) = gate.map(Arc::downgrade);
    }

    /// Whether the guest should see the port as open. A terminal is there even if nobody looks.
    pub(super) fn is_open(&self) -> bool {
        self.console || self.connected.load(Ordering::Acquire)
    }

    fn enter<R>(&self, work: impl FnOnce(&mut Server) -> R) -> Option<R> {
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.upgrade()?;
        gate.enter(work)
    }
}

impl FrontEnd for PortEnd {
    fn can_receive(&self) -> usize {
        self.enter(|server| server.room(self.nr)).unwrap_or(0)
    }

    fn receive(&self, data: &[u8]) {
        self.enter(|server| server.receive(self.nr, data));
    }

    fn opened(&self) {
        self.connected.store(true, Ordering::Release);
        self.enter(|server| server.host_changed(self.nr, true));
    }

    fn closed(&self) {
        self.connected.store(false, Ordering::Release);
        self.enter(|server| server.host_changed(self.nr, false));
    }

    fn writable(&self) {
        self.enter(|server| server.writable(self.nr));
    }
}
