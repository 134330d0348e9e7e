//! Client proxies: what the daemon offers, as Rust traits. The order and signatures here are the API; the daemon's handlers match them.

use std::collections::HashMap;

use zbus::{OwnedFd, OwnedObjectPath, OwnedVariant, Variant};

/// One row of `ListVms`: name, uuid, state, sub-state, main process id, generation, object path.
pub type VmRow = (String, String, String, String, u32, u64, OwnedObjectPath);
/// One row of `ListNetworks`: name, bridge, number of VMs with a card on it, object path.
pub type NetworkRow = (String, String, u32, OwnedObjectPath);
/// One row of `ListAddresses`: VM, card, address.
pub type AddressRow = (String, String, String);
/// One row of `ListTemplates`: name, VM, created (microseconds since the epoch), bytes, number of what needs it, object path.
pub type TemplateRow = (String, String, u64, u64, u32, OwnedObjectPath);
/// One row of what `CloneVms` returns: name, object path of the VM, object path of the job.
pub type CloneRow = (String, OwnedObjectPath, OwnedObjectPath);
/// One row of `ListJobs`: id, type, VM, state, phase, error message, age in microseconds, object path.
pub type JobRow = (u32, String, String, String, String, String, u64, OwnedObjectPath);
/// What `GetStats` tells: by VM, by name of the count.
pub type Stats = HashMap<String, HashMap<String, u64>>;
/// Trailing options of a call.
pub type Options<'a> = HashMap<&'a str, Variant<'a>>;
/// Details of a signal.
pub type Details = HashMap<String, OwnedVariant>;

