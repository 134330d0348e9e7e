//! The owner of a VM's life: takes [`Command`]s, applies them to the machine, and decides who may do what when.
//!
//! Runs on the main loop's thread. QMP is above this room and turns text into commands; the machine is below it. `life` is the
//! pure state machine (what follows from what); this file applies its effects. `query` puts what the machine says into QMP's shapes.

mod cpus;
mod life;
mod migration;
mod qom;
mod query;
mod viomem;
mod vm;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::config::{Drive, MachineKind, Netdev, Smp, VmConfig};
use crate::event::LoopHandle;
use crate::machine::{
    BlockDevice, GuestEvent, Hotplug, HotplugError, NewDevice, Plugged, Refusal as SlotRefusal,
};
use crate::process::trace;

use life::{Effect, step};
pub use life::{End, Input, Refusal, State};
pub use migration::MigrationError;
pub use vm::{BoxError, Vm};

/// After this a machine cannot go on.
const RESET_FAILED: &str = "cannot reset the VM";

/// What a management client can ask of a VM. One meaning each, whoever asks.
#[derive(Debug)]
pub enum Command {
    /// `blockdev-add`.
    BlockdevAdd {
        /// The block node.
        drive: Box<Drive>,
        /// The block node that lies under it, or under the last image that it names itself.
        node: Option<String>,
        /// Descriptors that stand for files of the two.
        files: Vec<(PathBuf, OwnedFd)>,
    },
    /// `blockdev-del`.
    BlockdevDel(String),
    /// `netdev_add`.
    NetdevAdd {
        /// The back end.
        netdev: Netdev,
        /// Descriptors that stand for its taps.
        fds: Vec<OwnedFd>,
        /// Descriptors that stand for vhost-net.
        vhost_fds: Vec<OwnedFd>,
    },
    /// `netdev_del`.
    NetdevDel(String),
    /// `netdev_replace`: another tap for a netdev that a NIC uses.
    NetdevReplace {
        /// The netdev, or its NIC.
        id: String,
        /// The tap.
        ifname: String,
        /// The device that it is opened through.
        path: Option<PathBuf>,
    },
    /// `netlink_set`.
    NetlinkSet {
        /// The NIC, or its netdev.
        id: String,
        /// Up, or down.
        up: bool,
    },
    /// `chardev-add`: the socket of a process that is to serve a device.
    ChardevAdd {
        /// Its name.
        id: String,
        /// The socket.
        path: PathBuf,
    },
    /// `chardev-remove`.
    ChardevRemove(String),
    /// `device_add`.
    DeviceAdd(Box<NewDevice>),
    /// `device_del`.
    DeviceDel(String),
    /// `balloon`: the memory that the guest is to have, in bytes.
    Balloon(u64),
    /// `query-balloon`.
    QueryBalloon,
    /// `get-viomem`: how a virtio-mem device stands.
    GetViomem(String),
    /// `set-viomem`.
    SetViomem {
        /// Which device.
        id: String,
        /// Bytes that the guest is to have of its memory.
        size: u64,
    },
    /// `query-mem`.
    QueryMem,
    /// `query-mem-gpa`: what guest RAM holds at this address.
    QueryMemGpa(u64),
    /// `query-block`.
    QueryBlock,
    /// `query-named-block-nodes`.
    QueryNamedBlockNodes,
    /// `query-blockstats`.
    QueryBlockstats,
    /// Network back ends and NICs, for people (`info network`); QMP has no query of its own for them.
    QueryNetwork,
    /// `query-chardev`.
    QueryChardev,
    /// `query-iothreads`.
    QueryIothreads,
    /// `query-status`.
    QueryStatus,
    /// `query-cpus`.
    QueryCpus,
    /// `query-hotpluggable-cpus`.
    QueryHotpluggableCpus,
    /// `qom-list`: what is at a path.
    QomList(String),
    /// `qom-get`.
    QomGet {
        /// Where.
        path: String,
        /// Which property.
        property: String,
    },
    /// `query-name`.
    QueryName,
    /// `query-uuid`.
    QueryUuid,
    /// `system_powerdown`.
    SystemPowerdown,
    /// `system_reset`.
    SystemReset,
    /// `stop`.
    Stop,
    /// `cont`.
    Cont,
    /// `quit`.
    Quit,
    /// `migrate`: to this URI, with the descriptors that it names.
    Migrate {
        /// As the client wrote it.
        uri: String,
        /// In the order of their names.
        descriptors: Vec<OwnedFd>,
    },
    /// `query-migrate`.
    QueryMigrate,
}

/// Something that happened to the VM, told to every QMP client.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// QMP name, such as `STOP`.
    pub name: &'static str,
    /// QMP data.
    pub data: Value,
}

