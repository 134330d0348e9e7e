//! The little of ACPI that we need: how many processors there are and how to power off. Falls back to the MP table.

use core::ptr::read_unaligned;

use crate::boot::BootInfo;

/// Registers of a machine that can be switched off by software.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum PowerOff {
    /// ACPI 6.4 §4.8.3.7: sleep control register of hardware-reduced machines, a port or an address, and the value to write.
    SleepControl { address: u64, port: bool, value: u8 },
    /// ACPI 6.4 §4.8.3.2: PM1a control block, a port, and the value to write.
    Pm1Control { port: u16, value: u16 },
}

/// A table found through the RSDP; a byte slice with its header.
type Table = &'static [u8];

fn bytes(at: u64, length: usize) -> &'static [u8] {
    // SAFETY: firmware tables lie in the first GiB or in RAM; `guest_main` maps both before this runs. Nothing writes them.
    unsafe { core::slice::from_raw_parts(at as *const u8, length) }
}

fn number<T: Copy>(table: &[u8], at: usize) -> Option<T> {
    let field = table.get(at..at.checked_add(size_of::<T>())?)?;
    // SAFETY: in bounds; `T` is a plain number at every use.
    Some(unsafe { read_unaligned(field.as_ptr().cast()) })
}

fn table(at: u64) -> Option<Table> {
    if at == 0 || at >= 512 << 30 {
        return None;
    }
    let length = number::<u32>(bytes(at, 36), 4)?;
    (36..=1 << 20).contains(&length).then(|| bytes(at, length as usize))
}

/// Where the RSDP is: told by the VMM, or found where a BIOS leaves it (ACPI 6.4 §5.2.5.1).
fn rsdp(boot: &BootInfo) -> Option<&'static [u8]> {
    let mut at = boot.rsdp;
    if at == 0 {
        at = (0xe_0000..0x10_0000).step_by(16).find(|at| bytes(*at, 8) == b"RSD PTR ")?;
    }
    Some(bytes(at, 36)).filter(|r| r.starts_with(b"RSD PTR "))
}

fn find(boot: &BootInfo, signature: &[u8; 4]) -> Option<Table> {
    let rsdp = rsdp(boot)?;
    let xsdt = if rsdp[15] >= 2 { number::<u64>(rsdp, 24)? } else { 0 };
    let (root, width) =
        if xsdt != 0 { (table(xsdt)?, 8) } else { (table(u64::from(number::<u32>(rsdp, 16)?))?, 4) };
    root[36..].chunks_exact(width).find_map(|entry| {
        let at = if width == 8 { number::<u64>(entry, 0)? } else { u64::from(number::<u32>(entry, 0)?) };
        table(at).filter(|t| t.starts_with(signature))
    })
}

/// Processors, the boot processor included.
pub fn processors(boot: &BootInfo) -> usize {
    let count = match find(boot, b"APIC") {
        Some(madt) => from_madt(madt),
        None => from_mp_table(),
    };
    count.max(1)
}

/// ACPI 6.4 §5.2.12: entries of type 0 (local APIC) and 9 (local x2APIC) whose flag "enabled" is set.
fn from_madt(madt: Table) -> usize {
    let (mut at, mut count) = (44, 0);
    while let (Some(kind), Some(length)) = (number::<u8>(madt, at), number::<u8>(madt, at + 1)) {
        let flags = match kind {
            0 => number::<u32>(madt, at + 4),
            9 => number::<u32>(madt, at + 8),
            _ => None,
        };
        count += usize::from(flags.is_some_and(|f| f & 1 != 0));
        if length < 2 {
            break;
        }
        at += usize::from(length);
    }
    count
}

/// MultiProcessor Specification 1.4, §4: the floating pointer in the last KiB of base memory, then entries of type 0.
fn from_mp_table() -> usize {
    let Some(at) = (0x9_fc00..0xa_0000).step_by(16).find(|at| bytes(*at, 4) == b"_MP_") else { return 0 };
    let table = u64::from(number::<u32>(bytes(at, 16), 4).unwrap_or(0));
    if table == 0 || table >= 0x10_0000 {
        return 0;
    }
    let header = bytes(table, 44);
    if !header.starts_with(b"PCMP") {
        return 0;
    }
    let entries = number::<u16>(header, 34).unwrap_or(0);
    let (mut at, mut count) = (table + 44, 0);
    for _ in 0..entries {
        let entry = bytes(at, 20);
        count += usize::from(entry[0] == 0 && entry[3] & 1 != 0);
        at += if entry[0] == 0 { 20 } else { 8 };
    }
    count
}

/// How to power off, if ACPI says.
pub fn power_off(boot: &BootInfo) -> Option<PowerOff> {
    let fadt = find(boot, b"FACP")?;
    let dsdt = match number::<u64>(fadt, 140) {
        Some(at) if at != 0 => table(at)?,
        _ => table(u64::from(number::<u32>(fadt, 40)?))?,
    };
    let kind = sleep_type(dsdt)?;
    let hardware_reduced = number::<u32>(fadt, 112)? & 1 << 20 != 0;
    if hardware_reduced {
        let (space, address) = (number::<u8>(fadt, 244)?, number::<u64>(fadt, 248)?);
        return (address != 0 && space <= 1).then_some(PowerOff::SleepControl {
            address,
            port: space == 1,
            value: kind << 2 | 1 << 5,
        });
    }
    let port = u16::try_from(number::<u32>(fadt, 64)?).ok().filter(|p| *p != 0)?;
    Some(PowerOff::Pm1Control { port, value: u16::from(kind) << 10 | 1 << 13 })
}

/// SLP_TYPa of `\_S5`: the first number in its package. Enough AML for constants (ACPI 6.4 §20.2.3).
fn sleep_type(dsdt: Table) -> Option<u8> {
    let at = dsdt.windows(5).position(|w| w == b"_S5_\x12")? + 5;
    // The package's length takes 1 to 4 bytes, then comes the number of elements.
    let first = at + usize::from(dsdt.get(at)? >> 6) + 2;
    match *dsdt.get(first)? {
        0x0a => dsdt.get(first + 1).copied(),
        small @ 0..=1 => Some(small),
        _ => None,
    }
    .filter(|kind| *kind < 8)
}
