//! `flotilla-vmm`: arguments -> configuration -> machine -> run. Owns the order in which a VM comes up and goes down, and the exit status.
//!
//! Exit status: 0 when the guest ended, a client said quit, or a signal came; 1 when the VM could not be started, or the host
//! failed it. What goes wrong at the start is one line on standard error, and in the log when that is a file.
//!
//! `main` is C's and not Rust's: before Rust's, its library reads /proc/self/maps and gives each thread a second stack, only to
//! name a stack overflow as such: 23 of the system calls between exec and the guest's first byte, and 5 % of the CPU time. Guard
//! pages still end a thread that overflows; what else the library does there, [`process::begin`] does.

#![cfg_attr(not(test), no_main)]

use std::collections::HashMap;
use std::error::Error;
use std::ffi::c_int;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use vmm::chardev::{self, CharBackend, ChardevError, Traffic};
use vmm::config::cmdline::{self, Request};
use vmm::config::{ChardevKind, Device, DeviceDriver, Monitor, Trace, VmConfig};
use vmm::control::{Control, End, Input, Terminal};
use vmm::event::{EventLoop, LoopHandle, Ops};
use vmm::inherit::Inherited;
use vmm::machine::{Departure, Environment, GuestEvent, Machine};
use vmm::process::daemon::{self, PidFile, Side};
use vmm::process::{self, log, signals, trace};
use vmm::qmp::Qmp;
use vmm::sandbox::{self, Needs};
use vmm::virtio::balloon;

/// How long the last output may take to reach a receiver that is slow.
const LAST_WORDS: Duration = Duration::from_millis(500);

// The unwinder, for what a panic prints, is linked in: the shared libgcc_s would be mapped and relocated at each start.
#[cfg(target_env = "gnu")]
#[link(name = "gcc_eh", kind = "static", modifiers = "-bundle")]
unsafe extern "C" {}

const SUCCESS: u8 = 0;
const FAILURE: u8 = 1;

type BoxError = Box<dyn Error + Send + Sync>;

/// The number is the exit status.
// SAFETY: the C library calls the one function of this name, once.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main() -> c_int {
    process::begin();
    let status = match cmdline::parse(std::env::args_os().skip(1)) {
        Ok(Request::Help) => print(&cmdline::help()),
        Ok(Request::Version) => print(concat!("flotilla-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Request::Run(config)) => run(&config),
        Err(e) => {
            log::complain(&e.to_string());
            FAILURE
        }
    };
    status.into()
}

fn print(text: &str) -> u8 {
    // A reader that has seen enough, such as `head`, is no failure.
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    SUCCESS
}

fn run(config: &VmConfig) -> u8 {
    let daemon = if config.process.daemonize {
        match daemon::fork() {
            Ok(Side::Child(daemon)) => Some(daemon),
            Ok(Side::Parent(parent)) => {
                if let Some(text) = parent.error {
                    log::complain(&text);
                }
                return parent.exit_code;
            }
            Err(e) => {
                log::complain(&e.to_string());
                return FAILURE;
            }
        }
    } else {
        None
    };
    let fail = |error: &BoxError, daemon: Option<daemon::Daemon>| {
        let text = one_line(error.as_ref());
        if config.process.log_file.is_some() {
            tracing::error!("{text}");
        }
        match daemon {
            Some(daemon) => daemon.failed(&text),
            None => log::complain(&text),
        }
        FAILURE
    };
    let running = match Running::set_up(config) {
        Ok(SetUp::Up(running)) => running,
        Ok(SetUp::Ended(number)) => {
            tracing::info!("Received kill signal, signal number: {number}");
            return match daemon {
                Some(daemon) => {
                    daemon.failed(&format!("ended by signal {number} before the first client came"));
                    FAILURE
                }
                None => SUCCESS,
            };
        }
        Err(e) => return fail(&e, daemon),
    };
    if let Some(daemon) = daemon
        && let Err(e) = daemon.ready()
    {
        return fail(&e.into(), None);
    }
    running.run()
}

/// An error and what caused it, each said once.
fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text.replace('\n', " ")
}

/// What came of setting a VM up.
enum SetUp {
    Up(Box<Running>),
    /// A signal of this number came while it waited for clients.
    Ended(i32),
}

/// A VM that is up. Fields are dropped in this order: sockets and terminal first, the pid file last.
struct Running {
    qmp: Arc<Qmp>,
    chardevs: Vec<Arc<dyn CharBackend>>,
    event_loop: EventLoop,
    needs: Needs,
    _pid_file: Option<PidFile>,
}

