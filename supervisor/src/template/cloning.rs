//! CloneVm: owns the steps, and how they are taken back in order.
//!
//! ```text
//! clones/VM with `making` ─▶ disks, seed ─▶ defined ─▶ started from the template ─▶ `making` removed: from now on a VM like any other
//!           │ an error at any step, or a kill: undefined (its process, taps, record), then the directory removed
//! ```
//!
//! Before the definition is durable, `making` is; the disks only become so while the VM starts: a host that loses power meanwhile has no such VM
//! afterwards, and the VM waits for the storage once less.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dbus_api::spec::{Disk, Format, VmSpec};
use tracing::{info, warn};
use uuid::Uuid;

use super::creating::copy_variables;
use super::seed::{self, Identity};
use super::{Reader, Templates, blocking, making, overlay, pattern, record, sync, sync_all};
use crate::fleet::plug::{Ask, How};
use crate::fleet::seats::Hardware;
use crate::fleet::spec::{Room, check_name, room};
use crate::fleet::{Fleet, FleetError};

/// In the directory of a VM that is being made until it is whole; holds its uuid.
pub(super) const UNFINISHED: &str = "making";
/// The image that its guest learns from who it is.
const SEED: &str = "seed.img";
/// cloud-init wants the first line.
pub(super) const NO_USER_DATA: &str = "#cloud-config\n";

/// How long a disk may take to come; nobody waits for the guest.
const PLUGGED: Duration = Duration::from_secs(30);

/// How a VM is cloned.
#[derive(Debug, Clone, Default)]
pub struct CloneOptions {
    /// Its vCPUs stay stopped.
    pub paused: bool,
    /// Labels beside those of the template.
    pub labels: BTreeMap<String, String>,
    /// For its guest, as cloud-init takes it.
    pub user_data: Option<String>,
    /// For its guest, as cloud-init takes it; without it every card asks for its address.
    pub network_config: Option<String>,
}

/// A clone that is being made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cloning {
    /// The VM.
    pub name: String,
    /// The job.
    pub job: u32,
}

impl Templates {
    /// Makes one clone.
    pub fn clone_vm(
        self: &Arc<Self>,
        template: &str,
        name: &str,
        options: &CloneOptions,
    ) -> Result<Cloning, FleetError> {
        check_name(name)?;
        if self.taken(name) {
            return Err(FleetError::VmExists(format!("VM \"{name}\" is defined already: use another name")));
        }
        let mut made = self.begin(template, vec![name.to_owned()], options)?;
        made.pop().ok_or_else(|| FleetError::Busy(format!("VM \"{name}\" is being cloned")))
    }

    /// Makes `count` clones whose names follow a pattern. Each is a job of its own: one that fails leaves the others.
    pub fn clone_vms(
        self: &Arc<Self>,
        template: &str,
        count: u32,
        pattern: &str,
        options: &CloneOptions,
    ) -> Result<Vec<Cloning>, FleetError> {
        let names = pattern::names(pattern, count, |name| self.taken(name))?;
        self.begin(template, names, options)
    }

    pub(super) fn taken(&self, name: &str) -> bool {
        self.fleet.get(name).is_ok() || self.held().clones.contains(name)
    }

    fn begin(
        self: &Arc<Self>,
        template: &str,
        names: Vec<String>,
        options: &CloneOptions,
    ) -> Result<Vec<Cloning>, FleetError> {
        admit(&*self.get(template)?, options)?;
        if self.fleet.draining() {
            return Err(FleetError::Draining(
                "this host is being drained: nothing is started on it".to_owned(),
            ));
        }
        let mut begun = Vec::new();
        for (name, number) in names.into_iter().zip(1..) {
            let reader = self.read(template)?;
            if !self.held().clones.insert(name.clone()) {
                return Err(FleetError::Busy(format!("VM \"{name}\" is being cloned")));
            }
            let job = self.fleet.open_job("clone", &name);
            begun.push(Cloning { name: name.clone(), job });
            let home = self.fleet.store().clones().join(&name);
            let clone =
                OneClone { reader, name, number, uuid: Uuid::new_v4(), home, options: options.clone() };
            let templates = Arc::clone(self);
            tokio::spawn(async move {
                let steps = async {
                    templates.fleet.note_job(job, "waiting", (0, 0))?;
                    let _turn = templates.turns.acquire().await;
                    clone.run(job).await
                };
                let result = steps.await;
                if let Err(error) = &result {
                    info!(
                        FLOTILLA_VM = &*clone.name,
                        "not cloned from {template}: {error}",
                        template = clone.reader.record.name
                    );
                    clone.undo().await;
                }
                templates.held().clones.remove(&clone.name);
                drop(clone);
                templates.fleet.close_job(job, result);
            });
        }
        Ok(begun)
    }
}

