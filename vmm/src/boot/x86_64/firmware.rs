//! What firmware is told instead of being loaded: the items of `fw_cfg`. The kernel, if there is one, is handed over as it is, in the two parts of a
//! bzImage; firmware starts it by its EFI stub.

use std::sync::Arc;

use super::super::{BootError, Platform, acpi, cmdline};
use super::{CMDLINE_ROOM, bzimage, smbios};
use crate::boot::file::BootFile;
use crate::config::BootConfig;
use crate::device::{Content, GENERATION_ADDRESS, Items};
use crate::inherit::Inherited;
use crate::memory::GuestMemory;
use crate::memory::layout::HIGH_RAM_START;

/// The tables of ACPI as firmware reads them.
pub type AcpiFiles = acpi::Files;

/// The end of the firmware's code is here, too.
const SHADOW_SIZE: usize = 128 << 10;

// Numbers of items (docs/specs/fw_cfg).
const RAM_SIZE: u16 = 0x03;
const NO_GRAPHICS: u16 = 0x04;
const CPUS: u16 = 0x05;
const KERNEL_SIZE: u16 = 0x08;
const INITRD_SIZE: u16 = 0x0b;
const BOOT_MENU: u16 = 0x0e;
const CPUS_MAX: u16 = 0x0f;
const KERNEL_DATA: u16 = 0x11;
const INITRD_DATA: u16 = 0x12;
const CMDLINE_SIZE: u16 = 0x14;
const CMDLINE_DATA: u16 = 0x15;
const SETUP_SIZE: u16 = 0x17;
const SETUP_DATA: u16 = 0x18;

/// Usable RAM, in the memory map (ACPI 6.4 §15, "AddressRangeMemory").
const E820_RAM: u32 = 1;

/// The files that firmware starts a kernel from, open for as long as the machine may start it again.
pub struct FirmwareFiles {
    kernel: Option<Arc<BootFile>>,
    initrd: Option<Arc<BootFile>>,
}

impl FirmwareFiles {
    /// Opens them, or takes their inherited descriptors; there need not be any.
    pub fn open(config: &BootConfig, inherited: &Inherited) -> Result<Self, BootError> {
        let open = |option, path: &Option<std::path::PathBuf>| {
            path.as_ref().map(|path| BootFile::open(option, path, inherited).map(Arc::new)).transpose()
        };
        Ok(Self { kernel: open("-kernel", &config.kernel)?, initrd: open("-initrd", &config.initrd)? })
    }
}

/// The tables of ACPI for this platform.
pub fn acpi_files(platform: &Platform<'_>) -> AcpiFiles {
    acpi::files(platform)
}

