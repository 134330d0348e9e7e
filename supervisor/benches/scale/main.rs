//! What a fleet costs its daemon: lists, properties, metrics, events, adoption, memory, idle time and the proxy, with simulated VMs (real
//! processes that speak QMP, no KVM) under the real daemon, bus and sockets.
//!
//! `cargo bench -p supervisor --bench scale [-- --vms 100,1000,4000] [--daemon PATH]`. Needs `dbus-daemon`, and three descriptors for each VM
//! (`ulimit -n`). It judges nothing: the aims stand beside the figures.

mod lab;
mod vm;

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use zbus::fdo::{IntrospectableProxy, PropertiesProxy};

use lab::Lab;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Samples of what is quick.
const SAMPLES: usize = 300;
/// Scrapes that find nothing in the cache, which holds for a second.
const COLD: usize = 5;
/// How long the daemon is left alone to see what it does.
const IDLE: Duration = Duration::from_secs(10);
/// What follows a start has settled.
const SETTLED: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_secs(30);

struct Options {
    sizes: Vec<usize>,
    daemon: PathBuf,
}

fn options() -> Outcome<Options> {
    let mut options =
        Options { sizes: vec![100, 1000, 4000], daemon: env!("CARGO_BIN_EXE_flotillad").into() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word}: needs a value"));
        match word.as_str() {
            "--vms" => options.sizes = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--daemon" => options.daemon = value()?.into(),
            // From cargo.
            "--bench" => {}
            _ => return Err(format!("{word}: use --vms NUMBER,... or --daemon PATH").into()),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let outcome = match vm::wanted() {
        Some(socket) => vm::serve(&socket),
        None => bench(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scale: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Outcome<()> {
    let options = options()?;
    // The processes of the lab are tied to this thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for size in options.sizes {
        runtime.block_on(measure(size, &options.daemon))?;
    }
    Ok(())
}

/// One line of the report.
fn row(what: &str, value: impl std::fmt::Display) {
    println!("  {what:<44} {value}");
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Median, 99th percentile and maximum.
fn spread(mut samples: Vec<Duration>) -> String {
    samples.sort();
    let at = |percent: usize| samples[(samples.len() - 1) * percent / 100];
    let [median, high, most] = [at(50), at(99), at(100)].map(milliseconds);
    format!("p50 {median:.3} ms, p99 {high:.3} ms, most {most:.3} ms")
}

async fn measure(size: usize, daemon: &Path) -> Outcome<()> {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("{size} VMs (load of the machine: {})", load.split(' ').next().unwrap_or_default());
    let mut lab = Lab::new(daemon).await?;
    lab.start_daemon(0).await?;
    let empty = lab.used()?;
    let (defined, started) = lab.fill(size).await?;
    let rate = |time: Duration| format!("{:.0}/s", size as f64 / time.as_secs_f64());
    row("defined, started", format!("{}, {}", rate(defined), rate(started)));
    tokio::time::sleep(SETTLED).await;
    let per_vm = |used: lab::Used| (used.memory.saturating_sub(empty.memory)) as f64 / size as f64;
    row("memory per VM, all started", format!("{:.1} KiB", per_vm(lab.used()?)));

    lab.kill_daemon()?;
    let start = lab.start_daemon(size).await?;
    row("restart to first list, all VMs answering", milliseconds(start.listed).round());
    row("restart to all adopted, ms (aim: 1000 in 2000)", format!("{:.0}", milliseconds(start.ready)));
    tokio::time::sleep(SETTLED).await;
    let before = lab.used()?;
    row("memory per VM, all adopted (aim: 64)", format!("{:.1} KiB", per_vm(before)));
    row(
        "descriptors per VM",
        format!("{:.2}", (before.descriptors - empty.descriptors) as f64 / size as f64),
    );
    tokio::time::sleep(IDLE).await;
    let spent = lab.used()?.cpu - before.cpu;
    let share = spent as f64 / IDLE.as_nanos() as f64 * 100.0;
    row("processor, idle (aim: none)", format!("{share:.3} % ({} µs in {IDLE:?})", spent / 1000));

    let frozen = lab.freeze_some().await?;
    println!("  {frozen} of them frozen:");
    lists(&lab).await?;
    properties(&lab, size).await?;
    metrics(&lab).await?;
    events(&lab, size).await?;
    proxy(&lab)?;
    lab.kill_daemon()?;
    let start = lab.start_daemon(size).await?;
    row("restart to first list", format!("{:.0} ms", milliseconds(start.listed)));
    row("restart to all told apart", format!("{:.0} ms", milliseconds(start.ready)));
    tokio::time::sleep(IDLE).await;
    row("memory per VM, after all of it", format!("{:.1} KiB", per_vm(lab.used()?)));
    Ok(())
}

async fn lists(lab: &Lab) -> Outcome<()> {
    let (mut samples, mut bytes) = (Vec::with_capacity(SAMPLES), 0);
    let before = lab.used()?.cpu;
    for _ in 0..SAMPLES {
        let began = Instant::now();
        let (bus, path) = (Some(dbus_api::BUS_NAME), dbus_api::MANAGER_PATH);
        let manager = Some("org.flotilla.Flotilla1.Manager");
        let reply = lab.connection.call_method(bus, path, manager, "ListVms", &()).await?;
        samples.push(began.elapsed());
        bytes = reply.data().len();
    }
    row("ListVms (aim: 4000 in 20 ms at p99)", format!("{}, {} KiB", spread(samples), bytes >> 10));
    // What does not depend on who else uses the machine.
    let spent = (lab.used()?.cpu - before) as f64 / SAMPLES as f64 / 1e6;
    row("ListVms, processor time of the daemon", format!("{spent:.3} ms"));
    let began = Instant::now();
    let object = IntrospectableProxy::builder(&lab.connection).destination(dbus_api::BUS_NAME);
    let text = object.path(dbus_api::MANAGER_PATH).build().await?.introspect().await?;
    row(
        "Introspect of the manager",
        format!("{:.1} ms, {} KiB", milliseconds(began.elapsed()), text.len() >> 10),
    );
    Ok(())
}

async fn properties(lab: &Lab, size: usize) -> Outcome<()> {
    let mut samples = Vec::with_capacity(SAMPLES);
    for at in 0..SAMPLES {
        // Frozen ones, too.
        let path = dbus_api::vm_path(&lab::name(at * 7 % size));
        let builder = PropertiesProxy::builder(&lab.connection).destination(dbus_api::BUS_NAME).path(path);
        let vm = builder.build().await?;
        let began = Instant::now();
        vm.get_all("org.flotilla.Flotilla1.Vm".try_into()?).await?;
        samples.push(began.elapsed());
    }
    row("GetAll of one VM", spread(samples));
    Ok(())
}

async fn metrics(lab: &Lab) -> Outcome<()> {
    let socket = lab.path("run/metrics.sock");
    let scrape = || -> Outcome<(Duration, usize)> {
        let began = Instant::now();
        let mut client = UnixStream::connect(&socket)?;
        client.set_read_timeout(Some(LIMIT))?;
        client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
        let mut page = Vec::new();
        client.read_to_end(&mut page)?;
        Ok((began.elapsed(), page.len()))
    };
    let (mut cold, mut warm, mut bytes) = (Vec::new(), Vec::new(), 0);
    for _ in 0..COLD {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let (time, length) = scrape()?;
        cold.push(time);
        bytes = length;
        for _ in 0..3 {
            warm.push(scrape()?.0);
        }
    }
    row("metrics, read anew", spread(cold));
    row("metrics, within a second", format!("{}, {} KiB", spread(warm), bytes >> 10));
    Ok(())
}

/// A blocking QMP client: nothing of a runtime is measured.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn new(path: &Path) -> Outcome<Qmp> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qmp = Qmp(BufReader::new(stream));
        qmp.0.read_line(&mut String::new())?;
        qmp.ask("qmp_capabilities")?;
        Ok(qmp)
    }

    fn ask(&mut self, command: &str) -> Outcome<Duration> {
        let began = Instant::now();
        self.0.get_mut().write_all(format!("{{\"execute\":\"{command}\"}}\n").as_bytes())?;
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line)?;
            if !line.contains("\"event\"") {
                let right = line.contains("\"return\"");
                return if right { Ok(began.elapsed()) } else { Err(format!("{command}: {line:?}").into()) };
            }
        }
    }
}

