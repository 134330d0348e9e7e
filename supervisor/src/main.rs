//! flotillad: options, wiring, readiness, signals. The order of the start matters and stands in [`run`].

use std::error::Error;
use std::io::IsTerminal;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{error, info, warn};
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};
use zbus::Connection;

use supervisor::config::{Config, LauncherKind, Options};
use supervisor::dbus;
use supervisor::dbus::access::Access;
use supervisor::fleet::gate::Gate;
use supervisor::fleet::network::{self, Network};
use supervisor::fleet::{Context, Fleet};
use supervisor::launch::dhcp::{DhcpServers, ProcessDhcp};
use supervisor::launch::process::ProcessLauncher;
use supervisor::launch::systemd::SystemdLauncher;
use supervisor::launch::{Launcher, server};
use supervisor::metrics;
use supervisor::shelf::Shelf;
use supervisor::store::Store;
use supervisor::template::Templates;

/// Sockets of VMs under systemd: made by systemd-tmpfiles, and the daemon's alone.
const UNIT_DIRECTORY: &str = "/run/flotilla-vm";
/// The work is waiting; a few threads carry any fleet.
const THREADS: usize = 4;
/// What is still under way at the end gets this long.
const FAREWELL: Duration = Duration::from_secs(2);
/// The bus answers at once or is not there.
const BUS_DEADLINE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let config = match Config::load(Options::parse()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("flotillad: {error}");
            return ExitCode::FAILURE;
        }
    };
    log();
    let shelf = Shelf::of_this_process();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            error!("threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(config, shelf));
    runtime.shutdown_timeout(FAREWELL);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Under systemd to the journal, with fields of our own (`journalctl FLOTILLA_VM=web`); otherwise to standard error.
fn log() {
    let filter = EnvFilter::try_from_env("FLOTILLA_LOG").unwrap_or_else(|_| EnvFilter::new("info,zbus=warn"));
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    let journal =
        journal.map(|layer| layer.with_field_prefix(None).with_syslog_identifier("flotillad".into()));
    let stderr = journal.is_none().then(|| {
        let color = std::io::stderr().is_terminal();
        fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(color)
    });
    tracing_subscriber::registry().with(filter).with(journal).with(stderr).init();
}

async fn run(config: Config, shelf: Shelf) -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    notify(&[NotifyState::Status("starting")]);

    // 1. The directories are ours alone.
    let store = Arc::new(Store::open(&config.state_dir, &config.runtime_dir)?);
    let proxies = make_dir(&config.runtime_dir.join("qmp"), 0o755)?;

    // 2. The launch socket takes connections (units may be waiting for it); it is served when the VMs are known.
    let connection = connect(&config.bus).await?;
    let (events, event_inbox) = mpsc::unbounded_channel();
    let (launcher, servers, socket): (Arc<dyn Launcher>, Arc<dyn DhcpServers>, _) = match config.launcher {
        LauncherKind::Systemd => {
            let socket = server::bind(&config.runtime_dir.join("launch.sock"))?;
            // A connection of its own: systemd's signals do not queue before our callers.
            let bus = connect(&config.bus).await?;
            let spares = config.spares.into();
            let launcher = SystemdLauncher::connect(bus, UNIT_DIRECTORY.into(), events, spares).await?;
            let servers = Arc::clone(&launcher) as Arc<dyn DhcpServers>;
            (Arc::clone(&launcher) as Arc<dyn Launcher>, servers, Some((socket, launcher)))
        }
        LauncherKind::Process => {
            let directory = make_dir(&config.runtime_dir.join("vm"), 0o755)?;
            let servers = Arc::new(ProcessDhcp::new(config.runtime_dir.join(network::DHCP)));
            (Arc::new(ProcessLauncher::new(directory, events)), servers, None)
        }
    };

    // 3. What was there before.
    let (news, news_inbox) = mpsc::unbounded_channel();
    let network = Network::new(config.bridges, servers, Arc::clone(&store), &config.runtime_dir);
    let gate = Gate::new(config.admission, config.state_dir.join("drained"));
    let fleet = Fleet::new(Context::new(launcher, store, network, news, config.vmm, proxies, shelf, gate));
    let began = Instant::now();
    fleet.adopt().await?;
    let start = metrics::Start { adoption: began.elapsed() };
    tokio::spawn(Arc::clone(&fleet).route(event_inbox));
    if let Some((socket, launcher)) = socket {
        let source = launcher.source(Arc::clone(&fleet) as Arc<dyn server::Source>);
        tokio::spawn(server::serve(socket, source, SystemdLauncher::identify()));
    }

    // 4. Open for callers; then the slower order of the host, and the VMs' answers.
    // A fleet without metrics is better than none.
    let socket = config.runtime_dir.join("metrics.sock");
    if let Err(error) = metrics::serve(Arc::clone(&fleet), start, &socket, config.metrics).await {
        warn!("metrics cannot be served: {error}");
    }
    let access = if config.bus == "system" {
        Access::Polkit(connection.clone())
    } else {
        Access::SameUser(connection.clone())
    };
    let templates = Templates::open(Arc::clone(&fleet), config.firmware);
    dbus::serve(&connection, Arc::clone(&templates), access, news_inbox).await.map_err(
        |error| match error {
            zbus::Error::NameTaken => {
                "the bus name org.flotilla.Flotilla1 is taken: another flotillad serves this bus".into()
            }
            error => Box::<dyn Error>::from(error),
        },
    )?;
    fleet.tidy_sockets();
    tokio::join!(fleet.tidy_network(), fleet.classify());
    templates.recover().await;
    fleet.be_ready();
    let count = fleet.list().len();
    info!("ready: {count} VMs");
    notify(&[NotifyState::Ready, NotifyState::Status(&format!("{count} VMs"))]);

    let watcher = Arc::clone(&fleet);
    tokio::spawn(async move { watcher.watch_nat().await });
    let starter = Arc::clone(&fleet);
    tokio::spawn(async move { starter.autostart().await });
    let watch = tokio::spawn(watchdog(fleet));
    tokio::select! {
        _ = terminate.recv() => info!("SIGTERM: ending; the VMs run on"),
        _ = interrupt.recv() => info!("SIGINT: ending; the VMs run on"),
        () = connection.closed() => return Err("the bus hung up".into()),
    }
    watch.abort();
    notify(&[NotifyState::Stopping]);
    // Callers get "no reply" at once, and the next daemon gets the name.
    let _ = tokio::time::timeout(FAREWELL, connection.graceful_shutdown()).await;
    Ok(())
}

