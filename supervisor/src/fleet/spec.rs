//! Rules for definitions that need more than types: owns what a name, a size, a path or an address may be. One place; the same rules
//! hold for what comes over D-Bus and for what is read back from disk.

use std::path::Path;

use dbus_api::spec::{Aio, Format, Limits, Machine, Nic, VmSpec};
use uuid::Uuid;

use super::FleetError;

/// Places that a board has for devices which come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// A microvm's slots: some for disks, some for cards.
    Slots {
        /// For disks.
        disks: u8,
        /// For cards.
        nics: u8,
    },
    /// A q35's root ports: any device into any of them. More of them cost each boot time, as a guest looks behind every one.
    Ports(u8),
}

/// The places of a board.
pub fn room(machine: Machine) -> Room {
    match machine {
        Machine::Microvm => Room::Slots { disks: 6, nics: 2 },
        Machine::Q35 => Room::Ports(16),
    }
}

const MEMORY: std::ops::RangeInclusive<u64> = 128 << 20..=512 << 30;

fn wrong(text: String) -> FleetError {
    FleetError::InvalidSpec(text)
}

/// Longest name of a VM: with `fl-` before it, it is the user that its unit runs as, and those have at most 31 characters.
const NAME_MAX: usize = 28;

/// Checks a VM's name: it becomes a file name, a unit name, a directory and the name of a user.
pub fn check_name(name: &str) -> Result<(), FleetError> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    let bad = name.is_empty() || name.len() > NAME_MAX || !name.chars().all(allowed) || name.starts_with('-');
    if bad {
        return Err(wrong(format!(
            "name {name:?}: use 1 to {NAME_MAX} of a-z, 0-9, '-', '_', beginning with a letter, digit or '_'"
        )));
    }
    Ok(())
}

/// Reads a definition as it comes over D-Bus and checks it.
pub fn parse(text: &str) -> Result<VmSpec, FleetError> {
    let spec: VmSpec = serde_json::from_str(text).map_err(|error| wrong(format!("definition: {error}")))?;
    check(&spec)?;
    Ok(spec)
}

