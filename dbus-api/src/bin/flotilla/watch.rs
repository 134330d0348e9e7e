//! `flotilla events` and `flotilla wait`: what the daemon tells, in order and without gaps.
//!
//! All signals come through one stream, so that they stay in the order in which they were sent. Events are numbered: those not above the
//! number that stood when the list was read are old, and after a gap (the bus drops what a slow listener does not take) the list is read again.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use dbus_api::error::Error;
use dbus_api::{BUS_NAME, MANAGER_INTERFACE, MANAGER_PATH, VM_INTERFACE, vm_name_of};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};
use zbus::message::{Message, Type};
use zbus::{MatchRule, MessageStream, OwnedObjectPath};

use crate::args::watch::{EventsArgs, WaitForArgs, Wanted};
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::output::{self, plain};

/// Signals that wait to be printed: a pipe that is read slowly must not lose them at once.
const QUEUE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
struct Event {
    /// Its number; what is not numbered has none.
    seq: Option<u64>,
    vm: String,
    /// "state", "qmp", "new", "removed", "job-new", "job-removed", "network-new", "network-removed".
    kind: &'static str,
    /// In words.
    text: String,
    /// The same for programs.
    detail: Value,
}

type StateChange = (u64, String, OwnedObjectPath, String, String, String);

impl Event {
    /// Reads a signal; `None`: not one that is shown.
    fn read(message: &Message) -> Option<Self> {
        let header = message.header();
        let (interface, member) = (header.interface()?.as_str(), header.member()?.as_str());
        let path = header.path()?.as_str();
        let body = message.body();
        let of_vm = |kind, vm: String, text: String, detail| Some(Self { seq: None, vm, kind, text, detail });
        match (interface, member) {
            (VM_INTERFACE, "Event") => {
                let (seq, usec, event, data): (u64, u64, String, String) = body.deserialize().ok()?;
                let data: Value = serde_json::from_str(&data).unwrap_or(Value::Null);
                let short =
                    if data.is_null() || data == json!({}) { String::new() } else { format!(" {data}") };
                let text = format!("{event}{short}");
                let detail = json!({ "event": event, "data": data, "usec": usec });
                Some(Self { seq: Some(seq), vm: vm_name_of(path)?, kind: "qmp", text, detail })
            }
            (MANAGER_INTERFACE, "VmStateChanged") => {
                let change: (u64, String, OwnedObjectPath, String, String, String, dbus_api::proxy::Details) =
                    body.deserialize().ok()?;
                let (seq, vm, _, old, new, reason): StateChange =
                    (change.0, change.1, change.2, change.3, change.4, change.5);
                let text = format!("{old} -> {new}: {reason}");
                let detail = json!({ "old": old, "new": new, "reason": reason });
                Some(Self { seq: Some(seq), vm, kind: "state", text, detail })
            }
            (MANAGER_INTERFACE, "VmNew" | "VmRemoved" | "NetworkNew" | "NetworkRemoved") => {
                let (name, _): (String, OwnedObjectPath) = body.deserialize().ok()?;
                match member {
                    "VmNew" => of_vm("new", name, "defined".to_owned(), json!({})),
                    "VmRemoved" => of_vm("removed", name, "undefined".to_owned(), json!({})),
                    "NetworkNew" => of_vm(
                        "network-new",
                        String::new(),
                        format!("network {name} defined"),
                        json!({ "network": name }),
                    ),
                    _ => of_vm(
                        "network-removed",
                        String::new(),
                        format!("network {name} deleted"),
                        json!({ "network": name }),
                    ),
                }
            }
            (MANAGER_INTERFACE, "JobNew") => {
                let (id, _, kind, vm): (u32, OwnedObjectPath, String, String) = body.deserialize().ok()?;
                let text = format!("job {id} ({kind}) began");
                of_vm("job-new", vm, text, json!({ "job": id, "type": kind }))
            }
            (MANAGER_INTERFACE, "JobRemoved") => {
                let (id, _, kind, vm, result, error, message): (
                    u32,
                    OwnedObjectPath,
                    String,
                    String,
                    String,
                    String,
                    String,
                ) = body.deserialize().ok()?;
                let why = if message.is_empty() { String::new() } else { format!(": {message}") };
                let text = format!("job {id} ({kind}) {result}{why}");
                let detail =
                    json!({ "job": id, "type": kind, "result": result, "error": error, "message": message });
                of_vm("job-removed", vm, text, detail)
            }
            _ => None,
        }
    }

