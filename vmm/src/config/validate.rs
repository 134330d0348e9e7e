//! Every rule about a [`VmConfig`] that needs more than one option to be known, and the ranges of the numbers that matter to it.
//!
//! The parser guarantees the shape of each value; this file guarantees that they fit together and that the machine asked for
//! can be built by this version. It looks at nothing on the host.

use std::collections::BTreeSet;

use super::invalid::{InvalidConfig, bad};
use super::{
    Aio, ChardevKind, Device, DeviceDriver, Drive, ImageFormat, MAX_CPUS, MEMORY_MAX, MEMORY_MIN,
    MICROVM_BLOCK_SLOTS, MICROVM_NET_SLOTS, MachineKind, Monitor, NetBackend, TapSource, VmConfig,
};

/// Most `-object iothread`.
const IOTHREADS_MAX: usize = 8;
/// Longest interface name (IFNAMSIZ without its zero byte).
const IFNAME_MAX: usize = 15;

pub(super) fn validate(config: &VmConfig) -> Result<(), InvalidConfig> {
    board(config)?;
    memory(config)?;
    super::numa::validate(config)?;
    drives(config)?;
    netdevs(config)?;
    chardevs(config)?;
    devices(config)?;
    super::memory_devices::validate(config)?;
    super::vhost_user::validate(config)?;
    if config.incoming.is_some()
        && let Some(what) = config.snapshot_exclusion()
    {
        return bad(format!("-incoming: {what} cannot be used with snapshots: leave it out"));
    }
    process(config)
}

fn unique<'a>(what: &str, ids: impl Iterator<Item = &'a str>) -> Result<(), InvalidConfig> {
    let mut seen = BTreeSet::new();
    for id in ids {
        if !seen.insert(id) {
            return bad(format!("{what} \"{id}\" has been added already: ids must differ"));
        }
    }
    Ok(())
}

fn board(config: &VmConfig) -> Result<(), InvalidConfig> {
    let has_guest = config.machine.kind != MachineKind::None;
    if config.machine.kind == MachineKind::Virt {
        return bad("-machine virt is not supported in this version: use microvm or q35");
    }
    let smp = &config.smp;
    if smp.cpus == 0 || smp.max_cpus > MAX_CPUS || smp.cpus > smp.max_cpus {
        return bad(format!(
            "-smp: {} vCPUs at boot and {} at most: write 1 to {MAX_CPUS}, and no more than maxcpus",
            smp.cpus, smp.max_cpus
        ));
    }
    let product = [smp.sockets, smp.dies, smp.clusters, smp.cores, smp.threads]
        .iter()
        .fold(1u64, |product, n| product * u64::from(*n));
    if product != u64::from(smp.max_cpus) {
        return bad(format!(
            "-smp: sockets * dies * clusters * cores * threads must be equal to max_cpus, but {} * {} * {} * {} * {} is not {}",
            smp.sockets, smp.dies, smp.clusters, smp.cores, smp.threads, smp.max_cpus
        ));
    }
    if !(MEMORY_MIN..=MEMORY_MAX).contains(&config.memory.size) {
        return bad(format!(
            "-m: memory size {} should be in the range of [{MEMORY_MIN}, {MEMORY_MAX}] bytes (128M to 512G)",
            config.memory.size
        ));
    }
    firmware(config)?;
    if has_guest && config.boot.kernel.is_none() && config.flash.is_empty() {
        return bad("a kernel is needed: add -kernel FILE");
    }
    if !has_guest && !config.devices.is_empty() {
        return bad("-machine none has no guest: leave out -device, or use -machine microvm");
    }
    if config.iothreads.len() > IOTHREADS_MAX {
        return bad(format!(
            "-object iothread: {} are too many: at most {IOTHREADS_MAX}",
            config.iothreads.len()
        ));
    }
    unique("iothread", config.iothreads.iter().map(String::as_str))
}