/// Why a command was not carried out. The text is for people.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The state does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no such device or back end.
    #[error("{0}")]
    NotFound(String),
    /// The command's own words make no sense.
    #[error("{0}")]
    Bad(String),
    /// No device that could do it.
    #[error("{0}")]
    NotActive(String),
    /// It could not be plugged or unplugged.
    #[error(transparent)]
    Hotplug(HotplugError),
    /// Not to be had.
    #[error("{0}")]
    Migration(#[from] MigrationError),
    /// The machine could not do it; the state is as before.
    #[error("{what}: {source}")]
    Machine {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: BoxError,
    },
}

impl From<HotplugError> for CommandError {
    fn from(error: HotplugError) -> Self {
        match &error {
            HotplugError::Refused(
                SlotRefusal::NoDevice(_)
                | SlotRefusal::NoDrive(_)
                | SlotRefusal::NoNetdev(_)
                | SlotRefusal::NoNic(_),
            ) => Self::NotFound(error.to_string()),
            _ => Self::Hotplug(error),
        }
    }
}

/// One thing that a command leads to, in the order in which clients must see it.
#[derive(Debug)]
pub enum Outcome {
    /// Told to everybody.
    Event(Event),
    /// The answer, for who asked; exactly one per command.
    Reply(Result<Value, CommandError>),
}

/// The owner.
pub struct Control {
    /// Taken when it is shut down.
    vm: Option<Box<dyn Vm>>,
    state: State,
    end: Option<End>,
    name: Option<String>,
    uuid: Option<uuid::Uuid>,
    smp: Smp,
    kind: MachineKind,
    /// Bytes at boot.
    memory: u64,
    /// On a q35 a guest that asks for a reset gets one and does not end, and a device leaves when the guest lets it go.
    is_q35: bool,
    terminals: Vec<Terminal>,
    migration: migration::Status,
    main_loop: LoopHandle,
}

/// A character device as `query-chardev` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terminal {
    /// Its name.
    pub label: String,
    /// What it is connected to, such as `pty:/dev/pts/3`.
    pub filename: String,
}

impl Control {
    /// Takes over a machine that was started, paused or not as `config` says.
    pub fn new(vm: Box<dyn Vm>, config: &VmConfig, main_loop: LoopHandle) -> Self {
        Self {
            vm: Some(vm),
            state: if config.start_paused { State::Prelaunch } else { State::Running },
            end: None,
            name: config.name.clone(),
            uuid: config.uuid,
            smp: config.smp.clone(),
            kind: config.machine.kind,
            memory: config.memory.size,
            is_q35: config.machine.kind == MachineKind::Q35,
            terminals: Vec::new(),
            migration: migration::Status::at_start(config.incoming.is_some()),
            main_loop,
        }
    }

    /// Says which character devices there are.
    pub fn show_terminals(&mut self, terminals: Vec<Terminal>) {
        self.terminals = terminals;
    }

    /// How the VM ended, once it has.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Ends the machine. Call once the loop has ended.
    pub fn shut_down(&mut self) -> Result<(), CommandError> {
        self.state = State::Shutdown;
        let Some(vm) = self.vm.take() else { return Ok(()) };
        vm.shut_down().map_err(|source| CommandError::Machine { what: "cannot shut the VM down", source })
    }