    fn line(&self, json: bool) -> String {
        if json {
            let mut line = json!({ "seq": self.seq, "vm": self.vm, "kind": self.kind });
            if let (Some(line), Value::Object(detail)) = (line.as_object_mut(), self.detail.clone()) {
                line.extend(detail);
            }
            return format!("{line}\n");
        }
        let seq = self.seq.map_or_else(|| "-".to_owned(), |seq| seq.to_string());
        let vm = if self.vm.is_empty() { "-" } else { &self.vm };
        format!("{seq:>8}  {:<20}  {}\n", plain(vm), plain(&self.text))
    }
}

/// What the numbers say.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Order {
    last: u64,
}

/// What is to be done with an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It was in the list already.
    Old,
    /// It is the next one.
    Next,
    /// Some are missing before it.
    Gap,
}

impl Order {
    fn take(&mut self, seq: u64) -> Verdict {
        if seq <= self.last {
            return Verdict::Old;
        }
        let verdict = if seq == self.last + 1 { Verdict::Next } else { Verdict::Gap };
        self.last = seq;
        verdict
    }
}

async fn signals(client: &Client) -> Result<MessageStream, Failure> {
    let rule = || -> zbus::Result<MatchRule<'static>> {
        MatchRule::builder().msg_type(Type::Signal).sender(BUS_NAME).path_namespace(MANAGER_PATH).build()
    };
    let rule = rule().map_err(|error| client.bus_failed(error))?;
    MessageStream::for_match_rule(rule, &client.connection, Some(QUEUE))
        .await
        .map_err(|error| client.bus_failed(error))
}

/// States by name, and the number of the newest event that they include.
async fn list(client: &Client) -> Result<(u64, BTreeMap<String, String>), Failure> {
    let seq = client.manager.event_seq().await.map_err(|error| client.bus_failed(error))?;
    let rows = client.manager.list_vms().await.map_err(|error| client.failed(error))?;
    Ok((seq, rows.into_iter().map(|row| (row.0, row.2)).collect()))
}

fn went_away() -> Failure {
    Failure::new(Exit::Unreachable, "the bus went away")
}

/// Shows what happens, until it is told to end.
pub(crate) async fn events(client: &Client, args: EventsArgs) -> Result<(), Failure> {
    // Listen before reading: what happens in between has a higher number.
    let mut stream = signals(client).await?;
    let wanted = |vm: &str| args.names.is_empty() || args.names.iter().any(|name| name == vm);
    let (seq, states) = list(client).await?;
    if let Some(unknown) = args.names.iter().find(|name| !states.contains_key(*name)) {
        output::note(&format!("no VM is named {unknown} yet; its events are shown when it is"));
    }
    let show_all = |seq: u64, states: &BTreeMap<String, String>| {
        states.iter().filter(|(name, _)| wanted(name)).try_for_each(|(name, state)| {
            let detail = json!({ "state": state });
            let now =
                Event { seq: Some(seq), vm: name.clone(), kind: "is", text: format!("is {state}"), detail };
            output::print(&now.line(args.json))
        })
    };
    show_all(seq, &states)?;
    let mut order = Order { last: seq };
    let end = args.timeout.map(|timeout| Instant::now() + timeout);
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0 {
        let message = match end {
            Some(end) => match timeout_at(end, stream.next()).await {
                Ok(message) => message,
                Err(_) => return Ok(()),
            },
            None => stream.next().await,
        };
        let message = message.ok_or_else(went_away)?.map_err(|error| client.bus_failed(error))?;
        let Some(event) = Event::read(&message) else { continue };
        if let Some(seq) = event.seq {
            // A daemon that has come anew counts anew.
            if seq == 1 {
                order.last = 0;
            }
            match order.take(seq) {
                Verdict::Old => continue,
                Verdict::Next => {}
                Verdict::Gap => {
                    let (seq, states) = list(client).await?;
                    output::note("events were missed: this is how it stands");
                    show_all(seq, &states)?;
                    order.last = seq.max(order.last);
                    continue;
                }
            }
        }
        if wanted(&event.vm) || (event.vm.is_empty() && args.names.is_empty()) {
            output::print(&event.line(args.json))?;
            left -= 1;
        }
    }
    Ok(())
}

