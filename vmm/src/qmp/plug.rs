//! Hot-plug requests: owns how the arguments of `blockdev-add`, `netdev_add` and `device_add` become what the rooms below understand.
//!
//! The values have been checked against [`BLOCKDEV`], [`NETDEV`] and [`DEVICE`]; what is left are ranges and what fits together. Members that only
//! matter on other machines, or only to the client's own bookkeeping, are taken and have no effect.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde_json::Value;

use super::arguments::Kind::{self, Any, Bool, Int, Null, Object, OneOf, Text, Word};
use super::arguments::{Arguments, Get, Member, check, may, must, quote};
use super::descriptors::Descriptors;
use super::message::QmpError;
use crate::config::{
    Aio, BackingImage, DetectZeroes, Drive, HostAddress, ImageFormat, NetBackend, Netdev, TapSource,
};
use crate::control::Command;
use crate::machine::NewDevice;

/// Longest name of a back end or device, in bytes.
const ID_MAX: usize = 255;
/// Longest file name.
const PATH_MAX: usize = 4095;
/// Longest name of a socket (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
const SERIAL_MAX: usize = 20;
/// Most images under one.
const BACKING_MAX: usize = 64;
const IOPS_MAX: u64 = 1_000_000;
/// Largest cache of a qcow2 image, in bytes.
const CACHE_MAX: u64 = 32 << 20;
const QUEUE_PAIRS_MAX: u16 = 16;
/// Most queues of a disk.
const QUEUES_MAX: u16 = 32;
const DISK_QUEUE_SIZES: (u16, u16) = (4, 1024);
const NIC_QUEUE_SIZES: (u16, u16) = (256, 4096);
/// Shortest and longest interface name (IFNAMSIZ counts the final zero).
const IFNAME_MAX: usize = 15;

pub(super) const BLOCKDEV: &[Member] = &[
    must("node-name", Text),
    must("file", Object(FILE)),
    may("driver", Word(&["raw", "qcow2"])),
    may("read-only", Bool),
    may("cache", Object(&[may("direct", Bool), may("no-flush", Bool)])),
    may("discard", Word(&["ignore", "unmap"])),
    may("detect-zeroes", Word(&["off", "on", "unmap"])),
    may("throttling.iops-total", Int),
    may("l2-cache-size", Int),
    may("refcount-cache-size", Int),
    may("backing", OneOf(BACKING)),
    may("media", Word(&["disk", "cdrom"])),
    may("id", Text),
    may("options", Any),
];

const FILE: &[Member] = &[
    must("driver", Word(&["file", "host_device"])),
    must("filename", Text),
    may("aio", Word(&["off", "threads", "native", "iouring", "io_uring"])),
    // Of Flotilla: a descriptor that came with getfd stands for the file, which this process may not open itself.
    may("fd", Text),
];

/// What lies under a qcow2 image: nothing, a node that was added before, or an image that is described here.
const BACKING: &[Kind] = &[Null, Text, Object(UNDER)];

/// An image under another one is only read, through the page cache; what else a client says of it has no effect.
const UNDER: &[Member] = &[
    must("file", Object(FILE)),
    may("driver", Word(&["raw", "qcow2"])),
    // Checked level by level: a type cannot hold itself.
    may("backing", Any),
    may("node-name", Text),
    may("read-only", Bool),
    may("cache", Object(&[may("direct", Bool), may("no-flush", Bool)])),
    may("discard", Word(&["ignore", "unmap"])),
    may("detect-zeroes", Word(&["off", "on", "unmap"])),
];

pub(super) const NETDEV: &[Member] = &[
    must("id", Text),
    may("type", Word(&["tap", "vhost-user"])),
    may("ifname", Text),
    may("fd", Text),
    may("fds", Text),
    may("path", Text),
    may("queues", Int),
    may("vhost", Bool),
    may("vhostfd", Text),
    may("vhostfds", Text),
    may("chardev", Text),
    may("script", Text),
    may("downscript", Text),
    may("dnssearch", Any),
    may("macnat", Bool),
];

