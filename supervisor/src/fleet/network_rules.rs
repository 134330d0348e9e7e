//! What a network's definition may say, and what follows from it for its DHCP server and for NAT. Pure: knows no link and no file.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use dbus_api::network::{Dhcp, NetworkSpec};
use ipnet::{IpNet, Ipv4Net};
use netsetup::{BridgeSpec, DhcpServer, NatNetwork, Pool};

use super::FleetError;
use super::spec::{check_link_name, check_name, plain_mac};

/// Addresses of a bridge at most: more is a mistake, and each is a question to the kernel at every start of a VM.
const MAX_ADDRESSES: usize = 16;
/// Servers for names that clients are told of; resolvers read three.
const MAX_DNS: usize = 8;
/// Addresses that are kept at most: as many as dnsmasq hands out.
const MAX_RESERVATIONS: usize = 1024;
/// For how long an address may be used, in seconds: dnsmasq's shortest, and a year.
const LEASES: std::ops::RangeInclusive<u32> = 120..=31_536_000;
const LEASE: u32 = 3600;

fn wrong(text: String) -> FleetError {
    FleetError::InvalidSpec(text)
}

/// The name of a network's bridge.
pub fn bridge_of(name: &str, spec: &NetworkSpec) -> String {
    spec.bridge.clone().unwrap_or_else(|| netsetup::bridge_name(name))
}

/// The bridge that a network wants.
pub(super) fn wanted(name: &str, spec: &NetworkSpec) -> BridgeSpec {
    BridgeSpec { name: bridge_of(name, spec), addresses: spec.addresses.clone(), mtu: spec.mtu }
}

/// Checks a network's name and definition, as far as that does not depend on the host's links.
pub(super) fn check(name: &str, spec: &NetworkSpec) -> Result<(), FleetError> {
    check_name(name)?;
    if let Some(bridge) = &spec.bridge {
        check_link_name("bridge", bridge)?;
    }
    if spec.addresses.len() > MAX_ADDRESSES {
        return Err(wrong(format!("addresses: {} given, at most {MAX_ADDRESSES}", spec.addresses.len())));
    }
    for (at, address) in spec.addresses.iter().enumerate() {
        if spec.addresses[..at].iter().any(|other| other.addr() == address.addr()) {
            return Err(wrong(format!("addresses: {} is given twice", address.addr())));
        }
    }
    if spec.mtu.is_some_and(|mtu| !(68..=65521).contains(&mtu)) {
        return Err(wrong(format!("mtu: {} is outside 68 to 65521", spec.mtu.unwrap_or_default())));
    }
    if spec.description.len() > 1024 {
        return Err(wrong("description: longer than 1024 bytes".to_owned()));
    }
    let bridge = bridge_of(name, spec);
    if spec.nat {
        if own(spec).next().is_none() {
            return Err(no_address("nat", &bridge, spec));
        }
        plain_bridge("nat", &bridge)?;
    }
    if let Some(dhcp) = &spec.dhcp {
        check_dhcp(&bridge, spec, dhcp)?;
    }
    Ok(())
}

/// Addresses of the host on the bridge, in IPv4.
fn own(spec: &NetworkSpec) -> impl Iterator<Item = Ipv4Net> {
    spec.addresses.iter().filter_map(|address| match address {
        IpNet::V4(address) => Some(*address),
        IpNet::V6(_) => None,
    })
}

fn no_address(key: &str, bridge: &str, spec: &NetworkSpec) -> FleetError {
    let hint = match &spec.bridge {
        None => "give one in addresses, such as 10.5.0.1/24".to_owned(),
        Some(_) => format!(
            "give the one that this host has on {bridge} in addresses, or a new one for a bridge of our own"
        ),
    };
    wrong(format!("{key}: the network has no IPv4 address of this host: {hint}"))
}

/// A name that nft and dnsmasq take for nothing but a name.
fn plain_bridge(key: &str, bridge: &str) -> Result<(), FleetError> {
    netsetup::check_plain(bridge).map_err(|error| wrong(format!("{key}: bridge: {error}")))
}

