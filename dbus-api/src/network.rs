//! A network's definition: owns the schema that people write (JSON) and that the daemon stores. Plain data, unknown keys refused.
//!
//! `{}` is a valid one: a bridge of our own without an address.

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
}
