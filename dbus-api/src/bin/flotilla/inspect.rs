//! Verbs that read: `list`, `show`, `qmp`. All but `qmp` are answered from the daemon's memory, so a VM that hangs delays nothing.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::Cell;
use dbus_api::proxy::{Options, VmProxy, VmRow};
use serde::Serialize;
use zbus::Variant;

use crate::args::{ListArgs, QmpArgs, ShowArgs};
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::output::{self, plain};
use crate::stream;

/// A row of the list, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    state: String,
    sub_state: String,
    pid: Option<u32>,
    uuid: String,
    generation: u64,
    addresses: Vec<String>,
    path: String,
}

impl Row {
    fn new(
        (name, uuid, state, sub_state, pid, generation, path): VmRow,
        addresses: &mut HashMap<String, Vec<String>>,
    ) -> Self {
        let pid = (pid != 0).then_some(pid);
        let addresses = addresses.remove(&name).unwrap_or_default();
        Self { name, state, sub_state, pid, uuid, generation, addresses, path: path.to_string() }
    }
}

/// `flotilla list`.
pub(crate) async fn list(client: &Client, args: ListArgs) -> Result<(), Failure> {
    let rows = client.manager.list_vms().await.map_err(|error| client.failed(error))?;
    let given = client.manager.list_addresses().await.map_err(|error| client.failed(error))?;
    let mut addresses: HashMap<String, Vec<String>> = HashMap::new();
    for (vm, _, address) in given {
        addresses.entry(vm).or_default().push(address);
    }
    let mut rows: Vec<Row> = rows.into_iter().map(|row| Row::new(row, &mut addresses)).collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    if args.json {
        return output::json(&rows);
    }
    if rows.is_empty() {
        output::note(
            "No VMs. `flotilla run` starts one; `flotilla define --help` shows how to make your own.",
        );
        return Ok(());
    }
    output::print(&list_text(&rows, output::coloured()))
}

fn list_text(rows: &[Row], coloured: bool) -> String {
    let cells = rows.iter().map(|row| {
        // Why a VM stands still or has ended is worth a reader's time; how one came to run is not.
        let detail = match row.state.as_str() {
            "running" => "",
            state if state == row.sub_state => "",
            _ => &row.sub_state,
        };
        vec![
            Cell::new(plain(&row.name)),
            output::state(&plain(&row.state)),
            Cell::new(row.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())),
            Cell::new(plain(&row.uuid)),
            Cell::new(match row.addresses.as_slice() {
                [] => "-".to_owned(),
                addresses => plain(&addresses.join(",")),
            }),
            Cell::new(plain(detail)),
        ]
    });
    output::table(&["NAME", "STATE", "PID", "UUID", "ADDRESS", "DETAIL"], cells.collect(), coloured)
}

/// All about a VM, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Shown {
    name: String,
    uuid: String,
    state: String,
    reason: String,
    since_usec: u64,
    intent: String,
    generation: u64,
    applied_generation: u64,
    pid: Option<u32>,
    unit: String,
    log_file: String,
    exit_status: Option<(String, String)>,
    last_log: Vec<String>,
    restarts: u32,
    qmp_socket: String,
    qmp_responsive: bool,
    nics: Vec<ShownNic>,
    removed_devices: Vec<String>,
    added_devices: Vec<String>,
    command_line: Vec<String>,
    spec: serde_json::Value,
}

#[derive(Debug, Serialize)]
struct ShownNic {
    id: String,
    tap: String,
    mac: String,
    bridge: String,
    /// By DHCP of its network.
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
}

impl Shown {
    async fn fetch(vm: &VmProxy<'_>) -> zbus::Result<Self> {
        let pid = vm.main_pid().await?;
        let exit = vm.exit_status().await?;
        let nics = vm.network_interfaces().await?;
        let mut addresses: HashMap<String, String> = vm.addresses().await?.into_iter().collect();
        let nics = nics.into_iter().map(|(id, tap, mac, bridge)| {
            let address = addresses.remove(&id);
            ShownNic { id, tap, mac, bridge, address }
        });
        let spec = vm.spec().await?;
        Ok(Self {
            name: vm.name().await?,
            uuid: vm.uuid().await?,
            state: vm.state().await?,
            reason: vm.state_reason().await?,
            since_usec: vm.state_change_timestamp().await?,
            intent: vm.intent().await?,
            generation: vm.generation().await?,
            applied_generation: vm.applied_generation().await?,
            pid: (pid != 0).then_some(pid),
            unit: vm.unit().await?,
            log_file: vm.log_file().await?,
            last_log: vm.last_log().await?,
            restarts: vm.n_restarts().await?,
            exit_status: (!exit.0.is_empty()).then_some(exit),
            qmp_socket: vm.qmp_socket().await?,
            qmp_responsive: vm.qmp_responsive().await?,
            nics: nics.collect(),
            removed_devices: vm.removed_devices().await?,
            added_devices: vm.added_devices().await?,
            command_line: vm.command_line().await?,
            spec: serde_json::from_str(&spec).unwrap_or(serde_json::Value::String(spec)),
        })
    }