/// `netdev_replace`.
pub(super) const REPLACEMENT: &[Member] =
    &[must("id", Text), must("ifname", Text), may("path", Text), may("macnat", Bool)];

pub(super) const CHARDEV: &[Member] = &[
    must("id", Text),
    must("backend", Object(&[must("type", Word(&["socket"])), must("data", Object(SOCKET))])),
];

/// The socket of a process that serves a device: of another kind no guest could see what comes now.
const SOCKET: &[Member] = &[
    must("addr", Object(&[must("type", Word(&["unix"])), must("data", Object(&[must("path", Text)]))])),
    may("server", Bool),
    may("wait", Bool),
    may("nodelay", Bool),
    may("reconnect", Int),
];

pub(super) const DEVICE: &[Member] = &[
    must("id", Text),
    must("driver", Text),
    may("addr", Text),
    may("lun", Int),
    may("drive", Text),
    may("netdev", Text),
    may("chardev", Text),
    may("mac", Text),
    may("serial", Text),
    may("bus", Text),
    may("iothread", Text),
    may("mq", Bool),
    may("vectors", Int),
    may("multifunction", Bool),
    may("num-queues", Int),
    may("queue-size", Int),
    may("boot_index", Int),
    may("bootindex", Int),
    may("romfile", Text),
    may("share-rw", Bool),
    may("disable-modern", Bool),
    may("host", Text),
    may("sysfsdev", Text),
    may("port", Text),
    may("backend", Text),
    may("path", Text),
    may("cpu-id", Int),
];

pub(super) const ID: &[Member] = &[must("id", Text)];
pub(super) const NODE_NAME: &[Member] = &[must("node-name", Text)];

fn bad(text: impl Into<String>) -> QmpError {
    QmpError::generic(text)
}

/// A name of 1 to 255 bytes without control characters: it goes into logs and answers.
pub(super) fn name(arguments: &Arguments, member: &str) -> Result<String, QmpError> {
    let text = arguments.text(member).unwrap_or_default();
    check_name(member, &text)?;
    Ok(text)
}

/// The same, for a name that came otherwise.
pub(super) fn check_name(member: &str, text: &str) -> Result<(), QmpError> {
    if text.is_empty() || text.len() > ID_MAX || text.chars().any(char::is_control) {
        return Err(bad(format!(
            "argument '{member}' must have 1 to {ID_MAX} bytes and no control characters"
        )));
    }
    Ok(())
}

fn filename(arguments: &Arguments) -> Result<String, QmpError> {
    let path = arguments.object("file").and_then(|f| f.text("filename")).unwrap_or_default();
    if path.is_empty() || path.len() > PATH_MAX || path.contains('\0') {
        return Err(bad(format!("argument 'file.filename' must be a path of 1 to {PATH_MAX} bytes")));
    }
    Ok(path)
}

/// The descriptor that stands for the file of an image, if the client says that one does.
fn sent_file(
    arguments: &Arguments,
    descriptors: &Descriptors,
) -> Result<Option<(PathBuf, OwnedFd)>, QmpError> {
    let Some(name) = arguments.object("file").and_then(|f| f.text("fd")) else { return Ok(None) };
    Ok(Some((filename(arguments)?.into(), take(descriptors, &name)?)))
}

fn format(arguments: &Arguments) -> ImageFormat {
    match arguments.text("driver").as_deref() {
        Some("qcow2") => ImageFormat::Qcow2,
        _ => ImageFormat::Raw,
    }
}

