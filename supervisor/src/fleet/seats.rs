//! The disks and cards of a running VM: which there are, where each sits, and which of them come or leave just now. Pure; kept by the actor,
//! written with the process's record before anything is done, so that a daemon that was killed in between knows what to put in order.
//!
//! ```text
//!   start ──▶ seated ◀── settle ── moving ◀── reserve (attach)
//!               │ leave              │  ▲
//!               └────────────────────┼──┘
//!                                    └─ remove ──▶ (unknown)
//! ```
//!
//! A device has a *number* for its whole life: `nic1` is its id, its tap and its hardware address come from it. Its *place* is where the
//! board has it: a microvm's slot, a q35's root port.

use std::collections::BTreeMap;

use dbus_api::spec::{Disk, Machine, Nic, VmSpec};
use serde::{Deserialize, Serialize};

use super::FleetError;
use super::spec::{NUMBERS, Room, room};

/// A disk or a card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hardware {
    /// A network card.
    Nic(Nic),
    /// A disk.
    Disk(Disk),
}

impl Hardware {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Nic(_) => Kind::Nic,
            Self::Disk(_) => Kind::Disk,
        }
    }

    /// The number that it is to have.
    pub fn number(&self) -> Option<u8> {
        match self {
            Self::Nic(nic) => nic.number,
            Self::Disk(disk) => disk.number,
        }
    }
}

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A network card.
    Nic,
    /// A disk.
    Disk,
}

impl Kind {
    /// What ids begin with.
    pub fn word(self) -> &'static str {
        match self {
            Self::Nic => "nic",
            Self::Disk => "disk",
        }
    }

    /// The id of number `number`.
    pub fn id(self, number: u8) -> String {
        format!("{}{number}", self.word())
    }

    /// The number in an id.
    pub fn number(self, id: &str) -> Option<u8> {
        let number = id.strip_prefix(self.word())?.parse().ok()?;
        (number < NUMBERS && self.id(number) == id).then_some(number)
    }
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seat {
    /// Where the board has it.
    pub place: u8,
    /// It comes or leaves: a step of that may be done or not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moving: bool,
    /// What it is.
    pub hardware: Hardware,
}

/// All of them by id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seats(BTreeMap<String, Seat>);

