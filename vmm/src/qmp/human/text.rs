//! How answers read: owns the words and lines that people see. The values come from the queries of the same name.

use serde_json::Value;

/// An answer's value as text. Lines end in CR LF, as clients of a monitor expect them.
pub(in crate::qmp) type Render = fn(&Value) -> String;

/// A command that has nothing to say.
pub(super) fn nothing(_: &Value) -> String {
    String::new()
}

/// What clients wait for after `drive_add`.
pub(super) fn ok(_: &Value) -> String {
    "OK\r\n".to_owned()
}

/// A value as it would be said: strings without quotes.
fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        other => other.to_string(),
    }
}

fn each(value: &Value, line: impl Fn(&Value) -> String) -> String {
    value.as_array().into_iter().flatten().map(line).collect()
}

pub(super) fn status(value: &Value) -> String {
    format!("VM status: {}\r\n", word(&value["status"]))
}

pub(super) fn version(value: &Value) -> String {
    let qemu = &value["qemu"];
    format!("{}.{}.{} ({})\r\n", qemu["major"], qemu["minor"], qemu["micro"], word(&value["package"]))
}

pub(super) fn name(value: &Value) -> String {
    value.get("name").map_or_else(String::new, |name| format!("{}\r\n", word(name)))
}

pub(super) fn uuid(value: &Value) -> String {
    format!("{}\r\n", word(&value["UUID"]))
}

pub(super) fn kvm(value: &Value) -> String {
    let enabled = if value["enabled"] == true { "enabled" } else { "disabled" };
    format!("kvm support: {enabled}\r\n")
}

pub(super) fn cpus(value: &Value) -> String {
    each(value, |cpu| format!("  CPU #{}: thread_id={}\r\n", cpu["CPU"], cpu["thread_id"]))
}

/// In MiB.
pub(super) fn balloon(value: &Value) -> String {
    format!("balloon: actual={}\r\n", value["actual"].as_u64().unwrap_or(0) >> 20)
}

pub(super) fn block(value: &Value) -> String {
    each(value, |device| {
        let node = &device["inserted"];
        let only = if node["ro"] == true { ", read-only" } else { "" };
        let direct = if node["cache"]["direct"] == true { ", direct" } else { "" };
        let loose = if node["cache"]["no-flush"] == true { ", ignore flushes" } else { "" };
        let zeroes = match word(&node["detect_zeroes"]).as_str() {
            "off" => String::new(),
            zeroes => format!("    Detect zeroes:    {zeroes}\r\n"),
        };
        let limit = match node["iops"].as_u64() {
            None | Some(0) => String::new(),
            Some(iops) => format!("    I/O throttling:   iops={iops}\r\n"),
        };
        format!(
            "{}: {} ({}{only})\r\n    Attached to:      {}\r\n    Cache mode:       writeback{direct}{loose}\r\n{zeroes}{limit}",
            word(&device["device"]),
            word(&node["file"]),
            word(&node["drv"]),
            word(&device["qdev"]),
        )
    })
}

pub(super) fn blockstats(value: &Value) -> String {
    each(value, |device| {
        let stats = device["stats"].as_object().into_iter().flatten();
        let stats: String = stats.map(|(key, value)| format!(" {key}={value}")).collect();
        format!("{}:{stats}\r\n", word(&device["device"]))
    })
}

pub(super) fn chardevs(value: &Value) -> String {
    each(value, |chardev| format!("{}: filename={}\r\n", word(&chardev["label"]), word(&chardev["filename"])))
}

pub(super) fn iothreads(value: &Value) -> String {
    each(value, |thread| format!("{}:\r\n  thread_id={}\r\n", word(&thread["id"]), thread["thread-id"]))
}

pub(super) fn migrate(value: &Value) -> String {
    format!("Migration status: {}\r\n", word(&value["status"]))
}

pub(super) fn network(value: &Value) -> String {
    each(value, |entry| {
        let nic = match entry.get("nic") {
            None => String::new(),
            Some(nic) => format!(
                "{}: type=nic,model={},macaddr={}\r\n \\ ",
                word(&nic["id"]),
                word(&nic["driver"]),
                word(&nic["mac"])
            ),
        };
        let members = entry.as_object().into_iter().flatten();
        let more =
            members.filter(|(key, value)| !["id", "nic", "type"].contains(&key.as_str()) && !value.is_null());
        let more: String = more.map(|(key, value)| format!(",{key}={}", word(value))).collect();
        format!("{nic}{}: type={}{more}\r\n", word(&entry["id"]), word(&entry["type"]))
    })
}

/// From the list of a container: its children are the devices.
pub(super) fn qtree(value: &Value) -> String {
    let devices = each(value, |child| {
        let kind = word(&child["type"]);
        match kind.strip_prefix("child<").and_then(|kind| kind.strip_suffix('>')) {
            Some(driver) => format!("  dev: {driver}, id \"{}\"\r\n", word(&child["name"])),
            None => String::new(),
        }
    });
    format!("bus: main-system-bus\r\n{devices}")
}

pub(super) fn trace_points(value: &Value) -> String {
    each(value, |point| format!("{} : state {}\r\n", word(&point["name"]), u8::from(point["state"] == true)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_read_well() {
        let node = json!({"node-name": "d", "drv": "qcow2", "file": "/a", "ro": true, "iops": 7, "detect_zeroes": "on",
                          "cache": {"direct": true, "no-flush": true}});
        let nic = json!({"id": "nic0", "driver": "virtio-net-device", "mac": "52:54:00:12:34:56"});
        let cases: &[(Render, Value, &str)] = &[
            (status, json!({"status": "paused"}), "VM status: paused\r\n"),
            (name, json!({}), ""),
            (name, json!({"name": "web"}), "web\r\n"),
            (balloon, json!({"actual": 3 << 20}), "balloon: actual=3\r\n"),
            (
                block,
                json!([{"device": "d", "qdev": "vda", "inserted": node}]),
                "d: /a (qcow2, read-only)\r\n    Attached to:      vda\r\n    Cache mode:       writeback, direct, ignore flushes\r\n\
                 \x20   Detect zeroes:    on\r\n    I/O throttling:   iops=7\r\n",
            ),
            (
                network,
                json!([{"id": "n", "type": "tap", "ifname": "tap0", "queues": 1, "vhost": false, "nic": nic},
                       {"id": "m", "type": "tap", "ifname": null, "queues": 2, "vhost": true}]),
                "nic0: type=nic,model=virtio-net-device,macaddr=52:54:00:12:34:56\r\n \\ n: type=tap,ifname=tap0,queues=1,vhost=off\r\n\
                 m: type=tap,queues=2,vhost=on\r\n",
            ),
            (
                qtree,
                json!([{"name": "type", "type": "string"}, {"name": "a", "type": "child<virtio-rng-device>"}]),
                "bus: main-system-bus\r\n  dev: virtio-rng-device, id \"a\"\r\n",
            ),
            // Whatever comes, something is said.
            (block, json!(null), ""),
            (blockstats, json!([{}]), "null:\r\n"),
        ];
        for (render, value, want) in cases {
            assert_eq!(render(value), *want, "{value}");
        }
    }
}
