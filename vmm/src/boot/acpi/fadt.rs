//! FADT (ACPI 6.4 §5.2.9): says what ACPI hardware there is. On a microvm none but the reset and sleep registers; on a q35 the fixed registers with
//! the power button and the timer.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::boot::{AcpiPorts, Pcie};
use crate::device::RESET_VALUE;

// IAPC_BOOT_ARCH (§5.2.9.3). The bits for legacy devices and an 8042 are left clear: a kernel need not probe for them.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// What the reset register of a q35 takes for "now" (ICH9 §13.7.5).
const RESET_NOW: u8 = 0x0f;
/// Where the clock keeps the century.
const CENTURY: u8 = 0x32;
// Bytes of the fixed registers.
const EVENTS: u8 = 4;
const CONTROL: u8 = 2;
const TIMER: u8 = 4;
/// "Not supported" for the latencies of C2 and C3 (§5.2.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

fn register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn block(port: u16, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, u64::from(port))
}

/// Of a q35. SMI_CMD is zero: the machine is in ACPI mode from the start (§4.8.2.5). The power button is the fixed one.
pub(super) fn full(dsdt: u64, facs: u64, pcie: &Pcie) -> FADT {
    let (control, timer) = (pcie.pm_base + 4, pcie.pm_base + 8);
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        // Below 4 GiB like all tables; in this field alone, as both would have to agree.
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        // Set: the clock wakes nobody from sleep.
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = (pcie.sci as u16).into();
    fadt.pm1a_evt_blk = u32::from(pcie.pm_base).into();
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm_tmr_blk = u32::from(timer).into();
    (fadt.pm1_evt_len, fadt.pm1_cnt_len, fadt.pm_tmr_len) = (EVENTS, CONTROL, TIMER);
    fadt.x_pm1a_evt_blk = block(pcie.pm_base, EVENTS, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = block(control, CONTROL, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = block(timer, TIMER, AccessSize::DwordAccess);
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (NO_C2.into(), NO_C3.into());
    fadt.iapc_boot_arch = NO_VGA.into();
    fadt.century = CENTURY;
    fadt.reset_reg = register(pcie.reset);
    fadt.reset_value = RESET_NOW;
    fadt.sleep_control_reg = register(pcie.sleep);
    fadt.sleep_status_reg = register(pcie.sleep + 1);
    fadt.finalize()
}

/// Of a microvm.
pub(super) fn reduced(dsdt: u64, ports: &AcpiPorts) -> FADT {
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
