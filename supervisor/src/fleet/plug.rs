//! What is done, and undone, when a device comes to a running VM or leaves it: a pure step machine. No IO, no clock: the task in
//! `plugger.rs` carries out one [`Action`] after the other and says how it went.
//!
//! ```text
//!  attach:  MakeTap ─▶ AddBackend ─▶ AddDevice ─▶ WriteDown ─▶ End(Ok)
//!              │           │             │            │ fails
//!              ▼           ▼             ▼            ▼
//!           RemoveTap ◀─ RemoveBackend ◀─ RemoveDevice           ─▶ End(Err)
//!                                          └ the guest keeps it  ─▶ End(Err), everything stays
//!
//!  detach:  RemoveDevice ─▶ RemoveBackend ─▶ RemoveTap ─▶ StrikeOut ─▶ End
//!              └ fails: End(Err), everything stays
//! ```
//!
//! A disk has no tap, and what is not to be written down is not.

use std::time::Duration;

use super::FleetError;
use super::seats::{Hardware, Kind};

/// What is asked.
#[derive(Debug, Clone)]
pub enum Ask {
    /// This device comes.
    Attach(Hardware),
    /// The device of this id goes.
    Detach(Kind, String),
}

impl Ask {
    /// The type of its job.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Attach(hardware) if hardware.kind() == Kind::Nic => "attach-nic",
            Self::Attach(_) => "attach-disk",
            Self::Detach(Kind::Nic, _) => "detach-nic",
            Self::Detach(Kind::Disk, _) => "detach-disk",
        }
    }
}

/// How it is to be done.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// The definition changes, too.
    pub persist: bool,
    /// How long the guest has to let go of a device.
    pub patience: Duration,
}

/// A change of the definition that the actor is asked for.
#[derive(Debug, Clone)]
pub enum Rewrite {
    /// This device is a part of it from now on.
    Add(Hardware),
    /// The device of this id is no part of it any more.
    Remove(String),
}

/// One thing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make the tap and put it on its bridge.
    MakeTap,
    /// Hand tap or file over, and name it.
    AddBackend,
    /// Show the device to the guest.
    AddDevice,
    /// Put it into the definition.
    WriteDown,
    /// Take it from the guest, and wait until the guest lets go.
    RemoveDevice,
    /// Close tap or file.
    RemoveBackend,
    /// Remove the tap.
    RemoveTap,
    /// Take it out of the definition.
    StrikeOut,
}

impl Action {
    /// What undoes it.
    fn inverse(self) -> Option<Self> {
        match self {
            Self::MakeTap => Some(Self::RemoveTap),
            Self::AddBackend => Some(Self::RemoveBackend),
            Self::AddDevice => Some(Self::RemoveDevice),
            _ => None,
        }
    }
}

/// How an action went.
#[derive(Debug, Clone)]
pub enum Went {
    /// It is done, or was done before.
    Done,
    /// It failed and changed nothing.
    Failed(FleetError),
    /// Nobody knows whether it is done.
    Unsure(FleetError),
}

/// What comes next.
#[derive(Debug, Clone)]
pub enum Next {
    /// This.
    Do(Action),
    /// Nothing.
    End {
        /// How it went as a whole.
        result: Result<(), FleetError>,
        /// Nothing of the device is left: neither in the VM nor on the host.
        gone: bool,
    },
}

/// One device on its way.
#[derive(Debug, Clone)]
pub struct Plug {
    attach: bool,
    actions: Vec<Action>,
    /// The action that is being carried out.
    at: usize,
    /// What is still to be undone, the next one last; and why.
    undo: Option<(Vec<Action>, FleetError)>,
    /// The first thing that went wrong while it left.
    trouble: Option<FleetError>,
}

impl Plug {
    /// A device comes.
    pub fn attach(kind: Kind, persist: bool) -> Self {
        use Action::{AddBackend, AddDevice, MakeTap, WriteDown};
        let tap = (kind == Kind::Nic).then_some(MakeTap);
        let write = persist.then_some(WriteDown);
        Self::new(true, tap.into_iter().chain([AddBackend, AddDevice]).chain(write).collect())
    }

