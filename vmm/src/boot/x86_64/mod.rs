//! Loading a kernel on x86_64: which of the three kinds the file is, where its parts go, and the state of the first vCPU.
//!
//! ```text
//! 0x500 GDT · 0x7000 boot_params or start_info · 0x9000 page tables · 0x2_0000 command line · 0x9_fc00 MP table
//! 0xe_0000 ACPI · 0xf_8000 SMBIOS · 0xf_fff0 reset vector · 0x10_0000 bzImage (ELF: where it says) · 0x100_0000 raw kernel · initrd as high as possible
//! ```

mod bzimage;
mod elf;
mod firmware;
mod initrd;
mod linux64;
mod mptable;
mod pvh;
mod raw;
mod smbios;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::file::BootFile;
use super::{BootError, Hardware, Platform, acpi, cmdline};
use crate::config::BootConfig;
use crate::cpu::x86_64::BootState;
use crate::inherit::Inherited;
use crate::memory::GuestMemory;
use crate::memory::layout::{EBDA_START, GAP_END, GAP_START, HIGH_RAM_START};

pub use firmware::{AcpiFiles, FirmwareFiles, acpi_files, items, shadow};
pub use smbios::Board;

const GDT: u64 = 0x500;
/// `boot_params` of the Linux protocol, or `start_info` of PVH.
const PARAMS: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const BOOT_STACK: u64 = 0x8ff0;
const CMDLINE: u64 = 0x2_0000;
/// The conventional `COMMAND_LINE_SIZE` of x86, for kernels that do not say; the final NUL is not counted.
const CMDLINE_LIMIT: usize = 2047;
/// There is room for this much before the EBDA, whatever a kernel claims to take.
const CMDLINE_ROOM: usize = 0x1_0000;
const BIOS_AREA: u64 = 0xe_0000;
/// 256 buses of 32 devices of 8 functions of 4 KiB.
const ECAM_SIZE: u64 = 256 << 20;

/// Where a processor in real mode begins after a reset (F000:FFF0).
const RESET_VECTOR: u64 = 0xf_fff0;
/// Pulses the reset line of the keyboard controller: `mov al, 0xfe; out 0x64, al; hlt; jmp` to the `hlt`.
///
/// The only firmware there is. Linux (6.1 and others) takes every hardware-reduced platform for an EFI one, finds no EFI when it reboots, and jumps
/// here without having tried the ACPI reset register.
const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// How a loaded kernel wants to be entered.
enum Entry {
    /// At this address, by the 64-bit protocol.
    Linux64(u64),
    /// At this address, by PVH.
    Pvh(u32),
}

/// A kernel in guest memory.
struct Kernel {
    entry: Entry,
    /// The setup header of a bzImage, to be handed back to it.
    header: Option<linux_loader::bootparam::setup_header>,
    /// One past the last byte that the kernel may overwrite before it looks at the memory map.
    end: u64,
    /// The initrd must lie below this.
    initrd_limit: u64,
    cmdline_limit: usize,
}

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initrd {
    base: u64,
    size: u64,
}

/// One stretch of the memory map as kernels are told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MapEntry {
    base: u64,
    size: u64,
    usable: bool,
}

/// The files that the guest starts from, open for as long as the machine may start it again.
pub struct BootFiles {
    kernel: BootFile,
    initrd: Option<BootFile>,
}

impl BootFiles {
    /// Opens them, or takes their inherited descriptors.
    pub fn open(config: &BootConfig, inherited: &Inherited) -> Result<Self, BootError> {
        let path = config.kernel.as_ref().ok_or(BootError::NoKernel)?;
        let kernel = BootFile::open("-kernel", path, inherited)?;
        let initrd = config.initrd.as_ref().map(|path| BootFile::open("-initrd", path, inherited));
        Ok(Self { kernel, initrd: initrd.transpose()? })
    }
}

