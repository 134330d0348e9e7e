//! Templates, the VMs that are cloned from them, and those that are made from an image: owns the directory of each template, the disks of
//! each such VM, and the steps that make and remove both. The D-Bus room calls [`Templates`]; it drives VMs through [`Fleet`] as any client does, so that a VM has one meaning of *paused*,
//! *start* and *undefine*.
//!
//! ```text
//! mod.rs       Templates: names, what is under way, lists        making.rs    CreateTemplate, step by step
//! record.rs    what is written of a template                     cloning.rs   CloneVm, step by step, and back
//! recovery.rs  what a killed daemon left: derived by a look      check.rs     checksums
//! copy.rs      images: reflinks, sparse copies                   overlay.rs   a clone's disks
//! creating.rs  CreateVm, step by step                            image.rs     its first disk, from an image
//! firmware.rs  where this host has firmware for it
//! pure: qcow2.rs  an empty overlay · seed.rs  what a guest learns · pattern.rs  names of many
//! ```
//!
//! ```text
//! STATE_DIR/templates/.making-NAME/   one that is being made: `vm` says which VM is to be resumed      ── renamed ──▶
//! STATE_DIR/templates/NAME/           template.json, state, memory, disk0, disk1 …: nobody writes to it any more
//! STATE_DIR/templates/.dead-NAME/     one that is being removed
//! STATE_DIR/clones/VM/                the VM's disks, firmware variables and seed; with `making` until it is whole
//! ```
//!
//! There is no journal beside these names: whatever a killed daemon was at, a look at them tells, and the next start removes what is not whole.

mod check;
mod cloning;
mod copy;
mod creating;
mod firmware;
mod image;
mod making;
mod overlay;
mod pattern;
mod qcow2;
mod record;
mod recovery;
mod seed;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use dbus_api::spec::Firmware;
use tokio::sync::Semaphore;
use tracing::{info, warn};

pub use cloning::{CloneOptions, Cloning};
pub use creating::CreateOptions;
pub use making::{After, MakeOptions};
pub use record::{Part, Record};

use crate::fleet::view::News;
use crate::fleet::{Fleet, FleetError};

/// Clones that are made at once: about as many as PID 1 has use for.
const AT_ONCE: usize = 8;
/// What the directory of a template that is being made begins with. No VM's name begins with a dot, and no template's.
const MAKING: &str = ".making-";
/// The same of one that is being removed.
const DEAD: &str = ".dead-";

/// See the module. One per daemon.
pub struct Templates {
    fleet: Arc<Fleet>,
    table: RwLock<BTreeMap<String, Arc<Record>>>,
    held: Mutex<Held>,
    turns: Semaphore,
    /// What the administrator names for VMs that are made from images.
    firmware: Option<Firmware>,
}

/// What is under way.
#[derive(Default)]
struct Held {
    /// Templates that are being made.
    making: BTreeSet<String>,
    /// VMs that one is being made of.
    subjects: BTreeSet<String>,
    /// VMs that are being cloned or created.
    clones: BTreeSet<String>,
    /// How many steps under way read a template.
    readers: BTreeMap<String, usize>,
}

impl Templates {
    /// Those that are stored. What a killed daemon left is removed by [`Templates::recover`].
    /// `firmware` is that of VMs that are made from images; without it, what the distribution has is looked for.
    pub fn open(fleet: Arc<Fleet>, firmware: Option<Firmware>) -> Arc<Self> {
        let table = record::load(fleet.store().templates());
        for name in table.keys() {
            fleet.tell(News::TemplateNew(name.clone()));
        }
        Arc::new(Self {
            fleet,
            table: RwLock::new(table.into_iter().map(|(name, record)| (name, Arc::new(record))).collect()),
            held: Mutex::default(),
            turns: Semaphore::new(AT_ONCE),
            firmware,
        })
    }

    /// The fleet whose VMs they are made of.
    pub fn fleet(&self) -> &Arc<Fleet> {
        &self.fleet
    }

