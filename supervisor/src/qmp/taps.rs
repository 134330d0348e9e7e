//! `netdev_add` of a tap by its name, and `netdev_del`: owns how a client's command becomes one that the VMM can carry out. A VMM has no right
//! to open links of the host; whoever owns the VM has, and is asked for the tap. Used by the proxy and its sessions.
//!
//! ```text
//! netdev_add ifname=NAME ─▶ the owner makes and opens the tap ─▶ getfd ─▶ netdev_add fd=… ─▶ answer
//!                              │ refuses: the client's answer       │        │ refused, or the client left before it was sent
//!                              ▼                                    └────────┴──▶ the owner takes the tap back
//! netdev_del ─▶ answer ─▶ the owner takes the tap back
//! ```
//!
//! When nobody knows whether the VMM has the tap, it stays until the VMM ends.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde_json::value::to_raw_value;
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::error::QmpError;
use super::message::{Answer, Request};
use super::monitor::{Monitor, Reply};

/// How long the owner has to make and open a tap.
const MAKING: Duration = Duration::from_secs(20);
/// How long the VMM has to take a descriptor.
const GETFD: Duration = Duration::from_secs(10);

/// What the VM's owner is asked or told.
#[derive(Debug)]
pub enum TapStep {
    /// Make the tap of this name, put it on its bridge and open it; or say why not.
    Open {
        /// The tap.
        name: String,
        /// Where the descriptor goes.
        answer: oneshot::Sender<Result<OwnedFd, String>>,
    },
    /// The VMM does not have it, or has it no more.
    Free,
}

/// See [`TapStep`].
#[derive(Debug)]
pub struct TapNews {
    /// The connection that the command goes over.
    pub monitor: Monitor,
    /// Id of the network back end.
    pub netdev: String,
    /// What to do.
    pub step: TapStep,
}

/// How the VM's owner is asked; must not wait.
pub type Taps = Arc<dyn Fn(TapNews) + Send + Sync>;

/// A back end that a client asks for by the name of its tap.
#[derive(Debug, PartialEq)]
struct Wanted {
    netdev: String,
    name: String,
    /// The arguments without the name.
    rest: Map<String, Value>,
}

impl Wanted {
    /// `None`: the VMM is to judge the command as it is.
    fn of(request: &Request) -> Option<Self> {
        if request.execute != "netdev_add" {
            return None;
        }
        let mut rest: Map<String, Value> = serde_json::from_str(request.arguments.as_ref()?.get()).ok()?;
        // What says how it is to be opened is not for the owner to open.
        if rest.get("type")? != "tap" || ["fd", "fds", "path"].iter().any(|key| rest.contains_key(*key)) {
            return None;
        }
        let Some(Value::String(name)) = rest.remove("ifname") else { return None };
        let netdev = rest.get("id")?.as_str()?.to_owned();
        Some(Self { netdev, name, rest })
    }

    /// The command with a descriptor in place of the name.
    fn request(mut self, descriptor: &str) -> Option<Request> {
        self.rest.insert("fd".to_owned(), descriptor.into());
        Some(Request {
            execute: "netdev_add".to_owned(),
            arguments: Some(to_raw_value(&self.rest).ok()?),
            id: None,
        })
    }
}

/// The id of the back end that a client removes.
fn removed(request: &Request) -> Option<String> {
    if request.execute != "netdev_del" {
        return None;
    }
    let arguments: Value = serde_json::from_str(request.arguments.as_ref()?.get()).ok()?;
    arguments.get("id")?.as_str().map(str::to_owned)
}

fn refused(why: &str) -> Reply {
    // No event is known to be older than this answer.
    Reply { answer: Answer::error("GenericError", why), after: 0 }
}

fn done(reply: &Result<Reply, QmpError>) -> bool {
    matches!(reply, Ok(Reply { answer: Answer::Return(_), .. }))
}

/// A tap that the owner has opened; given back unless the VMM has it, or may have it.
struct Opened<'a> {
    taps: &'a Taps,
    monitor: &'a Monitor,
    netdev: String,
    given: bool,
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        if !self.given {
            let netdev = std::mem::take(&mut self.netdev);
            (self.taps)(TapNews { monitor: self.monitor.clone(), netdev, step: TapStep::Free });
        }
    }
}

