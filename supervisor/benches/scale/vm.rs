//! A simulated VM: this program again, started by the daemon as its VMM. One process, one thread, no memory to speak of; speaks as much QMP
//! as the daemon and this benchmark use. It ends when the benchmark does, however that ends.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

/// Names the FIFO that the benchmark holds open for writing as long as it lives.
pub(crate) const LIFELINE: &str = "SCALE_LIFELINE";

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Nanoseconds since the epoch: the benchmark is on the same machine.
pub(crate) fn clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The socket that this process is to listen at, if it was started as a VMM.
pub(crate) fn wanted() -> Option<String> {
    let mut words = std::env::args().skip_while(|word| word != "-qmp");
    let socket = words.nth(1)?;
    Some(socket.trim_start_matches("unix:").split(',').next()?.to_owned())
}

struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
}

/// Serves until it is told to quit.
pub(crate) fn serve(path: &str) -> Outcome<()> {
    // A VMM that was killed leaves its socket.
    let _ = std::fs::remove_file(path);
    let lifeline = lifeline()?;
    let listener = UnixListener::bind(path)?;
    let mut clients: Vec<Client> = Vec::new();
    let mut paused = false;
    loop {
        let ready = {
            let mut watched =
                vec![PollFd::new(&lifeline, PollFlags::empty()), PollFd::new(&listener, PollFlags::IN)];
            watched.extend(clients.iter().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
            poll(&mut watched, None)?;
            watched.iter().map(|one| !one.revents().is_empty()).collect::<Vec<bool>>()
        };
        if ready[0] {
            return Ok(());
        }
        // From the end, so that those before keep their numbers.
        for at in (0..clients.len()).rev().filter(|at| ready[at + 2]) {
            match hear(&mut clients[at], &mut paused) {
                Ok(Some(events)) => events.iter().for_each(|event| tell(&mut clients, event)),
                Ok(None) => drop(clients.remove(at)),
                Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
                Err(_) => drop(clients.remove(at)),
            }
        }
        if ready[1] {
            let (mut stream, _) = listener.accept()?;
            let version = json!({"qemu": {"micro": 1, "minor": 0, "major": 5}, "package": "simulated"});
            let greeting = json!({"QMP": {"version": version, "capabilities": []}});
            if write!(stream, "{greeting}\r\n").is_ok() {
                clients.push(Client { stream, buffer: Vec::new() });
            }
        }
    }
}

fn lifeline() -> Outcome<File> {
    let path = std::env::var(LIFELINE)?;
    Ok(OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?)
}

fn tell(clients: &mut [Client], event: &str) {
    for client in clients {
        // One that is gone is found when it is read.
        let _ = client.stream.write_all(event.as_bytes());
    }
}

/// Answers what a client sent, and gives the events that it brought about. `None`: it is gone. `Interrupted`: it said quit.
fn hear(client: &mut Client, paused: &mut bool) -> io::Result<Option<Vec<String>>> {
    let mut piece = [0; 4096];
    let count = client.stream.read(&mut piece)?;
    if count == 0 {
        return Ok(None);
    }
    client.buffer.extend_from_slice(&piece[..count]);
    let mut events = Vec::new();
    while let Some(end) = client.buffer.iter().position(|byte| *byte == b'\n') {
        let line: Vec<u8> = client.buffer.drain(..=end).collect();
        let request: Value = serde_json::from_slice(&line)?;
        let mut event = |name: &str, data: Value| {
            let now = clock();
            let timestamp = json!({"seconds": now / 1_000_000_000, "microseconds": now / 1000 % 1_000_000});
            events.push(format!("{}\r\n", json!({"event": name, "data": data, "timestamp": timestamp})));
        };
        let (member, value) = match request["execute"].as_str().unwrap_or_default() {
            "query-status" => {
                let status = if *paused { "paused" } else { "running" };
                ("return", json!({"running": !*paused, "status": status}))
            }
            "query-balloon" => ("return", json!({"actual": 256 << 20})),
            "query-blockstats" => ("return", json!([])),
            "stop" | "cont" => {
                *paused = request["execute"] == "stop";
                event(if *paused { "STOP" } else { "RESUME" }, json!({}));
                ("return", json!({}))
            }
            "x-event" => {
                event("X_STAMP", json!({"at": clock()}));
                ("return", json!({}))
            }
            "qmp_capabilities" => ("return", json!({})),
            "quit" => return Err(ErrorKind::Interrupted.into()),
            other => {
                let desc = format!("The command {other} has not been found");
                ("error", json!({"class": "CommandNotFound", "desc": desc}))
            }
        };
        let mut answer = json!({ member: value });
        if let Some(id) = request.get("id") {
            answer["id"] = id.clone();
        }
        client.stream.write_all(format!("{answer}\r\n").as_bytes())?;
    }
    Ok(Some(events))
}
