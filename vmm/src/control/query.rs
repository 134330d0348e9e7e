//! What clients are told about parts of the machine: owns QMP's shapes for disks, I/O threads and character devices.

use serde_json::{Value, json};

use super::Terminal;
use crate::config::{DetectZeroes, Drive, ImageFormat, NetBackend, TapSource};
use crate::machine::{BlockDevice, NetDevice};

fn node(drive: &Drive) -> Value {
    let file = drive.file.to_string_lossy();
    json!({
        "node-name": drive.id,
        "drv": format(drive),
        "file": file,
        "ro": drive.readonly,
        "encrypted": false,
        "iops": drive.iops_total.unwrap_or(0),
        "cache": { "direct": drive.direct, "no-flush": drive.no_flush, "writeback": true },
        "detect_zeroes": match drive.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        },
    })
}

fn format(drive: &Drive) -> &'static str {
    match drive.format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
    }
}

/// `query-block`: the disks that are in a slot.
pub(super) fn block(devices: &[BlockDevice]) -> Value {
    let shown = devices.iter().filter_map(|b| {
        let device = b.device.as_ref()?;
        Some(json!({
            "device": b.drive.id,
            "qdev": device,
            "type": "unknown",
            "locked": false,
            "removable": true,
            "inserted": node(&b.drive),
        }))
    });
    shown.collect()
}

/// `query-named-block-nodes`: all, in a slot or not.
pub(super) fn named_block_nodes(devices: &[BlockDevice]) -> Value {
    devices.iter().map(|b| node(&b.drive)).collect()
}

/// `query-blockstats`.
pub(super) fn blockstats(devices: &[BlockDevice]) -> Value {
    let shown = devices.iter().filter_map(|b| {
        let device = b.device.as_ref()?;
        Some(json!({
            "device": b.drive.id,
            "node-name": b.drive.id,
            "qdev": device,
            "stats": {
                "rd_bytes": b.stats.read_bytes,
                "wr_bytes": b.stats.write_bytes,
                "rd_operations": b.stats.read_ops,
                "wr_operations": b.stats.write_ops,
                "flush_operations": b.stats.flush_ops,
            },
        }))
    });
    shown.collect()
}

/// Network back ends, each with the NIC on it.
pub(super) fn network(devices: &[NetDevice]) -> Value {
    let shown = devices.iter().map(|NetDevice { device, netdev }| {
        let mut entry = match &netdev.backend {
            NetBackend::Tap { source, queues, vhost, .. } => {
                let ifname = match source {
                    TapSource::Name(name) => json!(name),
                    TapSource::Fds(_) => Value::Null,
                };
                json!({ "type": "tap", "ifname": ifname, "queues": queues, "vhost": vhost })
            }
            NetBackend::VhostUser { chardev, queues } => {
                json!({ "type": "vhost-user", "chardev": chardev, "queues": queues })
            }
        };
        entry["id"] = json!(netdev.id);
        if let Some((id, driver, mac)) = device {
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            entry["nic"] = json!({ "id": id, "driver": driver, "mac": mac });
        }
        entry
    });
    shown.collect()
}

/// `query-iothreads`. I/O threads wait; they never poll.
pub(super) fn iothreads(threads: &[(String, i32)]) -> Value {
    let shown = threads.iter().map(
        |(id, tid)| json!({ "id": id, "poll-grow": 0, "poll-max-ns": 0, "poll-shrink": 0, "thread-id": tid }),
    );
    shown.collect()
}

/// `query-chardev`.
pub(super) fn chardevs(terminals: &[Terminal]) -> Value {
    let shown =
        terminals.iter().map(|t| json!({ "filename": t.filename, "frontend-open": true, "label": t.label }));
    shown.collect()
}
