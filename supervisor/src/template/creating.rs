//! CreateVm: owns the steps from an image to a VM that boots it, and how they are taken back in order.
//!
//! ```text
//! clones/VM with `making` ─▶ disk, firmware's variables, seed ─▶ defined ─▶ started ─▶ `making` removed: a VM like any other
//!           │ an error at any step, or a kill: undefined, then the directory removed
//! ```
//!
//! What is wrong with a call is said at once, before there is a job.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dbus_api::spec::{Disk, Format, Machine, VmSpec};
use tracing::info;
use uuid::Uuid;

use super::cloning::{self, Cloning, NO_USER_DATA};
use super::image::{self, Image};
use super::seed::{self, Identity};
use super::{Templates, blocking, firmware, record};
use crate::fleet::life::Verb;
use crate::fleet::spec::{check, check_name};
use crate::fleet::{Fleet, FleetError};

/// Keys that one call may bring.
const KEYS_MAX: usize = 64;

/// How a VM is made from an image.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    /// Bytes of its first disk; that of the image when absent.
    pub size: Option<u64>,
    /// What the image is; read from the image when absent.
    pub format: Option<Format>,
    /// Its first disk needs the image no more, though that may take a copy.
    pub whole: bool,
    /// For its guest, as cloud-init takes it.
    pub user_data: Option<String>,
    /// For its guest, as cloud-init takes it; without it every card asks for its address.
    pub network_config: Option<String>,
    /// Who may log in over ssh, as lines of `authorized_keys`.
    pub ssh_keys: Vec<String>,
    /// It is started.
    pub start: bool,
}

impl Templates {
    /// Makes a VM whose first disk comes of `image`. `definition` is the rest of it, JSON.
    pub async fn create_vm(
        self: &Arc<Self>,
        name: &str,
        definition: &str,
        image: &Path,
        options: CreateOptions,
    ) -> Result<Cloning, FleetError> {
        check_name(name)?;
        check_keys(&options.ssh_keys)?;
        if self.taken(name) {
            return Err(FleetError::VmExists(format!("VM \"{name}\" is defined already: use another name")));
        }
        if options.start && self.fleet.draining() {
            return Err(FleetError::Draining(
                "this host is being drained: nothing is started on it".to_owned(),
            ));
        }
        let home = self.fleet.store().clones().join(name);
        let (spec, variables) = self.settle(definition, &home)?;
        let uuid = spec.uuid.unwrap_or_else(Uuid::new_v4);
        let identity = Identity {
            instance: uuid.to_string(),
            hostname: name,
            uuid: uuid.to_string(),
            template: None,
            number: None,
            keys: &options.ssh_keys,
            macs: &Fleet::macs(&spec, uuid),
        };
        let user_data = options.user_data.as_deref().unwrap_or(NO_USER_DATA);
        let seed = seed::image(&identity, user_data, options.network_config.as_deref(), None)?;
        let (path, format, size) = (image.to_owned(), options.format, options.size);
        let image = tokio::task::spawn_blocking(move || image::look(&path, format, size)).await;
        let image = image.map_err(|error| FleetError::InvalidSpec(format!("image: {error}")))??;

        if !self.held().clones.insert(name.to_owned()) {
            return Err(FleetError::Busy(format!("VM \"{name}\" is being made")));
        }
        let job = self.fleet.open_job("create", name);
        let parts = Parts { image, seed, variables, whole: options.whole };
        let creation =
            Creation { templates: Arc::clone(self), name: name.to_owned(), uuid, home, start: options.start };
        tokio::spawn(async move {
            let steps = async {
                creation.fleet().note_job(job, "waiting", (0, 0))?;
                let _turn = creation.templates.turns.acquire().await;
                creation.run(job, spec, parts).await
            };
            let result = steps.await;
            if let Err(error) = &result {
                info!(FLOTILLA_VM = &*creation.name, "not created: {error}");
                cloning::take_back(creation.fleet(), &creation.name, creation.uuid, &creation.home).await;
            }
            creation.templates.held().clones.remove(&creation.name);
            creation.fleet().close_job(job, result);
        });
        Ok(Cloning { name: name.to_owned(), job })
    }

