//! Whether one more VM may run on this host: owns the limits of the configuration, what counts against them, and drain mode. Asked by the
//! actors before each start; it never stops anything.
//!
//! A VM holds its share from the moment its start is let in until it is idle again, so that two starts at once cannot both take the last
//! place. What runs already (found at the start of the daemon, or started while it was away) holds its share whatever the limits say.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dbus_api::spec::{Size, VmSpec};

use super::FleetError;

/// Limits of the host; what is absent is not limited.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Admission {
    /// VMs that run at the same time.
    pub max_vms: Option<u32>,
    /// Guest memory of all of them, bytes.
    pub max_memory: Option<u64>,
    /// vCPUs of all of them.
    pub max_cpus: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Share {
    memory: u64,
    cpus: u32,
}

#[derive(Debug, Default)]
struct Table {
    draining: bool,
    up: BTreeMap<Arc<str>, Share>,
}

/// See the module.
#[derive(Debug)]
pub struct Gate {
    limits: Admission,
    /// It is there as long as the host is drained: a restart of the daemon, or of the host, changes nothing about that.
    mark: PathBuf,
    table: Mutex<Table>,
    refusals: AtomicU64,
}

fn share(spec: &VmSpec) -> Share {
    Share { memory: spec.memory.0, cpus: u32::from(spec.cpus) }
}

impl Gate {
    /// `mark` is the file that says that the host is drained.
    pub fn new(limits: Admission, mark: PathBuf) -> Self {
        let draining = mark.exists();
        let table = Mutex::new(Table { draining, ..Table::default() });
        Self { limits, mark, table, refusals: AtomicU64::new(0) }
    }

    /// The limits of the configuration.
    pub fn limits(&self) -> &Admission {
        &self.limits
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often a start was refused.
    pub fn refusals(&self) -> u64 {
        self.refusals.load(Ordering::Relaxed)
    }

    /// Lets a VM start, and counts it from now on.
    pub(super) fn enter(&self, name: &Arc<str>, spec: &VmSpec) -> Result<(), FleetError> {
        self.judge(name, spec).inspect_err(|_| {
            self.refusals.fetch_add(1, Ordering::Relaxed);
        })
    }

    fn judge(&self, name: &Arc<str>, spec: &VmSpec) -> Result<(), FleetError> {
        let mut table = self.table();
        if table.draining {
            return Err(FleetError::Draining(
                "this host is being drained and starts nothing: use another, or `flotilla undrain`"
                    .to_owned(),
            ));
        }
        let new = share(spec);
        let others = || table.up.iter().filter(|(other, _)| *other != name).map(|(_, share)| share);
        let full = |text: String| {
            Err(FleetError::ResourceExhausted(format!(
                "{text}: stop another VM, or raise it in flotillad.toml"
            )))
        };
        if let Some(max) = self.limits.max_vms
            && others().count() >= max as usize
        {
            return full(format!("{max} VMs run, which is this host's limit (max_vms)"));
        }
        let memory: u64 = others().map(|share| share.memory).sum();
        if let Some(max) = self.limits.max_memory
            && memory.saturating_add(new.memory) > max
        {
            let (memory, wanted, max) = (Size(memory), Size(new.memory), Size(max));
            return full(format!(
                "{memory} of memory are given to VMs, with {wanted} more it passes this host's limit of {max} (max_memory)"
            ));
        }
        let cpus: u32 = others().map(|share| share.cpus).sum();
        if let Some(max) = self.limits.max_cpus
            && cpus.saturating_add(new.cpus) > max
        {
            let wanted = new.cpus;
            return full(format!(
                "{cpus} vCPUs are given to VMs, with {wanted} more it passes this host's limit of {max} (max_cpus)"
            ));
        }
        table.up.insert(Arc::clone(name), new);
        Ok(())
    }

    /// Counts a VM that runs, whatever the limits.
    pub(super) fn count(&self, name: &Arc<str>, spec: &VmSpec) {
        self.table().up.entry(Arc::clone(name)).or_insert(share(spec));
    }

    /// The VM does not run any more.
    pub(super) fn leave(&self, name: &Arc<str>) {
        self.table().up.remove(name);
    }

    /// Nothing may start.
    pub fn draining(&self) -> bool {
        self.table().draining
    }

    /// Says whether anything may start, now and after a restart.
    ///
    /// # Errors
    /// The mark cannot be written or removed; then nothing has changed.
    pub fn drain(&self, on: bool) -> io::Result<()> {
        let mut table = self.table();
        if on {
            let file = std::fs::File::create(&self.mark)?;
            file.sync_all()?;
        } else {
            match std::fs::remove_file(&self.mark) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        table.draining = on;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(memory: &str, cpus: u8) -> VmSpec {
        serde_json::from_value(serde_json::json!({"kernel": "/k", "memory": memory, "cpus": cpus})).unwrap()
    }

    fn name(text: &str) -> Arc<str> {
        text.into()
    }

    #[test]
    fn limits_count_what_runs() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Admission { max_vms: Some(3), max_memory: Some(4 << 30), max_cpus: Some(8) };
        let gate = Gate::new(limits, dir.path().join("drained"));
        gate.enter(&name("a"), &spec("1G", 4)).unwrap();
        gate.enter(&name("a"), &spec("1G", 4)).unwrap();
        let refused = |other: &str, memory, cpus, word: &str| {
            let error = gate.enter(&name(other), &spec(memory, cpus)).unwrap_err();
            assert!(
                matches!(&error, FleetError::ResourceExhausted(text) if text.contains(word)),
                "{error:?}"
            );
        };
        refused("b", "4G", 1, "max_memory");
        refused("b", "1G", 5, "max_cpus");
        gate.enter(&name("b"), &spec("3G", 4)).unwrap();
        gate.leave(&name("b"));
        gate.enter(&name("b"), &spec("1G", 1)).unwrap();
        // What runs runs.
        gate.count(&name("c"), &spec("16G", 99));
        refused("d", "128M", 1, "max_vms");
        gate.leave(&name("c"));
        gate.enter(&name("d"), &spec("128M", 1)).unwrap();
    }

    #[test]
    fn a_drained_host_stays_drained() {
        let dir = tempfile::tempdir().unwrap();
        let gate = || Gate::new(Admission::default(), dir.path().join("drained"));
        let first = gate();
        first.enter(&name("a"), &spec("1G", 1)).unwrap();
        first.drain(true).unwrap();
        for gate in [first, gate()] {
            assert!(gate.draining());
            assert!(matches!(gate.enter(&name("b"), &spec("1G", 1)), Err(FleetError::Draining(_))));
        }
        gate().drain(false).unwrap();
        gate().drain(false).unwrap();
        gate().enter(&name("b"), &spec("1G", 1)).unwrap();
        let nowhere = Gate::new(Admission::default(), "/nonexistent/drained".into());
        assert!(nowhere.drain(true).is_err() && !nowhere.draining());
    }
}