/// From the VMM's word to the signal at a client of the bus.
async fn events(lab: &Lab, size: usize) -> Outcome<()> {
    let mut samples = Vec::new();
    for at in (0..10).map(|at| at * 11 % size) {
        let mut stream = lab.vm(at).await?.receive_event().await?;
        let mut qmp = Qmp::new(&lab.sockets(at).0)?;
        for _ in 0..SAMPLES / 10 {
            qmp.ask("x-event")?;
            let signal = tokio::time::timeout(LIMIT, stream.next()).await?.ok_or("no signals any more")?;
            let now = vm::clock();
            let arguments = signal.args()?;
            let data: serde_json::Value = serde_json::from_str(arguments.data())?;
            let sent = data["at"].as_u64().ok_or("an event without a time")?;
            samples.push(Duration::from_nanos(now.saturating_sub(sent)));
        }
    }
    row("event, from the VMM to a client of the bus", spread(samples));
    Ok(())
}

/// One command, straight and through the proxy, in turns.
fn proxy(lab: &Lab) -> Outcome<()> {
    let (own, proxied) = lab.sockets(0);
    let (mut own, mut proxied) = (Qmp::new(&own)?, Qmp::new(&proxied)?);
    let (mut straight, mut through) = (Vec::new(), Vec::new());
    for _ in 0..SAMPLES * 5 {
        straight.push(own.ask("query-status")?);
        through.push(proxied.ask("query-status")?);
    }
    let median = |samples: &[Duration]| {
        let mut samples = samples.to_vec();
        samples.sort();
        samples[samples.len() / 2]
    };
    let added = median(&through).saturating_sub(median(&straight));
    row("QMP, straight", spread(straight));
    row("QMP, through the proxy", spread(through));
    row("added by the proxy, p50 (aim: 100)", format!("{:.0} µs", added.as_secs_f64() * 1e6));
    Ok(())
}
