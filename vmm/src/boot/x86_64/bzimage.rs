//! bzImage: a compressed Linux kernel with a setup header (Documentation/arch/x86/boot.rst, "The real-mode kernel header").

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued as _;

use super::{CMDLINE_LIMIT, CMDLINE_ROOM, Entry, Kernel};
use crate::boot::BootError;
use crate::boot::file::BootFile;
use crate::memory::GuestMemory;
use crate::memory::layout::HIGH_RAM_START;

const HEADER: usize = 0x1f1;
const MAGIC: usize = 0x202;
/// Protocol 2.12 (Linux 3.8) brought `xloadflags`, without which a 64-bit entry cannot be known.
const MIN_VERSION: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry lies this far into the protected-mode part.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

pub(super) fn is(head: &[u8]) -> bool {
    head.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

/// Bytes before the protected-mode part; none in a file of another kind.
pub(super) fn setup_size(head: &[u8]) -> u64 {
    match head.get(HEADER) {
        Some(sectors) if is(head) => setup_bytes(*sectors),
        _ => 0,
    }
}

fn setup_bytes(sectors: u8) -> u64 {
    let sectors = if sectors == 0 { 4 } else { u64::from(sectors) };
    (sectors + 1) * SECTOR
}

pub(super) fn load(
    file: &mut BootFile,
    head: &[u8],
    memory: &GuestMemory,
    low_end: u64,
) -> Result<Kernel, BootError> {
    // The header's own length is the jump at 0x200: it ends at 0x202 + the byte at 0x201.
    let mut header = setup_header::default();
    let size = size_of::<setup_header>();
    let there = head.get(HEADER..).unwrap_or_default();
    if there.len() < size {
        return Err(file.not_a_kernel("is a bzImage cut short in its header: copy it again"));
    }
    header.as_mut_slice().copy_from_slice(&there[..size]);
    let (version, loadflags, xloadflags) = (header.version, header.loadflags, header.xloadflags);
    if version < MIN_VERSION {
        return Err(file.not_a_kernel(format!(
            "boot protocol {}.{} is too old: Linux 3.8 or newer is needed",
            version >> 8,
            version & 0xff
        )));
    }
    if loadflags & LOADED_HIGH == 0 {
        return Err(file.not_a_kernel("is a zImage; a bzImage is needed"));
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(file.not_a_kernel("is a 32-bit kernel; an x86_64 kernel is needed"));
    }

    let payload = setup_bytes(header.setup_sects);
    // `syssize` counts the protected-mode part in paragraphs; the file may be longer (signatures) but never shorter.
    let claimed = u64::from(header.syssize) * 16;
    let size = file.len().saturating_sub(payload);
    // The last paragraph need not be whole.
    if size <= ENTRY_64 || claimed > size.saturating_add(15) {
        return Err(file.not_a_kernel(format!(
            "is cut short: its header promises {} bytes, the file has {}: copy it again",
            payload.saturating_add(claimed),
            file.len()
        )));
    }

    // Where the kernel unpacks itself: at the load address if it is relocatable and that is high enough, at its preferred
    // address otherwise (arch/x86/boot/compressed/head_64.S). It may overwrite `init_size` bytes from there.
    let load = HIGH_RAM_START;
    let (pref, init_size) = (header.pref_address, u64::from(header.init_size));
    let end = load.max(pref).saturating_add(init_size).max(load.saturating_add(size));
    file.check_fits(end, low_end)?;
    file.copy(payload, memory, load, size)?;
    header.code32_start = load as u32;
    let cmdline_limit = match header.cmdline_size as usize {
        0 => CMDLINE_LIMIT,
        n => n.min(CMDLINE_ROOM),
    };
    Ok(Kernel {
        entry: Entry::Linux64(load + ENTRY_64),
        initrd_limit: u64::from(header.initrd_addr_max) + 1,
        header: Some(header),
        end,
        cmdline_limit,
    })
}
