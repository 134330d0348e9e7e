//! The command line of `flotilla network`.

use std::net::Ipv4Addr;

use clap::{Args, Subcommand};
use dbus_api::network::Range;
use ipnet::IpNet;

/// `flotilla network`.
#[derive(Debug, Subcommand)]
pub(crate) enum NetworkVerb {
    /// Define a network; its bridge is made at once
    ///
    /// Without --bridge it gets a bridge of its own. A bridge that this host has already is used as it is: it keeps its addresses and its
    /// other ports, and stays when the network is removed.
    #[command(after_help = "\
Examples:
  flotilla network define lan --address 10.5.0.1/24
  flotilla network define guests --address 10.6.0.1/24 --isolated
  flotilla network define out --address 10.7.0.1/24 --nat --dhcp --dns 9.9.9.9
  flotilla network define office --bridge br0
  flotilla define web --kernel /boot/vmlinuz --network lan")]
    Define(DefineArgs),
    /// Show all about a network, and what keeps it from working
    #[command(after_help = "Example:\n  flotilla network show lan")]
    Show(ShowArgs),
    /// List the networks
    #[command(visible_alias = "ls", after_help = "Example:\n  flotilla network list --json")]
    List(ListArgs),
    /// Remove networks that no VM has a card on
    #[command(visible_alias = "remove", after_help = "Example:\n  flotilla network rm lan")]
    Rm(RmArgs),
}

/// `flotilla network define`.
#[derive(Debug, Args)]
pub(crate) struct DefineArgs {
    /// Network
    pub(crate) name: String,
    /// Bridge, the host's own or a new one [default: flbr-NAME]
    #[arg(long, value_name = "BRIDGE")]
    pub(crate) bridge: Option<String>,
    /// Address of this host on the bridge, such as 10.5.0.1/24; may be given again
    #[arg(long = "address", value_name = "ADDRESS/BITS")]
    pub(crate) addresses: Vec<IpNet>,
    /// VMs reach this host and what else is on the bridge, but not each other
    #[arg(long)]
    pub(crate) isolated: bool,
    /// Largest packet, in bytes
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<u32>,
    /// VMs reach other networks under this host's address; nobody reaches them from there
    #[arg(long)]
    pub(crate) nat: bool,
    /// Give VMs addresses by DHCP, each always the same one [default: from the whole subnet of the first --address]
    #[arg(long, value_name = "FIRST-LAST", num_args = 0..=1)]
    #[expect(clippy::option_option, reason = "absent, present, present with a value")]
    pub(crate) dhcp: Option<Option<Range>>,
    /// How long an address may be used before it is asked for again; it is given again
    #[arg(long, value_name = "SECONDS", requires = "dhcp")]
    pub(crate) lease_seconds: Option<u32>,
    /// Server for names that DHCP tells VMs of; may be given again
    #[arg(long = "dns", value_name = "ADDRESS", requires = "dhcp")]
    pub(crate) dns: Vec<Ipv4Addr>,
    /// Way to other networks that DHCP tells VMs of [default: this host with --nat, otherwise none]
    #[arg(long, value_name = "ADDRESS", requires = "dhcp")]
    pub(crate) router: Option<Ipv4Addr>,
    /// Address that is kept for the card with this hardware address; may be given again
    #[arg(long = "reserve", value_name = "MAC=ADDRESS", requires = "dhcp", value_parser = reservation)]
    pub(crate) reservations: Vec<(String, Ipv4Addr)>,
    /// Text for people
    #[arg(long, value_name = "TEXT")]
    pub(crate) description: Option<String>,
    /// Replace the definition of a network that exists; it holds at once
    #[arg(long)]
    pub(crate) replace: bool,
}

fn reservation(text: &str) -> Result<(String, Ipv4Addr), String> {
    let wrong = || format!("{text:?} is not such as 52:54:00:12:34:56=10.5.0.7");
    let (mac, address) = text.split_once('=').ok_or_else(wrong)?;
    Ok((mac.to_owned(), address.parse().map_err(|_| wrong())?))
}

/// `flotilla network show`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Network
    pub(crate) name: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `flotilla network list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `flotilla network rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Networks
    #[arg(required = true, value_name = "NETWORK")]
    pub(crate) names: Vec<String>,
}
