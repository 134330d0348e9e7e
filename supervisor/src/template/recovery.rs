//! What a killed daemon left: looks at the directories, and takes back what is not whole. Runs once, when the VMs are known.
//!
//! ```text
//! templates/.making-NAME with `vm`    the VM is resumed if it ran and is still paused, the directory removed
//! templates/.making-NAME, .dead-NAME  removed
//! clones/VM with `making`             the VM of that uuid undefined, the directory removed
//! clones/VM without a VM              removed: an undefinition was cut short
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{info, warn};

use super::cloning::{UNFINISHED, unfinished};
use super::making::{self, SUBJECT, Subject};
use super::{DEAD, MAKING, Templates, blocking};
use crate::fleet::life::{State, Verb};

fn entries(directory: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))).collect()
}

async fn remove(place: PathBuf) {
    let path = place.clone();
    match blocking(move || making::remove(&place)).await {
        Ok(()) => info!("{}: was not whole, removed", path.display()),
        Err(error) => warn!("{}: {error}", path.display()),
    }
}

impl Templates {
    /// Takes back what is not whole. New steps may begin meanwhile: what belongs to one of them is left alone.
    pub async fn recover(self: &Arc<Self>) {
        for (name, place) in entries(self.fleet.store().templates()) {
            let made = name.strip_prefix(MAKING);
            if made.is_some_and(|name| self.held().making.contains(name)) {
                continue;
            }
            if made.is_some() {
                self.resume_subject(&place).await;
            }
            if made.is_some() || name.starts_with(DEAD) {
                remove(place).await;
            }
        }
        for (name, place) in entries(self.fleet.store().clones()) {
            if self.held().clones.contains(&name) {
                continue;
            }
            let half_made = place.join(UNFINISHED).exists();
            let view = self.fleet.get(&name).ok();
            match (half_made, view) {
                // The record may be there or not: a directory is made before its VM, and its VM may be somebody's of that name.
                (true, Some(view)) if unfinished(&place) == Some(view.uuid) => {
                    info!(FLOTILLA_VM = name, "a clone was cut short: removed");
                    // Its directory goes with it.
                    if let Err(error) = self.fleet.undefine(&name, true).await {
                        warn!(FLOTILLA_VM = name, "{error}");
                    }
                }
                (true, _) | (false, None) => remove(place).await,
                (false, Some(_)) => {}
            }
        }
    }

    /// A VM that was paused for a template runs again.
    async fn resume_subject(&self, place: &Path) {
        let text = fs::read(place.join(SUBJECT)).unwrap_or_default();
        let Ok(subject) = serde_json::from_slice::<Subject>(&text) else { return };
        let Ok(view) = self.fleet.get(&subject.name) else { return };
        if subject.resume && view.uuid == subject.uuid && view.state == State::Paused {
            info!(FLOTILLA_VM = subject.name, "was paused for a template that was cut short: resumed");
            if let Err(error) = self.fleet.carry_out(&subject.name, Verb::Resume).await {
                warn!(FLOTILLA_VM = subject.name, "{error}");
            }
        }
    }
}