fn firmware(config: &VmConfig) -> Result<(), InvalidConfig> {
    let Some(first) = config.flash.first() else { return Ok(()) };
    if config.machine.kind != MachineKind::Q35 {
        return bad(format!("drive \"{}\": if=pflash is for -machine q35: leave it out", first.id));
    }
    let mut units = BTreeSet::new();
    for drive in &config.flash {
        if !units.insert(drive.pflash_unit) {
            let unit = drive.pflash_unit.unwrap_or_default();
            return bad(format!(
                "drive \"{}\": there is a pflash with unit={unit} already: leave one of them out",
                drive.id
            ));
        }
    }
    if !units.contains(&Some(0)) {
        return bad(format!(
            "drive \"{}\": the firmware itself is missing: add -drive if=pflash,unit=0,readonly=on,file=FIRMWARE",
            first.id
        ));
    }
    Ok(())
}

fn memory(config: &VmConfig) -> Result<(), InvalidConfig> {
    let memory = &config.memory;
    // NUMA nodes have rules of their own.
    let Some(backend) = memory.backends.first().filter(|_| config.numa.nodes.is_empty()) else {
        return Ok(());
    };
    let id = &backend.id;
    if let Some(second) = memory.backends.get(1) {
        return bad(format!(
            "memory object \"{}\": guest memory comes from \"{id}\" already: leave one of them out",
            second.id
        ));
    }
    if memory.path.is_some() {
        return bad(format!(
            "memory object \"{id}\" and -mem-path exclude each other: leave out -mem-path, or the object"
        ));
    }
    if backend.size != memory.size {
        return bad(format!(
            "memory object \"{id}\": its size of {} bytes must be that of the guest memory (-m), {} bytes",
            backend.size, memory.size
        ));
    }
    Ok(())
}

fn drives(config: &VmConfig) -> Result<(), InvalidConfig> {
    unique("drive", config.drives.iter().chain(&config.flash).map(|d| d.id.as_str()))?;
    config.drives.iter().try_for_each(drive)
}

pub(super) fn drive(drive: &Drive) -> Result<(), InvalidConfig> {
    let id = &drive.id;
    match drive.aio {
        Some(Aio::Native) if !drive.direct => {
            return bad(format!(
                "drive \"{id}\": aio=native should be used with direct=on: add direct=on, or leave out aio"
            ));
        }
        Some(Aio::Off) if drive.direct => {
            return bad(format!(
                "drive \"{id}\": aio=off with direct=on gives low performance: use aio=native or direct=off"
            ));
        }
        _ => {}
    }
    if drive.pflash_unit.is_some() {
        return bad(format!("drive \"{id}\": if=pflash is for the command line only"));
    }
    if drive.format == ImageFormat::Raw && !drive.backing.is_empty() {
        return bad(format!("drive \"{id}\": a raw image has no backing file: add format=qcow2"));
    }
    Ok(())
}

fn netdevs(config: &VmConfig) -> Result<(), InvalidConfig> {
    unique("netdev", config.netdevs.iter().map(|n| n.id.as_str()))?;
    let mut fds = BTreeSet::new();
    let mut names = BTreeSet::new();
    for netdev in &config.netdevs {
        let id = &netdev.id;
        let NetBackend::Tap { source, queues, vhost, vhost_fds, path } = &netdev.backend else { continue };
        if !*vhost && !vhost_fds.is_empty() {
            return bad(format!(
                "netdev \"{id}\": 'vhostfd' and 'vhostfds' are not needed for a virtio-net device: add vhost=on, or leave them out"
            ));
        }
        if !vhost_fds.is_empty() && vhost_fds.len() != usize::from(*queues) {
            return bad(format!(
                "netdev \"{id}\": {} vhost descriptors for {queues} queue pairs: give one for each",
                vhost_fds.len()
            ));
        }
        if let Some(fd) = vhost_fds.iter().find(|fd| !fds.insert(**fd)) {
            return bad(format!("netdev \"{id}\": descriptor {fd} is used already"));
        }
        match source {
            TapSource::Name(name) => {
                let odd = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control();
                if name.is_empty()
                    || name.len() > IFNAME_MAX
                    || name.contains(odd)
                    || name == "."
                    || name == ".."
                {
                    return bad(format!(
                        "netdev \"{id}\": \"{name}\" is no interface name of 1 to {IFNAME_MAX} bytes"
                    ));
                }
                if !names.insert(name) {
                    return bad(format!("netdev \"{id}\": tap {name} is used by another netdev already"));
                }
            }
            TapSource::Fds(_) if path.is_some() => {
                return bad(format!(
                    "netdev \"{id}\": 'path' is where a tap of a name is opened, and its descriptors are given: leave it out"
                ));
            }
            TapSource::Fds(list) => {
                if let Some(fd) = list.iter().find(|fd| !fds.insert(**fd)) {
                    return bad(format!(
                        "netdev \"{id}\": descriptor {fd} is used by another netdev already"
                    ));
                }
            }
        }
    }
    Ok(())
}

