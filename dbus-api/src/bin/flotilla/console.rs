//! A VM's console on this terminal, or on pipes. Owns the terminal's mode while it runs and puts it back whatever happens.
//!
//! ```text
//!            guest's end closes ──────────────────────────► Closed
//! attached ─ Ctrl-] (terminal only), a signal ────────────► Detached / Signal
//!            input ends (no terminal) ─► lingering ─ quiet ► InputDone
//! ```

use std::io::{IsTerminal, Read};
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use dbus_api::proxy::{Options, VmProxy};
use rustix::termios::{self, OptionalActions, Termios};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::args::ConsoleArgs;
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::output::{self, note, plain};

/// Ctrl-], as telnet and machinectl have it.
const ESCAPE: u8 = 0x1d;
/// A guest that boots may be silent for long; only then does an input that has ended not end the session so soon.
const FIRST_OUTPUT: Duration = Duration::from_secs(30);

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The user left.
    Detached,
    /// The VM's end is gone: the VM has ended, or the daemon has taken the console away.
    Closed,
    /// The input, no terminal, has ended and the guest was quiet for long enough.
    InputDone,
    /// A signal of this number came.
    Signal(i32),
}

/// `flotilla console`.
pub(crate) async fn console(client: &Client, args: ConsoleArgs) -> Result<i32, Failure> {
    let vm = client.vm(&args.name).await?;
    let stream = open(client, &vm, &args.name).await?;
    if std::io::stdin().is_terminal() {
        note(&format!("Console of {}. Ctrl-] leaves it.", args.name));
    }
    match attach(stream, args.linger.linger).await? {
        Ended::Closed => note(&ended_text(&vm, &args.name).await),
        Ended::Signal(number) => return Ok(128 + number),
        Ended::Detached | Ended::InputDone => {}
    }
    Ok(0)
}

/// What has become of a VM whose console closed.
pub(crate) async fn ended_text(vm: &VmProxy<'_>, name: &str) -> String {
    // Fresh from the daemon, not from a cache filled before.
    let state = vm.inner().get_property::<String>("State").await.unwrap_or_default();
    let reason = vm.state_reason().await.unwrap_or_default();
    match (state.as_str(), reason.as_str()) {
        ("running" | "paused", _) => {
            format!("The console of {name} was taken away; the VM is {state}.")
        }
        ("", _) => format!("The console of {name} closed."),
        // The state itself may still be "stopping" for a moment: the reason is what counts.
        (_, "") => format!("{name} has ended."),
        (_, reason) => format!("{name} has ended: {}.", plain(reason)),
    }
}

/// Opens the serial console.
pub(crate) async fn open(client: &Client, vm: &VmProxy<'_>, name: &str) -> Result<UnixStream, Failure> {
    let (fd, _kind) =
        vm.open_console("", Options::new()).await.map_err(|error| client.failed(error).about(name))?;
    let stream = StdStream::from(std::os::fd::OwnedFd::from(fd));
    stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .map_err(|error| Failure::new(Exit::Failed, format!("{name}: console: {error}")))
}

/// Couples the standard input and output with a console until one side ends.
pub(crate) async fn attach(stream: UnixStream, linger: Duration) -> Result<Ended, Failure> {
    let fail = |error| Failure::new(Exit::Failed, format!("console: {error}"));
    let terminal = RawTerminal::enter().map_err(|error| fail(error.into()))?;
    let interactive = terminal.is_some();
    let mut signals = Signals::new().map_err(fail)?;
    let mut input = read_input();
    let (mut from_guest, mut to_guest) = stream.into_split();
    let mut buffer = [0; 16 << 10];
    // What is typed and not yet taken by the guest. No new input is read before it is gone, so a guest that
    // does not read slows the sender down instead of filling memory.
    let mut pending: Vec<u8> = Vec::new();
    let mut input_open = true;
    let mut quiet_at = Instant::now() + FIRST_OUTPUT;
    let mut heard = false;
    loop {
        tokio::select! {
            biased;
            number = signals.next() => return Ok(Ended::Signal(number)),
            count = from_guest.read(&mut buffer) => match count {
                Ok(0) => return Ok(Ended::Closed),
                Ok(count) => {
                    output::bytes(&buffer[..count])?;
                    heard = true;
                    quiet_at = Instant::now() + linger;
                }
                // The VMM died with our input unread.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(Ended::Closed),
                Err(error) => return Err(fail(error)),
            },
            written = to_guest.write(&pending), if !pending.is_empty() => match written {
                Ok(count) => {
                    pending.drain(..count);
                    quiet_at = Instant::now() + if heard { linger } else { FIRST_OUTPUT };
                }
                // Its last output may still be on the way: the reader sees the end.
                Err(_) => { pending.clear(); input_open = false; }
            },
            bytes = input.recv(), if input_open && pending.is_empty() => match bytes {
                Some(mut bytes) => {
                    let escape = bytes.iter().position(|byte| interactive && *byte == ESCAPE);
                    bytes.truncate(escape.unwrap_or(bytes.len()));
                    if escape.is_some() {
                        // Best effort: what was typed just before leaving.
                        let _ = to_guest.try_write(&bytes);
                        return Ok(Ended::Detached);
                    }
                    pending = bytes;
                }
                // The terminal itself went away.
                None if interactive => return Ok(Ended::Detached),
                None => input_open = false,
            },
            () = tokio::time::sleep_until(quiet_at), if !input_open && pending.is_empty() => {
                return Ok(Ended::InputDone);
            }
        }
    }
}

/// The standard input as messages. A thread, because a file or a terminal cannot be awaited; it ends with the process.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        let mut stdin = std::io::stdin().lock();
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}

/// The terminal in raw mode; the old mode comes back when this is dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` when the standard input is no terminal.
    fn enter() -> rustix::io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !termios::isatty(stdin) {
            return Ok(None);
        }
        let before = termios::tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone; there is nobody to tell then.
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Signals that end a session: caught so that the terminal's mode comes back and `run --rm` can tidy up.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt().as_raw_value(),
            _ = self.terminate.recv() => SignalKind::terminate().as_raw_value(),
            _ = self.hang_up.recv() => SignalKind::hangup().as_raw_value(),
        }
    }
}
