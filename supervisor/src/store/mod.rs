//! Records on disk: owns the files of definitions (`STATE_DIR/vms/NAME.json`, `STATE_DIR/networks/NAME.json`, with the
//! addresses given there in `STATE_DIR/leases/NAME.json`, durable) and of processes (`RUNTIME_DIR/vms/NAME.json`,
//! gone at boot). Called by the fleet only.
//!
//! A write goes to a temporary file, is fsynced, renamed over the old one, and the directory is fsynced: after a crash there is the old
//! record or the new one. Reads trust nothing: a record that is too large, malformed, of another format, or under a name that is not its
//! own is moved to `STATE_DIR/corrupt/` and reported; the others come up.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dbus_api::network::NetworkSpec;
use dbus_api::spec::VmSpec;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::fleet::devices::Devices;
use crate::fleet::leases::Leases;
use crate::fleet::life::{Exit, Intent, State};
use crate::fleet::seats::Seats;

/// A definition is text written by people; a megabyte is none.
const MAX_RECORD: u64 = 1 << 20;
const FORMAT: u32 = 1;
/// How long the directory may be held by what a killed daemon was about to start: a child has its descriptors until it executes.
const LEFT_OVER: Duration = Duration::from_secs(1);
/// Between two tries: the lock cannot be waited for with a limit.
const PAUSE: Duration = Duration::from_millis(10);
/// Name of the plan's file.
const PLAN: &str = "autostart";

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Another daemon uses the directory.
    #[error(
        "{0} is in use by another flotillad: stop it, or give this one another --state-dir and --runtime-dir"
    )]
    InUse(PathBuf),
    /// A record cannot be written as JSON.
    #[error("record of \"{name}\": {source}")]
    Encode {
        /// The VM.
        name: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { what, path, source }
}

/// What is stored of a definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    format: u32,
    /// The VM's name; must be the file's.
    pub name: String,
    /// Identity.
    pub uuid: Uuid,
    /// Counts the changes, from 1.
    pub generation: u64,
    /// The definition.
    pub spec: VmSpec,
}

impl Definition {
    /// A record of the present format.
    pub fn new(name: String, uuid: Uuid, generation: u64, spec: VmSpec) -> Self {
        Self { format: FORMAT, name, uuid, generation, spec }
    }
}

/// What is stored of a process, so that a daemon killed at any instant finds it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    format: u32,
    /// The VM's name; must be the file's.
    pub name: String,
    /// The boot it belongs to: a record of another boot describes a process that is no more.
    pub boot_id: String,
    /// State when it was written.
    pub state: State,
    /// What the administrator wants.
    pub intent: Intent,
    /// The end of the process was ordered for good.
    pub forced: bool,
    /// Generation of the definition that it was started from; 0 when unknown.
    pub applied_generation: u64,
    /// The process; absent while it is being made.
    pub process: Option<Process>,
    /// The unit's instance that it runs in, if that is not under the VM's own name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// Its command line.
    pub command_line: Vec<String>,
    /// How the last process ended.
    pub exit: Option<Exit>,
    /// Devices that came and went over QMP.
    #[serde(default, skip_serializing_if = "Devices::is_plain")]
    pub devices: Devices,
    /// Disks and cards, and where they are.
    #[serde(default, skip_serializing_if = "Seats::is_empty")]
    pub seats: Seats,
    /// Taps that were made for network back ends of QMP clients, by the back end's id.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub taps: BTreeMap<String, String>,
    /// Restarts by policy in a row.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restarts: u32,
    /// The policy started the process, or was about to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restarting: bool,
}

impl Runtime {
    /// An empty record of this boot.
    pub fn new(name: &str, boot_id: &str, state: State, intent: Intent) -> Self {
        Self {
            format: FORMAT,
            name: name.to_owned(),
            boot_id: boot_id.to_owned(),
            state,
            intent,
            forced: false,
            applied_generation: 0,
            process: None,
            instance: None,
            command_line: Vec::new(),
            exit: None,
            devices: Devices::default(),
            seats: Seats::default(),
            taps: BTreeMap::new(),
            restarts: 0,
            restarting: false,
        }
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What is stored of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkRecord {
    format: u32,
    /// The network's name; must be the file's.
    pub name: String,
    /// The definition.
    pub spec: NetworkSpec,
}

impl NetworkRecord {
    /// A record of the present format.
    pub fn new(name: String, spec: NetworkSpec) -> Self {
        Self { format: FORMAT, name, spec }
    }
}

/// What is stored of the addresses that a network has given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseRecord {
    format: u32,
    /// The network's name; must be the file's.
    pub name: String,
    /// Who has which.
    pub leases: Leases,
}

impl LeaseRecord {
    /// A record of the present format.
    pub fn new(name: String, leases: Leases) -> Self {
        Self { format: FORMAT, name, leases }
    }
}

/// What is still to be started in this boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    format: u32,
    /// The boot it belongs to.
    pub boot_id: String,
    /// Names of the VMs.
    pub left: Vec<String>,
}

