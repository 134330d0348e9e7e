//! How the DHCP server of a network comes to run: owns the trait, and the way without systemd. Called by `fleet/dhcp.rs`, which writes the files that
//! a server reads: `NAME.conf` and `NAME.hosts`.
//!
//! Under systemd it is the unit `flotilla-dhcp@NAME.service`, which PID 1 starts again when it ends. Without systemd it is a plain daemon,
//! found again by its process id file; it is started again with the next change of its network.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::{LaunchError, watch};

/// A server reads its files and binds a socket; more means that it hangs.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// A killed process is gone at once.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// Starts and ends the DHCP servers of networks.
pub trait DhcpServers: Send + Sync {
    /// Starts it; when this returns it serves.
    fn start<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<(), LaunchError>>;
    /// Has it read again who has an address.
    fn reload<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<(), LaunchError>>;
    /// Ends it, with what it remembers; fine when it does not run.
    fn stop<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<(), LaunchError>>;
    /// Whether it serves.
    fn runs<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<bool, LaunchError>>;
    /// Networks whose server there is, running or not.
    fn all(&self) -> BoxFuture<'_, Result<BTreeSet<String>, LaunchError>>;
    /// Where an administrator looks for the reason why it does not run.
    fn hint(&self, network: &str) -> String;
}

/// Plain processes; see the module.
#[derive(Debug)]
pub struct ProcessDhcp {
    directory: PathBuf,
}

impl ProcessDhcp {
    /// Their files are in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn file(&self, network: &str, kind: &str) -> PathBuf {
        self.directory.join(format!("{network}.{kind}"))
    }

    /// The process that serves: a number may be another's by now, so its command line must name the file.
    fn process(&self, network: &str) -> Option<u32> {
        let pid: u32 = std::fs::read_to_string(self.file(network, "pid")).ok()?.trim().parse().ok()?;
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let wanted = format!("--conf-file={}", self.file(network, "conf").display());
        line.split(|byte| *byte == 0).any(|word| word == wanted.as_bytes()).then_some(pid)
    }

    async fn spawn(&self, network: &str) -> Result<(), LaunchError> {
        self.end(network).await?;
        let mut command = tokio::process::Command::new("dnsmasq");
        for (option, kind) in [
            ("conf-file", "conf"),
            ("dhcp-hostsfile", "hosts"),
            ("dhcp-leasefile", "leases"),
            ("pid-file", "pid"),
            ("log-facility", "log"),
        ] {
            command.arg(format!("--{option}={}", self.file(network, kind).display()));
        }
        if rustix::process::geteuid().is_root() {
            // As whom it comes to be otherwise, it could not read where only we may.
            command.arg("--user=root");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        // It returns when the server in the background serves.
        let output = match tokio::time::timeout(START_DEADLINE, command.output()).await {
            Ok(output) => output.map_err(LaunchError::io("dnsmasq (package dnsmasq-base or dnsmasq)"))?,
            Err(_) => return Err(LaunchError::io("dnsmasq")(io::ErrorKind::TimedOut.into())),
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(LaunchError::io("dnsmasq")(io::Error::other(said)))
    }

    fn signal(&self, network: &str) -> Result<(), LaunchError> {
        let pid = self.process(network).and_then(|pid| i32::try_from(pid).ok());
        let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) else { return Ok(()) };
        rustix::process::kill_process(pid, rustix::process::Signal::HUP)
            .map_err(|error| LaunchError::io("dnsmasq")(error.into()))
    }

    async fn end(&self, network: &str) -> Result<(), LaunchError> {
        let what = || LaunchError::io(format!("the DHCP server of {network}"));
        if let Some(pid) = self.process(network)
            && let Ok(descriptor) = watch::start_time(pid).and_then(|start| watch::open(pid, start))
        {
            watch::kill(&descriptor).map_err(what())?;
            match tokio::time::timeout(END_DEADLINE, watch::ended(descriptor)).await {
                Ok(ended) => ended.map_err(what())?,
                Err(_) => return Err(what()(io::ErrorKind::TimedOut.into())),
            }
        }
        for kind in ["pid", "leases", "log"] {
            match std::fs::remove_file(self.file(network, kind)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(what()(error)),
                _ => {}
            }
        }
        Ok(())
    }
}

impl DhcpServers for ProcessDhcp {
    fn start<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<(), LaunchError>> {
        self.spawn(network).boxed()
    }

    fn reload<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<(), LaunchError>> {
        async move { self.signal(network) }.boxed()
    }

    fn stop<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<(), LaunchError>> {
        self.end(network).boxed()
    }

    fn runs<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<bool, LaunchError>> {
        async move { Ok(self.process(network).is_some()) }.boxed()
    }

    fn all(&self) -> BoxFuture<'_, Result<BTreeSet<String>, LaunchError>> {
        async move {
            let entries = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
            let name = |entry: std::fs::DirEntry| {
                Some(entry.file_name().to_str()?.strip_suffix(".conf")?.to_owned())
            };
            Ok(entries.filter_map(name).collect())
        }
        .boxed()
    }

    fn hint(&self, network: &str) -> String {
        format!(
            "see {}; `flotilla network define --replace` starts it again",
            self.file(network, "log").display()
        )
    }
}
