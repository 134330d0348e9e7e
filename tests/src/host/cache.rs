//! The cache of built things (images, frozen hosts): owns its folder. An entry is a folder named by what it is and by a
//! hash of everything it is made from, so a changed input is simply another entry. Entries are built aside and renamed
//! into place whole; a lock file per entry makes a second builder wait for the first.
//!
//! States of an entry: absent → building (under its lock, in `NAME.new`) → present, for ever.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::error::{HostError, io};

/// Where built things are kept: `FLOTILLA_TEST_CACHE`, or `flotilla-tests` in the user's cache folder.
#[must_use]
pub fn folder() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("FLOTILLA_TEST_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("flotilla-tests")))
        .or_else(|| from("HOME").map(|dir| dir.join(".cache/flotilla-tests")))
        .unwrap_or_else(|| PathBuf::from("/var/tmp/flotilla-tests"))
}

/// A hash over the inputs of an entry (FNV-1a, 128 bits): for telling versions apart, not against forgers.
#[derive(Debug, Clone)]
pub struct Key(u128);

impl Default for Key {
    fn default() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Key {
    /// Adds one input. Its length counts too, so that moving bytes between inputs changes the key.
    #[must_use]
    pub fn with(mut self, input: impl AsRef<[u8]>) -> Self {
        let input = input.as_ref();
        for byte in (input.len() as u64).to_le_bytes().iter().chain(input) {
            self.0 = (self.0 ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
        self
    }

    /// Adds the content of a file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn with_file(self, path: &Path) -> Result<Self, HostError> {
        Ok(self.with(fs::read(path).map_err(io(format!("read {}", path.display())))?))
    }

    /// The hash in hexadecimal, short enough for a file name.
    #[must_use]
    pub fn hex(&self) -> String {
        format!("{:032x}", self.0)[..16].to_owned()
    }
}

/// The entry `kind-KEY`; built by `build` in the folder it is given when it is not there yet.
///
/// # Errors
/// Those of `build`, and of the file system.
pub fn entry(
    kind: &str,
    key: &Key,
    build: impl FnOnce(&Path) -> Result<(), HostError>,
) -> Result<PathBuf, HostError> {
    let cache = folder();
    fs::create_dir_all(&cache).map_err(io(format!("create {}", cache.display())))?;
    let name = format!("{kind}-{}", key.hex());
    let done = cache.join(&name);
    if done.exists() {
        return Ok(done);
    }
    let lock_path = cache.join(format!("{name}.lock"));
    let lock = File::create(&lock_path).map_err(io(format!("create {}", lock_path.display())))?;
    // Freed by the kernel when the builder ends in whatever way, so a wait ends too.
    lock.lock().map_err(io(format!("lock {}", lock_path.display())))?;
    if done.exists() {
        return Ok(done);
    }
    let new = cache.join(format!("{name}.new"));
    if new.exists() {
        fs::remove_dir_all(&new)
            .map_err(io(format!("remove what an earlier try left, {}", new.display())))?;
    }
    fs::create_dir(&new).map_err(io(format!("create {}", new.display())))?;
    build(&new)?;
    fs::rename(&new, &done).map_err(io(format!("rename to {}", done.display())))?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_inputs_apart() {
        let key = |parts: &[&str]| parts.iter().fold(Key::default(), Key::with).hex();
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab", ""]));
        assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
        assert_ne!(key(&[]), key(&[""]));
        assert_eq!(key(&["x"]).len(), 16);
    }
}
