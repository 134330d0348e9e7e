//! Going to the background: owns the two forks, the pipe on which the parent waits for the outcome, and the pid file.
//!
//! The parent exits only when the VM is set up, with the exit status and the error text of the child: a script that
//! starts a VM with `-daemonize` learns whether it runs.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::pipe::{PipeFlags, pipe_with};

use super::ProcessError;

const READY: u8 = 0;
const FAILED: u8 = 1;

/// What the original process is left with: exit with this status.
pub struct Parent {
    /// 0 when the VM was set up.
    pub exit_code: u8,
    /// What to print to standard error.
    pub error: Option<String>,
}

/// Which of the two processes this is now.
pub enum Side {
    /// The one that the user started.
    Parent(Parent),
    /// The one in the background, which becomes the VM.
    Child(Daemon),
}

/// The child's end of the pipe. Dropping it without a word tells the parent that the child failed.
pub struct Daemon {
    parent: OwnedFd,
}

/// Forks twice, so that the child is nobody's session leader and can never get a terminal. Call before threads start.
pub fn fork() -> Result<Side, ProcessError> {
    let host = |e: rustix::io::Errno| ProcessError::Daemonize(e.into());
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(host)?;
    // SAFETY: no other thread exists yet, so the child inherits no lock that somebody holds.
    let first = unsafe { libc::fork() };
    if first < 0 {
        return Err(ProcessError::Daemonize(io::Error::last_os_error()));
    }
    if first > 0 {
        drop(writer);
        return Ok(Side::Parent(wait(reader)));
    }
    drop(reader);
    rustix::process::setsid().map_err(host)?;
    // SAFETY: as above.
    match unsafe { libc::fork() } {
        0 => Ok(Side::Child(Daemon { parent: writer })),
        // SAFETY: the intermediate process has nothing to clean up that is not the child's too.
        n if n > 0 => unsafe { libc::_exit(0) },
        _ => {
            let error = io::Error::last_os_error();
            Daemon { parent: writer }.failed(&format!("cannot go to the background: {error}"));
            // SAFETY: as above.
            unsafe { libc::_exit(1) }
        }
    }
}

fn wait(reader: OwnedFd) -> Parent {
    let mut report = Vec::new();
    // Ends when the child reports or dies: both close its end.
    let _ = File::from(reader).read_to_end(&mut report);
    match report.split_first() {
        Some((&READY, _)) => Parent { exit_code: 0, error: None },
        Some((_, text)) => Parent { exit_code: 1, error: Some(String::from_utf8_lossy(text).into_owned()) },
        None => Parent { exit_code: 1, error: Some("the VMM ended while it was set up".to_owned()) },
    }
}

impl Daemon {
    /// The VM is set up: lets go of the terminal and of the parent. The working directory stays, because relative paths of the
    /// command line must still name the same files when the VM ends.
    pub fn ready(self) -> Result<(), ProcessError> {
        let host = |e: rustix::io::Errno| ProcessError::Daemonize(e.into());
        let null =
            OpenOptions::new().read(true).write(true).open("/dev/null").map_err(ProcessError::Daemonize)?;
        rustix::stdio::dup2_stdin(&null).map_err(host)?;
        rustix::stdio::dup2_stdout(&null).map_err(host)?;
        rustix::stdio::dup2_stderr(&null).map_err(host)?;
        // A parent that was killed no longer wants to know.
        let _ = File::from(self.parent).write_all(&[READY]);
        Ok(())
    }

    /// The VM could not be set up.
    pub fn failed(self, error: &str) {
        let _ = File::from(self.parent).write_all(&[&[FAILED], error.as_bytes()].concat());
    }
}

/// The pid file; removed when dropped.
pub struct PidFile {
    path: PathBuf,
}

impl PidFile {
    /// Writes this process's id to a new file of mode 0600.
    pub fn create(path: &Path) -> Result<Self, ProcessError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => ProcessError::PidFileExists(path.to_owned()),
            _ => ProcessError::PidFile { path: path.to_owned(), source },
        };
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        let written = file.write_all(format!("{}\n", std::process::id()).as_bytes());
        // Exists from here on, so that it is removed if the write failed.
        let pid_file = Self { path: path.to_owned() };
        written.map_err(failed)?;
        Ok(pid_file)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // A directory that became read-only: nothing can be done.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_is_never_taken_over_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let file = PidFile::create(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert!(matches!(PidFile::create(&path), Err(ProcessError::PidFileExists(_))));
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn the_parent_reports_what_the_child_says() {
        for (report, want) in [
            (&b"\0"[..], (0, None)),
            (b"\x01no kernel", (1, Some("no kernel"))),
            (b"", (1, Some("the VMM ended while it was set up"))),
        ] {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            File::from(writer).write_all(report).unwrap();
            let parent = wait(reader);
            assert_eq!((parent.exit_code, parent.error.as_deref()), want);
        }
    }
}
