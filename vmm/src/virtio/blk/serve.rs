//! Carrying out block requests: owns the engine of one session, and what becomes of each request.
//!
//! Runs on the I/O thread. A request owns its buffers, and the list of them that the kernel reads, until the engine gives its tag
//! back; no path drops one earlier.

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::timerfd::TimerFd;

use super::lanes::{InFlight, Lanes};
use super::limit::{Limit, borrow_timer};
use super::medium::{Counters, Medium};
use super::request::{ID_BYTES, Kind, Request, Rules, Status};
use crate::block::{Around, Engine, Op};
use crate::event::{EventFlags, Ops, Token};
use crate::virtio::queue::{Position, QueueError};
use crate::virtio::spin::Spin;
use crate::virtio::worker::Gate;
use crate::virtio::{Interrupt, complain, fd_of};

/// Requests taken per wake-up, so that one busy device does not starve the others on its thread.
const BATCH: u32 = 256;
/// Requests taken from one ring before the next one's turn, and before a look at what is done already: a driver that polls goes on
/// while the rest is served.
const SHOW_EVERY: u32 = 4;
/// Bytes moved after which any driver is told: it goes on while the rest is moved, which takes longer than to tell it.
const TELL_EVERY: u64 = 128 << 10;
/// Times that one request is tried again when the kernel says EINTR or EAGAIN.
const TRIES: u32 = 16;

