//! `-drive`, `-netdev`, `-chardev`, `-serial`, `-object`, `-qmp`, `-mon`: the host ends that devices and clients use.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::path::PathBuf;

use super::props::{Props, path_value, size};
use super::{CmdlineError, Given};
use crate::config::{
    Aio, BackingImage, Chardev, ChardevKind, DetectZeroes, Drive, ImageFormat, Monitor, NetBackend, Netdev,
    TapSource, Trace, VmConfig,
};

/// Most requests per second that a throttle can be set to.
const IOPS_MAX: u64 = 1_000_000;
/// Most bytes of a cache for a qcow2 image's tables.
const CACHE_MAX: u64 = 32 << 20;
/// Most queue pairs of a network back end.
const QUEUE_PAIRS_MAX: u64 = 16;

/// Reads the options of this file out of `given` into `config`.
pub(super) fn read(given: &mut Given, config: &mut VmConfig) -> Result<(), CmdlineError> {
    for text in given.many("-drive") {
        let drive = drive(&text)?;
        if drive.pflash_unit.is_some() {
            config.flash.push(drive);
        } else {
            config.drives.push(drive);
        }
    }
    for text in given.many("-netdev") {
        config.netdevs.push(netdev(&text)?);
    }
    for text in given.many("-chardev") {
        let mut props = Props::parse("-chardev", &text, Some("backend"))?;
        let id = props.required_id()?;
        config.chardevs.push(Chardev { id, kind: chardev_kind(props)? });
    }
    if let Some(text) = given.one("-serial") {
        config.serial = Some(match text.strip_prefix("chardev:") {
            Some("") => {
                return Err(CmdlineError::BadValue {
                    option: "-serial",
                    message: "the id is missing: write chardev:ID".to_owned(),
                });
            }
            Some(id) => ChardevKind::Ref(id.to_owned()),
            None => chardev_kind(Props::parse("-serial", &text, Some("backend"))?)?,
        });
    }
    for text in given.many("-object") {
        super::small_devices::object(&text, config)?;
    }
    if let Some(text) = given.one("-qmp") {
        config.monitors.push(qmp(&text, &config.iothreads)?);
    }
    if let Some(text) = given.one("-mon") {
        config.monitors.push(mon(&text)?);
    }
    Ok(())
}

pub(super) fn drive(text: &str) -> Result<Drive, CmdlineError> {
    let mut props = Props::parse("-drive", text, None)?;
    let interface = props.text("if")?.unwrap_or_else(|| "none".to_owned());
    match interface.as_str() {
        "none" => {}
        "pflash" => return pflash(props),
        other => return Err(props.bad(format!("if={other}: use none or pflash"))),
    }
    let id = props.required_id()?;
    let file = PathBuf::from(props.required("file")?);
    let mut readonly = props.boolean("readonly")?.unwrap_or(false);
    let direct = props.boolean("direct")?.unwrap_or(true);
    let aio = match props.text("aio")?.as_deref() {
        None => None,
        Some("native") => Some(Aio::Native),
        Some("io_uring" | "iouring") => Some(Aio::IoUring),
        Some("threads") => Some(Aio::Threads),
        Some("off") => Some(Aio::Off),
        Some(other) => return Err(props.bad(format!("aio={other}: use native, io_uring, threads or off"))),
    };
    let format = match props.text("format")?.as_deref() {
        None | Some("raw") => ImageFormat::Raw,
        Some("qcow2") => ImageFormat::Qcow2,
        Some(other) => return Err(props.bad(format!("format={other}: use raw or qcow2"))),
    };
    match props.text("media")?.as_deref() {
        None | Some("disk") => {}
        // Nobody writes to a compact disc.
        Some("cdrom") => readonly = true,
        Some(other) => return Err(props.bad(format!("media={other}: use disk or cdrom"))),
    }
    let iops_total = props.number("throttling.iops-total", 0..=IOPS_MAX)?;
    let discard = props.boolean("discard")?.unwrap_or(false);
    let detect_zeroes = match props.text("detect-zeroes")?.as_deref() {
        None | Some("off") => DetectZeroes::Off,
        Some("on") => DetectZeroes::On,
        Some("unmap") => DetectZeroes::Unmap,
        Some(other) => return Err(props.bad(format!("detect-zeroes={other}: use off, on or unmap"))),
    };
    let l2_cache_size = cache_size(&mut props, "l2-cache-size")?;
    let refcount_cache_size = cache_size(&mut props, "refcount-cache-size")?;
    let backing_format = match props.text("backing-format")?.as_deref() {
        None | Some("qcow2") => ImageFormat::Qcow2,
        Some("raw") => ImageFormat::Raw,
        Some(other) => return Err(props.bad(format!("backing-format={other}: use raw or qcow2"))),
    };
    let backing = props.path("backing")?.map(|file| BackingImage { file, format: backing_format });
    props.refuse("unit")?;
    props.finish()?;
    Ok(Drive {
        readonly,
        direct,
        aio,
        format,
        iops_total,
        discard,
        detect_zeroes,
        backing: backing.into_iter().collect(),
        l2_cache_size,
        refcount_cache_size,
        ..Drive::new(id, file)
    })
}

