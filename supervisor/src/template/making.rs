//! CreateTemplate: owns the steps, and how each is taken back.
//!
//! ```text
//! .making-NAME ─▶ pause ─▶ memory ─▶ disks ─▶ was it paused all the time? ─▶ resume or stop ─▶ checksums ─▶ template.json ─▶ NAME
//!       │ an error at any step, or a kill: the VM is resumed if it ran, the directory is removed
//! ```
//!
//! The VM is not locked meanwhile: an administrator may resume it or power it off. What was copied then does not fit together, so it is thrown away.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dbus_api::spec::{Machine, VmSpec};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use uuid::Uuid;

use super::creating::copy_variables;
use super::record::{self, Part, Record};
use super::{MAKING, Templates, blocking, check, copy, sync};
use crate::fleet::life::{State, Verb};
use crate::fleet::prepare::SNAPSHOT;
use crate::fleet::seats::Kind;
use crate::fleet::spec::check_name;
use crate::fleet::view::{News, View, now};
use crate::fleet::{FleetError, command};

/// What becomes of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum After {
    /// It runs on if it ran.
    #[default]
    Resume,
    /// It stays paused.
    Pause,
    /// It is powered off: with its memory kept, nothing is lost that the template does not have.
    Stop,
}

/// How a template is made.
#[derive(Debug, Clone, Default)]
pub struct MakeOptions {
    /// What becomes of the VM.
    pub after: After,
    /// For people.
    pub description: String,
}

/// File in the directory of a template that is being made, as long as its VM is paused for it.
pub(super) const SUBJECT: &str = "vm";

/// What that file says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Subject {
    pub(super) name: String,
    pub(super) uuid: Uuid,
    /// It ran, and is to run again.
    pub(super) resume: bool,
}

impl Templates {
    /// Makes a template of a VM that runs or is paused. Returns the job.
    pub fn create(self: &Arc<Self>, vm: &str, name: &str, options: MakeOptions) -> Result<u32, FleetError> {
        check_name(name)?;
        if options.description.len() > 1024 {
            return Err(FleetError::InvalidSpec("description: longer than 1024 bytes".to_owned()));
        }
        let view = self.fleet.get(vm)?;
        admit(&view)?;
        {
            let mut held = self.held();
            if self.get(name).is_ok() {
                return Err(FleetError::TemplateExists(format!(
                    "template \"{name}\" exists already: remove it, or use another name"
                )));
            }
            if held.making.contains(name) {
                return Err(FleetError::Busy(format!("template \"{name}\" is being made")));
            }
            if !held.subjects.insert(vm.to_owned()) {
                return Err(FleetError::Busy(format!("VM \"{vm}\": a template is being made of it")));
            }
            held.making.insert(name.to_owned());
        }
        let job = self.fleet.open_job("create-template", vm);
        let making = Making {
            templates: Arc::clone(self),
            job,
            name: name.to_owned(),
            view,
            options,
            place: self.fleet.store().templates().join(format!("{MAKING}{name}")),
        };
        tokio::spawn(async move {
            let result = making.run().await;
            let place = making.place.clone();
            if result.is_err()
                && let Err(error) = blocking(move || remove(&place)).await
            {
                warn!("template {}: {error}", making.name);
            }
            {
                let mut held = making.templates.held();
                held.making.remove(&making.name);
                held.subjects.remove(&*making.view.name);
            }
            making.templates.fleet.close_job(making.job, result);
        });
        Ok(job)
    }
}

/// May a template be made of this VM now?
fn admit(view: &View) -> Result<(), FleetError> {
    let vm = &view.name;
    let invalid = |text: String| Err(FleetError::InvalidState(format!("VM \"{vm}\": {text}")));
    if !matches!(view.state, State::Running | State::Paused) {
        return invalid(format!(
            "it is {}: a template is made of one that runs or is paused",
            view.state.word()
        ));
    }
    if view.applied_generation != view.generation {
        return invalid("its definition has changed since it was started: restart it first".to_owned());
    }
    if !view.devices.is_plain() {
        return invalid("devices were added or removed over QMP: undo that, or restart it first".to_owned());
    }
    // Which root port a device is behind, a start decides by the definition: those of clones are the same only if this VM's start had it, too.
    if view.spec.machine == Machine::Q35 && plugged(&view.command_line) != defined(&view.spec) {
        return invalid("disks or cards have come or gone since it was started: restart it first".to_owned());
    }
    Ok(())
}

