//! Bridges and taps of the host, through rtnetlink and `/dev/net/tun`.
//!
//! The crate knows links and nothing of virtual machines: the daemon says which bridge and which taps should be there
//! ("ensure") or should be gone ("remove"), and every call may be repeated: a second one changes nothing and says so.
//!
//! **Whose link is it.** Each link made here carries a tag in its alias (`ip link show` prints it): a tap the tag of its
//! owner (`flotilla:UUID`), a bridge [`BRIDGE_TAG`]. What carries no tag, or another one, is never changed and never
//! removed; a bridge of the administrator may be *used*. Routes and IP forwarding are never touched, nor is the firewall but for
//! one table of our own.
//!
//! Rooms, each importing only those below it:
//!
//! ```text
//! net.rs     ensure, remove, list: the public calls
//! nat.rs     outgoing NAT: the nftables table of our own; nat_watch.rs hears when others take it away
//! dhcp.rs    what a DHCP server of a bridge is told      pool.rs   which addresses there are to give
//! wire.rs    one rtnetlink socket; a deadline for each request
//! tap.rs     /dev/net/tun (RTM_NEWLINK refuses to make taps)
//! link.rs    what the kernel says about a link, as plain data
//! name.rs    which names, tags, MTUs and addresses are acceptable; names for taps
//! error.rs   what can go wrong, and what to do about it
//! ```

mod dhcp;
mod error;
mod link;
mod name;
mod nat;
mod nat_watch;
mod net;
mod pool;
mod tap;
mod wire;

pub use dhcp::{DhcpServer, dhcp_hosts};
pub use error::NetError;
pub use link::{Link, LinkKind, Outcome};
pub use name::{BRIDGE_TAG, TAG_PREFIX, bridge_name, check_name, check_plain, tap_name};
pub use nat::{NatNetwork, apply_ruleset, check_forwarding, list_ruleset, nat_ruleset};
pub use nat_watch::NatWatch;
pub use net::{BridgeSpec, Net, TapSpec};
pub use pool::{Pool, PoolError};
