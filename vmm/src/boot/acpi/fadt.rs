//! FADT (ACPI 6.4 §5.2.9): says that there is no ACPI hardware but the reset and sleep registers.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::boot::AcpiPorts;
use crate::device::RESET_VALUE;

// IAPC_BOOT_ARCH (§5.2.9.3). The bits for legacy devices and an 8042 are left clear: a kernel need not probe for them.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

fn register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

pub(super) fn table(dsdt: u64, ports: &AcpiPorts) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        // Set: there are no fixed power and sleep buttons. Later ones are devices in the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = register(ports.reset);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(ports.sleep_control);
    fadt.sleep_status_reg = register(ports.sleep_status);
    fadt.finalize()
}
