//! A launcher for tests of the bus: VMMs are tasks that speak as much QMP as the daemon asks for, and do what a test says.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use dbus_api::spec::Limits;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{broadcast, mpsc};

use crate::fleet::life::Exit;
use crate::launch::{Event, Found, LaunchError, Launcher, Notice, Orphan, Prepared, Wanted};
use crate::store::Process;

/// What a test makes a VMM do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    PowerOff,
    Crash,
    Freeze,
    Thaw,
}

/// What there is, and what a test has a look at.
#[derive(Default)]
pub(super) struct Vmms {
    last: u32,
    pub(super) alive: HashMap<String, (u32, broadcast::Sender<Act>)>,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) started: u32,
    pub(super) refuse: Option<&'static str>,
    pub(super) limits: Vec<String>,
}

/// VMMs as tasks.
#[derive(Clone)]
pub(super) struct FakeLauncher {
    directory: PathBuf,
    /// Where the VMMs live: not in the daemon's runtime, which tests end.
    runtime: tokio::runtime::Handle,
    pub(super) vmms: Arc<Mutex<Vmms>>,
    pub(super) events: Arc<Mutex<Option<mpsc::UnboundedSender<Event>>>>,
}

impl FakeLauncher {
    pub(super) fn new(directory: PathBuf) -> Self {
        let runtime = tokio::runtime::Handle::current();
        Self { directory, runtime, vmms: Arc::default(), events: Arc::default() }
    }

    pub(super) fn act(&self, name: &str, act: Act) {
        self.vmms.lock().unwrap().alive[name].1.send(act).unwrap();
    }

    pub(super) fn spawn(&self, name: &str, paused: bool) -> Process {
        let path = self.sockets(name);
        std::fs::create_dir_all(&path).unwrap();
        let _ = std::fs::remove_file(path.join("qmp.sock"));
        let entered = self.runtime.enter();
        let listener = UnixListener::bind(path.join("qmp.sock")).unwrap();
        drop(entered);
        let (acts, _) = broadcast::channel(8);
        let mut vmms = self.vmms.lock().unwrap();
        vmms.last += 1;
        vmms.started += 1;
        let pid = 100_000 + vmms.last;
        vmms.alive.insert(name.to_owned(), (pid, acts.clone()));
        drop(vmms);
        let (this, name) = (self.clone(), name.to_owned());
        self.runtime.spawn(async move {
            let exit = vmm(listener, acts.subscribe(), paused).await;
            this.vmms.lock().unwrap().alive.remove(&name);
            let notice = Notice::Ended { invocation: pid.to_string(), exit };
            if let Some(events) = &*this.events.lock().unwrap() {
                let _ = events.send(Event { name, notice });
            }
        });
        process(pid)
    }
}

fn process(pid: u32) -> Process {
    Process { pid, start_time: 0, invocation: pid.to_string() }
}

/// One VMM: clients one after the other, until something ends it.
async fn vmm(listener: UnixListener, mut acts: broadcast::Receiver<Act>, mut paused: bool) -> Exit {
    let mut frozen = false;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if !frozen => accepted.unwrap().0,
            act = acts.recv() => match act.unwrap() {
                Act::Crash => return Exit::Signal("SIGSEGV".into()),
                Act::PowerOff => return Exit::Code(0),
                act => { frozen = act == Act::Freeze; continue; }
            }
        };
        if let Some(exit) = client(accepted, &mut acts, &mut paused, &mut frozen).await {
            return exit;
        }
    }
}

