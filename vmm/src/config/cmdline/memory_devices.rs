//! `-device virtio-mem-*` and `virtio-pmem-*`: devices that bring memory.

use super::CmdlineError;
use super::props::{Props, size};
use crate::config::{DeviceDriver, MEMORY_BLOCK_MIN};

/// `virtio-mem-*`.
pub(super) fn mem(props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    let (memdev, memaddr) = place(props)?;
    let requested_size = bytes(props, "requested-size")?.unwrap_or(0);
    let block_size = bytes(props, "block-size")?.unwrap_or(MEMORY_BLOCK_MIN);
    let node = props.number("node", 0..=u64::from(u16::MAX))?.and_then(|n| u16::try_from(n).ok());
    Ok(DeviceDriver::VirtioMem { memdev, memaddr, requested_size, block_size, node: node.unwrap_or(0) })
}

/// `virtio-pmem-*`.
pub(super) fn pmem(props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    let (memdev, memaddr) = place(props)?;
    Ok(DeviceDriver::VirtioPmem { memdev, memaddr })
}

fn place(props: &mut Props) -> Result<(String, Option<u64>), CmdlineError> {
    let memdev = props.required("memdev")?;
    Ok((memdev, props.number("memaddr", 0..=u64::MAX)?))
}

/// `key=SIZE`.
fn bytes(props: &mut Props, key: &'static str) -> Result<Option<u64>, CmdlineError> {
    let Some(text) = props.text(key)? else { return Ok(None) };
    match size(&text) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(props.bad(format!("{key}={text}: write a whole number with K, M or G"))),
    }
}

#[cfg(test)]
mod tests {
    use crate::config::cmdline::{CmdlineError, Request, parse};
    use crate::config::{DeviceDriver, VmConfig};

    fn read(line: &str) -> Result<VmConfig, CmdlineError> {
        let line = format!("-kernel /k {line}");
        match parse(line.split_whitespace().map(Into::into))? {
            Request::Run(config) => Ok(*config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn objects_that_devices_name_are_not_guest_ram() {
        let config = read(
            "-m 512M -object memory-backend-ram,id=ram,size=512M -object memory-backend-ram,id=more,size=1G \
             -object memory-backend-file,id=disk,mem-path=/d,size=64M,share=on \
             -device virtio-mem-device,id=mem0,memdev=more,requested-size=256M,memaddr=0x200000000 \
             -device virtio-pmem-device,id=pmem0,memdev=disk",
        )
        .unwrap();
        let ids = |list: &[crate::config::MemoryBackend]| -> Vec<String> {
            list.iter().map(|b| b.id.clone()).collect()
        };
        assert_eq!(
            (ids(&config.memory.backends), ids(&config.device_memory)),
            (vec!["ram".to_owned()], vec!["more".to_owned(), "disk".to_owned()])
        );
        let drivers: Vec<_> = config.devices.iter().map(|d| d.driver.clone()).collect();
        let memory = |memdev: &str| memdev.to_owned();
        assert_eq!(
            drivers,
            [
                DeviceDriver::VirtioMem {
                    memdev: memory("more"),
                    memaddr: Some(0x2_0000_0000),
                    requested_size: 256 << 20,
                    block_size: 2 << 20,
                    node: 0,
                },
                DeviceDriver::VirtioPmem { memdev: memory("disk"), memaddr: None },
            ]
        );
        assert_eq!(config.snapshot_exclusion().as_deref(), Some("device \"mem0\": virtio-mem-device"));
    }

    #[test]
    fn other_processes_get_all_memory_or_none() {
        let shared = |line: &str| read(line).unwrap().memory_is_shared();
        let device = "-device virtio-mem-device,memdev=m";
        // The object of a device says nothing of RAM.
        assert!(!shared(&format!("-object memory-backend-memfd,id=m,size=1G {device}")));
        assert!(shared(&format!(
            "-machine microvm,mem-share=on -object memory-backend-ram,id=m,size=1G {device}"
        )));
        assert!(!shared(&format!(
            "-object memory-backend-memfd,id=r,size=256M -object memory-backend-ram,id=m,size=1G {device}"
        )));
    }

    #[test]
    fn what_makes_no_sense() {
        let ram = |options: &str| format!("-object memory-backend-ram,id=m,size=1G{options}");
        let file = |options: &str| format!("-object memory-backend-file,id=m,mem-path=/f,{options}");
        let mem = |options: &str| format!("{} -device virtio-mem-device,id=d,memdev=m{options}", ram(""));
        let pmem = "-device virtio-pmem-device,id=d,memdev=m";
        for (line, want) in [
            ("-device virtio-mem-device,id=d".to_owned(), "'memdev' is missing"),
            (
                "-device virtio-mem-device,id=d,memdev=m".to_owned(),
                "memdev \"m\" not found: add -object memory-backend-ram",
            ),
            (
                "-device virtio-pmem-device,id=d,memdev=m".to_owned(),
                "memdev \"m\" not found: add -object memory-backend-file",
            ),
            (format!("{} -device virtio-mem-device,memdev=m", mem("")), "is used by another device already"),
            (mem(",block-size=1M"), "write a power of two, 2M at least"),
            (mem(",block-size=3M"), "write a power of two, 2M at least"),
            (mem(",block-size=2G"), "are not a number of blocks of 2147483648 bytes"),
            (mem(",block-size=x"), "block-size=x: write a whole number"),
            (mem(",requested-size=2G"), "at most the size of \"m\""),
            (mem(",requested-size=3M"), "write a multiple of block-size"),
            (mem(",memaddr=0x100001000"), "is not a multiple of block-size"),
            (mem(",node=1"), "the VM has no such node"),
            (format!("{} -device virtio-mem-device,memdev=m", ram(",prealloc=on")), "leave out prealloc"),
            (format!("{} {pmem}", ram("")), "use memory-backend-file"),
            (format!("{} {pmem}", file("size=64M")), "add share=on, or readonly=on"),
            (format!("{} {pmem}", file("size=64M,share=on,readonly=on")), "exclude each other"),
            (format!("{} {pmem}", file("size=3M,share=on")), "must be a multiple of 2M"),
            (format!("{} {pmem},memaddr=0x100001000", file("size=64M,share=on")), "is not a multiple of 2M"),
            (file("size=256M,readonly=on"), "guest memory must be writable"),
            (ram(",readonly=on"), "'readonly' belongs to memory-backend-file"),
            (format!("{} {}", ram(""), mem("")), "memory object \"m\" has been added already"),
            (
                format!(
                    "-machine q35 {} -device virtio-mem-pci,id=d,memdev=m,bus=pcie.0,addr=2 -device vfio-pci,id=v,host=0000:00:05.0,bus=pcie.0,addr=3",
                    ram("")
                ),
                "device \"v\": a device of the host does not reach the memory that device \"d\" brings",
            ),
            (
                format!(
                    "-machine q35 {} -device pcie-root-port,id=p,bus=pcie.0,addr=1 -device virtio-mem-pci,id=d,memdev=m,bus=p,addr=0",
                    ram("")
                ),
                "device \"d\" brings memory, which cannot leave a running VM: write bus=pcie.0",
            ),
        ] {
            let error = read(&line).unwrap_err().to_string();
            assert!(error.contains(want), "{line}: {error}");
        }
    }
}
