//! The MP table: processors and interrupts for kernels that do not read ACPI (Intel MultiProcessor Specification 1.4 §4).

use super::super::{BootError, Platform};
use super::write;
use crate::irq::{IOAPIC_BASE, IOAPIC_PINS, LAPIC_BASE};
use crate::memory::GuestMemory;
use crate::memory::layout::EBDA_START;

/// Kernels look for the floating pointer in the first KiB of the EBDA, among other places.
const POINTER: u64 = EBDA_START;
const POINTER_SIZE: usize = 16;
/// The configuration table follows the pointer if it fits below 640 KiB, else it lies here, in the reserved BIOS area.
const FAR_TABLE: u64 = 0xf_0000;
const EBDA_ROOM: usize = 1024 - POINTER_SIZE;

const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// CPUID 1 EDX as the table wants it: FPU and APIC on chip.
const CPU_FEATURES: u32 = 0x201;
const BUS_ISA: u8 = 0;

// Entry types.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

// Interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

const ALL_LAPICS: u8 = 0xff;

pub(super) fn write_all(memory: &GuestMemory, platform: &Platform<'_>) -> Result<(), BootError> {
    let present = (0u8..).zip(platform.processors).filter(|(_, present)| **present);
    let ids: Vec<u8> = present.map(|(index, _)| platform.topology.apic_id(index) as u8).collect();
    let table = table(&ids);
    let near = table.len() <= EBDA_ROOM;
    let at = if near { POINTER + POINTER_SIZE as u64 } else { FAR_TABLE };
    let what = "the MP table";
    let pointer = pointer(at as u32);
    if near {
        return write(memory, POINTER, &[&pointer[..], &table].concat(), what);
    }
    write(memory, POINTER, &pointer, what)?;
    write(memory, at, &table, what)
}

/// The byte that makes the sum of all zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

fn pointer(table: u32) -> [u8; POINTER_SIZE] {
    let mut bytes = [0; POINTER_SIZE];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&table.to_le_bytes());
    bytes[8] = 1; // length in paragraphs
    bytes[9] = SPEC_1_4;
    bytes[10] = checksum(&bytes);
    bytes
}

fn table(apic_ids: &[u8]) -> Vec<u8> {
    // An id that no processor has.
    let ioapic_id = apic_ids.last().map_or(0, |id| id.saturating_add(1));
    let mut entries = Vec::new();
    for (i, id) in apic_ids.iter().enumerate() {
        let flags = CPU_ENABLED | if i == 0 { CPU_BOOT } else { 0 };
        entries.extend([PROCESSOR, *id, APIC_VERSION, flags, 0, 0, 0, 0]);
        entries.extend(CPU_FEATURES.to_le_bytes());
        entries.extend([0; 8]);
    }
    entries.extend([BUS, BUS_ISA]);
    entries.extend(b"ISA   ");
    entries.extend([IOAPIC, ioapic_id, IOAPIC_VERSION, 1]);
    entries.extend(IOAPIC_BASE.to_le_bytes());
    // Interrupt n of the bus is pin n, with the bus's own trigger and polarity: edge, high.
    for pin in 0..IOAPIC_PINS as u8 {
        entries.extend([IO_INTERRUPT, INT, 0, 0, BUS_ISA, pin, ioapic_id, pin]);
    }
    entries.extend([LOCAL_INTERRUPT, EXT_INT, 0, 0, BUS_ISA, 0, 0, 0]);
    entries.extend([LOCAL_INTERRUPT, NMI, 0, 0, BUS_ISA, 0, ALL_LAPICS, 1]);

    let count = apic_ids.len() as u16 + 1 + 1 + IOAPIC_PINS as u16 + 2;
    let mut table = b"PCMP".to_vec();
    table.extend((44 + entries.len() as u16).to_le_bytes());
    table.extend([SPEC_1_4, 0]);
    table.extend(b"FLOTILLAMICROVM     ");
    table.extend([0; 6]); // no OEM table
    table.extend(count.to_le_bytes());
    table.extend(LAPIC_BASE.to_le_bytes());
    table.extend([0; 4]); // no extended table
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_true() {
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
        assert_eq!(sum(&pointer(0x1234_5678)), 0);
        for cpus in [1, 2, 254] {
            let ids: Vec<u8> = (0..cpus).collect();
            let table = table(&ids);
            assert_eq!(sum(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(table.len(), 44 + usize::from(cpus) * 20 + 8 + 8 + 24 * 8 + 16);
            assert!((table.len() <= EBDA_ROOM) == (cpus < 37), "{cpus}");
        }
    }
}