/// What is wrong with a call is said before anything is made.
fn admit(record: &super::Record, options: &CloneOptions) -> Result<(), FleetError> {
    let seeds = record.spec.disks.iter().filter(|disk| is_seed(disk)).count();
    let slots = match room(record.spec.machine) {
        Room::Slots { disks, .. } => disks,
        Room::Ports(ports) => ports,
    };
    let cards = match room(record.spec.machine) {
        Room::Slots { .. } => 0,
        Room::Ports(_) => record.spec.nics.len(),
    };
    if record.spec.disks.len() + cards - seeds >= usize::from(slots) {
        return Err(FleetError::InvalidSpec(format!(
            "template \"{}\": all {slots} places for disks are in use, and a clone needs one to learn who it is",
            record.name
        )));
    }
    for (what, text) in [("user_data", &options.user_data), ("network_config", &options.network_config)] {
        if text.as_ref().is_some_and(|text| text.len() > seed::TEXT_MAX) {
            return Err(FleetError::InvalidSpec(format!("{what}: longer than {} bytes", seed::TEXT_MAX)));
        }
    }
    Ok(())
}

fn is_seed(disk: &Disk) -> bool {
    disk.readonly && disk.serial.as_deref() == Some(seed::SERIAL)
}

struct OneClone {
    reader: Reader,
    name: String,
    /// Within the call, from 1.
    number: u32,
    uuid: Uuid,
    /// Its directory.
    home: PathBuf,
    options: CloneOptions,
}

impl OneClone {
    fn fleet(&self) -> &Arc<Fleet> {
        &self.reader.templates.fleet
    }

    async fn run(&self, job: u32) -> Result<(), FleetError> {
        let failed =
            |error: io::Error| FleetError::StoreFailed(format!("VM \"{}\": its disks: {error}", self.name));
        self.fleet().note_job(job, "disks", (0, 0))?;
        let (spec, place, home) = (self.spec()?, self.reader.place(), self.home.clone());
        let (name, uuid, number, options) = (self.name.clone(), self.uuid, self.number, self.options.clone());
        let template = self.reader.record.name.clone();
        let made = blocking(move || {
            begin(&home, uuid)?;
            let macs = Fleet::macs(&spec, uuid);
            let identity = Identity {
                instance: uuid.to_string(),
                hostname: &name,
                uuid: uuid.to_string(),
                template: Some(&template),
                number: Some(number),
                keys: &[],
                macs: &macs,
            };
            let old = spec.disks.iter().zip(0..).find(|(disk, _)| is_seed(disk));
            let old = old.map(|(_, at)| fs::metadata(place.join(record::disk(at)))).transpose()?;
            let user_data = options.user_data.as_deref().unwrap_or(NO_USER_DATA);
            let network = options.network_config.as_deref();
            let image = seed::image(&identity, user_data, network, old.map(|data| data.len()));
            let image = image.map_err(io::Error::other)?;
            let spec = disks(spec, &place, &home, &image)?;
            mark(&home)?;
            Ok(spec)
        });
        let (spec, late) = made.await.map_err(failed)?;

        self.fleet().note_job(job, "defining", (0, 0))?;
        self.fleet().define_as(&self.name, self.uuid, spec).await?;
        self.fleet().note_job(job, "starting", (0, 0))?;
        let (home, place) = (self.home.clone(), self.reader.place());
        let stored = blocking(move || settle(&home));
        let started = self.fleet().start_from(&self.name, self.options.paused, &place);
        let (started, stored) = tokio::join!(started, stored);
        started?;
        stored.map_err(failed)?;
        if let Some(seed) = late {
            self.plug(seed).await?;
        }
        let home = self.home.clone();
        blocking(move || finish(&home)).await.map_err(failed)?;
        info!(FLOTILLA_VM = &*self.name, "cloned from {}", self.reader.record.name);
        Ok(())
    }