fn is(wanted: &[Wanted], state: Option<&str>) -> bool {
    wanted.iter().any(|wanted| match (wanted, state) {
        (Wanted::Gone, state) => state.is_none(),
        (Wanted::Down, state) => matches!(state, Some("defined" | "stopped" | "failed")),
        (wanted, Some(state)) => {
            clap::ValueEnum::to_possible_value(wanted).is_some_and(|value| value.get_name() == state)
        }
        (_, None) => false,
    })
}

/// Waits until a VM is in one of the states.
pub(crate) async fn wait(client: &Client, args: WaitForArgs) -> Result<(), Failure> {
    let mut stream = signals(client).await?;
    let end = args.timeout.map(|timeout| Instant::now() + timeout);
    loop {
        // Asked anew after each signal about this VM: what it is now counts, not what it was.
        let state = match client.manager.get_vm(&args.name).await {
            Ok(_) => {
                Some(client.vm(&args.name).await?.state().await.map_err(|error| client.bus_failed(error))?)
            }
            Err(Error::NoSuchVm(_)) => None,
            Err(error) => return Err(client.failed(error).about(&args.name)),
        };
        if is(&args.states, state.as_deref()) {
            return output::print(&format!("{} is {}\n", args.name, state.as_deref().unwrap_or("gone")));
        }
        if state.is_none() {
            let text = format!("no VM is named \"{}\"", args.name);
            return Err(Failure::new(Exit::NoSuchVm, text));
        }
        loop {
            let message = match end {
                Some(end) => timeout_at(end, stream.next()).await.map_err(|_| {
                    let text = format!("\"{}\" is {} still", args.name, state.as_deref().unwrap_or("gone"));
                    Failure::new(Exit::TimedOut, text)
                })?,
                None => stream.next().await,
            };
            let message = message.ok_or_else(went_away)?.map_err(|error| client.bus_failed(error))?;
            if let Some(event) = Event::read(&message)
                && event.vm == args.name
                && matches!(event.kind, "state" | "removed" | "new")
            {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_tell_what_is_old_and_what_is_missing() {
        let mut order = Order { last: 5 };
        for (seq, verdict) in
            [(5, Verdict::Old), (6, Verdict::Next), (6, Verdict::Old), (9, Verdict::Gap), (10, Verdict::Next)]
        {
            assert_eq!(order.take(seq), verdict, "{seq}");
        }
    }

    #[test]
    fn states_that_are_waited_for() {
        for (wanted, state, yes) in [
            (Wanted::Running, Some("running"), true),
            (Wanted::Running, Some("paused"), false),
            (Wanted::Down, Some("failed"), true),
            (Wanted::Down, None, false),
            (Wanted::Gone, None, true),
            (Wanted::Gone, Some("stopped"), false),
        ] {
            assert_eq!(is(&[wanted], state), yes, "{wanted:?} {state:?}");
        }
        assert!(is(&[Wanted::Paused, Wanted::Failed], Some("failed")));
    }

    #[test]
    fn a_line_is_one_line() {
        let event = Event {
            seq: Some(7),
            vm: "web".into(),
            kind: "state",
            text: "running -> paused: a\nb".into(),
            detail: json!({ "old": "running" }),
        };
        assert_eq!(event.line(false), "       7  web                   running -> paused: a?b\n");
        let line: Value = serde_json::from_str(&event.line(true)).unwrap();
        assert_eq!(
            (&line["seq"], &line["old"], &line["kind"]),
            (&json!(7), &json!("running"), &json!("state"))
        );
    }
}
