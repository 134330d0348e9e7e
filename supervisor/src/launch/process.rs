//! The launcher where there is no systemd: plain children in sessions of their own, so that they outlive the daemon and its terminal.
//! A later daemon finds them by the recorded process id and start time, or, when it was killed between the fork and the record, by the
//! uuid on their command line.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use dbus_api::spec::Limits;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tracing::{debug, warn};
use uuid::Uuid;

use super::{
    Event, Events, FLOTILLA_FDS, Found, LaunchError, Launcher, Notice, Orphan, Prepared, Wanted,
    orphan::uuid_of, tail, watch,
};
use crate::fleet::life::Exit;
use crate::store::Process;

/// See the module.
#[derive(Debug)]
pub struct ProcessLauncher {
    directory: PathBuf,
    events: Events,
}

impl ProcessLauncher {
    /// Processes keep their sockets and log in `directory/NAME`.
    pub fn new(directory: PathBuf, events: Events) -> Self {
        Self { directory, events }
    }

    fn spawn(&self, name: &str, prepared: &Prepared) -> Result<Process, LaunchError> {
        let directory = self.sockets(name);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(LaunchError::io(format!("directory {}", directory.display())))?;
        let log = self.log_file(name);
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&log)
            .map_err(LaunchError::io(format!("log {}", log.display())))?;
        let second = log.try_clone().map_err(LaunchError::io("log"))?;
        let (program, arguments) = prepared
            .command_line
            .split_first()
            .ok_or_else(|| LaunchError::io("command line")(io::ErrorKind::InvalidInput.into()))?;
        // Descriptors keep their numbers; only the child's copies lose close-on-exec.
        let numbers: Vec<RawFd> = prepared.descriptors.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        let table = prepared.table(|at| numbers[at]);
        let mut command = tokio::process::Command::new(program);
        command
            .args(arguments)
            .env(FLOTILLA_FDS, table)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(second)
            .kill_on_drop(false);
        let inherit = move || {
            rustix::process::setsid()?;
            for &number in &numbers {
                // SAFETY: the parent holds these descriptors open until the child has executed.
                let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
                rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec only system calls are made: no allocation, no lock.
        unsafe { command.pre_exec(inherit) };
        let mut child = command.spawn().map_err(LaunchError::io(program.clone()))?;
        let lost = || LaunchError::io(program.clone())(io::Error::other("it ended at once"));
        let pid = child.id().ok_or_else(lost)?;
        let events = self.events.clone();
        let vm = name.to_owned();
        let start_time = watch::start_time(pid).unwrap_or_default();
        tokio::spawn(async move {
            let exit = match child.wait().await {
                Ok(status) => exit_of(status),
                Err(error) => {
                    warn!(FLOTILLA_VM = vm, "process {pid} cannot be waited for: {error}");
                    Exit::Unknown
                }
            };
            let notice = Notice::Ended { invocation: String::new(), exit };
            let _ = events.send(Event { name: vm, notice });
        });
        Ok(Process { pid, start_time, invocation: String::new() })
    }

    /// Watches a process of an earlier daemon: its status goes to init, only its end can be seen.
    fn watch(&self, name: &str, descriptor: OwnedFd) {
        let events = self.events.clone();
        let name = name.to_owned();
        tokio::spawn(async move {
            if let Err(error) = watch::ended(descriptor).await {
                warn!(FLOTILLA_VM = name, "its process cannot be watched: {error}");
                return;
            }
            let notice = Notice::Ended { invocation: String::new(), exit: Exit::Unknown };
            let _ = events.send(Event { name, notice });
        });
    }

    fn find_one(&self, wanted: &Wanted, by_uuid: &mut Option<BTreeMap<Uuid, u32>>) -> Option<Found> {
        let record = wanted.record.as_ref()?;
        let (pid, start_time) = match &record.process {
            Some(process) => (process.pid, process.start_time),
            None if record.state.idle() => return None,
            // The daemon was killed between the two records of a start.
            None => {
                let table = by_uuid.get_or_insert_with(uuids_of_processes);
                let Some(pid) = table.get(&wanted.uuid).copied() else {
                    return Some(Found::Ended(Exit::Unknown));
                };
                (pid, watch::start_time(pid).unwrap_or_default())
            }
        };
        match watch::open(pid, start_time) {
            Ok(descriptor) => {
                self.watch(&wanted.name, descriptor);
                Some(Found::Alive(Process { pid, start_time, invocation: String::new() }))
            }
            Err(_) if record.state.idle() => None,
            Err(_) => Some(Found::Ended(Exit::Unknown)),
        }
    }
}

/// The end of a log file; it is read to the end of its lines, not from its begin: it may be long.
fn end_of(path: &Path) -> io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    const ENOUGH: u64 = 16 << 10;
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(ENOUGH)))?;
    let mut bytes = Vec::new();
    file.take(ENOUGH).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

