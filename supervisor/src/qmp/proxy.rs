//! The QMP socket of one VM. It is there as long as the VM is defined; the VMM behind it comes and goes.
//!
//! Clients that come while there is no VMM are greeted and told so, command by command; when one starts they have it. While a VMM that is
//! there is being connected to (after its start, or the daemon's), commands wait for that, for a moment.
//! Clients that saw a VMM end are disconnected, after everything it said.
//!
//! Where the [`Shelf`] keeps the listening socket it outlives the daemon: clients that come while there is none wait for the next one.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::error::QmpError;
use super::message::{Answer, Request};
use super::monitor::Monitor;
use super::rights::{Client, Mode, Tracking, Watch};
use super::session::{self, Line, MAX_CLIENTS, Subject};
use super::taps::{self, Taps};
use crate::shelf::Shelf;

/// Who may use the socket: its owner and its group, which is its directory's (packages make that `flotilla`).
const MODE: u32 = 0o660;
/// Pause after the kernel gave us no connection (no descriptors left): it offers the same one again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Single commands under way at a time; more wait, so that whoever sends them in bulk takes no more turns than a few clients do.
const CALLS: usize = 4;

/// The proxy of one VM. Dropped, it disconnects its clients and removes its socket, unless that is kept for the next daemon.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    shelf: Arc<Shelf>,
    /// The shelf keeps the socket.
    kept: bool,
    path: PathBuf,
    /// Device and inode of the socket: another process may have put its own in its place.
    identity: (u64, u64),
    runtime: tokio::runtime::Handle,
}

struct Shared {
    vm: Arc<str>,
    watch: Option<Watch>,
    taps: Option<Taps>,
    calls: Semaphore,
    line: watch::Sender<Line>,
    /// What the newest VMM said of itself, for clients that come when there is none.
    greeting: Mutex<Arc<str>>,
    clients: Arc<Semaphore>,
    stop: CancellationToken,
}

impl Proxy {
    /// Listens at `path`, whose file name without `.sock` is the VM's name. A socket that was kept from the daemon before is listened on
    /// further; one that nobody listens on is replaced. `watch` is told of clients' commands that change what is known of the VM, `taps` is asked for the taps
    /// that they name.
    ///
    /// # Errors
    /// `AddrInUse` when somebody else listens there, `AlreadyExists` when the path is no socket, and what the kernel refuses.
    /// Must be called on a tokio runtime, which then serves the clients.
    pub fn bind(
        path: &Path,
        shelf: &Arc<Shelf>,
        watch: Option<Watch>,
        taps: Option<Taps>,
    ) -> io::Result<Proxy> {
        let runtime = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let vm: Arc<str> = path.file_stem().map(|name| name.to_string_lossy()).unwrap_or_default().into();
        let kept = identity(path).ok().and_then(|identity| Some((shelf.take(identity.1)?, identity)));
        // Clients may have waited in a kept one: until the VM's owner says what there is, commands wait too, and are not told "not running".
        let line = if kept.is_some() { Line::Connecting } else { Line::Down };
        let (listener, identity, kept) = match kept {
            Some((socket, identity)) => {
                let listener = std::os::unix::net::UnixListener::from(socket);
                listener.set_nonblocking(true)?;
                (UnixListener::from_std(listener)?, identity, true)
            }
            None => {
                let (listener, identity) = listen(path)?;
                let kept = shelf.put(identity.1, listener.as_fd());
                (listener, identity, kept)
            }
        };
        let greeting = format!("{}\r\n", default_greeting());
        let shared = Arc::new(Shared {
            vm,
            watch,
            taps,
            calls: Semaphore::new(CALLS),
            line: watch::Sender::new(line),
            greeting: Mutex::new(greeting.into()),
            clients: Arc::new(Semaphore::new(MAX_CLIENTS)),
            stop: CancellationToken::new(),
        });
        runtime.spawn(accept(listener, Arc::clone(&shared)));
        Ok(Proxy { shared, shelf: Arc::clone(shelf), kept, path: path.to_owned(), identity, runtime })
    }

