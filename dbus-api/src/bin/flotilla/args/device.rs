//! The command line of `flotilla nic` and `flotilla disk`.

use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};
use dbus_api::spec::Disk;

use super::parse_duration;
use super::spec::parse_disk;

/// `flotilla nic`.
#[derive(Debug, Subcommand)]
pub(crate) enum NicVerb {
    /// Give a VM one more network card while it runs
    #[command(after_help = "\
Examples:
  flotilla nic add web --network lan
  flotilla nic add web --bridge br0 --mac 52:54:00:12:34:56 --persist")]
    Add(AddNicArgs),
    /// Take a card from a VM while it runs
    #[command(visible_alias = "remove", after_help = "Example:\n  flotilla nic rm web nic1 --persist")]
    Rm(RmDeviceArgs),
    /// List a VM's cards
    #[command(visible_alias = "ls", after_help = "Example:\n  flotilla nic list web")]
    List(ListDevicesArgs),
}

/// `flotilla disk`.
#[derive(Debug, Subcommand)]
pub(crate) enum DiskVerb {
    /// Give a VM one more disk while it runs
    #[command(after_help = "\
Examples:
  flotilla disk add web /srv/vm/data.img
  flotilla disk add web /srv/vm/data.qcow2,format=qcow2,serial=DATA --persist")]
    Add(AddDiskArgs),
    /// Take a disk from a VM while it runs; its image stays
    ///
    /// A microvm's guest is not asked: unmount the disk there first.
    #[command(visible_alias = "remove", after_help = "Example:\n  flotilla disk rm web disk1")]
    Rm(RmDeviceArgs),
    /// List a VM's disks
    #[command(visible_alias = "ls", after_help = "Example:\n  flotilla disk list web --json")]
    List(ListDevicesArgs),
}

/// `flotilla nic add`.
#[derive(Debug, Args)]
// Its own group is off: that would take in every argument of this structure.
#[group(skip)]
#[command(group = ArgGroup::new("place").required(true).args(["network", "bridge"]))]
pub(crate) struct AddNicArgs {
    /// VM
    pub(crate) name: String,
    /// Network that the card is on
    #[arg(long, value_name = "NETWORK")]
    pub(crate) network: Option<String>,
    /// Bridge that the card is on
    #[arg(long, value_name = "BRIDGE")]
    pub(crate) bridge: Option<String>,
    /// Hardware address [default: made from the VM's uuid]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) mac: Option<String>,
    /// Number of the card: 1 is nic1 [default: the lowest that is free]
    #[arg(long, value_name = "N")]
    pub(crate) number: Option<u8>,
    /// Put it into the VM's definition, too
    #[arg(long)]
    pub(crate) persist: bool,
}

/// `flotilla disk add`.
#[derive(Debug, Args)]
pub(crate) struct AddDiskArgs {
    /// VM
    pub(crate) name: String,
    /// The image, then any of ",format=qcow2", ",readonly", ",direct", ",discard", ",serial=TEXT"
    #[arg(value_name = "PATH[,...]", value_parser = parse_disk)]
    pub(crate) disk: Disk,
    /// Number of the disk: 1 is disk1 [default: the lowest that is free]
    #[arg(long, value_name = "N")]
    pub(crate) number: Option<u8>,
    /// Put it into the VM's definition, too
    #[arg(long)]
    pub(crate) persist: bool,
}

/// `flotilla nic rm`, `flotilla disk rm`.
#[derive(Debug, Args)]
pub(crate) struct RmDeviceArgs {
    /// VM
    pub(crate) name: String,
    /// Its id, as "list" shows it: nic1, disk2
    pub(crate) id: String,
    /// How long the guest may take to let go of it, such as 30s or 2m
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
    /// Take it out of the VM's definition, too
    #[arg(long)]
    pub(crate) persist: bool,
}

/// `flotilla nic list`, `flotilla disk list`.
#[derive(Debug, Args)]
pub(crate) struct ListDevicesArgs {
    /// VM
    pub(crate) name: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
