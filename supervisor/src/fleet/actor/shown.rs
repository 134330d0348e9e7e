//! The actor's part that keeps the VM's view: what lists and properties are served from, and the news of its changes.

use std::sync::Arc;

use super::Actor;
use crate::fleet::spec;
use crate::fleet::view::{News, View};

impl Actor {
    pub(super) fn look(&self) -> View {
        let before = self.view.borrow().clone();
        let unchanged = Arc::ptr_eq(&before.spec, &self.spec);
        let card = |(index, nic): (usize, &dbus_api::spec::Nic)| {
            let mac = spec::mac(&self.spec, self.uuid, index);
            (format!("nic{index}"), netsetup::tap_name(&self.name, index), mac, nic.place().to_owned())
        };
        View {
            state: self.vm.state(),
            reason: self.vm.reason().to_owned(),
            since: self.since,
            intent: self.vm.intent(),
            generation: self.generation,
            applied_generation: self.applied_generation,
            main_pid: self.process.as_ref().map_or(0, |process| process.pid),
            exit: self.exit.clone(),
            spec: Arc::clone(&self.spec),
            command_line: Arc::clone(&self.command_line),
            nics: if unchanged {
                Arc::clone(&before.nics)
            } else {
                self.spec.nics.iter().enumerate().map(card).collect()
            },
            responsive: self.vm.linked(),
            devices: self.devices.clone(),
            last_log: Arc::clone(&self.last_log),
            restarts: self.vm.row(),
            ..(*before).clone()
        }
    }

    pub(super) fn publish(&self) {
        if self.vm.state().idle() {
            self.context.gate.leave(&self.name);
        } else {
            self.context.gate.count(&self.name, &self.spec);
        }
        let before = self.view.borrow().clone();
        let after = Arc::new(self.look());
        if before == after {
            return;
        }
        self.view.send_replace(Arc::clone(&after));
        let sequence = (before.state != after.state).then(|| self.context.next_sequence());
        self.context.tell(News::VmChanged { before, after, sequence });
    }
}