/// What `backing` describes: images, nearest first, and the node under the last of them.
fn backing(
    arguments: &Arguments,
    descriptors: &Descriptors,
    files: &mut Vec<(PathBuf, OwnedFd)>,
) -> Result<(Vec<BackingImage>, Option<String>), QmpError> {
    let (mut images, mut level) = (Vec::new(), arguments);
    loop {
        let under = match level.get("backing") {
            None | Some(Value::Null) => return Ok((images, None)),
            Some(_) if format(level) == ImageFormat::Raw => {
                return Err(bad("a raw image has no backing file: say \"driver\": \"qcow2\""));
            }
            Some(Value::Object(under)) if images.len() < BACKING_MAX => under,
            Some(Value::Object(_)) => {
                return Err(bad(format!(
                    "at most {BACKING_MAX} images can lie under one: commit some of them"
                )));
            }
            Some(Value::String(node)) => return Ok((images, Some(node.clone()))),
            Some(_) => return Err(bad("argument 'backing' must be null, the name of a node, or an object")),
        };
        check("blockdev-add", UNDER, under)?;
        images.push(BackingImage { file: filename(under)?.into(), format: format(under) });
        files.extend(sent_file(under, descriptors)?);
        level = under;
    }
}

/// `blockdev-add`. Descriptors that it names are taken, whatever becomes of the request.
pub(super) fn blockdev(arguments: &Arguments, descriptors: &Descriptors) -> Result<Command, QmpError> {
    let id = name(arguments, "node-name")?;
    let file = arguments.object("file");
    let path = filename(arguments)?;
    let mut files: Vec<_> = sent_file(arguments, descriptors)?.into_iter().collect();
    let (backing, node) = backing(arguments, descriptors, &mut files)?;
    let aio = file.and_then(|f| f.text("aio")).map(|word| match word.as_str() {
        "native" => Aio::Native,
        "threads" => Aio::Threads,
        "off" => Aio::Off,
        _ => Aio::IoUring,
    });
    let direct = arguments.object("cache").and_then(|c| c.boolean("direct")).unwrap_or(true);
    if aio == Some(Aio::Native) && !direct {
        return Err(bad(
            "Invalid parameter 'aio' for 'native aio type should be used with \"direct\" on': set cache.direct to true",
        ));
    }
    let iops_total = arguments.int("throttling.iops-total").filter(|n| *n > 0);
    for cache in ["l2-cache-size", "refcount-cache-size"] {
        if arguments.int(cache).is_some_and(|n| n > CACHE_MAX) {
            return Err(bad(format!("argument '{cache}' must be at most {CACHE_MAX} bytes")));
        }
    }
    if iops_total.is_some_and(|n| n > IOPS_MAX) {
        return Err(bad(format!("argument 'throttling.iops-total' must be at most {IOPS_MAX}")));
    }
    let size = |member: &str| arguments.int(member).filter(|n| *n > 0);
    let drive = Box::new(Drive {
        // Nobody writes to a compact disc.
        readonly: arguments.boolean("read-only").unwrap_or(false)
            || arguments.text("media").as_deref() == Some("cdrom"),
        direct,
        aio,
        format: format(arguments),
        backing,
        iops_total,
        discard: arguments.text("discard").as_deref() == Some("unmap"),
        detect_zeroes: match arguments.text("detect-zeroes").as_deref() {
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        },
        no_flush: arguments.object("cache").and_then(|c| c.boolean("no-flush")).unwrap_or(false),
        l2_cache_size: size("l2-cache-size"),
        refcount_cache_size: size("refcount-cache-size"),
        ..Drive::new(id, path)
    });
    Ok(Command::BlockdevAdd { drive, node, files })
}

/// `migrate`. Descriptors that its URI names (`fd:STATE:MEMORY`) are taken, whatever becomes of the request.
pub(super) fn migrate(arguments: &Arguments, descriptors: &Descriptors) -> Result<Command, QmpError> {
    let uri = name(arguments, "uri")?;
    let named =
        uri.strip_prefix("fd:").map(|names| names.split(':').map(|name| take(descriptors, name)).collect());
    Ok(Command::Migrate { descriptors: named.transpose()?.unwrap_or_default(), uri })
}

fn take(descriptors: &Descriptors, name: &str) -> Result<OwnedFd, QmpError> {
    let missing = || bad(format!("no descriptor is called '{}': send it with getfd first", quote(name)));
    descriptors.take(name).ok_or_else(missing)
}