    /// All of them by name.
    pub fn list(&self) -> Vec<Arc<Record>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// One of them.
    pub fn get(&self, name: &str) -> Result<Arc<Record>, FleetError> {
        let missing = || FleetError::NoSuchTemplate(format!("no template is named {name:?}"));
        self.table.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned().ok_or_else(missing)
    }

    /// Where a template lies.
    pub fn place(&self, name: &str) -> PathBuf {
        self.fleet.store().templates().join(name)
    }

    /// VMs with a disk that is, or lies over, an image of the template.
    pub fn users(&self, name: &str) -> Vec<String> {
        let place = self.place(name);
        let uses = |disk: &dbus_api::spec::Disk| {
            disk.path.starts_with(&place)
                || disk.backing.as_ref().is_some_and(|path| path.starts_with(&place))
        };
        let views = self.fleet.list();
        let mut users: Vec<String> = views
            .iter()
            .filter(|view| view.spec.disks.iter().any(uses))
            .map(|view| view.name.to_string())
            .collect();
        // A template may lie over another one: one that was made of a clone.
        let others = self.list().into_iter().filter(|record| record.name != name);
        users
            .extend(others.filter(|r| r.spec.disks.iter().any(uses)).map(|r| format!("template {}", r.name)));
        users
    }

    /// Removes a template that no VM needs.
    pub async fn delete(self: &Arc<Self>, name: &str) -> Result<(), FleetError> {
        let dead = self.fleet.store().templates().join(format!("{DEAD}{name}"));
        {
            // Held: no clone begins meanwhile.
            let held = self.held();
            self.get(name)?;
            if held.readers.contains_key(name) {
                return Err(FleetError::Busy(format!(
                    "template \"{name}\" is being cloned or verified: wait for that"
                )));
            }
            let users = self.users(name);
            if !users.is_empty() {
                return Err(FleetError::TemplateInUse(format!(
                    "template \"{name}\" is needed by {}: remove those first",
                    users.join(", ")
                )));
            }
            std::fs::rename(self.place(name), &dead)
                .map_err(|error| FleetError::StoreFailed(format!("template \"{name}\": {error}")))?;
            self.table.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        }
        info!("template {name}: deleted");
        self.fleet.tell(News::TemplateRemoved(name.to_owned()));
        let parent = self.fleet.store().templates().to_owned();
        let removed = blocking(move || {
            sync(&parent)?;
            std::fs::remove_dir_all(&dead)
        });
        if let Err(error) = removed.await {
            warn!("template {name}: files are left, until the next start: {error}");
        }
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The template, which stays as long as this is held.
    fn read(self: &Arc<Self>, name: &str) -> Result<Reader, FleetError> {
        let mut held = self.held();
        let record = self.get(name)?;
        *held.readers.entry(name.to_owned()).or_default() += 1;
        Ok(Reader { templates: Arc::clone(self), record })
    }
}

/// Holds a template for one step.
struct Reader {
    templates: Arc<Templates>,
    record: Arc<Record>,
}

impl Reader {
    fn place(&self) -> PathBuf {
        self.templates.place(&self.record.name)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut held = self.templates.held();
        if let Some(count) = held.readers.get_mut(&self.record.name) {
            *count -= 1;
            if *count == 0 {
                held.readers.remove(&self.record.name);
            }
        }
    }
}

/// Makes a file, or a directory's names, durable.
fn sync(path: &Path) -> std::io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}

/// Makes all of them durable, at the same time: the file system's journal is written once for all, and not once for each in turn.
fn sync_all(paths: &[PathBuf]) -> std::io::Result<()> {
    std::thread::scope(|scope| {
        let others: Vec<_> = paths.iter().skip(1).map(|path| scope.spawn(|| sync(path))).collect();
        let first = paths.first().map_or(Ok(()), |path| sync(path));
        let lost = |_| Err(std::io::Error::other("a thread that synced a file ended"));
        others.into_iter().map(|other| other.join().unwrap_or_else(lost)).fold(first, Result::and)
    })
}

/// Runs what waits for a disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
}
