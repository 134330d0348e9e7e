//! A small QMP client: for the VMs under test, and for the emulator that a host runs in.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A QMP connection past its negotiation.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    greeting: Value,
    events: Vec<Value>,
}

impl Qmp {
    /// Takes the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// When the other side does not answer in time, or otherwise than QMP says.
    pub fn new(stream: UnixStream, limit: Duration) -> io::Result<Self> {
        let mut qmp = Self { stream: BufReader::new(stream), greeting: Value::Null, events: Vec::new() };
        qmp.greeting = qmp.read(Instant::now() + limit)?;
        if qmp.greeting.pointer("/QMP/version").is_none() {
            return Err(io::Error::other(format!("no QMP greeting: {}", qmp.greeting)));
        }
        qmp.execute("qmp_capabilities", &json!({}), limit)?;
        Ok(qmp)
    }

    /// The greeting.
    #[must_use]
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Runs a command without arguments, within 10 seconds.
    ///
    /// # Errors
    /// As for [`Qmp::execute`].
    pub fn ask(&mut self, command: &str) -> io::Result<Value> {
        self.execute(command, &json!({}), Duration::from_secs(10))
    }

    /// Runs a command; returns what its answer holds.
    ///
    /// # Errors
    /// An error answer is one, with its class and text; so are silence until `limit` and a closed connection.
    pub fn execute(&mut self, command: &str, arguments: &Value, limit: Duration) -> io::Result<Value> {
        let mut line = json!({ "execute": command });
        if arguments.as_object().is_some_and(|map| !map.is_empty()) {
            line["arguments"] = arguments.clone();
        }
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes())?;
        let deadline = Instant::now() + limit;
        loop {
            let mut answer = self.read(deadline)?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("{command}: {error}")));
            } else if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Waits for an event that `wanted` takes; one that came earlier counts.
    ///
    /// # Errors
    /// Silence until `limit`, and a closed connection.
    pub fn wait(&mut self, limit: Duration, wanted: impl Fn(&str, &Value) -> bool) -> io::Result<Value> {
        let deadline = Instant::now() + limit;
        let mut next = 0;
        loop {
            while let Some(event) = self.events.get(next) {
                let name = event.get("event").and_then(Value::as_str).unwrap_or_default();
                if wanted(name, event.get("data").unwrap_or(&Value::Null)) {
                    return Ok(event.clone());
                }
                next += 1;
            }
            let message = self.read(deadline)?;
            if message.get("event").is_some() {
                self.events.push(message);
            }
        }
    }

    fn read(&mut self, deadline: Instant) -> io::Result<Value> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.stream.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the monitor was closed")),
            Ok(_) => serde_json::from_str(&line).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "the monitor says nothing"))
            }
            Err(error) => Err(error),
        }
    }
}
