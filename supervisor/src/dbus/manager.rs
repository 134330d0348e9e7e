//! `org.flotilla.Flotilla1.Manager`: the verbs by VM name, the lists, the fleet's own properties.

use dbus_api::error::Error;
use dbus_api::proxy::{AddressRow, CloneRow, Details, JobRow, NetworkRow, Stats, TemplateRow, VmRow};
use dbus_api::{ACTION_HOST, ACTION_MANAGE, ACTION_NETWORK, job_path, network_path, vm_path};
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{OwnedObjectPath, interface};

use super::{Options, Shared, Taken, create, named, no_options, path, shutdown_verb, start_verb, template};
use crate::fleet::life::{State, Verb};
use crate::fleet::seats::Kind;

pub(super) struct Manager {
    shared: Shared,
}

impl Manager {
    pub(super) fn new(shared: Shared) -> Self {
        Self { shared }
    }

    async fn ask(&self, header: &Header<'_>, name: &str, verb: Verb) -> Result<OwnedObjectPath, Error> {
        self.shared.access.check(header, ACTION_MANAGE, name).await?;
        self.shared.ask(name, verb).await
    }
}

/// The fleet.
#[interface(name = "org.flotilla.Flotilla1.Manager")]
impl Manager {
    /// All VMs, from the daemon's memory: name, uuid, state, sub-state, main process id, generation, object path.
    #[zbus(out_args("vms"))]
    async fn list_vms(&self) -> Result<Vec<VmRow>, Error> {
        let row = |view: std::sync::Arc<crate::fleet::view::View>| {
            Ok((
                view.name.to_string(),
                view.uuid.to_string(),
                view.state.word().to_owned(),
                view.reason.clone(),
                view.main_pid,
                view.generation,
                path(vm_path(&view.name))?,
            ))
        };
        self.shared.fleet.list().into_iter().map(row).collect()
    }

    /// What running VMs use of the host, at most a second old; of all of them when no name is given. Returns the number of the newest event,
    /// and by VM: cpu_usec, threads, resident, disk_read, disk_written (bytes), memory, vcpus (as defined), and of each card with a tap
    /// nic0.received, nic0.received_packets, nic0.sent, nic0.sent_packets, as the guest sees it.
    #[zbus(out_args("sequence", "stats"))]
    async fn get_stats(&self, names: Vec<String>) -> Result<(u64, Stats), Error> {
        super::stats::stats(&self.shared.fleet, &names).await
    }

    /// The object of a VM by name.
    #[zbus(out_args("vm"))]
    async fn get_vm(&self, name: &str) -> Result<OwnedObjectPath, Error> {
        path(vm_path(&self.shared.fleet.get(name).map_err(named)?.name))
    }

    /// The object of a VM by uuid.
    #[zbus(out_args("vm"))]
    async fn get_vm_by_uuid(&self, uuid: &str) -> Result<OwnedObjectPath, Error> {
        path(vm_path(&self.shared.fleet.get_by_uuid(uuid).map_err(named)?.name))
    }

    /// Stores a definition (JSON). Options: "replace" b: an existing VM gets this definition, which holds from its next start on;
    /// "if_generation" t: only if its generation is this one. Returns the object and the generation.
    #[zbus(out_args("vm", "generation"))]
    async fn define_vm(
        &self,
        name: &str,
        spec: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedObjectPath, u64), Error> {
        self.shared.access.check(&header, ACTION_MANAGE, name).await?;
        let mut options = Taken(options);
        let replace = options.flag("replace", false)?;
        let if_generation = options.get::<u64>("if_generation", "t")?;
        options.finish()?;
        let generation = self.shared.fleet.define(name, spec, replace, if_generation).await.map_err(named)?;
        self.shared.fleet.flush().await;
        Ok((path(vm_path(name))?, generation))
    }