    /// Brings the seed to a VM that runs.
    async fn plug(&self, seed: Disk) -> Result<(), FleetError> {
        let how = How { persist: true, patience: PLUGGED };
        let (_, job) = self.fleet().plug(&self.name, Ask::Attach(Hardware::Disk(seed)), how).await?;
        self.fleet().end_of(&self.name, job).await
    }

    /// The definition, with the disks as they are in the template.
    fn spec(&self) -> Result<VmSpec, FleetError> {
        let mut spec = self.reader.record.spec.clone();
        spec.labels.extend(self.options.labels.clone());
        crate::fleet::spec::check(&spec)?;
        Ok(spec)
    }

    async fn undo(&self) {
        take_back(self.fleet(), &self.name, self.uuid, &self.home).await;
    }
}

/// Whatever was made of a VM that did not become whole goes, last step first.
pub(super) async fn take_back(fleet: &Fleet, name: &str, uuid: Uuid, home: &Path) {
    match fleet.get(name) {
        // Somebody else may have defined a VM of that name before we did.
        Ok(view) if view.uuid == uuid => {
            if let Err(error) = fleet.undefine(name, true).await {
                // The next start of the daemon tries again: `making` is still there.
                return warn!(FLOTILLA_VM = name, "a VM that was not made is left: {error}");
            }
        }
        _ => {}
    }
    let home = home.to_owned();
    let removed =
        blocking(move || if unfinished(&home) == Some(uuid) { making::remove(&home) } else { Ok(()) });
    if let Err(error) = removed.await {
        warn!(FLOTILLA_VM = name, "its directory is left: {error}");
    }
}

/// Which VM a directory is being made for, if it is.
pub(super) fn unfinished(home: &Path) -> Option<Uuid> {
    fs::read_to_string(home.join(UNFINISHED)).ok()?.trim().parse().ok()
}

/// Makes the directory of a VM, as one that is not whole. Nothing in it is durable yet.
pub(super) fn begin(home: &Path, uuid: Uuid) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(home)?;
    writeln!(record::create(&home.join(UNFINISHED))?, "{uuid}")
}

/// Makes durable that it is not whole; from then on its VM may be defined.
fn mark(home: &Path) -> io::Result<()> {
    let parent = home.parent().map(Path::to_owned);
    let paths: Vec<PathBuf> = [home.join(UNFINISHED), home.to_owned()].into_iter().chain(parent).collect();
    sync_all(&paths)
}

/// Makes durable what is in it.
pub(super) fn settle(home: &Path) -> io::Result<()> {
    let mut paths = vec![home.to_owned()];
    for entry in fs::read_dir(home)? {
        paths.push(entry?.path());
    }
    paths.extend(home.parent().map(Path::to_owned));
    sync_all(&paths)
}

/// The VM is whole.
pub(super) fn finish(home: &Path) -> io::Result<()> {
    fs::remove_file(home.join(UNFINISHED))?;
    sync(home)
}

/// The disk that a guest learns from who it is, not made yet.
pub(super) fn seed_disk(home: &Path) -> Disk {
    let serial = Some(seed::SERIAL.to_owned());
    Disk { readonly: true, serial, format: Format::Raw, ..Disk::new(home.join(SEED)) }
}

/// Makes it; not durable yet.
pub(super) fn write_seed(disk: &Disk, image: &[u8]) -> io::Result<()> {
    record::create(&disk.path)?.write_all(image)
}

