//! How the command fails: one clear line and an exit status. Maps the API's named errors; every verb uses it.

use std::fmt;

use dbus_api::error::Error;
use zbus::fdo;

use crate::args::Bus;

/// Exit status; the meaning is part of the command's interface (see `flotilla --help`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// It failed.
    Failed = 1,
    /// Wrong usage; clap uses the same number.
    Usage = 2,
    /// No such VM or network.
    NoSuchVm = 3,
    /// flotillad cannot be reached.
    Unreachable = 4,
    /// The definition is not valid.
    Definition = 5,
    /// The VM's state does not allow it.
    State = 6,
    /// Not allowed.
    Denied = 7,
    /// It took too long.
    TimedOut = 8,
}

/// Why the command ends without success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Exit status.
    pub(crate) exit: Exit,
    /// What was wrong and what to do, one line.
    pub(crate) message: String,
}

impl Failure {
    /// A failure of this kind.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    /// The same, saying which VM it was about, and by which command its log is seen.
    pub(crate) fn about(mut self, what: &str) -> Self {
        self.message = self.message.replace("see its log", &format!("see `flotilla logs {what}`"));
        // The daemon names the VM in many of its messages already.
        if !self.message.contains(&format!("\"{what}\"")) && self.exit != Exit::Unreachable {
            self.message = format!("{what}: {}", self.message);
        }
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Errors are one line, also where a library's text has several.
        let mut lines = self.message.lines().map(str::trim).filter(|line| !line.is_empty());
        f.write_str(lines.next().unwrap_or("failed"))?;
        lines.try_for_each(|line| write!(f, "; {line}"))
    }
}

/// What to do when flotillad does not run.
fn how_to_start(bus: &Bus) -> &'static str {
    match bus {
        Bus::System => "start it with `systemctl start flotillad`",
        Bus::Session => "start it with `flotillad --bus session`",
        Bus::Address(_) => "start it with `flotillad --bus ADDRESS`, or check --bus",
    }
}

/// A failed connection to the bus itself.
pub(crate) fn of_connection(error: &zbus::Error, bus: &Bus) -> Failure {
    let hint = match bus {
        Bus::System => "is D-Bus running on this host?",
        Bus::Session => "is there a session bus (DBUS_SESSION_BUS_ADDRESS)?",
        Bus::Address(_) => "check --bus",
    };
    let bus = match bus {
        Bus::System => "the system bus".to_owned(),
        Bus::Session => "the session bus".to_owned(),
        Bus::Address(address) => format!("the bus at {address}"),
    };
    // zbus names the address again, in front of the system's error.
    let error = match error {
        zbus::Error::Connection(error, _) => error.to_string(),
        zbus::Error::Address(_) => "no valid address".to_owned(),
        error => error.to_string(),
    };
    Failure::new(Exit::Unreachable, format!("cannot reach {bus}: {error}; {hint}"))
}

/// A failed call.
pub(crate) fn of_call(error: Error, bus: &Bus) -> Failure {
    match error {
        Error::ZBus(error) => of_bus(error, bus),
        Error::NoSuchVm(text) => Failure::new(Exit::NoSuchVm, text),
        Error::NoSuchNetwork(text) | Error::NoSuchTemplate(text) => Failure::new(Exit::NoSuchVm, text),
        Error::InvalidSpec(text) => Failure::new(Exit::Definition, text),
        Error::VmExists(text)
        | Error::NetworkExists(text)
        | Error::TemplateExists(text)
        | Error::TemplateInUse(text)
        | Error::GenerationMismatch(text)
        | Error::InvalidState(text)
        | Error::Busy(text)
        | Error::Draining(text) => Failure::new(Exit::State, text),
        Error::AccessDenied(text) => denied(&text),
        Error::QmpTimeout(text) => Failure::new(Exit::TimedOut, text),
        Error::NoSuchJob(text)
        | Error::ResourceExhausted(text)
        | Error::QmpError(text)
        | Error::VmmDied(text)
        | Error::NotSupported(text)
        | Error::LaunchFailed(text)
        | Error::NetworkFailed(text)
        | Error::StoreFailed(text)
        | Error::Cancelled(text) => Failure::new(Exit::Failed, text),
    }
}

/// A failed job, by the name and text that `JobRemoved` carries.
pub(crate) fn of_job(result: &str, name: &str, text: &str) -> Failure {
    let exit = match name.rsplit('.').next() {
        Some("NoSuchVm" | "NoSuchTemplate") => Exit::NoSuchVm,
        Some("InvalidSpec") => Exit::Definition,
        Some(
            "InvalidState" | "Busy" | "VmExists" | "TemplateExists" | "TemplateInUse" | "GenerationMismatch"
            | "Draining",
        ) => Exit::State,
        Some("AccessDenied") => Exit::Denied,
        Some("QmpTimeout" | "Timeout") => Exit::TimedOut,
        _ => Exit::Failed,
    };
    let text = match (text, name) {
        ("", "") => result,
        ("", name) => name,
        (text, _) => text,
    };
    Failure::new(exit, text)
}

