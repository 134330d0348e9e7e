//! The actor's part that hears: what tasks, VMM and clients tell becomes an input of the state machine, and the table of devices is kept.

use super::Actor;
use crate::fleet::inbox::Internal;
use crate::fleet::life::{Command, Input};
use crate::fleet::seats::Seats;
use crate::fleet::view::News;
use crate::fleet::words;
use crate::qmp::{QmpEvent, Stage, Told, Tracked};
use std::sync::Arc;
use tracing::warn;

impl Actor {
    pub(super) async fn hear(&mut self, news: Internal) {
        let input = match news {
            Internal::Notice(notice) => return self.notice(notice).await,
            Internal::Planned { run, generation, spec, instance, command_line, written } => {
                if run == self.vm.run() {
                    self.applied_generation = generation;
                    self.seats = Arc::new(Seats::of(&spec));
                    self.command_line = command_line.into();
                    if self.instance != instance {
                        // Before its process is told: a daemon that is killed then would not find it.
                        self.instance = instance;
                        self.record().await;
                    }
                    let _ = written.send(());
                }
                return;
            }
            Internal::Launched { run, process } => {
                if run != self.vm.run() {
                    return;
                }
                return self.launched(process).await;
            }
            Internal::LaunchFailed { run, error } => {
                self.own_start = false;
                if run == self.vm.run() {
                    self.instance = Arc::clone(&self.name);
                    warn!(FLOTILLA_VM = &*self.name, "start failed: {error}");
                }
                Input::LaunchFailed { run, error }
            }
            Internal::Linked { run, monitor, paused } => {
                if run != self.vm.run() || self.vm.state().idle() {
                    return;
                }
                self.link.linked(monitor);
                self.finish_moves();
                Input::Connected { run, paused }
            }
            Internal::Ended { invocation, exit } => {
                if self.process.as_ref().is_some_and(|process| process.invocation == invocation) {
                    self.ended(exit).await;
                }
                return;
            }
            Internal::LastLog { run, lines } => {
                if run == self.vm.run() {
                    self.last_log = lines.into();
                }
                return;
            }
            Internal::Silent { run } => Input::Silent { run },
            Internal::Answers { run, paused } => Input::Connected { run, paused },
            Internal::Disconnected { run } => {
                if run == self.vm.run() && !self.vm.state().idle() {
                    self.link.expect();
                }
                Input::Disconnected { run }
            }
            Internal::VcpusChanged { run, paused } => Input::VcpusChanged { run, paused },
            Internal::Event { run, event } => {
                if run == self.vm.run() && self.lost(&event) {
                    self.record().await;
                }
                let Some(input) = self.event(run, &event) else { return };
                input
            }
            Internal::Rewrite { rewrite, answer } => {
                let _ = answer.send(self.rewrite(rewrite).await);
                return;
            }
            Internal::Plugged { run, result, gone } => return self.plugged(run, result, gone).await,
            Internal::Finished { run, id, gone } => return self.finished(run, &id, gone).await,
            Internal::Tap(news) => return self.tap(news).await,
            Internal::Client(told) => {
                if self.gained(&told) {
                    self.record().await;
                }
                let Some(input) = self.client(&told) else { return };
                input
            }
            Internal::CommandDone { run, command, result } => Input::CommandDone { run, command, result },
        };
        self.feed(input).await;
    }

    fn event(&self, run: u64, event: &QmpEvent) -> Option<Input> {
        if run != self.vm.run() {
            return None;
        }
        self.context.tell(News::QmpEvent {
            sequence: self.context.next_sequence(),
            name: Arc::clone(&self.name),
            usec: event.usec,
            event: event.name.to_string(),
            data: event.data.to_string(),
        });
        match &*event.name {
            "STOP" => Some(Input::VcpusChanged { run, paused: true }),
            "RESUME" => Some(Input::VcpusChanged { run, paused: false }),
            "SHUTDOWN" => {
                let guest = event.data.get("guest").and_then(serde_json::Value::as_bool) == Some(true);
                Some(Input::ShutdownSeen { run, why: words::ending(event), guest })
            }
            _ => None,
        }
    }

    /// A device went; says whether that is to be written down.
    fn lost(&mut self, event: &QmpEvent) -> bool {
        if &*event.name != "DEVICE_DELETED" {
            return false;
        }
        let Some(id) = event.data.get("device").and_then(serde_json::Value::as_str) else { return false };
        let (left, differs) = (self.left(id), self.devices.delete(&self.spec, id));
        left || differs
    }

    /// A device came; says whether that is to be written down.
    fn gained(&mut self, told: &Told) -> bool {
        match (&told.command, told.stage) {
            (Tracked::DeviceAdd(id), Stage::Done) => {
                self.link.is(&told.monitor) && self.devices.add(&self.spec, id)
            }
            _ => false,
        }
    }

    /// What a client of the QMP socket does.
    fn client(&self, told: &Told) -> Option<Input> {
        if !self.link.is(&told.monitor) {
            return None;
        }
        let command = match &told.command {
            Tracked::Quit => Command::Quit,
            Tracked::Stop => Command::Stop,
            Tracked::Cont => Command::Cont,
            Tracked::Powerdown => Command::Powerdown,
            Tracked::DeviceAdd(_) => return None,
        };
        Some(Input::Client { run: self.vm.run(), command, stage: told.stage })
    }
}
