//! `-object memory-backend-*`: owns what such an object says of guest RAM.

use std::path::PathBuf;

/// `-object memory-backend-*`: where guest RAM comes from, said as an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBackend {
    /// Name of the object.
    pub id: String,
    /// What the pages belong to.
    pub kind: MemoryBackendKind,
    /// Bytes: the same as guest RAM, or as the NUMA node's part of it.
    pub size: u64,
    /// `share=on`: writes reach the file or memfd.
    pub share: bool,
    /// `readonly=on`: the guest reads the file and writes nothing; only for what virtio-pmem brings.
    pub readonly: bool,
    /// `prealloc=on`: touch every page before the guest starts.
    pub prealloc: bool,
    /// `dump-guest-core`: include the pages in core dumps.
    pub dump_guest_core: bool,
    /// `policy=` and `host-nodes=`; `None` leaves it to the host.
    pub placement: Option<Placement>,
}

/// Kinds of memory object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryBackendKind {
    /// `memory-backend-ram`: anonymous memory.
    Ram,
    /// `memory-backend-file`: a file, or an unseen one in a directory.
    File(PathBuf),
    /// `memory-backend-memfd`.
    Memfd,
}

/// On which of the host's NUMA nodes pages are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// How.
    pub policy: PlacementPolicy,
    /// A bit for each node, from 0 to 63; at least one.
    pub nodes: u64,
}

/// `policy=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlacementPolicy {
    /// There first, elsewhere when it is full.
    Preferred,
    /// Nowhere else.
    Bind,
    /// On each in turn.
    Interleave,
}
