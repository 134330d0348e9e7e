//! The supervisor's connection to one VMM. One task owns it; everybody else holds a cheap handle.
//!
//! ```text
//!  execute ── number, entry in the table ──▶ queue ──▶ task ──▶ VMM
//!     ▲                                                 │
//!     └───────── the table's entry is answered ◀────────┘
//! ```
//!
//! An entry leaves the table when it is answered, when its deadline passes or when whoever asked goes away; an answer
//! without an entry is late and is dropped. A command that was withdrawn before its turn is never sent; one whose asker
//! merely went away is (`quit` and hang up is a habit).

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::codec::Framer;
use super::error::QmpError;
use super::message::{Answer, Incoming, QmpEvent, Request};
use super::wire;

/// Longest answer we take from a VMM, in bytes.
const MAX_ANSWER: usize = 16 << 20;
/// Longest event: up to [`EVENT_QUEUE`] of them are kept for each VM.
const MAX_EVENT: usize = 64 << 10;
/// Events that a reader may be behind before it is told that it missed some.
const EVENT_QUEUE: usize = 256;
/// Commands that wait for the VMM to take them; more wait at their own expense.
const COMMAND_QUEUE: usize = 32;
/// An answer that is longer in coming than this says something about the VMM, a shorter patience about who asked.
const SILENCE: Duration = Duration::from_secs(2);
/// Malformed messages after which the other side is no VMM.
const MAX_FLAWS: u32 = 16;

/// A handle to the connection; the last one to go closes it.
#[derive(Debug, Clone)]
pub struct Monitor {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Command>,
    closed: watch::Receiver<bool>,
    greeting: Arc<str>,
}

/// An answer, and what went before it.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) answer: Answer,
    /// Number of the newest event that the VMM sent before this answer.
    pub(crate) after: u64,
}

/// What the task and the handles share.
#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    /// Nanoseconds from send to answer of the newest answered command; 0: none yet.
    latency: AtomicU64,
    /// A command was left without an answer, and none has come since.
    silent: watch::Sender<bool>,
}

#[derive(Debug)]
struct Table {
    next: u64,
    /// Number of the newest event.
    event: u64,
    entries: BTreeMap<u64, Entry>,
    /// Gone when the connection is: readers then see the end of the events.
    events: Option<broadcast::Sender<QmpEvent>>,
    ended: Option<Arc<str>>,
}

#[derive(Debug)]
struct Entry {
    sent: Option<Instant>,
    /// `None`: nobody waits any more.
    asker: Option<oneshot::Sender<Reply>>,
}

/// A command on its way to the task.
#[derive(Debug)]
struct Command {
    number: u64,
    line: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// A VMM's side of the connection, after the greeting.
struct Link {
    stream: UnixStream,
    framer: Framer,
}

impl Monitor {
    /// Connects, reads the greeting and negotiates, all within `deadline`. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// [`QmpError::Connect`], [`QmpError::NotQmp`], [`QmpError::Deadline`].
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Monitor, QmpError> {
        let late = || QmpError::Deadline { command: "connect".to_owned(), after: deadline, sent: true };
        let (link, greeting, early) =
            tokio::time::timeout(deadline, negotiate(path)).await.map_err(|_| late())??;
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        let shared = Arc::new(Shared {
            table: Mutex::new(Table {
                next: 1,
                event: 0,
                entries: BTreeMap::new(),
                events: Some(events),
                ended: None,
            }),
            latency: AtomicU64::new(0),
            silent: watch::Sender::new(false),
        });
        let (queue, commands) = mpsc::channel(COMMAND_QUEUE);
        let (ended, closed) = watch::channel(false);
        for event in early {
            shared.publish(event);
        }
        tokio::spawn(drive(link, Arc::clone(&shared), commands, ended));
        Ok(Monitor { shared, queue, closed, greeting })
    }

    /// Sends one command and waits for its answer.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with the VMM's words, [`QmpError::Deadline`], [`QmpError::Closed`].
    pub async fn execute(
        &self,
        command: &str,
        arguments: Option<Value>,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, Vec::new(), deadline).await
    }

