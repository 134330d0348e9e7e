//! A kernel or initrd on the host: opened (or inherited) once, read at offsets, copied straight into guest memory.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use vm_memory::{Bytes as _, GuestAddress};

use super::BootError;
use crate::inherit::Inherited;
use crate::memory::GuestMemory;

pub(super) struct BootFile {
    option: &'static str,
    path: PathBuf,
    file: File,
    len: u64,
}

impl BootFile {
    /// Opens `path`, named by `option` on the command line; devices, pipes and directories are refused.
    pub(super) fn open(option: &'static str, path: &Path, inherited: &Inherited) -> Result<Self, BootError> {
        let failed = |source| BootError::File { option, path: path.into(), source };
        let file = match inherited.take_path(path) {
            Some(fd) => File::from(fd),
            // A directory opens too; a pipe without a writer would block here, so it must not.
            None => {
                let flags =
                    rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
                rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map(File::from).map_err(
                    |e| match e {
                        Errno::NOENT | Errno::NOTDIR => BootError::Missing { option, path: path.into() },
                        Errno::ACCESS | Errno::PERM => BootError::Denied { option, path: path.into() },
                        e => failed(e.into()),
                    },
                )?
            }
        };
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        let what = if kind.is_dir() {
            "a directory"
        } else if kind.is_fifo() || kind.is_socket() {
            "a pipe or socket"
        } else if kind.is_char_device() || kind.is_block_device() {
            "a device"
        } else {
            return Ok(Self { option, path: path.into(), file, len: metadata.len() });
        };
        Err(BootError::NotAFile { option, path: path.into(), what })
    }

    /// Bytes, when it was opened.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills as much of `buffer` as the file has at `offset`; returns how much.
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, BootError> {
        let mut done = 0;
        // Within what the file had when it was opened: a read beyond its end only costs a system call.
        let there = self.len.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let buffer = &mut buffer[..there];
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(done)
    }

    /// Copies `len` bytes at `offset` into guest memory at `to`. The caller has checked both ranges; a file that has shrunk since
    /// is an error.
    pub(super) fn copy(
        &mut self,
        offset: u64,
        memory: &GuestMemory,
        to: u64,
        len: u64,
    ) -> Result<(), BootError> {
        if len == 0 {
            return Ok(());
        }
        self.file.seek(SeekFrom::Start(offset)).map_err(|e| self.failed(e))?;
        let count = usize::try_from(len).map_err(|e| self.failed(std::io::Error::other(e)))?;
        memory
            .read_exact_volatile_from(GuestAddress(to), &mut self.file, count)
            .map_err(|e| self.failed(std::io::Error::other(e)))
    }

    pub(super) fn failed(&self, source: std::io::Error) -> BootError {
        BootError::File { option: self.option, path: self.path.clone(), source }
    }

    pub(super) fn not_a_kernel(&self, reason: impl Into<String>) -> BootError {
        BootError::NotAKernel { path: self.path.clone(), reason: reason.into() }
    }

    /// Fails when `needed` is beyond `end`.
    pub(super) fn check_fits(&self, needed: u64, end: u64) -> Result<(), BootError> {
        if needed <= end {
            return Ok(());
        }
        Err(BootError::TooLarge { option: self.option, path: self.path.clone(), needed, end })
    }
}
