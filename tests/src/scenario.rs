//! What scenarios share: hosts with the package or the bare VMM on them, Debian guests to run there, and a report of
//! steps. A scenario is a file in `tests/tests`; `tests/run scenarios` builds the package and runs them.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::console::Console;
use crate::host::Host;
use crate::qmp::Qmp;

/// What a scenario returns: it ends at the first thing that is not as it should be, with the reason.
pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// How long an emulated guest may take to boot, on a machine that runs other scenarios.
pub const BOOT: Duration = Duration::from_secs(240);

/// How long anything else in a guest or in the fleet may take.
pub const SOON: Duration = Duration::from_secs(30);

/// How long apt may take on a host.
const APT: Duration = Duration::from_secs(300);

/// The bridge that fleets' guests are on, and the host's address there.
pub const BRIDGE: &str = "br0";

/// Kernel command line of a guest inside an emulated host. `noxsave`: the emulator does not tell KVM there that the guest has
/// set XCR0, so KVM goes on with the old value, and a program of the guest that uses AVX dies now and then.
pub const EMULATED: &str = "console=ttyS0 quiet mitigations=off noxsave reboot=k panic=1";

/// Prints what is about to happen, with the time since the first step.
pub fn step(what: impl std::fmt::Display) {
    static BEGAN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    println!("[{:6.1} s] {what}", BEGAN.get_or_init(Instant::now).elapsed().as_secs_f64());
}

/// Fails with a text unless `condition` holds.
///
/// # Errors
/// When it does not.
pub fn check(condition: bool, what: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(what().into()) }
}

/// The package under test: `FLOTILLA_DEB`, or the newest in the target folder.
///
/// # Errors
/// When there is none.
pub fn package() -> Outcome<PathBuf> {
    if let Some(path) = given("FLOTILLA_DEB") {
        return Ok(path);
    }
    let dir = target()?.join("deb");
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    found.sort_by_key(|path| path.metadata().and_then(|data| data.modified()).ok());
    found.pop().ok_or_else(|| {
        format!("no package: set FLOTILLA_DEB, or run tests/run build ({})", dir.display()).into()
    })
}

/// One of the release programs, by name.
///
/// # Errors
/// When it is not built.
pub fn program(name: &str) -> Outcome<PathBuf> {
    let dir = given("FLOTILLA_RELEASE").map_or_else(|| target().map(|dir| dir.join("release")), Ok)?;
    let path = dir.join(name);
    check(path.is_file(), || format!("no program {}: run tests/run build", path.display()))?;
    Ok(path)
}

/// Where VMs of the default guest run, and `flotilla-vmm` and the guest there: this machine if it has a `/dev/kvm`, else a test host.
pub fn here_or_on_a_host(name: &str) -> Outcome<(Host, String, String)> {
    let (vmm, guest) = (program("flotilla-vmm")?, guest_program()?);
    if Path::new("/dev/kvm").exists() {
        return Ok((Host::here(), vmm.display().to_string(), guest.display().to_string()));
    }
    let host = Host::start(name)?;
    host.push(&vmm, "/usr/bin/flotilla-vmm")?;
    host.push(&guest, "/root/guest.elf")?;
    Ok((host, "/usr/bin/flotilla-vmm".into(), "/root/guest.elf".into()))
}

/// The default guest: `FLOTILLA_GUEST_ELF`, or the one in the target folder.
///
/// # Errors
/// When it is not built.
pub fn guest_program() -> Outcome<PathBuf> {
    given("FLOTILLA_GUEST_ELF").map_or_else(|| program("guest"), Ok)
}

