//! A VM's definition: owns the schema that people write (JSON or TOML) and that the daemon stores. Plain data, unknown keys refused.
//!
//! A kernel alone is a valid definition: `{"kernel": "/boot/vmlinuz"}`; a q35 may have firmware instead. Rules that need more than types (ranges, names, files) are the
//! daemon's, in one place.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What one VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Identity for the guest and for tools; made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<uuid::Uuid>,
    /// Free text for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Free key and value pairs for tools.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Board: `microvm` (default) or `q35`.
    #[serde(default)]
    pub machine: Machine,
    /// vCPUs, 1 to 254; default 1.
    #[serde(default = "one")]
    pub cpus: u8,
    /// Guest RAM, a number of MiB or a string such as `"512M"` or `"2G"`; 128 MiB to 512 GiB, default 256 MiB.
    #[serde(default)]
    pub memory: Size,
    /// Kernel image: bzImage, ELF vmlinux or raw vmlinux.bin. Absolute path. Absent: the firmware finds one on the disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Firmware of a q35. It boots the kernel, or what it finds on the disks, in their order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
    /// Initial RAM disk. Absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Command line of `kernel`; default `console=ttyS0 reboot=k panic=1`, with ` root=/dev/vda rw` when there is a disk and no initrd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// Disks in order: the first is the guest's `/dev/vda`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Network cards in order: the first is the guest's `eth0`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
    /// A balloon: the guest can give memory back to the host.
    #[serde(default, skip_serializing_if = "is_off")]
    pub balloon: bool,
    /// A source of random numbers for the guest, from the host's `/dev/urandom`.
    #[serde(default, skip_serializing_if = "is_off")]
    pub rng: bool,
    /// What happens when the VM ends by itself; default `never`.
    #[serde(default, skip_serializing_if = "Restart::is_never")]
    pub restart: Restart,
    /// The VM starts with the host.
    #[serde(default, skip_serializing_if = "is_off")]
    pub autostart: bool,
    /// VMs of a lower number start first, those of the same together; default 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub autostart_order: u16,
    /// Seconds from the start of this VM to that of the next number; default 0, at most 3600.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub autostart_delay: u16,
    /// What the VM does when the host shuts down, or its unit is stopped with `systemctl stop`; default `shutdown`.
    #[serde(default, skip_serializing_if = "HostShutdown::is_shutdown")]
    pub host_shutdown: HostShutdown,
    /// Seconds that it has for that before it is powered off, 1 to 900; default 30.
    #[serde(default = "host_shutdown_timeout", skip_serializing_if = "is_host_shutdown_timeout")]
    pub host_shutdown_timeout: u16,
    /// Limits and weights of the VM's systemd unit; changed ones hold at once, for a running VM too.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

fn is_off(on: &bool) -> bool {
    !*on
}

fn is_zero(number: &u16) -> bool {
    *number == 0
}

/// Seconds that a VM has for its end when its definition does not say.
fn host_shutdown_timeout() -> u16 {
    30
}

fn is_host_shutdown_timeout(seconds: &u16) -> bool {
    *seconds == host_shutdown_timeout()
}

impl VmSpec {
    /// Number of each disk, in order.
    #[must_use]
    pub fn disk_numbers(&self) -> Vec<u8> {
        numbers(self.disks.iter().map(|disk| disk.number))
    }

    /// Number of each card, in order.
    #[must_use]
    pub fn nic_numbers(&self) -> Vec<u8> {
        numbers(self.nics.iter().map(|nic| nic.number))
    }

    /// Both describe the same machine: they differ at most in what holds at once, without a new start.
    #[must_use]
    pub fn same_machine(&self, other: &Self) -> bool {
        let machine = |spec: &Self| Self {
            restart: Restart::Never,
            autostart: false,
            autostart_order: 0,
            autostart_delay: 0,
            host_shutdown: HostShutdown::Shutdown,
            host_shutdown_timeout: host_shutdown_timeout(),
            limits: Limits::default(),
            labels: BTreeMap::new(),
            description: String::new(),
            ..spec.clone()
        };
        machine(self) == machine(other)
    }
}

