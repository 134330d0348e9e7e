//! Memory that devices bring (virtio-mem, virtio-pmem): which memory objects are theirs and not guest RAM, and what fits together. Pure.
//!
//! Where such memory lies in the guest's addresses is decided where RAM's place is, in `memory`.

use std::collections::BTreeSet;

use super::invalid::{InvalidConfig, bad};
use super::{Device, DeviceDriver, MEMORY_MAX, MemoryBackend, MemoryBackendKind, VmConfig};

/// Smallest block of virtio-mem, and the unit of virtio-pmem, in bytes: a huge page. Linux hands out nothing smaller either.
pub const MEMORY_BLOCK_MIN: u64 = 2 << 20;
/// Most devices with memory. Back ends in other processes know eight regions at least, and RAM may be two.
const MEMORY_DEVICES_MAX: usize = 6;

impl DeviceDriver {
    /// The memory object that a device of this driver brings (`memdev=`), and where it is to lie (`memaddr=`).
    pub fn memory(&self) -> Option<(&str, Option<u64>)> {
        match self {
            Self::VirtioMem { memdev, memaddr, .. } | Self::VirtioPmem { memdev, memaddr } => {
                Some((memdev, *memaddr))
            }
            _ => None,
        }
    }
}

impl VmConfig {
    /// Memory objects that devices name become theirs; the others stay guest RAM's.
    pub(super) fn claim_device_memory(&mut self) {
        let named: BTreeSet<&str> =
            self.devices.iter().filter_map(|d| d.driver.memory()).map(|(memdev, _)| memdev).collect();
        if !named.is_empty() {
            let objects = std::mem::take(&mut self.memory.backends).into_iter();
            (self.device_memory, self.memory.backends) = objects.partition(|b| named.contains(b.id.as_str()));
        }
    }
}

/// Checks all of them.
pub(super) fn validate(config: &VmConfig) -> Result<(), InvalidConfig> {
    if let Some(object) = config.memory.backends.iter().find(|b| b.readonly) {
        return bad(format!(
            "memory object \"{}\": guest memory must be writable: leave out readonly, which is for virtio-pmem",
            object.id
        ));
    }
    let objects = config.memory.backends.iter().chain(&config.device_memory);
    let mut ids = BTreeSet::new();
    if let Some(twice) = objects.map(|b| &b.id).find(|id| !ids.insert(*id)) {
        return bad(format!("memory object \"{twice}\" has been added already: ids must differ"));
    }
    let mut used = BTreeSet::new();
    for Device { id, driver, .. } in &config.devices {
        let Some((memdev, _)) = driver.memory() else { continue };
        let Some(object) = config.device_memory.iter().find(|b| b.id == memdev) else {
            let kind = if matches!(driver, DeviceDriver::VirtioPmem { .. }) { "file" } else { "ram" };
            return bad(format!(
                "device \"{id}\": memdev \"{memdev}\" not found: add -object memory-backend-{kind},id={memdev},size=…"
            ));
        };
        if !used.insert(memdev) {
            return bad(format!("device \"{id}\": memdev \"{memdev}\" is used by another device already"));
        }
        if used.len() > MEMORY_DEVICES_MAX {
            return bad(format!(
                "device \"{id}\": too many devices with memory: a VM has {MEMORY_DEVICES_MAX} at most"
            ));
        }
        if object.prealloc {
            return bad(format!(
                "device \"{id}\": memory object \"{memdev}\": such memory is not filled beforehand: leave out prealloc"
            ));
        }
        match driver {
            DeviceDriver::VirtioMem { .. } => mem(config, id, driver, object)?,
            _ => pmem(id, driver, object)?,
        }
    }
    Ok(())
}

fn mem(
    config: &VmConfig,
    id: &str,
    driver: &DeviceDriver,
    object: &MemoryBackend,
) -> Result<(), InvalidConfig> {
    let DeviceDriver::VirtioMem { memaddr, requested_size, block_size, node, .. } = driver else {
        return Ok(());
    };
    let (block, memdev) = (*block_size, &object.id);
    if !block.is_power_of_two() || block < MEMORY_BLOCK_MIN {
        return bad(format!(
            "device \"{id}\": block-size of {block} bytes: write a power of two, 2M at least"
        ));
    }
    if object.readonly {
        return bad(format!(
            "device \"{id}\": memory object \"{memdev}\": guest memory must be writable: leave out readonly"
        ));
    }
    if object.size == 0 || object.size > MEMORY_MAX || !object.size.is_multiple_of(block) {
        return bad(format!(
            "device \"{id}\": memory object \"{memdev}\": {} bytes are not a number of blocks of {block} bytes, or more than 512G",
            object.size
        ));
    }
    if *requested_size > object.size || !requested_size.is_multiple_of(block) {
        return bad(format!(
            "device \"{id}\": requested-size of {requested_size} bytes: write a multiple of block-size ({block} bytes), at most the size of \"{memdev}\" ({} bytes)",
            object.size
        ));
    }
    if let Some(at) = memaddr.filter(|at| !at.is_multiple_of(block)) {
        return bad(format!(
            "device \"{id}\": memaddr={at:#x} is not a multiple of block-size ({block} bytes)"
        ));
    }
    // Without -numa there is one node, number 0.
    let nodes = config.numa.nodes.len().max(1);
    if usize::from(*node) >= nodes {
        return bad(format!(
            "device \"{id}\": node={node}: the VM has no such node: write a number below {nodes}"
        ));
    }
    Ok(())
}

fn pmem(id: &str, driver: &DeviceDriver, object: &MemoryBackend) -> Result<(), InvalidConfig> {
    let memdev = &object.id;
    if !matches!(object.kind, MemoryBackendKind::File(_)) {
        return bad(format!(
            "device \"{id}\": memory object \"{memdev}\" is no file, so nothing in it would last: use memory-backend-file"
        ));
    }
    if object.share == object.readonly {
        return bad(if object.share {
            format!(
                "device \"{id}\": memory object \"{memdev}\": share=on and readonly=on exclude each other"
            )
        } else {
            format!(
                "device \"{id}\": memory object \"{memdev}\": what the guest writes would not reach the file: add share=on, or readonly=on"
            )
        });
    }
    if object.size == 0 || object.size > MEMORY_MAX || !object.size.is_multiple_of(MEMORY_BLOCK_MIN) {
        return bad(format!(
            "device \"{id}\": memory object \"{memdev}\": its size of {} bytes must be a multiple of 2M, at most 512G",
            object.size
        ));
    }
    match driver.memory() {
        Some((_, Some(at))) if !at.is_multiple_of(MEMORY_BLOCK_MIN) => {
            bad(format!("device \"{id}\": memaddr={at:#x} is not a multiple of 2M"))
        }
        _ => Ok(()),
    }
}
