//! The public face of Flotilla: names, types, errors and client proxies of the D-Bus API `org.flotilla.Flotilla1`.
//!
//! Style of systemd's machine1: every verb stands on the Manager by VM name and on the VM's object; states are strings; options go in a
//! trailing `a{sv}`; slow verbs return a job at once and `JobRemoved` closes it (subscribe before calling). Bytes and
//! microseconds are `t`. The daemon implements these interfaces (room `dbus` of the supervisor); the `flotilla` command is
//! their first client.
//!
//! Resync rule: read `EventSeq`, then `ListVms`; a signal whose number is not above that `EventSeq` is stale, a gap means list again.

pub mod error;
pub mod journal;
pub mod network;
pub mod proxy;
pub mod spec;

/// Well-known bus name.
pub const BUS_NAME: &str = "org.flotilla.Flotilla1";
/// Object path of the Manager; VMs and jobs live below it.
pub const MANAGER_PATH: &str = "/org/flotilla/Flotilla1";
/// Interface of the Manager.
pub const MANAGER_INTERFACE: &str = "org.flotilla.Flotilla1.Manager";
/// Interface of a VM.
pub const VM_INTERFACE: &str = "org.flotilla.Flotilla1.Vm";
/// Interface of a network.
pub const NETWORK_INTERFACE: &str = "org.flotilla.Flotilla1.Network";
/// Interface of a template.
pub const TEMPLATE_INTERFACE: &str = "org.flotilla.Flotilla1.Template";
/// Interface of a job.
pub const JOB_INTERFACE: &str = "org.flotilla.Flotilla1.Job";

/// polkit action: define, change and drive VMs.
pub const ACTION_MANAGE: &str = "org.flotilla.flotilla1.manage";
/// polkit action: what concerns the whole host, such as draining it.
pub const ACTION_HOST: &str = "org.flotilla.flotilla1.host";
/// polkit action: define and delete networks.
pub const ACTION_NETWORK: &str = "org.flotilla.flotilla1.network";
/// polkit action: open a VM's console or log.
pub const ACTION_CONSOLE: &str = "org.flotilla.flotilla1.console";
/// polkit action: send QMP commands to a VM that change nothing.
pub const ACTION_QMP_QUERY: &str = "org.flotilla.flotilla1.qmp-query";
/// polkit action: send any QMP command to a VM.
pub const ACTION_QMP: &str = "org.flotilla.flotilla1.qmp-full";

/// Object path of the VM `name`: bytes outside `[A-Za-z0-9]` become `_xx`, as systemd writes them, so that a person can type it.
pub fn vm_path(name: &str) -> String {
    format!("{MANAGER_PATH}/vm/{}", escape(name))
}

/// Object path of the network `name`, written as a VM's.
pub fn network_path(name: &str) -> String {
    format!("{MANAGER_PATH}/network/{}", escape(name))
}

/// Object path of the template `name`, written as a VM's.
pub fn template_path(name: &str) -> String {
    format!("{MANAGER_PATH}/template/{}", escape(name))
}

/// Object path of the job `id`.
pub fn job_path(id: u32) -> String {
    format!("{MANAGER_PATH}/job/{id}")
}

/// The VM name in an object path, or `None` if the path is not a VM's.
pub fn vm_name_of(path: &str) -> Option<String> {
    let label = path.strip_prefix(MANAGER_PATH)?.strip_prefix("/vm/")?;
    let mut name = Vec::new();
    let mut bytes = label.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'_' {
            let hex = [bytes.next()?, bytes.next()?];
            name.push(u8::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?);
        } else {
            name.push(byte);
        }
    }
    String::from_utf8(name).ok().filter(|name| escape(name) == label)
}

/// Escapes one path element the way `sd_bus_path_encode(3)` does: a leading digit is escaped too.
fn escape(name: &str) -> String {
    let mut label = String::with_capacity(name.len());
    for (at, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (at > 0 && byte.is_ascii_digit()) {
            label.push(char::from(byte));
        } else {
            label.push_str(&format!("_{byte:02x}"));
        }
    }
    label
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_follow_systemd_and_come_back() {
        assert_eq!(vm_path("web1"), "/org/flotilla/Flotilla1/vm/web1");
        assert_eq!(vm_path("1.a-b"), "/org/flotilla/Flotilla1/vm/_31_2ea_2db");
        for name in ["web1", "1.a-b", "a_b", "0"] {
            assert_eq!(vm_name_of(&vm_path(name)).as_deref(), Some(name));
        }
        for path in [
            "/",
            "/org/flotilla/Flotilla1/vm/_3",
            "/org/flotilla/Flotilla1/vm/_zz",
            "/org/flotilla/Flotilla1/vm/_61",
        ] {
            assert_eq!(vm_name_of(path), None, "{path}");
        }
    }
}
