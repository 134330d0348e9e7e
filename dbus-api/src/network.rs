//! A network's definition: owns the schema that people write (JSON) and that the daemon stores. Plain data, unknown keys refused.
//!
//! `{}` is a valid one: a bridge of our own without an address.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What one network is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Free text for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The bridge. One that the host has already is used as it is, and stays when the network goes; default: one of our own, `flbr-NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Addresses of the host on the bridge, `10.5.0.1/24`; a bridge of the host's own must have them already.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpNet>,
    /// VMs reach the host and what else is on the bridge, but not each other.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub isolated: bool,
    /// Largest packet, in bytes, 68 to 65521; default: the kernel's choice, or what the bridge has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// VMs reach other networks under the host's address, which has to forward (net.ipv4.ip_forward); nobody reaches them from there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nat: bool,
    /// Cards of VMs that name this network are given addresses by DHCP, each always its own, and nobody else on the bridge is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dhcp: Option<Dhcp>,
}

/// What a network's cards are told by DHCP. `{}` is valid: addresses from the whole subnet of the host's first IPv4 address on the bridge.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dhcp {
    /// Addresses to give, `10.5.0.100-10.5.0.199`; default: all of the subnet but the host's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<Range>,
    /// For how long an address may be used before it is asked for again, in seconds, 120 to 31536000; default: an hour. It is always given again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_seconds: Option<u32>,
    /// Way to other networks; default: the host's address with `nat`, none without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<Ipv4Addr>,
    /// Who answers questions for names; default: nobody is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<Ipv4Addr>,
    /// Addresses that are kept for certain cards, by hardware address; within the range or beside it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub reservations: BTreeMap<String, Ipv4Addr>,
}

/// Addresses from one to another, both included: `10.5.0.100-10.5.0.199`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Range {
    /// The first.
    pub first: Ipv4Addr,
    /// The last.
    pub last: Ipv4Addr,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl From<Range> for String {
    fn from(range: Range) -> Self {
        range.to_string()
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a range of addresses such as 10.5.0.100-10.5.0.199");
        let (first, last) = text.split_once('-').ok_or_else(wrong)?;
        let address = |text: &str| text.trim().parse().map_err(|_| wrong());
        Ok(Self { first: address(first)?, last: address(last)? })
    }
}

impl TryFrom<String> for Range {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_definitions_are_read_and_written_as_they_were() {
        for text in [
            "{}",
            r#"{"addresses":["10.5.0.1/24"],"isolated":true,"mtu":1400}"#,
            r#"{"addresses":["10.5.0.1/24"],"nat":true,"dhcp":{}}"#,
            r#"{"dhcp":{"range":"10.5.0.9-10.5.0.20","lease_seconds":600,"router":"10.5.0.2","dns":["9.9.9.9"],"reservations":{"52:54:00:00:00:01":"10.5.0.7"}}}"#,
        ] {
            let spec: NetworkSpec = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&spec).unwrap(), text);
        }
        for range in ["10.5.0.9", "10.5.0.9-", "-", "a-b", "10.5.0.9-10.5.0.300"] {
            assert!(range.parse::<Range>().unwrap_err().contains(range), "{range}");
        }
    }
}
