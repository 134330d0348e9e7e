//! A VM's link to its VMM: owns the task that connects (`monitor`), the connection once it is there, and the QMP proxy that hangs on
//! it. Commands of the state machine go through here. Used by the actor only.
//!
//! ```text
//!   Down ──connect──▶ Expected ──linked──▶ Up          commands: Down refuses, Expected lets them wait, Up sends them
//!    ▲                   ▲                  │
//!    │                   └──── expect ──────┤ (the connection broke, the process lives)
//!    └──────────────────── cut ─────────────┘
//! ```

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::FleetError;
use super::life::Command;
use super::words;
use crate::qmp::{Monitor, Proxy};

#[derive(Clone)]
enum Line {
    /// There is no process.
    Down,
    /// There is one, which is being connected to.
    Expected,
    /// It answers.
    Up(Monitor),
}

/// The connection, for whoever only looks whether there is one.
#[derive(Clone)]
pub(super) struct Wire(Arc<watch::Sender<Line>>);

impl Wire {
    /// The connection to the VMM, if there is one.
    pub(super) fn monitor(&self) -> Option<Monitor> {
        match &*self.0.borrow() {
            Line::Up(monitor) => Some(monitor.clone()),
            Line::Down | Line::Expected => None,
        }
    }
}

/// See the module.
pub(super) struct Link {
    line: Arc<watch::Sender<Line>>,
    proxy: Option<Proxy>,
    task: Option<JoinHandle<()>>,
}

impl Link {
    /// Down; without a proxy when its socket could not be made.
    pub(super) fn new(proxy: Option<Proxy>) -> Self {
        Self { line: Arc::new(watch::Sender::new(Line::Down)), proxy, task: None }
    }

    /// The proxy for clients, as long as there is one.
    pub(super) fn proxy(&self) -> Result<&Proxy, FleetError> {
        let missing = || FleetError::NotSupported("its QMP socket could not be made: see the log".to_owned());
        self.proxy.as_ref().ok_or_else(missing)
    }

    /// This is the connection to the VMM.
    pub(super) fn is(&self, other: &Monitor) -> bool {
        matches!(&*self.line.borrow(), Line::Up(monitor) if monitor.same(other))
    }

    /// To look at it from elsewhere.
    pub(super) fn wire(&self) -> Wire {
        Wire(Arc::clone(&self.line))
    }

    /// The connection to the VMM, if there is one.
    pub(super) fn monitor(&self) -> Option<Monitor> {
        self.wire().monitor()
    }

    /// Says whether the VMM is connected to.
    pub(super) fn is_up(&self) -> bool {
        matches!(*self.line.borrow(), Line::Up(_))
    }

    /// There is a process, and no connection to it yet, or any more.
    pub(super) fn expect(&self) {
        self.line.send_replace(Line::Expected);
        if let Some(proxy) = &self.proxy {
            proxy.expect_monitor();
        }
    }

    /// A task that connects, and tells the actor when it has; replaces the one before.
    pub(super) fn connect(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.end_task();
        self.expect();
        self.task = Some(tokio::spawn(task));
    }

    /// The task has connected.
    pub(super) fn linked(&self, monitor: Monitor) {
        if let Some(proxy) = &self.proxy {
            proxy.set_monitor(Some(monitor.clone()));
        }
        self.line.send_replace(Line::Up(monitor));
    }

    /// The task, to wait for its end, if it has something to read still.
    pub(super) fn last_words(&mut self) -> Option<JoinHandle<()>> {
        if self.is_up() { self.task.take() } else { None }
    }

    /// There is no process any more.
    pub(super) fn cut(&mut self) {
        self.end_task();
        self.line.send_replace(Line::Down);
        if let Some(proxy) = &self.proxy {
            proxy.set_monitor(None);
        }
    }

    /// There is no VM any more: the proxy's socket goes.
    pub(super) fn remove(&mut self) {
        self.cut();
        if let Some(proxy) = self.proxy.take() {
            proxy.remove();
        }
    }

    /// Sends a command of the state machine; one that comes before the connection waits for it, with the deadline of a command.
    pub(super) fn send(
        &self,
        command: Command,
    ) -> impl Future<Output = Result<(), FleetError>> + Send + use<> {
        let mut line = self.line.subscribe();
        async move {
            let decided = timeout(words::COMMAND, line.wait_for(|line| !matches!(line, Line::Expected)));
            let line = match decided.await {
                Ok(Ok(line)) => line.clone(),
                Ok(Err(_)) | Err(_) => Line::Expected,
            };
            match line {
                Line::Up(monitor) => words::send(&monitor, command).await,
                Line::Down => Err(FleetError::VmmDied("the VMM has ended".to_owned())),
                Line::Expected => Err(FleetError::QmpTimeout("the VMM does not answer".to_owned())),
            }
        }
    }

    /// Saves the VM, which must be paused, to two files that are empty.
    pub(super) fn save(
        &self,
        state: OwnedFd,
        memory: OwnedFd,
    ) -> impl Future<Output = Result<(), FleetError>> + Send + use<> {
        let line = self.line.borrow().clone();
        async move {
            match line {
                Line::Up(monitor) => words::save(&monitor, state, memory).await,
                Line::Down => Err(FleetError::VmmDied("the VMM has ended".to_owned())),
                Line::Expected => Err(FleetError::QmpTimeout("the VMM does not answer".to_owned())),
            }
        }
    }

    fn end_task(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}
