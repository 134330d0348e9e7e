//! What a clone costs, from the call on the bus to a VM that runs: the real daemon and VMM on this machine's `/dev/kvm`, with the process launcher,
//! which starts a VMM as a spare does, by one exec. It judges nothing.
//!
//! `cargo bench -p supervisor --bench clones -- --vmm PATH --guest PATH [--daemon PATH] [--state DIRECTORY] [--count N]`. Needs `dbus-daemon`. The
//! directory decides what durability costs: one in memory shows the processor's part alone.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dbus_api::proxy::ManagerProxy;
use futures_util::{Stream, StreamExt};
use nix::sys::signal::Signal;
use zbus::proxy::CacheProperties;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Clones that are made one after the other.
const SINGLE: usize = 20;
const LIMIT: Duration = Duration::from_secs(60);

struct Options {
    vmm: PathBuf,
    guest: PathBuf,
    daemon: PathBuf,
    state: PathBuf,
    count: u32,
}

fn options() -> Outcome<Option<Options>> {
    let (mut vmm, mut guest) = (None, None);
    let (mut daemon, mut state, mut count) =
        (PathBuf::from(env!("CARGO_BIN_EXE_flotillad")), std::env::temp_dir(), 200);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word}: needs a value"));
        match word.as_str() {
            "--vmm" => vmm = Some(value()?.into()),
            "--guest" => guest = Some(value()?.into()),
            "--daemon" => daemon = value()?.into(),
            "--state" => state = value()?.into(),
            "--count" => count = value()?.parse()?,
            // From cargo.
            "--bench" => {}
            _ => return Err(format!("{word}: see the first lines of benches/clones.rs").into()),
        }
    }
    Ok(vmm.zip(guest).map(|(vmm, guest)| Options { vmm, guest, daemon, state, count }))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome<()> {
    match options()? {
        Some(options) => measure(&options).await,
        None => {
            println!("clones: left out, it needs --vmm and --guest");
            Ok(())
        }
    }
}

/// A process that ends with the value, and with the benchmark.
struct Tied(Child);

impl Tied {
    fn start(command: &mut Command) -> Outcome<Self> {
        let parent = Signal::SIGTERM;
        // SAFETY: between fork and exec only prctl is called, which is a plain system call.
        unsafe {
            command.pre_exec(move || nix::sys::prctl::set_pdeathsig(parent).map_err(std::io::Error::from));
        }
        Ok(Self(command.stdin(Stdio::null()).spawn().map_err(|error| format!("{command:?}: {error}"))?))
    }
}