    /// The same, with descriptors beside the command.
    ///
    /// # Errors
    /// As those of [`Monitor::execute`].
    pub async fn execute_with(
        &self,
        command: &str,
        arguments: Option<Value>,
        descriptors: Vec<OwnedFd>,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let arguments = match arguments {
            None => None,
            Some(arguments) => Some(
                serde_json::value::to_raw_value(&arguments)
                    .map_err(|error| QmpError::BadRequest { why: error.to_string() })?,
            ),
        };
        let request = Request { execute: command.to_owned(), arguments, id: None };
        self.submit(&request, descriptors, deadline).await?.answer.into_value()
    }

    /// The events from now on. When the connection has ended they end too, after the last one.
    ///
    /// A reader that falls 256 behind is told that it missed some: it asks for the state anew.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        match &self.shared.lock().events {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1,
        }
    }

    /// Returns when the connection has ended, however it did.
    pub async fn closed(&self) {
        // An error means that the task is gone, which is the same news.
        let _ = self.closed.clone().wait_for(|ended| *ended).await;
    }

    /// Both are handles to one connection.
    #[must_use]
    pub fn same(&self, other: &Monitor) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// The connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.lock().ended.is_some()
    }

    /// How long the newest answered command took, from its first byte sent to its answer read.
    #[must_use]
    pub fn latency(&self) -> Option<Duration> {
        match self.shared.latency.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    /// Whether the VMM owes an answer for so long that it seems to hang; it changes back with the next answer.
    #[must_use]
    pub fn silent(&self) -> watch::Receiver<bool> {
        self.shared.silent.subscribe()
    }

    /// The VMM's greeting, as one line.
    pub(crate) fn greeting(&self) -> &Arc<str> {
        &self.greeting
    }

    /// Sends a request and waits for its answer, whatever that is.
    pub(crate) async fn submit(
        &self,
        request: &Request,
        descriptors: Vec<OwnedFd>,
        deadline: Duration,
    ) -> Result<Reply, QmpError> {
        let until = tokio::time::Instant::now() + deadline;
        let late = |sent| QmpError::Deadline { command: request.execute.clone(), after: deadline, sent };
        // The task keeps the queue's other end until the connection is over. A place first, then the table: an entry
        // whose command never reaches the queue would stay for ever.
        let place = match tokio::time::timeout_at(until, self.queue.reserve()).await {
            Ok(Ok(place)) => place,
            Ok(Err(_)) => return Err(self.shared.closed()),
            Err(_) => return Err(late(false)),
        };
        let (asker, answer) = oneshot::channel();
        let ticket = self.shared.enter(asker)?;
        place.send(Command { number: ticket.number, line: request.line(ticket.number), descriptors });
        match tokio::time::timeout_at(until, answer).await {
            Ok(answer) => answer.map_err(|_| self.shared.closed()),
            Err(_) => {
                let sent = self.shared.withdraw(ticket.number);
                self.shared.missed(ticket.number, sent && deadline >= SILENCE);
                Err(late(sent))
            }
        }
    }
}

