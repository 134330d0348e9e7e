//! `org.flotilla.Flotilla1.Vm`: the same verbs on the VM's own object, and its properties, all from the cached view.

use std::sync::Arc;

use dbus_api::error::Error;
use dbus_api::{ACTION_CONSOLE, ACTION_MANAGE, ACTION_QMP, ACTION_QMP_QUERY};
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{OwnedFd, OwnedObjectPath, fdo, interface};

use super::{Options, Shared, Taken, invalid, named, no_options, shutdown_verb, start_verb};
use crate::fleet::life::{Exit, Verb};
use crate::fleet::seats::Kind;
use crate::fleet::view::View;
use crate::qmp::{Client, Mode};

pub(super) struct Vm {
    shared: Shared,
    name: Arc<str>,
}

impl Vm {
    pub(super) fn new(shared: Shared, name: Arc<str>) -> Self {
        Self { shared, name }
    }

    fn view(&self) -> fdo::Result<Arc<View>> {
        self.shared.fleet.get(&self.name).map_err(|error| fdo::Error::UnknownObject(error.to_string()))
    }

    /// Who is to send QMP commands, and which: option "mode" s, "full" (the default) or "query".
    async fn qmp_client(&self, header: &Header<'_>, options: Options) -> Result<Client, Error> {
        let mut options = Taken(options);
        let mode = options.get::<String>("mode", "s")?;
        options.finish()?;
        let (mode, action) = match mode.as_deref() {
            None | Some("full") => (Mode::Full, ACTION_QMP),
            Some("query") => (Mode::Query, ACTION_QMP_QUERY),
            Some(other) => return Err(invalid(format!("mode {other:?}: use \"full\" or \"query\""))),
        };
        self.shared.access.check(header, action, &self.name).await?;
        let (uid, pid) = self.shared.access.caller(header).await?;
        Ok(Client { uid, pid, mode })
    }

    async fn ask(&self, header: &Header<'_>, verb: Verb) -> Result<OwnedObjectPath, Error> {
        self.shared.access.check(header, ACTION_MANAGE, &self.name).await?;
        self.shared.ask(&self.name, verb).await
    }
}

/// One VM.
#[interface(name = "org.flotilla.Flotilla1.Vm")]
impl Vm {
    /// As StartVm of the Manager.
    #[zbus(out_args("job"))]
    async fn start(
        &self,
        mode: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.ask(&header, start_verb(mode, options)?).await
    }

    /// As ShutdownVm of the Manager.
    #[zbus(out_args("job"))]
    async fn shutdown(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.ask(&header, shutdown_verb(options)?).await
    }

    /// As PowerOffVm of the Manager.
    #[zbus(out_args("job"))]
    async fn power_off(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        no_options(options)?;
        self.ask(&header, Verb::PowerOff).await
    }

    /// As PauseVm of the Manager.
    #[zbus(out_args("job"))]
    async fn pause(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        no_options(options)?;
        self.ask(&header, Verb::Pause).await
    }

    /// As ResumeVm of the Manager.
    #[zbus(out_args("job"))]
    async fn resume(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        no_options(options)?;
        self.ask(&header, Verb::Resume).await
    }

    /// As UndefineVm of the Manager.
    async fn undefine(&self, options: Options, #[zbus(header)] header: Header<'_>) -> Result<(), Error> {
        self.shared.access.check(&header, ACTION_MANAGE, &self.name).await?;
        let mut options = Taken(options);
        let force = options.flag("force", false)?;
        options.finish()?;
        // The publisher takes this object away; it must not be waited for from inside.
        self.shared.fleet.undefine(&self.name, force).await.map_err(named)
    }

