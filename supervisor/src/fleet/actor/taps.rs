//! The actor's part that has to do with taps which clients of the VM's QMP socket ask for by name: which names a VM may have, where such a tap
//! goes, and when it goes away. The proxy (`qmp/taps.rs`) asks; nothing here talks to the VMM.
//!
//! A tap of the definition stays with the definition. Any other is the back end's: it is made for it, written down before that, and removed
//! when the back end is, or the process ends.

use std::os::fd::OwnedFd;

use dbus_api::spec::Nic;
use tracing::info;

use super::{Actor, network};
use crate::fleet::FleetError;
use crate::fleet::seats::Kind;
use crate::fleet::spec::{NUMBERS, check_link_name};
use crate::qmp::{TapNews, TapStep};

/// Back ends with a tap of their own; no board has room for more cards.
const MOST: usize = 32;

/// The number of the card that a tap's name stands for. Names of ours that are another VM's, now or some day, are refused.
fn number_of(vm: &str, name: &str) -> Result<Option<u8>, FleetError> {
    check_link_name("ifname", name)?;
    let own = (0..NUMBERS).find(|number| netsetup::tap_name(vm, (*number).into()) == name);
    if own.is_none() && (name.starts_with("fl") || name.starts_with("fn")) {
        return Err(FleetError::InvalidSpec(format!(
            "ifname: {name:?} is no tap of VM \"{vm}\": use {:?}, or a name that begins neither with fl nor fn",
            netsetup::tap_name(vm, 0)
        )));
    }
    Ok(own)
}

impl Actor {
    /// A client's command needs a tap, or has no use for one any more.
    pub(super) async fn tap(&mut self, news: TapNews) {
        // Of a process that is gone: the client learns that from the answer that does not come.
        if !self.link.is(&news.monitor) {
            return;
        }
        match news.step {
            TapStep::Open { name, answer } => {
                let opened = self.open_tap(&news.netdev, &name).await;
                if answer.send(opened.map_err(|error| error.to_string())).is_err() {
                    self.free_tap(&news.netdev).await;
                }
            }
            TapStep::Free => self.free_tap(&news.netdev).await,
        }
    }

    async fn open_tap(&mut self, netdev: &str, name: &str) -> Result<OwnedFd, FleetError> {
        let number = number_of(&self.name, name)?;
        let of_definition = number.and_then(|number| {
            let at = self.spec.nic_numbers().iter().position(|other| *other == number)?;
            self.spec.nics.get(at).cloned()
        });
        if let Some(id) = number.map(|number| Kind::Nic.id(number)).filter(|id| {
            self.finishing.contains_key(id)
                || self.plugging.as_ref().is_some_and(|plugging| plugging.id == **id)
        }) {
            return Err(FleetError::Busy(format!(
                "ifname: {name} is that of {id}, which comes or leaves just now"
            )));
        }
        let other = self.taps.get(netdev).filter(|other| *other != name);
        if let Some(other) = other {
            return Err(FleetError::InvalidState(format!("netdev {netdev:?} has the tap {other} already")));
        }
        let known = of_definition.is_some() || self.seat_of(number) || self.taps.contains_key(netdev);
        // A card of ours has its address; what a client makes has the hardware address that the client gives it later.
        let numbered = of_definition.is_some();
        let nic = match of_definition {
            Some(nic) => nic,
            None => self.network_of_first()?,
        };
        if !known {
            if self.taps.len() >= MOST {
                return Err(FleetError::ResourceExhausted(format!("it has {MOST} taps of clients already")));
            }
            self.taps.insert(netdev.to_owned(), name.to_owned());
            // Before it is made: a daemon that is killed now leaves something that the next one knows of.
            self.record().await;
        }
        let numbered = number.filter(|_| numbered);
        let opened = match self.context.network.ensure_tap(&nic, name, self.uuid, numbered).await {
            Ok(()) => self.context.network.open(name).await,
            Err(error) => Err(error),
        };
        match &opened {
            Ok(_) => info!(FLOTILLA_VM = &*self.name, "tap {name} for netdev {netdev} of a client"),
            Err(_) if !known => self.free_tap(netdev).await,
            Err(_) => {}
        }
        opened
    }

    /// A card that was plugged in has this number: its tap is that card's.
    fn seat_of(&self, number: Option<u8>) -> bool {
        number.is_some_and(|number| self.seats.get(&Kind::Nic.id(number)).is_some())
    }

    /// A client does not say which network its tap belongs to: that of the VM's first card.
    fn network_of_first(&self) -> Result<Nic, FleetError> {
        let first = self.spec.nics.first().cloned();
        let first = first.or_else(|| self.seats.nics().into_iter().next().map(|(_, nic)| nic.clone()));
        first.ok_or_else(|| {
            FleetError::InvalidState(
                "ifname: the VM has no card that tells which network the tap belongs to: use AttachNic"
                    .to_owned(),
            )
        })
    }

    /// A back end is gone, or did not come: its own tap goes.
    async fn free_tap(&mut self, netdev: &str) {
        let Some(name) = self.taps.remove(netdev) else { return };
        self.record().await;
        if !self.taps.values().any(|other| *other == name) {
            let keep = network::taps(&self.name, &self.spec);
            self.context.network.remove_taps(self.uuid, [name], &keep).await;
        }
    }

    /// Ids that a new card cannot have, because a client's back end has the tap of that number.
    pub(super) fn taken_by_clients(&self) -> Vec<String> {
        let numbers = self.taps.values().filter_map(|name| number_of(&self.name, name).ok().flatten());
        numbers.map(|number| Kind::Nic.id(number)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_vms_own_or_nobodys() {
        assert_eq!(number_of("web", "fl-web-0"), Ok(Some(0)));
        assert_eq!(number_of("web", "fl-web-31"), Ok(Some(31)));
        let long = "a-name-that-is-long";
        assert_eq!(number_of(long, &netsetup::tap_name(long, 3)), Ok(Some(3)));
        assert_eq!(number_of("web", "tap7"), Ok(None));
        let bridge = netsetup::bridge_name("lan");
        let others = netsetup::tap_name(long, 3);
        for name in ["fl-db-0", "fl-web-32", &bridge, &others, "", "a/b", "tap%d", "sixteen-bytes-ab"] {
            assert!(matches!(number_of("web", name), Err(FleetError::InvalidSpec(_))), "{name}");
        }
    }
}
