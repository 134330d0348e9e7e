//! Who a client is, what it may send, and which of its commands concern others than the VMM: the audit, and the VM's owner. Pure, but for
//! the log. Used by the proxy and its sessions.
//!
//! A command of a client whose effect the supervisor tracks is told to it twice: before it is sent (a VMM that is told to quit may be gone
//! before it answers) and when its answer is there.

use std::sync::Arc;

use serde_json::Value;
use tracing::info;

use super::error::QmpError;
use super::message::{Answer, Request};
use super::monitor::{Monitor, Reply};

/// What a client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Any command.
    #[default]
    Full,
    /// Only commands that change nothing.
    Query,
}

/// A client of the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client {
    /// Its user.
    pub uid: u32,
    /// Its process; 0 when unknown.
    pub pid: u32,
    /// What it may send.
    pub mode: Mode,
}

/// A command that changes what the supervisor knows of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tracked {
    /// End the VMM.
    Quit,
    /// Stop the vCPUs.
    Stop,
    /// Let the vCPUs go on.
    Cont,
    /// Press the power button.
    Powerdown,
    /// Add the device of this id.
    DeviceAdd(String),
}

/// How far a client's command has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It is about to be sent.
    Asked,
    /// The VMM did it.
    Done,
    /// The VMM refused, or did not answer.
    Refused,
    /// The client left before the answer: the VMM does it or not.
    Left,
}

/// What the VM's owner is told.
#[derive(Debug, Clone)]
pub struct Told {
    /// The connection that the command goes over.
    pub monitor: Monitor,
    /// The command.
    pub command: Tracked,
    /// How far it has got.
    pub stage: Stage,
}

/// How the VM's owner is told; must not wait.
pub type Watch = Arc<dyn Fn(Told) + Send + Sync>;

/// Commands that ask and change nothing, besides `query-…`.
const ASKING: [&str; 7] = [
    "get-viomem",
    "qmp_capabilities",
    "qom-list",
    "qom-get",
    "qom-list-types",
    "qom-list-properties",
    "device-list-properties",
];

/// Commands that change nothing and tell what a guest keeps to itself.
const PRYING: [&str; 1] = ["query-mem-gpa"];

/// The command changes nothing, and tells nothing that whoever may look at a VM should not know.
pub(crate) fn only_asks(command: &str) -> bool {
    !PRYING.contains(&command) && (command.starts_with("query-") || ASKING.contains(&command))
}

impl Client {
    /// The answer to a command that the client may not send.
    pub(crate) fn refusal(&self, request: &Request) -> Option<Answer> {
        if self.mode == Mode::Full || only_asks(&request.execute) {
            return None;
        }
        let desc =
            format!("{}: this connection is read-only and takes query-… commands only", request.execute);
        Some(Answer::error("GenericError", &desc))
    }

    /// One line in the journal for a command that changes something, before it is sent. Arguments may hold secrets: of them only the id is told.
    pub(crate) fn audit(&self, vm: &str, request: &Request) {
        if only_asks(&request.execute) {
            return;
        }
        let command: String = request.execute.chars().take(64).flat_map(char::escape_debug).collect();
        let id =
            id_of(request).map(|id| format!(" {}", id.chars().take(64).collect::<String>().escape_debug()));
        info!(
            FLOTILLA_VM = vm,
            FLOTILLA_QMP = &*command,
            FLOTILLA_UID = self.uid,
            FLOTILLA_PID = self.pid,
            "QMP command {command}{} by user {} (process {})",
            id.unwrap_or_default(),
            self.uid,
            self.pid
        );
    }
}

fn id_of(request: &Request) -> Option<String> {
    let arguments: Value = serde_json::from_str(request.arguments.as_ref()?.get()).ok()?;
    arguments.get("id").and_then(Value::as_str).map(str::to_owned)
}

fn tracked(request: &Request) -> Option<Tracked> {
    match request.execute.as_str() {
        "quit" => Some(Tracked::Quit),
        "stop" => Some(Tracked::Stop),
        "cont" => Some(Tracked::Cont),
        "system_powerdown" => Some(Tracked::Powerdown),
        "device_add" => id_of(request).map(Tracked::DeviceAdd),
        _ => None,
    }
}

/// A tracked command under way: tells its end, whichever that is.
pub(crate) struct Tracking {
    watch: Watch,
    told: Told,
}

impl Tracking {
    /// Tells that the command is about to be sent; `None`: it concerns nobody.
    pub(crate) fn begin(watch: Option<&Watch>, monitor: &Monitor, request: &Request) -> Option<Tracking> {
        let told = Told { monitor: monitor.clone(), command: tracked(request)?, stage: Stage::Asked };
        let watch = Arc::clone(watch?);
        watch(told.clone());
        Some(Tracking { watch, told: Told { stage: Stage::Left, ..told } })
    }

    /// The answer is there, or will not come.
    pub(crate) fn end(mut self, reply: &Result<Reply, QmpError>) {
        self.told.stage = match reply {
            Ok(Reply { answer: Answer::Return(_), .. }) => Stage::Done,
            // Hung up in place of an answer: it may have done it.
            Err(QmpError::Closed { .. }) => Stage::Left,
            Ok(_) | Err(_) => Stage::Refused,
        };
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        (self.watch)(self.told.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Request {
        Request::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn a_reader_may_ask_and_not_change() {
        let reader = Client { uid: 1, pid: 2, mode: Mode::Query };
        for (command, may) in [
            ("query-status", true),
            ("qmp_capabilities", true),
            ("qom-list", true),
            ("get-viomem", true),
            ("set-viomem", false),
            ("query-mem-gpa", false),
            ("stop", false),
            ("getfd", false),
            ("query", false),
            ("querystatus", false),
            ("x-query-", false),
        ] {
            let request = request(&format!("{{\"execute\":\"{command}\"}}"));
            assert_eq!(reader.refusal(&request).is_none(), may, "{command}");
            assert!(Client { mode: Mode::Full, ..reader }.refusal(&request).is_none(), "{command}");
        }
    }

    #[test]
    fn what_the_supervisor_tracks() {
        for (text, expected) in [
            (r#"{"execute":"quit"}"#, Some(Tracked::Quit)),
            (r#"{"execute":"stop"}"#, Some(Tracked::Stop)),
            (r#"{"execute":"cont"}"#, Some(Tracked::Cont)),
            (r#"{"execute":"system_powerdown"}"#, Some(Tracked::Powerdown)),
            (
                r#"{"execute":"device_add","arguments":{"driver":"x","id":"d1"}}"#,
                Some(Tracked::DeviceAdd("d1".into())),
            ),
            (r#"{"execute":"device_add","arguments":{"id":7}}"#, None),
            (r#"{"execute":"device_add"}"#, None),
            (r#"{"execute":"query-status"}"#, None),
        ] {
            assert_eq!(tracked(&request(text)), expected, "{text}");
        }
    }
}
