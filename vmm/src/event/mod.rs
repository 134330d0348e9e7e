//! The event loop: owns one epoll instance and the handlers of the descriptors in it.
//!
//! The main thread runs one loop (QMP, control, timers, simple devices); each I/O thread runs one of its own. Handlers run on
//! their loop's thread only, so they need no locks against each other. Other threads reach a loop through its [`LoopHandle`].

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::epoll;
pub use rustix::event::epoll::EventFlags;
use rustix::event::{EventfdFlags, Timespec, eventfd};

/// Something that is told when its descriptor is ready.
pub trait Handler: Send {
    /// `ready` holds the conditions that hold now (level-triggered). Must not block.
    fn ready(&mut self, ready: EventFlags, ops: &mut Ops<'_>);
}

impl<F: FnMut(EventFlags, &mut Ops<'_>) + Send> Handler for F {
    fn ready(&mut self, ready: EventFlags, ops: &mut Ops<'_>) {
        self(ready, ops);
    }
}

/// Names a registration; never reused within one loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(u64);

/// Work sent to a loop from another thread.
pub type Job = Box<dyn FnOnce(&mut Ops<'_>) + Send>;

const WAKE: u64 = 0;

struct Source {
    fd: OwnedFd,
    /// Taken out while it runs, so that a handler may change the loop, itself included.
    handler: Option<Box<dyn Handler>>,
}

/// The loop itself; lives on the thread that runs it.
pub struct EventLoop {
    epoll: OwnedFd,
    sources: HashMap<u64, Source>,
    next: u64,
    jobs: Receiver<Job>,
    handle: LoopHandle,
    stop: bool,
}

/// What a handler or a [`Job`] may do to its loop.
pub struct Ops<'a> {
    inner: &'a mut EventLoop,
}

/// Reaches a loop from any thread.
#[derive(Clone)]
pub struct LoopHandle {
    jobs: Sender<Job>,
    wake: std::sync::Arc<OwnedFd>,
}

impl LoopHandle {
    /// Runs `job` on the loop's thread, soon. A loop that has ended drops it.
    pub fn post(&self, job: impl FnOnce(&mut Ops<'_>) + Send + 'static) {
        if self.jobs.send(Box::new(job)).is_ok() {
            // The counter cannot overflow: the loop reads it back to zero. An error could only mean that the loop is gone.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl EventLoop {
    /// A loop with nothing in it.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), EventFlags::IN)?;
        let (tx, jobs) = channel();
        let handle = LoopHandle { jobs: tx, wake: std::sync::Arc::new(wake) };
        Ok(Self { epoll, sources: HashMap::new(), next: WAKE + 1, jobs, handle, stop: false })
    }

    /// For other threads.
    pub fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }

    /// For the loop's own thread, before it runs.
    pub fn ops(&mut self) -> Ops<'_> {
        Ops { inner: self }
    }

    /// Runs until a handler calls [`Ops::stop`].
    pub fn run(&mut self) -> io::Result<()> {
        while !self.stop {
            self.turn(None)?;
        }
        Ok(())
    }

    /// Waits once (at most `timeout`) and runs what became ready.
    pub fn turn(&mut self, timeout: Option<std::time::Duration>) -> io::Result<()> {
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        let mut events =
            [epoll::Event { flags: EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 32];
        let n = match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
            Ok(n) => n,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        for event in &events[..n] {
            let (flags, token) = (event.flags, event.data.u64());
            if token == WAKE {
                let _ = rustix::io::read(&self.handle.wake, &mut [0u8; 8]);
                while let Ok(job) = self.jobs.try_recv() {
                    job(&mut Ops { inner: self });
                }
                continue;
            }
            // A handler earlier in this batch may have removed this one.
            let Some(mut handler) = self.sources.get_mut(&token).and_then(|s| s.handler.take()) else {
                continue;
            };
            handler.ready(flags, &mut Ops { inner: self });
            if let Some(source) = self.sources.get_mut(&token) {
                source.handler = Some(handler);
            }
        }
        Ok(())
    }
}

impl Ops<'_> {
    /// Watches `fd` (the loop keeps its own duplicate) and calls `handler` while a condition of `interest` holds.
    pub fn add(
        &mut self,
        fd: impl AsFd,
        interest: EventFlags,
        handler: impl Handler + 'static,
    ) -> io::Result<Token> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        let token = self.inner.next;
        epoll::add(&self.inner.epoll, &fd, epoll::EventData::new_u64(token), interest)?;
        self.inner.next += 1;
        self.inner.sources.insert(token, Source { fd, handler: Some(Box::new(handler)) });
        Ok(Token(token))
    }

    /// Changes what a registration waits for; an unknown token is ignored.
    pub fn set_interest(&mut self, token: Token, interest: EventFlags) -> io::Result<()> {
        if let Some(source) = self.inner.sources.get(&token.0) {
            epoll::modify(&self.inner.epoll, &source.fd, epoll::EventData::new_u64(token.0), interest)?;
        }
        Ok(())
    }

    /// Forgets a registration; a handler may remove itself. An unknown token is ignored.
    pub fn remove(&mut self, token: Token) {
        if let Some(source) = self.inner.sources.remove(&token.0) {
            // The descriptor's duplicate may outlive this one elsewhere, so epoll must be told.
            let _ = epoll::delete(&self.inner.epoll, source.fd.as_fd());
        }
    }

    /// Reaches this loop from other threads.
    pub fn handle(&self) -> LoopHandle {
        self.inner.handle()
    }

    /// Ends [`EventLoop::run`] after this turn.
    pub fn stop(&mut self) {
        self.inner.stop = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    #[test]
    fn runs_handlers_and_jobs_and_stops() {
        let mut event_loop = EventLoop::new().unwrap();
        let (rx, tx) = rustix::pipe::pipe().unwrap();
        let seen = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&seen);
        let reader = rx.try_clone().unwrap();
        event_loop
            .ops()
            .add(&rx, EventFlags::IN, move |_: EventFlags, ops: &mut Ops<'_>| {
                rustix::io::read(&reader, &mut [0u8; 1]).unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                ops.stop();
            })
            .unwrap();
        let handle = event_loop.handle();
        let poster = std::thread::spawn(move || {
            handle.post(move |_| {
                rustix::io::write(&tx, b"x").unwrap();
            });
        });
        event_loop.run().unwrap();
        poster.join().unwrap();
        assert_eq!(seen.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_handler_can_remove_itself() {
        let mut event_loop = EventLoop::new().unwrap();
        let (rx, tx) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&tx, b"x").unwrap();
        let token = Arc::new(std::sync::Mutex::new(None));
        let mine = Arc::clone(&token);
        let added = event_loop
            .ops()
            .add(&rx, EventFlags::IN, move |_: EventFlags, ops: &mut Ops<'_>| {
                ops.remove(mine.lock().unwrap().take().unwrap());
            })
            .unwrap();
        *token.lock().unwrap() = Some(added);
        for _ in 0..3 {
            event_loop.turn(Some(Duration::from_millis(1))).unwrap();
        }
        assert!(event_loop.sources.is_empty());
    }
}