/// Those written down, and for each of the others the lowest that is left.
fn numbers(written: impl Iterator<Item = Option<u8>> + Clone) -> Vec<u8> {
    let taken: Vec<u8> = written.clone().flatten().collect();
    let mut left = (0..=u8::MAX).filter(|number| !taken.contains(number));
    written.filter_map(|number| number.or_else(|| left.next())).collect()
}

/// When a VM that ended is started again. A stop that somebody asked for is never undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Not by itself.
    #[default]
    Never,
    /// When its process died: a crash, a kill, an error.
    OnFailure,
    /// Then, and when the guest powered off or rebooted (which ends a microvm).
    Always,
}

impl Restart {
    fn is_never(&self) -> bool {
        *self == Self::Never
    }
}

/// What a VM does when the host shuts down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostShutdown {
    /// Its guest is asked to shut down.
    #[default]
    Shutdown,
    /// It is powered off at once.
    PowerOff,
}

impl HostShutdown {
    fn is_shutdown(&self) -> bool {
        *self == Self::Shutdown
    }
}

/// Limits and weights of a VM's unit (systemd.resource-control(5)). What is absent is not limited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Share of CPU time when others want it too, 1 to 10000; others have 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u16>,
    /// CPU time at most, percent of one CPU: 150 is one and a half.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_quota: Option<u32>,
    /// CPUs that it may run on: `"0-3,8"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_set: Option<String>,
    /// NUMA nodes that its memory comes from: `"0"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_nodes: Option<String>,
    /// Memory at most; more than the guest's, because the VMM needs some too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<Size>,
    /// Memory from which on it is slowed down and the kernel takes pages back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_high: Option<Size>,
    /// Share of disk time when others want it too, 1 to 10000; others have 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_weight: Option<u16>,
    /// Threads at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tasks_max: Option<u32>,
}

impl Limits {
    /// Nothing is limited.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// How an image is laid out. Always stated: a guest could write the header of another format into a raw disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// As the guest sees it.
    #[default]
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl Format {
    /// As definitions and the command line write it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    fn is_raw(&self) -> bool {
        *self == Self::Raw
    }
}

/// How the VMM reads and writes an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    /// io_uring(7).
    IoUring,
    /// Linux AIO; with `direct`.
    Native,
    /// A pool of threads.
    Threads,
}

impl Aio {
    /// As definitions and the command line write it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Native => "native",
            Self::Threads => "threads",
        }
    }
}

fn one() -> u8 {
    1
}

/// Boards that a definition can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// virtio-mmio only: the light VM.
    #[default]
    Microvm,
    /// PCIe with hot-plug that the guest takes part in, ACPI, a power button, a reboot in place.
    Q35,
}

impl Machine {
    /// As in definitions and on the VMM's command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::Q35 => "q35",
        }
    }
}

impl std::str::FromStr for Machine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Microvm, Self::Q35]
            .into_iter()
            .find(|machine| machine.word() == text)
            .ok_or_else(|| format!("machine {text:?} is unknown: use microvm or q35"))
    }
}

/// Firmware in flash, such as OVMF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Firmware {
    /// Image of its code, which no VM writes to. Absolute path.
    pub code: PathBuf,
    /// Image that it keeps its variables in, written to: each VM has one of its own. Absolute path.
    pub vars: PathBuf,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Image file or block device. Absolute path.
    pub path: PathBuf,
    /// Layout of the image: `raw` (default) or `qcow2`; never guessed.
    #[serde(default, skip_serializing_if = "Format::is_raw")]
    pub format: Format,
    /// Image that lies under this one, which is qcow2: what was never written here is read from there. Nobody may write to it. Absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<PathBuf>,
    /// Layout of the image under this one.
    #[serde(default, skip_serializing_if = "Format::is_raw")]
    pub backing_format: Format,
    /// Refuse the guest's writes.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// Serial number that the guest sees, at most 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How the VMM reads and writes; its own choice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aio: Option<Aio>,
    /// Requests per second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Blocks that the guest discards are given back to the host.
    #[serde(default, skip_serializing_if = "is_off")]
    pub discard: bool,
    /// Number of the disk, 0 to 31: `disk1` is its id. The lowest that no other has when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<u8>,
}