/// Errors of the bus and of services in general.
pub(crate) fn of_bus(error: zbus::Error, bus: &Bus) -> Failure {
    match error {
        zbus::Error::FDO(error) => match *error {
            fdo::Error::ServiceUnknown(_)
            | fdo::Error::NameHasNoOwner(_)
            | fdo::Error::SpawnServiceNotFound(_) => {
                Failure::new(Exit::Unreachable, format!("flotillad is not running: {}", how_to_start(bus)))
            }
            fdo::Error::NoReply(_) | fdo::Error::Timeout(_) | fdo::Error::TimedOut(_) => Failure::new(
                Exit::TimedOut,
                "flotillad gave no answer: see `systemctl status flotillad` and `journalctl -u flotillad`",
            ),
            fdo::Error::AccessDenied(text)
            | fdo::Error::AuthFailed(text)
            | fdo::Error::InteractiveAuthorizationRequired(text) => denied(&text),
            fdo::Error::InvalidArgs(text) => Failure::new(Exit::Usage, text),
            fdo::Error::UnknownObject(_) => Failure::new(Exit::NoSuchVm, "no such VM any more"),
            fdo::Error::UnknownMethod(text)
            | fdo::Error::UnknownInterface(text)
            | fdo::Error::UnknownProperty(text) => Failure::new(
                Exit::Failed,
                format!("flotillad is of another version than this command: {text}"),
            ),
            other => spawn_or(other.to_string()),
        },
        zbus::Error::MethodError(name, text, _) => {
            spawn_or(format!("{name}: {}", text.unwrap_or_else(|| "no reason given".to_owned())))
        }
        zbus::Error::InputOutput(error) if error.kind() == std::io::ErrorKind::TimedOut => Failure::new(
            Exit::TimedOut,
            "flotillad gave no answer: see `systemctl status flotillad` and `journalctl -u flotillad`",
        ),
        zbus::Error::InputOutput(error) => {
            Failure::new(Exit::Unreachable, format!("lost the connection to the bus: {error}"))
        }
        other => Failure::new(Exit::Failed, format!("D-Bus: {other}")),
    }
}

/// Failed activation comes as one of many errors of the bus or of systemd.
fn spawn_or(text: String) -> Failure {
    if text.contains("DBus.Error.Spawn") || text.contains("systemd1.") {
        Failure::new(
            Exit::Unreachable,
            format!("flotillad could not be started ({text}): see `journalctl -u flotillad`"),
        )
    } else {
        Failure::new(Exit::Failed, text)
    }
}

fn denied(text: &str) -> Failure {
    let text = text.trim_end_matches('.');
    Failure::new(Exit::Denied, format!("not allowed ({text}): use sudo, or join the group flotilla"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_errors_have_their_own_status() {
        for (error, exit) in [
            (Error::NoSuchVm("x".into()), Exit::NoSuchVm),
            (Error::InvalidSpec("x".into()), Exit::Definition),
            (Error::Busy("x".into()), Exit::State),
            (Error::AccessDenied("x".into()), Exit::Denied),
            (Error::LaunchFailed("x".into()), Exit::Failed),
            (Error::ZBus(fdo::Error::ServiceUnknown("x".into()).into()), Exit::Unreachable),
            (Error::ZBus(fdo::Error::NoReply("x".into()).into()), Exit::TimedOut),
        ] {
            let text = format!("{error:?}");
            assert_eq!(of_call(error, &Bus::System).exit, exit, "{text}");
        }
        assert_eq!(of_job("failed", "org.flotilla.Flotilla1.Error.Busy", "t").exit, Exit::State);
        assert_eq!(of_job("cancelled", "", "").message, "cancelled");
    }

    #[test]
    fn a_message_is_one_line_and_says_what_to_do() {
        let failure =
            of_call(Error::ZBus(fdo::Error::ServiceUnknown("gone".into()).into()), &Bus::System).about("web");
        assert_eq!(
            failure.to_string(),
            "flotillad is not running: start it with `systemctl start flotillad`"
        );
        assert_eq!(Failure::new(Exit::Failed, "a\n\n  b\n").to_string(), "a; b");
        assert_eq!(Failure::new(Exit::Failed, "boom").about("web").to_string(), "web: boom");
        assert_eq!(Failure::new(Exit::Failed, "VM \"web\": x").about("web").to_string(), "VM \"web\": x");
    }
}