impl Plan {
    /// A plan of the present format.
    pub fn new(boot_id: &str, left: Vec<String>) -> Self {
        Self { format: FORMAT, boot_id: boot_id.to_owned(), left }
    }
}

/// Identity of a process: the number alone is reused by the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// Start time, clock ticks since boot (field 22 of `/proc/PID/stat`); 0 under systemd.
    pub start_time: u64,
    /// systemd's invocation id, hex; empty under the process launcher.
    pub invocation: String,
}

/// A record that was set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corrupt {
    /// Where it is now.
    pub path: PathBuf,
    /// What was wrong.
    pub reason: String,
}

/// The store.
#[derive(Debug)]
pub struct Store {
    definitions: PathBuf,
    networks: PathBuf,
    leases: PathBuf,
    runtimes: PathBuf,
    runtime_dir: PathBuf,
    templates: PathBuf,
    clones: PathBuf,
    corrupt: PathBuf,
    /// Held for as long as the store lives.
    _locks: [File; 2],
}

impl Store {
    /// Makes the directories and takes both for this process alone.
    pub fn open(state_dir: &Path, runtime_dir: &Path) -> Result<Self, StoreError> {
        make_dir(state_dir, 0o755)?;
        make_dir(runtime_dir, 0o755)?;
        let locks = [lock(state_dir)?, lock(runtime_dir)?];
        let store = Self {
            definitions: state_dir.join("vms"),
            networks: state_dir.join("networks"),
            leases: state_dir.join("leases"),
            runtimes: runtime_dir.join("vms"),
            runtime_dir: runtime_dir.to_owned(),
            templates: state_dir.join("templates"),
            clones: state_dir.join("clones"),
            corrupt: state_dir.join("corrupt"),
            _locks: locks,
        };
        make_dir(&store.definitions, 0o700)?;
        make_dir(&store.networks, 0o700)?;
        make_dir(&store.leases, 0o700)?;
        make_dir(&store.runtimes, 0o700)?;
        make_dir(&store.corrupt, 0o700)?;
        make_dir(&store.templates, 0o700)?;
        make_dir(&store.clones, 0o700)?;
        Ok(store)
    }

    /// Every definition that can be read, and what had to be set aside.
    pub fn load_definitions(&self) -> Result<(Vec<Definition>, Vec<Corrupt>), StoreError> {
        self.load(&self.definitions, |d: &Definition| (d.format, d.name.clone()))
    }

    /// Every network that can be read, and what had to be set aside.
    pub fn load_networks(&self) -> Result<(Vec<NetworkRecord>, Vec<Corrupt>), StoreError> {
        self.load(&self.networks, |n: &NetworkRecord| (n.format, n.name.clone()))
    }

    /// Moves the network `name` out of the way: it was well-formed, and wrong.
    pub fn set_network_aside(&self, name: &str, reason: String) -> Result<Corrupt, StoreError> {
        self.move_aside(&file_of(&self.networks, name), reason)
    }

    /// Writes a network; durable when this returns.
    pub fn save_network(&self, record: &NetworkRecord) -> Result<(), StoreError> {
        save(&self.networks, &record.name, record)
    }

    /// Forgets a network; fine when there is none.
    pub fn remove_network(&self, name: &str) -> Result<(), StoreError> {
        remove(&self.networks, name)
    }

    /// Every network's addresses that can be read, and what had to be set aside.
    pub fn load_leases(&self) -> Result<(Vec<LeaseRecord>, Vec<Corrupt>), StoreError> {
        self.load(&self.leases, |l: &LeaseRecord| (l.format, l.name.clone()))
    }

    /// Writes a network's addresses; durable when this returns.
    pub fn save_leases(&self, record: &LeaseRecord) -> Result<(), StoreError> {
        save(&self.leases, &record.name, record)
    }

    /// Forgets a network's addresses; fine when there are none.
    pub fn remove_leases(&self, name: &str) -> Result<(), StoreError> {
        remove(&self.leases, name)
    }