/// The ids of the disks and cards on a command line, in the order of their places.
fn plugged(line: &[String]) -> Vec<String> {
    let devices = line.windows(2).filter(|words| words[0] == "-device").map(|words| &words[1]);
    let behind = devices.filter(|text| text.starts_with("virtio-blk-") || text.starts_with("virtio-net-"));
    behind
        .filter_map(|text| text.split(',').find_map(|part| part.strip_prefix("id=")))
        .map(str::to_owned)
        .collect()
}

/// The same of a definition.
fn defined(spec: &VmSpec) -> Vec<String> {
    let disks = spec.disk_numbers().into_iter().map(|number| Kind::Disk.id(number));
    disks.chain(spec.nic_numbers().into_iter().map(|number| Kind::Nic.id(number))).collect()
}

/// Removes a directory; fine when there is none.
pub(super) fn remove(place: &Path) -> io::Result<()> {
    match fs::remove_dir_all(place) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

struct Making {
    templates: Arc<Templates>,
    job: u32,
    name: String,
    view: Arc<View>,
    options: MakeOptions,
    /// Its directory until it is whole.
    place: PathBuf,
}

impl Making {
    fn failed(&self, what: &str) -> impl FnOnce(io::Error) -> FleetError + use<> {
        let text = format!("template \"{}\": {what}", self.name);
        move |error| FleetError::StoreFailed(format!("{text}: {error}"))
    }

    fn note(&self, phase: &'static str, progress: (u64, u64)) -> Result<(), FleetError> {
        self.templates.fleet.note_job(self.job, phase, progress)
    }

    async fn run(&self) -> Result<(), FleetError> {
        let (fleet, vm) = (&self.templates.fleet, &*self.view.name);
        let ran = fleet.get(vm)?.state == State::Running;
        let resume = ran && self.options.after == After::Resume;
        let subject = Subject { name: vm.to_owned(), uuid: self.view.uuid, resume: ran };
        let place = self.place.clone();
        blocking(move || begin(&place, &subject)).await.map_err(self.failed("its directory"))?;

        self.note("pausing", (0, 0))?;
        if ran {
            fleet.carry_out(vm, Verb::Pause).await?;
        }
        let frozen = self.freeze().await;
        let settled = match &frozen {
            Ok(()) if self.options.after == After::Stop => fleet.carry_out(vm, Verb::PowerOff).await,
            Ok(()) if !resume => Ok(()),
            _ if ran => fleet.carry_out(vm, Verb::Resume).await,
            _ => Ok(()),
        };
        if let Err(error) = settled {
            // Somebody may have been there before: what is copied is copied.
            warn!(FLOTILLA_VM = vm, "after its template was made: {error}");
        }
        frozen?;
        // From here on a killed daemon has nothing to put right with the VM.
        let subject = self.place.join(SUBJECT);
        blocking(move || fs::remove_file(subject)).await.map_err(self.failed("its directory"))?;
        self.finish().await
    }

    /// Copies what the VM is while it is paused.
    async fn freeze(&self) -> Result<(), FleetError> {
        let (fleet, vm) = (&self.templates.fleet, &*self.view.name);
        let before = fleet.get(vm)?;
        if before.state != State::Paused {
            return Err(FleetError::InvalidState(format!("VM \"{vm}\": it is {}", before.state.word())));
        }
        self.note("saving memory", (0, 0))?;
        let paths = SNAPSHOT.map(|name| self.place.join(name));
        let made = blocking(move || Ok((record::create(&paths[0])?, record::create(&paths[1])?)));
        let (state, memory) = made.await.map_err(self.failed("its files"))?;
        fleet.save(vm, state.into(), memory.into()).await?;

        for (at, disk) in before.spec.disks.iter().enumerate() {
            let (from, to) = (disk.path.clone(), self.place.join(record::disk(at)));
            let (templates, job) = (Arc::clone(&self.templates), self.job);
            let copied = blocking(move || {
                let from = File::open(from)?;
                let length = copy::length(&from)?;
                copy::copy(&from, &record::create(&to)?, |done| {
                    templates.fleet.note_job(job, "copying disks", (done, length)).map_err(io::Error::other)
                })
            });
            copied.await.map_err(self.failed(&format!("disks[{at}]: {}", disk.path.display())))?;
        }
        if let Some(firmware) = &before.spec.firmware {
            let (from, to) = (firmware.vars.clone(), self.place.join(record::VARIABLES));
            let copied = blocking(move || {
                copy_variables(&from, &to)?;
                sync(&to)
            });
            copied.await.map_err(self.failed("the firmware's variables"))?;
        }
        let after = fleet.get(vm)?;
        let same = |view: &View| (view.state, view.since, view.main_pid);
        if same(&before) != same(&after) {
            return Err(FleetError::InvalidState(format!(
                "VM \"{vm}\": it did not stay paused while it was copied; try again"
            )));
        }
        Ok(())
    }

    /// Checksums, the record, the name.
    async fn finish(&self) -> Result<(), FleetError> {
        let spec = without_identity(&self.view.spec);
        let names = record::files(&spec);
        let mut record = Record::new(&self.name, &self.view.name, now(), env!("CARGO_PKG_VERSION"), spec);
        record.description.clone_from(&self.options.description);
        let (place, templates, job) = (self.place.clone(), Arc::clone(&self.templates), self.job);
        let target = self.templates.place(&self.name);
        let finished = blocking(move || {
            for name in names {
                let file = File::open(place.join(&name))?;
                let size = copy::length(&file)?;
                let checksum = check::checksum(&file, |done| {
                    templates.fleet.note_job(job, "checksums", (done, size)).map_err(io::Error::other)
                })?;
                record.parts.push(Part { name, size, checksum });
            }
            record.write(&place)?;
            fs::rename(&place, &target)?;
            sync(templates.fleet.store().templates())?;
            Ok(record)
        });
        let record = finished.await.map_err(self.failed("it cannot be written"))?;
        info!("template {}: made of {}, {} bytes", self.name, self.view.name, record.size());
        let mut table = self.templates.table.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        table.insert(self.name.clone(), Arc::new(record));
        self.templates.fleet.tell(News::TemplateNew(self.name.clone()));
        Ok(())
    }
}

fn begin(place: &Path, subject: &Subject) -> io::Result<()> {
    // Of a template of this name that came to nothing.
    remove(place)?;
    fs::DirBuilder::new().mode(0o700).create(place)?;
    let mut file = record::create(&place.join(SUBJECT))?;
    serde_json::to_writer(&mut file, subject)?;
    file.sync_all()?;
    sync(place)?;
    place.parent().map_or(Ok(()), sync)
}

/// A definition as any number of VMs may have it.
fn without_identity(spec: &VmSpec) -> VmSpec {
    let mut spec = spec.clone();
    spec.uuid = None;
    // A clone has one more disk, which must not pass for its root.
    spec.append = Some(command::append(&spec));
    // Whoever wants a whole fleet to start with the host says so.
    spec.autostart = false;
    for nic in &mut spec.nics {
        nic.mac = None;
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tells_vms_apart_is_not_in_a_template() {
        let text = r#"{"uuid":"00000000-0000-0000-0000-000000000001","kernel":"/k","autostart":true,"cpus":2,
            "disks":[{"path":"/d","readonly":true}],"nics":[{"bridge":"b","mac":"52:54:00:00:00:01"}]}"#;
        let spec = without_identity(&crate::fleet::spec::parse(text).unwrap());
        assert_eq!((spec.uuid, spec.autostart, spec.cpus, &spec.nics[0].mac), (None, false, 2, &None));
        assert_eq!(spec.append.as_deref(), Some("console=ttyS0 reboot=k panic=1 root=/dev/vda ro"));
    }

    #[test]
    fn a_q35s_devices_are_where_its_definition_has_them() {
        let text = r#"{"kernel":"/k","machine":"q35","rng":true,"disks":[{"path":"/d","number":3},{"path":"/e"}],"nics":[{"bridge":"b"}]}"#;
        let spec = crate::fleet::spec::parse(text).unwrap();
        let place = command::Place {
            vmm: Path::new("/vmm"),
            name: "web",
            uuid: Uuid::nil(),
            sockets: Path::new("/run"),
            taps: &["t".to_owned()],
            incoming: None,
            paused: false,
        };
        assert_eq!(defined(&spec), ["disk3", "disk0", "nic0"]);
        assert_eq!(plugged(&command::build(&spec, &place)), defined(&spec));
        assert!(plugged(&[]).is_empty() && plugged(&["-device".to_owned()]).is_empty());
    }

    #[test]
    fn a_directory_says_whose_template_it_is() {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join(".making-web");
        for _ in 0..2 {
            begin(&place, &Subject { name: "db".into(), uuid: Uuid::nil(), resume: true }).unwrap();
            let subject: Subject = serde_json::from_slice(&fs::read(place.join(SUBJECT)).unwrap()).unwrap();
            assert!(subject.resume && subject.name == "db");
        }
        remove(&place).unwrap();
        remove(&place).unwrap();
    }
}
