//! flotilla-exec: the first process of `flotilla-vm@NAME.service`. It asks flotillad for the VM's command line and descriptors and
//! becomes the VMM, so that systemd's main process is the VMM itself and `systemctl start flotilla-vm@NAME` equals a start over D-Bus.
//!
//! In a spare, `flotilla-vm@Spare-ID.service`, it waits until flotillad has a VM for it, and becomes that one.
//!
//! As `--shutdown` it is the unit's `ExecStop=`: it asks flotillad to end the VM as its definition says, and waits for that; when flotillad is
//! away, it asks the guest itself.

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
/// How long flotillad may be away at a VM's end.
const SHUTDOWN_AWAY: Duration = Duration::from_secs(5);
/// How long a guest has when there is no flotillad to say: what a definition says that says nothing.
const GUEST_DEADLINE: Duration = Duration::from_secs(30);
/// How long the VMM may take then, before it is killed.
const QUIT_DEADLINE: Duration = Duration::from_secs(10);

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
    let main = std::env::var("MAINPID").ok().and_then(|pid| pid.parse().ok());
    let Some(main) = main.and_then(rustix::process::Pid::from_raw) else { return Ok(()) };
    // Pinned: its number may be another's by the time it is killed.
    let Ok(main) = rustix::process::pidfd_open(main, rustix::process::PidfdFlags::empty()) else {
        return Ok(());
    };
    if let Some(Answer::Done) = ask_patiently(name) {
        return Ok(());
    }
    let directory = variable("FLOTILLA_VM_DIRECTORY", "/run/flotilla-vm").into_string();
    let path = format!("{}/{name}/qmp.sock", directory.map_err(|_| "FLOTILLA_VM_DIRECTORY is not UTF-8")?);
    end(&path).map_err(|error| {
        let _ = rustix::process::pidfd_send_signal(&main, rustix::process::Signal::KILL);
        format!("{path}: {error}; the VM was killed")
    })
}

/// Asks flotillad to end the VM, and waits as long as that takes; a flotillad that is restarted meanwhile is asked anew. None: it is away.
fn ask_patiently(name: &str) -> Option<Answer> {
    let path = launch_socket();
    let mut end = Instant::now() + SHUTDOWN_AWAY;
    loop {
        match ask_once(&path, "shutdown", name, None) {
            Ok(answer) => return Some(answer),
            Err((true, _)) => end = Instant::now() + SHUTDOWN_AWAY,
            Err((false, _)) if Instant::now() > end => return None,
            Err((false, _)) => {}
        }
        sleep(AWAY);
    }
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

/// The power button over QMP, then `quit`, then waits for the VMM to hang up. The greeting and the answers are lines that need no understanding.
fn end(path: &str) -> io::Result<()> {
    let mut socket = UnixStream::connect(path)?;
    socket.set_write_timeout(Some(QUIT_DEADLINE))?;
    let mut lines = BufReader::new(socket.try_clone()?);
    let mut said = Vec::new();
    socket.set_read_timeout(Some(QUIT_DEADLINE))?;
    lines.read_until(b'\n', &mut said)?;
    for (command, patience) in
        [("qmp_capabilities", Duration::ZERO), ("system_powerdown", GUEST_DEADLINE), ("quit", QUIT_DEADLINE)]
    {
        socket.write_all(format!("{{\"execute\":\"{command}\"}}\n").as_bytes())?;
        if hangs_up(&socket, &mut lines, patience)? {
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Reads until the other side hangs up, or for this long.
fn hangs_up(socket: &UnixStream, lines: &mut impl BufRead, patience: Duration) -> io::Result<bool> {
    let end = Instant::now() + patience;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        socket.set_read_timeout(Some(left))?;
        match lines.read_until(b'\n', &mut Vec::new()) {
            Ok(0) => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

fn variable(name: &str, default: &str) -> OsString {
    std::env::var_os(name).unwrap_or_else(|| default.into())
}