    /// Every process record that can be read, and what had to be set aside.
    pub fn load_runtimes(&self) -> Result<(Vec<Runtime>, Vec<Corrupt>), StoreError> {
        self.load(&self.runtimes, |r: &Runtime| (r.format, r.name.clone()))
    }

    /// Moves the definition `name` out of the way: it was well-formed, and wrong.
    pub fn set_aside(&self, name: &str, reason: String) -> Result<Corrupt, StoreError> {
        self.move_aside(&file_of(&self.definitions, name), reason)
    }

    /// Writes a definition; durable when this returns.
    pub fn save_definition(&self, definition: &Definition) -> Result<(), StoreError> {
        save(&self.definitions, &definition.name, definition)
    }

    /// Writes a process record.
    pub fn save_runtime(&self, runtime: &Runtime) -> Result<(), StoreError> {
        save(&self.runtimes, &runtime.name, runtime)
    }

    /// The plan of this boot, if there is one that can be read.
    pub fn load_plan(&self) -> Option<Plan> {
        read_record::<Plan>(&file_of(&self.runtime_dir, PLAN)).ok().filter(|plan| plan.format == FORMAT)
    }

    /// Writes the plan of this boot.
    pub fn save_plan(&self, plan: &Plan) -> Result<(), StoreError> {
        save(&self.runtime_dir, PLAN, plan)
    }

    /// Directory of the templates, each a directory of its own.
    pub fn templates(&self) -> &Path {
        &self.templates
    }

    /// Directory of what belongs to clones alone: their disks, each clone's in a directory of its own.
    pub fn clones(&self) -> &Path {
        &self.clones
    }

    /// Removes the disks that a VM got when it was cloned; fine when there are none.
    pub fn remove_clone(&self, name: &str) -> Result<(), StoreError> {
        let path = self.clones.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Forgets a definition; fine when there is none.
    pub fn remove_definition(&self, name: &str) -> Result<(), StoreError> {
        remove(&self.definitions, name)
    }

    /// Forgets a process; fine when there is none.
    pub fn remove_runtime(&self, name: &str) -> Result<(), StoreError> {
        remove(&self.runtimes, name)
    }

    fn load<T: DeserializeOwned>(
        &self,
        dir: &Path,
        identity: impl Fn(&T) -> (u32, String),
    ) -> Result<(Vec<T>, Vec<Corrupt>), StoreError> {
        let mut good = Vec::new();
        let mut bad = Vec::new();
        for entry in fs::read_dir(dir).map_err(io_error("read directory", dir))? {
            let path = entry.map_err(io_error("read directory", dir))?.path();
            let file_name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            if file_name.starts_with(".tmp-") {
                // A write that a crash cut short; the record itself is whole.
                let _ = fs::remove_file(&path);
                continue;
            }
            let read = read_record::<T>(&path).and_then(|record| {
                let (format, name) = identity(&record);
                if format != FORMAT {
                    Err(format!("format {format} is not known to this version"))
                } else if file_name != format!("{name}.json") {
                    Err(format!("it says that it is the record of \"{name}\""))
                } else {
                    Ok(record)
                }
            });
            match read {
                Ok(record) => good.push(record),
                Err(reason) => bad.push(self.move_aside(&path, reason)?),
            }
        }
        Ok((good, bad))
    }

    fn move_aside(&self, path: &Path, reason: String) -> Result<Corrupt, StoreError> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut to = self.corrupt.join(&name);
        let mut copy = 1;
        while to.symlink_metadata().is_ok() {
            to = self.corrupt.join(format!("{name}.{copy}"));
            copy += 1;
        }
        // The runtime directory is another file system: rename does not reach across.
        if fs::rename(path, &to).is_err() {
            fs::copy(path, &to).map_err(io_error("set aside", path))?;
            fs::remove_file(path).map_err(io_error("set aside", path))?;
        }
        Ok(Corrupt { path: to, reason })
    }
}

fn file_of(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.json"))
}

fn make_dir(path: &Path, mode: u32) -> Result<(), StoreError> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(io_error("create directory", path))
}

/// An open-file-description lock: it belongs to this open file, so no other close in this process can drop it (as happens to POSIX
/// locks), and the kernel drops it when the process ends, however it ends.
fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(io_error("open", &path))?;
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let end = Instant::now() + LEFT_OVER;
    loop {
        match nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)) {
            Ok(_) => return Ok(file),
            Err(nix::Error::EAGAIN | nix::Error::EACCES) if Instant::now() < end => std::thread::sleep(PAUSE),
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => return Err(StoreError::InUse(dir.to_owned())),
            Err(errno) => return Err(io_error("lock", &path)(errno.into())),
        }
    }
}

