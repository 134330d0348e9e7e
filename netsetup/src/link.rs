//! What the kernel says about a link, as plain data.

use rtnetlink::packet_core::Nla;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoTun,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};

use crate::name::TAG_PREFIX;

// Attributes of a tun or tap below IFLA_INFO_DATA (include/uapi/linux/if_link.h, IFLA_TUN_*).
const IFLA_TUN_OWNER: u16 = 1;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
/// `IFLA_TUN_TYPE` of a tap (IFF_TAP).
const TYPE_TAP: u8 = 2;

/// A link as it was when it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it; never used twice in one network namespace until reboot.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Its alias, when that is one of our tags.
    pub tag: Option<String>,
    /// Index of the bridge (or other controller) it is a port of.
    pub controller: Option<u32>,
    /// A port of a bridge that reaches only ports that are not isolated.
    pub isolated: bool,
    /// What the call that returned this had to do.
    pub outcome: Outcome,
    pub(crate) alias: String,
    pub(crate) address: Vec<u8>,
    /// The kernel would give this link an IPv6 link-local address; `None`: this kernel has no IPv6.
    pub(crate) link_local: Option<bool>,
}

/// What a link is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// An Ethernet bridge.
    Bridge,
    /// A tap.
    Tap {
        /// The user who may attach to it without privilege; `None`: anybody with CAP_NET_ADMIN only.
        owner: Option<u32>,
        /// Made for several queues: a single-queue attach is refused.
        multi_queue: bool,
    },
    /// Anything else, in the kernel's word ("vlan", "veth", "tun"; "device" when it has none).
    Other(String),
}

impl LinkKind {
    pub(crate) fn describe(&self) -> String {
        match self {
            LinkKind::Bridge => "bridge".to_owned(),
            LinkKind::Tap { .. } => "tap".to_owned(),
            LinkKind::Other(kind) => format!("link of kind {kind:?}"),
        }
    }
}

/// What a call had to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Everything was as it should be.
    Unchanged,
    /// The link was there; some of its settings were put right.
    Updated,
    /// The link was made.
    Created,
}

impl Link {
    /// Reads one RTM_NEWLINK message. Absent attributes get the value that means "not ours, not usable".
    pub(crate) fn from_message(message: &LinkMessage) -> Link {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            kind: LinkKind::Other("device".to_owned()),
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            tag: None,
            controller: None,
            isolated: false,
            outcome: Outcome::Unchanged,
            alias: String::new(),
            address: Vec::new(),
            link_local: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::IfAlias(alias) => {
                    link.alias.clone_from(alias);
                    link.tag = alias.starts_with(TAG_PREFIX).then(|| alias.clone());
                }
                LinkAttribute::Controller(index) if *index != 0 => link.controller = Some(*index),
                LinkAttribute::Address(address) => link.address.clone_from(address),
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = kind(infos);
                    link.isolated = isolated(infos);
                }
                LinkAttribute::AfSpecUnspec(families) => link.link_local = link_local(families),
                _ => {}
            }
        }
        link
    }
}

fn kind(infos: &[LinkInfo]) -> LinkKind {
    let word = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match word {
        Some(InfoKind::Bridge) => LinkKind::Bridge,
        Some(InfoKind::Tun) => tun(infos),
        Some(other) => LinkKind::Other(other.to_string()),
        None => LinkKind::Other("device".to_owned()),
    }
}

fn isolated(infos: &[LinkInfo]) -> bool {
    infos.iter().any(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(port)) => port.contains(&InfoBridgePort::Isolated(true)),
        _ => false,
    })
}

/// The kernel calls tun and tap devices both "tun"; the type attribute tells them apart.
fn tun(infos: &[LinkInfo]) -> LinkKind {
    let mut tap = false;
    let mut owner = None;
    let mut multi_queue = false;
    for info in infos {
        let LinkInfo::Data(InfoData::Tun(attributes)) = info else { continue };
        for attribute in attributes {
            let InfoTun::Other(raw) = attribute else { continue };
            let mut value = vec![0; raw.value_len()];
            raw.emit_value(&mut value);
            match raw.kind() {
                IFLA_TUN_TYPE => tap = value.first() == Some(&TYPE_TAP),
                IFLA_TUN_OWNER => owner = <[u8; 4]>::try_from(value).ok().map(u32::from_ne_bytes),
                IFLA_TUN_MULTI_QUEUE => multi_queue = value.first().is_some_and(|on| *on != 0),
                _ => {}
            }
        }
    }
    if tap { LinkKind::Tap { owner, multi_queue } } else { LinkKind::Other("tun".to_owned()) }
}

fn link_local(families: &[AfSpecUnspec]) -> Option<bool> {
    families.iter().find_map(|family| match family {
        AfSpecUnspec::Inet6(attributes) => attributes.iter().find_map(|attribute| match attribute {
            AfSpecInet6::AddrGenMode(mode) => Some(*mode != In6AddrGenMode::None),
            _ => None,
        }),
        _ => None,
    })
}
