//! The actor's part that keeps the VM's view: what lists and properties are served from, and the news of its changes.

use std::sync::Arc;

use dbus_api::spec::{Disk, Nic};

use super::Actor;
use crate::fleet::life::State;
use crate::fleet::seats::{Kind, Seats};
use crate::fleet::spec;
use crate::fleet::view::{News, View};
use crate::launch::CONSOLE_SOCKET;

/// As before, if it is the same.
fn keep<T: PartialEq>(before: &Arc<[T]>, now: Vec<T>) -> Arc<[T]> {
    if **before == *now { Arc::clone(before) } else { now.into() }
}

fn shown_disk((number, disk): (u8, &Disk)) -> (String, String, String, bool) {
    (Kind::Disk.id(number), disk.path.display().to_string(), disk.format.word().to_owned(), disk.readonly)
}

impl Actor {
    pub(super) fn look(&self) -> View {
        let before = self.view.borrow().clone();
        // What runs may have other devices than the definition.
        let resting;
        let seats = if self.vm.state().idle() {
            resting = Seats::of(&self.spec);
            &resting
        } else {
            &*self.seats
        };
        let card = |(number, nic): (u8, &Nic)| {
            let mac = spec::mac(nic, self.uuid, number);
            let tap = netsetup::tap_name(&self.name, number.into());
            (Kind::Nic.id(number), tap, mac, nic.place().to_owned())
        };
        let nics: Vec<_> = seats.nics().into_iter().map(card).collect();
        let disks: Vec<_> = seats.disks().into_iter().map(shown_disk).collect();
        let cards: Vec<Nic> = seats.nics().into_iter().map(|(_, nic)| nic.clone()).collect();
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
            unit: self.context.launcher.unit(&self.instance),
            console_socket: self.context.launcher.sockets(&self.instance).join(CONSOLE_SOCKET),
            nics: keep(&before.nics, nics),
            disks: keep(&before.disks, disks),
            cards: keep(&before.cards, cards),
            responsive: self.vm.linked() && self.vm.state() != State::Quarantined,
            devices: self.devices.clone(),
            last_log: Arc::clone(&self.last_log),
            restarts: self.vm.row(),
            restarted: self.restarted,
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
