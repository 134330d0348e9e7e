//! How a running VM's devices differ from its definition, because a client of its QMP socket added or removed some. Pure; kept by the actor,
//! written with the process's record.

use std::collections::BTreeSet;

use dbus_api::spec::VmSpec;
use serde::{Deserialize, Serialize};

use super::seats::Kind;

/// More differences than any board has slots: a client that counts on is not followed.
const MOST: usize = 64;

/// See the module. Ids are those on the VMM's command line: `disk0`, `nic1`, …
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    /// Of the definition, and not there any more.
    pub removed: BTreeSet<String>,
    /// There, and not of the definition.
    pub added: BTreeSet<String>,
}

fn defined(spec: &VmSpec, id: &str) -> bool {
    Kind::Disk.number(id).is_some_and(|number| spec.disk_numbers().contains(&number))
        || Kind::Nic.number(id).is_some_and(|number| spec.nic_numbers().contains(&number))
}

impl Devices {
    /// The VM has the devices of its definition.
    pub fn is_plain(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }

    /// A device went; says whether that is news.
    pub fn delete(&mut self, spec: &VmSpec, id: &str) -> bool {
        if self.added.remove(id) {
            return true;
        }
        defined(spec, id) && self.removed.insert(id.to_owned())
    }

    /// The definition is another: what it does not have cannot be missing.
    pub fn prune(&mut self, spec: &VmSpec) {
        self.removed.retain(|id| defined(spec, id));
        self.added.retain(|id| !defined(spec, id));
    }

    /// A device came; says whether that is news.
    pub fn add(&mut self, spec: &VmSpec, id: &str) -> bool {
        if defined(spec, id) {
            return self.removed.remove(id);
        }
        self.added.len() < MOST && self.added.insert(id.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_go_and_come_back() {
        let spec: VmSpec =
            serde_json::from_str(r#"{"kernel":"/k","disks":[{"path":"/d"}],"nics":[{"bridge":"b"}]}"#)
                .unwrap();
        let mut devices = Devices::default();
        assert!(!devices.delete(&spec, "disk1") && !devices.delete(&spec, "other"));
        assert!(devices.delete(&spec, "nic0") && devices.delete(&spec, "disk0"));
        assert!(!devices.delete(&spec, "nic0"), "known already");
        assert!(devices.add(&spec, "nic0") && devices.add(&spec, "data"));
        assert_eq!((devices.removed.len(), devices.added.len()), (1, 1));
        assert!(devices.delete(&spec, "data") && devices.add(&spec, "disk0"));
        assert!(devices.is_plain());
        for number in 0..200 {
            devices.add(&spec, &format!("x{number}"));
        }
        assert_eq!(devices.added.len(), MOST);
    }
}
