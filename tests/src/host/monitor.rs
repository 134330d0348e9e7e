//! A small QMP client for the emulator that a host runs in; for `host` only.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The emulator's monitor, on a socket pair that it inherited: there is no path to wait for.
#[derive(Debug)]
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
    events: Vec<String>,
}

impl Monitor {
    /// Takes the greeting and leaves negotiation mode.
    pub(crate) fn new(stream: UnixStream, limit: Duration) -> io::Result<Self> {
        let mut monitor = Self { stream: BufReader::new(stream), events: Vec::new() };
        monitor.read(Instant::now() + limit)?;
        monitor.execute("qmp_capabilities", &json!({}), limit)?;
        Ok(monitor)
    }

    /// Runs a command; an error answer is an error.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value, limit: Duration) -> io::Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.stream.get_mut().write_all(line.as_bytes())?;
        let deadline = Instant::now() + limit;
        loop {
            let mut answer = self.read(deadline)?;
            if let Some(event) = answer.get("event") {
                self.note(&event.clone(), &answer);
            } else if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("{command}: {error}")));
            } else if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Waits for an event, `NAME` or `NAME:status`; one that came earlier counts.
    pub(crate) fn wait(&mut self, event: &str, limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        while !self.events.iter().any(|seen| seen == event) {
            if let Some(failed) = self.events.iter().find(|seen| *seen == "MIGRATION:failed") {
                return Err(io::Error::other(failed.clone()));
            }
            let message = self.read(deadline)?;
            if let Some(event) = message.get("event") {
                self.note(&event.clone(), &message);
            }
        }
        Ok(())
    }

    fn note(&mut self, event: &Value, message: &Value) {
        let name = event.as_str().unwrap_or_default();
        let status = message.pointer("/data/status").and_then(Value::as_str);
        self.events.push(status.map_or_else(|| name.to_owned(), |status| format!("{name}:{status}")));
    }

    fn read(&mut self, deadline: Instant) -> io::Result<Value> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.stream.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the emulator closed its monitor"));
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }
}