impl Running {
    /// Builds everything; an error leaves nothing behind. What needs only names (pid file, sockets) comes before what costs time.
    fn set_up(config: &VmConfig) -> Result<SetUp, BoxError> {
        log::init(config.process.log_file.as_deref())?;
        match &config.process.trace {
            None => {}
            Some(Trace::All) => _ = trace::switch("*", true),
            Some(Trace::File(path)) => trace::switch_on_those_in(path)?,
        }
        // Before anything else opens a descriptor: a number named there by mistake must not hit one of ours.
        let inherited = Arc::new(Inherited::from_env()?);
        let pid_file = config.process.pidfile.as_deref().map(PidFile::create).transpose()?;
        let mut event_loop = EventLoop::new()?;
        // The machine's threads and signals talk to `qmp`, which is made after the machine.
        let hub: Arc<OnceLock<Weak<Qmp>>> = Arc::default();
        let told = Arc::clone(&hub);
        // Until there is somebody to be told.
        let early = Arc::new(AtomicI32::new(0));
        let first = Arc::clone(&early);
        signals::watch(&mut event_loop.ops(), move |number| {
            first.store(number, Ordering::Release);
            happened(&told, &Input::Signal(number));
        })?;

        let mut host_ends = open_chardevs(config, &inherited, &mut event_loop.ops())?;
        let serial = match &config.serial {
            None => None,
            Some(ChardevKind::Ref(id)) => host_ends.by_id.get(id).cloned(),
            Some(kind) => {
                host_ends.serial =
                    Some(host_ends.open(kind, Traffic::Line, &inherited, &mut event_loop.ops())?);
                host_ends.serial.clone()
            }
        };
        let mut monitors = Vec::with_capacity(config.monitors.len());
        for monitor in &config.monitors {
            let kind = match monitor {
                Monitor::Chardev(id) => {
                    monitors.extend(host_ends.by_id.get(id).cloned());
                    continue;
                }
                Monitor::Unix(path) => {
                    ChardevKind::UnixSocket { path: path.clone(), server: true, nowait: true }
                }
                Monitor::Tcp(addr) => ChardevKind::TcpSocket { addr: *addr, server: true, nowait: true },
            };
            monitors.push(host_ends.open(&kind, Traffic::Messages, &inherited, &mut event_loop.ops())?);
        }

        for (socket, end) in host_ends.awaited.drain(..) {
            if end.had_client() {
                continue;
            }
            tracing::info!("waiting for a client of {socket} before the VM is made");
            while !end.had_client() {
                event_loop.turn(None)?;
                match early.load(Ordering::Acquire) {
                    0 => {}
                    number => return Ok(SetUp::Ended(number)),
                }
            }
        }

        let (told, main_loop) = (Arc::clone(&hub), event_loop.handle());
        let guest_events = move |event: GuestEvent| {
            let told = Arc::clone(&told);
            main_loop.post(move |_| happened(&told, &Input::Guest(event)));
        };
        let (told, main_loop) = (Arc::clone(&hub), event_loop.handle());
        let device_left = move |departure: Departure| {
            let told = Arc::clone(&told);
            main_loop.post(move |_| happened(&told, &Input::Left(departure)));
        };
        let environment = Environment {
            inherited,
            main_loop: event_loop.handle(),
            guest_events: Arc::new(guest_events),
            device_left: Arc::new(device_left),
            serial,
            chardevs: host_ends.by_id.clone(),
        };
        let mut machine = Machine::build(config, environment)?;
        if let Some(balloon) = machine.balloon() {
            watch_balloon(&balloon, &hub, &event_loop.handle());
        }
        let needs = needs(config);
        sandbox::confine(needs)?;
        machine.start(config.start_paused)?;

        let mut control = Control::new(Box::new(machine), config, event_loop.handle());
        control.show_terminals(host_ends.terminals());
        let qmp = Qmp::new(control);
        // Set once: the loop does not run yet, so nobody has looked.
        let _ = hub.set(Arc::downgrade(&qmp));
        for monitor in &monitors {
            qmp.add_monitor(monitor);
        }
        let running = Self { qmp, chardevs: host_ends.all, event_loop, needs, _pid_file: pid_file };
        Ok(SetUp::Up(Box::new(running)))
    }

    /// Runs until the VM ends, and takes it down.
    fn run(mut self) -> u8 {
        let mut exit_code = 0;
        // Here and not earlier: going to the background opens /dev/null. vCPU threads have confined themselves already.
        let turns = sandbox::enter_main(self.needs)
            .map_err(|e| one_line(&e))
            .and_then(|()| self.event_loop.run().map_err(|e| format!("the event loop failed: {e}")));
        if let Err(e) = turns {
            tracing::error!("{e}");
            exit_code = 1;
        }
        for backend in &self.chardevs {
            backend.drain(LAST_WORDS);
        }
        let mut control = self.qmp.control();
        exit_code = control.end().map_or(exit_code, End::exit_code);
        if let Err(e) = control.shut_down() {
            tracing::error!("{}", one_line(&e));
            exit_code = 1;
        }
        drop(control);
        exit_code
    }
}

/// Has clients told what the guest does with the balloon. However often it does something, one job at a time is on its way.
fn watch_balloon(balloon: &balloon::Port, hub: &Arc<OnceLock<Weak<Qmp>>>, main_loop: &LoopHandle) {
    let (hub, main_loop) = (Arc::clone(hub), main_loop.clone());
    let (newest, posted) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    balloon.on_change(move |actual| {
        newest.store(actual, Ordering::Release);
        if posted.swap(true, Ordering::AcqRel) {
            return;
        }
        let (hub, newest, posted) = (Arc::clone(&hub), Arc::clone(&newest), Arc::clone(&posted));
        main_loop.post(move |ops| {
            // First this, so that a value stored from now on brings a job of its own.
            posted.store(false, Ordering::Release);
            if let Some(qmp) = hub.get().and_then(Weak::upgrade) {
                qmp.balloon_changed(newest.load(Ordering::Acquire), ops);
            }
        });
    });
}

