//! flotilla-exec: the first process of `flotilla-vm@NAME.service`. It asks flotillad for the VM's command line and descriptors and
//! becomes the VMM, so that systemd's main process is the VMM itself and `systemctl start flotilla-vm@NAME` equals a start over D-Bus.
//!
//! In a spare, `flotilla-vm@Spare-ID.service`, it waits until flotillad has a VM for it, and becomes that one.
//!
//! As `--shutdown` it is the unit's `ExecStop=`: it asks flotillad to end the VM, or the VMM itself when flotillad is away.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread::sleep;
use std::time::{Duration, Instant};

use supervisor::launch::handover::{Answer, FIRST, receive};
use supervisor::launch::unit::SPARE;
use supervisor::launch::{FLOTILLA_FDS, FLOTILLA_JOURNAL};

const USAGE: &str = "\
Usage: flotilla-exec NAME             become the VMM of the VM NAME (run by flotilla-vm@NAME.service)
       flotilla-exec Spare-ID         wait for a VM and become its VMM (run by flotilla-vm@Spare-ID.service)
       flotilla-exec --shutdown NAME  ask that VMM to end (the same unit's ExecStop=)

Environment: FLOTILLA_LAUNCH_SOCKET   socket of flotillad [/run/flotilla/launch.sock]
             FLOTILLA_VM_DIRECTORY    directory of the VMs' own sockets [/run/flotilla-vm]";

/// How long flotillad may be away: a restart or a package upgrade takes seconds.
const LAUNCH_DEADLINE: Duration = Duration::from_secs(60);
/// Between two tries while it is away.
const AWAY: Duration = Duration::from_millis(200);
/// How long an end may take before systemd's own signals are the better way.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--help" | "-h"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["--shutdown", name] if !name.starts_with('-') => shut_down(name),
        [name] if name.starts_with(SPARE) => wait(name),
        [name] if !name.starts_with('-') => launch(name),
        _ => Err(format!("wrong arguments\n{USAGE}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("flotilla-exec: {text}");
            ExitCode::FAILURE
        }
    }
}

fn launch(name: &str) -> Result<(), String> {
    match ask("launch", name, LAUNCH_DEADLINE)? {
        Answer::Launch { table, command_line, descriptors } => become_vmm(&table, &command_line, descriptors),
        Answer::Refused(text) => Err(format!("VM \"{name}\": {text}")),
        Answer::Done => Err("flotillad gave no command line".to_owned()),
    }
}

/// Waits for a VM, through restarts of flotillad. Not needed, or by nobody: a good end.
fn wait(instance: &str) -> Result<(), String> {
    let path = launch_socket();
    let mut end = Instant::now() + LAUNCH_DEADLINE;
    loop {
        // No deadline: the answer comes with a VM, and the connection ends with flotillad.
        match ask_once(&path, "spare", instance, None) {
            Ok(Answer::Launch { table, command_line, descriptors }) => {
                // The unit's own name for it in the journal is the spare's.
                // SAFETY: this process has one thread.
                unsafe { std::env::set_var(FLOTILLA_JOURNAL, name_on(&command_line).unwrap_or(instance)) };
                return become_vmm(&table, &command_line, descriptors);
            }
            Ok(Answer::Refused(text)) => return Err(format!("{instance}: {text}")),
            Ok(Answer::Done) => return Ok(()),
            Err((true, _)) => end = Instant::now() + LAUNCH_DEADLINE,
            Err((false, _)) if Instant::now() > end => return Ok(()),
            Err((false, _)) => {}
        }
        sleep(AWAY);
    }
}

/// The VM's name, as its command line says it.
fn name_on(command_line: &[String]) -> Option<&str> {
    let at = command_line.iter().position(|word| word == "-name")?;
    command_line.get(at + 1).map(String::as_str)
}

fn become_vmm(table: &str, command_line: &[String], descriptors: Vec<OwnedFd>) -> Result<(), String> {
    place(descriptors).map_err(|error| format!("descriptors: {error}"))?;
    let (program, arguments) = command_line.split_first().ok_or("empty command line")?;
    let error = Command::new(program).args(arguments).env(FLOTILLA_FDS, table).exec();
    Err(format!("{program}: {error}"))
}