    /// A device leaves; `from`: what is done already when it begins.
    pub fn detach(kind: Kind, persist: bool, from: Action) -> Self {
        use Action::{RemoveBackend, RemoveDevice, RemoveTap, StrikeOut};
        let tap = (kind == Kind::Nic).then_some(RemoveTap);
        let strike = persist.then_some(StrikeOut);
        let all = [RemoveDevice, RemoveBackend].into_iter().chain(tap).chain(strike);
        Self::new(false, all.skip_while(|action| *action != from).collect())
    }

    fn new(attach: bool, actions: Vec<Action>) -> Self {
        Self { attach, actions, at: 0, undo: None, trouble: None }
    }

    /// What is to be done first.
    pub fn begin(&self) -> Next {
        self.forward()
    }

    fn forward(&self) -> Next {
        match self.actions.get(self.at) {
            Some(action) => Next::Do(*action),
            None => {
                let result = self.trouble.clone().map_or(Ok(()), Err);
                Next::End { result, gone: !self.attach }
            }
        }
    }

    /// How the last action went; what comes next.
    pub fn step(&mut self, went: Went) -> Next {
        if self.undo.is_some() {
            return self.undone(&went);
        }
        let (error, unsure) = match went {
            Went::Done => {
                self.at += 1;
                return self.forward();
            }
            Went::Failed(error) => (error, false),
            Went::Unsure(error) => (error, true),
        };
        if !self.attach {
            let first = self.at == 0 && self.actions.first() == Some(&Action::RemoveDevice);
            if first {
                return Next::End { result: Err(error), gone: false };
            }
            // The device is gone: what is left of it is removed as far as it can be.
            self.trouble.get_or_insert(error);
            self.at += 1;
            return self.forward();
        }
        let done = self.at + usize::from(unsure);
        let undo = self.actions[..done.min(self.actions.len())].iter().filter_map(|action| action.inverse());
        self.undo = Some((undo.collect(), error));
        self.backward()
    }

    fn backward(&mut self) -> Next {
        let Some((left, error)) = &self.undo else { return self.forward() };
        match left.last() {
            Some(action) => Next::Do(*action),
            None => Next::End { result: Err(error.clone()), gone: true },
        }
    }

