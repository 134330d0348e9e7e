//! The VM Generation ID ("Virtual Machine Generation ID", Microsoft, 2012): sixteen bytes in guest memory that change whenever the guest may be one
//! of several that go on from one state. A guest that watches them makes new keys and seeds its random numbers anew: to Linux's `vmgenid` driver the
//! interrupt is the event (`boot` describes it).
//!
//! The bytes lie in a page of their own that no guest takes for RAM, the last one before the tables of ACPI end. They outlive a reset.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};

use vm_memory::{Bytes as _, GuestAddress};

use crate::memory::GuestMemory;

/// Where they lie.
pub const GENERATION_ADDRESS: u64 = 0xe_f000;
/// GSI of the event. That of a PC's keyboard, which neither board has, nor tells of.
pub const GENERATION_IRQ: u32 = 1;

/// One value of the sixteen bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerationId([u8; 16]);

impl GenerationId {
    /// One that no other VM has. Makes no system call: the seeds of the standard library's hashers, which are the kernel's random numbers, have
    /// been there since the first of them.
    pub fn new() -> Self {
        let seeded = RandomState::new();
        let half = |number: u64| {
            let mut hasher = seeded.build_hasher();
            hasher.write_u64(number);
            hasher.finish().to_le_bytes()
        };
        let mut bytes = [0; 16];
        let (low, high) = bytes.split_at_mut(8);
        low.copy_from_slice(&half(0));
        high.copy_from_slice(&half(1));
        Self(bytes)
    }

    /// Puts it where the guest looks for it.
    pub fn write(&self, memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
        memory.write_slice(&self.0, GuestAddress(GENERATION_ADDRESS))
    }
}

impl Default for GenerationId {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_are_alike() {
        let ids: Vec<_> = (0..100).map(|_| GenerationId::new()).collect();
        for (n, id) in ids.iter().enumerate() {
            assert!(!ids[..n].contains(id));
            assert_ne!(id.0[..8], id.0[8..]);
        }
    }
}
