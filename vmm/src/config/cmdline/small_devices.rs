//! `-device` for what is neither disk nor NIC: serial ports, balloon, random numbers, vsock; and the objects behind them.

use std::path::PathBuf;
use std::time::Duration;

use super::CmdlineError;
use super::props::{Props, size};
use crate::config::{
    AutoBalloon, DeviceDriver, MemoryBackend, MemoryBackendKind, Placement, PlacementPolicy, RngLimit,
    RngSource, SERIAL_PORTS_MAX, VmConfig,
};

/// Bytes per second that a limit of virtio-rng may come to.
const RNG_RATE: std::ops::RangeInclusive<u128> = 64..=1_000_000_000;
/// CIDs below 3 mean the hypervisor, the local machine and the host; the last one means "any".
const CID: std::ops::RangeInclusive<u64> = 3..=0xffff_fffe;
/// Longest name of a port, with room for a zero byte in the control message that carries it.
const PORT_NAME_MAX: usize = 255;

/// The driver `name` and its properties. Called for the drivers of this file only.
pub(super) fn driver(name: &str, props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    match name {
        "virtio-serial-device" => {
            let most = u64::from(SERIAL_PORTS_MAX);
            let max_ports = props.number("max-ports", 1..=most)?.unwrap_or(most);
            Ok(DeviceDriver::VirtioSerial { max_ports: u8::try_from(max_ports).unwrap_or(SERIAL_PORTS_MAX) })
        }
        "virtconsole" => {
            let (chardev, nr) = port(props)?;
            Ok(DeviceDriver::VirtConsole { chardev, nr })
        }
        "virtserialport" => {
            let (chardev, nr) = port(props)?;
            let name = props.text("name")?;
            if name.as_ref().is_some_and(|n| n.len() > PORT_NAME_MAX) {
                return Err(props.bad(format!("the name is longer than {PORT_NAME_MAX} bytes")));
            }
            Ok(DeviceDriver::VirtSerialPort { chardev, nr, name })
        }
        "virtio-balloon-device" => balloon(props),
        "virtio-rng-device" => rng(props),
        "vhost-vsock-device" => vsock(props),
        other => Err(props.bad(format!("unknown driver '{other}'"))),
    }
}

fn port(props: &mut Props) -> Result<(String, Option<u8>), CmdlineError> {
    let chardev = props.required("chardev")?;
    let nr = props.number("nr", 0..=u64::from(SERIAL_PORTS_MAX) - 1)?;
    Ok((chardev, nr.and_then(|n| u8::try_from(n).ok())))
}

fn balloon(props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    let deflate_on_oom = props.boolean("deflate-on-oom")?.unwrap_or(false);
    let free_page_reporting = props.boolean("free-page-reporting")?.unwrap_or(false);
    let on = props.boolean("auto-balloon")?.unwrap_or(false);
    // They say how the automatic works, and have no effect without it.
    let percent = props.number("membuf-percent", 20..=80)?.and_then(|n| u8::try_from(n).ok());
    let seconds = props.number("monitor-interval", 5..=300)?.unwrap_or(10);
    let auto = AutoBalloon { percent: percent.unwrap_or(50), interval: Duration::from_secs(seconds) };
    Ok(DeviceDriver::VirtioBalloon { deflate_on_oom, free_page_reporting, auto: on.then_some(auto) })
}

fn rng(props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    let rng = props.required("rng")?;
    let max_bytes = props.number("max-bytes", 1..=u64::MAX)?;
    let period_ms = props.number("period", 1..=u64::from(u32::MAX))?;
    let limit = match (max_bytes, period_ms) {
        (None, None) => None,
        (Some(max_bytes), Some(period_ms)) => {
            let rate = u128::from(max_bytes) * 1000 / u128::from(period_ms);
            if !RNG_RATE.contains(&rate) {
                return Err(props.bad(format!(
                    "max-bytes={max_bytes} in each period={period_ms} ms is {rate} bytes per second: it must be from {} to {}",
                    RNG_RATE.start(),
                    RNG_RATE.end()
                )));
            }
            Some(RngLimit { max_bytes, period_ms })
        }
        _ => return Err(props.bad("'max-bytes' and 'period' belong together: write both or none")),
    };
    Ok(DeviceDriver::VirtioRng { rng, limit })
}

fn vsock(props: &mut Props) -> Result<DeviceDriver, CmdlineError> {
    let guest_cid = props.number("guest-cid", CID)?.and_then(|n| u32::try_from(n).ok());
    let Some(guest_cid) = guest_cid else {
        return Err(props.bad("'guest-cid' is missing: add guest-cid=N, 3 or more"));
    };
    let vhost_fd = props.number("vhostfd", 3..=i32::MAX as u64)?.and_then(|n| i32::try_from(n).ok());
    Ok(DeviceDriver::VhostVsock { guest_cid, vhost_fd })
}