/// Someone waits for the answer to this command; dropped, nobody does.
struct Ticket<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut table = self.shared.lock();
        match table.entries.get_mut(&self.number) {
            Some(entry) if entry.sent.is_none() => entry.asker = None,
            Some(_) => drop(table.entries.remove(&self.number)),
            None => {}
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it is held; were it to, the table is still a table.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn closed(&self) -> QmpError {
        let reason = self.lock().ended.clone().unwrap_or_else(|| "the connection ended".into());
        QmpError::Closed { reason }
    }

    fn enter(&self, asker: oneshot::Sender<Reply>) -> Result<Ticket<'_>, QmpError> {
        let mut table = self.lock();
        if let Some(reason) = &table.ended {
            return Err(QmpError::Closed { reason: Arc::clone(reason) });
        }
        let number = table.next;
        table.next += 1;
        table.entries.insert(number, Entry { sent: None, asker: Some(asker) });
        Ok(Ticket { shared: self, number })
    }

    /// Takes a command out of the table; says whether it was sent.
    fn withdraw(&self, number: u64) -> bool {
        self.lock().entries.remove(&number).is_some_and(|entry| entry.sent.is_some())
    }

    /// A command was given up. One that is at work on an earlier command, such as a save, is not silent.
    fn missed(&self, number: u64, long: bool) {
        let busy = |table: &Table| table.entries.range(..number).any(|(_, entry)| entry.sent.is_some());
        if long && !busy(&self.lock()) {
            self.silent.send_if_modified(|silent| !std::mem::replace(silent, true));
        }
    }

    /// The command's turn has come. `false`: it was withdrawn.
    fn begin(&self, number: u64) -> bool {
        let mut table = self.lock();
        match table.entries.get_mut(&number) {
            None => return false,
            Some(entry) if entry.asker.is_some() => entry.sent = Some(Instant::now()),
            // Sent for its effect alone.
            Some(_) => drop(table.entries.remove(&number)),
        }
        true
    }

    fn answer(&self, number: Option<u64>, answer: Answer) {
        self.silent.send_if_modified(|silent| std::mem::replace(silent, false));
        let mut table = self.lock();
        let number = match (number, &answer) {
            (Some(number), _) => number,
            // A VMM that could not read a request cannot give its number back. It reads them in order.
            (None, Answer::Error(_)) => {
                let sent = table.entries.iter().find(|(_, entry)| entry.sent.is_some());
                match sent.map(|(number, _)| *number) {
                    Some(number) => number,
                    None => return,
                }
            }
            (None, Answer::Return(_)) => return,
        };
        // An answer to what was not sent yet is a forgery; to what is not there, late.
        if table.entries.get(&number).is_none_or(|entry| entry.sent.is_none()) {
            return;
        }
        if let Some(Entry { sent: Some(sent), asker }) = table.entries.remove(&number) {
            let nanos = u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.latency.store(nanos.max(1), Ordering::Relaxed);
            if let Some(asker) = asker {
                let _ = asker.send(Reply { answer, after: table.event });
            }
        }
    }

    fn publish(&self, event: QmpEvent) {
        let mut table = self.lock();
        table.event += 1;
        if let Some(events) = &table.events {
            // An error means that nobody listens now.
            let _ = events.send(QmpEvent { number: table.event, ..event });
        }
    }

    /// Everything that waits learns of the end: dropped askers and events are how.
    fn end(&self, reason: Arc<str>) {
        let mut table = self.lock();
        table.ended = Some(reason);
        table.entries.clear();
        table.events = None;
    }
}

/// Connects and gets as far as the first command. Returns events that came on the way, too.
async fn negotiate(path: &Path) -> Result<(Link, Arc<str>, Vec<QmpEvent>), QmpError> {
    let stream = UnixStream::connect(path)
        .await
        .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
    let not_qmp = |why: String| QmpError::NotQmp { path: path.to_owned(), why };
    let mut link = Link { stream, framer: Framer::new(MAX_ANSWER) };
    let greeting = link.receive().await.map_err(not_qmp)?;
    match Incoming::parse(&greeting) {
        Ok(Incoming::Greeting) => {}
        Ok(_) => return Err(not_qmp("its first message is no greeting".to_owned())),
        Err(why) => return Err(not_qmp(why)),
    }
    let request = Request { execute: "qmp_capabilities".to_owned(), arguments: None, id: None };
    link.send(&request.line(0)).await.map_err(not_qmp)?;
    let mut early = Vec::new();
    loop {
        let frame = link.receive().await.map_err(not_qmp)?;
        match Incoming::parse(&frame).map_err(not_qmp)? {
            Incoming::Answer(_, Answer::Return(_)) => break,
            Incoming::Answer(_, Answer::Error(body)) => {
                return Err(not_qmp(format!("it refuses to negotiate: {}", body.get())));
            }
            Incoming::Event(event) if early.len() < EVENT_QUEUE => early.push(event),
            Incoming::Event(_) | Incoming::Greeting => {
                return Err(not_qmp("it does not answer qmp_capabilities".to_owned()));
            }
        }
    }
    let greeting = String::from_utf8_lossy(&greeting).replace(['\r', '\n'], " ");
    Ok((link, format!("{greeting}\r\n").into(), early))
}

impl Link {
    /// One message, as long as nothing else goes on.
    async fn receive(&mut self) -> Result<Vec<u8>, String> {
        loop {
            match self.framer.next() {
                Some(Ok(frame)) => return Ok(frame),
                Some(Err(flaw)) => return Err(flaw.0),
                None => {}
            }
            self.stream.readable().await.map_err(|error| error.to_string())?;
            if let Some(end) = self.read() {
                return Err(end);
            }
        }
    }

