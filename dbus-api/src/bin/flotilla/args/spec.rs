//! A VM's definition as options of the command line: `flotilla define`, `flotilla run`.

use std::path::PathBuf;

use clap::Args;
use dbus_api::spec::{Disk, Format, Machine, Nic, Size};

/// What a VM is, as options.
#[derive(Debug, Default, Args)]
pub(crate) struct SpecArgs {
    /// Kernel image
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) append: Option<String>,
    /// A disk: its path, then any of ",format=qcow2", ",readonly", ",direct", ",discard", ",serial=TEXT"; may be given again
    #[arg(long = "disk", value_name = "PATH[,...]", value_parser = parse_disk)]
    pub(crate) disks: Vec<Disk>,
    /// A network card on this bridge, then perhaps ",mac=ADDRESS"; may be given again
    #[arg(long = "bridge", value_name = "BRIDGE[,...]", value_parser = parse_nic)]
    pub(crate) nics: Vec<Nic>,
    /// A network card on this network, then perhaps ",mac=ADDRESS"; may be given again; after the cards of --bridge
    #[arg(long = "network", value_name = "NETWORK[,...]", value_parser = parse_network_nic)]
    pub(crate) network_nics: Vec<Nic>,
    /// Guest RAM, such as 512M or 2G [default: 256M; with `create` 1G]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Size>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u8>,
    /// Board: microvm, or q35 (PCIe, ACPI) [default: microvm; with `create` and no kernel q35]
    #[arg(long, value_name = "BOARD")]
    pub(crate) machine: Option<Machine>,
}

impl SpecArgs {
    /// The first option given besides `--kernel`, to name it in a message.
    pub(crate) fn first_extra(&self) -> Option<&'static str> {
        [
            (self.initrd.is_some(), "--initrd"),
            (self.append.is_some(), "--append"),
            (!self.disks.is_empty(), "--disk"),
            (!self.nics.is_empty(), "--bridge"),
            (!self.network_nics.is_empty(), "--network"),
            (self.memory.is_some(), "--memory"),
            (self.cpus.is_some(), "--cpus"),
            (self.machine.is_some(), "--machine"),
        ]
        .into_iter()
        .find_map(|(given, option)| given.then_some(option))
    }
}

/// `PATH[,readonly][,direct][,discard][,format=raw|qcow2][,serial=TEXT]`. A comma in the path itself needs a definition file.
pub(super) fn parse_disk(text: &str) -> Result<Disk, String> {
    let mut parts = text.split(',');
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("the path is missing")?;
    let mut disk = Disk::new(path);
    for part in parts {
        match part.split_once('=').unwrap_or((part, "")) {
            ("readonly", "") => disk.readonly = true,
            ("direct", "") => disk.direct = true,
            ("discard", "") => disk.discard = true,
            ("format", "raw") => disk.format = Format::Raw,
            ("format", "qcow2") => disk.format = Format::Qcow2,
            ("serial", serial) if !serial.is_empty() => disk.serial = Some(serial.to_owned()),
            _ => {
                return Err(format!(
                    "\"{part}\" is none of readonly, direct, discard, format=raw|qcow2, serial=TEXT"
                ));
            }
        }
    }
    Ok(disk)
}

/// `BRIDGE[,mac=ADDRESS]`.
fn parse_nic(text: &str) -> Result<Nic, String> {
    let (bridge, rest) = match text.split_once(',') {
        Some((bridge, rest)) => (bridge, Some(rest)),
        None => (text, None),
    };
    if bridge.is_empty() {
        return Err("the bridge's name is missing".to_owned());
    }
    let mac = match rest.map(|rest| (rest, rest.split_once('='))) {
        None => None,
        Some((_, Some(("mac", mac)))) if !mac.is_empty() => Some(mac.to_owned()),
        Some((rest, _)) => return Err(format!("\"{rest}\" is not mac=ADDRESS")),
    };
    Ok(Nic { bridge: bridge.to_owned(), mac, ..Nic::default() })
}

/// `NETWORK[,mac=ADDRESS]`.
fn parse_network_nic(text: &str) -> Result<Nic, String> {
    let Nic { bridge, mac, .. } = parse_nic(text).map_err(|error| error.replace("bridge", "network"))?;
    Ok(Nic { network: Some(bridge), mac, ..Nic::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let disk = parse_disk("a b.img,readonly,serial=x").unwrap();
        assert_eq!((disk.path.to_str(), disk.readonly, disk.direct), (Some("a b.img"), true, false));
        assert_eq!(disk.serial.as_deref(), Some("x"));
        for text in ["", ",readonly", "a,ro", "a,readonly=1", "a,serial", "a,serial=", "a,,direct"] {
            assert!(parse_disk(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cards() {
        assert_eq!(parse_nic("br0").unwrap(), Nic { bridge: "br0".into(), ..Nic::default() });
        let nic = parse_network_nic("lan,mac=52:54:00:1:2:3").unwrap();
        assert_eq!((nic.place(), nic.mac.is_some()), ("lan", true));
        assert_eq!(parse_network_nic(""), Err("the network's name is missing".to_owned()));
        assert_eq!(parse_nic("br0,mac=52:54:00:1:2:3").unwrap().mac.as_deref(), Some("52:54:00:1:2:3"));
        for text in ["", ",mac=x", "br0,", "br0,mac", "br0,mac=", "br0,model=e1000"] {
            assert!(parse_nic(text).is_err(), "{text}");
        }
    }
}
