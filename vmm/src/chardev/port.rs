//! A byte stream between a front end and whoever is connected on the host: owns its buffers and its flow control.
//!
//! Reading happens on the loop's thread only. Writing happens on any thread, straight to the descriptor while nothing waits, so a
//! byte from the guest costs one system call and no wake-up; what the host does not take waits in a bounded buffer.
//!
//! Lock order: a front end may call in here with its own lock held, therefore nothing here calls a front end under the lock.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::stream::{AtEof, Stream};
use super::{CharBackend, FrontEnd};
use crate::event::{EventFlags, LoopHandle, Ops, Token};
use crate::process::trace;

/// Bytes read at once.
const CHUNK: usize = 4096;
/// Reads per wake-up, so that one busy client does not starve the rest of the loop.
const ROUNDS: usize = 16;

/// What to do when the host does not take what the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overflow {
    DropOldest,
    Disconnect,
}

/// Sizes of the buffers, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    /// While somebody is connected.
    pub(super) backlog: usize,
    /// While nobody is.
    pub(super) replay: usize,
    pub(super) overflow: Overflow,
    /// Whether the front end takes descriptors that a unix socket brings.
    pub(super) descriptors: bool,
}

/// Work on the loop's thread that can be done again and again.
type Reopen = Box<dyn Fn(&mut Ops<'_>) + Send + Sync>;
/// How far input has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Input {
    /// Watched for input.
    Open,
    /// The front end is full or not there: watched for hang-up at most.
    Starved,
    /// At its end.
    Ended,
}

struct State {
    stream: Option<Arc<Stream>>,
    /// Counts connections, so that work queued for an earlier one is recognised.
    generation: u64,
    pending: VecDeque<u8>,
    front_end: Option<Weak<dyn FrontEnd>>,
    input: Input,
    reading: Option<Token>,
    writing: Option<Token>,
    /// A job that arms `writing`, or that disconnects, is on its way.
    posted: bool,
    /// The connection failed; what is written meets nobody.
    broken: bool,
    /// The front end was told of this connection.
    announced: bool,
    /// The front end was told that there is no room.
    wants_room: bool,
}

/// The back end of everything that is a stream.
pub(super) struct Port {
    me: Weak<Port>,
    handle: LoopHandle,
    policy: Policy,
    state: Mutex<State>,
    /// Waits for the next client.
    reopen: OnceLock<Reopen>,
    terminal: OnceLock<String>,
}

