//! The command line of `flotilla create`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use dbus_api::spec::Size;

use super::WaitArgs;
use super::spec::SpecArgs;

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageFormat {
    /// As the guest sees it
    Raw,
    /// QEMU's copy-on-write format
    Qcow2,
}

/// `flotilla create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Name of the new VM
    pub(crate) name: String,
    /// Image that its first disk comes of
    #[arg(long, value_name = "FILE")]
    pub(crate) image: PathBuf,
    /// What the image is [default: what it looks like]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) format: Option<ImageFormat>,
    /// Size of its first disk, such as 20G [default: the image's]
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<Size>,
    /// Make its first disk independent of the image, even if that takes a copy
    #[arg(long)]
    pub(crate) whole: bool,
    /// File of ssh public keys that may log in; may be given again
    #[arg(long = "ssh-key", value_name = "FILE")]
    pub(crate) ssh_keys: Vec<PathBuf>,
    /// File for its guest, as cloud-init's user-data
    #[arg(long, value_name = "FILE")]
    pub(crate) user_data: Option<PathBuf>,
    /// File for its guest, as cloud-init's network-config [default: every card asks for its address]
    #[arg(long, value_name = "FILE")]
    pub(crate) network_config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
    /// Do not start it
    #[arg(long)]
    pub(crate) no_start: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}