    fn text(&self, now: SystemTime, coloured: bool) -> String {
        let mut rows: Vec<(&str, String)> = Vec::new();
        let mut row = |key, value: String| {
            if !value.is_empty() {
                rows.push((key, value));
            }
        };
        row("Name", self.name.clone());
        row("UUID", self.uuid.clone());
        row("State", self.state.clone());
        row("Reason", self.reason.clone());
        row("Since", since(self.since_usec, now));
        row("Intent", self.intent.clone());
        row("Process", self.pid.map(|pid| pid.to_string()).unwrap_or_default());
        row("Unit", self.unit.clone());
        row("Log file", self.log_file.clone());
        if let Some((kind, value)) = &self.exit_status {
            row("Last exit", format!("{kind} {value}"));
        }
        for line in &self.last_log {
            row("Last log", line.clone());
        }
        if self.restarts > 0 {
            row("Restarts", format!("{} in a row", self.restarts));
        }
        row("QMP socket", self.qmp_socket.clone());
        if self.pid.is_some() && !self.qmp_responsive {
            row("QMP", "does not answer".to_owned());
        }
        row("Definition", self.definition());
        for (key, name) in [
            ("machine", "Machine"),
            ("cpus", "vCPUs"),
            ("memory", "Memory"),
            ("restart", "Restart"),
            ("autostart", "Autostart"),
            ("limits", "Limits"),
            ("kernel", "Kernel"),
            ("initrd", "Initrd"),
            ("append", "Append"),
            ("description", "Description"),
        ] {
            row(name, self.spec.get(key).map(scalar).unwrap_or_default());
        }
        if let Some(disks) = self.spec.get("disks").and_then(serde_json::Value::as_array) {
            for disk in disks {
                row("Disk", disk_text(disk));
            }
        }
        for nic in &self.nics {
            let address = nic.address.as_ref().map(|address| format!(", {address}")).unwrap_or_default();
            row("Network", format!("{} on {}, tap {}, {}{address}", nic.id, nic.bridge, nic.tap, nic.mac));
        }
        for (key, ids) in [("Removed", &self.removed_devices), ("Added", &self.added_devices)] {
            if !ids.is_empty() {
                row(key, format!("{}, over QMP", ids.join(", ")));
            }
        }
        row("Command", shell(&self.command_line));
        let cells = rows.into_iter().map(|(key, value)| {
            let value = plain(&value);
            vec![Cell::new(key), if key == "State" { output::state(&value) } else { Cell::new(value) }]
        });
        // Without its empty header line.
        output::table(&["", ""], cells.collect(), coloured).trim_start_matches(['\n', ' ']).to_owned()
    }

    fn definition(&self) -> String {
        match self.applied_generation {
            0 => format!("version {}", self.generation),
            applied if applied == self.generation => format!("version {applied}"),
            applied => format!(
                "version {}; the running process has version {applied} until it is started again",
                self.generation
            ),
        }
    }
}