impl Port {
    pub(super) fn new(handle: LoopHandle, policy: Policy) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            handle,
            policy,
            state: Mutex::new(State {
                stream: None,
                generation: 0,
                pending: VecDeque::new(),
                front_end: None,
                input: Input::Starved,
                reading: None,
                writing: None,
                posted: false,
                broken: false,
                announced: false,
                wants_room: false,
            }),
            reopen: OnceLock::new(),
            terminal: OnceLock::new(),
        })
    }

    /// Names the terminal that was made for this port.
    pub(super) fn set_terminal(&self, name: String) {
        // Set once, by the room that made the port.
        let _ = self.terminal.set(name);
    }

    /// Makes the port one that clients come to and leave.
    pub(super) fn reopen_with(&self, reopen: impl Fn(&mut Ops<'_>) + Send + Sync + 'static) {
        // Set once, by the room that made the port.
        let _ = self.reopen.set(Box::new(reopen));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn front_end(&self) -> Option<Arc<dyn FrontEnd>> {
        self.state().front_end.as_ref()?.upgrade()
    }

    /// A client has come. What was kept for it goes out first.
    pub(super) fn connect(&self, stream: Stream, ops: &mut Ops<'_>) {
        let mut state = self.state();
        state.generation += 1;
        state.input = if stream.input.is_some() { Input::Starved } else { Input::Ended };
        state.stream = Some(Arc::new(stream));
        state.broken = false;
        state.posted = false;
        state.announced = false;
        tracing::trace!(target: trace::CHARDEV_CONNECT, "client {}", state.generation);
        drop(state);
        self.flush(ops);
        self.announce();
        self.resume_input(ops);
    }

    /// Tells the front end of the connection, once: a client may come between a front end's attaching and the loop's first look at it.
    fn announce(&self) {
        let Some(front_end) = self.front_end() else { return };
        let mut state = self.state();
        if state.stream.is_none() || std::mem::replace(&mut state.announced, true) {
            return;
        }
        drop(state);
        front_end.opened();
    }

    /// The client has gone, or must go.
    fn disconnect(&self, ops: &mut Ops<'_>) {
        let mut state = self.state();
        for token in [state.reading.take(), state.writing.take()].into_iter().flatten() {
            ops.remove(token);
        }
        state.pending.clear();
        state.input = Input::Ended;
        state.posted = false;
        let Some(reopen) = self.reopen.get() else {
            // Standard output has gone: what follows meets nobody.
            state.broken = true;
            let waits = std::mem::take(&mut state.wants_room);
            drop(state);
            return self.tell_room(waits);
        };
        let gone = state.stream.take();
        tracing::trace!(target: trace::CHARDEV_DISCONNECT, "client {}", state.generation);
        let announced = std::mem::take(&mut state.announced);
        // `closed` tells it.
        state.wants_room = false;
        drop(state);
        if gone.is_some() {
            drop(gone);
            if announced && let Some(front_end) = self.front_end() {
                front_end.closed();
            }
            reopen(ops);
        }
    }

    /// Watches for input again, if there is a front end with room.
    fn resume_input(&self, ops: &mut Ops<'_>) {
        let has_room = self.front_end().is_some_and(|f| f.can_receive() > 0);
        let mut state = self.state();
        let Some(stream) = state.stream.clone() else { return };
        let Some(fd) = stream.input.as_ref().filter(|_| state.input == Input::Starved) else { return };
        let wanted = if has_room { EventFlags::IN } else { EventFlags::empty() };
        if has_room {
            state.input = Input::Open;
        }
        if let Some(token) = state.reading {
            if ops.set_interest(token, wanted).is_err() {
                drop(state);
                self.disconnect(ops);
            }
            return;
        }
        // A hang-up cannot be masked: standard input is not watched at all while nobody reads it.
        if !has_room && stream.at_eof == AtEof::KeepOutput {
            return;
        }
        let me = Weak::clone(&self.me);
        let handler = move |ready: EventFlags, ops: &mut Ops<'_>| {
            if let Some(port) = me.upgrade() {
                port.input_event(ready, ops);
            }
        };
        match ops.add(fd, wanted, handler) {
            Ok(token) => state.reading = Some(token),
            // Regular files and /dev/null are always ready and cannot be watched.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                drop(state);
                self.read(ops);
                self.reread();
            }
            Err(e) => {
                tracing::warn!("character device: cannot wait for input: {e}");
                state.input = Input::Ended;
            }
        }
    }

    /// Reads the next part of an input that cannot be watched.
    fn reread(&self) {
        let state = self.state();
        if state.input == Input::Open && state.reading.is_none() {
            let me = Weak::clone(&self.me);
            self.handle.post(move |ops| {
                if let Some(port) = me.upgrade() {
                    port.read(ops);
                    port.reread();
                }
            });
        }
    }

    fn input_event(&self, ready: EventFlags, ops: &mut Ops<'_>) {
        let mut state = self.state();
        if state.input == Input::Open {
            drop(state);
            return self.read(ops);
        }
        // Not watched for input: this is a hang-up or an error.
        if ready.intersects(EventFlags::HUP | EventFlags::ERR) {
            let keep = state.stream.as_ref().is_some_and(|s| s.at_eof == AtEof::KeepOutput);
            if keep {
                if let Some(token) = state.reading.take() {
                    ops.remove(token);
                }
            } else {
                drop(state);
                self.disconnect(ops);
            }
        }
    }

    fn read(&self, ops: &mut Ops<'_>) {
        let (Some(front_end), Some(stream)) = (self.front_end(), self.state().stream.clone()) else { return };
        let Some(fd) = &stream.input else { return };
        let mut buffer = [0u8; CHUNK];
        for _ in 0..ROUNDS {
            let mut room = front_end.can_receive();
            if room == 0 {
                // Say so first, then look again: a front end that makes room in between calls `front_end_ready`.
                self.state().input = Input::Starved;
                room = front_end.can_receive();
                if room == 0 {
                    return self.starve(ops);
                }
                self.state().input = Input::Open;
            }
            if !stream.ready(fd, PollFlags::IN) {
                return;
            }
            let part = room.min(CHUNK);
            let space = buffer.get_mut(..part).unwrap_or_default();
            match stream.read(fd, space, self.policy.descriptors.then_some(&*front_end)) {
                Ok(0) => return self.end_of_input(&stream, ops),
                Ok(n) => {
                    let data = buffer.get(..n).unwrap_or_default();
                    match &stream.filter {
                        Some(filter) => front_end.receive(&filter(data)),
                        None => front_end.receive(data),
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(Errno::IO) if stream.at_eof == AtEof::KeepOutput => {
                    return self.end_of_input(&stream, ops);
                }
                Err(_) => return self.disconnect(ops),
            }
        }
    }

    fn starve(&self, ops: &mut Ops<'_>) {
        let mut state = self.state();
        let Some(token) = state.reading else { return };
        let keep = state.stream.as_ref().is_some_and(|s| s.at_eof == AtEof::KeepOutput);
        if keep {
            state.reading = None;
            ops.remove(token);
        } else {
            // Failing to narrow the interest would only cost wake-ups.
            let _ = ops.set_interest(token, EventFlags::empty());
        }
    }

    fn end_of_input(&self, stream: &Stream, ops: &mut Ops<'_>) {
        match stream.at_eof {
            AtEof::Disconnect => self.disconnect(ops),
            AtEof::KeepOutput => {
                let mut state = self.state();
                state.input = Input::Ended;
                if let Some(token) = state.reading.take() {
                    ops.remove(token);
                }
            }
            AtEof::AwaitHangUp => {
                let mut state = self.state();
                state.input = Input::Ended;
                if let Some(token) = state.reading {
                    // A peer that is wholly gone is reported at once; one that only stopped writing still gets output.
                    let _ = ops.set_interest(token, EventFlags::empty());
                }
            }
        }
    }

    fn tell_room(&self, waits: bool) {
        if waits && let Some(front_end) = self.front_end() {
            front_end.writable();
        }
    }

    /// Sends what waits; watches for room if some is left.
    fn flush(&self, ops: &mut Ops<'_>) {
        self.send_pending(ops);
        let mut state = self.state();
        let waits = state.wants_room && state.pending.len() <= self.policy.backlog / 2;
        if waits {
            state.wants_room = false;
        }
        drop(state);
        self.tell_room(waits);
    }

    fn send_pending(&self, ops: &mut Ops<'_>) {
        let mut state = self.state();
        state.posted = false;
        let Some(stream) = state.stream.clone().filter(|_| !state.broken) else { return };
        while !state.pending.is_empty() {
            let result = stream.send(state.pending.as_slices().0);
            match result {
                Ok(0) => break,
                Ok(n) => drop(state.pending.drain(..n)),
                Err(_) => {
                    drop(state);
                    return self.disconnect(ops);
                }
            }
        }
        if state.pending.is_empty() {
            if let Some(token) = state.writing.take() {
                ops.remove(token);
            }
            return;
        }
        if state.writing.is_none() {
            let me = Weak::clone(&self.me);
            let handler = move |_: EventFlags, ops: &mut Ops<'_>| {
                if let Some(port) = me.upgrade() {
                    port.flush(ops);
                }
            };
            match ops.add(&stream.output, EventFlags::OUT, handler) {
                Ok(token) => state.writing = Some(token),
                Err(e) => {
                    tracing::warn!("character device: cannot wait for room to write: {e}");
                    drop(state);
                    self.disconnect(ops);
                }
            }
        }
    }

    /// Has the loop look at this connection: to wait for room, or to end it.
    fn post(&self, state: &mut State) {
        if state.posted {
            return;
        }
        state.posted = true;
        let (me, generation, broken) = (Weak::clone(&self.me), state.generation, state.broken);
        self.handle.post(move |ops| {
            let Some(port) = me.upgrade() else { return };
            let now = port.state();
            if now.generation != generation {
                return;
            }
            let broken = broken || now.broken;
            drop(now);
            if broken { port.disconnect(ops) } else { port.flush(ops) }
        });
    }
}

