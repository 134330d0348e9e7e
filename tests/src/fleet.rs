//! The fleet on a test host, seen from outside: the `flotilla` command, `busctl`, `systemctl`; for scenarios.

use std::fmt;
use std::time::Duration;

use serde_json::Value;

use crate::console::Console;
use crate::host::Host;
use crate::scenario::{Guest, Outcome, SOON, check};

/// A host with the package on it.
#[derive(Debug)]
pub struct Fleet<'a> {
    /// The host.
    pub host: &'a Host,
}

/// What a VM leaves on a host; see [`Fleet::traces`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Traces(Vec<String>);

impl fmt::Display for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.join("; "))
    }
}

impl<'a> Fleet<'a> {
    /// The fleet of this host.
    #[must_use]
    pub fn on(host: &'a Host) -> Self {
        Self { host }
    }

    /// Prints what the host knows about its VMs: for a scenario that has failed.
    pub fn tell(&self) {
        let said = self.host.run(
            "flotilla list; journalctl --no-pager -q -o short-monotonic -u flotillad -u 'flotilla-vm@*' -u 'flotilla-dhcp@*' | tail -n 60",
        );
        match said {
            Ok(output) => println!("{}{}", output.stdout, output.stderr),
            Err(error) => println!("and the host does not answer: {error}"),
        }
    }

    /// Defines a guest with the `flotilla` command.
    ///
    /// # Errors
    /// When it is refused.
    pub fn define(&self, guest: &Guest) -> Outcome {
        let file = format!("/root/{}.json", guest.name);
        self.host.write(&file, guest.definition().to_string())?;
        self.host.ok(&format!("flotilla define {file}"))?;
        Ok(())
    }

    /// Defines a guest with `busctl`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn define_by_bus(&self, guest: &Guest) -> Outcome {
        let definition = guest.definition().to_string();
        self.manager("DefineVm", &format!("'ssa{{sv}}' {} '{definition}' 0", guest.name))?;
        Ok(())
    }

    /// Calls a method of the Manager with `busctl`; arguments as `busctl` takes them, with their signature.
    ///
    /// # Errors
    /// When it is refused.
    pub fn manager(&self, method: &str, arguments: &str) -> Outcome<String> {
        Ok(self.host.ok(&manager_call(method, arguments))?)
    }

    /// The rows of `flotilla list --json`.
    ///
    /// # Errors
    /// When the command fails.
    pub fn list(&self) -> Outcome<Vec<Value>> {
        Ok(serde_json::from_str(&self.host.ok("flotilla list --json")?)?)
    }

    /// One field of `flotilla show NAME --json`, as text.
    ///
    /// # Errors
    /// When there is no such VM or field.
    pub fn shown(&self, name: &str, field: &str) -> Outcome<String> {
        Ok(self.host.ok(&format!("flotilla show {name} --json | jq -er '.{field}'"))?)
    }

    /// A VM's state, by the list.
    ///
    /// # Errors
    /// When the list has no such VM.
    pub fn state(&self, name: &str) -> Outcome<String> {
        let rows = self.list()?;
        let row =
            rows.iter().find(|row| row["name"] == name).ok_or_else(|| format!("{name} is not listed"))?;
        Ok(row["state"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until the list shows a VM in this state.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn becomes(&self, name: &str, state: &str, limit: Duration) -> Outcome {
        let filter = format!("any(.[]; .name == \"{name}\" and .state == \"{state}\")");
        let command = format!("flotilla list; flotilla list --json | jq -e '{filter}' >/dev/null");
        self.host.eventually(limit, &command)?;
        Ok(())
    }

    /// Asserts that list, QMP and console of a running VM work: the guest's shell answers, the VMM says it runs.
    ///
    /// # Errors
    /// When one does not.
    pub fn works(&self, guest: &Guest) -> Outcome {
        let name = &guest.name;
        check(self.state(name)? == "running", || {
            format!("{name} is {}", self.state(name).unwrap_or_default())
        })?;
        let status: Value =
            serde_json::from_str(&self.host.ok(&format!("flotilla qmp {name} query-status"))?)?;
        let status = status.get("return").unwrap_or(&status).clone();
        check(status["status"] == "running", || format!("{name}: query-status says {status}"))?;
        let mut console = self.console(name)?;
        console.enter("")?;
        let answer = console.shell("cat /proc/sys/kernel/hostname", SOON)?;
        // A console has one client at a time: the next one must find it free.
        drop(console);
        self.host.eventually(SOON, &format!("! pgrep -f '[f]lotilla console {name} '"))?;
        check(&answer == name, || format!("the console of {name} is that of \"{answer}\""))
    }

    /// A VM's console, through `flotilla console`.
    ///
    /// # Errors
    /// When the host has no room for it; a refusal is seen as the console's end.
    pub fn console(&self, name: &str) -> Outcome<Console> {
        Ok(Console::new(self.host.talk(&format!("exec flotilla console {name} --linger 1s"))?))
    }

    /// The VMM's process id.
    ///
    /// # Errors
    /// When none runs.
    pub fn pid(&self, name: &str) -> Outcome<u32> {
        Ok(self.shown(name, "pid")?.parse()?)
    }

    /// All that this VM has on the host now: process, unit, socket, tap, record. Empty when nothing is left.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn traces(&self, name: &str) -> Outcome<Traces> {
        let found = self.host.ok(&format!(
            "pgrep -af -- 'flotilla-vmm.* -name {name} ' | grep -v pgrep | sed 's/^\\(.\\{{60\\}}\\).*/process \\1/'; \
             systemctl list-units --no-legend --all 'flotilla-vm@{name}.service' | sed 's/^/unit /'; \
             ls -d /run/flotilla-vm/{name} /run/flotilla/qmp/{name}.sock /run/flotilla/vm/{name} 2>/dev/null | sed 's/^/socket /'; \
             ls /var/lib/flotilla/vms/{name}.json 2>/dev/null | sed 's/^/record /'; true"
        ))?;
        Ok(Traces(found.lines().map(str::to_owned).collect()))
    }

    /// Taps on the host now, whoever's they are.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn taps(&self) -> Outcome<Vec<String>> {
        let links = self.host.ok("ip -j link show type tun | jq -r '.[].ifname // empty'")?;
        Ok(links.lines().map(str::to_owned).collect())
    }
}

/// A `busctl` call of the Manager.
#[must_use]
pub fn manager_call(method: &str, arguments: &str) -> String {
    format!(
        "busctl call org.flotilla.Flotilla1 /org/flotilla/Flotilla1 org.flotilla.Flotilla1.Manager {method} {arguments}"
    )
}