impl Drop for Tied {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn row(what: &str, value: impl std::fmt::Display) {
    println!("  {what:<44} {value}");
}

fn spread(mut samples: Vec<Duration>) -> String {
    samples.sort();
    let at = |percent: usize| samples[(samples.len() - 1) * percent / 100].as_secs_f64() * 1e3;
    format!("p50 {:.1} ms, least {:.1} ms, most {:.1} ms", at(50), at(0), at(100))
}

/// The next item, within a limit.
async fn next<T>(stream: &mut (impl Stream<Item = T> + Unpin)) -> Outcome<T> {
    Ok(tokio::time::timeout(LIMIT, stream.next()).await?.ok_or("the bus has gone")?)
}

async fn measure(options: &Options) -> Outcome<()> {
    let directory = tempfile::tempdir_in(&options.state)?;
    let mut command = Command::new("dbus-daemon");
    command.args(["--session", "--nofork", "--nopidfile", "--print-address"]).stdout(Stdio::piped());
    let mut bus = Tied::start(&mut command)?;
    let mut address = String::new();
    BufReader::new(bus.0.stdout.take().ok_or("dbus-daemon says nothing")?).read_line(&mut address)?;
    let connection = zbus::connection::Builder::address(address.trim()).build().await?;
    let manager = ManagerProxy::builder(&connection).cache_properties(CacheProperties::No).build().await?;

    let path = |file: &str| directory.path().join(file);
    let runtime =
        if Path::new("/dev/shm").is_dir() { tempfile::tempdir_in("/dev/shm")? } else { tempfile::tempdir()? };
    fs::write(path("flotillad.toml"), "")?;
    let mut command = Command::new(&options.daemon);
    command.args(["--bus", address.trim(), "--launcher", "process", "--config"]).arg(path("flotillad.toml"));
    command.arg("--state-dir").arg(path("state")).arg("--runtime-dir").arg(runtime.path().join("run"));
    command.arg("--vmm").arg(&options.vmm).stderr(File::create(path("log"))?);
    let _daemon = Tied::start(&mut command)?;
    let began = Instant::now();
    while manager.list_vms().await.is_err() {
        if began.elapsed() > LIMIT {
            return Err("the daemon does not come up".into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let measured = clones(options, &manager, &path("disk.img")).await;
    for vm in manager.list_vms().await? {
        manager.undefine_vm(&vm.0, [("force", true.into())].into()).await?;
    }
    if measured.is_err() {
        let log = fs::read_to_string(path("log"))?;
        let lines: Vec<&str> = log.lines().collect();
        eprintln!("{}", lines[lines.len().saturating_sub(20)..].join("\n"));
    }
    measured
}

async fn clones(options: &Options, manager: &ManagerProxy<'_>, disk: &Path) -> Outcome<()> {
    let mut states = manager.receive_vm_state_changed().await?;
    let mut jobs = manager.receive_job_removed().await?;
    File::create(disk)?.set_len(16 << 20)?;
    let spec = serde_json::json!({ "kernel": options.guest, "memory": "256M", "disks": [{ "path": disk }] });
    manager.define_vm("web", &spec.to_string(), [].into()).await?;
    manager.start_vm("web", "run", [].into()).await?;
    while next(&mut states).await?.args()?.new() != "running" {}
    manager.create_template("web", "base", [].into()).await?;
    while next(&mut jobs).await?.args()?.kind() != "create-template" {}

    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("clones (load of the machine: {})", load.split(' ').next().unwrap_or_default());
    let (mut running, mut done) = (Vec::new(), Vec::new());
    for at in 0..SINGLE {
        let name = format!("one-{at}");
        let began = Instant::now();
        manager.clone_vm("base", &name, [].into()).await?;
        loop {
            let signal = next(&mut states).await?;
            let args = signal.args()?;
            if args.name() == &name && args.new() == "running" {
                break;
            }
        }
        running.push(began.elapsed());
        ended(&mut jobs, 1).await?;
        done.push(began.elapsed());
    }
    row("one clone, from the call to running (aim: 5)", spread(running));
    row("the same, to the end of its job", spread(done));

    // What nobody reads would hold up the connection.
    drop(states);
    let began = Instant::now();
    manager.clone_vms("base", options.count, "many-%", [].into()).await?;
    ended(&mut jobs, options.count).await?;
    let rate = f64::from(options.count) / began.elapsed().as_secs_f64();
    row(&format!("{} clones by one call", options.count), format!("{rate:.0}/s"));
    let mut private = 0;
    for vm in manager.list_vms().await?.iter().filter(|vm| vm.0.starts_with("many-")) {
        private += private_of(vm.4)?;
    }
    row("private memory of each", format!("{} KiB", private / u64::from(options.count.max(1))));
    Ok(())
}

/// Waits until so many jobs of clones have ended well.
async fn ended(jobs: &mut dbus_api::proxy::JobRemovedStream, count: u32) -> Outcome<()> {
    let mut left = count;
    while left > 0 {
        let signal = next(jobs).await?;
        let args = signal.args()?;
        if args.kind() == "clone" {
            if args.result() != "done" {
                return Err(format!("{}: {}", args.vm(), args.error_message()).into());
            }
            left -= 1;
        }
    }
    Ok(())
}

/// KiB of a process that no other one shares.
fn private_of(pid: u32) -> Outcome<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let lines = text.lines().filter(|line| line.starts_with("Private_"));
    Ok(lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum())
}
