//! The table of NAT as the networks want it: owns when it is written. `netsetup` knows its text, and that it is the one of our own.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dbus_api::network::NetworkSpec;
use netsetup::{apply_ruleset, list_ruleset, nat_ruleset};
use tracing::{info, warn};

use super::FleetError;
use super::network_rules::{bridge_of, nat};

/// The table and how it stands.
#[derive(Debug)]
pub(super) struct Nat {
    /// Says that the table was written in this boot: without it, and without a network that wants it, `nft` is not even needed.
    marker: PathBuf,
    one: tokio::sync::Mutex<()>,
    trouble: Mutex<Option<String>>,
    /// What the kernel said of the table when it had been written.
    written: Mutex<Option<String>>,
}

impl Nat {
    /// `marker` is a file that is gone after a boot.
    pub(super) fn new(marker: PathBuf) -> Self {
        Self {
            marker,
            one: tokio::sync::Mutex::default(),
            trouble: Mutex::default(),
            written: Mutex::default(),
        }
    }

    /// Writes the table for these networks, or takes it away when none of them has NAT.
    pub(super) async fn apply(
        &self,
        networks: impl IntoIterator<Item = (&str, &NetworkSpec)>,
    ) -> Result<(), FleetError> {
        self.settle(networks, false).await
    }

    /// Somebody took something from the table: it is written anew, unless that was this daemon and it is as it should be.
    pub(super) async fn put_back(
        &self,
        networks: impl IntoIterator<Item = (&str, &NetworkSpec)>,
    ) -> Result<(), FleetError> {
        self.settle(networks, true).await
    }

    async fn settle(
        &self,
        networks: impl IntoIterator<Item = (&str, &NetworkSpec)>,
        only_if_changed: bool,
    ) -> Result<(), FleetError> {
        let _one = self.one.lock().await;
        if only_if_changed {
            let written = self.written().clone();
            // Nothing was written, or it is there.
            if written.is_none() || list_ruleset().await.ok() == written {
                return Ok(());
            }
            warn!("nat: somebody changed the table flotilla; it is written anew");
        }
        let (mut wanted, mut isolated) = (Vec::new(), Vec::new());
        for (name, spec) in networks {
            wanted.extend(nat(name, spec));
            if spec.isolated {
                isolated.push(bridge_of(name, spec));
            }
        }
        if wanted.is_empty() && !self.marker.exists() {
            self.note(None);
            return Ok(());
        }
        let done = self.write(&wanted, &isolated).await;
        self.note(done.as_ref().err().map(ToString::to_string));
        done
    }

    async fn write(&self, wanted: &[netsetup::NatNetwork], isolated: &[String]) -> Result<(), FleetError> {
        let failed = |error: netsetup::NetError| FleetError::NetworkFailed(format!("nat: {error}"));
        // A bridge whose name means more than itself is isolated as ever, but the host may lead around that.
        let isolated: Vec<String> =
            isolated.iter().filter(|bridge| netsetup::check_plain(bridge).is_ok()).cloned().collect();
        let text = nat_ruleset(wanted, &isolated).map_err(failed)?;
        let marker = |error: std::io::Error| {
            FleetError::NetworkFailed(format!("nat: {}: {error}", self.marker.display()))
        };
        // First: what a killed daemon leaves is found by it.
        std::fs::write(&self.marker, "").map_err(marker)?;
        *self.written() = None;
        apply_ruleset(&text).await.map_err(failed)?;
        if wanted.is_empty() {
            std::fs::remove_file(&self.marker).map_err(marker)?;
            info!("nat: no network wants it any more, its table is gone");
        } else {
            // Taken away again this moment, or some of it: the kernel tells of that, too, and the next look writes it anew.
            let listed = list_ruleset().await.ok().filter(|listed| verdicts(listed) == verdicts(&text));
            *self.written() = Some(listed.unwrap_or_default());
        }
        Ok(())
    }

    fn written(&self) -> MutexGuard<'_, Option<String>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// What is wrong with it.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How many lines of a table do something, by what they do: the same in our text and in the kernel's.
fn verdicts(text: &str) -> [usize; 3] {
    ["masquerade", "accept", "drop"].map(|verdict| text.lines().filter(|line| line.contains(verdict)).count())
}