impl Launcher for ProcessLauncher {
    fn limit<'a>(&'a self, _name: &'a str, limits: &'a Limits) -> BoxFuture<'a, Result<(), LaunchError>> {
        let none = limits.is_none();
        async move {
            let missing = LaunchError::NotSupported("plain processes have none: they need systemd's units");
            if none { Ok(()) } else { Err(missing) }
        }
        .boxed()
    }

    fn last_lines<'a>(&'a self, name: &'a str, _process: Option<&'a Process>) -> BoxFuture<'a, Vec<String>> {
        let path = self.log_file(name);
        async move {
            let read = tokio::task::spawn_blocking(move || end_of(&path)).await;
            read.ok().and_then(Result::ok).map(|text| tail(&text)).unwrap_or_default()
        }
        .boxed()
    }

    fn log(&self, name: &str, lines: u64, follow: bool) -> std::process::Command {
        let mut command = std::process::Command::new("tail");
        command.arg(format!("--lines={lines}"));
        if follow {
            // By name: a new start may begin a new file.
            command.arg("-F");
        }
        command.arg("--").arg(self.log_file(name));
        command
    }

    fn unit(&self, _name: &str) -> String {
        String::new()
    }

    fn sockets(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.sockets(name).join("vmm.log")
    }

    fn start<'a>(&'a self, name: &'a str, prepared: Prepared) -> BoxFuture<'a, Result<Process, LaunchError>> {
        async move { self.spawn(name, &prepared) }.boxed()
    }

    fn kill<'a>(
        &'a self,
        name: &'a str,
        process: Option<&'a Process>,
    ) -> BoxFuture<'a, Result<(), LaunchError>> {
        async move {
            let Some(process) = process else { return Ok(()) };
            match watch::open(process.pid, process.start_time) {
                Ok(descriptor) => watch::kill(&descriptor)
                    .map_err(LaunchError::io(format!("kill {name}, process {}", process.pid))),
                Err(_) => Ok(()),
            }
        }
        .boxed()
    }

    fn find<'a>(
        &'a self,
        wanted: &'a [Wanted],
    ) -> BoxFuture<'a, Result<BTreeMap<String, Found>, LaunchError>> {
        async move {
            let mut by_uuid = None;
            let found = |w: &Wanted| Some((w.name.clone(), self.find_one(w, &mut by_uuid)?));
            Ok(wanted.iter().filter_map(found).collect())
        }
        .boxed()
    }

    // Whoever runs the VMM by hand has processes that look the same.
    fn orphans<'a>(&'a self, _wanted: &'a [Wanted]) -> BoxFuture<'a, Result<Vec<Orphan>, LaunchError>> {
        async { Ok(Vec::new()) }.boxed()
    }

    fn clean<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()> {
        async move {
            let directory = self.sockets(name);
            match fs::remove_dir_all(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    warn!(FLOTILLA_VM = name, "{} is left behind: {error}", directory.display());
                }
                _ => debug!(FLOTILLA_VM = name, "{} removed", directory.display()),
            }
        }
        .boxed()
    }
}

fn exit_of(status: std::process::ExitStatus) -> Exit {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(super::signal_name(signal)),
        (None, None) => Exit::Unknown,
    }
}

/// Every process that has `-uuid U` on its command line.
fn uuids_of_processes() -> BTreeMap<Uuid, u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((uuid_of(pid)?, pid))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::life::{Intent, State};
    use crate::launch::Handed;
    use crate::store::Runtime;
    use tokio::sync::mpsc;

    fn prepared(line: &[&str]) -> Prepared {
        Prepared { command_line: line.iter().map(ToString::to_string).collect(), descriptors: Vec::new() }
    }

    async fn ended(events: &mut mpsc::UnboundedReceiver<Event>) -> Exit {
        match events.recv().await.unwrap().notice {
            Notice::Ended { exit, .. } => exit,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_child_gets_its_descriptors_and_its_end_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let (events, mut inbox) = mpsc::unbounded_channel();
        let launcher = ProcessLauncher::new(dir.path().join("vm"), events);
        let image = dir.path().join("image");
        fs::write(&image, "content of the image").unwrap();
        // The shell reads the inherited descriptor that the table names.
        let script = r#"fd=${FLOTILLA_FDS#*fd\":}; fd=${fd%%,*}; cat /proc/self/fd/$fd; exit 7"#;
        let mut ready = prepared(&["/bin/sh", "-c", script]);
        ready.descriptors = vec![(Handed::Path(image.clone()), fs::File::open(&image).unwrap().into())];
        launcher.start("web", ready).await.unwrap();
        assert_eq!(ended(&mut inbox).await, Exit::Code(7));
        let log = fs::read_to_string(dir.path().join("vm/web/vmm.log")).unwrap();
        assert_eq!(log, "content of the image");
        launcher.clean("web").await;
        assert!(!dir.path().join("vm/web").exists());
        let error = launcher.start("web", prepared(&["/nonexistent"])).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }

    #[tokio::test]
    async fn a_later_daemon_finds_and_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let (events, mut first) = mpsc::unbounded_channel();
        let launcher = ProcessLauncher::new(dir.path().to_owned(), events);
        let uuid = Uuid::new_v4();
        // It stops itself: without a child, which would have the same command line until it executes something.
        let line = ["/bin/sh", "-c", "kill -STOP $$", "-uuid", &uuid.to_string()];
        let process = launcher.start("web", prepared(&line)).await.unwrap();

        let (events, mut inbox) = mpsc::unbounded_channel();
        let second = ProcessLauncher::new(dir.path().to_owned(), events);
        let mut record = Runtime::new("web", "", State::Starting, Intent::Running);
        let look = |record: &Runtime| vec![Wanted { name: "web".into(), uuid, record: Some(record.clone()) }];
        // Killed before the process id was written down, and after.
        for known in [None, Some(process.clone())] {
            record.process = known;
            let found = second.find(&look(&record)).await.unwrap();
            assert_eq!(found["web"], Found::Alive(process.clone()));
        }
        second.kill("web", Some(&process)).await.unwrap();
        assert_eq!(ended(&mut inbox).await, Exit::Unknown);
        assert_eq!(ended(&mut first).await, Exit::Signal("SIGKILL".into()));
        assert_eq!(second.find(&look(&record)).await.unwrap()["web"], Found::Ended(Exit::Unknown));
        second.kill("web", Some(&process)).await.unwrap();
    }
}
