//! The programs under comparison: how each is told to boot the default guest with one vCPU and a control socket.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::Result;
use crate::lan;

/// The disk's size; no multiple of any cache's.
const DISK_MIB: usize = 192;

/// A VMM to measure.
pub(crate) struct Subject {
    /// As printed.
    pub(crate) name: String,
    /// The binary.
    pub(crate) program: PathBuf,
    /// Whose arguments it takes; none if they were given.
    kind: Option<&'static str>,
    arguments: Vec<String>,
}

/// What all subjects boot.
pub(crate) struct Setting {
    directory: TempDir,
    kernel: String,
    flat: String,
    disk: String,
    /// Guest RAM, MiB.
    pub(crate) memory: usize,
}

/// What the guest does after its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    /// It halts for good.
    Hold,
    /// It keeps its vCPU busy.
    Spin,
    /// It keeps a disk busy, in the ways that `load` lists.
    Disk,
    /// It sends frames of 64 bytes, then of 1514.
    Send,
    /// It counts frames, twice.
    Receive,
    /// It writes to 64 MiB and waits for what is typed.
    Used64,
    /// The same with 900 MiB.
    Used900,
    /// It goes on from the snapshot of one of those, and is told to write to 64 MiB again.
    Restored,
    /// It goes on from the snapshot too, and answers an empty line.
    Clone,
}

impl Command {
    /// The kernel command line.
    fn line(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::Spin => "quiet cmd=spin,600000",
            Self::Disk => {
                "quiet cmd=load,disk,read,32,4,700;load,disk,read,1,4,700;load,disk,write,32,4,700;\
                 load,disk,write,1,4,700;load,disk,scan,4,128,700"
            }
            Self::Send => "quiet cmd=load,net,send,64,1000;load,net,send,1514,1000",
            Self::Receive => "quiet cmd=load,net,receive,1000;load,net,receive,1000",
            // What is restored needs the same line.
            Self::Used64 | Self::Restored | Self::Clone => "quiet cmd=touch,64",
            Self::Used900 => "quiet cmd=touch,900",
        }
    }

    /// What its guest is told on the serial line before it runs. Others find no input there at all: a guest that is saved waits for it,
    /// one that is restored answers at once, whenever it was stopped and however long it lay.
    pub(crate) fn typed(self) -> &'static [u8] {
        match self {
            Self::Restored => b"touch 64\r",
            Self::Clone => b"\r",
            _ => b"",
        }
    }

    /// A byte that the guest prints before all others: of one that is restored, the echo of the first that was typed.
    pub(crate) fn first_byte(self) -> u8 {
        self.typed().first().copied().unwrap_or(b'\r')
    }
}

/// The arguments of VMMs that we know. Each gets a control socket, as in real use.
fn template(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "floor" => "--memory {memory} {kernel} {command}",
        "flotilla" => {
            "-machine microvm -smp 1 -m {memory}M -kernel {kernel} -append {command} -serial stdio \
             -qmp unix:{dir}/qmp.sock,server,nowait"
        }
        // The default guest drives no devices on PCI: what it costs to start and to keep.
        "flotilla-q35" => {
            "-machine q35 -smp 1 -m {memory}M -kernel {kernel} -append {command} -serial stdio \
             -qmp unix:{dir}/qmp.sock,server,nowait"
        }
        // Reads flat kernels and bzImages only.
        "stratovirt" => {
            "-machine microvm -smp 1 -m {memory}m -kernel {flat} -append {command} -serial stdio \
             -qmp unix:{dir}/qmp.sock,server,nowait"
        }
        "firecracker" => "--api-sock {dir}/api.sock --config-file {dir}/vm.json",
        "cloud-hypervisor" => {
            "--api-socket path={dir}/api.sock --kernel {kernel} --cmdline {command} --memory size={memory}M \
             --cpus boot=1 --serial tty --console off"
        }
        // A model that every KVM can do: some lack what `host` wants, and nothing here depends on it. With ACPI it would not name its
        // devices on the command line.
        "qemu" => {
            "-M microvm,acpi=off -enable-kvm -cpu qemu64 -m {memory} -kernel {kernel} -append {command} -nodefaults \
             -no-user-config -display none -serial stdio -qmp unix:{dir}/qmp.sock,server,nowait"
        }
        _ => return None,
    })
}