fn scalar(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn disk_text(disk: &serde_json::Value) -> String {
    let mut text = disk.get("path").map(scalar).unwrap_or_default();
    for key in ["readonly", "direct"] {
        if disk.get(key).and_then(serde_json::Value::as_bool) == Some(true) {
            text.push_str(&format!(", {key}"));
        }
    }
    if let Some(serial) = disk.get("serial").and_then(serde_json::Value::as_str) {
        text.push_str(&format!(", serial {serial}"));
    }
    text
}

/// How long ago, for people: `3 min ago`. Empty when unknown.
fn since(usec: u64, now: SystemTime) -> String {
    if usec == 0 {
        return String::new();
    }
    let then = UNIX_EPOCH.checked_add(Duration::from_micros(usec));
    let seconds = then.and_then(|then| now.duration_since(then).ok()).map_or(0, |age| age.as_secs());
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..172_800 => format!("{} h {} min ago", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// A command line that can be pasted into a shell.
fn shell(words: &[String]) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    let quote = |word: &String| match word.as_str() {
        word if !word.is_empty() && word.chars().all(safe) => word.to_owned(),
        word => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// `flotilla show`.
pub(crate) async fn show(client: &Client, args: ShowArgs) -> Result<(), Failure> {
    let vm = client.vm(&args.name).await?;
    let shown = Shown::fetch(&vm).await.map_err(|error| client.bus_failed(error).about(&args.name))?;
    if args.json {
        return output::json(&shown);
    }
    output::print(&shown.text(SystemTime::now(), output::coloured()))
}

/// `flotilla qmp`.
pub(crate) async fn qmp(client: &Client, args: QmpArgs) -> Result<(), Failure> {
    let options: Options<'_> = match args.read_only {
        true => HashMap::from([("mode", Variant::from("query"))]),
        false => Options::new(),
    };
    let command = args.command.as_deref().map(qmp_command).transpose()?;
    let vm = client.vm(&args.name).await?;
    let Some(command) = command else {
        let opened = vm.open_qmp(options).await.map_err(|error| client.failed(error).about(&args.name))?;
        return stream::join(opened.into()).map_err(|failure| failure.about(&args.name));
    };
    let answer =
        vm.qmp_command(&command, options).await.map_err(|error| client.failed(error).about(&args.name))?;
    match serde_json::from_str::<serde_json::Value>(&answer) {
        Ok(value) => output::json(&value),
        Err(_) => output::print(&format!("{answer}\n")),
    }
}

/// A bare word is the name of a command without arguments.
fn qmp_command(text: &str) -> Result<String, Failure> {
    let bare = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    if bare {
        return Ok(serde_json::json!({ "execute": text }).to_string());
    }
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(value) if value.get("execute").is_some_and(serde_json::Value::is_string) => Ok(text.to_owned()),
        Ok(_) => Err(Failure::new(Exit::Usage, "a QMP command is an object with the key \"execute\"")),
        Err(error) => Err(Failure::new(Exit::Usage, format!("the QMP command is no JSON: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown() -> Shown {
        Shown {
            name: "web".into(),
            uuid: "u".into(),
            state: "running".into(),
            reason: String::new(),
            since_usec: 1_000_000,
            intent: "running".into(),
            generation: 2,
            applied_generation: 1,
            pid: Some(7),
            unit: "flotilla-vm@web.service".into(),
            log_file: String::new(),
            exit_status: Some(("signal".into(), "SIGSEGV".into())),
            last_log: vec!["it hurts".into()],
            restarts: 3,
            qmp_socket: "/run/q".into(),
            qmp_responsive: true,
            nics: vec![ShownNic {
                id: "nic0".into(),
                tap: "fl-web0".into(),
                mac: "m".into(),
                bridge: "br0".into(),
                address: Some("10.5.0.2".into()),
            }],
            removed_devices: vec!["disk1".into()],
            added_devices: Vec::new(),
            command_line: vec!["vmm".into(), "-append".into(), "a b".into()],
            spec: serde_json::json!({"kernel":"/k","cpus":2,"disks":[{"path":"/d","readonly":true,"direct":false}]}),
        }
    }

    #[test]
    fn show_is_one_fact_a_line() {
        let text = shown().text(UNIX_EPOCH + Duration::from_secs(121), false);
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("Name        web"));
        for line in [
            "State       running",
            "Since       2 min ago",
            "Last exit   signal SIGSEGV",
            "Last log    it hurts",
            "Restarts    3 in a row",
            "vCPUs       2",
            "Kernel      /k",
            "Disk        /d, readonly",
            "Network     nic0 on br0, tap fl-web0, m, 10.5.0.2",
            "Command     vmm -append 'a b'",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(text.contains("version 2; the running process has version 1"));
        assert!(!text.contains("Log file"));
    }

    #[test]
    fn list_says_why_a_vm_does_not_run() {
        let row = |name: &str, state: &str, sub: &str, pid| Row {
            name: name.into(),
            state: state.into(),
            sub_state: sub.into(),
            pid,
            uuid: "u".into(),
            generation: 1,
            addresses: pid.map(|_| "10.5.0.2".to_owned()).into_iter().collect(),
            path: String::new(),
        };
        let rows = [row("a", "running", "resumed", Some(5)), row("b", "stopping", "waiting", None)];
        let text = list_text(&rows, false);
        let expected = "NAME  STATE     PID  UUID  ADDRESS   DETAIL\na     running   5    u     10.5.0.2\nb     stopping  -    u     -         waiting\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn qmp_takes_a_word_or_an_object() {
        assert_eq!(qmp_command("query-status").unwrap(), r#"{"execute":"query-status"}"#);
        assert_eq!(qmp_command(r#"{"execute":"stop","id":1}"#).unwrap(), r#"{"execute":"stop","id":1}"#);
        for text in ["", "{", "[]", r#"{"execute":1}"#, "query status"] {
            assert_eq!(qmp_command(text).unwrap_err().exit, Exit::Usage, "{text}");
        }
    }

    #[test]
    fn words_come_through_a_shell() {
        assert_eq!(shell(&["a".into(), "b c".into(), "it's".into(), String::new()]), r"a 'b c' 'it'\''s' ''");
    }

    #[test]
    fn ages() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (ago, text) in
            [(5, "5 s ago"), (125, "2 min ago"), (7260, "2 h 1 min ago"), (400_000, "4 days ago")]
        {
            assert_eq!(since((1_000_000 - ago) * 1_000_000, now), text);
        }
        assert_eq!(since(0, now), "");
        assert_eq!(since(u64::MAX, now), "0 s ago");
    }
}