/// All that firmware can ask for. `boot_order` has a path for each device that it shall boot from, each with a line's end; `tables` makes ACPI's when
/// it asks for them.
pub fn items(
    files: &FirmwareFiles,
    append: &str,
    platform: &Platform<'_>,
    boot_order: &str,
    tables: Arc<dyn Fn() -> AcpiFiles + Send + Sync>,
) -> Result<Items, BootError> {
    let mut items = Items::default();
    let ram = platform.standard.map(|standard| &standard.board.memory[..]).unwrap_or_default();
    let size: u64 = ram.iter().map(|(_, size)| size).sum();
    let bytes = |data: &[u8]| Content::Bytes(data.to_vec());
    let cpus = platform.processors.iter().filter(|present| **present).count() as u16;
    let most = platform.processors.len() as u16;
    items.number(RAM_SIZE, bytes(&size.to_le_bytes()));
    items.number(NO_GRAPHICS, bytes(&1u16.to_le_bytes()));
    items.number(CPUS, bytes(&cpus.to_le_bytes()));
    items.number(CPUS_MAX, bytes(&most.to_le_bytes()));
    items.number(BOOT_MENU, bytes(&0u16.to_le_bytes()));
    kernel(files, append, &mut items)?;

    let entry = |(base, size): &(u64, u64)| {
        let numbers = [base.to_le_bytes(), size.to_le_bytes()];
        [numbers.as_flattened(), &E820_RAM.to_le_bytes()].concat()
    };
    items.file("etc/e820", Content::Bytes(ram.iter().flat_map(entry).collect()));
    if let super::Hardware::Pcie(super::super::Pcie { window64: Some((base, _)), .. }) = &platform.hardware {
        items.file("etc/reserved-memory-end", bytes(&base.to_le_bytes()));
    }
    if let Some(standard) = platform.standard {
        let (anchor, tables) = smbios::files(&standard.board, platform, 0);
        items.file("etc/smbios/smbios-anchor", Content::Bytes(anchor));
        items.file("etc/smbios/smbios-tables", Content::Bytes(tables));
    }
    let now = tables();
    items.file("etc/acpi/rsdp", Content::Bytes(now.rsdp));
    items.file("etc/acpi/tables", Content::Made(now.tables.len(), Box::new(move || tables().tables)));
    items.file("etc/table-loader", Content::Bytes(now.loader));
    if !boot_order.is_empty() {
        let mut list = boot_order.as_bytes().to_vec();
        list.push(0);
        items.file("bootorder", Content::Bytes(list));
    }
    Ok(items)
}

fn kernel(files: &FirmwareFiles, append: &str, items: &mut Items) -> Result<(), BootError> {
    let Some(kernel) = &files.kernel else { return Ok(()) };
    let mut head = [0; 4096];
    let there = kernel.read_at(0, &mut head)?;
    // Another kind of program for firmware has no such part.
    let setup = bzimage::setup_size(head.get(..there).unwrap_or_default()).min(kernel.len());
    let mut add = |size, data, file: &Arc<BootFile>, from: u64, len: u64| {
        let short = u32::try_from(len).unwrap_or(u32::MAX);
        items.number(size, Content::Bytes(short.to_le_bytes().to_vec()));
        items.number(data, part(file, from, short.into()));
    };
    add(SETUP_SIZE, SETUP_DATA, kernel, 0, setup);
    add(KERNEL_SIZE, KERNEL_DATA, kernel, setup, kernel.len() - setup);
    if let Some(initrd) = &files.initrd {
        add(INITRD_SIZE, INITRD_DATA, initrd, 0, initrd.len());
    }
    let line = cmdline::build(append, &[], CMDLINE_ROOM)?;
    items.number(CMDLINE_SIZE, Content::Bytes((line.len() as u32).to_le_bytes().to_vec()));
    items.number(CMDLINE_DATA, Content::Bytes(line));
    Ok(())
}

/// `len` bytes of `file` from an offset on.
fn part(file: &Arc<BootFile>, from: u64, len: u64) -> Content {
    let file = Arc::clone(file);
    let read = move |offset: u64, data: &mut [u8]| match file.read_at(from.saturating_add(offset), data) {
        Ok(done) if done == data.len() => Ok(()),
        // It has become shorter.
        Ok(_) => Err(()),
        Err(error) => {
            tracing::error!("{error}");
            Err(())
        }
    };
    Content::Read(len, Box::new(read))
}

/// Puts into the BIOS area what firmware and its guest look for there: the end of `code`, and which VM this is.
pub fn shadow(memory: &GuestMemory, code: &[u8], platform: &Platform<'_>) -> Result<(), BootError> {
    let from = code.len().saturating_sub(SHADOW_SIZE);
    let end = code.get(from..).unwrap_or_default();
    const { assert!(GENERATION_ADDRESS >= HIGH_RAM_START - SHADOW_SIZE as u64) }
    super::write(memory, HIGH_RAM_START - end.len() as u64, end, "the firmware")?;
    let generation = platform.generation.write(memory);
    generation.map_err(|source| BootError::Memory { what: "the VM Generation ID", source })
}