    /// As AttachNic of the Manager.
    #[zbus(out_args("id", "job"))]
    async fn attach_nic(
        &self,
        nic: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(String, OwnedObjectPath), Error> {
        self.shared.attach_nic(&header, &self.name, nic, options).await
    }

    /// As DetachNic of the Manager.
    #[zbus(out_args("job"))]
    async fn detach_nic(
        &self,
        id: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.shared.detach(&header, &self.name, Kind::Nic, id, options).await
    }

    /// As AttachDisk of the Manager.
    #[zbus(out_args("id", "job"))]
    async fn attach_disk(
        &self,
        disk: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(String, OwnedObjectPath), Error> {
        self.shared.attach_disk(&header, &self.name, disk, options).await
    }

    /// As DetachDisk of the Manager.
    #[zbus(out_args("job"))]
    async fn detach_disk(
        &self,
        id: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.shared.detach(&header, &self.name, Kind::Disk, id, options).await
    }

    /// Sends one QMP command (JSON, or just its name as a JSON string) and returns its answer (JSON:
    /// `{"return":…}`, with the command's id if it has one), as a client of the socket gets it. Options: "mode" s: "full" (default), or
    /// "query" for commands that change nothing, which needs less of a right.
    #[zbus(out_args("answer"))]
    async fn qmp_command(
        &self,
        command: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<String, Error> {
        let client = self.qmp_client(&header, options).await?;
        self.shared.fleet.qmp_command(client, &self.name, command).await.map_err(named)
    }

    /// A connected stream that speaks QMP from its greeting on, shared with other clients by the proxy. Options: "mode" s: "full" (default),
    /// or "query" for a stream that takes only commands that change nothing; events come on both.
    #[zbus(out_args("stream"))]
    async fn open_qmp(&self, options: Options, #[zbus(header)] header: Header<'_>) -> Result<OwnedFd, Error> {
        let client = self.qmp_client(&header, options).await?;
        Ok(self.shared.fleet.open_qmp(client, &self.name).await.map_err(named)?.into())
    }

    /// A connected stream of a console ("" is the serial port), and what kind of descriptor it is ("socket").
    #[zbus(out_args("stream", "kind"))]
    async fn open_console(
        &self,
        which: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedFd, String), Error> {
        no_options(options)?;
        self.shared.access.check(&header, ACTION_CONSOLE, &self.name).await?;
        let stream = self.shared.fleet.open_console(&self.name, which).await.map_err(named)?;
        Ok((stream.into(), "socket".to_owned()))
    }

    /// A stream with what the VM's process has logged, and what kind of descriptor it is ("socket"). Options: "lines" t: the newest so many
    /// (default 1000, at most 100000); "follow" b: go on with those that come. It ends with the log, or when the caller closes it.
    #[zbus(out_args("stream", "kind"))]
    async fn open_log(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedFd, String), Error> {
        self.shared.access.check(&header, ACTION_CONSOLE, &self.name).await?;
        let mut options = Taken(options);
        let (lines, follow) = (options.get::<u64>("lines", "t")?, options.flag("follow", false)?);
        options.finish()?;
        let stream = self.shared.fleet.open_log(&self.name, lines, follow).await.map_err(named)?;
        Ok((stream.into(), "socket".to_owned()))
    }

    /// The state changed.
    #[zbus(signal, name = "StateChanged")]
    pub(super) async fn changed_state(
        emitter: &SignalEmitter<'_>,
        seq: u64,
        old: &str,
        new: &str,
        reason: &str,
    ) -> zbus::Result<()>;

    /// A QMP event of this VM: number, microseconds since the epoch, name, data as JSON.
    #[zbus(signal)]
    pub(super) async fn event(
        emitter: &SignalEmitter<'_>,
        seq: u64,
        usec: u64,
        qmp_event: &str,
        data: &str,
    ) -> zbus::Result<()>;

    /// Name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> &str {
        &self.name
    }

    /// Identity.
    #[zbus(property(emits_changed_signal = "const"))]
    fn uuid(&self) -> fdo::Result<String> {
        Ok(self.view()?.uuid.to_string())
    }

    /// "defined", "starting", "running", "paused", "stopping", "stopped", "quarantined" or "failed".
    #[zbus(property)]
    fn state(&self) -> fdo::Result<&'static str> {
        Ok(self.view()?.state.word())
    }

    /// Why it is in that state, in words.
    #[zbus(property)]
    fn state_reason(&self) -> fdo::Result<String> {
        Ok(self.view()?.reason.clone())
    }

    /// When it came into that state, microseconds since the epoch.
    #[zbus(property)]
    fn state_change_timestamp(&self) -> fdo::Result<u64> {
        Ok(self.view()?.since)
    }

    /// What the administrator wants: "running", "paused" or "stopped".
    #[zbus(property)]
    fn intent(&self) -> fdo::Result<&'static str> {
        Ok(self.view()?.intent.word())
    }

