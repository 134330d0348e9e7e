//! What lies under guest RAM: nothing (anonymous memory), a memfd, or a file (`-mem-path`). Only `memory` calls this.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use vm_memory::FileOffset;

use super::{MemoryError, Wish};

/// `f_type` of a hugetlbfs (linux/magic.h).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

pub(super) struct Backing {
    file: Option<Arc<File>>,
    shared: bool,
    huge: bool,
}

impl Backing {
    pub(super) fn open(wish: &Wish<'_>) -> Result<Self, MemoryError> {
        let file = match wish.path {
            Some(path) => Some(open_path(path, wish.size)?),
            // Private anonymous pages cost half as much to touch as those of a memfd: no file unless somebody wants to share.
            None if wish.shared || wish.memfd => {
                Some(memfd(wish.size).map_err(|source| MemoryError::File { path: "memfd".into(), source })?)
            }
            None => None,
        };
        let huge = match &file {
            Some(file) => rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type as u64 == HUGETLBFS_MAGIC),
            None => false,
        };
        Ok(Self { file: file.map(Arc::new), shared: wish.shared, huge })
    }

    /// The file of a snapshot: only read, whatever the guest writes.
    pub(super) fn snapshot(file: &File) -> io::Result<Self> {
        Ok(Self { file: Some(Arc::new(file.try_clone()?)), shared: false, huge: false })
    }

    /// A file that is the guest's: what it writes is there for everybody.
    pub(super) fn shared(file: &File) -> io::Result<Self> {
        Ok(Self { file: Some(Arc::new(file.try_clone()?)), shared: true, huge: false })
    }

    /// Whether RAM is made of the host's huge pages. Those must be reserved when they are mapped: a guest that touches one that is
    /// not there any more ends the VMM with SIGBUS.
    pub(super) fn huge(&self) -> bool {
        self.huge
    }

    /// File, offset and flags for a mapping that starts `offset` bytes into guest RAM.
    pub(super) fn mapping(&self, offset: u64) -> (Option<FileOffset>, i32) {
        let sharing = if self.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        match &self.file {
            Some(file) => (Some(FileOffset::from_arc(Arc::clone(file), offset)), sharing),
            None => (None, sharing | libc::MAP_ANONYMOUS),
        }
    }
}

fn memfd(size: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    Ok(file)
}

fn open_path(path: &Path, size: u64) -> Result<File, MemoryError> {
    let failed = |source| MemoryError::File { path: path.into(), source };
    if path.is_dir() {
        // A directory, usually of a hugetlbfs: a file that nobody sees and that goes with this process.
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)).map_err(|e| failed(e.into()))?;
        return grow(File::from(file), path, size);
    }
    let new = !path.exists();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    grow(file, path, size).inspect_err(|_| {
        if new {
            // Nothing of a VM that never came to be is left behind.
            let _ = std::fs::remove_file(path);
        }
    })
}

/// Makes the file large enough; a larger one keeps its size.
fn grow(file: File, path: &Path, size: u64) -> Result<File, MemoryError> {
    let failed = |source| MemoryError::File { path: path.into(), source };
    let page = rustix::fs::fstatfs(file.as_fd()).map_err(|e| failed(e.into()))?.f_bsize as u64;
    if page > 0 && !size.is_multiple_of(page) {
        return Err(MemoryError::PageSize { path: path.into(), size, page });
    }
    if file.metadata().map_err(failed)?.len() < size {
        file.set_len(size).map_err(failed)?;
    }
    Ok(file)
}
