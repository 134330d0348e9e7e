//! The host's end of virtio-rng: a character device such as `/dev/urandom`, or a pipe.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use rustix::fs::{FileType, Mode, OFlags};

use crate::config::RngSource;
use crate::inherit::Inherited;

/// Why there are no random bytes to be had.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// The file could not be opened.
    #[error("rng \"{id}\": {}: {source}", filename.display())]
    Open {
        /// Of the object.
        id: String,
        /// As given.
        filename: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file that ends, a directory, or the like.
    #[error("rng \"{id}\": {} is no character device: write filename=/dev/urandom", filename.display())]
    NotADevice {
        /// Of the object.
        id: String,
        /// As given.
        filename: PathBuf,
    },
}

/// An open source of random bytes.
pub struct Source {
    id: String,
    file: File,
}

impl Source {
    /// Opens what `rng` names, or takes the descriptor that stands for it.
    pub fn open(rng: &RngSource, inherited: &Inherited) -> Result<Self, RngError> {
        let RngSource { id, filename } = rng;
        let failed = |source| RngError::Open { id: id.clone(), filename: filename.clone(), source };
        let fd = match inherited.take_path(filename) {
            Some(fd) => {
                // A worker thread must never wait in a read.
                rustix::io::ioctl_fionbio(&fd, true).map_err(|e| failed(e.into()))?;
                fd
            }
            None => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                rustix::fs::open(filename, flags, Mode::empty()).map_err(|e| failed(e.into()))?
            }
        };
        let mode = rustix::fs::fstat(&fd).map_err(|e| failed(e.into()))?.st_mode;
        match FileType::from_raw_mode(mode) {
            FileType::CharacterDevice | FileType::Fifo => Ok(Self { id: id.clone(), file: fd.into() }),
            _ => Err(RngError::NotADevice { id: id.clone(), filename: filename.clone() }),
        }
    }

    /// Name of the object.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Reads without waiting.
    pub(super) fn read(&self, to: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(&self.file, &mut *to) {
                Err(rustix::io::Errno::INTR) => {}
                result => return result.map_err(Into::into),
            }
        }
    }
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
