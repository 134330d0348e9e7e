//! The programs under comparison: how each is told to boot the default guest with one vCPU and a control socket.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::Result;

/// A VMM to measure.
pub(crate) struct Subject {
    /// As printed.
    pub(crate) name: String,
    /// The binary.
    pub(crate) program: PathBuf,
    arguments: Vec<String>,
}

/// What all subjects boot.
pub(crate) struct Setting {
    directory: TempDir,
    kernel: String,
    flat: String,
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
}

impl Command {
    /// The kernel command line.
    fn line(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::Spin => "quiet cmd=spin,600000",
        }
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
        "qemu" => {
            "-M microvm -enable-kvm -cpu host -m {memory} -kernel {kernel} -append {command} -nodefaults \
             -no-user-config -display none -serial stdio -qmp unix:{dir}/qmp.sock,server,nowait"
        }
        _ => return None,
    })
}

impl Subject {
    /// A program of a known kind: `name`, or what comes before its first `-` or digit.
    pub(crate) fn named(name: &str, program: PathBuf) -> Result<Self> {
        let kinds = ["floor", "flotilla", "stratovirt", "firecracker", "cloud-hypervisor", "qemu"];
        let arguments = kinds
            .iter()
            .find(|kind| {
                name == **kind || name.strip_prefix(**kind).is_some_and(|rest| rest.starts_with('-'))
            })
            .and_then(|kind| template(kind))
            .ok_or_else(|| {
                format!("peer {name}: not a VMM whose arguments are known; give them after commas")
            })?;
        let arguments = arguments.split_whitespace().map(str::to_owned).collect();
        Ok(Self { name: name.to_owned(), program, arguments })
    }

    /// `NAME=PATH` or `NAME=PATH,ARGUMENT,...`.
    pub(crate) fn peer(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once('=').ok_or_else(|| format!("peer {text}: expected NAME=PATH"))?;
        match rest.split_once(',') {
            None => Self::named(name, rest.into()),
            Some((program, arguments)) => Ok(Self {
                name: name.to_owned(),
                program: program.into(),
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
                "drives": [],
            });
            fs::write(directory.join("vm.json"), config.to_string())?;
        }
        let memory = setting.memory.to_string();
        let fill = |argument: &String| {
            argument
                .replace("{kernel}", &setting.kernel)
                .replace("{flat}", &setting.flat)
                .replace("{command}", command.line())
                .replace("{memory}", &memory)
                .replace("{dir}", &directory.to_string_lossy())
        };
        Ok(self.arguments.iter().map(fill).collect())
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
            directory,
            memory,
        })
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