/// What gives a VMM that we know the disk or the tap; its name and its defaults are the host's to choose, aio and queues its own.
fn device(kind: &str, command: Command) -> &'static str {
    match (kind, command) {
        ("flotilla" | "stratovirt", Command::Restored | Command::Clone) => "-incoming file:{saved}",
        (
            _,
            Command::Hold
            | Command::Spin
            | Command::Used64
            | Command::Used900
            | Command::Restored
            | Command::Clone,
        ) => "",
        ("flotilla" | "stratovirt", Command::Disk) => {
            "-drive id=disk,file={disk},direct=off -device virtio-blk-device,drive=disk,id=blk"
        }
        ("flotilla" | "stratovirt", _) => {
            "-netdev tap,id=net,ifname={tap} -device virtio-net-device,netdev=net,id=nic"
        }
        ("qemu", Command::Disk) => {
            "-global virtio-mmio.force-legacy=false -object iothread,id=io \
             -drive if=none,id=disk,file={disk},format=raw -device virtio-blk-device,drive=disk,iothread=io"
        }
        ("qemu", _) => {
            "-global virtio-mmio.force-legacy=false -netdev tap,id=net,ifname={tap},script=no,downscript=no \
             -device virtio-net-device,netdev=net"
        }
        _ => "",
    }
}

impl Subject {
    /// A program of a known kind: `name`, or what comes before its first `-` or digit.
    pub(crate) fn named(name: &str, program: PathBuf) -> Result<Self> {
        let kinds =
            ["floor", "flotilla-q35", "flotilla", "stratovirt", "firecracker", "cloud-hypervisor", "qemu"];
        let (kind, arguments) = kinds
            .iter()
            .find(|kind| {
                name == **kind || name.strip_prefix(**kind).is_some_and(|rest| rest.starts_with('-'))
            })
            .and_then(|kind| Some((*kind, template(kind)?)))
            .ok_or_else(|| {
                format!("peer {name}: not a VMM whose arguments are known; give them after commas")
            })?;
        let arguments = arguments.split_whitespace().map(str::to_owned).collect();
        Ok(Self { name: name.to_owned(), program, kind: Some(kind), arguments })
    }

    /// `NAME=PATH` or `NAME=PATH,ARGUMENT,...`.
    pub(crate) fn peer(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once('=').ok_or_else(|| format!("peer {text}: expected NAME=PATH"))?;
        match rest.split_once(',') {
            None => Self::named(name, rest.into()),
            Some((program, arguments)) => Ok(Self {
                name: name.to_owned(),
                program: program.into(),
                kind: None,
                arguments: arguments.split(',').map(str::to_owned).collect(),
            }),
        }
    }

    /// The arguments for VM number `index`, whose directory this makes.
    pub(crate) fn arguments(&self, setting: &Setting, index: usize, command: Command) -> Result<Vec<String>> {
        let directory = self.directory(setting, index);
        fs::create_dir_all(&directory)?;
        for socket in ["qmp.sock", "api.sock"] {
            // A killed VMM leaves its socket, and some refuse to start then.
            let _ = fs::remove_file(directory.join(socket));
        }
        if self.arguments.iter().any(|a| a.contains("vm.json")) {
            let config = serde_json::json!({
                "boot-source": { "kernel_image_path": setting.kernel, "boot_args": command.line() },
                "machine-config": { "vcpu_count": 1, "mem_size_mib": setting.memory },
                "drives": match command {
                    Command::Disk => serde_json::json!([{
                        "drive_id": "disk", "path_on_host": setting.disk, "is_root_device": false, "is_read_only": false,
                    }]),
                    _ => serde_json::json!([]),
                },
                "network-interfaces": match command {
                    Command::Send | Command::Receive => {
                        serde_json::json!([{ "iface_id": "nic", "host_dev_name": lan::TAP }])
                    }
                    _ => serde_json::json!([]),
                },
            });
            fs::write(directory.join("vm.json"), config.to_string())?;
        }
        let memory = setting.memory.to_string();
        let saved = setting.saved(self).to_string_lossy().into_owned();
        let fill = |argument: &str| {
            argument
                .replace("{kernel}", &setting.kernel)
                .replace("{flat}", &setting.flat)
                .replace("{command}", command.line())
                .replace("{memory}", &memory)
                .replace("{dir}", &directory.to_string_lossy())
                .replace("{disk}", &setting.disk)
                .replace("{tap}", lan::TAP)
                .replace("{saved}", &saved)
        };
        let device = self.kind.map_or("", |kind| device(kind, command)).split_whitespace().map(str::to_owned);
        Ok(self.arguments.iter().cloned().chain(device).map(|a| fill(&a)).collect())
    }