    /// Carries out a command.
    pub fn execute(&mut self, command: Command) -> Vec<Outcome> {
        let input = match command {
            Command::BlockdevAdd { drive, node, files } => {
                return self.hotplug(Hotplug::AddDrive { drive, node, files }, None);
            }
            Command::BlockdevDel(name) => return self.hotplug(Hotplug::RemoveDrive(name), None),
            Command::NetdevAdd { netdev, fds, vhost_fds } => {
                return self.hotplug(Hotplug::AddNetdev { netdev, fds, vhost_fds }, None);
            }
            Command::NetdevDel(name) => return self.hotplug(Hotplug::RemoveNetdev(name), None),
            Command::NetdevReplace { id, ifname, path } => {
                return self.hotplug(Hotplug::ReplaceTap { id, ifname, path }, None);
            }
            Command::NetlinkSet { id, up } => return self.hotplug(Hotplug::SetLink { id, up }, None),
            Command::ChardevAdd { id, path } => return self.hotplug(Hotplug::AddChardev { id, path }, None),
            Command::ChardevRemove(id) => return self.hotplug(Hotplug::RemoveChardev(id), None),
            Command::DeviceAdd(device) => return self.hotplug(Hotplug::Plug(*device), None),
            Command::DeviceDel(id) => {
                let deleted = Event { name: "DEVICE_DELETED", data: json!({ "device": id, "path": id }) };
                return self.hotplug(Hotplug::Unplug(id), (!self.is_q35).then_some(deleted));
            }
            Command::Balloon(bytes) => {
                return match self.vm.as_deref_mut() {
                    Some(vm) if vm.balloon().is_some() => {
                        tracing::trace!(target: trace::BALLOON_TARGET, "{bytes} bytes");
                        vm.set_balloon(bytes);
                        reply(json!({}))
                    }
                    _ => no_balloon(),
                };
            }
            Command::QueryBalloon => {
                let actual = self.vm.as_ref().and_then(|vm| vm.balloon());
                return actual.map_or_else(no_balloon, |actual| reply(json!({ "actual": actual })));
            }
            Command::GetViomem(id) => return answer(self.viomem(&id)),
            Command::SetViomem { id, size } => return answer(self.set_viomem(&id, size)),
            Command::QueryMem => {
                tracing::info!("guest memory: {} bytes at boot", self.memory);
                return reply(json!({}));
            }
            Command::QueryMemGpa(address) => {
                let word = self.vm.as_ref().and_then(|vm| vm.peek(address));
                // As StratoVirt writes it: hexadecimal digits and nothing else.
                let missing = || CommandError::Bad(format!("there is no guest RAM at {address:#x}"));
                return answer(word.map(|word| json!(format!("{word:X}"))).ok_or_else(missing));
            }
            Command::QueryBlock => return reply(query::block(&self.block_devices())),
            Command::QueryNamedBlockNodes => return reply(query::named_block_nodes(&self.block_devices())),
            Command::QueryBlockstats => return reply(query::blockstats(&self.block_devices())),
            Command::QueryNetwork => {
                let devices = self.vm.as_ref().map_or_else(Vec::new, |vm| vm.net_devices());
                return reply(query::network(&devices));
            }
            Command::QueryChardev => return reply(query::chardevs(&self.terminals)),
            Command::QueryIothreads => {
                let threads = self.vm.as_ref().map_or_else(Vec::new, |vm| vm.iothreads());
                return reply(query::iothreads(&threads));
            }
            Command::QueryStatus => return reply(self.status()),
            Command::QueryCpus => return reply(self.cpus()),
            Command::QueryHotpluggableCpus => return reply(self.hotpluggable_cpus()),
            Command::QomList(path) => return answer(qom::list(&self.objects(), &path)),
            Command::QomGet { path, property } => {
                return answer(qom::get(&self.objects(), &path, &property));
            }
            Command::QueryName => {
                return reply(self.name.as_ref().map_or_else(|| json!({}), |name| json!({ "name": name })));
            }
            Command::QueryUuid => return reply(json!({ "UUID": self.uuid.unwrap_or_default().to_string() })),
            Command::Migrate { uri, descriptors } => return self.migrate(&uri, descriptors),
            Command::QueryMigrate => return reply(json!({ "status": self.migration.name() })),
            Command::SystemPowerdown => Input::Powerdown,
            Command::SystemReset => Input::Reset,
            Command::Stop => Input::Stop,
            Command::Cont => Input::Cont,
            Command::Quit => Input::Quit,
        };
        let (outcomes, error) = self.apply(&input);
        let Some(error) = error else { return outcomes };
        // A machine that was reset by half cannot go on.
        let broken = matches!(&error, CommandError::Machine { what: RESET_FAILED, .. });
        let why = broken.then(|| one_line(&error));
        let mut outcomes = vec![Outcome::Reply(Err(error))];
        if let Some(why) = why {
            outcomes.extend(self.happened(&Input::Guest(GuestEvent::InternalError(why))));
        }
        outcomes
    }

    /// Something happened that nobody asked for: the guest ended, a signal came. Returns what clients must be told.
    pub fn happened(&mut self, input: &Input) -> Vec<Outcome> {
        if let Input::Guest(GuestEvent::InternalError(why)) = input {
            tracing::error!("the VM cannot go on: {why}");
        }
        let restart = self.is_q35 && *input == Input::Guest(GuestEvent::Reset);
        let (mut outcomes, error) = self.apply(if restart { &Input::Restart } else { input });
        if let Some(error @ CommandError::Machine { what: RESET_FAILED, .. }) = error {
            outcomes.extend(self.happened(&Input::Guest(GuestEvent::InternalError(one_line(&error)))));
        }
        outcomes
    }