/// Firmware in flash. It needs no name: nothing refers to it.
fn pflash(mut props: Props) -> Result<Drive, CmdlineError> {
    let Some(unit) = props.number("unit", 0..=1)? else {
        return Err(
            props.bad("'unit' is missing for 'pflash' device: add unit=0 for code, or unit=1 for variables")
        );
    };
    let id = props.id()?.unwrap_or_else(|| format!("pflash{unit}"));
    let file = PathBuf::from(props.required("file")?);
    let readonly = props.boolean("readonly")?.unwrap_or(false);
    if let Some(format) = props.text("format")?.filter(|format| format != "raw") {
        return Err(props.bad(format!("format={format}: flash is raw")));
    }
    // It is read at once and written in bytes, which a direct way does not do.
    props.boolean("direct")?;
    props.finish()?;
    let unit = u8::try_from(unit).ok();
    Ok(Drive { readonly, direct: false, pflash_unit: unit, ..Drive::new(id, file) })
}

/// `key=SIZE`, at most 32 MiB.
fn cache_size(props: &mut Props, key: &'static str) -> Result<Option<u64>, CmdlineError> {
    let Some(text) = props.text(key)? else { return Ok(None) };
    match size(&text).filter(|n| *n <= CACHE_MAX) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(props.bad(format!("{key}={text}: write a size of at most 32M"))),
    }
}

fn vhost_user(mut props: Props) -> Result<Netdev, CmdlineError> {
    let id = props.required_id()?;
    let chardev = props.required("chardev")?;
    let queues = props.number("queues", 1..=QUEUE_PAIRS_MAX)?.and_then(|n| u16::try_from(n).ok());
    props.finish()?;
    Ok(Netdev { id, backend: NetBackend::VhostUser { chardev, queues: queues.unwrap_or(1) } })
}

fn netdev(text: &str) -> Result<Netdev, CmdlineError> {
    let mut props = Props::parse("-netdev", text, Some("type"))?;
    match props.word("type")?.as_deref() {
        Some("tap") => {}
        Some("vhost-user") => return vhost_user(props),
        Some(other) => return Err(props.bad(format!("unknown kind '{other}': use tap or vhost-user"))),
        None => return Err(props.bad("the kind is missing: write -netdev tap,id=ID,ifname=NAME")),
    }
    let id = props.required_id()?;
    let name = props.text("ifname")?;
    let fds = fd_list(&mut props, "fd", "fds")?;
    let pairs = props.number("queues", 1..=QUEUE_PAIRS_MAX)?;
    let vhost = props.boolean("vhost")?.unwrap_or(false);
    let vhost_fds = fd_list(&mut props, "vhostfd", "vhostfds")?;
    let path = props.path("path")?;
    if props.boolean("macnat")? == Some(true) {
        return Err(props.unsupported("macnat=on"));
    }
    // Management tools say that they have set the tap up themselves.
    for key in ["script", "downscript"] {
        match props.text(key)?.as_deref() {
            None | Some("no") => {}
            Some(script) => {
                return Err(props.bad(format!("{key}={script}: nothing is run here: write {key}=no")));
            }
        }
    }
    let source = match (name, fds.is_empty()) {
        (Some(name), true) => TapSource::Name(name),
        (None, false) => TapSource::Fds(fds),
        (None, true) => {
            return Err(props.bad("the tap device is missing: use 'ifname' or 'fd' to name one"));
        }
        (Some(_), false) => return Err(props.bad("'ifname' and 'fd' exclude each other")),
    };
    let queues = match (&source, pairs) {
        (TapSource::Fds(fds), None) => fds.len() as u64,
        (TapSource::Fds(fds), Some(n)) if n != fds.len() as u64 => {
            return Err(props.bad(format!("queues={n} does not match the {} descriptors", fds.len())));
        }
        (_, n) => n.unwrap_or(1),
    };
    props.finish()?;
    let queues = u16::try_from(queues).unwrap_or(u16::MAX);
    Ok(Netdev { id, backend: NetBackend::Tap { source, queues, vhost, vhost_fds, path } })
}