    /// Makes a VM whose first disk comes of an image (the path of a raw or qcow2 one), and starts it. The definition (JSON) is the rest of it, with
    /// its other disks; one that names neither kernel, firmware nor board is a q35 with this host's firmware, of whose variables it gets a copy.
    /// The disk shares its blocks with the image where the file system can do that, or else lies over it, and then the image must stay as it is.
    /// Options: "size" t: bytes of the disk; "format" s: "raw" or "qcow2", read from the image when absent; "whole" b: the disk is to need the
    /// image no more, even if that takes a copy; "ssh_keys" as, "user_data" s, "network_config" s: for its guest, on a small disk as cloud-init
    /// looks for it; "start" b (default true). Returns its object, which is there when the VM is, and the job; when that fails nothing is left.
    #[zbus(out_args("vm", "job"))]
    async fn create_vm(
        &self,
        name: &str,
        spec: &str,
        image: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedObjectPath, OwnedObjectPath), Error> {
        self.shared.access.check(&header, ACTION_MANAGE, name).await?;
        create::create(&self.shared, name, spec, image, options).await
    }

    /// Forgets a VM that does not run: its record, taps, sockets and directory. Disks that were made for it alone, by CloneVm or CreateVm, go too;
    /// others stay. Options: "force" b: powers it off first.
    async fn undefine_vm(
        &self,
        name: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), Error> {
        self.shared.access.check(&header, ACTION_MANAGE, name).await?;
        let mut options = Taken(options);
        let force = options.flag("force", false)?;
        options.finish()?;
        self.shared.fleet.undefine(name, force).await.map_err(named)?;
        self.shared.fleet.flush().await;
        Ok(())
    }

    /// Starts a VM. Mode: "run", or "paused" to leave its vCPUs stopped. Returns the job.
    #[zbus(out_args("job"))]
    async fn start_vm(
        &self,
        name: &str,
        mode: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.ask(&header, name, start_verb(mode, options)?).await
    }

    /// Asks the guest to shut down. Options: "timeout_usec" t: how long it has (default 30 s); "force" b (default true): when it does not
    /// end in time, or its board has no power button (microvm), the VMM is ended in order, with its disks flushed. Without force the job
    /// fails with NotSupported on such a board, and with QmpTimeout when the guest does not end. Returns the job.
    #[zbus(out_args("job"))]
    async fn shutdown_vm(
        &self,
        name: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.ask(&header, name, shutdown_verb(options)?).await
    }

    /// Ends the VM at once: over QMP if it answers, by killing its process if not. Overtakes any other job of the VM. Returns the job.
    #[zbus(out_args("job"))]
    async fn power_off_vm(
        &self,
        name: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        no_options(options)?;
        self.ask(&header, name, Verb::PowerOff).await
    }

    /// Stops the vCPUs. Returns the job.
    #[zbus(out_args("job"))]
    async fn pause_vm(
        &self,
        name: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        no_options(options)?;
        self.ask(&header, name, Verb::Pause).await
    }

    /// Lets the vCPUs go on. Returns the job.
    #[zbus(out_args("job"))]
    async fn resume_vm(
        &self,
        name: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        no_options(options)?;
        self.ask(&header, name, Verb::Resume).await
    }