impl CharBackend for Port {
    fn had_client(&self) -> bool {
        self.state().generation > 0
    }

    fn terminal(&self) -> Option<&str> {
        self.terminal.get().map(String::as_str)
    }

    fn write(&self, data: &[u8]) {
        let mut state = self.state();
        let Some(stream) = state.stream.clone() else {
            keep_newest(&mut state.pending, data, self.policy.replay);
            return;
        };
        if state.broken {
            return;
        }
        let mut rest = data;
        if state.pending.is_empty() {
            match stream.send(data) {
                Ok(n) => rest = data.get(n..).unwrap_or_default(),
                Err(_) => {
                    state.broken = true;
                    return self.post(&mut state);
                }
            }
        }
        if rest.is_empty() {
            return;
        }
        if self.policy.overflow == Overflow::Disconnect
            && state.pending.len() + rest.len() > self.policy.backlog
        {
            tracing::warn!("a client does not read what it asked for and is disconnected");
            state.broken = true;
        } else {
            keep_newest(&mut state.pending, rest, self.policy.backlog);
        }
        self.post(&mut state);
    }

    fn room(&self) -> usize {
        let mut state = self.state();
        if state.stream.is_none() || state.broken {
            return usize::MAX;
        }
        let room = self.policy.backlog.saturating_sub(state.pending.len());
        state.wants_room = room == 0;
        room
    }

