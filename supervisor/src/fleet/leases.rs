//! Which card of a network has which address: owns the table, by the cards' taps. Pure; `dhcp.rs` keeps it on disk and tells the server.
//!
//! A card has its address for as long as it has its tap: through restarts of the VM, the daemon and the host. Nobody else gets it meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::FleetError;
use super::network_rules::Plan;

/// The address of one card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// Hardware address.
    pub mac: String,
    /// Its address.
    pub address: Ipv4Addr,
}

/// Addresses by tap.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Leases(BTreeMap<String, Lease>);

impl Leases {
    /// The card behind `tap` has an address from now on: the one that it has, if it may keep it. Says whether anything changed.
    pub(super) fn give(&mut self, plan: &Plan, tap: &str, mac: &str) -> Result<bool, FleetError> {
        if let Some(lease) = self.0.get(tap).filter(|lease| plan.allows(mac, lease.address)) {
            if lease.mac == mac {
                return Ok(false);
            }
            let address = lease.address;
            self.sole(tap, mac)?;
            self.0.insert(tap.to_owned(), Lease { mac: mac.to_owned(), address });
            return Ok(true);
        }
        self.sole(tap, mac)?;
        let taken: BTreeSet<Ipv4Addr> = self.0.values().map(|lease| lease.address).collect();
        let address = plan.kept.get(mac).copied().or_else(|| plan.pool.free(&taken)).ok_or_else(|| {
            FleetError::ResourceExhausted(format!(
                "all {} addresses that it gives are taken: widen dhcp.range",
                plan.pool.size()
            ))
        })?;
        self.0.insert(tap.to_owned(), Lease { mac: mac.to_owned(), address });
        Ok(true)
    }

    /// Two cards with one hardware address cannot have two addresses.
    fn sole(&self, tap: &str, mac: &str) -> Result<(), FleetError> {
        match self.0.iter().find(|(other, lease)| *other != tap && lease.mac == mac) {
            Some((other, _)) => Err(FleetError::InvalidSpec(format!(
                "mac: {mac} is that of the card behind {other}, on the same network"
            ))),
            None => Ok(()),
        }
    }

    /// As they come from a file: none that the plan does not allow, and of two with one address or hardware address the first.
    pub(super) fn sound(self, plan: &Plan) -> Leases {
        let (mut macs, mut addresses) = (BTreeSet::new(), BTreeSet::new());
        let mut keep = |lease: &Lease| {
            plan.allows(&lease.mac, lease.address)
                && macs.insert(lease.mac.clone())
                && addresses.insert(lease.address)
        };
        Leases(self.0.into_iter().filter(|(_, lease)| keep(lease)).collect())
    }

    /// Without those that the plan does not allow; says whether anything changed.
    pub(super) fn prune(&mut self, plan: &Plan, known: impl Fn(&str) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|tap, lease| known(tap) && plan.allows(&lease.mac, lease.address));
        self.0.len() != before
    }

    /// The card behind `tap` has none any more; says whether it had one.
    pub(super) fn release(&mut self, tap: &str) -> bool {
        self.0.remove(tap).is_some()
    }

    /// The address of the card behind `tap`.
    pub(super) fn get(&self, tap: &str) -> Option<Ipv4Addr> {
        self.0.get(tap).map(|lease| lease.address)
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = &Lease> {
        self.0.values()
    }
}

#[cfg(test)]
mod tests {
    use dbus_api::network::NetworkSpec;
    use proptest::prelude::*;

    use super::*;

    fn plan_of(text: &str) -> Plan {
        let spec: NetworkSpec = serde_json::from_str(text).unwrap();
        Plan::of(&spec).unwrap().unwrap()
    }

    fn small() -> Plan {
        plan_of(
            r#"{"addresses":["10.5.0.1/24"],"dhcp":{"range":"10.5.0.10-10.5.0.12","reservations":{"52:54:00:00:00:01":"10.5.0.5"}}}"#,
        )
    }

