//! The front end of vhost-user: another process serves a device's rings, as the kernel does for vhost, and is spoken to over a unix socket.
//!
//! ```text
//!   connect ── features, protocol features, owner, queues ──▶ idle ── prepare, start_ring … ──▶ serving
//!                                                              ▲                                   │
//!                                                              └───── stop_ring: base comes back ──┘
//!   any state ── a reply that is late, wrong or missing ──▶ lost: what follows fails, and `connect` makes a new one
//! ```
//!
//! Written here rather than taken from a crate, because the other process is no more to be trusted than the guest: every reply has a
//! deadline and is checked for kind, request and length before a byte of it is believed; nothing is allocated by a length that it names;
//! it cannot hand descriptors in; and after one wrong word the connection is not used again. It does see all of guest memory, which is
//! how the protocol works: that memory must be shared (a file), and what the process does to it only the guest can suffer from.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::Ring;
use super::ioctl::Region;
use crate::memory::GuestMemory;
use link::Link;
pub use message::{CONFIG_MAX, Violation};
use message::{F_PROTOCOL_FEATURES, HEADER, REGIONS_MAX, Request, check_reply, encode, protocol};

#[cfg(test)]
pub(crate) mod double;
#[cfg(fuzzing)]
pub mod fuzz;
mod link;
mod message;

/// How long a back end may take for a start or a stop as a whole. One that takes longer has lost its device.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Why a back end cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Nobody listens.
    #[error("cannot connect to {path}: {source}: start the vhost-user back end first", path = .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Late, gone, or out of reach.
    #[error("the back end: {0}")]
    Io(#[source] io::Error),
    /// It breaks the protocol.
    #[error("the back end breaks the protocol: {0}")]
    Violation(#[from] Violation),
    /// It says that it could not do what it was asked.
    #[error("the back end refuses request {0}")]
    Refused(u32),
    /// It lacks what a device of this kind needs.
    #[error("the back end lacks features {0:#x}; it is one for another device, or too old")]
    Features(u64),
    /// It has fewer queues than wanted.
    #[error("the back end has {has} queues, and {wanted} are wanted: ask for fewer, or start it with more")]
    Queues {
        /// It has.
        has: u64,
        /// The device has.
        wanted: u64,
    },
    /// It has fewer pairs of queues than wanted.
    #[error(
        "the back end has {has} pairs of queues, and {wanted} are wanted: ask for fewer, or start it with more"
    )]
    Pairs {
        /// It has.
        has: u64,
        /// The device has.
        wanted: u64,
    },
    /// Guest memory that cannot be handed over.
    #[error("guest memory is not shared: add mem-share=on to -machine")]
    PrivateMemory,
    /// There was a mistake before.
    #[error("the connection to the back end is lost")]
    Lost,
}

/// A connection to a back end, which is this process's own.
#[derive(Debug)]
pub struct Front {
    link: Mutex<Link>,
    /// Shared with the link: to be watched.
    socket: OwnedFd,
    features: u64,
    protocol: u64,
    queues: u64,
    lost: AtomicBool,
}

impl Front {
    /// Connects to the back end at `path` and agrees on the protocol.
    pub fn connect(path: &Path) -> Result<Self, UserError> {
        Self::new(Self::dial(path)?)
    }

    /// Connects, and says nothing yet. Never waits.
    pub fn dial(path: &Path) -> Result<OwnedFd, UserError> {
        link::connect(path).map_err(|source| UserError::Connect { path: path.to_owned(), source })
    }

    /// Agrees on the protocol over a connected, non-blocking socket.
    pub fn new(socket: OwnedFd) -> Result<Self, UserError> {
        let link = Mutex::new(Link::new(socket.try_clone().map_err(UserError::Io)?));
        let lost = AtomicBool::new(false);
        let mut front = Self { link, socket, features: 0, protocol: 0, queues: 1, lost };
        let end = Instant::now() + PATIENCE;
        front.features = front.ask_number(Request::GetFeatures, end)?;
        if front.features & F_PROTOCOL_FEATURES != 0 {
            let offered = front.ask_number(Request::GetProtocolFeatures, end)?;
            let wanted = offered & (protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG);
            front.tell(Request::SetProtocolFeatures, &wanted.to_ne_bytes(), &[], end)?;
            front.protocol = wanted;
        }
        front.tell(Request::SetOwner, &[], &[], end)?;
        if front.protocol & protocol::MQ != 0 {
            front.queues = front.ask_number(Request::GetQueueNum, end)?;
        } else {
            // Without a way to ask it has as many as its kind of device always had.
            front.queues = u64::MAX;
        }
        Ok(front)
    }

    /// What the back end can do, as virtio feature bits.
    pub fn features(&self) -> u64 {
        self.features & !F_PROTOCOL_FEATURES
    }

    /// Fails unless the back end can serve `wanted` queues.
    pub fn check_queues(&self, wanted: u16) -> Result<(), UserError> {
        let (has, wanted) = (self.queues, u64::from(wanted));
        if has < wanted { Err(UserError::Queues { has, wanted }) } else { Ok(()) }
    }

    /// Fails unless the back end, a NIC's, can serve `wanted` pairs of queues: of such a one the number that it tells is that of its pairs.
    pub fn check_pairs(&self, wanted: u16) -> Result<(), UserError> {
        let has = if self.protocol & protocol::MQ == 0 { 1 } else { self.queues };
        let wanted = u64::from(wanted);
        if has < wanted { Err(UserError::Pairs { has, wanted }) } else { Ok(()) }
    }