    /// The VM is no more: nothing is kept of its socket.
    pub fn remove(mut self) {
        if std::mem::take(&mut self.kept) {
            self.shelf.forget(self.identity.1);
        }
    }

    /// The VMM that commands go to from now on; `None`: the VM has ended.
    pub fn set_monitor(&self, monitor: Option<Monitor>) {
        if let Some(monitor) = &monitor {
            let mut greeting = self.shared.greeting.lock().unwrap_or_else(PoisonError::into_inner);
            *greeting = Arc::clone(monitor.greeting());
        }
        self.shared.line.send_replace(monitor.map_or(Line::Down, Line::Up));
    }

    /// The VM has a process, which is being connected to: commands wait for [`Proxy::set_monitor`] from now on, up to 5 s each.
    pub fn expect_monitor(&self) {
        self.shared.line.send_replace(Line::Connecting);
    }

    /// For single commands by whoever is no client; works as long as the proxy is there.
    #[must_use]
    pub fn caller(&self) -> Caller {
        Caller { shared: Arc::clone(&self.shared) }
    }

    /// One end of a connection that is served like any client's; the other end, blocking, for `client` to be given.
    ///
    /// # Errors
    /// `ResourceBusy` when there are 16 clients; no descriptors left.
    pub fn open(&self, client: Client) -> io::Result<OwnedFd> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let _runtime = self.runtime.enter();
        let ours = UnixStream::from_std(ours)?;
        if self.shared.serve(ours, client).is_err() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, self.shared.full()));
        }
        Ok(theirs.into())
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many clients are connected.
    #[must_use]
    pub fn clients(&self) -> usize {
        MAX_CLIENTS.saturating_sub(self.shared.clients.available_permits())
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("vm", &self.vm).finish_non_exhaustive()
    }
}

/// Sends single commands through a proxy.
#[derive(Debug, Clone)]
pub struct Caller {
    shared: Arc<Shared>,
}

impl Caller {
    /// Runs one command that is given as JSON, under the same rules as a client's, and returns its answer as JSON:
    /// `{"return":…}`, with the command's id if it has one.
    ///
    /// # Errors
    /// [`QmpError::BadRequest`], [`QmpError::NotRunning`], [`QmpError::Refused`] and those of [`Monitor::execute`].
    pub async fn execute_raw(&self, client: Client, command: &str) -> Result<String, QmpError> {
        let request = Request::parse(command.as_bytes())
            .map_err(|complaint| QmpError::BadRequest { why: complaint.why })?;
        let answer = match session::local_answer(&request).or_else(|| client.refusal(&request)) {
            Some(answer) => answer,
            None => self.submit(client, &request).await?,
        };
        match answer {
            Answer::Return(_) => Ok(answer.line(request.id.as_deref()).trim_end().to_owned()),
            Answer::Error(_) => answer.into_value().map(|value| value.to_string()),
        }
    }
}

impl Caller {
    async fn submit(&self, client: Client, request: &Request) -> Result<Answer, QmpError> {
        let patience = session::patience(&request.execute);
        let late = || QmpError::Deadline { command: request.execute.clone(), after: patience, sent: false };
        // Never closed; the turn is held until the answer.
        let _turn = tokio::time::timeout(patience, self.shared.calls.acquire()).await.map_err(|_| late())?;
        let line = self.shared.line.subscribe();
        let monitor = session::monitor_for(&self.shared.vm, &request.execute, line).await?;
        client.audit(&self.shared.vm, request);
        let tracking = Tracking::begin(self.shared.watch.as_ref(), &monitor, request);
        let taps = self.shared.taps.as_ref();
        let reply = taps::submit(taps, &monitor, request, Vec::new(), patience).await;
        if let Some(tracking) = tracking {
            tracking.end(&reply);
        }
        Ok(reply?.answer)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        if self.kept {
            return;
        }
        if identity(&self.path).is_ok_and(|identity| identity == self.identity)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a QMP socket");
        }
    }
}