fn chardevs(config: &VmConfig) -> Result<(), InvalidConfig> {
    unique("chardev", config.chardevs.iter().map(|c| c.id.as_str()))?;
    let mut users = BTreeSet::new();
    let mut claim = |id: &str, user: &str| {
        if !config.chardevs.iter().any(|c| c.id == id) {
            return bad(format!("{user}: chardev \"{id}\" not found: add -chardev …,id={id}"));
        }
        if !users.insert(id.to_owned()) {
            return bad(format!("{user}: chardev \"{id}\" is used by something else already"));
        }
        Ok(())
    };
    if let Some(ChardevKind::Ref(id)) = &config.serial {
        claim(id, "-serial")?;
    }
    for monitor in &config.monitors {
        if let Monitor::Chardev(id) = monitor {
            claim(id, "-mon")?;
        }
    }
    for Device { id, driver, .. } in &config.devices {
        if let DeviceDriver::VirtConsole { chardev, .. }
        | DeviceDriver::VirtSerialPort { chardev, .. }
        | DeviceDriver::VhostUserFs { chardev, .. }
        | DeviceDriver::VhostUserBlk { chardev, .. } = driver
        {
            claim(chardev, &format!("device \"{id}\""))?;
        }
    }
    for netdev in &config.netdevs {
        if let Some(chardev) = netdev.vhost_user_chardev() {
            claim(chardev, &format!("netdev \"{}\"", netdev.id))?;
        }
    }
    let all = || config.chardevs.iter().map(|c| &c.kind).chain(&config.serial);
    if all().filter(|kind| **kind == ChardevKind::Stdio).count() > 1 {
        return bad("stdio can be used by one chardev or serial port only");
    }
    let mut paths: Vec<_> = all()
        .filter_map(|kind| match kind {
            ChardevKind::UnixSocket { path, server: true, .. } => Some(path),
            _ => None,
        })
        .collect();
    paths.extend(config.monitors.iter().filter_map(|m| match m {
        Monitor::Unix(path) => Some(path),
        _ => None,
    }));
    let mut seen = BTreeSet::new();
    match paths.into_iter().find(|path| !seen.insert(*path)) {
        Some(path) => bad(format!("two sockets have the path {}: each needs its own", path.display())),
        None => Ok(()),
    }
}