    /// To be watched: readable means that the back end has gone, or says what nobody asked.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether it can be used: the other side is there, and all was well so far.
    pub fn is_well(&self) -> bool {
        if !self.lost.load(Ordering::Acquire) && !self.lock().is_quiet() {
            self.lose();
        }
        !self.lost.load(Ordering::Acquire)
    }

    /// The first `length` bytes of the device's configuration; at most [`CONFIG_MAX`].
    pub fn config(&self, length: usize) -> Result<Vec<u8>, UserError> {
        if self.protocol & protocol::CONFIG == 0 {
            return Err(UserError::Refused(Request::GetConfig as u32));
        }
        let asked = message::config_request(length);
        let mut reply = vec![0; asked.len()];
        self.ask(Request::GetConfig, &asked, &mut reply, Instant::now() + PATIENCE)?;
        Ok(self.judge(message::config(&reply, length))?.to_vec())
    }

    /// Says what the driver has accepted and where guest RAM is. Before the rings, by `end`.
    pub fn prepare(&self, features: u64, memory: &GuestMemory, end: Instant) -> Result<(), UserError> {
        let accepted = features & self.features | self.features & F_PROTOCOL_FEATURES;
        self.tell(Request::SetFeatures, &accepted.to_ne_bytes(), &[], end)?;
        let mut regions = Vec::with_capacity(REGIONS_MAX);
        let mut files = Vec::with_capacity(REGIONS_MAX);
        for region in memory.iter() {
            let file = region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0);
            let file = file.ok_or(UserError::PrivateMemory)?;
            let (guest, size, host) = (region.start_addr().0, region.len(), region.as_ptr() as u64);
            regions.push((Region { guest, size, host, flags: 0 }, file.start()));
            files.push(file.file().as_fd());
        }
        self.tell(Request::SetMemTable, &message::memory_table(&regions), &files, end)
    }

    /// Hands a ring over; if it is in use, it is served when this returns.
    pub fn start_ring(&self, ring: &Ring<'_>, in_use: bool, end: Instant) -> Result<(), UserError> {
        let Ring { index, size, desc, avail, used, base, kick, call, error } = *ring;
        let set = |request, value| self.tell(request, &message::ring_number(index, value), &[], end);
        let pass = |request, fd| self.tell(request, &message::ring_descriptor(index), &[fd], end);
        set(Request::SetVringNum, size.into())?;
        set(Request::SetVringBase, base.into())?;
        self.tell(Request::SetVringAddr, &message::ring_address(index, desc, used, avail), &[], end)?;
        pass(Request::SetVringCall, call)?;
        pass(Request::SetVringErr, error)?;
        pass(Request::SetVringKick, kick)?;
        self.use_ring(index, in_use, end)
    }

    /// Says whether a ring that was handed over is to be served. Without protocol features each of them is.
    pub fn use_ring(&self, index: u32, in_use: bool, end: Instant) -> Result<(), UserError> {
        if self.features & F_PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        self.tell(Request::SetVringEnable, &message::ring_number(index, in_use.into()), &[], end)
    }

    /// Takes a ring back; returns the position of the next request. The back end no longer touches it when it has answered.
    pub fn stop_ring(&self, index: u32, end: Instant) -> Result<u16, UserError> {
        self.use_ring(index, false, end)?;
        let mut reply = [0; 8];
        self.ask(Request::GetVringBase, &message::ring_number(index, 0), &mut reply, end)?;
        self.judge(message::base(reply, index))
    }

    /// Ends the connection: nothing more is said on it.
    pub fn close(&self) {
        self.lose();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Link> {
        // Nothing panics while it holds this; if it did, the connection would be as good as before.
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was said on this connection makes no sense any more. The other side hears of it.
    fn lose(&self) {
        self.lost.store(true, Ordering::Release);
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    fn judge<T>(&self, result: Result<T, Violation>) -> Result<T, UserError> {
        result.map_err(|violation| {
            self.lose();
            violation.into()
        })
    }

    fn ask_number(&self, request: Request, end: Instant) -> Result<u64, UserError> {
        let mut reply = [0; 8];
        self.ask(request, &[], &mut reply, end)?;
        Ok(message::number(reply))
    }

    /// Sends a request that has a reply, which fills `reply`.
    fn ask(&self, request: Request, payload: &[u8], reply: &mut [u8], end: Instant) -> Result<(), UserError> {
        self.exchange(request, false, payload, &[], Some(reply), end)
    }

    /// Sends a request that has none; where that was agreed, waits until it has been carried out.
    fn tell(
        &self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        end: Instant,
    ) -> Result<(), UserError> {
        if self.protocol & protocol::REPLY_ACK == 0 {
            return self.exchange(request, false, payload, fds, None, end);
        }
        let mut reply = [0; 8];
        self.exchange(request, true, payload, fds, Some(&mut reply), end)?;
        if message::number(reply) != 0 {
            self.lose();
            return Err(UserError::Refused(request as u32));
        }
        Ok(())
    }

    fn exchange(
        &self,
        request: Request,
        need_reply: bool,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        reply: Option<&mut [u8]>,
        end: Instant,
    ) -> Result<(), UserError> {
        if self.lost.load(Ordering::Acquire) {
            return Err(UserError::Lost);
        }
        let link = self.lock();
        let talk = || {
            link.send(&encode(request, need_reply, payload), fds, end).map_err(UserError::Io)?;
            let Some(reply) = reply else { return Ok(()) };
            let mut header = [0; HEADER];
            link.receive(&mut header, end).map_err(UserError::Io)?;
            check_reply(header, request, reply.len())?;
            link.receive(reply, end).map_err(UserError::Io)
        };
        talk().inspect_err(|_| self.lose())
    }
}