impl Shared {
    /// Starts a session; `Err`: there is no room, and the stream is returned.
    fn serve(self: &Arc<Self>, stream: UnixStream, client: Client) -> Result<(), UnixStream> {
        let Ok(place) = Arc::clone(&self.clients).try_acquire_owned() else { return Err(stream) };
        let subject = Subject {
            vm: Arc::clone(&self.vm),
            greeting: Arc::clone(&self.greeting.lock().unwrap_or_else(PoisonError::into_inner)),
            line: self.line.subscribe(),
            watch: self.watch.clone(),
            taps: self.taps.clone(),
            stop: self.stop.clone(),
        };
        tokio::spawn(async move {
            session::serve(stream, client, subject).await;
            drop(place);
        });
        Ok(())
    }

    fn full(&self) -> String {
        format!("VM {:?} has {MAX_CLIENTS} QMP clients already: disconnect one", self.vm)
    }
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let client = client_of(&stream);
                if let Err(stream) = shared.serve(stream, client) {
                    tracing::warn!(FLOTILLA_VM = &*shared.vm, "a QMP client too many was turned away");
                    let answer = Answer::error("GenericError", &shared.full()).line(None);
                    // A fresh socket takes this much; if not, the client learns less.
                    let _ = stream.try_write(answer.as_bytes());
                }
            }
            Err(error) => {
                tracing::warn!(FLOTILLA_VM = &*shared.vm, %error, "cannot accept a QMP client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The process that connected, as the kernel vouches for it (SO_PEERCRED).
fn client_of(stream: &UnixStream) -> Client {
    let credentials = stream.peer_cred().ok();
    let pid = credentials.and_then(|peer| peer.pid()).and_then(|pid| u32::try_from(pid).ok());
    Client {
        uid: credentials.map_or(u32::MAX, |peer| peer.uid()),
        pid: pid.unwrap_or_default(),
        mode: Mode::Full,
    }
}

/// Binds under another name and renames: the socket never exists with the wrong mode, nor not at all.
fn listen(path: &Path) -> io::Result<(UnixListener, (u64, u64))> {
    match std::fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            let text = format!("{}: exists and is no socket; remove it", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            let text = format!("{}: another process listens there", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        _ => {}
    }
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let new =
        path.with_file_name(format!(".{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    let _ = std::fs::remove_file(&new);
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let listener = UnixListener::bind(&new).map_err(named)?;
    give_to_group(&new);
    let placed = std::fs::set_permissions(&new, std::fs::Permissions::from_mode(MODE))
        .and_then(|()| identity(&new))
        .and_then(|identity| std::fs::rename(&new, path).map(|()| identity));
    match placed {
        Ok(identity) => Ok((listener, identity)),
        Err(error) => {
            let _ = std::fs::remove_file(&new);
            Err(named(error))
        }
    }
}

/// Gives the socket to its directory's group. (The kernel would do it for a set-group-id directory; a sandboxed daemon
/// may not make those.) When it cannot be done fewer people can connect, which is no reason to have no socket.
fn give_to_group(socket: &Path) {
    let parent = socket.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let given = std::fs::metadata(parent).and_then(|there| {
        let own = std::fs::symlink_metadata(socket)?.gid();
        if own == there.gid() { Ok(()) } else { std::os::unix::fs::lchown(socket, None, Some(there.gid())) }
    });
    if let Err(error) = given {
        tracing::warn!(directory = %parent.display(), %error, "cannot give a QMP socket to its directory's group");
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|there| (there.dev(), there.ino()))
}

/// The greeting of a VM that never ran: ours, in the form that StratoVirt's clients know.
fn default_greeting() -> serde_json::Value {
    json!({"QMP": {
        "version": {"qemu": {"micro": 1, "minor": 0, "major": 5}, "package": concat!("Flotilla-", env!("CARGO_PKG_VERSION"))},
        "capabilities": [],
    }})
}
