//! The test's end of the agent: commands with input, output, exit code and deadline; for `host` only.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use super::wire::{self, FRAME_MAX, Kind, Request, Wire};

/// Connecting to the port forwarder is at once or never.
const CONNECT: Duration = Duration::from_secs(5);

/// Slack over a command's own deadline before the host itself is taken for dead.
const SLACK: Duration = Duration::from_secs(30);

/// Where to put a command's output as it comes.
pub(crate) trait Sink {
    fn output(&mut self, kind: Kind, data: &[u8]) -> io::Result<()>;
}

impl<F: FnMut(Kind, &[u8]) -> io::Result<()>> Sink for F {
    fn output(&mut self, kind: Kind, data: &[u8]) -> io::Result<()> {
        self(kind, data)
    }
}

/// Where the agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a host, behind this port of 127.0.0.1.
    Port(u16),
    /// In this process: commands run on this machine.
    Here,
}

impl Place {
    fn connect(self) -> io::Result<Box<dyn Wire>> {
        let port = match self {
            Self::Port(port) => port,
            Self::Here => {
                // A pair and no listener: nobody else on this machine gets a shell of ours.
                let (near, far) = UnixStream::pair()?;
                thread::spawn(move || super::server::serve(&far));
                return Ok(Box::new(near));
            }
        };
        let stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), CONNECT)?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }
}

/// Runs one command to its end; returns its exit code. `TimedOut` when the host says nothing for longer than it should.
pub(crate) fn run(
    place: Place,
    command: &str,
    input: impl Read + Send + 'static,
    limit: Duration,
    sink: &mut dyn Sink,
) -> io::Result<i32> {
    let mut stream = place.connect()?;
    stream.limit_writes(limit + SLACK)?;
    let request = Request { command: command.to_owned(), seconds: limit.as_secs().max(1) };
    wire::send(&mut stream, Kind::Request, &serde_json::to_vec(&request)?)?;
    let requests = stream.twin()?;
    // Not joined: a reader of a terminal may never return, and the connection's end stops the others.
    thread::spawn(move || feed(requests, input));
    let deadline = Instant::now() + limit + SLACK;
    let result = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break Err(io::ErrorKind::TimedOut.into());
        }
        stream.limit_reads(left)?;
        match wire::receive(&mut stream) {
            Ok((Kind::Exit, code)) => {
                let code = String::from_utf8_lossy(&code);
                break code.parse().map_err(|_| io::Error::other(format!("exit code \"{code}\"")));
            }
            Ok((kind, data)) => sink.output(kind, &data)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                break Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => break Err(error),
        }
    };
    stream.close();
    result
}

fn feed(mut stream: Box<dyn Wire>, mut input: impl Read) {
    let mut buffer = vec![0; FRAME_MAX.min(1 << 17)];
    while let Ok(n @ 1..) = input.read(&mut buffer) {
        if wire::send(&mut stream, Kind::Input, &buffer[..n]).is_err() {
            return;
        }
    }
    let _ = wire::send(&mut stream, Kind::Input, &[]);
    let _ = stream.flush();
}
