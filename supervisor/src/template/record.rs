//! What is written of a template: owns `template.json`, and what is read back, which is trusted no more than any record.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use dbus_api::spec::VmSpec;
use serde::{Deserialize, Serialize};
use tracing::error;

use super::sync;
use crate::fleet::spec as rules;

const FORMAT: u32 = 1;
const FILE: &str = "template.json";
/// Definitions are text written by people.
const LONGEST: u64 = 1 << 20;

/// A file of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its name in the template's directory.
    pub name: String,
    /// Bytes, holes and all.
    pub size: u64,
    /// CRC-64 of what is not zero in it, and where; hex.
    pub checksum: String,
}

/// A template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    format: u32,
    /// Its name; must be its directory's.
    pub name: String,
    /// The VM that it was made of.
    pub vm: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// When, microseconds since the epoch.
    pub created: u64,
    /// Version of the VMM that saved it.
    pub vmm: String,
    /// The VM's definition, without what tells VMs apart. Disk `n` is the file `diskN`, the firmware's variables are `vars.fd`.
    pub spec: VmSpec,
    /// All its files but this one.
    pub parts: Vec<Part>,
}

impl Record {
    pub(super) fn new(name: &str, vm: &str, created: u64, vmm: &str, spec: VmSpec) -> Self {
        let (name, vm, vmm) = (name.to_owned(), vm.to_owned(), vmm.to_owned());
        Self { format: FORMAT, name, vm, description: String::new(), created, vmm, spec, parts: Vec::new() }
    }

    /// Bytes of all files, holes and all.
    pub fn size(&self) -> u64 {
        self.parts.iter().map(|part| part.size).sum()
    }

    /// Writes it into the directory; durable when this returns.
    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(directory.join(FILE))?;
        file.write_all(&text)?;
        file.sync_all()?;
        sync(directory)
    }

    fn read(directory: &Path) -> Result<Self, String> {
        let text = |error: io::Error| format!("{FILE}: {error}");
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file =
            OpenOptions::new().read(true).custom_flags(flags).open(directory.join(FILE)).map_err(text)?;
        let mut bytes = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(text)?;
        if bytes.len() as u64 > LONGEST {
            return Err(format!("{FILE}: longer than {LONGEST} bytes"));
        }
        let record: Self = serde_json::from_slice(&bytes).map_err(|error| format!("{FILE}: {error}"))?;
        if record.format != FORMAT {
            return Err(format!("{FILE}: format {} is not known to this version", record.format));
        }
        if directory.file_name().is_none_or(|name| name != record.name.as_str()) {
            return Err(format!("{FILE}: it says that it is that of \"{}\"", record.name));
        }
        rules::check_name(&record.name)
            .and_then(|()| rules::check(&record.spec))
            .map_err(|error| error.to_string())?;
        if !record.parts.iter().map(|part| &part.name).eq(&files(&record.spec)) {
            return Err(format!("{FILE}: it does not name the files of its definition"));
        }
        for part in &record.parts {
            let data = fs::symlink_metadata(directory.join(&part.name));
            let data = data.map_err(|error| format!("{}: {error}", part.name))?;
            if !data.is_file() || data.len() != part.size {
                return Err(format!("{}: is no file of {} bytes", part.name, part.size));
            }
        }
        Ok(record)
    }
}

/// File of the firmware's variables, of a template and of a VM that was made here.
pub(super) const VARIABLES: &str = "vars.fd";

/// Names of all files of a template with this definition, but the record.
pub(super) fn files(spec: &VmSpec) -> Vec<String> {
    let snapshot = crate::fleet::prepare::SNAPSHOT.map(str::to_owned).into_iter();
    let variables = spec.firmware.as_ref().map(|_| VARIABLES.to_owned());
    snapshot.chain((0..spec.disks.len()).map(disk)).chain(variables).collect()
}

/// Name of the file of a disk.
pub(super) fn disk(number: usize) -> String {
    format!("disk{number}")
}

/// Every template that is whole. One that is not stays where it is, for a person to look at.
pub(super) fn load(directory: &Path) -> BTreeMap<String, Record> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let whole = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.to_owned();
        if name.starts_with('.') {
            return None;
        }
        let read = Record::read(&path).inspect_err(|why| error!("template {}: {why}", path.display()));
        Some((name, read.ok()?))
    };
    entries.filter_map(whole).collect()
}

/// Makes a file that nobody else sees.
pub(super) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(directory: &Path, change: impl FnOnce(&mut Record)) {
        fs::create_dir_all(directory).unwrap();
        let spec = rules::parse(r#"{"kernel":"/k","disks":[{"path":"/d"}]}"#).unwrap();
        let mut record = Record::new("web", "web-0", 1, "0.1", spec);
        for name in ["state", "memory", "disk0"] {
            fs::write(directory.join(name), "12345").unwrap();
            record.parts.push(Part { name: name.into(), size: 5, checksum: "0".into() });
        }
        change(&mut record);
        let _ = fs::remove_file(directory.join(FILE));
        record.write(directory).unwrap();
    }

    #[test]
    fn what_was_written_comes_back_and_nothing_else_does() {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join("web");
        stored(&place, |_| ());
        let all = load(home.path());
        assert_eq!((all.len(), all["web"].size(), all["web"].vm.as_str()), (1, 15, "web-0"));
        for change in [
            (|r| r.format = 2) as fn(&mut Record),
            |r| r.name = "db".into(),
            |r| r.spec.cpus = 0,
            |r| r.parts[1].name = "../../etc/passwd".into(),
            |r| drop(r.parts.pop()),
            |r| r.parts[2].size = 6,
        ] {
            stored(&place, change);
            assert!(load(home.path()).is_empty());
        }
        stored(&place, |_| ());
        fs::remove_file(place.join("disk0")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", place.join("disk0")).unwrap();
        assert!(load(home.path()).is_empty());
        stored(&home.path().join(".making-web"), |_| ());
        fs::write(place.join(FILE), "{").unwrap();
        fs::write(home.path().join("file"), "").unwrap();
        assert!(load(home.path()).is_empty());
    }
}