    /// The definition with its first and its last disk, which are not made yet, and the firmware's variables to copy. One that names neither
    /// kernel nor firmware nor board is a q35 with this host's firmware.
    fn settle(&self, text: &str, home: &Path) -> Result<(VmSpec, Option<PathBuf>), FleetError> {
        let wrong = |error: serde_json::Error| FleetError::InvalidSpec(format!("definition: {error}"));
        let value: serde_json::Value = serde_json::from_str(text).map_err(wrong)?;
        let names_board = value.get("machine").is_some();
        let mut spec: VmSpec = serde_json::from_value(value).map_err(wrong)?;
        if spec.kernel.is_none() && spec.firmware.is_none() {
            if !names_board {
                spec.machine = Machine::Q35;
            }
            if spec.machine == Machine::Q35 {
                spec.firmware = Some(firmware::find(self.firmware.as_ref())?);
            }
        }
        let variables = spec
            .firmware
            .as_mut()
            .map(|firmware| std::mem::replace(&mut firmware.vars, home.join(record::VARIABLES)));
        spec.disks.insert(0, Disk::new(home.join(record::disk(0))));
        spec.disks.push(cloning::seed_disk(home));
        check(&spec)?;
        Ok((spec, variables))
    }
}

/// Keys are lines; what they say is for the guest to judge.
fn check_keys(keys: &[String]) -> Result<(), FleetError> {
    let wrong = |text: String| Err(FleetError::InvalidSpec(format!("ssh_keys: {text}")));
    if keys.len() > KEYS_MAX {
        return wrong(format!("{} given, at most {KEYS_MAX}", keys.len()));
    }
    let line = |key: &String| !key.contains(char::is_control) && key.split_whitespace().count() >= 2;
    match keys.iter().position(|key| !line(key)) {
        Some(at) => wrong(format!("number {at} is no line such as \"ssh-ed25519 AAAA… name\"")),
        None => Ok(()),
    }
}

/// What the VM's directory is filled with.
struct Parts {
    image: Image,
    seed: Vec<u8>,
    /// The firmware's variables to copy.
    variables: Option<PathBuf>,
    whole: bool,
}

struct Creation {
    templates: Arc<Templates>,
    name: String,
    uuid: Uuid,
    /// Its directory.
    home: PathBuf,
    start: bool,
}

impl Creation {
    fn fleet(&self) -> &Arc<Fleet> {
        &self.templates.fleet
    }

    async fn run(&self, job: u32, mut spec: VmSpec, parts: Parts) -> Result<(), FleetError> {
        let failed =
            |error: io::Error| FleetError::StoreFailed(format!("VM \"{}\": its disks: {error}", self.name));
        self.fleet().note_job(job, "disk", (0, 0))?;
        let (home, uuid, fleet) = (self.home.clone(), self.uuid, Arc::clone(self.fleet()));
        let last = spec.disks.last().cloned();
        let made = blocking(move || {
            cloning::begin(&home, uuid)?;
            let disk = image::make(&parts.image, parts.whole, &home, |done, all| {
                fleet.note_job(job, "copying the image", (done, all)).map_err(io::Error::other)
            })?;
            if let Some(variables) = &parts.variables {
                copy_variables(variables, &home.join(record::VARIABLES))?;
            }
            if let Some(seed) = &last {
                cloning::write_seed(seed, &parts.seed)?;
            }
            cloning::settle(&home)?;
            Ok(disk)
        });
        if let Some(first) = spec.disks.first_mut() {
            *first = made.await.map_err(failed)?;
        }
        self.fleet().note_job(job, "defining", (0, 0))?;
        self.fleet().define_as(&self.name, self.uuid, spec).await?;
        if self.start {
            self.fleet().note_job(job, "starting", (0, 0))?;
            self.fleet().carry_out(&self.name, Verb::Start { paused: false }).await?;
        }
        let home = self.home.clone();
        blocking(move || cloning::finish(&home)).await.map_err(failed)?;
        info!(FLOTILLA_VM = &*self.name, "created");
        Ok(())
    }
}

/// A copy of the firmware's variables, not durable yet.
pub(super) fn copy_variables(from: &Path, to: &Path) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", from.display()));
    let mut from_file = File::open(from).map_err(named)?;
    let mut to = record::create(to)?;
    io::copy(&mut from_file, &mut to).map_err(named).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_lines() {
        let key = |text: &str| check_keys(&[text.to_owned()]);
        assert_eq!(key("ssh-ed25519 AAAA me@here"), Ok(()));
        for text in ["", "ssh-ed25519", "ssh-rsa A\nssh-rsa B", "ssh-rsa \u{1b}[0m A"] {
            assert!(key(text).is_err(), "{text:?}");
        }
        assert!(check_keys(&vec!["a b".to_owned(); KEYS_MAX + 1]).is_err());
    }
}