/// Checks everything that does not depend on the host's present state; files are looked at when the VM starts.
pub fn check(spec: &VmSpec) -> Result<(), FleetError> {
    if !(1..=254).contains(&spec.cpus) {
        return Err(wrong(format!("cpus: {} is outside 1 to 254", spec.cpus)));
    }
    if !MEMORY.contains(&spec.memory.0) || !spec.memory.0.is_multiple_of(1 << 20) {
        return Err(wrong(format!("memory: {} is not a number of whole MiB from 128M to 512G", spec.memory)));
    }
    check_boot(spec)?;
    if let Some(append) = &spec.append {
        // The x86 boot protocol gives 2048 bytes with the end mark; the VMM adds its devices to them.
        if append.len() > 1536 || append.contains(|c: char| c.is_control()) {
            return Err(wrong(
                "append: at most 1536 bytes and no control characters, as the kernel reads one line"
                    .to_owned(),
            ));
        }
    }
    check_room(spec)?;
    for (at, disk) in spec.disks.iter().enumerate() {
        check_path(&format!("disks[{at}].path"), &disk.path)?;
        if spec.disks[..at].iter().any(|other| other.path == disk.path) {
            return Err(wrong(format!("disks[{at}].path: {} is given twice", disk.path.display())));
        }
        if let Some(backing) = &disk.backing {
            check_path(&format!("disks[{at}].backing"), backing)?;
            if disk.format != Format::Qcow2 {
                return Err(wrong(format!("disks[{at}].backing: only a qcow2 image lies over another one")));
            }
            if spec.disks.iter().any(|other| !other.readonly && other.path == *backing) {
                return Err(wrong(format!("disks[{at}].backing: {} is a disk too", backing.display())));
            }
        } else if disk.backing_format != Format::Raw {
            return Err(wrong(format!("disks[{at}].backing_format: there is no backing")));
        }
        if disk.aio == Some(Aio::Native) && !disk.direct {
            return Err(wrong(format!(
                "disks[{at}].aio: native needs direct = true, as the kernel's AIO does"
            )));
        }
        if disk.iops.is_some_and(|iops| !(1..=1_000_000).contains(&iops)) {
            return Err(wrong(format!("disks[{at}].iops: use 1 to 1000000 requests per second")));
        }
        if let Some(serial) = &disk.serial {
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if serial.is_empty() || serial.len() > 20 || !serial.chars().all(allowed) {
                return Err(wrong(format!(
                    "disks[{at}].serial: {serial:?}: use 1 to 20 letters, digits, '-', '_' or '.'"
                )));
            }
        }
    }
    let mut macs = Vec::new();
    for (at, nic) in spec.nics.iter().enumerate() {
        match &nic.network {
            None if nic.bridge.is_empty() => {
                return Err(wrong(format!("nics[{at}]: name its network, or a bridge")));
            }
            None => check_link_name(&format!("nics[{at}].bridge"), &nic.bridge)?,
            Some(_) if !nic.bridge.is_empty() => {
                return Err(wrong(format!("nics[{at}]: network and bridge are both given: name one")));
            }
            Some(network) => check_name(network)
                .map_err(|error| error.map(|text| format!("nics[{at}].network: {text}")))?,
        }
        if let Some(text) = &nic.mac {
            let mac = parse_mac(text).ok_or_else(|| {
                wrong(format!("nics[{at}].mac: {text:?} is not a unicast address such as 52:54:00:12:34:56"))
            })?;
            if macs.contains(&mac) {
                return Err(wrong(format!("nics[{at}].mac: {text} is given twice")));
            }
            macs.push(mac);
        }
    }
    check_numbers("disks", &spec.disks.iter().map(|disk| disk.number).collect::<Vec<_>>())?;
    check_numbers("nics", &spec.nics.iter().map(|nic| nic.number).collect::<Vec<_>>())?;
    if spec.labels.len() > 64 || spec.labels.iter().any(|(key, value)| key.len() > 64 || value.len() > 256) {
        return Err(wrong("labels: at most 64, keys of 64 and values of 256 bytes".to_owned()));
    }
    if spec.autostart_delay > 3600 {
        return Err(wrong(format!(
            "autostart_delay: {} seconds are more than an hour",
            spec.autostart_delay
        )));
    }
    if !(1..=900).contains(&spec.host_shutdown_timeout) {
        return Err(wrong(format!(
            "host_shutdown_timeout: {} is outside 1 to 900 seconds",
            spec.host_shutdown_timeout
        )));
    }
    check_limits(&spec.limits, spec.memory.0)?;
    if spec.uuid.is_some_and(|uuid| uuid.is_nil()) {
        return Err(wrong("uuid: all zero is no identity".to_owned()));
    }
    Ok(())
}

/// What the VM boots: a kernel, or what its firmware finds.
fn check_boot(spec: &VmSpec) -> Result<(), FleetError> {
    if spec.kernel.is_none() {
        if spec.firmware.is_none() {
            return Err(wrong("kernel: name one (a q35 can do with firmware)".to_owned()));
        }
        for (field, given) in [("initrd", spec.initrd.is_some()), ("append", spec.append.is_some())] {
            if given {
                return Err(wrong(format!("{field}: it belongs to a kernel, and none is named")));
            }
        }
    }
    let kernel = spec.kernel.iter().map(|path| ("kernel", path));
    for (field, path) in kernel.chain(spec.initrd.iter().map(|path| ("initrd", path))) {
        check_path(field, path)?;
    }
    let Some(firmware) = &spec.firmware else { return Ok(()) };
    if spec.machine != Machine::Q35 {
        return Err(wrong(format!("firmware: a {} has none, use machine q35", spec.machine.word())));
    }
    for (field, path) in [("firmware.code", &firmware.code), ("firmware.vars", &firmware.vars)] {
        check_path(field, path)?;
        if spec.disks.iter().any(|disk| disk.path == *path) {
            return Err(wrong(format!("{field}: {} is a disk too", path.display())));
        }
    }
    if firmware.code == firmware.vars {
        return Err(wrong("firmware.vars: it is the code, which nobody writes to".to_owned()));
    }
    Ok(())
}