    /// Applies the effects of `input`; the state changes only when all of them worked.
    fn apply(&mut self, input: &Input) -> (Vec<Outcome>, Option<CommandError>) {
        let step = match step(self.state, input) {
            Ok(step) => step,
            Err(refusal) => return (Vec::new(), Some(refusal.into())),
        };
        let mut outcomes = Vec::with_capacity(step.effects.len());
        for effect in step.effects {
            let done = match effect {
                Effect::Pause => self.machine("cannot pause the VM", |vm| vm.pause()),
                Effect::Resume => self.machine("cannot resume the VM", |vm| vm.resume()),
                Effect::Reset => self.machine(RESET_FAILED, |vm| vm.reset()),
                Effect::PressButton => self.machine("cannot press the power button", |vm| {
                    vm.press_power_button();
                    Ok(())
                }),
                Effect::WasReset => {
                    // What the guest did itself is no other thing to clients (StratoVirt says so in both cases).
                    outcomes.push(Outcome::Event(Event { name: "RESET", data: json!({ "guest": true }) }));
                    Ok(())
                }
                Effect::Pressed => {
                    outcomes.push(Outcome::Event(Event { name: "POWERDOWN", data: json!({}) }));
                    Ok(())
                }
                Effect::Forget(what) => {
                    if let Some(device) = self.vm.as_deref_mut().and_then(|vm| vm.device_left(&what)) {
                        let data =
                            json!({ "device": device, "path": format!("/machine/peripheral/{device}") });
                        outcomes.push(Outcome::Event(Event { name: "DEVICE_DELETED", data }));
                    }
                    Ok(())
                }
                Effect::Reply => {
                    outcomes.push(Outcome::Reply(Ok(json!({}))));
                    Ok(())
                }
                Effect::Stopped => {
                    outcomes.push(Outcome::Event(Event { name: "STOP", data: json!({}) }));
                    Ok(())
                }
                Effect::Resumed => {
                    outcomes.push(Outcome::Event(Event { name: "RESUME", data: json!({}) }));
                    Ok(())
                }
                Effect::End(end) => {
                    tracing::info!("the VM ends: {} ({})", end.reason(), end.cause());
                    let data = json!({ "guest": end.by_guest(), "reason": end.reason() });
                    outcomes.push(Outcome::Event(Event { name: "SHUTDOWN", data }));
                    self.end = Some(end);
                    self.main_loop.post(|ops| {
                        ops.stop();
                    });
                    Ok(())
                }
            };
            if let Err(error) = done {
                return (outcomes, Some(error));
            }
        }
        tracing::trace!(target: trace::VM_STATE, "{input:?}: {:?} -> {:?}", self.state, step.next);
        self.state = step.next;
        (outcomes, None)
    }

    /// `event` follows success, before the answer; that vCPUs have come or are to leave is told behind it.
    fn hotplug(&mut self, request: Hotplug, event: Option<Event>) -> Vec<Outcome> {
        tracing::trace!(target: trace::HOTPLUG_REQUEST, "{request:?}");
        let done = match self.vm.as_deref_mut() {
            Some(vm) if self.state != State::Shutdown => vm.hotplug(request).map_err(CommandError::from),
            _ => Err(Refusal::Ended.into()),
        };
        match done {
            Ok(Plugged::Done) => event.map(Outcome::Event).into_iter().chain(reply(json!({}))).collect(),
            Ok(Plugged::CpusResized) => {
                let mut outcomes = reply(json!({}));
                outcomes.push(Outcome::Event(Event { name: "CPU_RESIZE", data: json!({}) }));
                outcomes
            }
            Err(error) => vec![Outcome::Reply(Err(error))],
        }
    }

    /// What `qom-list` shows.
    fn objects(&self) -> qom::Objects {
        let vm = self.vm.as_ref();
        qom::Objects {
            machine: self.kind,
            cpus: self.online(),
            devices: vm.map_or_else(Vec::new, |vm| vm.devices()),
            iothreads: vm.map_or_else(Vec::new, |vm| vm.iothreads()),
        }
    }

    fn block_devices(&self) -> Vec<BlockDevice> {
        self.vm.as_ref().map_or_else(Vec::new, |vm| vm.block_devices())
    }

    fn machine(
        &mut self,
        what: &'static str,
        action: impl FnOnce(&mut dyn Vm) -> Result<(), BoxError>,
    ) -> Result<(), CommandError> {
        let vm = self.vm.as_deref_mut().ok_or(Refusal::Ended)?;
        action(vm).map_err(|source| CommandError::Machine { what, source })
    }

    fn status(&self) -> Value {
        let (running, status) = match self.state {
            State::Running => (true, "running"),
            // Clients know a VM that was created with -S as paused, too.
            State::Prelaunch | State::Paused => (false, "paused"),
            State::Shutdown => (false, "shutdown"),
        };
        json!({ "running": running, "singlestep": false, "status": status })
    }
}

fn no_balloon() -> Vec<Outcome> {
    let error = CommandError::NotActive("No balloon device has been activated".to_owned());
    vec![Outcome::Reply(Err(error))]
}

fn answer(result: Result<Value, CommandError>) -> Vec<Outcome> {
    vec![Outcome::Reply(result)]
}

fn reply(value: Value) -> Vec<Outcome> {
    vec![Outcome::Reply(Ok(value))]
}

/// An error and what caused it, for the log.
fn one_line(error: &CommandError) -> String {
    match error {
        CommandError::Machine { what, source } => format!("{what}: {source}"),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