/// The fleet.
#[zbus::proxy(
    interface = "org.flotilla.Flotilla1.Manager",
    default_service = "org.flotilla.Flotilla1",
    default_path = "/org/flotilla/Flotilla1"
)]
pub trait Manager {
    /// All VMs, from the daemon's memory: never waits for a VM.
    fn list_vms(&self) -> Result<Vec<VmRow>, crate::error::Error>;
    /// What running VMs use of the host, at most a second old; of all of them when no name is given. Returns the number of the newest event,
    /// and by VM: `cpu_usec`, `threads`, `resident`, `disk_read`, `disk_written` (bytes), `memory`, `vcpus` (as defined), and of each card with
    /// a tap `nic0.received`, `nic0.received_packets`, `nic0.sent`, `nic0.sent_packets`, as the guest sees it.
    fn get_stats(&self, names: &[&str]) -> Result<(u64, Stats), crate::error::Error>;
    /// The object of a VM by name.
    fn get_vm(&self, name: &str) -> Result<OwnedObjectPath, crate::error::Error>;
    /// The object of a VM by uuid.
    fn get_vm_by_uuid(&self, uuid: &str) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Stores a definition (JSON, see [`crate::spec::VmSpec`]). Options: `replace b`, `if_generation t`. Returns the object and generation.
    #[zbus(allow_interactive_auth)]
    fn define_vm(
        &self,
        name: &str,
        spec: &str,
        options: Options<'_>,
    ) -> Result<(OwnedObjectPath, u64), crate::error::Error>;
    /// Makes a VM from an image: `spec` (JSON) is the rest of its definition. Options: `size t`, `format s`, `whole b`, `ssh_keys as`,
    /// `user_data s`, `network_config s`, `start b` (default true). Returns its object and the job.
    #[zbus(allow_interactive_auth)]
    fn create_vm(
        &self,
        name: &str,
        spec: &str,
        image: &str,
        options: Options<'_>,
    ) -> Result<(OwnedObjectPath, OwnedObjectPath), crate::error::Error>;
    /// Forgets a stopped VM. Options: `force b` powers it off first.
    #[zbus(allow_interactive_auth)]
    fn undefine_vm(&self, name: &str, options: Options<'_>) -> Result<(), crate::error::Error>;
    /// Starts a VM. `mode` is `run` or `paused`. Returns the job.
    #[zbus(allow_interactive_auth)]
    fn start_vm(
        &self,
        name: &str,
        mode: &str,
        options: Options<'_>,
    ) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Asks the guest to shut down; powers off after `timeout_usec t` (default 30 s) when `force b` is set (default true). Returns the job.
    #[zbus(allow_interactive_auth)]
    fn shutdown_vm(&self, name: &str, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Ends the VM at once. Returns the job.
    #[zbus(allow_interactive_auth)]
    fn power_off_vm(&self, name: &str, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Stops the vCPUs. Returns the job.
    #[zbus(allow_interactive_auth)]
    fn pause_vm(&self, name: &str, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Lets the vCPUs go on. Returns the job.
    #[zbus(allow_interactive_auth)]
    fn resume_vm(&self, name: &str, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Brings a network card (JSON, see [`crate::spec::Nic`]) to a running VM. Option `persist b`: to its definition, too. Returns id and job.
    #[zbus(allow_interactive_auth)]
    fn attach_nic(
        &self,
        name: &str,
        nic: &str,
        options: Options<'_>,
    ) -> Result<(String, OwnedObjectPath), crate::error::Error>;
    /// Takes a card from a VM. Options: `persist b`, `timeout_usec t` (how long the guest has to let go). Returns the job.
    #[zbus(allow_interactive_auth)]
    fn detach_nic(
        &self,
        name: &str,
        id: &str,
        options: Options<'_>,
    ) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Brings a disk (JSON, see [`crate::spec::Disk`]) to a running VM, as a card.
    #[zbus(allow_interactive_auth)]
    fn attach_disk(
        &self,
        name: &str,
        disk: &str,
        options: Options<'_>,
    ) -> Result<(String, OwnedObjectPath), crate::error::Error>;
    /// Takes a disk from a VM, as a card.
    #[zbus(allow_interactive_auth)]
    fn detach_disk(
        &self,
        name: &str,
        id: &str,
        options: Options<'_>,
    ) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Starts no VM any more, after restarts neither. Options: `stop b` shuts those that run down, `timeout_usec t`. Returns the jobs.
    #[zbus(allow_interactive_auth)]
    fn drain(&self, options: Options<'_>) -> Result<Vec<OwnedObjectPath>, crate::error::Error>;
    /// VMs may be started again.
    #[zbus(allow_interactive_auth)]
    fn undrain(&self) -> Result<(), crate::error::Error>;
    /// All networks, from the daemon's memory.
    fn list_networks(&self) -> Result<Vec<NetworkRow>, crate::error::Error>;
    /// Addresses that networks with DHCP give to VMs' cards, from the daemon's memory.
    fn list_addresses(&self) -> Result<Vec<AddressRow>, crate::error::Error>;
    /// Stores a network (JSON, see [`crate::network::NetworkSpec`]) and makes its bridge. Option: `replace b`.
    #[zbus(allow_interactive_auth)]
    fn define_network(
        &self,
        name: &str,
        spec: &str,
        options: Options<'_>,
    ) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Forgets a network that no VM uses; its bridge goes if we made it.
    #[zbus(allow_interactive_auth)]
    fn delete_network(&self, name: &str) -> Result<(), crate::error::Error>;
    /// All templates, from the daemon's memory.
    fn list_templates(&self) -> Result<Vec<TemplateRow>, crate::error::Error>;
    /// Makes a template of a VM. Options: `after s` (`resume`, `pause`, `stop`), `description s`. Returns the job.
    #[zbus(allow_interactive_auth)]
    fn create_template(
        &self,
        vm: &str,
        template: &str,
        options: Options<'_>,
    ) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Compares a template's files with their checksums. Returns the job.
    #[zbus(allow_interactive_auth)]
    fn verify_template(
        &self,
        template: &str,
        options: Options<'_>,
    ) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Removes a template that nothing needs.
    #[zbus(allow_interactive_auth)]
    fn delete_template(&self, template: &str, options: Options<'_>) -> Result<(), crate::error::Error>;
    /// Makes a VM from a template. Options: `paused b`, `labels a{ss}`, `user_data s`, `network_config s`. Returns its object and the job.
    #[zbus(allow_interactive_auth)]
    fn clone_vm(
        &self,
        template: &str,
        name: &str,
        options: Options<'_>,
    ) -> Result<(OwnedObjectPath, OwnedObjectPath), crate::error::Error>;
    /// Makes many, with names after a pattern (`web-%`); options as of `CloneVm`.
    #[zbus(allow_interactive_auth)]
    fn clone_vms(
        &self,
        template: &str,
        count: u32,
        pattern: &str,
        options: Options<'_>,
    ) -> Result<Vec<CloneRow>, crate::error::Error>;
    /// Jobs under way.
    fn list_jobs(&self) -> Result<Vec<JobRow>, crate::error::Error>;
    /// Cancels a job by its number; `JobRemoved` tells how it ended.
    #[zbus(allow_interactive_auth)]
    fn cancel_job(&self, id: u32) -> Result<(), crate::error::Error>;

    /// A VM was defined.
    #[zbus(signal)]
    fn vm_new(&self, name: String, path: OwnedObjectPath) -> zbus::Result<()>;
    /// A VM was undefined.
    #[zbus(signal)]
    fn vm_removed(&self, name: String, path: OwnedObjectPath) -> zbus::Result<()>;
    /// A network was defined.
    #[zbus(signal)]
    fn network_new(&self, name: String, path: OwnedObjectPath) -> zbus::Result<()>;
    /// A network was deleted.
    #[zbus(signal)]
    fn network_removed(&self, name: String, path: OwnedObjectPath) -> zbus::Result<()>;
    /// A template was made.
    #[zbus(signal)]
    fn template_new(&self, name: String, path: OwnedObjectPath) -> zbus::Result<()>;
    /// A template was deleted.
    #[zbus(signal)]
    fn template_removed(&self, name: String, path: OwnedObjectPath) -> zbus::Result<()>;
    /// A VM changed state.
    #[zbus(signal)]
    fn vm_state_changed(
        &self,
        seq: u64,
        name: String,
        path: OwnedObjectPath,
        old: String,
        new: String,
        reason: String,
        details: Details,
    ) -> zbus::Result<()>;
    /// A job began.
    #[zbus(signal)]
    fn job_new(&self, id: u32, path: OwnedObjectPath, kind: String, vm: String) -> zbus::Result<()>;
    /// A job ended: `result` is `done`, `failed` or `cancelled`; the error fields are empty unless it failed.
    #[zbus(signal)]
    fn job_removed(
        &self,
        id: u32,
        path: OwnedObjectPath,
        kind: String,
        vm: String,
        result: String,
        error_name: String,
        error_message: String,
    ) -> zbus::Result<()>;

    /// The daemon's version.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> zbus::Result<String>;
    /// Nothing is started on this host.
    #[zbus(property)]
    fn draining(&self) -> zbus::Result<bool>;
    /// `starting`, `running`, `draining` or `degraded` (a record was set aside or a VM is quarantined).
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;
    /// Number of VMs defined.
    #[zbus(property(emits_changed_signal = "false"), name = "NVms")]
    fn n_vms(&self) -> zbus::Result<u32>;
    /// Number of VMs running or paused.
    #[zbus(property(emits_changed_signal = "false"), name = "NRunning")]
    fn n_running(&self) -> zbus::Result<u32>;
    /// Number of the newest event.
    #[zbus(property(emits_changed_signal = "false"))]
    fn event_seq(&self) -> zbus::Result<u64>;
    /// Records that could not be read and were set aside: file and reason.
    #[zbus(property)]
    fn corrupt_records(&self) -> zbus::Result<Vec<(String, String)>>;
    /// VMs' processes that were there when the daemon started, are there still, and belong to no definition: name, unit (empty without
    /// systemd) and process id. They are left alone.
    #[zbus(property(emits_changed_signal = "false"))]
    fn orphans(&self) -> zbus::Result<Vec<(String, String, u32)>>;
}

/// One VM.
#[zbus::proxy(interface = "org.flotilla.Flotilla1.Vm", default_service = "org.flotilla.Flotilla1")]
pub trait Vm {
    /// As `StartVm`.
    #[zbus(allow_interactive_auth)]
    fn start(&self, mode: &str, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// As `ShutdownVm`.
    #[zbus(allow_interactive_auth)]
    fn shutdown(&self, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// As `PowerOffVm`.
    #[zbus(allow_interactive_auth)]
    fn power_off(&self, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// As `PauseVm`.
    #[zbus(allow_interactive_auth)]
    fn pause(&self, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// As `ResumeVm`.
    #[zbus(allow_interactive_auth)]
    fn resume(&self, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// As `UndefineVm`.
    #[zbus(allow_interactive_auth)]
    fn undefine(&self, options: Options<'_>) -> Result<(), crate::error::Error>;
    /// As `AttachNic` of the Manager.
    #[zbus(allow_interactive_auth)]
    fn attach_nic(
        &self,
        nic: &str,
        options: Options<'_>,
    ) -> Result<(String, OwnedObjectPath), crate::error::Error>;
    /// As `DetachNic` of the Manager.
    #[zbus(allow_interactive_auth)]
    fn detach_nic(&self, id: &str, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// As `AttachDisk` of the Manager.
    #[zbus(allow_interactive_auth)]
    fn attach_disk(
        &self,
        disk: &str,
        options: Options<'_>,
    ) -> Result<(String, OwnedObjectPath), crate::error::Error>;
    /// As `DetachDisk` of the Manager.
    #[zbus(allow_interactive_auth)]
    fn detach_disk(&self, id: &str, options: Options<'_>) -> Result<OwnedObjectPath, crate::error::Error>;
    /// Sends one QMP command (JSON) and returns its answer (JSON). Option `mode s`: `full` (default) or `query` (only what changes nothing).
    #[zbus(allow_interactive_auth)]
    fn qmp_command(&self, command: &str, options: Options<'_>) -> Result<String, crate::error::Error>;
    /// A connected stream that speaks QMP from its greeting on, shared with other clients by the proxy. Option `mode` as of `QmpCommand`.
    #[zbus(allow_interactive_auth)]
    fn open_qmp(&self, options: Options<'_>) -> Result<OwnedFd, crate::error::Error>;
    /// A connected stream of the console `which` (`""` is the serial port), and what kind of descriptor it is.
    #[zbus(allow_interactive_auth)]
    fn open_console(
        &self,
        which: &str,
        options: Options<'_>,
    ) -> Result<(OwnedFd, String), crate::error::Error>;

    /// A stream with what the VM's process has logged, and what kind of descriptor it is. Options: `lines t`, `follow b`.
    #[zbus(allow_interactive_auth)]
    fn open_log(&self, options: Options<'_>) -> Result<(OwnedFd, String), crate::error::Error>;

    /// State changed. (Named apart from the change signal that the property `State` has of its own.)
    #[zbus(signal, name = "StateChanged")]
    fn changed_state(&self, seq: u64, old: String, new: String, reason: String) -> zbus::Result<()>;
    /// A QMP event of this VM: number, microseconds since the epoch, name, data as JSON.
    #[zbus(signal)]
    fn event(&self, seq: u64, usec: u64, qmp_event: String, data: String) -> zbus::Result<()>;

    /// Name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> zbus::Result<String>;
    /// Identity.
    #[zbus(property(emits_changed_signal = "const"))]
    fn uuid(&self) -> zbus::Result<String>;
    /// `defined`, `starting`, `running`, `paused`, `stopping`, `stopped`, `quarantined` or `failed`.
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;
    /// Why it is in that state, in words.
    #[zbus(property)]
    fn state_reason(&self) -> zbus::Result<String>;
    /// When it came into that state, microseconds since the epoch.
    #[zbus(property)]
    fn state_change_timestamp(&self) -> zbus::Result<u64>;
    /// What the administrator wants: `running`, `paused` or `stopped`.
    #[zbus(property)]
    fn intent(&self) -> zbus::Result<String>;
    /// Number of the definition.
    #[zbus(property)]
    fn generation(&self) -> zbus::Result<u64>;
    /// Number of the definition that the running process was started from; 0 when none runs.
    #[zbus(property)]
    fn applied_generation(&self) -> zbus::Result<u64>;
    /// The VMM's process; 0 when none.
    #[zbus(property, name = "MainPID")]
    fn main_pid(&self) -> zbus::Result<u32>;
    /// systemd unit; empty under the process launcher.
    #[zbus(property)]
    fn unit(&self) -> zbus::Result<String>;
    /// File that takes the VMM's own messages under the process launcher; empty where they go to the journal of `Unit`.
    #[zbus(property(emits_changed_signal = "const"))]
    fn log_file(&self) -> zbus::Result<String>;
    /// How the last process ended: (`exited`, code), (`signal`, name) or two empty strings.
    #[zbus(property)]
    fn exit_status(&self) -> zbus::Result<(String, String)>;
    /// The last lines that the process logged before it failed; empty when none failed since the daemon started.
    #[zbus(property)]
    fn last_log(&self) -> zbus::Result<Vec<String>>;
    /// Restarts by the VM's policy in a row.
    #[zbus(property, name = "NRestarts")]
    fn n_restarts(&self) -> zbus::Result<u32>;
    /// The definition, JSON.
    #[zbus(property(emits_changed_signal = "invalidates"))]
    fn spec(&self) -> zbus::Result<String>;
    /// The command line of the VMM, as `ps` shows it.
    #[zbus(property)]
    fn command_line(&self) -> zbus::Result<Vec<String>>;
    /// Devices of the definition that were removed over QMP since the start, by id.
    #[zbus(property)]
    fn removed_devices(&self) -> zbus::Result<Vec<String>>;
    /// Devices that were added over QMP since the start, by id.
    #[zbus(property)]
    fn added_devices(&self) -> zbus::Result<Vec<String>>;
    /// Network cards: id, tap, hardware address, network or bridge.
    #[zbus(property)]
    fn network_interfaces(&self) -> zbus::Result<Vec<(String, String, String, String)>>;
    /// Addresses that networks with DHCP give to its cards: card, address.
    #[zbus(property(emits_changed_signal = "false"))]
    fn addresses(&self) -> zbus::Result<Vec<(String, String)>>;
    /// Disks: id, path, format, read-only.
    #[zbus(property)]
    fn disks(&self) -> zbus::Result<Vec<(String, String, String, bool)>>;
    /// Path of the proxy's QMP socket.
    #[zbus(property(emits_changed_signal = "const"))]
    fn qmp_socket(&self) -> zbus::Result<String>;
    /// The VMM answers QMP.
    #[zbus(property)]
    fn qmp_responsive(&self) -> zbus::Result<bool>;
}

/// A network.
#[zbus::proxy(interface = "org.flotilla.Flotilla1.Network", default_service = "org.flotilla.Flotilla1")]
pub trait Network {
    /// Name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> zbus::Result<String>;
    /// Its bridge.
    #[zbus(property)]
    fn bridge(&self) -> zbus::Result<String>;
    /// The definition, JSON.
    #[zbus(property(emits_changed_signal = "invalidates"))]
    fn spec(&self) -> zbus::Result<String>;
    /// VMs that have a card on it.
    #[zbus(property(emits_changed_signal = "false"))]
    fn vms(&self) -> zbus::Result<Vec<String>>;
    /// What keeps it from doing what its definition says, and what to do about it.
    #[zbus(property(emits_changed_signal = "false"))]
    fn problems(&self) -> zbus::Result<Vec<String>>;
}

/// A template.
#[zbus::proxy(interface = "org.flotilla.Flotilla1.Template", default_service = "org.flotilla.Flotilla1")]
pub trait Template {
    /// Name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> zbus::Result<String>;
    /// The VM that it was made of.
    #[zbus(property(emits_changed_signal = "const"))]
    fn vm(&self) -> zbus::Result<String>;
    /// For people.
    #[zbus(property(emits_changed_signal = "const"))]
    fn description(&self) -> zbus::Result<String>;
    /// When it was made, microseconds since the epoch.
    #[zbus(property(emits_changed_signal = "const"))]
    fn created(&self) -> zbus::Result<u64>;
    /// Version of the VMM that saved it.
    #[zbus(property(emits_changed_signal = "const"))]
    fn vmm_version(&self) -> zbus::Result<String>;
    /// The definition, JSON, without what tells VMs apart.
    #[zbus(property(emits_changed_signal = "const"))]
    fn spec(&self) -> zbus::Result<String>;
    /// Its files: name, bytes with holes and all, checksum.
    #[zbus(property(emits_changed_signal = "const"))]
    fn files(&self) -> zbus::Result<Vec<(String, u64, String)>>;
    /// Directory of its files.
    #[zbus(property(emits_changed_signal = "const"))]
    fn place(&self) -> zbus::Result<String>;
    /// What needs it.
    #[zbus(property(emits_changed_signal = "false"))]
    fn users(&self) -> zbus::Result<Vec<String>>;
}

/// A job under way.
#[zbus::proxy(interface = "org.flotilla.Flotilla1.Job", default_service = "org.flotilla.Flotilla1")]
pub trait Job {
    /// As `CancelJob` of the Manager.
    #[zbus(allow_interactive_auth)]
    fn cancel(&self) -> Result<(), crate::error::Error>;
    /// Number.
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> zbus::Result<u32>;
    /// `start`, `shutdown`, `power-off`, `pause` or `resume`.
    #[zbus(property(emits_changed_signal = "const"), name = "Type")]
    fn kind(&self) -> zbus::Result<String>;
    /// The VM's name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn vm(&self) -> zbus::Result<String>;
    /// `running`.
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;
    /// What it is doing now, in a word.
    #[zbus(property)]
    fn phase(&self) -> zbus::Result<String>;
    /// How much of that is done, and of how much; 0 of 0 when that cannot be said.
    #[zbus(property)]
    fn progress(&self) -> zbus::Result<(u64, u64)>;
}
