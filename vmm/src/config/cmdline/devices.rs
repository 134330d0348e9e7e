//! `-device`: the devices of the guest.

use super::props::Props;
use super::{CmdlineError, Given, memory_devices};
use crate::config::{Device, DeviceDriver, HostAddress, VmConfig};

/// Drivers of this version, by their name on a machine without PCI.
const DRIVERS: [&str; 12] = [
    "virtio-blk-device",
    "virtio-net-device",
    "virtio-serial-device",
    "virtconsole",
    "virtserialport",
    "virtio-balloon-device",
    "virtio-rng-device",
    "vhost-vsock-device",
    "vhost-user-fs-device",
    "vhost-user-blk-device",
    "virtio-mem-device",
    "virtio-pmem-device",
];
/// Those of them that a machine with PCI has under the same name.
const WITHOUT_BUS: [&str; 2] = ["virtconsole", "virtserialport"];
const ROOT_PORT: &str = "pcie-root-port";
const HOST_DEVICE: &str = "vfio-pci";

/// Drivers that a later version will have.
const KNOWN: [&str; 11] = [
    "virtio-scsi-pci",
    "scsi-hd",
    "scsi-cd",
    "pvpanic",
    "nec-usb-xhci",
    "virtio-gpu-pci",
    "ramfb",
    "ivshmem-scream",
    "vhost-user-gpu-pci",
    "pcie-demo-dev",
    "usb-camera",
];
const KNOWN_PREFIXES: [&str; 3] = ["usb-", "virtio-input-", "virtio-multitouch-"];

/// Queue size when none is asked for.
const QUEUE_SIZE: u16 = 256;

/// Reads the options of this file out of `given` into `config`.
pub(super) fn read(given: &mut Given, config: &mut VmConfig) -> Result<(), CmdlineError> {
    let mut parsed = Vec::new();
    for text in given.many("-device") {
        parsed.push(device(&text, &config.iothreads)?);
    }
    let taken: Vec<String> = parsed.iter().filter_map(|(id, _, _)| id.clone()).collect();
    let mut made_up = 0usize;
    for (id, name, mut device) in parsed {
        device.id = id.unwrap_or_else(|| {
            loop {
                let id = format!("{name}.{made_up}");
                made_up += 1;
                if !taken.contains(&id) {
                    return id;
                }
            }
        });
        config.devices.push(device);
    }
    Ok(())
}

/// The device, its `id=` if it has one, and its driver's name.
fn device(text: &str, iothreads: &[String]) -> Result<(Option<String>, String, Device), CmdlineError> {
    let mut props = Props::parse("-device", text, Some("driver"))?;
    let Some(name) = props.word("driver")? else {
        return Err(props.bad("the driver is missing: write -device DRIVER,KEY=VALUE"));
    };
    // One model, whatever it is plugged into.
    let twin = name.strip_suffix("-pci").map(|stem| format!("{stem}-device"));
    let model = twin.filter(|twin| DRIVERS.contains(&twin.as_str()));
    let is_pci = model.is_some() || name == ROOT_PORT || name == HOST_DEVICE;
    let model = model.unwrap_or_else(|| name.clone());
    if !DRIVERS.contains(&model.as_str()) && !is_pci {
        let known = KNOWN.contains(&name.as_str()) || KNOWN_PREFIXES.iter().any(|p| name.starts_with(p));
        return Err(if known {
            props.unsupported(format!("device {name}"))
        } else {
            props.bad(format!("unknown driver '{name}': use {}", drivers().join(", ")))
        });
    }
    let id = props.id()?;
    let (bus, addr) = (props.text("bus")?, props.text("addr")?);
    let addr = match addr {
        None => None,
        Some(text) => Some(text.parse().map_err(|()| {
            props.bad(format!("addr={text}: write SLOT[.FUNCTION], slot up to 0x1f, function up to 0x7"))
        })?),
    };
    let multifunction = props.boolean("multifunction")?.unwrap_or(false);
    let driver = match model.as_str() {
        "virtio-blk-device" => virtio_blk(&mut props)?,
        "virtio-net-device" => virtio_net(&mut props, iothreads)?,
        "vhost-user-blk-device" => vhost_user_blk(&mut props)?,
        "virtio-mem-device" => memory_devices::mem(&mut props)?,
        "virtio-pmem-device" => memory_devices::pmem(&mut props)?,
        "vhost-user-fs-device" => {
            DeviceDriver::VhostUserFs { chardev: props.required("chardev")?, tag: props.required("tag")? }
        }
        ROOT_PORT => root_port(&mut props)?,
        HOST_DEVICE => host_device(&mut props)?,
        _ => super::small_devices::driver(&model, &mut props)?,
    };
    if is_pci {
        // What firmware reads, and there is none.
        props.text("romfile")?;
    }
    let missing = (is_pci && (bus.is_none() || addr.is_none())).then(|| {
        props.bad(format!("{name} needs 'bus' and 'addr': add bus=pcie.0,addr=0x0 for the first free slot"))
    });
    props.finish()?;
    if let Some(error) = missing {
        return Err(error);
    }
    Ok((id, name, Device { id: String::new(), bus, addr, multifunction, driver }))
}