fn read_record<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    // Neither a symbolic link nor a FIFO of that name may lead the daemon elsewhere or make it wait.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| format!("cannot be opened: {error}"))?;
    let kind = file.metadata().map_err(|error| error.to_string())?;
    if !kind.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let mut text = Vec::new();
    file.take(MAX_RECORD + 1).read_to_end(&mut text).map_err(|error| format!("cannot be read: {error}"))?;
    if text.len() as u64 > MAX_RECORD {
        return Err(format!("is larger than {MAX_RECORD} bytes"));
    }
    serde_json::from_slice(&text).map_err(|error| error.to_string())
}

fn save<T: Serialize>(dir: &Path, name: &str, record: &T) -> Result<(), StoreError> {
    let text = serde_json::to_vec_pretty(record)
        .map_err(|source| StoreError::Encode { name: name.to_owned(), source })?;
    let temporary = dir.join(format!(".tmp-{name}"));
    let written = (|| {
        let mut file =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&temporary, file_of(dir, name))?;
        File::open(dir)?.sync_all()
    })();
    written.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        io_error("write", &file_of(dir, name))(source)
    })
}

fn remove(dir: &Path, name: &str) -> Result<(), StoreError> {
    let path = file_of(dir, name);
    match fs::remove_file(&path) {
        Ok(()) => File::open(dir).and_then(|d| d.sync_all()).map_err(io_error("sync", dir)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error("remove", &path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(dir: &Path) -> Store {
        Store::open(&dir.join("lib"), &dir.join("run")).unwrap()
    }

    fn definition(name: &str) -> Definition {
        let spec = serde_json::from_str(r#"{"kernel":"/boot/vmlinuz"}"#).unwrap();
        Definition::new(name.into(), Uuid::from_u128(7), 1, spec)
    }

    #[test]
    fn records_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        store.save_definition(&definition("web")).unwrap();
        let runtime = Runtime::new("web", "boot", State::Running, Intent::Running);
        store.save_runtime(&runtime).unwrap();
        assert_eq!(store.load_definitions().unwrap(), (vec![definition("web")], vec![]));
        assert_eq!(store.load_runtimes().unwrap(), (vec![runtime], vec![]));
        store.remove_definition("web").unwrap();
        store.remove_definition("web").unwrap();
        assert_eq!(store.load_definitions().unwrap(), (vec![], vec![]));
    }

    #[test]
    fn what_is_not_a_record_is_set_aside_and_the_rest_comes_up() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        store.save_definition(&definition("good")).unwrap();
        let vms = dir.path().join("lib/vms");
        let good = fs::read_to_string(vms.join("good.json")).unwrap();
        fs::write(vms.join("empty.json"), "").unwrap();
        fs::write(vms.join("cut.json"), &good[..good.len() / 2]).unwrap();
        fs::write(vms.join("other.json"), &good).unwrap();
        fs::write(vms.join("new.json"), good.replace("\"format\": 1", "\"format\": 9")).unwrap();
        fs::write(vms.join("huge.json"), vec![b' '; 2 << 20]).unwrap();
        fs::write(vms.join("binary.json"), [0xff, 0xfe, 0]).unwrap();
        fs::write(vms.join(".tmp-good"), "{").unwrap();
        fs::create_dir(vms.join("dir.json")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", vms.join("link.json")).unwrap();
        nix::unistd::mkfifo(&vms.join("fifo.json"), nix::sys::stat::Mode::S_IRUSR).unwrap();

        let (read, corrupt) = store.load_definitions().unwrap();
        assert_eq!(read, [definition("good")]);
        assert_eq!(corrupt.len(), 9, "{corrupt:?}");
        assert!(corrupt.iter().all(|c| c.path.symlink_metadata().is_ok() && !c.reason.is_empty()));
        assert_eq!(store.load_definitions().unwrap().1, []);
        // A second one of the same name does not replace the first.
        fs::write(vms.join("empty.json"), "").unwrap();
        assert!(store.load_definitions().unwrap().1[0].path.ends_with("empty.json.1"));
    }

    #[test]
    fn one_daemon_per_directory() {
        let dir = tempfile::tempdir().unwrap();
        let first = store(dir.path());
        let second = Store::open(&dir.path().join("lib"), &dir.path().join("run2"));
        assert!(matches!(second, Err(StoreError::InUse(_))));
        drop(first);
        store(dir.path());
    }
}