/// `-object`.
pub(super) fn object(text: &str, config: &mut VmConfig) -> Result<(), CmdlineError> {
    let mut props = Props::parse("-object", text, Some("type"))?;
    let kind = props.word("type")?.unwrap_or_default();
    match kind.as_str() {
        "iothread" => {
            let id = props.required_id()?;
            props.finish()?;
            config.iothreads.push(id);
        }
        "rng-random" => {
            let id = props.required_id()?;
            let filename = props.path("filename")?.unwrap_or_else(|| "/dev/urandom".into());
            props.finish()?;
            config.rngs.push(RngSource { id, filename });
        }
        "memory-backend-ram" | "memory-backend-file" | "memory-backend-memfd" => {
            config.memory.backends.push(memory_backend(&kind, props)?);
        }
        "tls-creds-x509" | "authz-simple" => return Err(props.unsupported(kind)),
        other => {
            return Err(props.bad(format!(
                "unknown object '{other}': use iothread, rng-random, memory-backend-ram, memory-backend-file or memory-backend-memfd"
            )));
        }
    }
    Ok(())
}

fn memory_backend(kind: &str, mut props: Props) -> Result<MemoryBackend, CmdlineError> {
    let id = props.required_id()?;
    let text = props.required("size")?;
    let Some(size) = size(&text) else {
        return Err(props.bad(format!("size={text}: write a whole number with K, M or G")));
    };
    let path: Option<PathBuf> = props.path("mem-path")?;
    let kind = match (kind, path) {
        ("memory-backend-file", Some(path)) => MemoryBackendKind::File(path),
        ("memory-backend-file", None) => return Err(props.bad("'mem-path' is missing: add mem-path=PATH")),
        (_, Some(_)) => return Err(props.bad("'mem-path' belongs to memory-backend-file: leave it out")),
        ("memory-backend-memfd", None) => MemoryBackendKind::Memfd,
        (_, None) => MemoryBackendKind::Ram,
    };
    // A private mapping of a memfd would be anonymous memory with a detour: as in QEMU, sharing is what it is for.
    let share = props.boolean("share")?.unwrap_or(kind == MemoryBackendKind::Memfd);
    let readonly = props.boolean("readonly")?.unwrap_or(false);
    if readonly && !matches!(kind, MemoryBackendKind::File(_)) {
        return Err(props.bad("'readonly' belongs to memory-backend-file: leave it out"));
    }
    let dump_guest_core = props.boolean("dump-guest-core")?.unwrap_or(true);
    let (first, second) = (props.boolean("mem-prealloc")?, props.boolean("prealloc")?);
    let policy = match props.text("policy")?.as_deref() {
        None | Some("default") => None,
        Some("preferred") => Some(PlacementPolicy::Preferred),
        Some("bind") => Some(PlacementPolicy::Bind),
        Some("interleave") => Some(PlacementPolicy::Interleave),
        Some(other) => {
            return Err(props.bad(format!("policy={other}: use default, preferred, bind or interleave")));
        }
    };
    let nodes = match props.text("host-nodes")? {
        None => None,
        Some(text) => Some(nodes(&text).ok_or_else(|| {
            props.bad(format!("host-nodes={text}: write a number from 0 to 63, or two as FIRST-LAST"))
        })?),
    };
    let placement = match (policy, nodes) {
        (Some(policy), Some(nodes)) => Some(Placement { policy, nodes }),
        (None, None) => None,
        (Some(_), None) => {
            return Err(props.bad("'host-nodes' is missing: say which nodes the policy is for"));
        }
        (None, Some(_)) => {
            return Err(props.bad("'host-nodes' needs a policy: add policy=bind, preferred or interleave"));
        }
    };
    props.finish()?;
    let prealloc = first.or(second).unwrap_or(false);
    Ok(MemoryBackend { id, kind, size, share, readonly, prealloc, dump_guest_core, placement })
}

/// `A` or `A-B`, as bits.
fn nodes(text: &str) -> Option<u64> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (super::number(first)?, super::number(last)?);
    (first <= last && last < 64).then(|| u64::MAX >> (63 - last) & u64::MAX << first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_bits() {
        for (text, want) in [
            ("0", Some(1)),
            ("0-1", Some(3)),
            ("2-3", Some(0xc)),
            ("0-63", Some(u64::MAX)),
            ("63", Some(1 << 63)),
            ("1-0", None),
            ("64", None),
            ("", None),
            ("1-", None),
            ("0-1-2", None),
        ] {
            assert_eq!(nodes(text), want, "{text}");
        }
    }
}