    /// Brings a network card (JSON, as in a definition) to a running VM: its tap is made and put on its bridge, handed over, and the guest sees
    /// the card; when a step fails, all before it are undone. Options: "persist" b: the definition gets it, too (of a VM that does not run,
    /// only that). Returns the card's id and the job.
    #[zbus(out_args("id", "job"))]
    async fn attach_nic(
        &self,
        name: &str,
        nic: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(String, OwnedObjectPath), Error> {
        self.shared.attach_nic(&header, name, nic, options).await
    }

    /// Takes a card from a VM, by id. Options: "persist" b: the definition loses it, too; "timeout_usec" t: how long the guest has to let go
    /// (default 30 s; a microvm's has no say). A card that the guest keeps longer goes when the guest lets go. Returns the job.
    #[zbus(out_args("job"))]
    async fn detach_nic(
        &self,
        name: &str,
        id: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.shared.detach(&header, name, Kind::Nic, id, options).await
    }

    /// Brings a disk (JSON, as in a definition) to a running VM, as AttachNic a card. Returns the disk's id and the job.
    #[zbus(out_args("id", "job"))]
    async fn attach_disk(
        &self,
        name: &str,
        disk: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(String, OwnedObjectPath), Error> {
        self.shared.attach_disk(&header, name, disk, options).await
    }

    /// Takes a disk from a VM, as DetachNic a card; what the guest has written is in the image when the job is done. Returns the job.
    #[zbus(out_args("job"))]
    async fn detach_disk(
        &self,
        name: &str,
        id: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.shared.detach(&header, name, Kind::Disk, id, options).await
    }

    /// Drains the host: no VM is started from now on, after a restart of daemon or host neither, until Undrain. Options: "stop" b (default
    /// false): asks the guests of all VMs that run to shut down, and powers off those that do not; "timeout_usec" t: how long they have.
    /// Returns the jobs.
    #[zbus(out_args("jobs"))]
    async fn drain(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<OwnedObjectPath>, Error> {
        self.shared.access.check(&header, ACTION_HOST, "").await?;
        let mut options = Taken(options);
        let stop = options.flag("stop", false)?;
        let verb = shutdown_verb(options.0)?;
        let jobs = self.shared.fleet.drain(true, stop.then_some(verb)).await.map_err(named)?;
        self.shared.fleet.flush().await;
        jobs.into_iter().map(|job| path(job_path(job))).collect()
    }

    /// VMs may be started again.
    async fn undrain(&self, #[zbus(header)] header: Header<'_>) -> Result<(), Error> {
        self.shared.access.check(&header, ACTION_HOST, "").await?;
        self.shared.fleet.drain(false, None).await.map_err(named)?;
        self.shared.fleet.flush().await;
        Ok(())
    }

    /// All networks, from the daemon's memory: name, bridge, number of VMs with a card on it, object path.
    #[zbus(out_args("networks"))]
    async fn list_networks(&self) -> Result<Vec<NetworkRow>, Error> {
        let fleet = &self.shared.fleet;
        let row = |(name, spec): (String, std::sync::Arc<dbus_api::network::NetworkSpec>)| {
            let users = u32::try_from(fleet.users(&name).len()).unwrap_or(u32::MAX);
            let object = path(network_path(&name))?;
            Ok((name.clone(), crate::fleet::network::bridge_of(&name, &spec), users, object))
        };
        fleet.networks().into_iter().map(row).collect()
    }

    /// Addresses that networks with DHCP give to VMs' cards, from the daemon's memory: VM, card, address.
    #[zbus(out_args("addresses"))]
    async fn list_addresses(&self) -> Vec<AddressRow> {
        let fleet = &self.shared.fleet;
        let of = |view: std::sync::Arc<crate::fleet::view::View>| {
            let given = fleet.addresses(&view).into_iter();
            given.map(move |(card, address)| (view.name.to_string(), card, address)).collect::<Vec<_>>()
        };
        fleet.list().into_iter().flat_map(of).collect()
    }

    /// Stores a network (JSON) and makes its bridge; a bridge that the host has already is used as it is, and never removed. Options:
    /// "replace" b: a network of that name gets this definition, which holds at once. Returns its object.
    #[zbus(out_args("network"))]
    async fn define_network(
        &self,
        name: &str,
        spec: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.shared.access.check(&header, ACTION_NETWORK, "").await?;
        let mut options = Taken(options);
        let replace = options.flag("replace", false)?;
        options.finish()?;
        self.shared.fleet.define_network(name, spec, replace).await.map_err(named)?;
        self.shared.fleet.flush().await;
        path(network_path(name))
    }

    /// Forgets a network that no VM has a card on. Its bridge goes, if we made it and nobody uses it.
    async fn delete_network(&self, name: &str, #[zbus(header)] header: Header<'_>) -> Result<(), Error> {
        self.shared.access.check(&header, ACTION_NETWORK, "").await?;
        self.shared.fleet.delete_network(name).await.map_err(named)?;
        self.shared.fleet.flush().await;
        Ok(())
    }

    /// All templates, from the daemon's memory: name, the VM that it was made of, when (microseconds since the epoch), bytes with holes and
    /// all, number of VMs that need it, object path.
    #[zbus(out_args("templates"))]
    async fn list_templates(&self) -> Result<Vec<TemplateRow>, Error> {
        template::rows(&self.shared)
    }

    /// Makes a template of a VM that runs or is paused: its memory, its disks as they are at that moment, its definition. Options: "after" s:
    /// "resume" (default: it runs on if it ran), "pause" or "stop"; "description" s. Returns the job.
    #[zbus(out_args("job"))]
    async fn create_template(
        &self,
        vm: &str,
        template: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.shared.access.check(&header, ACTION_MANAGE, vm).await?;
        template::create(&self.shared, vm, template, options).await
    }

    /// Compares all files of a template with their checksums. Returns the job.
    #[zbus(out_args("job"))]
    async fn verify_template(
        &self,
        template: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.shared.access.check(&header, ACTION_MANAGE, "").await?;
        no_options(options)?;
        template::verify(&self.shared, template).await
    }

    /// Removes a template that no VM needs any more.
    async fn delete_template(
        &self,
        template: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), Error> {
        self.shared.access.check(&header, ACTION_MANAGE, "").await?;
        no_options(options)?;
        self.shared.templates.delete(template).await.map_err(named)?;
        self.shared.fleet.flush().await;
        Ok(())
    }

    /// Makes a VM that goes on where the template was made, with a name, uuid, disks and addresses of its own, which its guest finds on a small
    /// disk with the label CIDATA. Options: "paused" b: its vCPUs stay stopped; "labels" a{ss}; "user_data" s, "network_config" s: for
    /// that disk, as cloud-init takes them. Returns its object, which is there when the VM is, and the job.
    #[zbus(out_args("vm", "job"))]
    async fn clone_vm(
        &self,
        template: &str,
        name: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedObjectPath, OwnedObjectPath), Error> {
        self.shared.access.check(&header, ACTION_MANAGE, name).await?;
        template::clone_one(&self.shared, template, name, options).await
    }

    /// As CloneVm, `count` times, with names after a pattern: in "web-%" or "web-%%%" the number stands for the percent signs; names that are
    /// taken are left out. Returns name, object and job of each.
    #[zbus(out_args("vms"))]
    async fn clone_vms(
        &self,
        template: &str,
        count: u32,
        pattern: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<CloneRow>, Error> {
        self.shared.access.check(&header, ACTION_MANAGE, "").await?;
        template::clone_many(&self.shared, template, count, pattern, options).await
    }

    /// Jobs under way: id, type, VM, state, phase, error message, age in microseconds, object path.
    #[zbus(out_args("jobs"))]
    async fn list_jobs(&self) -> Result<Vec<JobRow>, Error> {
        let row = |job: crate::fleet::jobs::Job| {
            let age = u64::try_from(job.since.elapsed().as_micros()).unwrap_or(u64::MAX);
            let state = || self.shared.fleet.get(&job.name).map(|view| view.state.word()).unwrap_or_default();
            let phase = if job.phase.is_empty() { state() } else { job.phase };
            let text = |text: &str| text.to_owned();
            let (kind, name) = (text(job.kind), text(&job.name));
            Ok((
                job.id,
                kind,
                name,
                text("running"),
                text(phase),
                String::new(),
                age,
                path(job_path(job.id))?,
            ))
        };
        self.shared.fleet.jobs().into_iter().map(row).collect()
    }

    /// Cancels a job by its number. What it did is undone; a start ends the process, a shutdown leaves the VM as it was, though a guest that was
    /// asked may end all the same. JobRemoved tells how it ended: one that was nearly done may be "done". Fails with NotSupported for jobs that
    /// last as long as one command.
    async fn cancel_job(&self, id: u32, #[zbus(header)] header: Header<'_>) -> Result<(), Error> {
        self.shared.cancel(&header, id).await
    }

    /// A VM was defined.
    #[zbus(signal)]
    pub(super) async fn vm_new(
        emitter: &SignalEmitter<'_>,
        name: &str,
        path: OwnedObjectPath,
    ) -> zbus::Result<()>;

    /// A VM was undefined.
    #[zbus(signal)]
    pub(super) async fn vm_removed(
        emitter: &SignalEmitter<'_>,
        name: &str,
        path: OwnedObjectPath,
    ) -> zbus::Result<()>;

    /// A network was defined.
    #[zbus(signal)]
    pub(super) async fn network_new(
        emitter: &SignalEmitter<'_>,
        name: &str,
        path: OwnedObjectPath,
    ) -> zbus::Result<()>;

    /// A network was deleted.
    #[zbus(signal)]
    pub(super) async fn network_removed(
        emitter: &SignalEmitter<'_>,
        name: &str,
        path: OwnedObjectPath,
    ) -> zbus::Result<()>;

    /// A template was made.
    #[zbus(signal)]
    pub(super) async fn template_new(
        emitter: &SignalEmitter<'_>,
        name: &str,
        path: OwnedObjectPath,
    ) -> zbus::Result<()>;

    /// A template was deleted.
    #[zbus(signal)]
    pub(super) async fn template_removed(
        emitter: &SignalEmitter<'_>,
        name: &str,
        path: OwnedObjectPath,
    ) -> zbus::Result<()>;

    /// A VM changed state.
    #[zbus(signal)]
    pub(super) async fn vm_state_changed(
        emitter: &SignalEmitter<'_>,
        seq: u64,
        name: &str,
        path: OwnedObjectPath,
        old: &str,
        new: &str,
        reason: &str,
        details: Details,
    ) -> zbus::Result<()>;

    /// A job began.
    #[zbus(signal)]
    pub(super) async fn job_new(
        emitter: &SignalEmitter<'_>,
        id: u32,
        path: OwnedObjectPath,
        kind: &str,
        vm: &str,
    ) -> zbus::Result<()>;

    /// A job ended; result is "done", "failed" or "cancelled". The error fields are empty unless it failed.
    #[zbus(signal)]
    pub(super) async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        path: OwnedObjectPath,
        kind: &str,
        vm: &str,
        result: &str,
        error_name: &str,
        error_message: &str,
    ) -> zbus::Result<()>;

    /// The daemon's version.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    /// Nothing is started on this host: see Drain.
    #[zbus(property)]
    fn draining(&self) -> bool {
        self.shared.fleet.draining()
    }

    /// "starting", "running", "draining" or "degraded" (a record was set aside, or a VM is quarantined).
    #[zbus(property)]
    fn state(&self) -> &'static str {
        self.shared.fleet.state()
    }

    /// Number of VMs defined.
    #[zbus(property(emits_changed_signal = "false"), name = "NVms")]
    fn n_vms(&self) -> u32 {
        u32::try_from(self.shared.fleet.list().len()).unwrap_or(u32::MAX)
    }

    /// Number of VMs running or paused.
    #[zbus(property(emits_changed_signal = "false"), name = "NRunning")]
    fn n_running(&self) -> u32 {
        let up = |view: &&std::sync::Arc<crate::fleet::view::View>| {
            matches!(view.state, State::Running | State::Paused)
        };
        u32::try_from(self.shared.fleet.list().iter().filter(up).count()).unwrap_or(u32::MAX)
    }

    /// Number of the newest event.
    #[zbus(property(emits_changed_signal = "false"))]
    fn event_seq(&self) -> u64 {
        self.shared.fleet.sequence()
    }

    /// Records that could not be read and were set aside: file and reason.
    #[zbus(property)]
    fn corrupt_records(&self) -> Vec<(String, String)> {
        let row = |corrupt: crate::store::Corrupt| (corrupt.path.display().to_string(), corrupt.reason);
        self.shared.fleet.corrupt().into_iter().map(row).collect()
    }

    /// VMs' processes that were there when the daemon started, are there still, and belong to no definition: name, unit (empty without
    /// systemd) and process id. They are left alone.
    #[zbus(property(emits_changed_signal = "false"))]
    fn orphans(&self) -> Vec<(String, String, u32)> {
        self.shared.fleet.orphans().into_iter().map(|orphan| (orphan.name, orphan.unit, orphan.pid)).collect()
    }
}
