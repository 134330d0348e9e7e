//! Snapshots on disk: owns the directory that a VM is saved to and restored from. It knows no device: what the sections of `state`
//! mean is the business of those who write and read them.
//!
//! ```text
//! DIR/state    header, then sections: name, instance, version, length, checksum, bytes          `sections`
//! DIR/memory   guest RAM without the holes of its address map: sparse, mapped by a restore      `pages`
//!
//! DIR.partial-XXXXXXXX ── both files written and synced ──▶ renamed to DIR, or exchanged with the snapshot there   `directory`
//! ```
//!
//! A snapshot is complete or absent. What is read back may have been written by anybody: lengths, counts and checksums are checked
//! before anything is used, and nothing is allocated by a number from the file.

mod checksum;
mod directory;
#[cfg(fuzzing)]
pub mod fuzz;
mod pages;
mod sections;

use std::io;
use std::path::PathBuf;

pub use directory::{Draft, Opened, Target};
pub use pages::Pages;
pub use sections::{Format, Section, Sections, StateWriter};

/// Why a VM could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The place of the snapshot.
    #[error("snapshot {}: {problem}", path.display())]
    Place {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: &'static str,
    },
    /// The host refused.
    #[error("snapshot {}: cannot {what}: {source}", path.display())]
    Host {
        /// The directory, or a file in it.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Guest memory, while the guest is told that it is another VM now.
    #[error("cannot write the VM Generation ID to guest memory: {0}")]
    Memory(#[source] vm_memory::GuestMemoryError),
    /// A file of the snapshot is damaged, or no such file.
    #[error("snapshot {}: {format}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        format: Format,
    },
}
