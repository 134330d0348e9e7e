//! What can go wrong with links. Each text names the link, says what was found, and what to do.

use std::io;
use std::time::Duration;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A name that no Linux link can have, or that the kernel would take for a pattern.
    #[error("link name {name:?}: {why}; use 1 to 15 letters, digits, '-', '_' or '.'")]
    Name {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A tag that cannot be a link's alias, or is not one of ours.
    #[error("link tag {tag:?}: {why}")]
    Tag {
        /// The tag as given.
        tag: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An MTU outside what bridges and taps take.
    #[error("link {name}: MTU {mtu} is outside 68 to 65521")]
    Mtu {
        /// The link.
        name: String,
        /// The MTU as given.
        mtu: u32,
    },
    /// An address that a bridge cannot have.
    #[error("bridge {name}: address {address}: {why}")]
    Address {
        /// The bridge.
        name: String,
        /// The address as given.
        address: ipnet::IpNet,
        /// What is wrong with it.
        why: &'static str,
    },
    /// [`Net::connect`](crate::Net::connect) was called outside a tokio runtime.
    #[error("rtnetlink needs a running tokio runtime on this thread")]
    NoRuntime,
    /// The kernel gave us no rtnetlink socket.
    #[error("cannot open an rtnetlink socket")]
    Connect(#[source] io::Error),
    /// `/dev/net/tun` cannot be opened.
    #[error(
        "cannot open /dev/net/tun: {source} (is the tun module loaded, and are we allowed to use the device?)"
    )]
    TunDevice {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A link that has to be there is not.
    #[error("{kind} {name}: no such link; create it first, or name another one")]
    Missing {
        /// What was looked for: "bridge" or "tap".
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The name belongs to a link of another kind.
    #[error("{name} is a {found}, not a {wanted}: choose another name, or remove that link")]
    WrongKind {
        /// The link.
        name: String,
        /// What it should be.
        wanted: &'static str,
        /// What it is.
        found: String,
    },
    /// The name is only an alternative name of some other link.
    #[error("{name} is an alternative name of link {real}: choose another name")]
    AlternativeName {
        /// The name asked for.
        name: String,
        /// The link's own name.
        real: String,
    },
    /// The link is not ours, or belongs to another owner.
    #[error(
        "{name} exists and is not ours (its alias is {found:?}, ours would be {wanted:?}): choose another name, or remove that link with `ip link del {name}`"
    )]
    Foreign {
        /// The link.
        name: String,
        /// The alias it carries; empty when none.
        found: String,
        /// The tag that would make it ours.
        wanted: String,
    },
    /// A bridge of the administrator is not as the definition wants it. We never change it.
    #[error(
        "bridge {name} exists, was not made by us, and {what}: change it yourself ({command}) or drop that wish"
    )]
    ForeignBridge {
        /// The bridge.
        name: String,
        /// What differs.
        what: String,
        /// A command that would settle it.
        command: String,
    },
    /// Somebody holds the tap open.
    #[error("tap {name} is in use by another process")]
    Busy {
        /// The tap.
        name: String,
    },
    /// The tap's mode does not fit (multi queue, or made by other means).
    #[error(
        "tap {name} was made with other flags (multi_queue?) than a single-queue tap: remove it and let it be made again"
    )]
    TapMode {
        /// The tap.
        name: String,
    },
    /// The kernel did not answer in time.
    #[error("link {name}: the kernel did not {what} within {} s", after.as_secs())]
    Deadline {
        /// What we wanted.
        what: &'static str,
        /// The link.
        name: String,
        /// How long we waited.
        after: Duration,
    },
    /// The kernel refused.
    #[error("link {name}: cannot {what}: {source}{}", permission_hint(source))]
    Refused {
        /// What we wanted.
        what: &'static str,
        /// The link.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// rtnetlink itself failed: an answer that is none, or the socket is gone.
    #[error("link {name}: cannot {what}: rtnetlink: {source}")]
    Protocol {
        /// What we wanted.
        what: &'static str,
        /// The link.
        name: String,
        /// What the library says.
        #[source]
        source: rtnetlink::Error,
    },
    /// The links changed each time we listed them.
    #[error("the list of links changed while it was read, {tries} times in a row; try again")]
    Restless {
        /// How often we tried.
        tries: u32,
    },
    /// The host does not forward.
    #[error(
        "this host does not forward between networks (net.ipv4.ip_forward is 0), so NAT would do nothing: switch it on yourself with `sysctl -w net.ipv4.ip_forward=1`, and for every boot with net.ipv4.ip_forward=1 in a file of /etc/sysctl.d"
    )]
    Forwarding,
    /// `nft` cannot be run.
    #[error("nft cannot be run: {source}: NAT needs it, install the package nftables")]
    NftMissing {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `nft` refused.
    #[error("nft did not take the table flotilla: {text}")]
    Nft {
        /// What it says.
        text: String,
    },
    /// Several parts of one job failed; the others were done.
    #[error("{}", join(.0))]
    Several(Vec<NetError>),
}

/// Most refusals of this kind mean that the caller is not root; say so.
fn permission_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => " (this needs CAP_NET_ADMIN)",
        _ => "",
    }
}

fn join(errors: &[NetError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