fn given(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The cargo target folder this test was built in: TARGET/debug/deps/TEST.
fn target() -> Outcome<PathBuf> {
    let me = std::env::current_exe()?;
    Ok(me.ancestors().nth(3).ok_or("this test is in no target folder")?.to_owned())
}

/// A host that has the package installed with apt, and a bridge [`BRIDGE`] at 10.9.0.1/24.
///
/// # Errors
/// When the host does not start or apt refuses.
pub fn host_with_package(name: &str) -> Outcome<Host> {
    step("start a host");
    let host = Host::start(name)?;
    step("apt install ./flotilla.deb");
    install(&host, &package()?)?;
    host.ok(&format!("ip link add {BRIDGE} type bridge && ip address add 10.9.0.1/24 dev {BRIDGE} && ip link set {BRIDGE} up"))?;
    Ok(host)
}

/// Installs a package, or upgrades to it, with apt.
///
/// # Errors
/// When apt refuses.
pub fn install(host: &Host, package: &Path) -> Outcome {
    host.push(package, "/root/flotilla.deb")?;
    host.ok_for(APT, "cd /root && DEBIAN_FRONTEND=noninteractive apt-get install -q -y ./flotilla.deb")?;
    Ok(())
}

/// The package under test with a version that is one higher, in this folder. Packed here: a host would take minutes.
///
/// # Errors
/// When dpkg-deb fails.
pub fn next_package(folder: &Path) -> Outcome<PathBuf> {
    let (old, new) = (package()?, folder.join("flotilla_next.deb"));
    let script = "set -e; dpkg-deb -R \"$1\" \"$2/tree\"; sed -i 's/^Version: .*/&+1/' \"$2/tree/DEBIAN/control\"; \
                  dpkg-deb -Zgzip -b \"$2/tree\" \"$3\"";
    let arguments = [Path::new("sh"), &old, folder, &new];
    let output = std::process::Command::new("sh").args(["-c", script]).args(arguments).output()?;
    check(output.status.success(), || String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(new)
}

/// A Debian guest: own disk, on the fleet's bridge.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its name, also the VM's.
    pub name: String,
    /// Its address on the bridge.
    pub address: String,
    /// Its root disk on the host.
    pub disk: String,
}

impl Guest {
    /// Makes the disk for guest number `number` (1 to 200).
    ///
    /// # Errors
    /// When the host refuses.
    pub fn new(host: &Host, name: &str, number: u8) -> Outcome<Self> {
        let disk = format!("/var/lib/images/{name}.img");
        // The daemon's user exists where the package is installed.
        host.ok(&format!(
            "mkdir -p /var/lib/images && cp --sparse=always /srv/guest/root.img {disk} && \
             chmod 600 {disk} && {{ ! getent passwd flotillad >/dev/null || chown flotillad {disk}; }}"
        ))?;
        Ok(Self { name: name.to_owned(), address: format!("10.9.0.{}", 10 + u32::from(number)), disk })
    }

    /// Its kernel command line.
    #[must_use]
    pub fn append(&self) -> String {
        format!("{EMULATED} guest.name={} guest.ip={}/24", self.name, self.address)
    }

    /// Its definition for flotillad.
    #[must_use]
    pub fn definition(&self) -> Value {
        json!({
            "kernel": "/srv/guest/vmlinuz",
            "initrd": "/srv/guest/initrd.gz",
            "append": self.append(),
            "memory": "256M",
            "disks": [{ "path": self.disk }],
            "nics": [{ "bridge": BRIDGE }],
            // It does not heed the power button.
            "host_shutdown_timeout": 2,
        })
    }

    /// Waits until it answers ping and its web server.
    ///
    /// # Errors
    /// After [`BOOT`].
    pub fn answers(&self, host: &Host) -> Outcome {
        host.eventually(BOOT, &format!("ping -c 1 -W 1 {}", self.address))?;
        let name = self.ask(host, "name")?;
        check(name == self.name, || format!("{} answers as \"{name}\"", self.name))
    }

    /// Seconds since its kernel booted, asked over the network.
    ///
    /// # Errors
    /// When it does not answer soon.
    pub fn uptime(&self, host: &Host) -> Outcome<f64> {
        let text = self.ask(host, "uptime")?;
        Ok(text.split_whitespace().next().unwrap_or_default().parse()?)
    }

    /// Asks its web server for one of `name`, `uptime`, `poweroff`.
    ///
    /// # Errors
    /// When it does not answer soon.
    pub fn ask(&self, host: &Host, what: &str) -> Outcome<String> {
        // Not the static busybox's wget: its resolver crashes without the libraries it was linked against.
        let get = format!(
            "set -o pipefail; printf 'GET /cgi-bin/{what} HTTP/1.0\\r\\n\\r\\n' | \
             timeout 10 socat -t 5 - TCP:{}:80,connect-timeout=5 | sed '1,/^\\r*$/d' | grep .",
            self.address
        );
        Ok(host.eventually(SOON, &get)?)
    }
}

/// A `flotilla-vmm` started by hand in a host, as root, in the background.
#[derive(Debug)]
pub struct Vmm<'a> {
    host: &'a Host,
    dir: String,
}