    fn attach(&self, front_end: Arc<dyn FrontEnd>) {
        self.state().front_end = Some(Arc::downgrade(&front_end));
        drop(front_end);
        let me = Weak::clone(&self.me);
        self.handle.post(move |ops| {
            if let Some(port) = me.upgrade() {
                port.announce();
                port.resume_input(ops);
            }
        });
    }

    fn front_end_ready(&self) {
        let state = self.state();
        if state.input != Input::Starved || state.stream.is_none() {
            return;
        }
        let me = Weak::clone(&self.me);
        self.handle.post(move |ops| {
            if let Some(port) = me.upgrade() {
                port.resume_input(ops);
            }
        });
    }

    fn drain(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut state = self.state();
        let Some(stream) = state.stream.clone().filter(|_| !state.broken) else { return };
        while !state.pending.is_empty() {
            match stream.send(state.pending.as_slices().0) {
                Ok(0) => {
                    let left = end.saturating_duration_since(Instant::now());
                    let mut fds = [PollFd::from_borrowed_fd(stream.output.as_fd(), PollFlags::OUT)];
                    let left = Timespec::try_from(left).unwrap_or_default();
                    if left == Timespec::default() || !poll(&mut fds, Some(&left)).is_ok_and(|n| n > 0) {
                        return;
                    }
                }
                Ok(n) => drop(state.pending.drain(..n)),
                Err(_) => return,
            }
        }
        stream.discard_input();
    }
}

/// Appends `data` and drops the oldest bytes beyond `limit`.
fn keep_newest(buffer: &mut VecDeque<u8>, data: &[u8], limit: usize) {
    let data = data.get(data.len().saturating_sub(limit)..).unwrap_or_default();
    let excess = (buffer.len() + data.len()).saturating_sub(limit);
    buffer.drain(..excess.min(buffer.len()));
    buffer.extend(data);
}