/// Sends a client's command, and before it what the VMM needs for it.
pub(super) async fn submit(
    taps: Option<&Taps>,
    monitor: &Monitor,
    request: &Request,
    descriptors: Vec<OwnedFd>,
    patience: Duration,
) -> Result<Reply, QmpError> {
    let Some(taps) = taps else { return monitor.submit(request, descriptors, patience).await };
    if let Some(wanted) = Wanted::of(request) {
        return add(taps, monitor, wanted, patience).await;
    }
    let reply = monitor.submit(request, descriptors, patience).await;
    if let Some(netdev) = removed(request).filter(|_| done(&reply)) {
        taps(TapNews { monitor: monitor.clone(), netdev, step: TapStep::Free });
    }
    reply
}

async fn add(taps: &Taps, monitor: &Monitor, wanted: Wanted, patience: Duration) -> Result<Reply, QmpError> {
    let (answer, opened) = oneshot::channel();
    let (netdev, name) = (wanted.netdev.clone(), wanted.name.clone());
    taps(TapNews { monitor: monitor.clone(), netdev: netdev.clone(), step: TapStep::Open { name, answer } });
    let tap = match timeout(MAKING, opened).await {
        Ok(Ok(Ok(tap))) => tap,
        Ok(Ok(Err(why))) => return Ok(refused(&why)),
        Ok(Err(_)) => return Ok(refused("the VM has ended")),
        Err(_) => return Ok(refused(&format!("tap {}: it was not made in time", wanted.name))),
    };
    let mut opened = Opened { taps, monitor, netdev, given: false };
    let descriptor = format!("flotilla-{}", wanted.name);
    monitor.execute_with("getfd", Some(json!({ "fdname": descriptor })), vec![tap], GETFD).await?;
    let Some(request) = wanted.request(&descriptor) else {
        return Ok(refused("the arguments cannot be written again"));
    };
    // From here on the VMM may have it, whatever becomes of the client.
    opened.given = true;
    let reply = monitor.submit(&request, Vec::new(), patience).await;
    opened.given = !matches!(
        &reply,
        Ok(Reply { answer: Answer::Error(_), .. }) | Err(QmpError::Deadline { sent: false, .. })
    );
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Request {
        Request::parse(text.as_bytes()).unwrap()
    }

    fn add_of(arguments: &str) -> Option<Wanted> {
        Wanted::of(&request(&format!(r#"{{"execute":"netdev_add","arguments":{arguments}}}"#)))
    }

    #[test]
    fn a_tap_by_name_is_one_that_the_owner_is_asked_for() {
        let wanted = add_of(r#"{"type":"tap","id":"n1","ifname":"tap7","vhost":true}"#).unwrap();
        assert_eq!((wanted.netdev.as_str(), wanted.name.as_str()), ("n1", "tap7"));
        let sent = wanted.request("flotilla-tap7").unwrap();
        let arguments: Value = serde_json::from_str(sent.arguments.unwrap().get()).unwrap();
        assert_eq!(arguments, json!({ "type": "tap", "id": "n1", "vhost": true, "fd": "flotilla-tap7" }));
        for arguments in [
            r#"{"type":"tap","id":"n1"}"#,
            r#"{"type":"tap","id":"n1","ifname":7}"#,
            r#"{"type":"tap","ifname":"tap7"}"#,
            r#"{"type":"tap","id":"n1","ifname":"tap7","fd":"mine"}"#,
            r#"{"type":"tap","id":"n1","ifname":"tap7","fds":"a:b"}"#,
            r#"{"type":"tap","id":"n1","ifname":"tap7","path":"/dev/tun2"}"#,
            r#"{"type":"vhost-user","id":"n1","ifname":"tap7"}"#,
            r#"{"id":"n1","ifname":"tap7"}"#,
        ] {
            assert_eq!(add_of(arguments), None, "{arguments}");
        }
        assert_eq!(Wanted::of(&request(r#"{"execute":"netdev_add"}"#)), None);
    }

    #[test]
    fn what_is_removed_is_known_by_its_id() {
        for (text, id) in [
            (r#"{"execute":"netdev_del","arguments":{"id":"n1"}}"#, Some("n1")),
            (r#"{"execute":"netdev_del","arguments":{"id":1}}"#, None),
            (r#"{"execute":"netdev_del"}"#, None),
            (r#"{"execute":"device_del","arguments":{"id":"n1"}}"#, None),
        ] {
            assert_eq!(removed(&request(text)).as_deref(), id, "{text}");
        }
    }
}
