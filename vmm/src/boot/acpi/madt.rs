//! MADT (ACPI 6.4 §5.2.12): processors and interrupt controllers. GSI n is pin n, ISA or not; an override says only that ACPI's own interrupt is
//! level-triggered where there is one.

use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::{Aml, AmlSink};
use zerocopy::{Immutable, IntoBytes};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::boot::{Hardware, Platform};
use crate::irq::{IOAPIC_BASE, LAPIC_BASE};

/// Local APIC NMI structure (§5.2.12.7), which the crate lacks.
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct LocalApicNmi {
    kind: u8,
    length: u8,
    processor_uid: u8,
    flags: [u8; 2],
    lint: u8,
}

impl Aml for LocalApicNmi {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

/// Interrupt source override (§5.2.12.5), which the crate lacks.
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct Override {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    gsi: [u8; 4],
    flags: [u8; 2],
}

impl Aml for Override {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

const OVERRIDE: u8 = 2;
/// Active high, level-triggered.
const LEVEL_HIGH: u16 = 0xd;
const LOCAL_APIC_NMI: u8 = 4;
const ALL_PROCESSORS: u8 = 0xff;

pub(super) fn table(platform: &Platform<'_>) -> MADT {
    let address = LocalInterruptController::Address(LAPIC_BASE);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, address);
    for (index, present) in (0u8..).zip(platform.processors) {
        // The topology has checked that every id fits.
        let id = platform.topology.apic_id(index) as u8;
        let status = if *present { EnabledStatus::Enabled } else { EnabledStatus::DisabledOnlineCapable };
        madt.add_structure(ProcessorLocalApic::new(index, id, status));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_BASE, 0));
    if let Hardware::Pcie(pcie) = &platform.hardware {
        madt.add_structure(Override {
            kind: OVERRIDE,
            length: size_of::<Override>() as u8,
            bus: 0,
            source: pcie.sci as u8,
            gsi: pcie.sci.to_le_bytes(),
            flags: LEVEL_HIGH.to_le_bytes(),
        });
    }
    madt.add_structure(LocalApicNmi {
        kind: LOCAL_APIC_NMI,
        length: size_of::<LocalApicNmi>() as u8,
        processor_uid: ALL_PROCESSORS,
        flags: [0; 2],
        lint: 1,
    });
    madt
}