fn devices(config: &VmConfig) -> Result<(), InvalidConfig> {
    unique("device", config.devices.iter().map(|d| d.id.as_str()))?;
    unique("rng object", config.rngs.iter().map(|r| r.id.as_str()))?;
    config.serial_ports()?;
    let has_pci = config.machine.kind == MachineKind::Q35;
    if has_pci {
        config.pci_places()?;
    }
    let mut balloon = false;
    let (mut drives, mut netdevs) = (BTreeSet::new(), BTreeSet::new());
    let (mut cids, mut vsock_fds) = (BTreeSet::new(), BTreeSet::new());
    let mut hosts = BTreeSet::new();
    for device in &config.devices {
        let Device { id, driver, .. } = device;
        if !has_pci && (device.is_pci() || device.multifunction) {
            return bad(format!(
                "device \"{id}\": 'bus', 'addr' and 'multifunction' belong to PCI devices: leave them out on a microvm"
            ));
        }
        let iothread = match driver {
            DeviceDriver::VirtioBlk { drive, iothread, .. } => {
                if !config.drives.iter().any(|d| d.id == *drive) {
                    return bad(format!(
                        "device \"{id}\": drive \"{drive}\" not found: add -drive id={drive},file=…"
                    ));
                }
                if !drives.insert(drive) {
                    return bad(format!(
                        "device \"{id}\": drive \"{drive}\" is used by another device already"
                    ));
                }
                iothread
            }
            DeviceDriver::VirtioNet { netdev, iothread, .. } => {
                if !config.netdevs.iter().any(|n| n.id == *netdev) {
                    return bad(format!(
                        "device \"{id}\": netdev \"{netdev}\" not found: add -netdev tap,id={netdev},ifname=…"
                    ));
                }
                if !netdevs.insert(netdev) {
                    return bad(format!(
                        "device \"{id}\": netdev \"{netdev}\" is used by another device already"
                    ));
                }
                iothread
            }
            DeviceDriver::VirtioRng { rng, .. } => {
                if !config.rngs.iter().any(|r| r.id == *rng) {
                    return bad(format!(
                        "device \"{id}\": rng \"{rng}\" not found: add -object rng-random,id={rng},filename=/dev/urandom"
                    ));
                }
                &None
            }
            DeviceDriver::VirtioBalloon { .. } => {
                if std::mem::replace(&mut balloon, true) {
                    return bad(format!("device \"{id}\": a VM has one balloon only"));
                }
                &None
            }
            DeviceDriver::VfioPci { host } => {
                if let Some(other) = config.devices.iter().find(|d| d.driver.memory().is_some()) {
                    return bad(format!(
                        "device \"{id}\": a device of the host does not reach the memory that device \"{}\" brings: leave one of them out",
                        other.id
                    ));
                }
                if !hosts.insert(host.as_str()) {
                    return bad(format!(
                        "device \"{id}\": host device {host} is used by another device already"
                    ));
                }
                &None
            }
            DeviceDriver::PcieRootPort { .. }
            | DeviceDriver::VhostUserFs { .. }
            | DeviceDriver::VhostUserBlk { .. }
            | DeviceDriver::VirtioMem { .. }
            | DeviceDriver::VirtioPmem { .. }
            | DeviceDriver::VirtioSerial { .. }
            | DeviceDriver::VirtConsole { .. }
            | DeviceDriver::VirtSerialPort { .. } => &None,
            DeviceDriver::VhostVsock { guest_cid, vhost_fd } => {
                if !cids.insert(*guest_cid) {
                    return bad(format!(
                        "device \"{id}\": guest-cid={guest_cid} is used by another device already"
                    ));
                }
                let taken = config.netdevs.iter().any(|n| match &n.backend {
                    NetBackend::Tap { source, vhost_fds, .. } => vhost_fd.is_some_and(|fd| {
                        vhost_fds.contains(&fd) || matches!(source, TapSource::Fds(fds) if fds.contains(&fd))
                    }),
                    NetBackend::VhostUser { .. } => false,
                });
                if let Some(fd) = vhost_fd
                    && (taken || !vsock_fds.insert(*fd))
                {
                    return bad(format!("device \"{id}\": descriptor {fd} is used already"));
                }
                &None
            }
        };
        if let Some(name) = iothread
            && !config.iothreads.contains(name)
        {
            return bad(format!(
                "device \"{id}\": iothread \"{name}\" not found: add -object iothread,id={name}"
            ));
        }
    }
    if has_pci {
        return Ok(());
    }
    if drives.len() > MICROVM_BLOCK_SLOTS {
        return bad(format!(
            "{} block devices are too many: a microvm has {MICROVM_BLOCK_SLOTS}",
            drives.len()
        ));
    }
    let own_slots = config.netdevs.iter().filter(|n| n.vhost_user_chardev().is_some());
    let replaceable = netdevs.len() - own_slots.filter(|n| netdevs.contains(&n.id)).count();
    if replaceable > MICROVM_NET_SLOTS {
        return bad(format!("{replaceable} network devices are too many: a microvm has {MICROVM_NET_SLOTS}"));
    }
    Ok(())
}

fn process(config: &VmConfig) -> Result<(), InvalidConfig> {
    let process = &config.process;
    if process.pidfile.is_some() && !process.daemonize {
        return bad("-pidfile must be used with -daemonize together");
    }
    let stdio =
        config.chardevs.iter().map(|c| &c.kind).chain(&config.serial).any(|k| *k == ChardevKind::Stdio);
    if process.daemonize && stdio {
        return bad("stdio and -daemonize can't be set together: use a socket, a pty or a file");
    }
    Ok(())
}
