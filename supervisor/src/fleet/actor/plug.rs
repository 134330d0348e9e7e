//! The actor's part that has to do with devices that come and go while the VM runs: what is taken on and written down before a task
//! (`plugger.rs`) does it, and what holds when that has ended.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dbus_api::spec::{Machine, VmSpec};
use tracing::info;

use super::{Actor, named};
use crate::fleet::FleetError;
use crate::fleet::command;
use crate::fleet::inbox::{Answer, Internal};
use crate::fleet::life::State;
use crate::fleet::plug::{Action, Ask, How, Plug, Rewrite};
use crate::fleet::plugger::Plugger;
use crate::fleet::seats::{Hardware, Kind, Seat, Seats};
use crate::fleet::spec as rules;
use crate::qmp::Monitor;

/// How long a guest has to let go of a device that nobody waits for.
const PATIENCE: Duration = Duration::from_secs(30);

/// The device that comes or goes, and its job.
#[derive(Debug, Clone)]
pub(super) struct Plugging {
    pub(super) id: String,
    job: u32,
    /// The guest let go of it; the task may have stopped to wait for that just before.
    left: bool,
}

impl Plugging {
    /// This is its job.
    pub(super) fn is(&self, job: u32) -> bool {
        self.job == job
    }
}

/// Devices that nobody waits for and that are being put away, each by one task: a second one would take the next device's tap, which has
/// the same name. The value: the guest let go of it meanwhile.
pub(super) type Finishing = BTreeMap<String, bool>;

impl Actor {
    /// Takes a request on: gives the device's id and the job.
    pub(super) async fn plug(&mut self, ask: Ask, how: How, answer: Answer<(String, u32)>) {
        let taken = self.take_on(ask, how).await.map_err(|error| named(&self.name, error));
        let _ = answer.send(taken);
    }

    async fn take_on(&mut self, ask: Ask, how: How) -> Result<(String, u32), FleetError> {
        if let Some(plugging) = &self.plugging {
            return Err(FleetError::Busy(format!(
                "job {} ({}) is under way: wait for it",
                plugging.job, plugging.id
            )));
        }
        if let Ask::Attach(hardware) = &ask {
            self.check_new(hardware, how.persist)?;
        }
        let monitor = match self.vm.state() {
            state if state.idle() && how.persist => return self.rewrite_at_rest(ask).await,
            state if state.idle() => {
                return Err(FleetError::InvalidState(format!(
                    "it is {}: start it first, or change its definition (persist)",
                    state.word()
                )));
            }
            State::Running | State::Paused => self.link.monitor(),
            state => return Err(FleetError::InvalidState(format!("it is {}", state.word()))),
        };
        let monitor = monitor.ok_or_else(|| FleetError::QmpTimeout("the VMM does not answer".to_owned()))?;
        let word = ask.word();
        let (id, plug) = match ask {
            Ask::Attach(hardware) => {
                let plug = Plug::attach(hardware.kind(), how.persist);
                let clients = self.taken_by_clients();
                let others = self.devices.added.iter().chain(self.finishing.keys()).chain(&clients);
                let others: Vec<&str> = others.map(String::as_str).collect();
                let machine = self.machine();
                let seats = Arc::make_mut(&mut self.seats);
                let (id, _, _) = seats.reserve(&self.spec, machine, &others, hardware)?;
                (id, plug)
            }
            Ask::Detach(kind, id) => {
                if kind.number(&id).is_none() || self.seats.get(&id).is_none() {
                    return Err(FleetError::InvalidSpec(format!("it has no {} {id:?}", kind.word())));
                }
                if self.finishing.contains_key(&id) {
                    return Err(FleetError::Busy(format!("{id} is being removed already")));
                }
                Arc::make_mut(&mut self.seats).leave(&id);
                (id, Plug::detach(kind, how.persist, Action::RemoveDevice))
            }
        };
        // Before anything is done: a daemon that is killed now leaves something that the next one knows of.
        self.record().await;
        let Some(plugger) = self.plugger(&id, monitor, how.patience) else {
            return Err(FleetError::NotSupported(format!("{id} has no number")));
        };
        let job = self.context.jobs.open(word, &self.name);
        self.plugging = Some(Plugging { id: id.clone(), job, left: false });
        let (run, internal) = (self.vm.run(), self.internal.clone());
        tokio::spawn(async move {
            let (result, gone) = plugger.run(plug).await;
            let _ = internal.send(Internal::Plugged { run, result, gone });
        });
        Ok((id, job))
    }

