//! The task that brings a device to a running VM or takes it away: carries out the actions of `plug.rs` one after the other, each with a
//! deadline, and tells the actor how it ended. Nothing here decides what follows what.

use std::sync::Arc;
use std::time::Duration;

use dbus_api::spec::{Disk, Machine, Nic};
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::timeout;
use tracing::warn;
use uuid::Uuid;

use super::command;
use super::inbox::{Internal, TAKEN};
use super::plug::{Action, Next, Plug, Rewrite, Went};
use super::prepare;
use super::seats::Hardware;
use super::spec as rules;
use super::words::map_error;
use super::{Context, FleetError};
use crate::qmp::{Monitor, QmpError, QmpEvent};

/// How long the VMM has for one command. Opening an image is the slowest.
const COMMAND: Duration = Duration::from_secs(10);

/// Everything that the actions need to know.
pub(super) struct Plugger {
    pub(super) context: Arc<Context>,
    pub(super) vm: Arc<str>,
    pub(super) uuid: Uuid,
    pub(super) id: String,
    pub(super) number: u8,
    pub(super) machine: Machine,
    pub(super) place: u8,
    pub(super) hardware: Hardware,
    pub(super) monitor: Monitor,
    /// How long the guest has to let go of a device.
    pub(super) patience: Duration,
    pub(super) actor: mpsc::UnboundedSender<Internal>,
}

impl Plugger {
    /// Does all of it; says how it went, and whether nothing of the device is left.
    pub(super) async fn run(self, mut plug: Plug) -> (Result<(), FleetError>, bool) {
        let mut next = plug.begin();
        loop {
            match next {
                Next::Do(action) => {
                    let went = self.carry_out(action).await;
                    if let Went::Failed(error) | Went::Unsure(error) = &went {
                        warn!(FLOTILLA_VM = &*self.vm, "{}: {action:?}: {error}", self.id);
                    }
                    next = plug.step(went);
                }
                Next::End { result, gone } => return (result, gone),
            }
        }
    }

    async fn carry_out(&self, action: Action) -> Went {
        match (action, &self.hardware) {
            (Action::MakeTap, Hardware::Nic(nic)) => {
                // The network must not go while a tap is put on it.
                let _networks = self.context.network.stable().await;
                sure(self.context.network.ensure_tap(nic, &self.tap(), self.uuid, Some(self.number)).await)
            }
            (Action::RemoveTap, _) => {
                self.context.network.remove_taps(self.uuid, [self.tap()], &[]).await;
                Went::Done
            }
            (Action::MakeTap, Hardware::Disk(_)) => Went::Done,
            (Action::AddBackend, Hardware::Nic(nic)) => self.add_netdev(nic).await,
            (Action::AddBackend, Hardware::Disk(disk)) => self.add_blockdev(disk).await,
            (Action::AddDevice, _) => self.command("device_add", self.device()).await,
            (Action::RemoveDevice, _) => self.remove_device().await,
            (Action::RemoveBackend, hardware) => {
                let (command, name) = match hardware {
                    Hardware::Nic(_) => ("netdev_del", "id"),
                    Hardware::Disk(_) => ("blockdev-del", "node-name"),
                };
                forgiving(self.ask(command, json!({ name: self.id })).await)
            }
            (Action::WriteDown, hardware) => self.rewrite(Rewrite::Add(hardware.clone())).await,
            (Action::StrikeOut, _) => self.rewrite(Rewrite::Remove(self.id.clone())).await,
        }
    }

    fn tap(&self) -> String {
        netsetup::tap_name(&self.vm, self.number.into())
    }

    async fn ask(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.monitor.execute(command, Some(arguments), COMMAND).await
    }

    async fn command(&self, command: &str, arguments: Value) -> Went {
        went(self.ask(command, arguments).await)
    }

