//! The Linux 64-bit boot protocol: `boot_params` (the "zero page") and the page tables that a kernel is entered with
//! (Documentation/arch/x86/boot.rst, "64-bit boot protocol", and zero-page.rst).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued as _;

use super::{CMDLINE, Initrd, Kernel, MapEntry, PAGE_TABLES, PARAMS};
use crate::boot::BootError;
use crate::memory::GuestMemory;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "Undefined" boot loader (no number is assigned to us).
const LOADER: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// What kernels without a header of their own are told.
const PROTOCOL: u16 = 0x020c;
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

const PAGE: u64 = 4096;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const LARGE_SIZE: u64 = 2 << 20;

pub(super) fn write(
    memory: &GuestMemory,
    map: &[MapEntry],
    rsdp: u64,
    initrd: Option<Initrd>,
    kernel: &Kernel,
) -> Result<(), BootError> {
    let params = params(map, rsdp, initrd, kernel.header);
    super::write(memory, PARAMS, params.as_slice(), "the boot parameters")?;
    page_tables(memory)
}

fn params(map: &[MapEntry], rsdp: u64, initrd: Option<Initrd>, header: Option<setup_header>) -> boot_params {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: MAGIC,
            version: PROTOCOL,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..Default::default()
        }),
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    if let Some(initrd) = initrd {
        // Below 4 GiB by construction: the hole ends all candidates.
        params.hdr.ramdisk_image = initrd.base as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    let entries = map.iter().map(|e| boot_e820_entry {
        addr: e.base,
        size: e.size,
        r#type: if e.usable { E820_RAM } else { E820_RESERVED },
    });
    // Six entries at most; the table holds 128.
    let mut count = 0;
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(entries) {
        *slot = entry;
        count += 1;
    }
    params.e820_table = table;
    params.e820_entries = count;
    params
}

/// Maps the first GiB one to one in 2 MiB pages.
fn page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    let (pml4, pdpt, pd) = (PAGE_TABLES, PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    let what = "the page tables";
    super::write(memory, pml4, &(pdpt | PRESENT_WRITABLE).to_le_bytes(), what)?;
    super::write(memory, pdpt, &(pd | PRESENT_WRITABLE).to_le_bytes(), what)?;
    let entries: Vec<u8> =
        (0..512).flat_map(|i: u64| ((i * LARGE_SIZE) | PRESENT_WRITABLE | LARGE).to_le_bytes()).collect();
    super::write(memory, pd, &entries, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_gets_its_own_header_back() {
        let header = setup_header { version: 0x20f, setup_sects: 30, ..Default::default() };
        let map =
            [MapEntry { base: 0, size: 10, usable: true }, MapEntry { base: 10, size: 5, usable: false }];
        let params = params(&map, 0xe_0000, Some(Initrd { base: 0x3000_0000, size: 77 }), Some(header));
        let bytes = params.as_slice();
        assert_eq!(bytes.len(), 4096);
        // Offsets from zero-page.rst and boot.rst.
        assert_eq!(bytes[0x1f1], 30);
        assert_eq!(bytes[0x206..0x208], [0x0f, 0x02]);
        assert_eq!(bytes[0x210], LOADER);
        assert_eq!(bytes[0x218..0x220], [0, 0, 0, 0x30, 77, 0, 0, 0]);
        assert_eq!(bytes[0x228..0x22c], [0, 0, 2, 0]);
        assert_eq!(bytes[0x70..0x78], [0, 0, 0xe, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[0x1e8], 2);
        assert_eq!(bytes[0x2d0 + 20 + 16], E820_RESERVED as u8);
    }
}
