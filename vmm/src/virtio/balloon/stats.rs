//! What the guest tells about its memory (virtio 1.2 §5.5.6.3). Pure: bytes in, numbers out.

/// Names as QMP clients know them; the position is the tag.
const NAMES: [&str; 10] = [
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
];
/// `le16` tag and `le64` value, packed.
const ENTRY: usize = 10;

/// One message of the guest. It may say anything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    values: [Option<u64>; NAMES.len()],
}

impl Stats {
    /// Bytes of the longest message that makes sense: each tag twice.
    pub(super) const MAX_BYTES: usize = 2 * NAMES.len() * ENTRY;

    /// Unknown tags are left out, the last of equal ones counts.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        for entry in bytes.chunks_exact(ENTRY) {
            let Some((tag, value)) = entry.split_first_chunk::<2>() else { continue };
            let (tag, Ok(value)) = (u16::from_le_bytes(*tag), <[u8; 8]>::try_from(value)) else { continue };
            if let Some(to) = stats.values.get_mut(usize::from(tag)) {
                *to = Some(u64::from_le_bytes(value));
            }
        }
        stats
    }

    /// Bytes that the guest could use without swapping; from a kernel that does not say, those that nobody uses.
    pub(super) fn available(&self) -> Option<u64> {
        const FREE: usize = 4;
        const AVAILABLE: usize = 6;
        self.values[AVAILABLE].or(self.values[FREE])
    }

    /// What the guest has told: QMP's names and numbers, sizes in bytes.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES.iter().zip(self.values).filter_map(|(name, value)| Some((*name, value?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_knows() {
        let mut bytes = vec![];
        for (tag, value) in [(4u16, 1u64 << 30), (99, 5), (5, 1 << 31), (4, 77), (u16::MAX, 1)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([4, 0, 1]);
        let stats: Vec<_> = Stats::parse(&bytes).named().collect();
        assert_eq!(stats, [("stat-free-memory", 77), ("stat-total-memory", 1 << 31)]);
        assert_eq!(Stats::parse(&[]), Stats::default());
    }
}