    fn plugger(&self, id: &str, monitor: Monitor, patience: Duration) -> Option<Plugger> {
        let Seat { place, hardware, .. } = self.seats.get(id)?.clone();
        Some(Plugger {
            context: Arc::clone(&self.context),
            vm: Arc::clone(&self.name),
            uuid: self.uuid,
            id: id.to_owned(),
            number: hardware.kind().number(id)?,
            machine: self.machine(),
            place,
            hardware,
            monitor,
            patience,
            actor: self.internal.clone(),
        })
    }

    /// The board of the VM that runs.
    fn machine(&self) -> Machine {
        command::machine(&self.command_line).unwrap_or(self.spec.machine)
    }

    /// The rules for definitions, for one device and beside those that are there.
    fn check_new(&self, hardware: &Hardware, persist: bool) -> Result<(), FleetError> {
        let mut alone = VmSpec { nics: Vec::new(), disks: Vec::new(), ..(*self.spec).clone() };
        put(&mut alone, hardware.clone());
        rules::check(&alone)?;
        if persist {
            let mut whole = (*self.spec).clone();
            put(&mut whole, hardware.clone());
            rules::check(&whole)?;
        }
        match hardware {
            Hardware::Disk(disk) => {
                let twin = |(number, other): (u8, &dbus_api::spec::Disk)| {
                    (other.path == disk.path).then(|| Kind::Disk.id(number))
                };
                match self.seats.disks().into_iter().find_map(twin) {
                    Some(id) => Err(FleetError::InvalidSpec(format!(
                        "path: {} is {id} of this VM already",
                        disk.path.display()
                    ))),
                    None => Ok(()),
                }
            }
            Hardware::Nic(nic) => {
                let Some(mac) = &nic.mac else { return Ok(()) };
                let twin = |(number, other): &(u8, &dbus_api::spec::Nic)| {
                    rules::mac(other, self.uuid, *number).eq_ignore_ascii_case(mac)
                };
                match self.seats.nics().iter().find(|nic| twin(nic)) {
                    Some((number, _)) => Err(FleetError::InvalidSpec(format!(
                        "mac: {mac} is that of {} of this VM already",
                        Kind::Nic.id(*number)
                    ))),
                    None => Ok(()),
                }
            }
        }
    }

    /// The definition of a VM that does not run.
    async fn rewrite_at_rest(&mut self, ask: Ask) -> Result<(String, u32), FleetError> {
        let word = ask.word();
        let (id, rewrite) = match ask {
            Ask::Attach(hardware) => {
                let number = Seats::default().free_number(&self.spec, &[], &hardware)?;
                let kind = hardware.kind();
                (kind.id(number), Rewrite::Add(numbered(hardware, number)))
            }
            Ask::Detach(_, id) => (id.clone(), Rewrite::Remove(id)),
        };
        self.rewrite(rewrite).await?;
        let job = self.context.jobs.open(word, &self.name);
        self.publish();
        self.context.jobs.close(job, Ok(()));
        Ok((id, job))
    }

    /// Changes the definition by one device. What runs is not touched: it has the device already, or has it no more.
    pub(super) async fn rewrite(&mut self, rewrite: Rewrite) -> Result<(), FleetError> {
        let mut spec = (*self.spec).clone();
        pin(&mut spec);
        match rewrite {
            Rewrite::Add(hardware) => put(&mut spec, hardware),
            Rewrite::Remove(id) => {
                let before = spec.nics.len() + spec.disks.len();
                spec.nics.retain(|nic| nic.number.is_none_or(|number| Kind::Nic.id(number) != id));
                spec.disks.retain(|disk| disk.number.is_none_or(|number| Kind::Disk.id(number) != id));
                if spec.nics.len() + spec.disks.len() == before {
                    if self.vm.state().idle() {
                        return Err(FleetError::InvalidSpec(format!("its definition has no {id:?}")));
                    }
                    return Ok(());
                }
            }
        }
        unpin(&mut spec);
        rules::check(&spec)?;
        self.redefine(spec, None, true).await.map(drop)
    }

