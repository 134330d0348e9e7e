//! The launch socket: gives a unit's first process its command line and descriptors. Called by the daemon's main only.
//!
//! The socket is open to every user, because each VM has a user of its own that exists only while it runs. Who the peer is, its
//! control group says: systemd put the process into `flotilla-vm@NAME.service`, and nobody without privilege moves it. The peer is pinned by a
//! pidfd while its group is read, so that a reused process id cannot borrow another VM's disks.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tracing::{info, warn};

use super::handover::{MAX_REQUEST, encode, send_with};
use super::pool::Given;
use super::unit::{instance_of, is_spare};
use super::{LaunchError, Prepared, handover};

/// A peer that says nothing, or reads nothing, is dropped after this time. Longer than any preparation.
const PEER_DEADLINE: Duration = Duration::from_secs(30);
/// Peers served at once; more wait in the socket's backlog.
const MAX_PEERS: usize = 64;

/// Who knows what a VM needs.
pub trait Source: Send + Sync {
    /// Everything for the process that now starts in the VM's unit; the error is for its log.
    fn hand_over<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Prepared, String>>;

    /// What the process `pid`, which waits in the spare `instance`, is to become, however long that takes; `None` when it is not needed.
    fn wait<'a>(&'a self, instance: &'a str, pid: u32) -> BoxFuture<'a, Result<Option<Given>, String>> {
        let _ = (instance, pid);
        async { Ok(None) }.boxed()
    }

    /// The VM's unit is being stopped: end the VM as its definition says. Returns when it has ended.
    fn end<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), String>>;
}

/// How a peer's VM is told from its process id.
pub type Identify = Arc<dyn Fn(u32) -> Option<String> + Send + Sync>;

/// Binds the socket, replacing one that a killed daemon left behind (the runtime directory is locked, so nobody else uses it).
pub fn bind(path: &Path) -> Result<UnixListener, LaunchError> {
    let failed = || LaunchError::io(format!("socket {}", path.display()));
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed()(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).map_err(failed())?;
    Ok(listener)
}

