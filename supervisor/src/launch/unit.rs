//! How the units of VMs and of networks' DHCP servers are named, in systemd and on the bus. For `systemd` and `server`.

/// What the name of a VM's unit begins with.
pub(super) const PREFIX: &str = "flotilla-vm@";
/// What it ends with.
pub(super) const SUFFIX: &str = ".service";

/// What the name of the unit of a network's DHCP server begins with.
pub(super) const DHCP_PREFIX: &str = "flotilla-dhcp@";

/// The unit of a network's DHCP server.
pub(super) fn dhcp_unit_of(network: &str) -> String {
    format!("{DHCP_PREFIX}{network}{SUFFIX}")
}

/// The network whose DHCP server this is.
pub(super) fn network_of_unit(unit: &str) -> Option<&str> {
    unit.strip_prefix(DHCP_PREFIX)?.strip_suffix(SUFFIX).filter(|name| !name.is_empty())
}

/// What the name of a spare begins with. No VM's name has a capital letter.
pub const SPARE: &str = "Spare-";

/// Whether the instance is a unit that was started before a VM needed one.
pub(super) fn is_spare(instance: &str) -> bool {
    instance.starts_with(SPARE)
}

/// The instance whose unit this is: a VM's name, or a spare.
pub(super) fn instance_of(unit: &str) -> Option<&str> {
    unit.strip_prefix(PREFIX)?.strip_suffix(SUFFIX).filter(|name| !name.is_empty())
}

/// The unit of an instance.
pub(super) fn unit_of(instance: &str) -> String {
    format!("{PREFIX}{instance}{SUFFIX}")
}

/// Object path of a unit, as `sd_bus_path_encode(3)` writes it.
pub(super) fn path_of(unit: &str) -> String {
    let mut path = String::from("/org/freedesktop/systemd1/unit/");
    for (at, byte) in unit.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (at > 0 && byte.is_ascii_digit()) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("_{byte:02x}"));
        }
    }
    path
}

/// The name behind the last part of an object path.
pub(super) fn unescape(label: &str) -> Option<String> {
    let mut bytes = label.bytes();
    let mut text = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte == b'_' {
            let pair = [bytes.next()?, bytes.next()?];
            text.push(u8::from_str_radix(std::str::from_utf8(&pair).ok()?, 16).ok()?);
        } else {
            text.push(byte);
        }
    }
    String::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_paths() {
        assert_eq!(unit_of("a-b.c"), "flotilla-vm@a-b.c.service");
        assert_eq!(instance_of("flotilla-vm@a-b.c.service"), Some("a-b.c"));
        assert_eq!(instance_of("flotilla-vm@.service"), None);
        assert_eq!(instance_of("sshd.service"), None);
        let path = path_of("flotilla-vm@a-b.service");
        assert_eq!(path, "/org/freedesktop/systemd1/unit/flotilla_2dvm_40a_2db_2eservice");
        assert_eq!(unescape(path.rsplit('/').next().unwrap()).as_deref(), Some("flotilla-vm@a-b.service"));
    }
}
