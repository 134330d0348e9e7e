//! One client of the proxy, from its greeting to its end.
//!
//! One task; it waits for everything at once and never for the client alone, so a client that does not read costs its
//! buffer and then its connection, and nobody else anything. Commands go to the VMM one at a time: answers come in the
//! client's order, and no client gets more turns than another. While a command is under way, or too many answers wait to
//! be read, nothing is read: the client's own writes block.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::codec::Framer;
use super::error::QmpError;
use super::message::{Answer, QmpEvent, Request};
use super::monitor::{Monitor, Reply, maybe};
use super::rights::{Client, Tracking, Watch};
use super::taps::{self, Taps};
use super::wire;

/// Clients that one VM's proxy serves at the same time; one more is told so and disconnected.
pub const MAX_CLIENTS: usize = 16;

/// Longest command, in bytes.
const MAX_COMMAND: usize = 1 << 20;
/// Unread bytes from which on no further command of the client is looked at.
const ENOUGH: usize = 256 << 10;
/// Unread bytes at which a client that is sent events is given up.
const TOO_MUCH: usize = 4 << 20;
/// How long a client may leave its answers unread.
const STALL: Duration = Duration::from_secs(30);
/// How long the VMM has for a client's command.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same for commands that are answered only when gigabytes have been written.
const LONG_PATIENCE: Duration = Duration::from_secs(3600);

/// How long a command waits for the connection to a VMM that is there. A VMM that takes longer is not healthy.
pub(crate) const CONNECTING: Duration = Duration::from_secs(5);

/// What is behind a proxy.
#[derive(Debug, Clone)]
pub(crate) enum Line {
    /// The VM has no process: commands fail at once.
    Down,
    /// It has one, which is being connected to: commands wait.
    Connecting,
    /// Commands go there.
    Up(Monitor),
}

impl Line {
    fn monitor(&self) -> Option<&Monitor> {
        match self {
            Line::Up(monitor) => Some(monitor),
            Line::Down | Line::Connecting => None,
        }
    }

    fn connecting(&self) -> bool {
        matches!(self, Line::Connecting)
    }
}

/// The monitor for one command that no session sends; waits for it as a session does.
pub(crate) async fn monitor_for(
    vm: &str,
    command: &str,
    mut line: watch::Receiver<Line>,
) -> Result<Monitor, QmpError> {
    let not_running = || QmpError::NotRunning { vm: vm.to_owned() };
    match tokio::time::timeout(CONNECTING, line.wait_for(|line| !line.connecting())).await {
        Ok(Ok(line)) => line.monitor().cloned().ok_or_else(not_running),
        Ok(Err(_)) => Err(not_running()),
        Err(_) => Err(not_connected(command)),
    }
}

fn not_connected(command: &str) -> QmpError {
    QmpError::Deadline { command: command.to_owned(), after: CONNECTING, sent: false }
}

/// What a client is told about its VM, and who wants to know of its commands.
#[derive(Clone)]
pub(crate) struct Subject {
    pub(crate) vm: Arc<str>,
    pub(crate) greeting: Arc<str>,
    pub(crate) line: watch::Receiver<Line>,
    pub(crate) watch: Option<Watch>,
    pub(crate) taps: Option<Taps>,
    /// The proxy is gone.
    pub(crate) stop: CancellationToken,
}

/// A command under way: the client's id for it, and its answer to come.
struct Pending {
    id: Option<Box<RawValue>>,
    reply: Pin<Box<dyn Future<Output = Result<Reply, QmpError>> + Send>>,
}

struct Session {
    subject: Subject,
    client: Client,
    stream: UnixStream,
    framer: Framer,
    descriptors: Vec<OwnedFd>,
    out: Vec<u8>,
    written: usize,
    /// When the client last read something, or had nothing to read.
    progress: Instant,
    pending: Option<Pending>,
    /// A command that waits for the connection to the VMM, and until when.
    waiting: Option<(Request, Instant)>,
    attached: Option<(Monitor, broadcast::Receiver<QmpEvent>)>,
    /// An event that came after the answer which is written first.
    held: Option<QmpEvent>,
    /// The client will send no more.
    eof: bool,
    /// What is written still goes out; then the connection ends.
    ending: bool,
}

