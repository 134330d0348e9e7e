//! QMP: owns the conversation with management clients. Text comes in, [`crate::control::Command`]s go down; it knows no device.
//!
//! Runs on the main loop's thread. `syntax` and `codec` find the requests in the stream, `message` gives them their shape,
//! `commands` says what they mean (with `arguments`, `plug`, `answers`, `descriptors` and `schema` to help, and `human` for lines that people type). Each monitor is a front end on a character device, which brings one client at a time, the next
//! one queued, and the rule that a client that does not read is dropped.

mod answers;
mod arguments;
mod codec;
mod commands;
mod descriptors;
#[cfg(fuzzing)]
pub mod fuzz;
mod human;
mod message;
mod plug;
mod schema;
mod spec;
mod syntax;
mod throttle;

use std::os::fd::OwnedFd;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use vmm_sys_util::timerfd::TimerFd;

use crate::chardev::{CharBackend, FrontEnd};
use crate::control::{CommandError, Control, Event, Input, Outcome};
use crate::event::{EventFlags, Ops, Token};
use crate::process::trace;

use codec::{Codec, Frame};
use commands::resolve;
use descriptors::Descriptors;
use message::{Class, QmpError, encode_event, encode_reply, greeting, parse};
use spec::Action;
use throttle::{Throttle, Verdict};

/// Bytes taken at once. A shorter read means that nothing more was waiting.
const READ: usize = 4096;

/// All monitors of a VM.
pub struct Qmp {
    control: Mutex<Control>,
    sessions: Mutex<Vec<Arc<Session>>>,
    balloon: Mutex<Throttle>,
}

/// One monitor: at most one client at a time.
struct Session {
    qmp: Weak<Qmp>,
    backend: Arc<dyn CharBackend>,
    codec: Mutex<Codec>,
    descriptors: Descriptors,
    connected: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Qmp {
    /// No monitors yet.
    pub fn new(control: Control) -> Arc<Self> {
        Arc::new(Self { control: Mutex::new(control), sessions: Mutex::default(), balloon: Mutex::default() })
    }

    /// Serves the clients of `backend`.
    pub fn add_monitor(self: &Arc<Self>, backend: &Arc<dyn CharBackend>) {
        let session = Arc::new(Session {
            qmp: Arc::downgrade(self),
            backend: Arc::clone(backend),
            codec: Mutex::default(),
            descriptors: Descriptors::default(),
            connected: AtomicBool::new(false),
        });
        lock(&self.sessions).push(Arc::clone(&session));
        backend.attach(session);
    }

    /// The VM's life.
    pub fn control(&self) -> MutexGuard<'_, Control> {
        lock(&self.control)
    }

    /// Something happened that no client asked for; all of them are told.
    pub fn happened(&self, input: &Input) {
        let outcomes = self.control().happened(input);
        for outcome in outcomes {
            if let Outcome::Event(event) = outcome {
                self.tell(&event, None);
            }
        }
    }

    /// The guest has so much memory now. Told at most once a second; the last number always.
    pub fn balloon_changed(self: &Arc<Self>, actual: u64, ops: &mut Ops<'_>) {
        tracing::trace!(target: trace::BALLOON_ACTUAL, "{actual} bytes");
        let verdict = lock(&self.balloon).offer(Instant::now(), actual);
        match verdict {
            Verdict::Now => self.tell_balloon(actual),
            Verdict::After(wait) => {
                if let Err(error) = self.tell_balloon_after(wait, ops) {
                    // Without a timer the next change brings it.
                    tracing::warn!("no timer for BALLOON_CHANGED: {error}");
                    if let Some(actual) = lock(&self.balloon).due(Instant::now()) {
                        self.tell_balloon(actual);
                    }
                }
            }
            Verdict::Kept => {}
        }
    }

    fn tell_balloon(&self, actual: u64) {
        self.tell(&Event { name: "BALLOON_CHANGED", data: json!({ "actual": actual }) }, None);
    }