impl<'a> Vmm<'a> {
    /// Runs `flotilla-vmm` with these arguments, and a QMP socket unless they have `-qmp`; `{dir}` in them is a folder of this VM's own.
    /// Its output, exit code and process id go to `out`, `exit` and `pid` there.
    ///
    /// # Errors
    /// When it cannot be run; what it says itself is in `out`.
    pub fn start(host: &'a Host, name: &str, arguments: &str) -> Outcome<Self> {
        Self::start_as(host, "flotilla-vmm", name, arguments)
    }

    /// As [`Vmm::start`], with another program.
    ///
    /// # Errors
    /// As for [`Vmm::start`].
    pub fn start_as(host: &'a Host, program: &str, name: &str, arguments: &str) -> Outcome<Self> {
        let dir = format!("/run/vmm/{name}");
        let arguments = arguments.replace("{dir}", &dir);
        // One that says where its monitor is has no other.
        let monitor = if arguments.contains("-qmp ") {
            String::new()
        } else {
            format!("-qmp unix:{dir}/qmp.sock,server,nowait")
        };
        host.ok(&format!(
            "mkdir -p {dir} && cd {dir} && rm -f * && \
             (setsid sh -c '{program} -name {name} {monitor} \"$@\" & echo $! > pid; wait $!; echo $? > exit.new; mv exit.new exit' \
             vmm {arguments} < /dev/null > out 2>&1 &)"
        ))?;
        Ok(Self { host, dir })
    }

    /// A path in this VM's folder.
    #[must_use]
    pub fn path(&self, file: &str) -> String {
        format!("{}/{file}", self.dir)
    }

    /// What it has printed.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn output(&self) -> Outcome<String> {
        Ok(self.host.ok(&format!("cat {}/out", self.dir))?)
    }

    /// Opens its QMP socket, once that is there.
    ///
    /// # Errors
    /// When it does not come, or does not answer.
    pub fn qmp(&self) -> Outcome<Qmp> {
        self.socket("qmp.sock")?;
        Ok(Qmp::new(self.host.dial(&self.path("qmp.sock"))?, SOON)?)
    }

    /// Opens the console on the socket `console.sock`, once that is there.
    ///
    /// # Errors
    /// When it does not come.
    pub fn console(&self) -> Outcome<Console> {
        self.socket("console.sock")?;
        Ok(Console::new(self.host.dial(&self.path("console.sock"))?))
    }

    fn socket(&self, name: &str) -> Outcome {
        let path = self.path(name);
        let found = self.host.eventually(SOON, &format!("test -S {path} || test -e {}/exit", self.dir));
        if found.is_err() || self.host.run(&format!("test -S {path}"))?.code != 0 {
            return Err(format!("no {path}; flotilla-vmm says: {}", self.output()?).into());
        }
        Ok(())
    }

    /// Waits for its end; returns the exit code.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn exit(&self, limit: Duration) -> Outcome<i32> {
        Ok(self.host.eventually(limit, &format!("cat {}/exit", self.dir))?.parse()?)
    }
}

impl Drop for Vmm<'_> {
    fn drop(&mut self) {
        let _ = self.host.run(&format!("kill -9 $(cat {0}/pid) 2>/dev/null; rm -rf {0}", self.dir));
    }
}

/// A host with the bare programs on it, for [`Vmm`].
///
/// # Errors
/// When it does not start, or the programs are not built.
pub fn host_with_vmm(name: &str) -> Outcome<Host> {
    with_vmm(Host::start(name)?)
}

/// As [`host_with_vmm`], for guests that start in firmware.
///
/// # Errors
/// As for [`host_with_vmm`].
pub fn host_with_vmm_for_firmware(name: &str) -> Outcome<Host> {
    with_vmm(Host::start_for_firmware(name)?)
}

fn with_vmm(host: Host) -> Outcome<Host> {
    host.push(&program("flotilla-vmm")?, "/usr/bin/flotilla-vmm")?;
    Ok(host)
}