impl Disk {
    /// A raw disk, for reading and writing, with everything else as it is by default.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: Format::Raw,
            backing: None,
            backing_format: Format::Raw,
            readonly: false,
            direct: false,
            serial: None,
            aio: None,
            iops: None,
            discard: false,
            number: None,
        }
    }
}

/// A network card.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Bridge to put the tap on; made when it does not exist yet. Either this or `network`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub bridge: String,
    /// Network to put the tap on, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Hardware address `52:54:00:…`; derived from the VM's uuid and the card's number when absent, so it stays the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Number of the card, 0 to 31: `nic1` is its id. The lowest that no other has when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<u8>,
}

impl Nic {
    /// Where the card is: its network, or its bridge.
    #[must_use]
    pub fn place(&self) -> &str {
        self.network.as_deref().unwrap_or(&self.bridge)
    }
}

/// A number of bytes; written as MiB (a number) or with a unit (`"512M"`, `"2G"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(
    /// Bytes.
    pub u64,
);

impl Default for Size {
    fn default() -> Self {
        Self(256 << 20)
    }
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &text[digits.len()..] {
            "" | "M" | "m" | "MiB" => 20,
            "K" | "k" | "KiB" => 10,
            "G" | "g" | "GiB" => 30,
            "T" | "t" | "TiB" => 40,
            unit => return Err(format!("unknown unit \"{unit}\" in size \"{text}\": use K, M, G or T")),
        };
        let number: u64 =
            digits.parse().map_err(|_| format!("\"{text}\" is not a size: write 512M or 2G"))?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| format!("size \"{text}\" is too large"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n % (1 << 30) == 0 => write!(f, "{}G", n >> 30),
            n if n % (1 << 20) == 0 => write!(f, "{}M", n >> 20),
            n => write!(f, "{}K", n >> 10),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a number of MiB, or a size such as \"512M\" or \"2G\"")]
        enum Written {
            MiB(u64),
            Text(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::MiB(n) => n.to_string(),
            Written::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_alone_is_enough() {
        let spec: VmSpec = serde_json::from_str(r#"{"kernel":"/boot/vmlinuz"}"#).unwrap();
        assert_eq!((spec.cpus, spec.memory, spec.machine), (1, Size(256 << 20), Machine::Microvm));
        let back: VmSpec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(back, spec);
    }

    #[test]
    fn numbers_stay_with_their_devices() {
        let spec =
            |nics: &str| serde_json::from_str::<VmSpec>(&format!(r#"{{"kernel":"/k","nics":[{nics}]}}"#));
        for (nics, numbers) in [
            (r#"{"bridge":"a"},{"bridge":"b"}"#, vec![0, 1]),
            (r#"{"bridge":"a"},{"bridge":"b","number":0}"#, vec![1, 0]),
            (r#"{"bridge":"b","number":3},{"bridge":"a"},{"bridge":"c"}"#, vec![3, 0, 1]),
            ("", vec![]),
        ] {
            assert_eq!(spec(nics).unwrap().nic_numbers(), numbers, "{nics}");
        }
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error =
            serde_json::from_str::<VmSpec>(r#"{"kernel":"/k","memroy":"1G"}"#).unwrap_err().to_string();
        assert!(error.contains("memroy"), "{error}");
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("512", 512 << 20), ("512M", 512 << 20), ("2G", 2 << 30), ("1024K", 1 << 20)] {
            assert_eq!(text.parse::<Size>().unwrap(), Size(bytes));
        }
        for text in ["", "M", "1.5G", "-1", "1X", "99999999999999T"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