    fn tell_balloon_after(self: &Arc<Self>, wait: Duration, ops: &mut Ops<'_>) -> std::io::Result<()> {
        let mut timer = TimerFd::new()?;
        timer.reset(wait, None)?;
        let (qmp, token) = (Arc::downgrade(self), Arc::new(Mutex::new(None::<Token>)));
        let mine = Arc::clone(&token);
        let rang = move |_: EventFlags, ops: &mut Ops<'_>| {
            if let Some(token) = lock(&mine).take() {
                ops.remove(token);
            }
            let Some(qmp) = qmp.upgrade() else { return };
            let due = lock(&qmp.balloon).due(Instant::now());
            if let Some(actual) = due {
                qmp.tell_balloon(actual);
            }
        };
        // SAFETY: the timer is open until the end of this function; the loop keeps its own duplicate.
        let fd = unsafe { BorrowedFd::borrow_raw(timer.as_raw_fd()) };
        *lock(&token) = Some(ops.add(fd, EventFlags::IN, rang)?);
        Ok(())
    }

    fn tell(&self, event: &Event, but: Option<&Session>) {
        let mut line = String::new();
        encode_event(&mut line, event, SystemTime::now());
        tracing::trace!(target: trace::QMP_EVENT, "{}", line.trim_end());
        for session in lock(&self.sessions).iter() {
            if session.connected.load(Ordering::Relaxed)
                && but.is_none_or(|s| !std::ptr::eq(s, &raw const **session))
            {
                session.backend.write(line.as_bytes());
            }
        }
    }

    /// Carries out one request and appends all that its client must see, in order, to `out`.
    fn serve(&self, text: &[u8], from: &Session, out: &mut String) {
        let request = match parse(text) {
            Ok(request) => request,
            Err((id, error)) => return encode_reply(out, Err(&error), id.as_ref()),
        };
        let id: Option<&Value> = request.id.as_ref();
        tracing::trace!(target: trace::QMP_REQUEST, "{} {:?}", request.command, request.arguments);
        let (command, render) = match resolve(&request, &from.descriptors) {
            Ok(Action::Answer(value)) => return encode_reply(out, Ok(&value), id),
            Ok(Action::Control(command)) => (command, None),
            Ok(Action::Text(command, render)) => (command, Some(render)),
            Err(error) => return encode_reply(out, Err(&error), id),
        };
        let outcomes = self.control().execute(command);
        for outcome in outcomes {
            match outcome {
                Outcome::Reply(Ok(value)) => {
                    let value = render.map_or(value.clone(), |render| render(&value).into());
                    encode_reply(out, Ok(&value), id);
                }
                Outcome::Reply(Err(error)) => {
                    encode_reply(out, Err(&explain(&error)), id);
                }
                Outcome::Event(event) => {
                    encode_event(out, &event, SystemTime::now());
                    self.tell(&event, Some(from));
                }
            }
        }
    }
}

/// An error as a client gets it: with what caused it, unless that is said already.
fn explain(error: &CommandError) -> QmpError {
    let class = match error {
        CommandError::NotFound(_) => Class::DeviceNotFound,
        CommandError::NotActive(_) => Class::DeviceNotActive,
        _ => Class::GenericError,
    };
    QmpError { class, desc: error.to_string() }
}

impl FrontEnd for Session {
    fn can_receive(&self) -> usize {
        READ
    }

    fn receive(&self, data: &[u8]) {
        let Some(qmp) = self.qmp.upgrade() else { return };
        let frames = lock(&self.codec).push(data, data.len() >= READ);
        // One write for all: an event and the answer that follows it arrive together.
        let mut out = String::new();
        for frame in frames {
            match frame {
                Frame::Request(text) => qmp.serve(&text, self, &mut out),
                Frame::Bad(why) => {
                    encode_reply(&mut out, Err(&QmpError::generic(format!("invalid JSON: {why}"))), None);
                }
            }
        }
        if !out.is_empty() {
            self.backend.write(out.as_bytes());
        }
    }

    fn descriptors(&self, fds: Vec<OwnedFd>) {
        self.descriptors.receive(fds);
    }

    fn opened(&self) {
        *lock(&self.codec) = Codec::default();
        self.connected.store(true, Ordering::Relaxed);
        self.backend.write(greeting().as_bytes());
    }

    fn closed(&self) {
        self.connected.store(false, Ordering::Relaxed);
        self.descriptors.clear();
    }
}

#[cfg(test)]
mod tests;