/// What a session is made from.
pub(super) struct Parts {
    pub(super) durable_writes: bool,
    /// DISCARD was negotiated.
    pub(super) unmap: bool,
    /// WRITE_ZEROES was negotiated.
    pub(super) zero: bool,
    /// RO was offered.
    pub(super) read_only: bool,
    pub(super) lanes: Lanes,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

/// A request that is not finished, and what to do next.
type Rest = Option<(Kind, Box<Request>)>;

pub(super) struct Server {
    /// Dropped before the disk, whose descriptor it uses.
    engine: Option<Box<dyn Engine>>,
    /// The watch of the engine's descriptor.
    watch: Option<Token>,
    around: Option<Around>,
    limit: Option<Limit>,
    medium: Option<Arc<Medium>>,
    rules: Rules,
    in_flight: InFlight,
    /// Kept for the next requests, with the memory for their lists.
    #[expect(clippy::vec_box, reason = "they move from place to place, and are not small")]
    spare: Vec<Box<Request>>,
    /// Bytes that requests have covered which the driver has not been told of.
    untold: u64,
    /// The ring made no sense, or the engine failed: only wait for what is in flight.
    broken: bool,
    spin: Spin,
    parts: Parts,
    /// No request is taken; told, once, when nothing is in flight.
    quiet: Option<Option<Sender<()>>>,
    /// Told when nothing is in flight and the disk is let go. Dropped last: its other end takes that for the same.
    leaving: Option<Sender<()>>,
}

/// The first thing of a session, on the I/O thread. Weak, here and below: a job that waits for its turn, or comes after the
/// driver's reset, must not keep a disk that has left.
pub(super) fn start(
    gate: &Arc<Gate<Server>>,
    ops: &mut Ops<'_>,
    medium: &Weak<Medium>,
    interrupt: &dyn Interrupt,
) {
    let started = gate.enter(|server| -> io::Result<()> {
        let edge = EventFlags::IN | EventFlags::ET;
        for lane in server.parts.lanes.iter() {
            let notified = Arc::clone(gate);
            let handler = move |_, ops: &mut Ops<'_>| turn(&notified, ops);
            gate.watch(ops, fd_of(&lane.notify), edge, handler)?;
        }
        if let Some(medium) = medium.upgrade() {
            server.load(gate, ops, medium)?;
        }
        server.run();
        Ok(())
    });
    give_up_on_error(started, interrupt);
}

/// A disk has come.
pub(super) fn insert(
    gate: &Arc<Gate<Server>>,
    ops: &mut Ops<'_>,
    medium: &Weak<Medium>,
    interrupt: &dyn Interrupt,
) {
    let inserted = gate.enter(|server| {
        if let Some(medium) = medium.upgrade() {
            server.load(gate, ops, medium)?;
            interrupt.config();
        }
        Ok(())
    });
    give_up_on_error(inserted, interrupt);
}

fn give_up_on_error(result: Option<io::Result<()>>, interrupt: &dyn Interrupt) {
    if let Some(Err(error)) = result {
        tracing::error!("virtio-blk: cannot watch descriptors: {error}");
        interrupt.needs_reset();
    }
}

/// The disk has to go: from now on no request reaches it. `gone` is told, or dropped, when the server has let it go.
pub(super) fn eject(gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>, gone: Sender<()>) {
    gate.enter(|server| {
        server.rules.size = 0;
        server.leaving = Some(gone);
        server.run();
        server.let_go_when_idle(gate, ops);
    });
}

/// The device is to be suspended: from now on no request is taken. `quiet` is told when those in flight are done.
pub(super) fn quiesce(gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>, quiet: Sender<()>) {
    gate.enter(|server| server.quiet = Some(Some(quiet)));
    turn(gate, ops);
}

/// The device is not suspended after all.
pub(super) fn go_on(gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>) {
    gate.enter(|server| server.quiet = None);
    turn(gate, ops);
}

/// The driver has notified, or the engine has something to give back.
fn turn(gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>) {
    gate.enter(|server| {
        server.run();
        server.let_go_when_idle(gate, ops);
        if server.in_flight.busy() == 0
            && let Some(quiet) = server.quiet.as_mut().and_then(Option::take)
        {
            let _ = quiet.send(());
        }
    });
}

impl Server {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            engine: None,
            watch: None,
            around: None,
            limit: None,
            medium: None,
            rules: Rules::default(),
            in_flight: InFlight::default(),
            spare: Vec::new(),
            untold: 0,
            broken: false,
            spin: Spin::default(),
            parts,
            quiet: None,
            leaving: None,
        }
    }

    /// Takes a disk, and makes its engine.
    fn load(&mut self, gate: &Arc<Gate<Self>>, ops: &mut Ops<'_>, medium: Arc<Medium>) -> io::Result<()> {
        let Parts { unmap, zero, read_only, .. } = self.parts;
        self.rules =
            Rules { size: medium.disk.size(), read_only: read_only || medium.read_only, unmap, zero };
        if let Some(throttle) = medium.disk.throttle() {
            let timer = TimerFd::new().map_err(io::Error::from)?;
            let over = Arc::clone(gate);
            // Never read: each time it is set and runs out makes an edge.
            let edge = EventFlags::IN | EventFlags::ET;
            let watch = gate.watch(ops, borrow_timer(&timer), edge, move |_, ops: &mut Ops<'_>| {
                over.enter(|server| {
                    if let Some(limit) = &mut server.limit {
                        limit.fired();
                    }
                });
                turn(&over, ops);
            })?;
            self.limit = Some(Limit::new(throttle, timer, watch));
        }
        let engine = self.engine.insert(medium.disk.engine(self.parts.lanes.depth()));
        self.medium = Some(medium);
        if let Some(fd) = engine.ready() {
            let done = Arc::clone(gate);
            let handler = move |_, ops: &mut Ops<'_>| turn(&done, ops);
            self.watch = Some(gate.watch(ops, fd, EventFlags::IN, handler)?);
        }
        Ok(())
    }

    fn let_go_when_idle(&mut self, gate: &Gate<Self>, ops: &mut Ops<'_>) {
        if self.in_flight.busy() > 0 {
            return;
        }
        let Some(gone) = self.leaving.take() else { return };
        // The watch has a duplicate of the engine's descriptor.
        if let Some(token) = self.watch.take() {
            gate.unwatch(ops, token);
        }
        if let Some(limit) = self.limit.take() {
            gate.unwatch(ops, limit.watch());
        }
        (self.engine, self.around, self.medium) = (None, None, None);
        let _ = gone.send(());
    }

    /// The driver has notified, or something is done: does what there is to do.
    pub(super) fn run(&mut self) {
        if self.broken {
            self.reap();
            return;
        }
        match self.serve() {
            Ok(true) => {
                // More to do, but others get their turn first.
                self.parts.lanes.come_back();
            }
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// Where each ring stands when nothing is in flight.
    pub(super) fn positions(&self) -> Vec<(u16, Position)> {
        self.parts.lanes.positions()
    }

    /// True: stopped with requests left.
    fn serve(&mut self) -> Result<bool, QueueError> {
        if self.quiet.is_some() {
            self.reap();
            self.publish();
            return Ok(false);
        }
        self.spin.woken();
        self.parts.lanes.disable_notify();
        let mut left = BATCH;
        loop {
            self.reap();
            let limited = self.take_some(&mut left)?;
            self.submit();
            self.reap();
            self.publish();
            if self.broken || limited {
                // The driver need not notify while the timer runs.
                return Ok(false);
            }
            if left == 0 {
                return Ok(true);
            }
            let lanes = &self.parts.lanes;
            if self.in_flight.busy() == 0 && self.spin.look(|| lanes.wait()) {
                continue;
            }
            if !self.parts.lanes.enable_notify()? {
                return Ok(false);
            }
            self.spin.woken();
            self.parts.lanes.disable_notify();
        }
    }

    /// Starts what the rings hold, a few from each in turn, until they are empty or `left` is 0. True: there are more, but none may be
    /// taken now.
    fn take_some(&mut self, left: &mut u32) -> Result<bool, QueueError> {
        let mut any = true;
        while any && !self.broken {
            any = false;
            for lane in 0..self.parts.lanes.count() {
                for _ in 0..SHOW_EVERY {
                    if *left == 0 {
                        return Ok(false);
                    }
                    if self.limit.as_mut().is_some_and(|l| !l.allows_one()) {
                        return Ok(true);
                    }
                    let mut request = self.spare.pop().unwrap_or_default();
                    if !self.parts.lanes.pop(lane, &mut request)? {
                        self.spare.push(request);
                        break;
                    }
                    if let Some(limit) = &mut self.limit {
                        limit.spend_one();
                    }
                    (*left, any) = (*left - 1, true);
                    self.start(request);
                    if self.untold >= TELL_EVERY {
                        self.publish();
                    }
                }
            }
            self.reap();
            self.parts.lanes.show();
        }
        Ok(false)
    }

    fn publish(&mut self) {
        self.untold = 0;
        self.parts.lanes.publish(&*self.parts.interrupt);
    }

    fn fail(&mut self, error: &dyn std::fmt::Display) {
        self.broken = true;
        complain(|| tracing::warn!(drive = self.name(), "virtio-blk needs a reset: {error}"));
        self.parts.interrupt.needs_reset();
    }

    fn name(&self) -> &str {
        self.medium.as_ref().map_or("(empty slot)", |m| m.disk.id())
    }

    fn start(&mut self, mut request: Box<Request>) {
        match request.parse(self.rules) {
            Err(status) => drop(self.finish(request, status)),
            Ok(Kind::GetId) => {
                let serial = self.medium.as_ref().map_or([0; ID_BYTES], |m| m.serial);
                request.written = request.chain.writable.fill(&serial) as u32;
                self.finish(request, Status::Ok);
            }
            Ok(Kind::Write) => {
                let detect = self.medium.as_ref().and_then(|m| m.disk.detect_zeroes());
                let kind = match detect.filter(|_| request.writes_zeroes()) {
                    Some(unmap) => Kind::WriteZeroes { len: request.chain.readable.len(), unmap },
                    None => Kind::Write,
                };
                self.push(kind, request);
            }
            Ok(kind) => self.push(kind, request),
        }
    }

    /// Gives the request, or the rest of it, to the engine, until it is done or on its way.
    fn push(&mut self, kind: Kind, request: Box<Request>) {
        let mut rest = Some((kind, request));
        while let Some((kind, request)) = rest {
            rest = self.give(kind, request);
        }
    }

    /// Gives it to the engine once. Returns what is left to do.
    fn give(&mut self, kind: Kind, mut request: Box<Request>) -> Rest {
        let (Some(engine), Some(medium)) = (&mut self.engine, &self.medium) else {
            return self.finish(request, Status::IoErr);
        };
        let disk = &medium.disk;
        let offset = request.offset;
        let op = match kind {
            Kind::Read | Kind::Write => {
                let buffers = request.buffers(kind);
                if buffers.is_empty() {
                    return self.finish(request, Status::Ok);
                }
                if disk.needs_bounce(buffers.parts(), offset) {
                    return self.go_around(kind, request);
                }
                match kind {
                    Kind::Read => Op::Read(buffers.parts()),
                    _ => Op::Write { parts: buffers.parts(), durable: self.parts.durable_writes },
                }
            }
            Kind::Flush if disk.no_flush() => return self.finish(request, Status::Ok),
            Kind::Flush => Op::Flush,
            // §5.2.6.2 lets the device do nothing: a disk that came into a slot which had offered discards need not support them.
            Kind::Discard { .. } if !disk.discard() => return self.finish(request, Status::Ok),
            Kind::Discard { len } => Op::Discard { len },
            Kind::WriteZeroes { len, unmap } => Op::Zero { len, unmap: unmap && disk.discard() },
            Kind::GetId => return self.finish(request, Status::Unsupported),
        };
        if let Kind::Discard { len: 0 } | Kind::WriteZeroes { len: 0, .. } = kind {
            return self.finish(request, Status::Ok);
        }
        let Some(tag) = self.in_flight.next_tag() else { return self.finish(request, Status::IoErr) };
        // SAFETY: the request goes to its place and stays there until the engine gives its tag back; the list of its buffers is on
        // the heap and does not move with it; the buffers are guest RAM, which the queue keeps.
        match unsafe { engine.push(tag, op, offset) } {
            Ok(Some(n)) => self.done(kind, request, Ok(n)),
            Ok(None) => {
                self.in_flight.put(kind, request);
                None
            }
            Err(error) => {
                // The engine did not take it, so nothing refers to its buffers.
                self.finish(request, Status::IoErr);
                self.fail(&error);
                None
            }
        }
    }

    fn submit(&mut self) {
        if let Some(Err(error)) = self.engine.as_mut().map(|e| e.submit()) {
            self.fail(&error);
        }
    }

    /// Takes back what the engine has done, and goes on with what it has done only in part.
    fn reap(&mut self) {
        if self.in_flight.busy() == 0 {
            return;
        }
        let mut again = false;
        while let Some((tag, result)) = self.engine.as_mut().and_then(|e| e.reap()) {
            let Some((kind, request)) = self.in_flight.take(tag) else { continue };
            if let Some((kind, request)) = self.done(kind, request, result) {
                self.push(kind, request);
                again = true;
            }
        }
        if again && !self.broken {
            self.submit();
        }
    }

    /// What the engine has done of it. Returns what is left to do.
    fn done(&mut self, kind: Kind, mut request: Box<Request>, result: io::Result<u32>) -> Rest {
        if self.broken {
            // Not a word to the guest any more: it may have taken its ring away.
            return None;
        }
        match (kind, result) {
            (Kind::Read | Kind::Write, Ok(n)) if n > 0 => {
                let buffers = request.buffers(kind);
                buffers.advance(n as usize);
                let left = !buffers.is_empty();
                request.written += if kind == Kind::Read { n } else { 0 };
                if !left {
                    return self.finish(request, Status::Ok);
                }
                request.offset += u64::from(n);
                Some((kind, request))
            }
            // The image has become shorter than it was when it was opened.
            (Kind::Read | Kind::Write, Ok(_)) => {
                self.report(kind, &io::ErrorKind::UnexpectedEof.into());
                self.finish(request, Status::IoErr)
            }
            // §5.2.6.2: what a write-through disk has answered is on the medium, zeroes too.
            (Kind::Discard { .. } | Kind::WriteZeroes { .. }, Ok(_)) if self.parts.durable_writes => {
                Some((Kind::Flush, request))
            }
            (_, Ok(_)) => self.finish(request, Status::Ok),
            (_, Err(error)) => self.failed(kind, request, &error),
        }
    }

    fn failed(&mut self, kind: Kind, mut request: Box<Request>, error: &io::Error) -> Rest {
        let code = error.raw_os_error().unwrap_or(0);
        if matches!(code, libc::EINTR | libc::EAGAIN) && request.tries < TRIES {
            request.tries += 1;
            return Some((kind, request));
        }
        match kind {
            Kind::Discard { .. } if code == libc::EOPNOTSUPP => self.finish(request, Status::Unsupported),
            // A file system that can neither punch holes nor make zeroes: the length is limited by what a request may ask.
            Kind::WriteZeroes { .. } if code == libc::EOPNOTSUPP => self.go_around(kind, request),
            _ => {
                self.report(kind, error);
                self.finish(request, Status::IoErr)
            }
        }
    }

    fn report(&self, kind: Kind, error: &io::Error) {
        complain(|| tracing::warn!(drive = self.name(), "{kind:?} failed: {error}"));
    }

    /// For what the kernel does not take as it is: through host memory, synchronously.
    fn go_around(&mut self, kind: Kind, mut request: Box<Request>) -> Rest {
        let status = match self.bounce(kind, &mut request) {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.report(kind, &error);
                Status::IoErr
            }
        };
        self.finish(request, status)
    }

    fn bounce(&mut self, kind: Kind, request: &mut Request) -> io::Result<()> {
        let Some(medium) = self.medium.clone() else { return Err(io::ErrorKind::NotFound.into()) };
        let disk = &medium.disk;
        let mut around = match self.around.take() {
            Some(around) => around,
            None => disk.around()?,
        };
        let offset = request.offset;
        let len = if let Kind::WriteZeroes { len, .. } = kind { len } else { request.buffers(kind).len() };
        if around.needs_quiet(offset, len) {
            // It reads and writes back the rest of blocks, which another request may be writing.
            self.wait_idle();
        }
        let result = match kind {
            Kind::Read => around.read(disk.file(), offset, len, |bytes| {
                request.written += request.chain.writable.fill(bytes) as u32;
            }),
            Kind::WriteZeroes { .. } => around.write(disk.file(), offset, len, |bytes| bytes.fill(0)),
            _ => around.write(disk.file(), offset, len, |bytes| {
                request.chain.readable.take(bytes);
            }),
        };
        self.around = Some(around);
        result.and_then(
            |()| if kind != Kind::Read && self.parts.durable_writes { disk.flush() } else { Ok(()) },
        )
    }

    fn wait_idle(&mut self) {
        while self.in_flight.busy() > 0 && !self.broken {
            self.submit();
            // Before the wait: an engine may have done some at once, and then nothing becomes readable.
            self.reap();
            if self.in_flight.busy() > 0 {
                self.wait(None);
            }
        }
    }

    /// Waits until the engine may have something to give back.
    fn wait(&self, timeout: Option<Duration>) {
        if let Some(fd) = self.engine.as_ref().and_then(|e| e.ready()) {
            let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
            // An interrupted or failed wait only means to look again.
            let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout.as_ref());
        }
    }

    /// Gives the request back to the driver. The status byte is the last that is written to its buffers.
    fn finish(&mut self, mut request: Box<Request>, status: Status) -> Rest {
        self.count(&request, status);
        let written = match request.status.take() {
            Some(place) => {
                place.write(status as u8);
                // §2.7.8: bytes written from the front on. After an error only the status is known to be.
                if status == Status::Ok { request.written.saturating_add(1) } else { 1 }
            }
            // No room for a status: give the descriptors back all the same, or the driver runs out of them.
            None => 0,
        };
        self.parts.lanes.complete(&request, written);
        self.untold += request.counted.map_or(0, |(_, bytes)| bytes);
        self.spare.push(request);
        None
    }

    fn count(&self, request: &Request, status: Status) {
        let Some(Medium { counters, .. }) = self.medium.as_deref() else { return };
        if status != Status::Ok {
            return Counters::add(&counters.failed, 0);
        }
        let Some((kind, bytes)) = request.counted else { return };
        let counter = match kind {
            Kind::Read => &counters.read,
            Kind::Write => &counters.write,
            Kind::Flush => &counters.flush,
            Kind::Discard { .. } | Kind::WriteZeroes { .. } => &counters.unmap,
            Kind::GetId => return,
        };
        Counters::add(counter, bytes);
    }

    /// Waits until nothing is in flight. What comes back is not told to the guest. False: the deadline has passed.
    pub(super) fn drain(&mut self, deadline: Instant) -> bool {
        self.broken = true;
        loop {
            let _ = self.engine.as_mut().map(|e| e.submit());
            self.reap();
            if self.in_flight.busy() == 0 {
                return true;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else {
                return false;
            };
            self.wait(Some(left));
        }
    }
}