    /// Number of the definition.
    #[zbus(property)]
    fn generation(&self) -> fdo::Result<u64> {
        Ok(self.view()?.generation)
    }

    /// Number of the definition that the running process was started from; 0 when none runs.
    #[zbus(property)]
    fn applied_generation(&self) -> fdo::Result<u64> {
        Ok(self.view()?.applied_generation)
    }

    /// The VMM's process; 0 when none.
    #[zbus(property, name = "MainPID")]
    fn main_pid(&self) -> fdo::Result<u32> {
        Ok(self.view()?.main_pid)
    }

    /// systemd unit; empty under the process launcher.
    #[zbus(property)]
    fn unit(&self) -> fdo::Result<String> {
        Ok(self.view()?.unit.clone())
    }

    /// File that takes the VMM's own messages under the process launcher; empty where they go to the journal of the unit.
    #[zbus(property(emits_changed_signal = "const"))]
    fn log_file(&self) -> fdo::Result<String> {
        Ok(self.view()?.log_file.clone())
    }

    /// How the last process ended: ("exited", code), ("signal", name), or two empty strings.
    #[zbus(property)]
    fn exit_status(&self) -> fdo::Result<(String, String)> {
        Ok(match &self.view()?.exit {
            Some(Exit::Code(code)) => ("exited".to_owned(), code.to_string()),
            Some(Exit::Signal(name)) => ("signal".to_owned(), name.clone()),
            Some(Exit::Unknown) | None => (String::new(), String::new()),
        })
    }

    /// The last lines that the process logged before it failed; empty when none failed since the daemon started.
    #[zbus(property)]
    fn last_log(&self) -> fdo::Result<Vec<String>> {
        Ok(self.view()?.last_log.to_vec())
    }

    /// Restarts by the VM's policy in a row; 0 when it was started by somebody, or has run well for ten minutes.
    #[zbus(property, name = "NRestarts")]
    fn n_restarts(&self) -> fdo::Result<u32> {
        Ok(self.view()?.restarts)
    }

    /// The definition, JSON.
    #[zbus(property(emits_changed_signal = "invalidates"))]
    fn spec(&self) -> fdo::Result<String> {
        serde_json::to_string(&*self.view()?.spec).map_err(|error| fdo::Error::Failed(error.to_string()))
    }

    /// The command line of the VMM, as `ps` shows it; empty when none runs.
    #[zbus(property)]
    fn command_line(&self) -> fdo::Result<Vec<String>> {
        Ok(self.view()?.command_line.to_vec())
    }

    /// Devices of the definition that were removed over QMP since the start, by id.
    #[zbus(property)]
    fn removed_devices(&self) -> fdo::Result<Vec<String>> {
        Ok(self.view()?.devices.removed.iter().cloned().collect())
    }

    /// Devices that were added over QMP since the start, by id.
    #[zbus(property)]
    fn added_devices(&self) -> fdo::Result<Vec<String>> {
        Ok(self.view()?.devices.added.iter().cloned().collect())
    }

    /// Network cards: id, tap, hardware address, network or bridge. Of a VM that runs, those that it has.
    #[zbus(property)]
    fn network_interfaces(&self) -> fdo::Result<Vec<(String, String, String, String)>> {
        Ok(self.view()?.nics.to_vec())
    }

    /// Addresses that networks with DHCP give to its cards: card, address. They are its own from its definition on, whether or not its guest
    /// has asked yet.
    #[zbus(property(emits_changed_signal = "false"))]
    fn addresses(&self) -> fdo::Result<Vec<(String, String)>> {
        Ok(self.shared.fleet.addresses(&*self.view()?))
    }

    /// Disks: id, path, format ("raw" or "qcow2"), read-only. Of a VM that runs, those that it has.
    #[zbus(property)]
    fn disks(&self) -> fdo::Result<Vec<(String, String, String, bool)>> {
        Ok(self.view()?.disks.to_vec())
    }

    /// Path of the proxy's QMP socket.
    #[zbus(property(emits_changed_signal = "const"))]
    fn qmp_socket(&self) -> fdo::Result<String> {
        Ok(self.view()?.qmp_socket.display().to_string())
    }

    /// The VMM answers QMP.
    #[zbus(property)]
    fn qmp_responsive(&self) -> fdo::Result<bool> {
        Ok(self.view()?.responsive)
    }
}
