//! ACPI tables (ACPI 6.4): a hardware-reduced platform with its processors, its serial port and its virtio-mmio devices, or one with ACPI hardware
//! and a PCI Express root.
//!
//! One file for each table. The blob is built in host memory and written once: RSDP first, where kernels that are not told its
//! address look for it. Firmware takes the tables where it likes, and is told what to change in them (`loader`).

mod cpus;
mod dsdt;
mod fadt;
mod generation;
mod loader;
mod madt;
mod numa;
mod pci;

use acpi_tables::aml::Interrupt;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, Hardware, Platform};
use crate::memory::GuestMemory;

pub(super) use loader::Files;

const OEM_ID: [u8; 6] = *b"FLOTIL";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// Tables start at multiples of this, the FACS (ACPI 6.4 §5.2.10) as the strictest.
const ALIGN: usize = 64;

/// `_STA`: present, enabled, shown, working.
const STA_PRESENT: u8 = 0x0f;

/// A line of ours: edge-triggered, active high, not shared.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// The FACS: no table like the others. Platforms with ACPI hardware must have one; its lock and its waking vectors stay unused.
struct Facs;

impl Aml for Facs {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const LENGTH: u32 = 64;
        const VERSION: u8 = 2;
        sink.vec(b"FACS");
        sink.dword(LENGTH);
        // Hardware signature, waking vector, lock, flags, 64-bit waking vector.
        sink.vec(&[0; 24]);
        sink.byte(VERSION);
        sink.vec(&[0; 31]);
    }
}

/// Writes all tables from `at` on; returns the address of the RSDP.
pub(super) fn write(memory: &GuestMemory, at: u64, platform: &Platform<'_>) -> Result<u64, BootError> {
    memory
        .write_slice(&tables(at, platform).blob, GuestAddress(at))
        .map_err(|source| BootError::Memory { what: "the ACPI tables", source })?;
    let generation = platform.generation.write(memory);
    generation.map_err(|source| BootError::Memory { what: "the VM Generation ID", source })?;
    Ok(at)
}

/// The tables as files for firmware.
pub(super) fn files(platform: &Platform<'_>) -> Files {
    loader::files(tables(0, platform))
}

/// Tables in one piece, the RSDP first, and where in it those lie that point to others.
struct Tables {
    blob: Vec<u8>,
    fadt: usize,
    xsdt: usize,
}

fn tables(at: u64, platform: &Platform<'_>) -> Tables {
    let mut blob = vec![0; Rsdp::len()];
    let mut add = |table: &dyn Aml| {
        blob.resize(blob.len().next_multiple_of(ALIGN), 0);
        let address = at + blob.len() as u64;
        table.to_aml_bytes(&mut blob);
        address
    };
    let dsdt = add(&dsdt::table(platform));
    let facs = match &platform.hardware {
        Hardware::Reduced(_) => 0,
        Hardware::Pcie(_) => add(&Facs),
    };
    let fadt = match &platform.hardware {
        Hardware::Reduced(reduced) => fadt::reduced(dsdt, &reduced.acpi),
        Hardware::Pcie(pcie) => fadt::full(dsdt, facs, pcie),
    };
    let fadt = add(&fadt);
    let madt = add(&madt::table(platform));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let Hardware::Pcie(pcie) = &platform.hardware {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        mcfg.add_ecam(pcie.ecam, 0, 0, u8::MAX);
        xsdt.add_entry(add(&mcfg));
    }
    let nodes = platform.standard.map(|standard| &standard.numa[..]).unwrap_or_default();
    if !nodes.is_empty() {
        xsdt.add_entry(add(&numa::srat(platform, nodes)));
        xsdt.add_entry(add(&numa::slit(nodes)));
    }
    let xsdt = add(&xsdt);
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    blob[..rsdp.len()].copy_from_slice(&rsdp);
    let offset = |address: u64| (address - at) as usize;
    Tables { blob, fadt: offset(fadt), xsdt: offset(xsdt) }
}

#[cfg(test)]
mod tests;