    /// Whether it can be given what `command` needs.
    pub(crate) fn has(&self, command: Command) -> bool {
        match self.kind {
            Some("firecracker") => !matches!(command, Command::Restored | Command::Clone),
            Some(kind) => !device(kind, command).is_empty(),
            None => false,
        }
    }

    /// Where the standard error of VM `index` goes.
    pub(crate) fn errors(&self, setting: &Setting, index: usize) -> PathBuf {
        self.directory(setting, index).join("stderr")
    }

    /// Whether it is told to open a QMP socket.
    pub(crate) fn speaks_qmp(&self) -> bool {
        self.arguments.iter().any(|a| a.contains("{dir}/qmp.sock"))
    }

    /// Where the QMP socket of VM `index` is.
    pub(crate) fn qmp_socket(&self, setting: &Setting, index: usize) -> PathBuf {
        self.directory(setting, index).join("qmp.sock")
    }

    fn directory(&self, setting: &Setting, index: usize) -> PathBuf {
        setting.directory.path().join(format!("{}-{index}", self.name))
    }
}

impl Setting {
    /// Makes a place for sockets, and the flat form of `guest`.
    pub(crate) fn new(guest: &Path, memory: usize) -> Result<Self> {
        let directory = TempDir::with_prefix("flotilla-bench-")?;
        let guest = guest.canonicalize()?;
        let flat = directory.path().join("guest.bin");
        let elf = fs::read(&guest)?;
        fs::write(
            &flat,
            flatten(&elf).ok_or_else(|| format!("{}: not an ELF64 with one segment", guest.display()))?,
        )?;
        Ok(Self {
            kernel: guest.to_string_lossy().into_owned(),
            flat: flat.to_string_lossy().into_owned(),
            disk: directory.path().join("disk").to_string_lossy().into_owned(),
            directory,
            memory,
        })
    }
}

impl Setting {
    /// Where the snapshot of this subject is.
    pub(crate) fn saved(&self, subject: &Subject) -> PathBuf {
        self.directory.path().join(format!("{}-saved", subject.name))
    }

    /// Makes the disk's file, or what is left of the last round: in the page cache, and nothing of it still to be written.
    pub(crate) fn fresh_disk(&self) -> Result<()> {
        let mut file = fs::File::options().create(true).truncate(false).write(true).open(&self.disk)?;
        let bytes: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
        for _ in 0..DISK_MIB {
            file.write_all(&bytes)?;
        }
        Ok(file.sync_all()?)
    }
}

/// The bytes of the first loadable segment: the default guest has one, whose first byte is its entry.
fn flatten(elf: &[u8]) -> Option<&[u8]> {
    let long = |at: usize| {
        let bytes = elf.get(at..)?.first_chunk()?;
        usize::try_from(u64::from_le_bytes(*bytes)).ok()
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let header = long(32)?;
    let kind = u32::from_le_bytes(*elf.get(header..)?.first_chunk()?);
    let (offset, size) = (long(header.checked_add(8)?)?, long(header.checked_add(32)?)?);
    if kind != 1 {
        return None;
    }
    elf.get(offset..offset.checked_add(size)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_have_known_or_given_arguments() {
        assert_eq!(Subject::peer("qemu-7=/bin/q").unwrap().arguments[0], "-M");
        let own = Subject::peer("mine=/bin/m,-k,{kernel}").unwrap();
        assert_eq!((own.program.as_path(), own.arguments.len()), (Path::new("/bin/m"), 2));
        assert!(Subject::peer("mine=/bin/m").is_err());
    }

    #[test]
    fn flattens_only_elf() {
        let mut elf = vec![0; 200];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32] = 64;
        elf[64] = 1;
        elf[64 + 8] = 180;
        elf[64 + 32] = 3;
        assert_eq!(flatten(&elf).map(<[u8]>::len), Some(3));
        elf[64 + 32] = 30;
        assert_eq!(flatten(&elf), None);
        assert_eq!(flatten(b"MZ"), None);
    }
}