    /// Sends a descriptor under a name.
    async fn send_as(&self, name: &str, descriptor: std::os::fd::OwnedFd) -> Result<(), Went> {
        let arguments = Some(json!({ "fdname": name }));
        let sent = self.monitor.execute_with("getfd", arguments, vec![descriptor], COMMAND).await;
        match went(sent) {
            Went::Done => Ok(()),
            // A descriptor that waits for a command which never comes is closed with the connection.
            Went::Failed(error) | Went::Unsure(error) => Err(Went::Failed(error)),
        }
    }

    async fn add_netdev(&self, _: &Nic) -> Went {
        let tap = match self.context.network.open(&self.tap()).await {
            Ok(tap) => tap,
            Err(error) => return Went::Failed(error),
        };
        let name = format!("flotilla-{}", self.id);
        match self.send_as(&name, tap).await {
            Ok(()) => self.command("netdev_add", json!({ "type": "tap", "id": self.id, "fd": name })).await,
            Err(went) => went,
        }
    }

    async fn add_blockdev(&self, disk: &Disk) -> Went {
        let (own, direct) = (disk.clone(), disk.direct);
        let opened = tokio::task::spawn_blocking(move || {
            let (_, file) = prepare::open("path", &own.path, !own.readonly, direct)?;
            let below = own.backing.iter().map(|path| prepare::open("backing", path, false, false));
            Ok((file, below.map(|opened| opened.map(|(_, file)| file)).next().transpose()?))
        });
        let (file, below) = match opened.await {
            Ok(Ok(files)) => files,
            Ok(Err(error)) => return Went::Failed(error),
            Err(error) => {
                return Went::Failed(FleetError::LaunchFailed(format!("opening the disk: {error}")));
            }
        };
        let name = format!("flotilla-{}", self.id);
        let names = [name.clone(), format!("{name}-backing")];
        for (name, file) in names.iter().zip([Some(file), below]) {
            if let Some(file) = file
                && let Err(went) = self.send_as(name, file).await
            {
                return went;
            }
        }
        self.command("blockdev-add", blockdev(&self.id, disk, &names)).await
    }

    fn device(&self) -> Value {
        let mut device = self.described();
        match self.machine {
            Machine::Microvm => device["addr"] = format!("{:#x}", self.place).into(),
            Machine::Q35 => {
                device["bus"] = command::port(self.place).into();
                device["addr"] = "0x0".into();
            }
        }
        device
    }

    fn described(&self) -> Value {
        let driver = |device| command::driver(self.machine, device);
        match &self.hardware {
            Hardware::Nic(nic) => {
                let mac = rules::mac(nic, self.uuid, self.number);
                json!({ "driver": driver("net"), "id": self.id, "netdev": self.id, "mac": mac })
            }
            Hardware::Disk(disk) => {
                let mut device = json!({ "driver": driver("blk"), "id": self.id, "drive": self.id });
                if let Some(serial) = &disk.serial {
                    device["serial"] = serial.as_str().into();
                }
                device
            }
        }
    }

    /// `device_del`, and what comes of it. A microvm's device is gone at once; elsewhere the guest has a say.
    async fn remove_device(&self) -> Went {
        // Listen before asking: the event may come before the answer.
        let mut events = self.monitor.events();
        match self.ask("device_del", json!({ "id": self.id })).await {
            Ok(_) => {}
            Err(error) if says(&error, &["not found", "Can not find"]) => return Went::Done,
            // It was asked before, and thinks about it still.
            Err(error) if says(&error, &["on the fly"]) => {}
            Err(error) => return went(Err(error)),
        }
        match timeout(self.patience, self.deleted(&mut events)).await {
            Ok(true) => Went::Done,
            Ok(false) => Went::Unsure(FleetError::VmmDied("the VMM ended".to_owned())),
            Err(_) => Went::Unsure(FleetError::QmpTimeout(format!(
                "the guest did not let go of {} within {} s: it goes when the guest does",
                self.id,
                self.patience.as_secs()
            ))),
        }
    }