    async fn send(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            self.stream.writable().await.map_err(|error| error.to_string())?;
            match wire::send(&self.stream, bytes, &[]) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }

    /// Reads what is there into the framer. `Some`: the connection has ended, and how.
    fn read(&mut self) -> Option<String> {
        let mut buffer = [0; 16 << 10];
        match self.stream.try_read(&mut buffer) {
            Ok(0) => Some("it closed its QMP connection".to_owned()),
            Ok(got) => {
                self.framer.push(&buffer[..got], got == buffer.len());
                None
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            Err(error) => Some(format!("its QMP connection broke: {error}")),
        }
    }
}

/// The task. Ends when the VMM hangs up or talks nonsense, or when nobody holds a handle any more.
async fn drive(
    mut link: Link,
    shared: Arc<Shared>,
    mut commands: mpsc::Receiver<Command>,
    ended: watch::Sender<bool>,
) {
    let mut flaws = 0;
    // Messages may have come together with the answer to the negotiation.
    let mut reason = take_frames(&mut link.framer, &shared, &mut flaws);
    let mut current: Option<(Command, usize)> = None;
    while reason.is_none() {
        tokio::select! {
            ready = link.stream.readable() => {
                reason = match ready {
                    // What came before the end is still news: SHUTDOWN comes last.
                    Ok(()) => { let end = link.read(); take_frames(&mut link.framer, &shared, &mut flaws).or(end) }
                    Err(error) => Some(error.to_string()),
                };
            }
            ready = link.stream.writable(), if current.is_some() => {
                reason = match ready {
                    Ok(()) => write(&link.stream, &mut current),
                    Err(error) => Some(error.to_string()),
                };
            }
            command = commands.recv(), if current.is_none() => match command {
                None => reason = Some("nobody needs the connection any more".to_owned()),
                Some(command) => if shared.begin(command.number) {
                    current = Some((command, 0));
                    reason = write(&link.stream, &mut current);
                },
            },
        }
        // A VMM that never stops talking must not keep this thread to itself.
        tokio::task::coop::consume_budget().await;
    }
    shared.end(reason.unwrap_or_default().into());
    let _ = ended.send(true);
}

/// Writes what the socket takes of the current command. `Some`: the connection has ended, and how.
fn write(stream: &UnixStream, current: &mut Option<(Command, usize)>) -> Option<String> {
    let (command, done) = current.as_mut()?;
    let descriptors = if *done == 0 { command.descriptors.as_slice() } else { &[] };
    match wire::send(stream, &command.line[*done..], descriptors) {
        Ok(sent) => {
            *done += sent;
            if *done == command.line.len() {
                *current = None;
            }
            None
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
        // It may have said why before it left: the reader finds the end itself.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            *current = None;
            None
        }
        Err(error) => Some(format!("its QMP connection broke: {error}")),
    }
}

/// Handles every complete message. `Some`: too much nonsense.
fn take_frames(framer: &mut Framer, shared: &Shared, flaws: &mut u32) -> Option<String> {
    while let Some(frame) = framer.next() {
        let flaw = match frame {
            Err(flaw) => flaw.0,
            Ok(frame) => match Incoming::parse(&frame) {
                Ok(Incoming::Event(_)) if frame.len() > MAX_EVENT => {
                    "an event of more than 64 KiB".to_owned()
                }
                Ok(Incoming::Event(event)) => {
                    shared.publish(event);
                    continue;
                }
                Ok(Incoming::Answer(number, answer)) => {
                    shared.answer(number, answer);
                    continue;
                }
                Ok(Incoming::Greeting) => "a second greeting".to_owned(),
                Err(why) => why,
            },
        };
        *flaws += 1;
        if *flaws == 1 {
            tracing::warn!(flaw, "a VMM sent a malformed QMP message; it is ignored");
        }
        if *flaws == MAX_FLAWS {
            return Some(format!("it does not speak QMP: {flaw}"));
        }
    }
    None
}

/// Waits for a future that may not be there.
pub(crate) async fn maybe<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