fn happened(hub: &OnceLock<Weak<Qmp>>, input: &Input) {
    if let Some(qmp) = hub.get().and_then(Weak::upgrade) {
        qmp.happened(input);
    }
}

/// What the sandbox must leave possible.
fn needs(config: &VmConfig) -> Needs {
    let sockets =
        config.chardevs.iter().map(|c| &c.kind).chain(&config.serial).filter_map(|kind| match kind {
            ChardevKind::UnixSocket { path, server: true, .. } => Some(path),
            _ => None,
        });
    let monitors = config.monitors.iter().filter_map(|monitor| match monitor {
        Monitor::Unix(path) => Some(path),
        Monitor::Tcp(_) | Monitor::Chardev(_) => None,
    });
    let me = rustix::process::geteuid();
    let foreign = |path: &PathBuf| {
        let parent = std::path::absolute(path).ok().and_then(|p| p.parent().map(Path::to_owned));
        parent.and_then(|p| std::fs::metadata(p).ok()).is_some_and(|m| m.uid() != me.as_raw())
    };
    let mut names = sockets.chain(monitors).chain(&config.process.pidfile).peekable();
    Needs {
        seccomp: !config.process.disable_seccomp,
        rotates_log: config.process.log_file.is_some(),
        removes_names: names.peek().is_some(),
        talks: config.may_get_vhost_user()
            || config.devices.iter().any(|d| config.vhost_user_chardev(&d.driver).is_some()),
        plugs_cpus: config.smp.max_cpus > config.smp.cpus,
        rings: !(config.drives.is_empty() && config.netdevs.is_empty() && config.monitors.is_empty()),
        saves: !config.monitors.is_empty() && config.snapshot_exclusion().is_none(),
        // Only root can do something about another user's directory, and only with its capability.
        foreign_directory: me.is_root() && names.any(foreign),
    }
}

/// The host ends of character devices.
#[derive(Default)]
struct HostEnds {
    by_id: HashMap<String, Arc<dyn CharBackend>>,
    /// Of a serial port that has one of its own.
    serial: Option<Arc<dyn CharBackend>>,
    all: Vec<Arc<dyn CharBackend>>,
    /// Sockets whose first client the VM waits for, each with what it is called.
    awaited: Vec<(String, Arc<dyn CharBackend>)>,
}

impl HostEnds {
    /// Those that were made for this VM, so that their users must ask for their names.
    fn terminals(&self) -> Vec<Terminal> {
        let serial = self.serial.iter().map(|end| ("serial0", end));
        let ends = self.by_id.iter().map(|(label, end)| (label.as_str(), end)).chain(serial);
        let named = ends.filter_map(|(label, end)| {
            Some(Terminal { label: label.to_owned(), filename: format!("pty:{}", end.terminal()?) })
        });
        let mut terminals: Vec<Terminal> = named.collect();
        terminals.sort_by(|a, b| a.label.cmp(&b.label));
        terminals
    }

    fn open(
        &mut self,
        kind: &ChardevKind,
        traffic: Traffic,
        inherited: &Inherited,
        ops: &mut Ops<'_>,
    ) -> Result<Arc<dyn CharBackend>, ChardevError> {
        let backend = chardev::open(kind, traffic, inherited, ops)?;
        self.all.push(Arc::clone(&backend));
        if kind.awaits_client() {
            let name = match kind {
                ChardevKind::UnixSocket { path, .. } => path.display().to_string(),
                ChardevKind::TcpSocket { addr, .. } => addr.to_string(),
                _ => String::new(),
            };
            self.awaited.push((name, Arc::clone(&backend)));
        }
        Ok(backend)
    }
}

/// Opens every `-chardev`; those that carry QMP or a guest's byte stream, of which nothing may be lost, as messages.
fn open_chardevs(
    config: &VmConfig,
    inherited: &Inherited,
    ops: &mut Ops<'_>,
) -> Result<HostEnds, ChardevError> {
    let mut ends = HostEnds::default();
    // What another process serves a device through is the device's to open.
    for chardev in config.chardevs.iter().filter(|c| !config.is_vhost_user(&c.id)) {
        let carries_qmp = config.monitors.contains(&Monitor::Chardev(chardev.id.clone()));
        let is_stream = |device: &Device| matches!(&device.driver, DeviceDriver::VirtSerialPort { chardev: id, .. } if *id == chardev.id);
        let traffic = if carries_qmp || config.devices.iter().any(is_stream) {
            Traffic::Messages
        } else {
            Traffic::Line
        };
        let backend = ends.open(&chardev.kind, traffic, inherited, ops)?;
        ends.by_id.insert(chardev.id.clone(), backend);
    }
    Ok(ends)
}