fn check_room(spec: &VmSpec) -> Result<(), FleetError> {
    let (given, board) = ((spec.disks.len(), spec.nics.len()), spec.machine.word());
    match room(spec.machine) {
        Room::Slots { disks, .. } if given.0 > usize::from(disks) => {
            Err(wrong(format!("disks: {} given, {board} has {disks} slots", given.0)))
        }
        Room::Slots { nics, .. } if given.1 > usize::from(nics) => {
            Err(wrong(format!("nics: {} given, {board} has {nics} slots", given.1)))
        }
        Room::Ports(ports) if given.0 + given.1 > usize::from(ports) => {
            Err(wrong(format!("disks, nics: {} given, {board} has {ports} ports", given.0 + given.1)))
        }
        _ => Ok(()),
    }
}

/// Numbers of devices are below this.
pub const NUMBERS: u8 = 32;

fn check_numbers(list: &str, numbers: &[Option<u8>]) -> Result<(), FleetError> {
    for (at, number) in numbers.iter().enumerate() {
        let Some(number) = *number else { continue };
        if number >= NUMBERS {
            return Err(wrong(format!("{list}[{at}].number: {number} is above {}", NUMBERS - 1)));
        }
        if numbers[..at].contains(&Some(number)) {
            return Err(wrong(format!("{list}[{at}].number: {number} is given twice")));
        }
    }
    Ok(())
}

/// The VMM's own memory beside the guest's: below this no VM comes up.
const OVERHEAD: u64 = 32 << 20;

fn check_limits(limits: &Limits, memory: u64) -> Result<(), FleetError> {
    let range = |field: &str, value: Option<u32>, low: u32, high: u32| match value {
        Some(value) if !(low..=high).contains(&value) => {
            Err(wrong(format!("limits.{field}: {value} is outside {low} to {high}")))
        }
        _ => Ok(()),
    };
    range("cpu_weight", limits.cpu_weight.map(u32::from), 1, 10_000)?;
    range("io_weight", limits.io_weight.map(u32::from), 1, 10_000)?;
    range("cpu_quota", limits.cpu_quota, 1, 102_400)?;
    range("tasks_max", limits.tasks_max, 8, 65_536)?;
    for (field, set) in [("cpu_set", &limits.cpu_set), ("memory_nodes", &limits.memory_nodes)] {
        if set.as_ref().is_some_and(|set| parse_set(set).is_none()) {
            return Err(wrong(format!(
                "limits.{field}: write numbers and ranges up to 8191, such as \"0-3,8\""
            )));
        }
    }
    if let Some(max) = limits.memory_max
        && max.0 < memory + OVERHEAD
    {
        return Err(wrong(format!(
            "limits.memory_max: {max} is too little: the guest has {}, and the VMM needs 32M beside it",
            dbus_api::spec::Size(memory)
        )));
    }
    if limits.memory_high.is_some_and(|high| high.0 < 64 << 20) {
        return Err(wrong("limits.memory_high: below 64M nothing runs".to_owned()));
    }
    Ok(())
}

/// `0-3,8` as a bit mask, the first CPU in the lowest bit of the first byte (the form of systemd's properties); `None` when it is no set.
pub fn parse_set(text: &str) -> Option<Vec<u8>> {
    const MOST: usize = 8192;
    let mut mask = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number =
            |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<usize>().ok())?;
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= MOST {
            return None;
        }
        if mask.len() <= last / 8 {
            mask.resize(last / 8 + 1, 0);
        }
        for bit in first..=last {
            mask[bit / 8] |= 1 << (bit % 8);
        }
    }
    Some(mask)
}

