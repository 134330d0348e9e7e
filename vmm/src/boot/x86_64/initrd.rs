//! The initrd: as high as the kernel allows, where nothing else comes to lie.

use super::{Initrd, Kernel, low_ram_end};
use crate::boot::BootError;
use crate::boot::file::BootFile;
use crate::memory::GuestMemory;

const PAGE: u64 = 4096;

pub(super) fn load(file: &mut BootFile, memory: &GuestMemory, kernel: &Kernel) -> Result<Initrd, BootError> {
    let limit = low_ram_end(memory).min(kernel.initrd_limit);
    let size = file.len();
    if size == 0 {
        return Err(file.failed(std::io::Error::other("the file is empty")));
    }
    let base = place(size, kernel.end, limit).ok_or(());
    let Ok(base) = base else {
        file.check_fits(kernel.end.saturating_add(size).saturating_add(PAGE), limit)?;
        return Err(file.failed(std::io::Error::other("does not fit into guest memory")));
    };
    file.copy(0, memory, base, size)?;
    Ok(Initrd { base, size })
}

/// The highest page-aligned address at which `size` bytes end at or below `limit` without touching what is below `floor`.
fn place(size: u64, floor: u64, limit: u64) -> Option<u64> {
    let base = limit.checked_sub(size)? & !(PAGE - 1);
    (base >= floor).then_some(base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn goes_to_the_top() {
        assert_eq!(place(1, 0x10_0000, 0x3800_0000), Some(0x37ff_f000));
        assert_eq!(place(PAGE, 0x10_0000, 0x3800_0000), Some(0x37ff_f000));
        assert_eq!(place(PAGE + 1, 0x10_0000, 0x3800_0000), Some(0x37ff_e000));
        assert_eq!(place(PAGE, 0x10_0000, 0x10_0fff), None);
        assert_eq!(place(u64::MAX, 0, 0x3800_0000), None);
    }

    proptest! {
        #[test]
        fn never_overlaps_the_kernel(size: u64, floor: u64, limit: u64) {
            if let Some(base) = place(size, floor, limit) {
                prop_assert!(base >= floor && base + size <= limit && base % PAGE == 0);
            }
        }
    }
}
