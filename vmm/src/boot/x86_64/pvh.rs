//! PVH: `hvm_start_info`, its memory map and module list (Xen, public/arch-x86/hvm/start_info.h, version 1).

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued as _;

use super::{CMDLINE, Initrd, MapEntry, PARAMS};
use crate::boot::BootError;
use crate::memory::GuestMemory;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
/// The types are those of e820.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

pub(super) fn write(
    memory: &GuestMemory,
    map: &[MapEntry],
    rsdp: u64,
    initrd: Option<Initrd>,
) -> Result<(), BootError> {
    super::write(memory, PARAMS, &bytes(map, rsdp, initrd), "the PVH start info")
}

/// The start info with its two tables right behind it, so that all of it is in one page.
fn bytes(map: &[MapEntry], rsdp: u64, initrd: Option<Initrd>) -> Vec<u8> {
    let modules = PARAMS + size_of::<hvm_start_info>() as u64;
    let module = initrd.map(|i| hvm_modlist_entry { paddr: i.base, size: i.size, ..Default::default() });
    let module_bytes = module.as_ref().map_or(&[][..], |m| m.as_slice());
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { modules } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: modules + module_bytes.len() as u64,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut bytes = info.as_slice().to_vec();
    bytes.extend(module_bytes);
    for e in map {
        let entry = hvm_memmap_table_entry {
            addr: e.base,
            size: e.size,
            type_: if e.usable { RAM } else { RESERVED },
            ..Default::default()
        };
        bytes.extend(entry.as_slice());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_follow_the_start_info() {
        let map = [MapEntry { base: 5, size: 10, usable: true }; 3];
        let with = bytes(&map, 0xe_0000, Some(Initrd { base: 0x1000, size: 2 }));
        assert_eq!(with.len(), 56 + 32 + 3 * 24);
        assert_eq!(with[16..24], (PARAMS + 56).to_le_bytes());
        assert_eq!(with[40..48], (PARAMS + 88).to_le_bytes());
        assert_eq!(with[56..64], 0x1000u64.to_le_bytes());
        assert_eq!(with[88..96], 5u64.to_le_bytes());
        let without = bytes(&map, 0xe_0000, None);
        assert_eq!(without[12..24], [0; 12]);
    }
}