/// Looks at the files that a start needs; the error names the field.
pub fn check_files(spec: &VmSpec) -> Result<(), FleetError> {
    let firmware = spec.firmware.iter();
    let firmware = firmware.flat_map(|f| [("firmware.code", &f.code), ("firmware.vars", &f.vars)]);
    let files = (spec.kernel.iter().map(|path| ("kernel".to_owned(), path, false)))
        .chain(firmware.map(|(field, path)| (field.to_owned(), path, false)))
        .chain(spec.initrd.iter().map(|path| ("initrd".to_owned(), path, false)))
        .chain(spec.disks.iter().enumerate().map(|(at, d)| (format!("disks[{at}].path"), &d.path, true)))
        .chain(
            spec.disks
                .iter()
                .enumerate()
                .filter_map(|(at, d)| Some((format!("disks[{at}].backing"), d.backing.as_ref()?, true))),
        );
    for (field, path, block) in files {
        let kind = std::fs::metadata(path)
            .map_err(|error| wrong(format!("{field}: {}: {}", path.display(), plain(&error))))?
            .file_type();
        let device = std::os::unix::fs::FileTypeExt::is_block_device(&kind);
        if kind.is_dir() {
            return Err(wrong(format!("{field}: {} is a directory, not a file", path.display())));
        }
        let usable = kind.is_file() || (block && device);
        if !usable {
            let wanted = if block { "a regular file or block device" } else { "a regular file" };
            return Err(wrong(format!("{field}: {} is not {wanted}", path.display())));
        }
    }
    Ok(())
}

/// Why a file cannot be had: the kernel's reason without Rust's `(os error 2)`, and what to do about it.
pub fn plain(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "no such file".to_owned(),
        std::io::ErrorKind::PermissionDenied => {
            let user = rustix::process::geteuid().as_raw();
            format!(
                "permission denied to flotillad (user {user}): chown it, or setfacl -m u:{user}:rw it, and u:{user}:x the folders above"
            )
        }
        _ => error.to_string(),
    }
}

/// Checks a path of this host, as far as that can be done without a look at it.
pub(crate) fn check_path(field: &str, path: &Path) -> Result<(), FleetError> {
    let Some(text) = path.to_str() else {
        return Err(wrong(format!("{field}: {} is not UTF-8", path.display())));
    };
    if !path.is_absolute() {
        return Err(wrong(format!("{field}: {text:?} is not an absolute path")));
    }
    if text.len() > 4095 || text.contains(|c: char| c.is_control()) {
        return Err(wrong(format!("{field}: the path is too long or holds control characters")));
    }
    // NAME_MAX of Linux: no file system has longer ones.
    if text.split('/').any(|name| name.len() > 255) {
        return Err(wrong(format!("{field}: a name in the path is longer than 255 bytes: {text}")));
    }
    Ok(())
}

/// A network interface's name, by the kernel's own rules (`dev_valid_name`).
pub(super) fn check_link_name(field: &str, name: &str) -> Result<(), FleetError> {
    let bad = name.is_empty()
        || name.len() > 15
        || matches!(name, "." | "..")
        || !name.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '/' | ':' | ',' | '%'));
    if bad {
        return Err(wrong(format!("{field}: {name:?} is no interface name: 1 to 15 printable characters")));
    }
    Ok(())
}

/// Six hex pairs of a unicast address.
pub(super) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut pairs = text.split(':');
    for byte in &mut mac {
        let pair = pairs.next()?;
        if pair.len() != 2 || !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    let unicast = mac[0] & 1 == 0 && mac != [0; 6];
    (pairs.next().is_none() && unicast).then_some(mac)
}