/// Serves until the daemon ends.
pub async fn serve(listener: UnixListener, source: Arc<dyn Source>, identify: Identify) {
    let slots = Arc::new(Semaphore::new(MAX_PEERS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                // Out of descriptors, most likely: what is under way frees some.
                warn!("launch socket: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (source, identify) = (Arc::clone(&source), Arc::clone(&identify));
        tokio::spawn(async move {
            let served = tokio::time::timeout(PEER_DEADLINE, serve_one(socket, &*source, &identify)).await;
            drop(slot);
            let served = match served {
                Ok(Ok(Some(patient))) => patient.serve(&*source).await,
                Ok(served) => served.map(drop),
                Err(_) => Err(late()),
            };
            if let Err(error) = served {
                warn!("launch socket: {error}");
            }
        });
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("a peer took longer than {PEER_DEADLINE:?}"))
}

/// What a peer waits for that may take long.
enum Wait {
    /// To become a VM.
    Spare { pid: u32 },
    /// The VM's end.
    End,
}

/// A peer that waits for as long as it takes.
struct Patient {
    socket: UnixStream,
    instance: String,
    wait: Wait,
}

impl Patient {
    async fn serve(self, source: &dyn Source) -> io::Result<()> {
        match self.wait {
            Wait::Spare { pid } => self.spare(pid, source).await,
            Wait::End => self.end(source).await,
        }
    }

    async fn end(mut self, source: &dyn Source) -> io::Result<()> {
        let mut said = [0];
        let answer = tokio::select! {
            ended = source.end(&self.instance) => match ended {
                Ok(()) => encode(["ok"])?,
                Err(text) => encode(["error", &text])?,
            },
            _ = self.socket.read(&mut said) => return Ok(()),
        };
        self.socket.write_all(&answer).await
    }

    async fn spare(mut self, pid: u32, source: &dyn Source) -> io::Result<()> {
        let mut said = [0];
        let given = tokio::select! {
            given = source.wait(&self.instance, pid) => given,
            // It has nothing to say: whatever comes from there is its end.
            _ = self.socket.read(&mut said) => return Ok(()),
        };
        let answer = match given {
            Ok(Some(Given { prepared, sent })) => {
                let going = tokio::time::timeout(PEER_DEADLINE, send(&mut self.socket, &prepared)).await;
                // Nobody waits for it when the VM was given up meanwhile.
                let _ = sent.send(going.unwrap_or_else(|_| Err(late())));
                return Ok(());
            }
            Ok(None) => encode(["ok"])?,
            Err(text) => encode(["error", &text])?,
        };
        self.socket.write_all(&answer).await
    }
}

/// Serves one request, but for one that takes its time.
async fn serve_one(
    mut socket: UnixStream,
    source: &dyn Source,
    identify: &Identify,
) -> io::Result<Option<Patient>> {
    let mut request = Vec::new();
    while !request.ends_with(b"\n") {
        if request.len() > MAX_REQUEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a peer's request is too long"));
        }
        let mut byte = [0; 64];
        match socket.read(&mut byte).await? {
            0 => return Ok(None),
            count => request.extend_from_slice(&byte[..count]),
        }
    }
    let request = String::from_utf8_lossy(&request).trim_end().to_owned();
    let (verb, name) = request.split_once(' ').unwrap_or((&request, ""));
    let credentials = socket.peer_cred()?;
    let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default();
    if identify(pid).as_deref() != Some(name) {
        warn!("launch socket: process {pid} (user {}) asked for VM {name:?}", credentials.uid());
        let text = format!("process {pid} does not run in the unit flotilla-vm@{name}.service");
        return socket.write_all(&encode(["error", &text])?).await.map(|()| None);
    }
    let served = match verb {
        "spare" if is_spare(name) => {
            return Ok(Some(Patient { socket, instance: name.to_owned(), wait: Wait::Spare { pid } }));
        }
        "shutdown" => return Ok(Some(Patient { socket, instance: name.to_owned(), wait: Wait::End })),
        "launch" => match source.hand_over(name).await {
            Ok(prepared) => {
                info!(FLOTILLA_VM = name, "process {pid} gets its command line");
                send(&mut socket, &prepared).await
            }
            Err(text) => socket.write_all(&encode(["error", &text])?).await,
        },
        _ => socket.write_all(&encode(["error", "unknown verb"])?).await,
    };
    served.map(|()| None)
}

async fn send(socket: &mut UnixStream, prepared: &Prepared) -> io::Result<()> {
    let table = prepared.table(|at| handover::FIRST + at as i32);
    let fields = ["ok", &table].into_iter().chain(prepared.command_line.iter().map(String::as_str));
    let bytes = encode(fields)?;
    let numbers: Vec<_> = prepared.descriptors.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
    if numbers.len() > handover::MAX_DESCRIPTORS {
        return Err(io::Error::other("too many descriptors for one VM"));
    }
    let sent = socket.async_io(Interest::WRITABLE, || send_with(socket, &bytes, &numbers)).await?;
    socket.write_all(&bytes[sent..]).await
}

/// The VM whose unit the process `pid` runs in, by its control group (unified hierarchy: the line `0::/PATH`).
pub fn vm_of_process(pid: u32) -> Option<String> {
    let number = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw)?;
    let pinned = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()).ok()?;
    let name = vm_of_cgroup(&fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?);
    // Still the same process: its descriptor becomes readable when it ends, also for whoever may send it no signal.
    let alive = is_alive(&pinned);
    name.filter(|_| alive)
}

fn is_alive(pinned: &impl AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(pinned, PollFlags::IN)], Some(&now)) == Ok(0)
}