async fn connect(bus: &str) -> Result<Connection, Box<dyn Error>> {
    let builder = match bus {
        "system" => zbus::connection::Builder::system(),
        "session" => zbus::connection::Builder::session(),
        address => zbus::connection::Builder::address(address),
    };
    let late = || format!("bus {bus}: no answer within {BUS_DEADLINE:?}");
    let connected = tokio::time::timeout(BUS_DEADLINE, builder.build()).await.map_err(|_| late())?;
    Ok(connected.map_err(|error| format!("bus {bus}: {error}"))?)
}

/// Pings the watchdog as long as the registry and the publisher answer. A VM that hangs is that VM's state, not ours.
async fn watchdog(fleet: Arc<Fleet>) {
    let period = sd_notify::watchdog_enabled().map(|limit| limit / 3);
    let mut tick = tokio::time::interval(period.unwrap_or(Duration::from_secs(30)));
    loop {
        tick.tick().await;
        fleet.flush().await;
        let status = format!("{} VMs, {} jobs", fleet.list().len(), fleet.jobs().len());
        let states = [NotifyState::Status(&status), NotifyState::Watchdog];
        notify(if period.is_some() { &states } else { &states[..1] });
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("systemd could not be told: {error}");
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<PathBuf, Box<dyn Error>> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(|error| format!("directory {}: {error}", path.display()))?;
    Ok(path.to_owned())
}