/// Puts everything into guest memory and says how the first vCPU starts. May be called again when the guest is to start again.
pub fn load(
    memory: &GuestMemory,
    files: &mut BootFiles,
    append: &str,
    platform: &Platform<'_>,
) -> Result<BootState, BootError> {
    let kernel = load_kernel(&mut files.kernel, memory, platform.dirty_memory)?;

    let words: Vec<String> = match &platform.hardware {
        Hardware::Reduced(reduced) => reduced.slots.iter().map(cmdline::virtio_mmio).collect(),
        Hardware::Pcie(_) => Vec::new(),
    };
    let line = cmdline::build(append, &words, kernel.cmdline_limit)?;
    write(memory, CMDLINE, &line, "the command line")?;

    let initrd = match &mut files.initrd {
        Some(file) => Some(initrd::load(file, memory, &kernel)?),
        None => None,
    };
    let mut map = memory_map(memory);
    if let Hardware::Pcie(pcie) = &platform.hardware {
        // Linux uses ECAM only where the memory map keeps it free (PCI Firmware 3.3 §4.1.2).
        map.push(MapEntry { base: pcie.ecam, size: ECAM_SIZE, usable: false });
        map.sort_by_key(|entry| entry.base);
    }
    let rsdp = acpi::write(memory, BIOS_AREA, platform)?;
    mptable::write_all(memory, platform)?;
    if let Some(standard) = platform.standard {
        smbios::write_all(memory, &standard.board, platform)?;
    }
    write(memory, RESET_VECTOR, &RESET_CODE, "the reset vector")?;
    let state = match kernel.entry {
        Entry::Linux64(entry) => {
            linux64::write(memory, &map, rsdp, initrd, &kernel)?;
            BootState::Linux64 {
                entry,
                zero_page: PARAMS,
                page_table: PAGE_TABLES,
                stack: BOOT_STACK,
                gdt: GDT,
            }
        }
        Entry::Pvh(entry) => {
            pvh::write(memory, &map, rsdp, initrd)?;
            BootState::Pvh { entry, start_info: PARAMS as u32, gdt: GDT }
        }
    };
    let gdt: Vec<u8> = state.gdt().iter().flat_map(|d| d.to_le_bytes()).collect();
    write(memory, GDT, &gdt, "the GDT")?;
    Ok(state)
}

fn load_kernel(file: &mut BootFile, memory: &GuestMemory, dirty: bool) -> Result<Kernel, BootError> {
    // Enough for the setup header of a bzImage and the program headers of most ELF files.
    let mut head = [0; 4096];
    let len = file.read_at(0, &mut head)?;
    let head = &head[..len];
    let low_end = low_ram_end(memory);
    if bzimage::is(head) {
        bzimage::load(file, head, memory, low_end)
    } else if elf::is(head) {
        elf::load(file, head, memory, low_end, dirty)
    } else {
        raw::load(file, head, memory, low_end)
    }
}

/// Where RAM below the hole ends.
fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory.find_region(GuestAddress(0)).map_or(0, vm_memory::GuestMemoryRegion::len)
}

/// RAM as the guest may use it, ascending.
fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    let entry = |base, end: u64, usable| MapEntry { base, size: end - base, usable };
    let mut map = vec![
        entry(0, EBDA_START, true),
        entry(EBDA_START, 0xa_0000, false),
        entry(BIOS_AREA, HIGH_RAM_START, false),
    ];
    for region in memory.iter() {
        let base = region.start_addr().0.max(HIGH_RAM_START);
        let end = region.start_addr().0 + region.len();
        debug_assert!(end <= GAP_START || base >= GAP_END);
        if end > base {
            map.push(entry(base, end, true));
        }
    }
    map
}

fn write(memory: &GuestMemory, at: u64, data: &[u8], what: &'static str) -> Result<(), BootError> {
    memory.write_slice(data, GuestAddress(at)).map_err(|source| BootError::Memory { what, source })
}

#[cfg(test)]
mod tests;