async fn client(
    stream: UnixStream,
    acts: &mut broadcast::Receiver<Act>,
    paused: &mut bool,
    frozen: &mut bool,
) -> Option<Exit> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let greeting = json!({"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 9}, "package": ""}, "capabilities": []}});
    let say = |value: Value| format!("{value}\r\n");
    let event = |name: &str, data: Value| {
        say(json!({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}}))
    };
    write.write_all(say(greeting).as_bytes()).await.ok()?;
    loop {
        let line = tokio::select! {
            line = lines.next_line(), if !*frozen => match line { Ok(Some(line)) => line, _ => return None },
            act = acts.recv() => match act.unwrap() {
                Act::Crash => return Some(Exit::Signal("SIGSEGV".into())),
                Act::PowerOff => {
                    let data = json!({"guest": true, "reason": "guest-shutdown"});
                    let _ = write.write_all(event("SHUTDOWN", data).as_bytes()).await;
                    return Some(Exit::Code(0));
                }
                act => { *frozen = act == Act::Freeze; continue; }
            }
        };
        let request: Value = serde_json::from_str(&line).unwrap();
        let mut out = String::new();
        let mut exit = None;
        let answer = match request["execute"].as_str().unwrap() {
            "qmp_capabilities" => json!({"return": {}}),
            "query-status" => {
                json!({"return": {"running": !*paused, "status": if *paused { "paused" } else { "running" }, "singlestep": false}})
            }
            word @ ("stop" | "cont") => {
                *paused = word == "stop";
                out += &event(if *paused { "STOP" } else { "RESUME" }, json!({}));
                json!({"return": {}})
            }
            "quit" => {
                exit = Some(Exit::Code(0));
                json!({"return": {}})
            }
            other => json!({"error": {"class": "CommandNotFound", "desc": format!("no {other}")}}),
        };
        let mut answer = answer;
        if let Some(id) = request.get("id") {
            answer["id"] = id.clone();
        }
        out += &say(answer);
        if exit.is_some() {
            out += &event("SHUTDOWN", json!({"guest": false, "reason": "host-qmp-quit"}));
        }
        let _ = write.write_all(out.as_bytes()).await;
        if exit.is_some() {
            return exit;
        }
    }
}

impl Launcher for FakeLauncher {
    fn unit(&self, name: &str) -> String {
        format!("flotilla-vm@{name}.service")
    }

    fn sockets(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn log_file(&self, _name: &str) -> PathBuf {
        PathBuf::new()
    }

    fn start<'a>(&'a self, name: &'a str, prepared: Prepared) -> BoxFuture<'a, Result<Process, LaunchError>> {
        async move {
            if let Some(text) = self.vmms.lock().unwrap().refuse {
                return Err(LaunchError::Unit { unit: self.unit(name), text: text.to_owned() });
            }
            let paused = prepared.command_line.last().is_some_and(|last| last == "-S");
            self.vmms.lock().unwrap().descriptors =
                prepared.descriptors.into_iter().map(|(_, descriptor)| descriptor).collect();
            Ok(self.spawn(name, paused))
        }
        .boxed()
    }

    fn limit<'a>(&'a self, name: &'a str, limits: &'a Limits) -> BoxFuture<'a, Result<(), LaunchError>> {
        async move {
            if !limits.is_none() {
                let text = serde_json::to_string(limits).unwrap();
                self.vmms.lock().unwrap().limits.push(format!("{name} {text}"));
            }
            Ok(())
        }
        .boxed()
    }

    fn last_lines<'a>(&'a self, name: &'a str, _process: Option<&'a Process>) -> BoxFuture<'a, Vec<String>> {
        async move { vec![format!("{name}: it hurts")] }.boxed()
    }

    fn log(&self, name: &str, lines: u64, follow: bool) -> std::process::Command {
        let mut command = std::process::Command::new("sh");
        let wait = if follow { "; exec sleep 600" } else { "" };
        command.args(["-c", &format!("echo {name} {lines}{wait}")]);
        command
    }

    fn kill<'a>(
        &'a self,
        name: &'a str,
        _process: Option<&'a Process>,
    ) -> BoxFuture<'a, Result<(), LaunchError>> {
        async move {
            if let Some((_, acts)) = self.vmms.lock().unwrap().alive.get(name) {
                let _ = acts.send(Act::Crash);
            }
            Ok(())
        }
        .boxed()
    }

    fn find<'a>(
        &'a self,
        wanted: &'a [Wanted],
    ) -> BoxFuture<'a, Result<BTreeMap<String, Found>, LaunchError>> {
        async move {
            let vmms = self.vmms.lock().unwrap();
            let look = |w: &Wanted| match vmms.alive.get(&w.name) {
                Some((pid, _)) => Some((w.name.clone(), Found::Alive(process(*pid)))),
                None => w
                    .record
                    .as_ref()
                    .filter(|record| !record.state.idle())
                    .map(|_| (w.name.clone(), Found::Ended(Exit::Signal("SIGSEGV".into())))),
            };
            Ok(wanted.iter().filter_map(look).collect())
        }
        .boxed()
    }

    fn orphans<'a>(&'a self, _wanted: &'a [Wanted]) -> BoxFuture<'a, Result<Vec<Orphan>, LaunchError>> {
        async { Ok(Vec::new()) }.boxed()
    }

    fn clean<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()> {
        async move { std::fs::remove_dir_all(self.sockets(name)).unwrap_or_default() }.boxed()
    }
}
