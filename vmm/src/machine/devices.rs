//! Disks and NICs of any board: how each is made from its configuration and its host end.

use super::MachineError;
use super::workers::{Workers, no_such};
use crate::block::Disk;
use crate::config::{DeviceDriver, VmConfig};
use crate::inherit::Inherited;
use crate::net;
use crate::virtio::blk::{Blk, BlkOptions};
use crate::virtio::net::{Net, NetOptions};

/// The disk that `driver` describes, with `queues` queues unless it says how many; none if it describes something else.
pub(super) fn disk(
    id: &str,
    driver: &DeviceDriver,
    queues: u16,
    config: &VmConfig,
    inherited: &Inherited,
    workers: &Workers,
) -> Result<Option<Blk>, MachineError> {
    let DeviceDriver::VirtioBlk { drive, serial, iothread, queue_size, num_queues, .. } = driver else {
        return Ok(None);
    };
    let worker = workers.get(id, iothread.as_ref())?;
    let wanted = config.drives.iter().find(|d| d.id == *drive);
    let drive = wanted.ok_or_else(|| no_such(id, "drive", drive, "-drive"))?;
    Ok(Some(Blk::new(BlkOptions {
        backend: Some(Disk::open(drive, inherited)?),
        serial: serial.clone(),
        read_only: drive.readonly,
        queue_size: *queue_size,
        queues: num_queues.unwrap_or(queues),
        worker,
    })))
}

/// The NIC that `driver` describes, the `number`th of the VM; none if it describes something else.
pub(super) fn nic(
    id: &str,
    driver: &DeviceDriver,
    number: usize,
    config: &VmConfig,
    inherited: &Inherited,
    workers: &Workers,
) -> Result<Option<Net>, MachineError> {
    let DeviceDriver::VirtioNet { netdev, mac, iothread, multi_queue, queue_size } = driver else {
        return Ok(None);
    };
    let worker = workers.get(id, iothread.as_ref())?;
    let wanted = config.netdevs.iter().find(|n| n.id == *netdev);
    let netdev = wanted.ok_or_else(|| no_such(id, "netdev", netdev, "-netdev"))?;
    Ok(Some(Net::new(NetOptions {
        backend: Some(net::Backend::open(netdev, inherited)?),
        mac: mac.unwrap_or_else(|| net::default_mac(number as u8)),
        multi_queue: *multi_queue,
        queue_size: *queue_size,
        worker,
    })))
}