    /// Waits for the device's end; `false`: the connection ended first.
    async fn deleted(&self, events: &mut broadcast::Receiver<QmpEvent>) -> bool {
        loop {
            match events.recv().await {
                Ok(event) if &*event.name == "DEVICE_DELETED" => {
                    if event.data.get("device").and_then(Value::as_str) == Some(&self.id) {
                        return true;
                    }
                }
                Ok(_) => {}
                // What was missed may have been it: a device that is gone cannot be asked for again.
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    let again = self.ask("device_del", json!({ "id": self.id })).await;
                    if again.is_err_and(|error| says(&error, &["not found", "Can not find"])) {
                        return true;
                    }
                }
                Err(broadcast::error::RecvError::Closed) => return false,
            }
        }
    }

    async fn rewrite(&self, rewrite: Rewrite) -> Went {
        let _networks = self.context.network.stable().await;
        let (answer, rewritten) = oneshot::channel();
        let gone = || FleetError::Cancelled("the VM was undefined".to_owned());
        if self.actor.send(Internal::Rewrite { rewrite, answer }).is_err() {
            return Went::Failed(gone());
        }
        match timeout(TAKEN, rewritten).await {
            Ok(Ok(rewritten)) => sure(rewritten),
            Ok(Err(_)) => Went::Failed(gone()),
            Err(_) => {
                Went::Unsure(FleetError::StoreFailed("the definition was not written in time".to_owned()))
            }
        }
    }
}

/// `blockdev-add` of a disk whose file, and the one under it, were sent under names.
fn blockdev(id: &str, disk: &Disk, [descriptor, below]: &[String; 2]) -> Value {
    let mut file = json!({ "driver": "file", "filename": disk.path, "fd": descriptor });
    if let Some(aio) = disk.aio {
        file["aio"] = aio.word().into();
    }
    let mut node = json!({
        "node-name": id, "driver": disk.format.word(), "file": file, "read-only": disk.readonly,
        "cache": { "direct": disk.direct },
    });
    if let Some(backing) = &disk.backing {
        let file = json!({ "driver": "file", "filename": backing, "fd": below });
        node["backing"] = json!({ "driver": disk.backing_format.word(), "file": file });
    }
    if disk.discard {
        node["discard"] = "unmap".into();
    }
    if let Some(iops) = disk.iops {
        node["throttling.iops-total"] = iops.into();
    }
    node
}

fn says(error: &QmpError, words: &[&str]) -> bool {
    matches!(error, QmpError::Refused { desc, .. } if words.iter().any(|word| desc.contains(word)))
}

fn went(outcome: Result<Value, QmpError>) -> Went {
    match outcome {
        Ok(_) => Went::Done,
        Err(error) => {
            let known = !matches!(error, QmpError::Deadline { sent: true, .. } | QmpError::Closed { .. });
            let error = map_error(&error);
            if known { Went::Failed(error) } else { Went::Unsure(error) }
        }
    }
}

/// As [`went`]; what is not there need not be removed.
fn forgiving(outcome: Result<Value, QmpError>) -> Went {
    match outcome {
        Err(error) if says(&error, &["not found"]) => Went::Done,
        outcome => went(outcome),
    }
}

fn sure(outcome: Result<(), FleetError>) -> Went {
    match outcome {
        Ok(()) => Went::Done,
        Err(error) => Went::Failed(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_described_as_its_definition_says() {
        let disk: Disk = serde_json::from_value(
            json!({ "path": "/d.qcow2", "format": "qcow2", "aio": "io_uring", "direct": true, "discard": true, "iops": 7 }),
        )
        .unwrap();
        let names = ["f".to_owned(), "g".to_owned()];
        assert_eq!(
            blockdev("disk1", &disk, &names),
            json!({
                "node-name": "disk1", "driver": "qcow2", "read-only": false, "discard": "unmap", "throttling.iops-total": 7,
                "file": { "driver": "file", "filename": "/d.qcow2", "fd": "f", "aio": "io_uring" }, "cache": { "direct": true },
            })
        );
        let over: Disk =
            serde_json::from_value(json!({ "path": "/d", "format": "qcow2", "backing": "/b" })).unwrap();
        assert_eq!(
            blockdev("disk1", &over, &names)["backing"],
            json!({ "driver": "raw", "file": { "driver": "file", "filename": "/b", "fd": "g" } })
        );
    }
}