/// `one=N` or `many=A:B:C`.
fn fd_list(props: &mut Props, one: &'static str, many: &'static str) -> Result<Vec<RawFd>, CmdlineError> {
    let (key, text) = match (props.text(one)?, props.text(many)?) {
        (None, None) => return Ok(Vec::new()),
        (Some(text), None) => (one, text),
        (None, Some(text)) => (many, text),
        (Some(_), Some(_)) => return Err(props.bad(format!("'{one}' and '{many}' exclude each other"))),
    };
    let fds: Option<Vec<RawFd>> =
        text.split(':').map(|n| n.parse().ok().filter(|fd: &RawFd| *fd > 2 && !n.starts_with('+'))).collect();
    match fds {
        Some(fds) if (key == many || fds.len() == 1) && fds.len() as u64 <= QUEUE_PAIRS_MAX => Ok(fds),
        _ => Err(props.bad(format!(
            "{key}={text}: write the number of an inherited descriptor above 2{}",
            if key == many { ", several joined with ':'" } else { "" }
        ))),
    }
}

fn chardev_kind(mut props: Props) -> Result<ChardevKind, CmdlineError> {
    let kind = match props.word("backend")?.as_deref() {
        Some("stdio") => ChardevKind::Stdio,
        Some("pty") => ChardevKind::Pty,
        Some("redirect-to-log") => ChardevKind::Log,
        Some("file") => match props.path("path")? {
            Some(path) => ChardevKind::File(path),
            None => return Err(props.bad("'path' is missing: write file,path=PATH")),
        },
        Some("socket") => socket(&mut props)?,
        other => {
            return Err(props.bad(format!(
                "unknown kind '{}': use stdio, pty, file, socket or redirect-to-log",
                other.unwrap_or("")
            )));
        }
    };
    props.finish()?;
    Ok(kind)
}

fn socket(props: &mut Props) -> Result<ChardevKind, CmdlineError> {
    let path = props.path("path")?;
    let host = props.text("host")?;
    let port = props.number("port", 1..=u64::from(u16::MAX))?.and_then(|n| u16::try_from(n).ok());
    let server = props.flag("server")?;
    // QEMU's newer spelling is wait=off.
    let wait = props.boolean("wait")?;
    let nowait = props.flag("nowait")? || wait == Some(false);
    match (path, port) {
        (Some(path), None) if host.is_none() => Ok(ChardevKind::UnixSocket { path, server, nowait }),
        (None, Some(port)) => {
            let ip = match host {
                None => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                Some(host) => host
                    .parse()
                    .map_err(|_| props.bad(format!("host={host}: write an IP address, not a name")))?,
            };
            Ok(ChardevKind::TcpSocket { addr: SocketAddr::new(ip, port), server, nowait })
        }
        _ => Err(props.bad("a socket needs either path=PATH or port=N with an optional host=IP")),
    }
}

fn qmp(text: &str, iothreads: &[String]) -> Result<Monitor, CmdlineError> {
    let mut props = Props::parse("-qmp", text, Some("address"))?;
    let form = "write unix:PATH,server,nowait or tcp:IP:PORT,server,nowait";
    let address = props.word("address")?.unwrap_or_default();
    let monitor =
        match address.split_once(':') {
            Some(("unix", path)) => Monitor::Unix(path_value("-qmp", path)?),
            Some(("tcp", addr)) => Monitor::Tcp(addr.parse().map_err(|_| {
                props.bad(format!("'{addr}' is not IP:PORT (names are not looked up): {form}"))
            })?),
            _ => return Err(props.bad(format!("'{address}' is no address: {form}"))),
        };
    let (server, nowait) = (props.flag("server")?, props.flag("nowait")?);
    // The main loop answers in microseconds whatever the I/O threads do: there is nothing to be moved, only a name to be right.
    if let Some(id) = props.text("iothread")?
        && !iothreads.contains(&id)
    {
        return Err(props.bad(format!("iothread \"{id}\" not found: add -object iothread,id={id}")));
    }
    if !server || !nowait {
        return Err(props.bad(format!("'server' and 'nowait' must both be there: {form}")));
    }
    props.finish()?;
    Ok(monitor)
}

/// `-trace`.
pub(super) fn trace(text: &str) -> Result<Trace, CmdlineError> {
    let mut props = Props::parse("-trace", text, None)?;
    let trace = match (props.text("type")?.as_deref(), props.path("file")?) {
        (Some("all" | "events"), None) => Trace::All,
        (Some("scopes"), None) => return Err(props.unsupported("type=scopes (there are events only)")),
        (Some(other), None) => return Err(props.bad(format!("type={other}: use all"))),
        (None, Some(file)) => Trace::File(file),
        _ => return Err(props.bad("write either type=all or file=FILE")),
    };
    props.finish()?;
    Ok(trace)
}

fn mon(text: &str) -> Result<Monitor, CmdlineError> {
    let mut props = Props::parse("-mon", text, None)?;
    let chardev = props.required("chardev")?;
    props.id()?;
    match props.text("mode")?.as_deref() {
        Some("control") => {}
        Some(other) => return Err(props.bad(format!("mode={other}: use control"))),
        None => return Err(props.bad("'mode' is missing: add mode=control")),
    }
    props.finish()?;
    Ok(Monitor::Chardev(chardev))
}
