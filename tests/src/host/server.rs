//! The agent: runs inside a test host and does what tests ask over TCP (`host::wire`): one connection, one command, with
//! input, output, exit code and deadline. A command whose test goes away is killed; what it left in the background on
//! purpose stays. The program `host` is this agent when it is called `host-agent`.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::wire::{self, Kind, Request, Wire};

/// How long after a command's end its output may still be silent before the answer is closed: a daemon that it left
/// behind may hold the pipes open for ever.
const DRAIN: Duration = Duration::from_millis(150);

enum Happened {
    Data(Kind, Vec<u8>),
    /// One of the two output pipes ended.
    Closed,
    Ended(io::Result<ExitStatus>),
    ClientGone,
}

/// Serves for ever.
///
/// # Errors
/// When the port is taken.
pub fn run() -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", wire::PORT))?;
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        // An answer is several small writes, and none may wait for an acknowledgement.
        if stream.set_nodelay(true).is_ok() {
            thread::spawn(move || serve(&stream));
        }
    }
    Ok(())
}

/// Serves one connection to its end.
pub(super) fn serve(stream: &dyn Wire) {
    if let Err(error) = command(stream) {
        eprintln!("host-agent: {error}");
    }
    stream.close();
}

fn command(stream: &dyn Wire) -> io::Result<()> {
    let (mut requests, mut answers) = (stream.twin()?, stream.twin()?);
    let (kind, data) = wire::receive(&mut requests)?;
    if kind != Kind::Request {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no request"));
    }
    let request: Request = serde_json::from_slice(&data)?;
    let mut child = Command::new("/bin/bash")
        .args(["-c", &request.command])
        .current_dir("/")
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let group = Pid::from_raw(child.id().cast_signed());
    let (events, happened) = mpsc::channel();
    if let Some(input) = child.stdin.take() {
        let events = events.clone();
        thread::spawn(move || feed(&mut *requests, input, &events));
    }
    for (pipe, kind) in outputs(&mut child) {
        let events = events.clone();
        thread::spawn(move || forward(pipe, kind, &events));
    }
    thread::spawn(move || events.send(Happened::Ended(child.wait())));

    let limit = Duration::from_secs(request.seconds);
    let mut deadline = Instant::now() + limit;
    let (mut open, mut status, mut late) = (2, None, false);
    while open > 0 || status.is_none() {
        match happened.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Happened::Data(kind, data)) => {
                wire::send(&mut answers, kind, &data)?;
                if status.is_some() {
                    deadline = Instant::now() + DRAIN;
                }
            }
            Ok(Happened::Closed) => open -= 1,
            Ok(Happened::Ended(result)) => {
                status = Some(result?);
                deadline = Instant::now() + DRAIN;
            }
            Ok(Happened::ClientGone) if status.is_none() => {
                let _ = killpg(group, Signal::SIGKILL);
            }
            Ok(Happened::ClientGone) => {}
            Err(RecvTimeoutError::Timeout) if status.is_none() && !late => {
                late = true;
                let _ = killpg(group, Signal::SIGKILL);
                deadline = Instant::now() + Duration::from_secs(5);
            }
            Err(_) => break,
        }
    }
    let code = match status {
        Some(status) if !late => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        _ => {
            wire::send(
                &mut answers,
                Kind::Error,
                format!("host-agent: killed after {limit:?}\n").as_bytes(),
            )?;
            124
        }
    };
    wire::send(&mut answers, Kind::Exit, code.to_string().as_bytes())
}

fn outputs(child: &mut Child) -> Vec<(Box<dyn Read + Send>, Kind)> {
    let mut pipes: Vec<(Box<dyn Read + Send>, Kind)> = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        pipes.push((Box::new(pipe), Kind::Output));
    }
    if let Some(pipe) = child.stderr.take() {
        pipes.push((Box::new(pipe), Kind::Error));
    }
    pipes
}

fn forward(mut pipe: Box<dyn Read + Send>, kind: Kind, events: &Sender<Happened>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        if events.send(Happened::Data(kind, buffer[..n].to_vec())).is_err() {
            return;
        }
    }
    let _ = events.send(Happened::Closed);
}

fn feed(requests: &mut dyn Wire, input: ChildStdin, events: &Sender<Happened>) {
    let mut input = Some(input);
    loop {
        match wire::receive(requests) {
            Ok((Kind::Input, data)) if data.is_empty() => input = None,
            // A command that does not read its input is free to: the rest is dropped.
            Ok((Kind::Input, data)) => {
                if input.as_mut().is_some_and(|pipe| pipe.write_all(&data).is_err()) {
                    input = None;
                }
            }
            _ => {
                let _ = events.send(Happened::ClientGone);
                return;
            }
        }
    }
}