/// Why a session ends at once. The client is not told: it is gone, or does not listen.
#[derive(Debug)]
struct Hopeless(&'static str);

/// Serves one client until either side is done.
pub(crate) async fn serve(stream: UnixStream, client: Client, subject: Subject) {
    let vm = Arc::clone(&subject.vm);
    let mut session = Session::new(stream, client, subject);
    if let Err(Hopeless(why)) = session.run().await {
        tracing::debug!(FLOTILLA_VM = &*vm, why, "a QMP client was disconnected");
    }
}

/// What the proxy answers itself, whoever asks.
pub(crate) fn local_answer(request: &Request) -> Option<Answer> {
    if request.execute != "qmp_capabilities" {
        return None;
    }
    // The greeting offers no capabilities, so none can be enabled.
    let wants = request.arguments.as_ref().is_some_and(|arguments| {
        let none = serde_json::from_str::<serde_json::Value>(arguments.get()).is_ok_and(|arguments| {
            arguments.as_object().is_some_and(|members| {
                members
                    .iter()
                    .all(|(name, value)| name == "enable" && value.as_array().is_some_and(Vec::is_empty))
            })
        });
        !none
    });
    Some(if wants {
        Answer::error("GenericError", "no capability can be enabled: the greeting offers none")
    } else {
        Answer::empty()
    })
}

/// How long the VMM has for a command of a client.
pub(crate) fn patience(command: &str) -> Duration {
    // `migrate` to a file answers when the file is written.
    if command == "migrate" { LONG_PATIENCE } else { PATIENCE }
}

impl Session {
    fn new(stream: UnixStream, client: Client, mut subject: Subject) -> Session {
        let attached = subject.line.borrow_and_update().monitor().cloned().map(|monitor| {
            let events = monitor.events();
            (monitor, events)
        });
        let greeting = match &attached {
            Some((monitor, _)) => Arc::clone(monitor.greeting()),
            None => Arc::clone(&subject.greeting),
        };
        Session {
            subject,
            client,
            stream,
            framer: Framer::new(MAX_COMMAND),
            descriptors: Vec::new(),
            out: greeting.as_bytes().to_vec(),
            written: 0,
            progress: Instant::now(),
            pending: None,
            waiting: None,
            attached,
            held: None,
            eof: false,
            ending: false,
        }
    }

    async fn run(&mut self) -> Result<(), Hopeless> {
        let stop = self.subject.stop.clone();
        loop {
            let acted = self.one_command();
            self.flush()?;
            if self.unread() == 0 && (self.ending || self.done()) {
                return Ok(());
            }
            if acted {
                tokio::task::coop::consume_budget().await;
                continue;
            }
            let open = !self.ending;
            let reading = open && !self.eof && !self.busy() && self.unread() < ENOUGH;
            let patience = self.waiting.as_ref().map(|(_, until)| *until);
            tokio::select! {
                // The answer first: what the VMM said after it must not overtake it.
                biased;
                reply = maybe(&mut self.pending), if open => self.answered(reply)?,
                event = next_event(&mut self.attached), if open => self.told(event)?,
                changed = self.subject.line.changed(), if open => self.line_changed(changed.is_err())?,
                () = stop.cancelled(), if open => self.end(),
                () = until(patience), if open => self.waited(),
                ready = self.stream.writable(), if self.unread() > 0 => {
                    ready.map_err(|_| Hopeless("its connection broke"))?;
                }
                ready = self.stream.readable(), if reading => {
                    ready.map_err(|_| Hopeless("its connection broke"))?;
                    self.read()?;
                }
                () = tokio::time::sleep_until(self.progress + STALL), if self.unread() > 0 => {
                    return Err(Hopeless("it does not read its answers"));
                }
            }
        }
    }

    fn unread(&self) -> usize {
        self.out.len() - self.written
    }

    /// Everything that the client asked for is answered, and it will ask no more.
    fn done(&self) -> bool {
        self.eof && !self.busy()
    }

    /// A command is under way.
    fn busy(&self) -> bool {
        self.pending.is_some() || self.waiting.is_some()
    }

    /// Handles at most one command; says whether there was one. After it, and after the end of input, `done` is exact.
    fn one_command(&mut self) -> bool {
        if self.ending || self.busy() || self.unread() >= ENOUGH {
            return false;
        }
        let frame = match self.framer.next() {
            None if self.eof => self.framer.end().map(Err),
            frame => frame,
        };
        match frame {
            None => return false,
            Some(Err(flaw)) => self.answer(&Answer::error("GenericError", &flaw.0), None),
            Some(Ok(frame)) => match Request::parse(&frame) {
                Err(complaint) => {
                    self.answer(&Answer::error("GenericError", &complaint.why), complaint.id.as_deref());
                }
                Ok(request) => self.command(request),
            },
        }
        true
    }

    fn command(&mut self, request: Request) {
        if let Some(answer) = local_answer(&request) {
            return self.answer(&answer, request.id.as_deref());
        }
        if let Some(refusal) = self.client.refusal(&request) {
            // Its descriptors would wait for a command that it may not send.
            self.descriptors.clear();
            return self.answer(&refusal, request.id.as_deref());
        }
        let Some((monitor, _)) = &self.attached else {
            // Up already, and not heard yet, is heard in the same way.
            if !matches!(*self.subject.line.borrow(), Line::Down) {
                self.waiting = Some((request, Instant::now() + CONNECTING));
                return;
            }
            let error = self.not_running();
            return self.answer(&error, request.id.as_deref());
        };
        let monitor = monitor.clone();
        let id = request.id.clone();
        // A descriptor waits for the command that is to take it, as it would at the VMM.
        let take = usize::from(request.execute == "getfd").min(self.descriptors.len());
        let descriptors: Vec<OwnedFd> = self.descriptors.drain(..take).collect();
        self.client.audit(&self.subject.vm, &request);
        let tracking = Tracking::begin(self.subject.watch.as_ref(), &monitor, &request);
        let taps = self.subject.taps.clone();
        let reply = Box::pin(async move {
            let patience = patience(&request.execute);
            let reply = taps::submit(taps.as_ref(), &monitor, &request, descriptors, patience).await;
            if let Some(tracking) = tracking {
                tracking.end(&reply);
            }
            reply
        });
        self.pending = Some(Pending { id, reply });
    }

    /// The VMM was not connected in time.
    fn waited(&mut self) {
        if let Some((request, _)) = self.waiting.take() {
            let error = not_connected(&request.execute);
            self.answer(&Answer::error(error.class(), &error.to_string()), request.id.as_deref());
        }
    }

    fn answered(&mut self, reply: Result<Reply, QmpError>) -> Result<(), Hopeless> {
        let id = self.pending.take().and_then(|pending| pending.id);
        match reply {
            Ok(reply) => {
                self.events_until(reply.after)?;
                self.answer(&reply.answer, id.as_deref());
            }
            Err(error) => self.answer(&Answer::error(error.class(), &error.to_string()), id.as_deref()),
        }
        if let Some(event) = self.held.take() {
            self.event(&event)?;
        }
        Ok(())
    }

    /// Writes the events up to number `last`, which are all here already.
    fn events_until(&mut self, last: u64) -> Result<(), Hopeless> {
        loop {
            let Some((_, events)) = &mut self.attached else { return Ok(()) };
            match events.try_recv() {
                Ok(event) if event.number > last => {
                    self.held = Some(event);
                    return Ok(());
                }
                Ok(event) => {
                    let number = event.number;
                    self.event(&event)?;
                    if number == last {
                        return Ok(());
                    }
                }
                Err(broadcast::error::TryRecvError::Lagged(_)) => return Err(TOO_SLOW),
                Err(_) => return Ok(()),
            }
        }
    }

    fn told(&mut self, event: Result<QmpEvent, broadcast::error::RecvError>) -> Result<(), Hopeless> {
        match event {
            Ok(event) => self.event(&event),
            // Skipping events silently would leave the client with a wrong idea of the VM.
            Err(broadcast::error::RecvError::Lagged(_)) => Err(TOO_SLOW),
            Err(broadcast::error::RecvError::Closed) => {
                self.end();
                Ok(())
            }
        }
    }

    /// The VM started, or ended. Who saw a VM end is disconnected, as by the VMM itself.
    fn line_changed(&mut self, proxy_gone: bool) -> Result<(), Hopeless> {
        let line = self.subject.line.borrow_and_update().clone();
        if self.attached.is_some() || proxy_gone {
            self.events_until(u64::MAX)?;
            self.end();
            return Ok(());
        }
        if let Some(monitor) = line.monitor() {
            self.attached = Some((monitor.clone(), monitor.events()));
        }
        // What waited goes to the VMM, is told that there is none, or waits on until the same time.
        if !line.connecting()
            && let Some((request, _)) = self.waiting.take()
        {
            self.command(request);
        }
        Ok(())
    }

    fn end(&mut self) {
        let pending = self.pending.take().map(|pending| pending.id);
        if let Some(id) = pending.or_else(|| self.waiting.take().map(|(request, _)| request.id)) {
            let error = self.not_running();
            self.answer(&error, id.as_deref());
        }
        self.ending = true;
    }

    fn not_running(&self) -> Answer {
        let error = QmpError::NotRunning { vm: self.subject.vm.to_string() };
        Answer::error(error.class(), &error.to_string())
    }

    fn answer(&mut self, answer: &Answer, id: Option<&RawValue>) {
        self.put(answer.line(id).as_bytes());
    }

    fn event(&mut self, event: &QmpEvent) -> Result<(), Hopeless> {
        if self.unread() + event.line.len() > TOO_MUCH {
            return Err(TOO_SLOW);
        }
        self.put(event.line.as_bytes());
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) {
        if self.unread() == 0 {
            self.progress = Instant::now();
        }
        self.out.extend_from_slice(bytes);
    }

    /// Writes what the client takes now.
    fn flush(&mut self) -> Result<(), Hopeless> {
        while self.unread() > 0 {
            match wire::send(&self.stream, &self.out[self.written..], &[]) {
                Ok(sent) => {
                    self.written += sent;
                    self.progress = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Err(Hopeless("it is gone")),
            }
        }
        if self.unread() == 0 {
            self.out.clear();
            self.out.shrink_to(ENOUGH);
            self.written = 0;
        } else if self.written > ENOUGH {
            self.out.drain(..self.written);
            self.written = 0;
        }
        Ok(())
    }

    fn read(&mut self) -> Result<(), Hopeless> {
        let mut buffer = [0; 16 << 10];
        match wire::receive(&self.stream, &mut buffer, &mut self.descriptors) {
            // Half closed: what was asked is still answered.
            Ok(0) => self.eof = true,
            Ok(got) => self.framer.push(&buffer[..got], got == buffer.len()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Err(Hopeless("its connection broke")),
        }
        if self.descriptors.len() > wire::MAX_DESCRIPTORS {
            return Err(Hopeless("it sends descriptors without a getfd for them"));
        }
        Ok(())
    }
}

const TOO_SLOW: Hopeless = Hopeless("it does not read its events");

impl Future for Pending {
    type Output = Result<Reply, QmpError>;

    fn poll(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<Reply, QmpError>> {
        self.reply.as_mut().poll(context)
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

async fn next_event(
    attached: &mut Option<(Monitor, broadcast::Receiver<QmpEvent>)>,
) -> Result<QmpEvent, broadcast::error::RecvError> {
    match attached {
        Some((_, events)) => events.recv().await,
        None => std::future::pending().await,
    }
}