fn shut_down(name: &str) -> Result<(), String> {
    // systemd runs ExecStop= also after the VMM ended by itself; then it knows no main process.
    if std::env::var_os("MAINPID").is_none_or(|pid| pid.is_empty() || pid == "0") {
        return Ok(());
    }
    if let Ok(Answer::Done) = ask("shutdown", name, Duration::from_secs(2)) {
        return Ok(());
    }
    let directory = variable("FLOTILLA_VM_DIRECTORY", "/run/flotilla-vm").into_string();
    let path = format!("{}/{name}/qmp.sock", directory.map_err(|_| "FLOTILLA_VM_DIRECTORY is not UTF-8")?);
    quit(&path).map_err(|error| format!("{path}: {error}"))
}

fn launch_socket() -> PathBuf {
    variable("FLOTILLA_LAUNCH_SOCKET", "/run/flotilla/launch.sock").into()
}

/// Asks flotillad, trying again while it is being restarted. There is no event to wait for: the socket may not even exist.
fn ask(verb: &str, name: &str, deadline: Duration) -> Result<Answer, String> {
    let path = launch_socket();
    let end = Instant::now() + deadline;
    let mut pause = Duration::from_millis(5);
    loop {
        let error = match ask_once(&path, verb, name, Some(deadline)) {
            Ok(answer) => return Ok(answer),
            Err((_, error)) => error,
        };
        if Instant::now() + pause > end {
            let path = path.display();
            return Err(format!("{path}: {error}; is flotillad running? (systemctl start flotillad)"));
        }
        sleep(pause);
        pause = (pause * 2).min(AWAY);
    }
}

/// An error comes with whether somebody had taken the call.
fn ask_once(
    path: &Path,
    verb: &str,
    name: &str,
    deadline: Option<Duration>,
) -> Result<Answer, (bool, io::Error)> {
    let mut socket = UnixStream::connect(path).map_err(|error| (false, error))?;
    let answer = socket
        .set_read_timeout(deadline)
        .and_then(|()| socket.set_write_timeout(deadline))
        .and_then(|()| socket.write_all(format!("{verb} {name}\n").as_bytes()))
        .and_then(|()| receive(&mut socket));
    answer.map_err(|error| (true, error))
}

/// Moves the descriptors to 3, 4, … and lets them survive execve. Two steps, because a number of the first may be wanted by another.
fn place(descriptors: Vec<OwnedFd>) -> io::Result<()> {
    let count = descriptors.len() as RawFd;
    let mut lifted = Vec::with_capacity(descriptors.len());
    for descriptor in descriptors {
        lifted.push(rustix::io::fcntl_dupfd_cloexec(&descriptor, FIRST + count)?);
    }
    for (at, descriptor) in lifted.iter().enumerate() {
        // SAFETY: numbers FIRST..FIRST+count are free or belong to nothing that is used again: the socket is closed by now, and
        // the received descriptors were closed when they were lifted. dup2 clears close-on-exec on the copy.
        if unsafe { libc::dup2(descriptor.as_raw_fd(), FIRST + at as RawFd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// `quit` over QMP, then waits for the VMM to hang up. The greeting and the answers are lines that need no understanding.
fn quit(path: &str) -> io::Result<()> {
    let mut socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(SHUTDOWN_DEADLINE))?;
    socket.set_write_timeout(Some(SHUTDOWN_DEADLINE))?;
    let mut lines = BufReader::new(socket.try_clone()?);
    let mut line = Vec::new();
    for command in ["qmp_capabilities", "quit"] {
        lines.read_until(b'\n', &mut line)?;
        socket.write_all(format!("{{\"execute\":\"{command}\"}}\n").as_bytes())?;
    }
    let end = Instant::now() + SHUTDOWN_DEADLINE;
    loop {
        line.clear();
        match lines.read_until(b'\n', &mut line) {
            Ok(0) => return Ok(()),
            Ok(_) if Instant::now() < end => {}
            Ok(_) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn variable(name: &str, default: &str) -> OsString {
    std::env::var_os(name).unwrap_or_else(|| default.into())
}