impl Seats {
    /// As a start puts them.
    pub fn of(spec: &VmSpec) -> Self {
        // Behind root ports the disks are first.
        let first = match room(spec.machine) {
            Room::Slots { .. } => 0,
            Room::Ports(_) => u8::try_from(spec.disks.len()).unwrap_or(u8::MAX),
        };
        let nics = spec.nics.iter().zip(spec.nic_numbers()).zip(first..).map(|((nic, number), place)| {
            let hardware = Hardware::Nic(Nic { number: Some(number), ..nic.clone() });
            (Kind::Nic.id(number), Seat { place, moving: false, hardware })
        });
        let disks = spec.disks.iter().zip(spec.disk_numbers()).zip(0..).map(|((disk, number), place)| {
            let hardware = Hardware::Disk(Disk { number: Some(number), ..disk.clone() });
            (Kind::Disk.id(number), Seat { place, moving: false, hardware })
        });
        Self(nics.chain(disks).collect())
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One of them.
    pub fn get(&self, id: &str) -> Option<&Seat> {
        self.0.get(id)
    }

    /// Those that come or leave.
    pub fn moving(&self) -> impl Iterator<Item = (&String, &Seat)> {
        self.0.iter().filter(|(_, seat)| seat.moving)
    }

    /// The cards that are there: number and definition, by number.
    pub fn nics(&self) -> Vec<(u8, &Nic)> {
        let card = |(id, seat): (&String, &'_ Seat)| Kind::Nic.number(id).filter(|_| !seat.moving);
        let mut nics: Vec<_> = self
            .0
            .iter()
            .filter_map(|(id, seat)| match &seat.hardware {
                Hardware::Nic(nic) => card((id, seat)).map(|number| (number, nic)),
                Hardware::Disk(_) => None,
            })
            .collect();
        nics.sort_by_key(|(number, _)| *number);
        nics
    }

    /// The disks that are there: number and definition, by number.
    pub fn disks(&self) -> Vec<(u8, &Disk)> {
        let mut disks: Vec<_> = self
            .0
            .iter()
            .filter(|(_, seat)| !seat.moving)
            .filter_map(|(id, seat)| match &seat.hardware {
                Hardware::Disk(disk) => Kind::Disk.number(id).map(|number| (number, disk)),
                Hardware::Nic(_) => None,
            })
            .collect();
        disks.sort_by_key(|(number, _)| *number);
        disks
    }

    /// Taps of all cards, those that come or leave too.
    pub fn taps(&self, vm: &str) -> Vec<String> {
        let numbers = self.0.keys().filter_map(|id| Kind::Nic.number(id));
        numbers.map(|number| netsetup::tap_name(vm, number.into())).collect()
    }

    /// A number and a place for a device that is to come; neither the VM's definition nor `others` (ids) has the number. `machine`: the
    /// board of the VM that runs, which its definition may have left behind.
    ///
    /// # Errors
    /// The number is taken, or there is no place left.
    pub fn reserve(
        &mut self,
        spec: &VmSpec,
        machine: Machine,
        others: &[&str],
        hardware: Hardware,
    ) -> Result<(String, u8, u8), FleetError> {
        let kind = hardware.kind();
        let number = self.free_number(spec, others, &hardware)?;
        let (places, shared) = match (room(machine), kind) {
            (Room::Slots { disks, .. }, Kind::Disk) => (disks, false),
            (Room::Slots { nics, .. }, Kind::Nic) => (nics, false),
            (Room::Ports(ports), _) => (ports, true),
        };
        let taken = |place: u8| {
            self.0.values().any(|seat| (shared || seat.hardware.kind() == kind) && seat.place == place)
        };
        let Some(place) = (0..places).find(|place| !taken(*place)) else {
            return Err(FleetError::ResourceExhausted(format!(
                "all {places} places for a {} are taken: remove one first",
                kind.word()
            )));
        };
        let id = kind.id(number);
        let hardware = match hardware {
            Hardware::Nic(nic) => Hardware::Nic(Nic { number: Some(number), ..nic }),
            Hardware::Disk(disk) => Hardware::Disk(Disk { number: Some(number), ..disk }),
        };
        self.0.insert(id.clone(), Seat { place, moving: true, hardware });
        Ok((id, number, place))
    }

    /// The number that a device gets.
    ///
    /// # Errors
    /// The one that it is to have is taken, or none is left.
    pub fn free_number(&self, spec: &VmSpec, others: &[&str], hardware: &Hardware) -> Result<u8, FleetError> {
        let kind = hardware.kind();
        let defined = match kind {
            Kind::Nic => spec.nic_numbers(),
            Kind::Disk => spec.disk_numbers(),
        };
        let free = |number: u8| {
            let id = kind.id(number);
            !defined.contains(&number) && !self.0.contains_key(&id) && !others.contains(&id.as_str())
        };
        match hardware.number() {
            Some(number) if number < NUMBERS && free(number) => Ok(number),
            Some(number) => Err(FleetError::InvalidSpec(format!(
                "number: {} is taken, or above {}: leave it out for one that is free",
                kind.id(number),
                NUMBERS - 1
            ))),
            None => (0..NUMBERS).find(|number| free(*number)).ok_or_else(|| {
                FleetError::ResourceExhausted(format!("all {NUMBERS} numbers of a {} are taken", kind.word()))
            }),
        }
    }

    /// It is there.
    pub fn settle(&mut self, id: &str) {
        if let Some(seat) = self.0.get_mut(id) {
            seat.moving = false;
        }
    }

    /// It is to go.
    pub fn leave(&mut self, id: &str) {
        if let Some(seat) = self.0.get_mut(id) {
            seat.moving = true;
        }
    }

    /// It is gone.
    pub fn remove(&mut self, id: &str) -> Option<Seat> {
        self.0.remove(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(text: &str) -> VmSpec {
        serde_json::from_str(text).unwrap()
    }

    fn nic() -> Hardware {
        Hardware::Nic(Nic { bridge: "b".into(), ..Nic::default() })
    }

    #[test]
    fn a_start_seats_the_devices_in_order() {
        let spec = spec(
            r#"{"kernel":"/k","disks":[{"path":"/a","number":4},{"path":"/b"}],"nics":[{"bridge":"b"}]}"#,
        );
        let seats = Seats::of(&spec);
        let place = |id: &str| seats.get(id).map(|seat| seat.place);
        assert_eq!((place("disk4"), place("disk0"), place("nic0")), (Some(0), Some(1), Some(0)));
        assert_eq!(seats.disks().iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 4]);
        assert_eq!(seats.taps("web"), ["fl-web-0"]);
        let text = serde_json::to_string(&seats).unwrap();
        assert_eq!(serde_json::from_str::<Seats>(&text).unwrap(), seats);
    }

    #[test]
    fn numbers_and_places_are_given_and_taken_back() {
        let spec = spec(r#"{"kernel":"/k","nics":[{"bridge":"b"}]}"#);
        let mut seats = Seats::of(&spec);
        assert_eq!(seats.reserve(&spec, spec.machine, &[], nic()).unwrap(), ("nic1".into(), 1, 1));
        assert!(seats.nics().len() == 1 && seats.taps("web").len() == 2, "it is not there yet");
        seats.settle("nic1");
        assert_eq!(seats.nics().len(), 2);
        assert!(matches!(
            seats.reserve(&spec, spec.machine, &[], nic()),
            Err(FleetError::ResourceExhausted(_))
        ));
        // The definition's card is gone; its number stays its own.
        seats.remove("nic0");
        assert_eq!(seats.reserve(&spec, spec.machine, &["nic2"], nic()).unwrap(), ("nic3".into(), 3, 0));
        let written = Hardware::Nic(Nic { number: Some(1), ..Nic::default() });
        assert!(matches!(seats.reserve(&spec, spec.machine, &[], written), Err(FleetError::InvalidSpec(_))));
        for id in ["nic", "nic01", "nic32", "nic-1", "disk0", "nic+1", ""] {
            assert_eq!(Kind::Nic.number(id), None, "{id}");
        }
    }

    #[test]
    fn disks_and_cards_of_a_q35_share_its_ports() {
        let spec = spec(
            r#"{"kernel":"/k","machine":"q35","disks":[{"path":"/a"},{"path":"/b"}],"nics":[{"bridge":"b"}]}"#,
        );
        let mut seats = Seats::of(&spec);
        let place = |id: &str| seats.get(id).map(|seat| seat.place);
        assert_eq!((place("disk1"), place("nic0")), (Some(1), Some(2)));
        assert_eq!(seats.reserve(&spec, Machine::Q35, &[], nic()).unwrap(), ("nic1".into(), 1, 3));
        seats.remove("disk0");
        let disk = Hardware::Disk(Disk::new("/c"));
        assert_eq!(seats.reserve(&spec, Machine::Q35, &[], disk.clone()).unwrap(), ("disk2".into(), 2, 0));
        for _ in 4..16 {
            seats.reserve(&spec, Machine::Q35, &[], nic()).unwrap();
        }
        let full = seats.reserve(&spec, Machine::Q35, &[], disk);
        assert!(matches!(full, Err(FleetError::ResourceExhausted(_))), "{full:?}");
    }

    proptest! {
        #[test]
        fn no_two_devices_share_anything(q35: bool, what in prop::collection::vec((any::<bool>(), 0u8..4, 0u8..34), 0..40)) {
            let mut spec = spec(r#"{"kernel":"/k","disks":[{"path":"/a"}],"nics":[{"bridge":"b","number":1}]}"#);
            if q35 {
                spec.machine = Machine::Q35;
            }
            let mut seats = Seats::of(&spec);
            for (disk, verb, number) in what {
                let kind = if disk { Kind::Disk } else { Kind::Nic };
                let number = (number < 33).then_some(number);
                match verb {
                    0 | 1 => {
                        let hardware = if disk {
                            Hardware::Disk(Disk { number, ..Disk::new("/x") })
                        } else {
                            Hardware::Nic(Nic { number, ..Nic::default() })
                        };
                        let before = seats.clone();
                        match seats.reserve(&spec, spec.machine, &[], hardware) {
                            Ok((id, got, _)) => prop_assert!(
                                before.get(&id).is_none() && kind.number(&id) == Some(got)
                            ),
                            Err(_) => prop_assert_eq!(&before, &seats),
                        }
                    }
                    2 => drop(seats.remove(&kind.id(number.unwrap_or(0)))),
                    _ => seats.settle(&kind.id(number.unwrap_or(0))),
                }
                let mut places: Vec<_> =
                    seats.0.values().map(|seat| (!q35 && seat.hardware.kind() == Kind::Nic, seat.place)).collect();
                let count = places.len();
                places.sort_unstable();
                places.dedup();
                prop_assert_eq!(places.len(), count);
            }
        }
    }
}