    /// The task has ended.
    pub(super) async fn plugged(&mut self, run: u64, result: Result<(), FleetError>, gone: bool) {
        let Some(Plugging { id, job, left }) = self.plugging.take() else { return };
        if run == self.vm.run() && !self.vm.state().idle() {
            let seats = Arc::make_mut(&mut self.seats);
            if gone {
                seats.remove(&id);
            } else if result.is_ok() {
                seats.settle(&id);
                self.devices.add(&self.spec, &id);
            } else if !matches!(result, Err(FleetError::QmpTimeout(_))) {
                // The VMM refused to let it go: it is there as before. One that may go later stays marked.
                seats.settle(&id);
            } else if left {
                self.finish(&id, Action::RemoveBackend);
            }
            self.record().await;
        }
        if result.is_ok() {
            info!(FLOTILLA_VM = &*self.name, "{id} {}", if gone { "removed" } else { "added" });
        }
        self.publish();
        self.context.jobs.close(job, result.map_err(|error| named(&self.name, error)));
    }

    /// The guest let go of a device. Says whether that is to be written down.
    pub(super) fn left(&mut self, id: &str) -> bool {
        if let Some(plugging) = self.plugging.as_mut().filter(|plugging| plugging.id == id) {
            plugging.left = true;
            return false;
        }
        match self.seats.get(id) {
            None => false,
            // Nobody waits for it any more; what was under it goes now.
            Some(seat) if seat.moving => {
                self.finish(id, Action::RemoveBackend);
                false
            }
            Some(_) => Arc::make_mut(&mut self.seats).remove(id).is_some(),
        }
    }

    /// Puts in order what an earlier daemon was killed over: a device that came or left goes.
    pub(super) fn finish_moves(&mut self) {
        let moving: Vec<String> = self.seats.moving().map(|(id, _)| id.clone()).collect();
        let own = self.plugging.as_ref().map(|plugging| plugging.id.clone());
        for id in moving.into_iter().filter(|id| Some(id) != own.as_ref()) {
            self.finish(&id, Action::RemoveDevice);
        }
    }

    fn finish(&mut self, id: &str, from: Action) {
        if let Some(left) = self.finishing.get_mut(id) {
            *left |= from != Action::RemoveDevice;
            return;
        }
        let Some(plugger) = self.link.monitor().and_then(|monitor| self.plugger(id, monitor, PATIENCE))
        else {
            return;
        };
        let plug = Plug::detach(plugger.hardware.kind(), false, from);
        let (id, run, internal) = (id.to_owned(), self.vm.run(), self.internal.clone());
        self.finishing.insert(id.clone(), false);
        tokio::spawn(async move {
            let (_, gone) = plugger.run(plug).await;
            let _ = internal.send(Internal::Finished { run, id, gone });
        });
    }

    /// The task of [`Actor::finish`] has ended; `gone`: nothing is left of the device.
    pub(super) async fn finished(&mut self, run: u64, id: &str, gone: bool) {
        let left = self.finishing.remove(id).unwrap_or_default();
        if run != self.vm.run() {
            return;
        }
        if gone {
            if Arc::make_mut(&mut self.seats).remove(id).is_some() {
                self.record().await;
            }
        } else if left {
            // It stopped to wait just before the guest let go.
            self.finish(id, Action::RemoveBackend);
        }
    }
}

fn numbered(hardware: Hardware, number: u8) -> Hardware {
    match hardware {
        Hardware::Nic(nic) => Hardware::Nic(dbus_api::spec::Nic { number: Some(number), ..nic }),
        Hardware::Disk(disk) => Hardware::Disk(dbus_api::spec::Disk { number: Some(number), ..disk }),
    }
}

fn put(spec: &mut VmSpec, hardware: Hardware) {
    match hardware {
        Hardware::Nic(nic) => spec.nics.push(nic),
        Hardware::Disk(disk) => spec.disks.push(disk),
    }
}

/// Writes all numbers down.
fn pin(spec: &mut VmSpec) {
    let (nics, disks) = (spec.nic_numbers(), spec.disk_numbers());
    spec.nics.iter_mut().zip(nics).for_each(|(nic, number)| nic.number = Some(number));
    spec.disks.iter_mut().zip(disks).for_each(|(disk, number)| disk.number = Some(number));
}

/// Leaves numbers out that would be the same without: a definition looks as people write it.
fn unpin(spec: &mut VmSpec) {
    if spec.nics.iter().zip(0..).all(|(nic, at)| nic.number == Some(at)) {
        spec.nics.iter_mut().for_each(|nic| nic.number = None);
    }
    if spec.disks.iter().zip(0..).all(|(disk, at)| disk.number == Some(at)) {
        spec.disks.iter_mut().for_each(|disk| disk.number = None);
    }
}