/// `chardev-add`.
pub(super) fn chardev(arguments: &Arguments) -> Result<Command, QmpError> {
    let id = name(arguments, "id")?;
    let data = arguments.object("backend").and_then(|b| b.object("data"));
    if data.and_then(|d| d.boolean("server")).unwrap_or(false) {
        return Err(bad(
            "a chardev of a running VM is for vhost-user, whose back end is the server: say \"server\": false",
        ));
    }
    let addr = data.and_then(|d| d.object("addr")).and_then(|a| a.object("data"));
    let path = addr.and_then(|a| a.text("path")).unwrap_or_default();
    if path.is_empty() || path.len() > SOCKET_PATH_MAX || path.contains('\0') {
        return Err(bad(format!(
            "argument 'backend.data.addr.data.path' must be a path of 1 to {SOCKET_PATH_MAX} bytes"
        )));
    }
    Ok(Command::ChardevAdd { id, path: path.into() })
}

/// `queues`.
fn queue_pairs(arguments: &Arguments) -> Result<Option<u16>, QmpError> {
    let pairs = arguments.int("queues").map(|n| u16::try_from(n).unwrap_or(u16::MAX));
    match pairs {
        Some(n) if !(1..=QUEUE_PAIRS_MAX).contains(&n) => {
            Err(bad(format!("argument 'queues' must be 1 to {QUEUE_PAIRS_MAX}")))
        }
        pairs => Ok(pairs),
    }
}

/// `netdev_add` for what another process serves.
fn served_netdev(id: String, arguments: &Arguments) -> Result<Command, QmpError> {
    let Some(chardev) = arguments.text("chardev") else {
        return Err(bad(
            "argument 'chardev' of a vhost-user netdev is missing: add the socket of its process first (chardev-add)",
        ));
    };
    let of_a_tap = ["ifname", "fd", "fds", "path", "vhost", "vhostfd", "vhostfds"];
    if let Some(member) = of_a_tap.into_iter().find(|member| arguments.contains_key(*member)) {
        return Err(bad(format!(
            "argument '{member}' is for a tap, not for a vhost-user netdev: leave it out"
        )));
    }
    let queues = queue_pairs(arguments)?.unwrap_or(1);
    Ok(Command::NetdevAdd {
        netdev: Netdev { id, backend: NetBackend::VhostUser { chardev, queues } },
        fds: Vec::new(),
        vhost_fds: Vec::new(),
    })
}

fn tap_name(name: String) -> Result<String, QmpError> {
    if (1..=IFNAME_MAX).contains(&name.len()) {
        return Ok(name);
    }
    Err(bad(format!("argument 'ifname' must have 1 to {IFNAME_MAX} bytes")))
}

/// `netdev_replace`.
pub(super) fn replacement(arguments: &Arguments) -> Result<Command, QmpError> {
    let (id, ifname) = (name(arguments, "id")?, tap_name(arguments.text("ifname").unwrap_or_default())?);
    Ok(Command::NetdevReplace { id, ifname, path: tun_path(arguments)? })
}

/// The device that a tap is opened through.
fn tun_path(arguments: &Arguments) -> Result<Option<PathBuf>, QmpError> {
    match arguments.text("path") {
        None => Ok(None),
        Some(path) if path.is_empty() || path.len() > PATH_MAX || path.contains('\0') => {
            Err(bad(format!("argument 'path' must be a path of 1 to {PATH_MAX} bytes")))
        }
        Some(path) => Ok(Some(path.into())),
    }
}