    #[test]
    fn a_card_keeps_what_it_has() {
        let (plan, mut leases) = (small(), Leases::default());
        for (tap, mac, changed, last) in [
            ("fl-a-0", "m:a", true, 10),
            ("fl-b-0", "m:b", true, 11),
            ("fl-a-0", "m:a", false, 10),
            // Another hardware address, the same card.
            ("fl-a-0", "m:c", true, 10),
            ("fl-k-0", "52:54:00:00:00:01", true, 5),
            // A card that one is kept for.
            ("fl-b-0", "m:b", false, 11),
        ] {
            assert_eq!(leases.give(&plan, tap, mac), Ok(changed), "{tap} {mac}");
            assert_eq!(leases.get(tap), Some(Ipv4Addr::new(10, 5, 0, last)), "{tap} {mac}");
        }
        let twice = leases.give(&plan, "fl-d-0", "m:b").unwrap_err();
        assert!(matches!(&twice, FleetError::InvalidSpec(text) if text.contains("fl-b-0")), "{twice}");
        assert_eq!(leases.give(&plan, "fl-d-0", "m:d"), Ok(true));
        let full = leases.give(&plan, "fl-e-0", "m:e").unwrap_err();
        assert!(matches!(full, FleetError::ResourceExhausted(_)), "{full}");
        assert!(leases.release("fl-b-0") && !leases.release("fl-b-0"));
        assert_eq!(leases.give(&plan, "fl-e-0", "m:e"), Ok(true));
        assert_eq!(leases.get("fl-e-0"), Some(Ipv4Addr::new(10, 5, 0, 11)));
        // Another range: who is outside gets another address.
        let other = plan_of(r#"{"addresses":["10.5.0.1/24"],"dhcp":{"range":"10.5.0.11-10.5.0.20"}}"#);
        assert!(leases.prune(&other, |tap| tap != "fl-d-0"));
        assert_eq!(leases.all().count(), 1);
    }

    #[test]
    fn what_a_file_says_is_not_trusted() {
        let text = r#"{"a":{"mac":"m:a","address":"10.5.0.10"},"b":{"mac":"m:b","address":"10.5.0.10"},
            "c":{"mac":"m:a","address":"10.5.0.11"},"d":{"mac":"m:d","address":"10.6.0.1"},
            "e":{"mac":"m:e","address":"10.5.0.12"}}"#;
        let leases = serde_json::from_str::<Leases>(text).unwrap().sound(&small());
        assert_eq!(leases.0.keys().collect::<Vec<_>>(), ["a", "e"]);
        assert!(serde_json::from_str::<Leases>(r#"{"a":{"mac":"m","address":"10.5.0"}}"#).is_err());
    }

    proptest! {
        #[test]
        fn no_two_cards_have_one_address(steps in proptest::collection::vec((0u8..8, 0u8..8, any::<bool>()), 0..60)) {
            let (plan, mut leases) = (small(), Leases::default());
            for (tap, mac, give) in steps {
                let (tap, mac) = (format!("fl-{tap}-0"), format!("52:54:00:00:00:0{mac}"));
                let before = leases.get(&tap);
                if give {
                    match leases.give(&plan, &tap, &mac) {
                        Ok(changed) => {
                            let now = leases.get(&tap).unwrap();
                            prop_assert!(plan.allows(&mac, now));
                            prop_assert!(changed || before == Some(now));
                        }
                        Err(_) => prop_assert_eq!(leases.get(&tap), before),
                    }
                } else {
                    prop_assert_eq!(leases.release(&tap), before.is_some());
                }
                let addresses: BTreeSet<_> = leases.all().map(|lease| lease.address).collect();
                let macs: BTreeSet<_> = leases.all().map(|lease| lease.mac.clone()).collect();
                prop_assert_eq!((addresses.len(), macs.len()), (leases.all().count(), leases.all().count()));
            }
        }
    }
}