/// A hardware address as we write it; `None`: it is none of one card.
pub(super) fn plain_mac(text: &str) -> Option<String> {
    let [a, b, c, d, e, f] = parse_mac(text)?;
    Some(format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"))
}

/// Hardware address of the card `number`: the one written down, or one derived from the uuid, which stays the same for the VM's whole life
/// and differs between VMs and cards. `52:54:00` is the locally administered prefix that guests of KVM have always had.
pub fn mac(nic: &Nic, uuid: Uuid, number: u8) -> String {
    if let Some(mac) = nic.mac.as_deref().and_then(plain_mac) {
        return mac;
    }
    let hash = Uuid::new_v5(&uuid, format!("nic{number}").as_bytes());
    let [a, b, c, ..] = *hash.as_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names() {
        for name in ["a", "web1", "a-b_c", "0", &"x".repeat(28)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in [
            "",
            ".a",
            "-a",
            "a..b",
            "Web",
            "a/b",
            "a b",
            "ä",
            "a\0",
            "a@b",
            &"x".repeat(29),
            "a.b",
            "..",
            "a\n",
        ] {
            assert!(matches!(check_name(name), Err(FleetError::InvalidSpec(_))), "{name:?}");
        }
    }

    #[test]
    fn every_error_names_its_field() {
        let cases = [
            (r#"{"kernel":"k"}"#, "kernel"),
            (r#"{"kernel":"/k","cpus":0}"#, "cpus"),
            (r#"{"kernel":"/k","cpus":255}"#, "cpus"),
            (r#"{"kernel":"/k","cpus":256}"#, "256"),
            (r#"{"kernel":"/k","memory":"127M"}"#, "memory"),
            (r#"{"kernel":"/k","memory":"513G"}"#, "memory"),
            (r#"{"kernel":"/k","memory":"131073K"}"#, "memory"),
            (r#"{"kernel":"/k","initrd":"i"}"#, "initrd"),
            (r#"{"kernel":"/k","append":"a\nb"}"#, "append"),
            (r#"{"kernel":"/k","disks":[{"path":"/a"},{"path":"/a"}]}"#, "disks[1].path"),
            (r#"{"kernel":"/k","disks":[{"path":"/a","serial":"a,b"}]}"#, "disks[0].serial"),
            (r#"{"kernel":"/k","nics":[{"bridge":"a/b"}]}"#, "nics[0].bridge"),
            (r#"{"kernel":"/k","nics":[{}]}"#, "nics[0]"),
            (r#"{"kernel":"/k","nics":[{"network":"a","bridge":"b"}]}"#, "nics[0]"),
            (r#"{"kernel":"/k","nics":[{"network":"a b"}]}"#, "nics[0].network"),
            (r#"{"kernel":"/k","nics":[{"bridge":"br0","mac":"01:00:00:00:00:01"}]}"#, "nics[0].mac"),
            (r#"{"kernel":"/k","nics":[{"bridge":"br0","mac":"52:54:00:00:00"}]}"#, "nics[0].mac"),
            (r#"{"kernel":"/k","nics":[{"bridge":"a"},{"bridge":"b"},{"bridge":"c"}]}"#, "nics"),
            (r#"{"kernel":"/k","machine":"virt"}"#, "virt"),
            (r#"{"kernel":"/k","disks":[{"path":"/a","format":"vmdk"}]}"#, "vmdk"),
            (r#"{"kernel":"/k","disks":[{"path":"/a","aio":"native"}]}"#, "disks[0].aio"),
            (r#"{"kernel":"/k","disks":[{"path":"/a","iops":0}]}"#, "disks[0].iops"),
            (r#"{"kernel":"/k","disks":[{"path":"/a","number":32}]}"#, "disks[0].number"),
            (
                r#"{"kernel":"/k","nics":[{"bridge":"a","number":1},{"bridge":"a","number":1}]}"#,
                "nics[1].number",
            ),
            (r#"{"kernel":"/k","autostart_delay":3601}"#, "autostart_delay"),
            (r#"{"kernel":"/k","host_shutdown_timeout":0}"#, "host_shutdown_timeout"),
            (r#"{"kernel":"/k","host_shutdown_timeout":901}"#, "host_shutdown_timeout"),
            (r#"{"kernel":"/k","restart":"sometimes"}"#, "sometimes"),
            (r#"{"kernel":"/k","limits":{"cpu_weight":0}}"#, "limits.cpu_weight"),
            (r#"{"kernel":"/k","limits":{"cpu_quota":0}}"#, "limits.cpu_quota"),
            (r#"{"kernel":"/k","limits":{"cpu_set":"3-1"}}"#, "limits.cpu_set"),
            (r#"{"kernel":"/k","limits":{"memory_nodes":""}}"#, "limits.memory_nodes"),
            (r#"{"kernel":"/k","limits":{"memory_max":"256M"}}"#, "limits.memory_max"),
            (r#"{"kernel":"/k","limits":{"tasks_max":1}}"#, "limits.tasks_max"),
            (r#"{"kernel":"/k","limits":{"cpus":1}}"#, "cpus"),
            (r#"{"kernel":"/k","memroy":"1G"}"#, "memroy"),
            (r#"{}"#, "kernel"),
            (r#"{"kernel":"/k","firmware":{"code":"/c","vars":"/v"}}"#, "firmware: a microvm has none"),
            (r#"{"machine":"q35","firmware":{"code":"/c"}}"#, "vars"),
            (r#"{"machine":"q35","firmware":{"code":"/c","vars":"v"}}"#, "firmware.vars"),
            (r#"{"machine":"q35","firmware":{"code":"/c","vars":"/c"}}"#, "firmware.vars"),
            (r#"{"machine":"q35","firmware":{"code":"/c","vars":"/v"},"append":"a"}"#, "append"),
            (
                r#"{"machine":"q35","firmware":{"code":"/c","vars":"/v"},"disks":[{"path":"/v"}]}"#,
                "firmware.vars: /v is a disk",
            ),
            ("", "definition"),
        ];
        for (text, field) in cases {
            match parse(text) {
                Err(FleetError::InvalidSpec(error)) => assert!(error.contains(field), "{text}: {error}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_q35_takes_more() {
        let spec = |disks: usize, nics: usize| {
            let disks: Vec<_> = (0..disks).map(|at| format!(r#"{{"path":"/{at}"}}"#)).collect();
            let nics = vec![r#"{"bridge":"b"}"#; nics].join(",");
            parse(&format!(
                r#"{{"kernel":"/k","machine":"q35","disks":[{}],"nics":[{nics}]}}"#,
                disks.join(",")
            ))
        };
        for (disks, nics) in [(16, 0), (8, 8), (0, 16)] {
            assert!(spec(disks, nics).is_ok());
        }
        let error = spec(9, 8).unwrap_err().to_string();
        assert!(error.contains("17 given, q35 has 16 ports"), "{error}");
    }

    #[test]
    fn files_are_named_with_their_field() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("k");
        let spec = |kernel: &Path| parse(&format!(r#"{{"kernel":{kernel:?}}}"#)).unwrap();
        let error = check_files(&spec(&kernel)).unwrap_err().to_string();
        assert_eq!(error, format!("kernel: {}: no such file", kernel.display()));
        assert!(check_files(&spec(dir.path())).unwrap_err().to_string().contains("is a directory"));
        assert!(check_files(&spec(Path::new("/dev/null"))).is_err());
        std::fs::write(&kernel, "k").unwrap();
        assert_eq!(check_files(&spec(&kernel)), Ok(()));
    }

    #[test]
    fn addresses_are_stable_and_differ() {
        let spec =
            parse(r#"{"kernel":"/k","nics":[{"bridge":"b"},{"bridge":"b","mac":"52:54:00:AA:00:01"}]}"#)
                .unwrap();
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let (made, written) = (&spec.nics[0], &spec.nics[1]);
        assert_eq!(mac(made, one, 0), mac(made, one, 0));
        assert_ne!(mac(made, one, 0), mac(made, two, 0));
        assert_ne!(mac(made, one, 0), mac(made, one, 1));
        assert_eq!(mac(written, one, 1), "52:54:00:aa:00:01");
    }

    #[test]
    fn sets_of_cpus() {
        assert_eq!(parse_set("0"), Some(vec![1]));
        assert_eq!(parse_set("0-3,8"), Some(vec![0x0f, 0x01]));
        assert_eq!(parse_set("15,1"), Some(vec![0x02, 0x80]));
        for text in ["", "a", "1-", "-1", "3-1", "1,,2", "8192", "+1", "99999999999999999999", "0 "] {
            assert_eq!(parse_set(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_set_is_a_panic(text in "[0-9,\\-]{0,20}") {
            if let Some(mask) = parse_set(&text) {
                prop_assert!(mask.len() <= 1024 && mask.iter().any(|byte| *byte != 0));
            }
        }

        #[test]
        fn no_text_is_a_panic(text in "\\PC{0,200}") {
            let _ = parse(&text);
            if check_name(&text).is_ok() {
                prop_assert!(!text.contains('/') && !text.starts_with('.'));
            }
        }
    }
}
