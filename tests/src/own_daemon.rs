//! A daemon of a test's own, as on any machine without systemd: private bus, private network, plain child processes. Its VMMs are the real
//! ones with their sandbox, of the default guest; `vmm_guest_*` tests use it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::console::Console;
use crate::host::Host;
use crate::scenario::{Outcome, SOON, here_or_on_a_host, program};

/// Where its programs are on a host that is not this machine.
const PROGRAMS: &str = "/usr/bin";

/// The daemon, its bus, its network namespace and its VMs: all of it ends with the value.
#[derive(Debug)]
pub struct OwnDaemon {
    host: Host,
    dir: String,
    flotilla: String,
    guest: String,
}

impl OwnDaemon {
    /// Starts one; `name` is part of the folder's name.
    ///
    /// # Errors
    /// When a program is not built, or the daemon does not answer; with its log.
    pub fn start(name: &str) -> Outcome<Self> {
        let (host, vmm, guest) = here_or_on_a_host(name)?;
        let mut paths = Vec::new();
        for name in ["flotillad", "flotilla"] {
            let local = program(name)?;
            // It was pushed there: so are these.
            if vmm.starts_with(PROGRAMS) {
                let remote = format!("{PROGRAMS}/{name}");
                host.push(&local, &remote)?;
                paths.push(remote);
            } else {
                paths.push(local.display().to_string());
            }
        }
        let dir = format!("/run/own-daemon/{name}-{}", std::process::id());
        let this =
            Self { flotilla: format!("FLOTILLA_BUS=unix:path={dir}/bus {}", paths[1]), host, dir, guest };
        let dir = &this.dir;
        this.host.ok(&format!(
            "mkdir -p {dir} && cd {dir} && \
             dbus-daemon --session --fork --nopidfile --print-pid --address=unix:path={dir}/bus >bus.pid && \
             (setsid unshare -n {} --bus unix:path={dir}/bus --launcher process --state-dir {dir}/state \
              --runtime-dir {dir}/run --vmm {vmm} </dev/null >log 2>&1 & echo $! >pid)",
            paths[0]
        ))?;
        let up = this.host.eventually(SOON, &format!("{} list", this.flotilla));
        up.map_err(|error| format!("{error}\n{}", this.log()))?;
        Ok(this)
    }

    /// The host that it is on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// A path in its folder.
    #[must_use]
    pub fn path(&self, file: &str) -> String {
        format!("{}/{file}", self.dir)
    }

    fn log(&self) -> String {
        self.host.run(&format!("tail -n 40 {}/log", self.dir)).map(|output| output.stdout).unwrap_or_default()
    }

    /// Runs `flotilla` with these arguments; what it prints.
    ///
    /// # Errors
    /// When it fails; with the daemon's log.
    pub fn flotilla(&self, arguments: &str) -> Outcome<String> {
        let said = self.host.ok(&format!("{} {arguments}", self.flotilla));
        said.map_err(|error| format!("{error}\n{}", self.log()).into())
    }

    /// As [`OwnDaemon::flotilla`]; what it prints is JSON.
    ///
    /// # Errors
    /// Also when it is none.
    pub fn json(&self, arguments: &str) -> Outcome<Value> {
        Ok(serde_json::from_str(&self.flotilla(&format!("{arguments} --json"))?)?)
    }

    /// Runs `flotilla`, which must refuse; what it says.
    ///
    /// # Errors
    /// When it does not.
    pub fn refused(&self, arguments: &str) -> Outcome<String> {
        Ok(self.host.refused(&format!("{} {arguments}", self.flotilla))?.stderr)
    }

    /// Defines a VM of the default guest, starts it, and waits for its banner.
    ///
    /// # Errors
    /// When it does not come.
    pub fn run(&self, name: &str, members: &Value) -> Outcome<Console> {
        let mut definition = json!({ "kernel": self.guest, "memory": "256M" });
        for (key, value) in members.as_object().into_iter().flatten() {
            definition[key] = value.clone();
        }
        let file = self.path(&format!("{name}.json"));
        self.host.write(&file, definition.to_string())?;
        self.flotilla(&format!("define {file}"))?;
        self.flotilla(&format!("start {name}"))?;
        let mut console = self.console(name)?;
        console.expect("is up.", SOON)?;
        Ok(console)
    }

    /// The console of a VM.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn console(&self, name: &str) -> Outcome<Console> {
        let talk = format!("exec env {} console {name}", self.flotilla);
        Ok(Console::new(self.host.talk(&talk)?))
    }

    /// Runs a line for bash in the daemon's network.
    ///
    /// # Errors
    /// When it fails.
    pub fn in_its_network(&self, command: &str) -> Outcome<String> {
        Ok(self.host.ok(&format!("nsenter -t $(cat {}/pid) -n {command}", self.dir))?)
    }

    /// Ends it.
    fn end(&self) {
        let (flotilla, dir) = (&self.flotilla, &self.dir);
        let _ = self.host.run_for(
            Duration::from_secs(20),
            &format!(
                "timeout 10 env {flotilla} list --json | jq -r '.[].name' | xargs -r env {flotilla} rm --force; \
                 kill $(cat {dir}/pid {dir}/bus.pid); rm -rf {dir}"
            ),
        );
    }
}

impl Drop for OwnDaemon {
    fn drop(&mut self) {
        self.end();
    }
}