fn check_dhcp(bridge: &str, spec: &NetworkSpec, dhcp: &Dhcp) -> Result<(), FleetError> {
    plain_bridge("dhcp", bridge)?;
    let subnet = subnet(spec, dhcp).ok_or_else(|| match (own(spec).next(), dhcp.range) {
        (Some(_), Some(range)) => {
            wrong(format!("dhcp.range: {range} is in no subnet of the network's addresses"))
        }
        _ => no_address("dhcp", bridge, spec),
    })?;
    if let Some(seconds) = dhcp.lease_seconds.filter(|seconds| !LEASES.contains(seconds)) {
        let (least, most) = LEASES.into_inner();
        return Err(wrong(format!("dhcp.lease_seconds: {seconds} is outside {least} to {most}")));
    }
    if dhcp.dns.len() > MAX_DNS {
        return Err(wrong(format!("dhcp.dns: {} given, at most {MAX_DNS}", dhcp.dns.len())));
    }
    let no_host =
        |address: &Ipv4Addr| address.is_unspecified() || address.is_multicast() || address.is_broadcast();
    if let Some(address) = dhcp.dns.iter().find(|address| no_host(address)) {
        return Err(wrong(format!("dhcp.dns: {address} is no host's address")));
    }
    let host = |address: &Ipv4Addr| {
        subnet.contains(address) && *address != subnet.network() && *address != subnet.broadcast()
    };
    if let Some(router) = dhcp.router.filter(|router| !host(router)) {
        return Err(wrong(format!("dhcp.router: {router} is no host of {}", subnet.trunc())));
    }
    if dhcp.reservations.len() > MAX_RESERVATIONS {
        let count = dhcp.reservations.len();
        return Err(wrong(format!("dhcp.reservations: {count} given, at most {MAX_RESERVATIONS}")));
    }
    let (mut macs, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    for (text, address) in &dhcp.reservations {
        let mac = plain_mac(text).ok_or_else(|| {
            wrong(format!("dhcp.reservations: {text:?} is not a unicast address such as 52:54:00:12:34:56"))
        })?;
        if !macs.insert(mac) {
            return Err(wrong(format!("dhcp.reservations: {text} is given twice")));
        }
        if !host(address) {
            return Err(wrong(format!("dhcp.reservations: {address} is no host of {}", subnet.trunc())));
        }
        if own(spec).any(|own| own.addr() == *address) || dhcp.router == Some(*address) {
            return Err(wrong(format!("dhcp.reservations: {address} is this host's own, or the router's")));
        }
        if !addresses.insert(address) {
            return Err(wrong(format!("dhcp.reservations: {address} is kept for two cards")));
        }
    }
    Plan::of(spec).transpose().map(drop)
}

/// The subnet that addresses are given from: that of the range, or the first.
fn subnet(spec: &NetworkSpec, dhcp: &Dhcp) -> Option<Ipv4Net> {
    own(spec).find(|own| dhcp.range.is_none_or(|range| own.contains(&range.first)))
}

/// Two networks on one subnet: the host could not tell where an address is.
pub(super) fn check_apart(
    spec: &NetworkSpec,
    others: &[(String, std::sync::Arc<NetworkSpec>)],
) -> Result<(), FleetError> {
    // Every link may have addresses of these (RFC 4291, 2.5.6).
    let link_local = |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
    for address in spec.addresses.iter().filter(|address| !link_local(address)) {
        for (name, other) in others {
            let meets = |theirs: &&IpNet| address.contains(*theirs) || theirs.contains(address);
            let theirs = other.addresses.iter().filter(|theirs| !link_local(theirs));
            if let Some(theirs) = theirs.map(IpNet::trunc).find(|theirs| meets(&theirs)) {
                return Err(wrong(format!(
                    "addresses: {address} overlaps with {theirs} of the network \"{name}\""
                )));
            }
        }
    }
    Ok(())
}

/// What NAT has to know of a network; `None`: it has none.
pub(super) fn nat(name: &str, spec: &NetworkSpec) -> Option<NatNetwork> {
    spec.nat.then(|| NatNetwork { bridge: bridge_of(name, spec), subnets: own(spec).collect() })
}

/// What the DHCP server of a network is told; `None`: it has none.
pub(super) fn server(name: &str, spec: &NetworkSpec) -> Option<DhcpServer> {
    let dhcp = spec.dhcp.as_ref()?;
    let subnet = subnet(spec, dhcp)?;
    Some(DhcpServer {
        bridge: bridge_of(name, spec),
        subnet,
        lease: dhcp.lease_seconds.unwrap_or(LEASE),
        router: dhcp.router.or_else(|| spec.nat.then(|| subnet.addr())),
        dns: dhcp.dns.clone(),
        mtu: spec.mtu,
    })
}

/// Which addresses a network gives to which cards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// For cards that have none kept.
    pub(super) pool: Pool,
    /// Kept, by hardware address.
    pub(super) kept: BTreeMap<String, Ipv4Addr>,
}

impl Plan {
    /// That of a network; `None`: it gives none.
    pub(super) fn of(spec: &NetworkSpec) -> Option<Result<Plan, FleetError>> {
        let dhcp = spec.dhcp.as_ref()?;
        let subnet = subnet(spec, dhcp)?;
        let kept: BTreeMap<_, _> =
            dhcp.reservations.iter().filter_map(|(mac, address)| Some((plain_mac(mac)?, *address))).collect();
        let range = dhcp.range.map(|range| (range.first, range.last));
        // Somebody else has these.
        let taken = own(spec).map(|own| own.addr()).chain(dhcp.router).chain(dhcp.dns.iter().copied());
        let pool = Pool::new(subnet, range, taken.chain(kept.values().copied()));
        let pool = pool.map_err(|error| {
            wrong(format!("dhcp{}: {error}", if dhcp.range.is_some() { ".range" } else { "" }))
        });
        Some(pool.map(|pool| Plan { pool, kept }))
    }

