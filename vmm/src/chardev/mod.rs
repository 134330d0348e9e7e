//! Character devices: owns the host ends (standard streams, pty, file, socket) of serial lines and of QMP over `-mon`.
//!
//! A front end (the guest's serial port, a QMP session, later a virtio console) attaches to a [`CharBackend`]; bytes from the host
//! reach it through [`FrontEnd`], on the main loop's thread; bytes from the guest go out through [`CharBackend::write`], from any thread.
//!
//! `port` holds the one implementation of buffering and flow control, over the connection in `stream`; `socket`, `stdio` and `sink` only
//! open descriptors for it.

mod port;
mod sink;
mod socket;
mod stdio;
mod stream;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::config::ChardevKind;
use crate::event::Ops;
use crate::inherit::Inherited;

use port::{Overflow, Policy, Port};
use stream::Stream;

/// The guest's side of a character device.
pub trait FrontEnd: Send + Sync {
    /// How many bytes [`FrontEnd::receive`] will take now.
    fn can_receive(&self) -> usize;
    /// Bytes from the host; never more than [`FrontEnd::can_receive`] said.
    fn receive(&self, data: &[u8]);
    /// Descriptors that came with the bytes that follow (SCM_RIGHTS), where [`Traffic::Messages`] come over a unix socket.
    fn descriptors(&self, _fds: Vec<OwnedFd>) {}
    /// A client has come, or this front end was attached to a back end that always has one.
    fn opened(&self) {}
    /// The client has gone.
    fn closed(&self) {}
    /// There is room again after [`CharBackend::room`] has said 0.
    fn writable(&self) {}
}

/// The host's side of a character device.
pub trait CharBackend: Send + Sync {
    /// Bytes from the guest. Never blocks: what the host does not take is kept up to a limit, then dropped, oldest first.
    fn write(&self, data: &[u8]);
    /// How many bytes [`write`](Self::write) would keep or send now without dropping any; without anybody to send to there is no limit.
    /// After 0 the front end hears [`FrontEnd::writable`], or of the client's end.
    fn room(&self) -> usize {
        usize::MAX
    }
    /// Connects the guest's side; at most one. The back end keeps no strong reference: the two would keep each other alive.
    fn attach(&self, front_end: Arc<dyn FrontEnd>);
    /// The front end, full before, has room again.
    fn front_end_ready(&self);
    /// Whether a client has come yet; always so where there are none to come and go.
    fn had_client(&self) -> bool {
        true
    }
    /// The name of the terminal that was made for it, if one was.
    fn terminal(&self) -> Option<&str> {
        None
    }
    /// Waits until the host has taken what was kept, at most `limit`: for the end of the process only.
    fn drain(&self, _limit: Duration) {}
}

/// Why a character device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ChardevError {
    /// Somebody else's server listens there.
    #[error("socket {0}: a running process listens there already: stop it or choose another path")]
    InUse(PathBuf),
    /// Nobody listens where this process is to connect to.
    #[error("socket {0}: {1}: start its server first, or add server,nowait to be the server")]
    NoServer(String, io::Error),
    /// Something that is no socket has that name.
    #[error("socket {0}: the path exists and is not a socket: remove it or choose another path")]
    NotASocket(PathBuf),
    /// The path does not fit into a socket address.
    #[error("socket {0}: the path is longer than 107 bytes: choose a shorter one")]
    TooLong(PathBuf),
    /// The host refused.
    #[error("{what}: {source}")]
    Host {
        /// What was to be opened.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// `chardev:ID` was not resolved, or a kind that has no host end here.
    #[error("chardev {0}: cannot be opened by itself")]
    NotOpenable(String),
}

/// What happens to bytes that the host does not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// A terminal line: lose the oldest; keep the newest 16 KiB for the next client.
    Line,
    /// Messages, of which none may miss: a client that does not read is disconnected, and a new one starts afresh.
    Messages,
}

impl Traffic {
    fn policy(self) -> Policy {
        match self {
            Self::Line => Policy {
                backlog: 64 << 10,
                replay: 16 << 10,
                overflow: Overflow::DropOldest,
                descriptors: false,
            },
            Self::Messages => {
                Policy { backlog: 1 << 20, replay: 0, overflow: Overflow::Disconnect, descriptors: true }
            }
        }
    }
}

/// Opens the host end that `kind` describes and puts it on the loop of `ops`. Sockets are removed and terminals restored when the
/// back end and the loop are dropped. A unix socket that is to listen may have been `inherited`: then it listens already.
pub fn open(
    kind: &ChardevKind,
    traffic: Traffic,
    inherited: &Inherited,
    ops: &mut Ops<'_>,
) -> Result<Arc<dyn CharBackend>, ChardevError> {
    let policy = traffic.policy();
    match kind {
        ChardevKind::Stdio => stdio::open(policy, ops),
        ChardevKind::Pty => open_pty(policy, ops),
        ChardevKind::File(path) => {
            let what = || format!("chardev file {}", path.display());
            // O_NONBLOCK: a fifo without a reader is an error now, not a hang.
            let flags = OFlags::WRONLY
                | OFlags::CREATE
                | OFlags::APPEND
                | OFlags::CLOEXEC
                | OFlags::NOCTTY
                | OFlags::NONBLOCK;
            let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
                .map_err(|e| ChardevError::Host { what: what(), source: e.into() })?;
            let port = Port::new(ops.handle(), policy);
            port.connect(Stream::output_only(file), ops);
            Ok(port)
        }
        ChardevKind::UnixSocket { path, server: true, .. } => {
            socket::listen_unix(path, policy, inherited, ops)
        }
        ChardevKind::UnixSocket { path, .. } => socket::connect_unix(path, policy, ops),
        ChardevKind::TcpSocket { addr, server: true, .. } => socket::listen_tcp(*addr, policy, ops),
        ChardevKind::TcpSocket { addr, .. } => socket::connect_tcp(*addr, policy, ops),
        ChardevKind::Log => Ok(Arc::new(sink::Log::default())),
        ChardevKind::Ref(id) => Err(ChardevError::NotOpenable(id.clone())),
    }
}

fn open_pty(policy: Policy, ops: &mut Ops<'_>) -> Result<Arc<dyn CharBackend>, ChardevError> {
    let host =
        |source: rustix::io::Errno| ChardevError::Host { what: "pty".to_owned(), source: source.into() };
    let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
    let master = rustix::pty::openpt(flags).map_err(host)?;
    rustix::io::fcntl_setfd(&master, rustix::io::FdFlags::CLOEXEC).map_err(host)?;
    rustix::pty::grantpt(&master).map_err(host)?;
    rustix::pty::unlockpt(&master).map_err(host)?;
    let name = rustix::pty::ptsname(&master, Vec::new()).map_err(host)?;
    // The other end stays open here: without any opener a read of the master fails with EIO and epoll reports a hang-up for ever.
    let other = rustix::fs::open(&*name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
        .map_err(host)?;
    let mut termios = rustix::termios::tcgetattr(&other).map_err(host)?;
    termios.make_raw();
    rustix::termios::tcsetattr(&other, rustix::termios::OptionalActions::Now, &termios).map_err(host)?;
    rustix::io::ioctl_fionbio(&master, true).map_err(host)?;
    tracing::info!("char device redirected to {}", name.to_string_lossy());
    let port = Port::new(ops.handle(), policy);
    let stream =
        Stream::pty(master, other).map_err(|source| ChardevError::Host { what: "pty".to_owned(), source })?;
    port.set_terminal(name.to_string_lossy().into_owned());
    port.connect(stream, ops);
    Ok(port)
}

#[cfg(test)]
mod tests;