/// `netdev_add`. Descriptors that it names are taken, whatever becomes of the request.
pub(super) fn netdev(arguments: &Arguments, descriptors: &Descriptors) -> Result<Command, QmpError> {
    let id = name(arguments, "id")?;
    if arguments.text("type").as_deref() == Some("vhost-user") || arguments.contains_key("chardev") {
        return served_netdev(id, arguments);
    }
    let named = |one: &str, many: &str| -> Result<Vec<OwnedFd>, QmpError> {
        let text = match (arguments.text(one), arguments.text(many)) {
            (Some(_), Some(_)) => {
                return Err(bad(format!("arguments '{one}' and '{many}' exclude each other")));
            }
            (Some(text), None) | (None, Some(text)) => text,
            (None, None) => return Ok(Vec::new()),
        };
        text.split(':').map(|name| take(descriptors, name)).collect()
    };
    let (fds, vhost_fds) = (named("fd", "fds")?, named("vhostfd", "vhostfds")?);
    let vhost = arguments.boolean("vhost").unwrap_or(false);
    if !vhost && !vhost_fds.is_empty() {
        return Err(bad("Argument 'vhostfd' or 'vhostfds' are not needed for virtio-net device"));
    }
    let queues = match queue_pairs(arguments)? {
        None => u16::try_from(fds.len().max(1)).unwrap_or(u16::MAX),
        Some(n) => n,
    };
    let source = match (arguments.text("ifname"), fds.is_empty()) {
        (Some(_), false) => return Err(bad("arguments 'ifname' and 'fd' exclude each other")),
        (Some(name), true) => TapSource::Name(tap_name(name)?),
        (None, false) => TapSource::Fds(Vec::new()),
        (None, true) => {
            return Err(bad("Tap device is missing, use 'ifname' or 'fd' to configure a tap device"));
        }
    };
    let path = tun_path(arguments)?;
    if path.is_some() && !fds.is_empty() {
        return Err(bad(
            "argument 'path' is where a tap of a name is opened, and its descriptors are given: leave it out",
        ));
    }
    let backend = NetBackend::Tap { source, queues, vhost, vhost_fds: Vec::new(), path };
    Ok(Command::NetdevAdd { netdev: Netdev { id, backend }, fds, vhost_fds })
}

/// `device_add`.
pub(super) fn device(arguments: &Arguments) -> Result<Command, QmpError> {
    let serial = arguments.text("serial");
    if serial.as_ref().is_some_and(|s| s.len() > SERIAL_MAX) {
        return Err(bad(format!("argument 'serial' must have at most {SERIAL_MAX} bytes")));
    }
    let mac = match arguments.text("mac") {
        None => None,
        Some(text) => Some(parse_mac(&text).ok_or_else(|| {
            bad("argument 'mac' must be six hexadecimal bytes like 52:54:00:12:34:56, not a group address")
        })?),
    };
    let num_queues = arguments.int("num-queues").map(|n| u16::try_from(n).unwrap_or(u16::MAX));
    if num_queues.is_some_and(|n| !(1..=QUEUES_MAX).contains(&n)) {
        return Err(bad(format!("argument 'num-queues' must be 1 to {QUEUES_MAX}")));
    }
    let queue_size = arguments.int("queue-size").map(|n| u16::try_from(n).unwrap_or(u16::MAX));
    let is_nic = arguments.text("driver").is_some_and(|driver| driver.contains("net"));
    let (least, most) = if is_nic { NIC_QUEUE_SIZES } else { DISK_QUEUE_SIZES };
    if queue_size.is_some_and(|n| !n.is_power_of_two() || n < least || n > most) {
        return Err(bad(format!("argument 'queue-size' must be a power of two from {least} to {most}")));
    }
    let drive = arguments.text("drive");
    // A NIC's back end was called `chardev` by some versions of some clients.
    let chardev = arguments.text("chardev");
    let netdev = arguments.text("netdev").or_else(|| chardev.clone());
    Ok(Command::DeviceAdd(Box::new(NewDevice {
        id: name(arguments, "id")?,
        driver: arguments.text("driver").unwrap_or_default(),
        drive,
        netdev,
        chardev,
        addr: arguments.text("addr"),
        bus: arguments.text("bus"),
        lun: arguments.int("lun"),
        serial,
        mac,
        num_queues,
        queue_size,
        multi_queue: arguments.boolean("mq").unwrap_or(false),
        host: HostAddress::given(arguments.text("host"), arguments.text("sysfsdev")),
        cpu_id: arguments.int("cpu-id"),
        iothread: arguments.text("iothread"),
    })))
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}