    /// The card with this hardware address may have this address.
    pub(super) fn allows(&self, mac: &str, address: Ipv4Addr) -> bool {
        match self.kept.get(mac) {
            Some(kept) => *kept == address,
            None => self.pool.contains(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(text: &str) -> NetworkSpec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn every_error_names_its_field() {
        let long = format!(
            r#"{{"addresses":[{}]}}"#,
            (1..=17).map(|n| format!("\"10.0.{n}.1/24\"")).collect::<Vec<_>>().join(",")
        );
        let dhcp = |members: &str| format!(r#"{{"addresses":["10.5.0.1/24"],"dhcp":{{{members}}}}}"#);
        let dns = dhcp(&format!("\"dns\":[{}]", ["\"9.9.9.9\""; 9].join(",")));
        for (text, word) in [
            (r#"{"bridge":"a/b"}"#, "bridge"),
            (r#"{"bridge":""}"#, "bridge"),
            (r#"{"mtu":67}"#, "mtu"),
            (r#"{"mtu":65522}"#, "mtu"),
            (r#"{"addresses":["10.0.0.1/24","10.0.0.1/16"]}"#, "twice"),
            (long.as_str(), "addresses"),
            (r#"{"nat":true}"#, "nat: the network has no IPv4 address"),
            (r#"{"nat":true,"addresses":["fd00::1/64"]}"#, "nat: the network has no IPv4 address"),
            (r#"{"nat":true,"bridge":"br0"}"#, "that this host has on br0"),
            (r#"{"nat":true,"bridge":"br$","addresses":["10.5.0.1/24"]}"#, "nat: bridge"),
            (r#"{"dhcp":{}}"#, "dhcp: the network has no IPv4 address"),
            (r#"{"dhcp":{},"bridge":"br0"}"#, "that this host has on br0"),
            (r#"{"dhcp":{},"bridge":"br=0","addresses":["10.5.0.1/24"]}"#, "dhcp: bridge"),
            (r#"{"dhcp":{},"addresses":["10.5.0.1/31"]}"#, "dhcp: 10.5.0.0/31 has no room"),
            (&dhcp(r#""range":"10.6.0.1-10.6.0.9""#), "dhcp.range: 10.6.0.1-10.6.0.9 is in no subnet"),
            (&dhcp(r#""range":"10.5.0.9-10.6.0.9""#), "dhcp.range: 10.5.0.9 to 10.6.0.9 is not within"),
            (&dhcp(r#""range":"10.5.0.9-10.5.0.8""#), "dhcp.range: no address is left"),
            (&dhcp(r#""lease_seconds":119"#), "dhcp.lease_seconds"),
            (&dhcp(r#""lease_seconds":31536001"#), "dhcp.lease_seconds"),
            (&dns, "dhcp.dns"),
            (&dhcp(r#""dns":["0.0.0.0"]"#), "dhcp.dns"),
            (&dhcp(r#""router":"10.6.0.1""#), "dhcp.router"),
            (&dhcp(r#""router":"10.5.0.255""#), "dhcp.router"),
            (&dhcp(r#""reservations":{"x":"10.5.0.9"}"#), "dhcp.reservations: \"x\""),
            (&dhcp(r#""reservations":{"01:00:00:00:00:01":"10.5.0.9"}"#), "dhcp.reservations: \"01:"),
            (&dhcp(r#""reservations":{"52:54:00:00:00:01":"10.6.0.9"}"#), "10.6.0.9 is no host"),
            (&dhcp(r#""reservations":{"52:54:00:00:00:01":"10.5.0.1"}"#), "own"),
            (
                &dhcp(r#""reservations":{"52:54:00:00:00:0a":"10.5.0.9","52:54:00:00:00:0A":"10.5.0.8"}"#),
                "given twice",
            ),
            (
                &dhcp(r#""reservations":{"52:54:00:00:00:0a":"10.5.0.9","52:54:00:00:00:0b":"10.5.0.9"}"#),
                "two cards",
            ),
        ] {
            let error = check("lan", &spec(text)).unwrap_err();
            assert!(matches!(&error, FleetError::InvalidSpec(why) if why.contains(word)), "{text}: {error}");
        }
        assert!(check("no name", &NetworkSpec::default()).is_err());
        assert_eq!(check("lan", &NetworkSpec::default()), Ok(()));
        assert_eq!(wanted("lan", &NetworkSpec::default()).name, "flbr-lan");
    }

    #[test]
    fn the_least_definition_has_what_guests_need() {
        let spec = spec(r#"{"addresses":["fd00::1/64","10.5.0.1/24"],"nat":true,"mtu":1400,"dhcp":{}}"#);
        check("lan", &spec).unwrap();
        let told = server("lan", &spec).unwrap();
        assert_eq!((told.bridge.as_str(), told.lease, told.mtu), ("flbr-lan", 3600, Some(1400)));
        assert_eq!(told.router, Some(Ipv4Addr::new(10, 5, 0, 1)));
        assert_eq!(Plan::of(&spec).unwrap().unwrap().pool.size(), 253);
        assert_eq!(nat("lan", &spec).unwrap().subnets, ["10.5.0.1/24".parse().unwrap()]);
        // Without NAT the host is no way out, unless somebody says so.
        let closed = NetworkSpec { nat: false, ..spec.clone() };
        assert_eq!((server("lan", &closed).unwrap().router, nat("lan", &closed)), (None, None));
    }

    #[test]
    fn the_range_says_which_of_several_subnets_it_is() {
        let two = spec(
            r#"{"addresses":["10.5.0.1/24","10.6.0.1/24"],"dhcp":{"range":"10.6.0.9-10.6.0.20","reservations":{"52:54:00:00:00:0A":"10.6.0.12"}}}"#,
        );
        check("lan", &two).unwrap();
        assert_eq!(server("lan", &two).unwrap().subnet.to_string(), "10.6.0.1/24");
        let plan = Plan::of(&two).unwrap().unwrap();
        let at = |last| Ipv4Addr::new(10, 6, 0, last);
        assert!(plan.allows("52:54:00:00:00:0a", at(12)) && !plan.allows("52:54:00:00:00:0a", at(13)));
        assert!(plan.allows("52:54:00:00:00:0b", at(13)) && !plan.allows("52:54:00:00:00:0b", at(12)));
    }

    #[test]
    fn networks_do_not_overlap() {
        let other = |text: &str| vec![("two".to_owned(), std::sync::Arc::new(spec(text)))];
        let one = spec(r#"{"addresses":["10.5.0.1/24","fe80::1/64"]}"#);
        for text in [
            r#"{"addresses":["10.5.0.2/24"]}"#,
            r#"{"addresses":["10.5.7.1/16"]}"#,
            r#"{"addresses":["10.5.0.9/32"]}"#,
        ] {
            let error = check_apart(&one, &other(text)).unwrap_err().to_string();
            assert!(error.contains("overlaps with 10.5.") && error.contains("\"two\""), "{error}");
        }
        for text in ["{}", r#"{"addresses":["10.5.1.1/24"]}"#, r#"{"addresses":["fe80::1/64"]}"#] {
            assert_eq!(check_apart(&one, &other(text)), Ok(()));
        }
    }

    proptest! {
        /// Whatever passes the check has a server, a plan, and a text that dnsmasq reads; and nobody is given the host's address.
        #[test]
        fn what_is_accepted_can_be_served(
            bits in 8u8..=32, own in any::<u32>(), nat in any::<bool>(),
            range in any::<Option<(u16, u16)>>(), router in any::<Option<u16>>(),
            kept in proptest::collection::btree_map("52:54:00:00:00:0[0-9]", any::<u16>(), 0..3),
        ) {
            let own = Ipv4Net::new(own.into(), bits).unwrap();
            let near = |n: u16| Ipv4Addr::from(u32::from(own.network()).wrapping_add(u32::from(n % 300)).wrapping_sub(8));
            let dhcp = Dhcp {
                range: range.map(|(first, last)| dbus_api::network::Range { first: near(first), last: near(last) }),
                router: router.map(near),
                reservations: kept.into_iter().map(|(mac, at)| (mac, near(at))).collect(),
                ..Dhcp::default()
            };
            let spec = NetworkSpec { addresses: vec![own.into()], nat, dhcp: Some(dhcp), ..NetworkSpec::default() };
            if check("lan", &spec).is_err() {
                return Ok(());
            }
            let plan = Plan::of(&spec).unwrap().unwrap();
            server("lan", &spec).unwrap().config().unwrap();
            prop_assert!(!plan.allows("52:54:00:00:00:ff", own.addr()));
            prop_assert!(plan.kept.values().all(|address| own.contains(address) && !plan.pool.contains(*address)));
            prop_assert_eq!(nat, super::nat("lan", &spec).is_some());
            let text = serde_json::to_string(&spec).unwrap();
            prop_assert_eq!(serde_json::from_str::<NetworkSpec>(&text).unwrap(), spec);
        }
    }
}
