//! What is told about VMs: the cached view that lists and properties are served from, and the news that become D-Bus signals.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use dbus_api::spec::{Nic, VmSpec};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::FleetError;
use super::devices::Devices;
use super::life::{Exit, Intent, State};

/// A VM as it is shown. Cheap to clone.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// Name.
    pub name: Arc<str>,
    /// Identity.
    pub uuid: Uuid,
    /// Observed state.
    pub state: State,
    /// Why.
    pub reason: String,
    /// Since when, microseconds since the epoch.
    pub since: u64,
    /// What the administrator wants.
    pub intent: Intent,
    /// Number of the definition.
    pub generation: u64,
    /// Number of the definition that the process was started from; 0 when none runs or it is not known.
    pub applied_generation: u64,
    /// Process id; 0 when none.
    pub main_pid: u32,
    /// systemd unit, or empty.
    pub unit: String,
    /// File of the VMM's messages, or empty.
    pub log_file: String,
    /// How the last process ended.
    pub exit: Option<Exit>,
    /// The definition.
    pub spec: Arc<VmSpec>,
    /// Command line of the process; empty when none.
    pub command_line: Arc<[String]>,
    /// Cards: id, tap, hardware address, network or bridge.
    pub nics: Arc<[(String, String, String, String)]>,
    /// Disks: id, path, format, read-only.
    pub disks: Arc<[(String, String, String, bool)]>,
    /// The cards as they are defined.
    pub cards: Arc<[Nic]>,
    /// The proxy's socket.
    pub qmp_socket: PathBuf,
    /// The serial console's socket.
    pub console_socket: PathBuf,
    /// The VMM answers.
    pub responsive: bool,
    /// Devices that came and went over QMP.
    pub devices: Devices,
    /// What the last process logged before it failed.
    pub last_log: Arc<[String]>,
    /// Restarts by policy in a row.
    pub restarts: u32,
    /// Restarts by policy since the daemon's start.
    pub restarted: u32,
}

/// What happened, in the order it happened.
#[derive(Debug)]
pub enum News {
    /// A VM is there.
    VmNew(Arc<View>),
    /// A VM is gone.
    VmRemoved(Arc<str>),
    /// Something about a VM changed.
    VmChanged {
        /// Before.
        before: Arc<View>,
        /// After.
        after: Arc<View>,
        /// Number of the event, when the state changed.
        sequence: Option<u64>,
    },
    /// A QMP event.
    QmpEvent {
        /// Number of the event.
        sequence: u64,
        /// The VM.
        name: Arc<str>,
        /// When, microseconds since the epoch.
        usec: u64,
        /// Its name.
        event: String,
        /// Its data, JSON.
        data: String,
    },
    /// A job began.
    JobNew {
        /// Number.
        id: u32,
        /// Type.
        kind: &'static str,
        /// The VM.
        name: Arc<str>,
    },
    /// A job has got further.
    JobChanged {
        /// Number.
        id: u32,
        /// The VM.
        name: Arc<str>,
    },
    /// A job ended.
    JobRemoved {
        /// Number.
        id: u32,
        /// Type.
        kind: &'static str,
        /// The VM.
        name: Arc<str>,
        /// How.
        result: Result<(), FleetError>,
    },
    /// A network is there.
    NetworkNew(String),
    /// A network is another.
    NetworkChanged(String),
    /// A network is gone.
    NetworkRemoved(String),
    /// A template is there.
    TemplateNew(String),
    /// A template is gone.
    TemplateRemoved(String),
    /// The daemon's own state or its list of corrupt records changed.
    FleetChanged,
    /// Answer when everything before this is published.
    Flush(oneshot::Sender<()>),
}

/// Now, microseconds since the epoch.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
