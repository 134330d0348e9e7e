//! The command line of `flotilla network`.

use clap::{Args, Subcommand};
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
  flotilla network define office --bridge br0
  flotilla define web --kernel /boot/vmlinuz --network lan")]
    Define(DefineArgs),
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
    /// Text for people
    #[arg(long, value_name = "TEXT")]
    pub(crate) description: Option<String>,
    /// Replace the definition of a network that exists; it holds at once
    #[arg(long)]
    pub(crate) replace: bool,
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
