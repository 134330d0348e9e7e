//! Sockets. Servers: owns listening, the socket file, and the rule that one client is served at a time while the next one queues.
//! Clients: owns connecting, which happens once and before the sandbox closes; a server that goes away is not looked for again.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::port::{Policy, Port};
use super::stream::Stream;
use super::{CharBackend, ChardevError};
use crate::event::{EventFlags, Ops, Token};
use crate::inherit::Inherited;

/// Longest path that fits into a `sockaddr_un` with its final zero.
const PATH_MAX: usize = 107;
/// How long a server on TCP may take to answer while the VM waits to start.
const CONNECT: Duration = Duration::from_secs(5);

/// A socket file of ours; removed when dropped, unless somebody has put another one in its place.
struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let now = std::fs::symlink_metadata(&self.path).ok().map(|m| (m.dev(), m.ino()));
        if now.is_some() && now == self.identity {
            // Nothing can be done about a directory that became read-only.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

enum Socket {
    /// With its file, unless that is the launcher's.
    Unix {
        listener: UnixListener,
        _file: Option<SocketFile>,
    },
    Tcp(TcpListener),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix { listener, .. } => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Socket {
    fn accept(&self) -> io::Result<Stream> {
        let (fd, is_unix) = match self {
            Self::Unix { listener, .. } => (OwnedFd::from(listener.accept()?.0), true),
            Self::Tcp(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                (OwnedFd::from(stream), false)
            }
        };
        rustix::io::ioctl_fionbio(&fd, true)?;
        Stream::socket(fd, is_unix)
    }
}

/// Listens on a unix socket: the one that the launcher has bound there and handed over, or one of mode 0600. A socket file that nobody
/// listens on is replaced.
pub(super) fn listen_unix(
    path: &Path,
    policy: Policy,
    inherited: &Inherited,
    ops: &mut Ops<'_>,
) -> Result<Arc<dyn CharBackend>, ChardevError> {
    let host = |source: io::Error| ChardevError::Host { what: format!("socket {}", path.display()), source };
    if let Some(listener) = inherited.take_path(path) {
        if !rustix::net::sockopt::socket_acceptconn(&listener).map_err(|e| host(e.into()))? {
            return Err(host(io::Error::other("the descriptor that was handed over does not listen")));
        }
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true).map_err(host)?;
        return listen(Socket::Unix { listener, _file: None }, policy, ops).map_err(host);
    }
    if path.as_os_str().len() > PATH_MAX {
        return Err(ChardevError::TooLong(path.to_owned()));
    }
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(host(e)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(ChardevError::NotASocket(path.to_owned())),
        Ok(_) => match UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(host)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(host(e)),
            // Connected, or its queue is full.
            _ => return Err(ChardevError::InUse(path.to_owned())),
        },
    }
    // Nobody else may connect, not even between bind and a later chmod. No other thread runs yet that could be surprised.
    let mask = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let bound = UnixListener::bind(path);
    rustix::process::umask(mask);
    let listener = bound.map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => ChardevError::InUse(path.to_owned()),
        _ => host(e),
    })?;
    let identity = std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let file = SocketFile { path: path.to_owned(), identity };
    listener.set_nonblocking(true).map_err(host)?;
    listen(Socket::Unix { listener, _file: Some(file) }, policy, ops).map_err(host)
}

/// Listens on a TCP port.
pub(super) fn listen_tcp(
    addr: SocketAddr,
    policy: Policy,
    ops: &mut Ops<'_>,
) -> Result<Arc<dyn CharBackend>, ChardevError> {
    let host = |source: io::Error| ChardevError::Host { what: format!("socket {addr}"), source };
    let listener = TcpListener::bind(addr).map_err(host)?;
    listener.set_nonblocking(true).map_err(host)?;
    listen(Socket::Tcp(listener), policy, ops).map_err(host)
}

/// Connects to a unix socket.
pub(super) fn connect_unix(
    path: &Path,
    policy: Policy,
    ops: &mut Ops<'_>,
) -> Result<Arc<dyn CharBackend>, ChardevError> {
    let no_server = |e: rustix::io::Errno| ChardevError::NoServer(path.display().to_string(), e.into());
    let addr = SocketAddrUnix::new(path).map_err(|_| ChardevError::TooLong(path.to_owned()))?;
    // Never blocks: a server whose queue is full is an error, not a VM that does not start.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(no_server)?;
    rustix::net::connect(&socket, &addr).map_err(no_server)?;
    let stream = Stream::socket(socket, true);
    Ok(connected(stream.map_err(|e| ChardevError::NoServer(path.display().to_string(), e))?, policy, ops))
}

/// Connects to a TCP port.
pub(super) fn connect_tcp(
    addr: SocketAddr,
    policy: Policy,
    ops: &mut Ops<'_>,
) -> Result<Arc<dyn CharBackend>, ChardevError> {
    let connect = || {
        let socket = TcpStream::connect_timeout(&addr, CONNECT)?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        Stream::socket(socket.into(), false)
    };
    let stream = connect().map_err(|e| ChardevError::NoServer(addr.to_string(), e))?;
    Ok(connected(stream, policy, ops))
}

fn connected(stream: Stream, policy: Policy, ops: &mut Ops<'_>) -> Arc<dyn CharBackend> {
    let port = Port::new(ops.handle(), policy);
    // Nobody comes after this one.
    port.reopen_with(|_| {});
    port.connect(stream, ops);
    port
}

struct Server {
    socket: Socket,
    port: Weak<Port>,
    waiting: Mutex<Option<Token>>,
}

fn listen(socket: Socket, policy: Policy, ops: &mut Ops<'_>) -> io::Result<Arc<dyn CharBackend>> {
    let port = Port::new(ops.handle(), policy);
    let server = Arc::new(Server { socket, port: Arc::downgrade(&port), waiting: Mutex::new(None) });
    server.wait(ops)?;
    port.reopen_with(move |ops| {
        if let Err(e) = server.wait(ops) {
            tracing::error!("cannot wait for the next client: {e}");
        }
    });
    Ok(port)
}

impl Server {
    /// Waits for a client. While one is served this is off, and others stay in the socket's queue.
    fn wait(self: &Arc<Self>, ops: &mut Ops<'_>) -> io::Result<()> {
        let server = Arc::downgrade(self);
        let token = ops.add(&self.socket, EventFlags::IN, move |_: EventFlags, ops: &mut Ops<'_>| {
            if let Some(server) = server.upgrade() {
                server.accept(ops);
            }
        })?;
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
        Ok(())
    }

    fn accept(&self, ops: &mut Ops<'_>) {
        match self.socket.accept() {
            Ok(stream) => {
                if let Some(token) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    ops.remove(token);
                }
                if let Some(port) = self.port.upgrade() {
                    port.connect(stream, ops);
                }
            }
            // Gone before it was served.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => tracing::warn!("a client could not be accepted: {e}"),
        }
    }
}