fn vm_of_cgroup(text: &str) -> Option<String> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    // The unit's own group or one below it (control processes may get a sub-group).
    path.split('/').rev().find_map(|part| instance_of(part).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Handed;
    use crate::launch::handover::{Answer, receive};
    use std::io::Write;

    #[test]
    fn control_groups() {
        let path = |path: &str| vm_of_cgroup(&format!("12:cpu:/x\n0::{path}\n"));
        assert_eq!(path("/flotilla.slice/flotilla-vm@web.service").as_deref(), Some("web"));
        assert_eq!(path("/flotilla.slice/flotilla-vm@a-b.c.service/.control").as_deref(), Some("a-b.c"));
        for other in ["/", "/user.slice/user-0.slice", "/system.slice/flotilla-vm@.service", "/flotilla-vm@a"]
        {
            assert_eq!(path(other), None, "{other}");
        }
        assert_eq!(vm_of_cgroup("1:name=systemd:/flotilla-vm@web.service"), None);
        assert_eq!(vm_of_process(0), None);
        assert_eq!(vm_of_process(std::process::id()), None);
    }

    struct Fixed;

    impl Source for Fixed {
        fn hand_over<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Prepared, String>> {
            let file = fs::File::open("/dev/null").unwrap().into();
            let prepared = Prepared {
                command_line: vec!["/bin/vmm".into(), name.into(), "x".repeat(100_000)],
                descriptors: vec![(Handed::Path("/dev/null".into()), file)],
            };
            async move { Ok(prepared) }.boxed()
        }

        fn wait<'a>(&'a self, instance: &'a str, _pid: u32) -> BoxFuture<'a, Result<Option<Given>, String>> {
            let prepared = Prepared { command_line: vec![instance.to_owned()], ..Prepared::default() };
            let sent = tokio::sync::oneshot::channel().0;
            async move { Ok((instance == "Spare-1").then_some(Given { prepared, sent })) }.boxed()
        }

        fn end<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, Result<(), String>> {
            async { Err("not now".to_owned()) }.boxed()
        }
    }

    fn ask(path: &Path, request: &str) -> io::Result<Answer> {
        let mut socket = std::os::unix::net::UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.write_all(request.as_bytes()).unwrap();
        receive(&mut socket)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn only_the_unit_itself_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("launch.sock");
        drop(bind(&path).unwrap());
        let listener = bind(&path).unwrap();
        let mine: Identify = Arc::new(|pid| (pid == std::process::id()).then(|| "web".to_owned()));
        tokio::spawn(serve(listener, Arc::new(Fixed), mine));
        let answers = tokio::task::spawn_blocking(move || {
            ["launch web\n", "launch db\n", "shutdown web\n", "fly web\n", &"x".repeat(500)]
                .map(|request| ask(&path, request))
        })
        .await
        .unwrap();
        match &answers[0] {
            Ok(Answer::Launch { command_line, descriptors, table }) => {
                assert_eq!((command_line[1].as_str(), command_line[2].len()), ("web", 100_000));
                assert_eq!((descriptors.len(), table.as_str()), (1, r#"[{"fd":3,"path":"/dev/null"}]"#));
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(&answers[1], Ok(Answer::Refused(text)) if text.contains("db")));
        assert!(matches!(&answers[2], Ok(Answer::Refused(text)) if text == "not now"));
        assert!(matches!(&answers[3], Ok(Answer::Refused(_))));
        assert!(answers[4].is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_spare_waits_for_what_it_becomes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("launch.sock");
        for (instance, word) in [("Spare-1", "launch"), ("Spare-2", "done"), ("web", "refused")] {
            let mine: Identify = Arc::new(move |_| Some(instance.to_owned()));
            tokio::spawn(serve(bind(&path).unwrap(), Arc::new(Fixed), mine));
            let (path, request) = (path.clone(), format!("spare {instance}\n"));
            let answer = tokio::task::spawn_blocking(move || ask(&path, &request)).await.unwrap().unwrap();
            let got = match answer {
                Answer::Launch { command_line, .. } if command_line == [instance] => "launch",
                Answer::Launch { .. } => "something else",
                Answer::Done => "done",
                // A VM's own process is no spare.
                Answer::Refused(_) => "refused",
            };
            assert_eq!(got, word, "{instance}");
        }
    }
}
