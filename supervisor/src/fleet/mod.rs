//! The fleet: owns every VM's life, the registry of names, jobs and events. The D-Bus room calls [`Fleet`]; nobody calls back up.
//!
//! ```text
//! registry.rs   Fleet: names, uuids, rows for lists; define and undefine; reads never wait for a VM
//! autostart.rs  what starts with the host
//! adopt.rs      what to do at start-up with what is found
//! actor.rs      one task per VM: feeds the state machine, carries out its effects
//! inbox.rs      what an actor can be told, and the way to it
//! link.rs       the actor's connection to its VMM, the proxy on it, and the commands that wait for it
//! monitor.rs    the task behind it: tries, reports, forwards events
//! words.rs      what is said over it, and errors of QMP as ours
//! prepare.rs    files, taps and command line for a start
//! saving.rs     what templates and clones need of a VM
//! networks.rs   networks: define, delete
//! network.rs    bridges and taps of a definition
//! dhcp.rs       addresses for cards, and the servers that tell them        leases.rs   who has which, pure
//! nat.rs        when the table of NAT is written      network_rules.rs   what a network may be, and what follows, pure
//! plugger.rs    the task that brings a device to a running VM, or takes it away
//! plug.rs       what it does after what, pure        seats.rs   which devices are there, and where, pure
//! devices.rs    devices that came and went over QMP
//! gate.rs       may one more VM run? limits of the host, drain mode
//! jobs.rs       numbers, ends and waiters of jobs
//! usage.rs      what VMs use of the host, from the kernel's accounts
//! samples.rs    what VMMs say of their balloons and disks, for metrics
//! view.rs       what is told about a VM, and the news that go to D-Bus
//! vm.rs         the pure state machine        spec.rs, command.rs   rules and command line, pure
//! restart.rs    whether and when it is started again, a part of it
//! life.rs       its words: states, requests, inputs, effects
//! error.rs      what can go wrong
//! ```

pub mod actor;
pub mod adopt;
mod autostart;
pub mod command;
pub mod devices;
pub mod dhcp;
mod error;
pub mod gate;
mod inbox;
pub mod jobs;
pub mod leases;
pub mod life;
mod link;
mod logs;
mod monitor;
mod nat;
pub mod network;
mod network_rules;
pub mod networks;
pub mod plug;
mod plugger;
pub(crate) mod prepare;
pub mod registry;
mod restart;
pub mod samples;
mod saving;
pub mod seats;
pub mod spec;
pub mod usage;
pub mod view;
pub mod vm;
mod words;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Semaphore, mpsc};

pub use error::FleetError;
pub use plug::{Ask, How};
pub use registry::Fleet;

use crate::launch::Launcher;
use crate::shelf::Shelf;
use crate::store::Store;
use gate::Gate;
use jobs::Jobs;
use network::Network;
use view::News;

/// Connections to VMMs tried at once: enough to find a large fleet again in a moment, few enough not to run the host out of descriptors.
const CONNECTS_AT_ONCE: usize = 32;

/// What every actor shares.
pub struct Context {
    launcher: Arc<dyn Launcher>,
    store: Arc<Store>,
    network: Network,
    jobs: Jobs,
    gate: Gate,
    news: mpsc::UnboundedSender<News>,
    sequence: AtomicU64,
    connects: Semaphore,
    vmm: PathBuf,
    proxies: PathBuf,
    shelf: Arc<Shelf>,
    logs: Arc<Semaphore>,
    boot_id: String,
}

impl Context {
    /// `proxies` is the directory of the VMs' QMP proxy sockets, which `shelf` keeps when the daemon ends; `vmm` the program.
    #[expect(clippy::too_many_arguments, reason = "the daemon's parts, put together once")]
    pub fn new(
        launcher: Arc<dyn Launcher>,
        store: Arc<Store>,
        network: Network,
        news: mpsc::UnboundedSender<News>,
        vmm: PathBuf,
        proxies: PathBuf,
        shelf: Shelf,
        gate: Gate,
    ) -> Self {
        // Without it (no /proc) records of an earlier boot could pass for this one's; process start times still tell them apart.
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            launcher,
            store,
            network,
            jobs: Jobs::new(news.clone()),
            gate,
            news,
            sequence: AtomicU64::new(0),
            connects: Semaphore::new(CONNECTS_AT_ONCE),
            vmm,
            proxies,
            shelf: Arc::new(shelf),
            logs: Arc::new(Semaphore::new(logs::STREAMS)),
            boot_id: boot_id.trim().to_owned(),
        }
    }

    fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// News are for the bus; when nobody publishes any more the daemon is ending.
    fn tell(&self, news: News) {
        let _ = self.news.send(news);
    }
}