    fn undone(&mut self, went: &Went) -> Next {
        let Some((left, error)) = &mut self.undo else { return self.forward() };
        let action = left.pop();
        if let (Some(Action::RemoveDevice), Went::Failed(why) | Went::Unsure(why)) = (action, went) {
            // The guest has it still: what is under it must stay.
            let result = Err(error.clone().map(|text| format!("{text}; and the guest keeps it: {why}")));
            return Next::End { result, gone: false };
        }
        self.backward()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn failed() -> Went {
        Went::Failed(FleetError::QmpError("no".into()))
    }

    /// Runs a plug to its end; `went` says how each action goes.
    fn run(
        mut plug: Plug,
        mut went: impl FnMut(usize, Action) -> Went,
    ) -> (Vec<Action>, Result<(), String>, bool) {
        let (mut actions, mut next) = (Vec::new(), plug.begin());
        loop {
            match next {
                Next::Do(action) => {
                    actions.push(action);
                    assert!(actions.len() < 20, "it does not end: {actions:?}");
                    next = plug.step(went(actions.len() - 1, action));
                }
                Next::End { result, gone } => {
                    return (actions, result.map_err(|error| error.to_string()), gone);
                }
            }
        }
    }

    #[test]
    fn what_was_done_is_undone_in_order() {
        use Action::*;
        let fails_at = |bad: Action| {
            run(Plug::attach(Kind::Nic, true), |_, action| if action == bad { failed() } else { Went::Done })
        };
        let all = run(Plug::attach(Kind::Nic, true), |_, _| Went::Done);
        assert_eq!(all, (vec![MakeTap, AddBackend, AddDevice, WriteDown], Ok(()), false));
        assert_eq!(fails_at(MakeTap).0, [MakeTap]);
        assert_eq!(fails_at(AddBackend).0, [MakeTap, AddBackend, RemoveTap]);
        assert_eq!(fails_at(AddDevice).0, [MakeTap, AddBackend, AddDevice, RemoveBackend, RemoveTap]);
        let (actions, result, gone) = fails_at(WriteDown);
        assert_eq!(actions[3..], [WriteDown, RemoveDevice, RemoveBackend, RemoveTap]);
        assert!(result.is_err() && gone);
        // A command without an answer may have been done.
        let unsure = run(Plug::attach(Kind::Disk, false), |at, _| {
            if at == 1 { Went::Unsure(FleetError::QmpTimeout("late".into())) } else { Went::Done }
        });
        assert_eq!(unsure.0, [AddBackend, AddDevice, RemoveDevice, RemoveBackend]);
        // A guest that does not let go keeps what it has.
        let kept = run(Plug::attach(Kind::Nic, true), |_, action| match action {
            WriteDown | RemoveDevice => failed(),
            _ => Went::Done,
        });
        assert_eq!(kept.0.last(), Some(&RemoveDevice));
        assert!(!kept.2 && kept.1.unwrap_err().contains("keeps"));
    }

    #[test]
    fn a_device_leaves_or_stays() {
        use Action::*;
        let all = run(Plug::detach(Kind::Nic, true, RemoveDevice), |_, _| Went::Done);
        assert_eq!(all, (vec![RemoveDevice, RemoveBackend, RemoveTap, StrikeOut], Ok(()), true));
        let kept = run(Plug::detach(Kind::Nic, true, RemoveDevice), |_, _| failed());
        assert_eq!((kept.0, kept.2), (vec![RemoveDevice], false));
        let untidy = run(Plug::detach(Kind::Nic, false, RemoveBackend), |_, _| failed());
        assert_eq!((untidy.0, untidy.2), (vec![RemoveBackend, RemoveTap], true));
        assert!(untidy.1.is_err());
    }

    proptest! {
        #[test]
        fn it_ends_and_leaves_nothing_half_done(
            nic: bool, persist: bool, attach: bool, went in prop::collection::vec(0u8..3, 12)
        ) {
            use Action::*;
            let kind = if nic { Kind::Nic } else { Kind::Disk };
            let plug = if attach { Plug::attach(kind, persist) } else { Plug::detach(kind, persist, RemoveDevice) };
            let mut there = if attach { vec![] } else { vec![MakeTap, AddBackend, AddDevice, WriteDown] };
            there.retain(|action| nic || *action != MakeTap);
            let mut left_behind = false;
            let (_, result, gone) = run(plug, |at, action| {
                if went[at] == 1 {
                    left_behind |= matches!(action, RemoveTap | RemoveBackend);
                    return failed();
                }
                // Done, and perhaps nobody heard of it.
                match action {
                    RemoveTap => there.retain(|there| *there != MakeTap),
                    RemoveBackend => there.retain(|there| *there != AddBackend),
                    RemoveDevice => there.retain(|there| *there != AddDevice),
                    StrikeOut => there.retain(|there| *there != WriteDown),
                    other => there.push(other),
                }
                if went[at] == 2 { Went::Unsure(FleetError::QmpTimeout("late".into())) } else { Went::Done }
            });
            if result.is_ok() {
                prop_assert_eq!(gone, !attach);
            }
            if attach && result.is_ok() {
                prop_assert_eq!(there.len(), 2 + usize::from(nic) + usize::from(persist));
            }
            if gone && !left_behind {
                let left = there.iter().find(|there| matches!(there, MakeTap | AddBackend | AddDevice));
                prop_assert_eq!(left, None);
            }
            // What the guest has rests on what is under it.
            if there.contains(&AddDevice) && !gone {
                prop_assert!(there.contains(&AddBackend) && (!nic || there.contains(&MakeTap)));
            }
        }
    }
}
