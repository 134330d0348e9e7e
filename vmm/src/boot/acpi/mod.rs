//! ACPI tables (ACPI 6.4): a hardware-reduced platform with its processors, its serial port and its virtio-mmio devices.
//!
//! One file for each table. The blob is built in host memory and written once: RSDP first, where kernels that are not told its
//! address look for it.

mod dsdt;
mod fadt;
mod madt;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, Platform};
use crate::memory::GuestMemory;

const OEM_ID: [u8; 6] = *b"FLOTIL";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// Tables start at multiples of this.
const ALIGN: usize = 16;

/// Writes all tables from `at` on; returns the address of the RSDP.
pub(super) fn write(memory: &GuestMemory, at: u64, platform: &Platform<'_>) -> Result<u64, BootError> {
    memory
        .write_slice(&tables(at, platform), GuestAddress(at))
        .map_err(|source| BootError::Memory { what: "the ACPI tables", source })?;
    Ok(at)
}

fn tables(at: u64, platform: &Platform<'_>) -> Vec<u8> {
    let mut blob = vec![0; Rsdp::len()];
    let mut add = |table: &dyn Aml| {
        blob.resize(blob.len().next_multiple_of(ALIGN), 0);
        let address = at + blob.len() as u64;
        table.to_aml_bytes(&mut blob);
        address
    };
    let dsdt = add(&dsdt::table(platform));
    let fadt = add(&fadt::table(dsdt, &platform.acpi));
    let madt = add(&madt::table(platform));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = add(&xsdt);
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    blob[..rsdp.len()].copy_from_slice(&rsdp);
    blob
}

#[cfg(test)]
mod tests;
