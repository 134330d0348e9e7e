//! The host's side of a port: what a character device talks to. Lives as long as the device; the way to a driver comes and goes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::PortOptions;
use crate::chardev::{CharBackend, FrontEnd};

/// What serves the ports while a driver runs. Once that has ended nothing happens.
pub(super) trait Session: Send + Sync {
    /// How much port `nr` takes now, in bytes.
    fn room(&self, nr: u8) -> usize;
    /// Bytes for the guest.
    fn receive(&self, nr: u8, data: &[u8]);
    /// Somebody has come to the host's side of the port, or has gone.
    fn host_changed(&self, nr: u8, open: bool);
    /// The host's side takes bytes again.
    fn writable(&self, nr: u8);
}

pub(super) struct PortEnd {
    pub(super) nr: u8,
    pub(super) console: bool,
    pub(super) name: Option<String>,
    pub(super) backend: Arc<dyn CharBackend>,
    /// Somebody is at the other end of `backend`.
    connected: AtomicBool,
    session: Mutex<Option<Weak<dyn Session>>>,
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
            session: Mutex::new(None),
        });
        port.backend.attach(Arc::clone(&port) as Arc<dyn FrontEnd>);
        port
    }

    /// The session that serves the port from now on.
    pub(super) fn connect(&self, session: Option<Weak<dyn Session>>) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = session;
    }

    /// Whether the guest should see the port as open. A terminal is there even if nobody looks.
    pub(super) fn is_open(&self) -> bool {
        self.console || self.connected.load(Ordering::Acquire)
    }

    fn session(&self) -> Option<Arc<dyn Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.upgrade()
    }

    fn tell(&self, what: impl FnOnce(&dyn Session)) {
        if let Some(session) = self.session() {
            what(&*session);
        }
    }
}

impl FrontEnd for PortEnd {
    fn can_receive(&self) -> usize {
        self.session().map_or(0, |session| session.room(self.nr))
    }

    fn receive(&self, data: &[u8]) {
        self.tell(|session| session.receive(self.nr, data));
    }

    fn opened(&self) {
        self.connected.store(true, Ordering::Release);
        self.tell(|session| session.host_changed(self.nr, true));
    }

    fn closed(&self) {
        self.connected.store(false, Ordering::Release);
        self.tell(|session| session.host_changed(self.nr, false));
    }

    fn writable(&self) {
        self.tell(|session| session.writable(self.nr));
    }
}
