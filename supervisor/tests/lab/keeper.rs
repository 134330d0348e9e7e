//! The part of PID 1 that holds a service's descriptors while it is restarted: takes them over the notify socket, gives them back at the
//! next start (sd_notify(3), sd_listen_fds(3)).

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Where the daemon finds its first descriptor.
const FIRST: RawFd = 3;
/// Where they wait before: out of the way of the numbers that they get.
const HIGH: RawFd = 500;

pub(crate) struct Keeper {
    path: PathBuf,
    kept: Arc<Mutex<BTreeMap<String, OwnedFd>>>,
}

impl Keeper {
    pub(crate) fn new(path: PathBuf) -> Keeper {
        let socket = UnixDatagram::bind(&path).unwrap();
        let kept = Arc::new(Mutex::new(BTreeMap::new()));
        let store = Arc::clone(&kept);
        // Ends with the test program.
        std::thread::spawn(move || {
            loop {
                take(&socket, &store);
            }
        });
        Keeper { path, kept }
    }

    /// How many descriptors are kept.
    pub(crate) fn count(&self) -> usize {
        self.kept.lock().unwrap().len()
    }

    /// Makes `program` start as a service with what is kept.
    pub(crate) fn command(&self, program: &str) -> Command {
        let kept = self.kept.lock().unwrap();
        let mut command = Command::new("sh");
        // LISTEN_PID is the service's own number, which only it knows.
        command.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh", program]);
        command.env("NOTIFY_SOCKET", &self.path);
        command.env("LISTEN_FDS", kept.len().to_string());
        command.env("LISTEN_FDNAMES", kept.keys().cloned().collect::<Vec<_>>().join(":"));
        let lifted: Vec<OwnedFd> =
            kept.values().map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, HIGH).unwrap()).collect();
        // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                for (at, fd) in lifted.iter().enumerate() {
                    if libc::dup2(fd.as_raw_fd(), FIRST + at as RawFd) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command
    }
}

fn take(socket: &UnixDatagram, store: &Mutex<BTreeMap<String, OwnedFd>>) {
    use std::io::IoSliceMut;
    use std::os::fd::FromRawFd;

    let mut buffer = [0; 4096];
    let mut space = cmsg_space!([RawFd; 8]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
    let mut descriptors = Vec::new();
    for control in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just made these descriptors for us.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    let bytes = message.bytes;
    let text = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
    let Some(name) = text.lines().find_map(|line| line.strip_prefix("FDNAME=")) else { return };
    let mut store = store.lock().unwrap();
    if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
        store.remove(name);
    } else if text.lines().any(|line| line == "FDSTORE=1") {
        store.insert(name.to_owned(), descriptors.remove(0));
    }
}
