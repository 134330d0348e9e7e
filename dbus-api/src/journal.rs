//! How a VM's messages are found in the journal, whichever unit its processes ran in. For the daemon and the `flotilla` command.

/// The unit that a VM's process runs in, unless it took one that was waiting.
fn unit(name: &str) -> String {
    format!("flotilla-vm@{name}.service")
}

/// Arguments for `journalctl`: what the processes of the VM's own unit said, what systemd says of that unit, and what its processes in other
/// units said.
pub fn matches(name: &str) -> [String; 7] {
    let unit = unit(name);
    [
        format!("_SYSTEMD_UNIT={unit}"),
        "+".to_owned(),
        "_PID=1".to_owned(),
        format!("UNIT={unit}"),
        "+".to_owned(),
        "SYSLOG_IDENTIFIER=flotilla-vm".to_owned(),
        format!("FLOTILLA_VM={name}"),
    ]
}