/// What can be written after `-device`: under both names where both are there.
fn drivers() -> Vec<String> {
    let mut names: Vec<String> = DRIVERS.map(String::from).to_vec();
    let pci = DRIVERS.iter().filter(|name| !WITHOUT_BUS.contains(name));
    names.extend(pci.filter_map(|name| name.strip_suffix("-device")).map(|stem| format!("{stem}-pci")));
    names.extend([ROOT_PORT.to_owned(), HOST_DEVICE.to_owned()]);
    names
}

fn host_device(props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    let Some(text) = HostAddress::given(props.text("host")?, props.text("sysfsdev")?) else {
        return Err(props.bad("vfio-pci needs one of 'host' and 'sysfsdev': add host=DDDD:BB:SS.F"));
    };
    match text.parse() {
        Ok(host) => Ok(DeviceDriver::VfioPci { host }),
        Err(()) => Err(props.bad(format!("host={text}: write DDDD:BB:SS.F, like 0000:1a:00.3"))),
    }
}

fn root_port(props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    let port = props.number("port", 0..=255)?.and_then(|n| u8::try_from(n).ok());
    // Numbers of chassis tell slots of several boxes apart: there is one.
    props.number("chassis", 0..=255)?;
    Ok(DeviceDriver::PcieRootPort { port: port.unwrap_or(0) })
}

fn virtio_blk(props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    let drive = props.required("drive")?;
    let serial = props.text("serial")?;
    if serial.as_ref().is_some_and(|s| s.len() > 20) {
        return Err(props.bad("the serial number is longer than 20 bytes"));
    }
    Ok(DeviceDriver::VirtioBlk {
        drive,
        serial,
        iothread: props.text("iothread")?,
        num_queues: props.number("num-queues", 1..=32)?.and_then(|n| u16::try_from(n).ok()),
        queue_size: queue_size(props, 4..=1024)?,
        boot_index: props.number("bootindex", 0..=255)?.and_then(|n| u8::try_from(n).ok()),
    })
}

fn vhost_user_blk(props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    let chardev = props.required("chardev")?;
    let num_queues = props.number("num-queues", 1..=32)?.and_then(|n| u16::try_from(n).ok());
    // There is no firmware that would look for a disk to boot from.
    props.number("bootindex", 0..=255)?;
    Ok(DeviceDriver::VhostUserBlk {
        chardev,
        num_queues: num_queues.unwrap_or(1),
        queue_size: queue_size(props, 4..=1024)?,
    })
}

fn virtio_net(props: &mut Props, iothreads: &[String]) -> Result<DeviceDriver, CmdlineError> {
    let netdev = props.required("netdev")?;
    let mac = match props.text("mac")? {
        None => None,
        Some(text) => Some(mac(&text).ok_or_else(|| {
            props.bad(format!(
                "mac={text}: write six hexadecimal bytes like 52:54:00:12:34:56, not a group address"
            ))
        })?),
    };
    // One thread serves both directions: the first that is named.
    let mut iothread = None;
    for key in ["iothread", "rx-iothread", "tx-iothread"] {
        let Some(id) = props.text(key)? else { continue };
        if !iothreads.contains(&id) {
            return Err(props.bad(format!("{key} \"{id}\" not found: add -object iothread,id={id}")));
        }
        iothread.get_or_insert(id);
    }
    // Says how many interrupt vectors a PCI device has; scripts write it for every NIC.
    props.number("vectors", 0..=2048)?;
    Ok(DeviceDriver::VirtioNet {
        netdev,
        mac,
        iothread,
        multi_queue: props.boolean("mq")?.unwrap_or(false),
        queue_size: queue_size(props, 256..=4096)?,
    })
}

fn queue_size(props: &mut Props, range: std::ops::RangeInclusive<u16>) -> Result<u16, CmdlineError> {
    let (low, high) = (*range.start(), *range.end());
    match props.number("queue-size", u64::from(low)..=u64::from(high))? {
        None => Ok(QUEUE_SIZE),
        Some(n) if n.is_power_of_two() => Ok(u16::try_from(n).unwrap_or(QUEUE_SIZE)),
        Some(n) => Err(props.bad(format!("queue-size={n}: write a power of two from {low} to {high}"))),
    }
}

/// Six bytes in hexadecimal, not a group address: no NIC has one.
fn mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && !p.starts_with('+'))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PciAddr;

    #[test]
    fn reads_pci_addresses() {
        for (text, want) in [
            ("0x3", Some((3, 0))),
            ("0x1.0x0", Some((1, 0))),
            ("0x04.0x7", Some((4, 7))),
            ("31", Some((31, 0))),
            ("32", None),
            ("1.8", None),
            ("", None),
            (".", None),
            ("1.2.3", None),
        ] {
            let want = want.map(|(slot, function)| PciAddr { slot, function });
            assert_eq!(text.parse().ok(), want, "{text}");
        }
    }

    #[test]
    fn reads_mac_addresses() {
        assert_eq!(mac("52:54:00:12:34:ff"), Some([0x52, 0x54, 0, 0x12, 0x34, 0xff]));
        for text in
            ["", "52", "52:54:00:12:34", "52:54:00:12:34:56:78", "01:54:00:12:34:56", "zz:54:00:12:34:56"]
        {
            assert_eq!(mac(text), None, "{text}");
        }
        assert_eq!(mac("00:00:00:00:00:00"), None);
    }
}