/// Makes the disks, and the firmware's variables, not durable yet; gives the definition that has them, and a seed that is to come when the VM runs.
fn disks(mut spec: VmSpec, place: &Path, home: &Path, image: &[u8]) -> io::Result<(VmSpec, Option<Disk>)> {
    let seed = seed_disk(home);
    write_seed(&seed, image)?;
    let mut had_one = false;
    for (at, disk) in spec.disks.iter_mut().enumerate() {
        if is_seed(disk) {
            had_one = true;
            *disk = Disk { number: disk.number, ..seed.clone() };
        } else {
            *disk = overlay::make(disk, at, place, home)?;
        }
    }
    if let Some(firmware) = &mut spec.firmware {
        firmware.vars = home.join(record::VARIABLES);
        copy_variables(&place.join(record::VARIABLES), &firmware.vars)?;
    }
    Ok(match room(spec.machine) {
        _ if had_one => (spec, None),
        Room::Slots { .. } => {
            spec.disks.push(seed);
            (spec, None)
        }
        // The snapshot has nothing behind that root port.
        Room::Ports(_) => (spec, Some(seed)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use dbus_api::spec::Machine;

    #[test]
    fn a_clone_has_one_seed_whatever_its_template_has() {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join("t");
        fs::create_dir(&place).unwrap();
        for name in ["disk0", "disk1"] {
            fs::write(place.join(name), [0; 512]).unwrap();
        }
        let spec = crate::fleet::spec::parse(r#"{"kernel":"/k","disks":[{"path":"/d"}]}"#).unwrap();
        let one = home.path().join("one");
        begin(&one, Uuid::from_u128(7)).unwrap();
        assert_eq!(unfinished(&one), Some(Uuid::from_u128(7)));
        assert!(mark(&one).is_ok() && settle(&one).is_ok() && settle(&home.path().join("none")).is_err());
        let (first, late) = disks(spec.clone(), &place, &one, b"seed").unwrap();
        assert_eq!(late, None);
        assert_eq!((first.disks.len(), is_seed(&first.disks[1])), (2, true));
        let two = home.path().join("two");
        begin(&two, Uuid::from_u128(8)).unwrap();
        let (second, _) =
            disks(VmSpec { disks: first.disks.clone(), ..first.clone() }, &place, &two, b"seed").unwrap();
        assert_eq!((second.disks.len(), second.disks[1].path.clone()), (2, two.join(SEED)));
        assert!(begin(&one, Uuid::from_u128(9)).is_err(), "the first one keeps its directory");
        // A q35's comes when it runs, and its firmware's variables are its own.
        let three = home.path().join("three");
        begin(&three, Uuid::from_u128(9)).unwrap();
        fs::write(place.join("vars.fd"), "variables").unwrap();
        let firmware = Some(dbus_api::spec::Firmware { code: "/code".into(), vars: "/vars".into() });
        let spec = VmSpec { machine: Machine::Q35, firmware, ..spec };
        let (third, late) = disks(spec, &place, &three, b"seed").unwrap();
        assert_eq!((third.disks.len(), late.map(|seed| seed.path)), (1, Some(three.join(SEED))));
        let vars = third.firmware.unwrap().vars;
        assert_eq!((vars.starts_with(&three), fs::read(&vars).unwrap()), (true, b"variables".to_vec()));
        assert_eq!(unfinished(&place), None);
    }

    #[test]
    fn a_template_without_a_free_slot_has_no_clones() {
        let disks: Vec<String> = (0..6).map(|at| format!(r#"{{"path":"/d{at}"}}"#)).collect();
        let text = format!(r#"{{"kernel":"/k","disks":[{}]}}"#, disks.join(","));
        let mut spec = crate::fleet::spec::parse(&text).unwrap();
        let record = |spec: &VmSpec| super::super::Record::new("t", "v", 1, "0", spec.clone());
        assert!(admit(&record(&spec), &CloneOptions::default()).is_err());
        (spec.disks[5].readonly, spec.disks[5].serial) = (true, Some(seed::SERIAL.into()));
        assert_eq!(admit(&record(&spec), &CloneOptions::default()), Ok(()));
        let long =
            CloneOptions { user_data: Some("x".repeat(seed::TEXT_MAX + 1)), ..CloneOptions::default() };
        assert!(admit(&record(&spec), &long).is_err());
    }
}
