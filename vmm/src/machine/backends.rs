//! Back ends that a client adds while a machine runs: opens them, and keeps no number of a descriptor that somebody else owns by then.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::path::PathBuf;

use super::plugging::HotplugError;
use crate::block::{BlockError, Disk};
use crate::config::{Drive, NetBackend, Netdev, TapSource};
use crate::inherit::Inherited;
use crate::net::{Backend, NetError};
use crate::virtio::net::Port;

/// Opens an image; where descriptors were sent for it, they stand for its files, as inherited ones do for those of the command line.
pub(super) fn open_disk(
    drive: &Drive,
    files: Vec<(PathBuf, OwnedFd)>,
    inherited: &Inherited,
) -> Result<Disk, BlockError> {
    if files.is_empty() { Disk::open(drive, inherited) } else { Disk::open(drive, &Inherited::of(files)) }
}

pub(super) fn open_netdev(
    netdev: &mut Netdev,
    fds: Vec<OwnedFd>,
    vhost: Vec<OwnedFd>,
    inherited: &Inherited,
) -> Result<Backend, NetError> {
    if let NetBackend::Tap { source, vhost_fds, .. } = &mut netdev.backend {
        // From here on the numbers own the descriptors, as those on a command line do.
        if !fds.is_empty() {
            *source = TapSource::Fds(fds.into_iter().map(IntoRawFd::into_raw_fd).collect());
        }
        *vhost_fds = vhost.into_iter().map(IntoRawFd::into_raw_fd).collect();
    }
    let result = Backend::open(netdev, inherited);
    forget_descriptors(netdev);
    result
}

/// Whoever opened the netdev owns its descriptors: the numbers may stand for something else later.
pub(super) fn forget_descriptors(netdev: &mut Netdev) {
    if let NetBackend::Tap { source, vhost_fds, .. } = &mut netdev.backend {
        vhost_fds.clear();
        if let TapSource::Fds(fds) = source {
            fds.clear();
        }
    }
}

/// Opens another tap for a netdev, and puts it behind the NIC that uses it.
pub(super) fn replace_tap(
    netdev: &mut Netdev,
    port: &Port,
    ifname: String,
    path: Option<PathBuf>,
    inherited: &Inherited,
) -> Result<(), HotplugError> {
    let mut wanted = netdev.clone();
    if let NetBackend::Tap { source, path: device, vhost_fds, .. } = &mut wanted.backend {
        (*source, *device) = (TapSource::Name(ifname), path);
        vhost_fds.clear();
    }
    port.replace(Backend::open(&wanted, inherited)?)?;
    *netdev = wanted;
    Ok(())
}

/// Whether it was made from descriptors, and has been used.
pub(super) fn is_spent(netdev: &Netdev) -> bool {
    matches!(&netdev.backend, NetBackend::Tap { source: TapSource::Fds(fds), .. } if fds.is_empty())
}
