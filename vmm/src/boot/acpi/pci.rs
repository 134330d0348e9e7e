//! The PCI Express root in the DSDT (PCI Firmware 3.3 §4).
//!
//! ```text
//! \_SB.PCI0        PNP0A08: buses 0 to 255, I/O ports, the windows for BARs
//! \_SB.PCI0._PRT   INTx: pin p of slot s is GSI first + (s + p) mod 4
//! \_SB.PCI0._OSC   gives the guest native hot-plug and the PCI Express capability, and nothing else
//! \_SB.RES0        PNP0C02: ECAM and the ACPI registers are taken
//! \_SB.RTC0        PNP0B00: the clock, with its memory
//! ```

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Local, Memory32Fixed, Method, Name, NotEqual, Or, PackageBuilder, Path, ResourceTemplate, Return, Store,
    Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::interrupt;
use crate::boot::Pcie;
use crate::device::Rtc;

/// Which document the `_OSC` call speaks of: PCI host bridges.
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// `_OSC` control field: native hot-plug, and the PCI Express capability.
const GRANTED: u32 = 1 | 1 << 4;
/// `_OSC` status: unknown UUID, unknown revision, not all that was asked for.
const BAD_UUID: u32 = 1 << 2;
const BAD_REVISION: u32 = 1 << 3;
const MASKED: u32 = 1 << 4;

const SLOTS: u32 = 32;
const PINS: u32 = 4;
const ECAM_SIZE: u32 = 256 << 20;

pub(super) struct Host(pub(super) Pcie);

impl Aml for Host {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let pcie = &self.0;
        let uncached = AddressSpaceCacheable::NotCacheable;
        let buses = AddressSpace::<u16>::new_bus_number(0, 0xff);
        let cf8 = IO::new(0xcf8, 0xcf8, 1, 8);
        let low_io = AddressSpace::<u16>::new_io(0, 0xcf7, None);
        let high_io = AddressSpace::<u16>::new_io(0xd00, 0xffff, None);
        let (base, size) = pcie.window32;
        let low =
            AddressSpace::<u32>::new_memory(uncached, true, base as u32, (base + size - 1) as u32, None);
        let high = pcie.window64.map(|(base, size)| {
            let cacheable = AddressSpaceCacheable::PreFetchable;
            AddressSpace::<u64>::new_memory(cacheable, true, base, base + size - 1, None)
        });
        let mut resources: Vec<&dyn Aml> = vec![&buses, &cf8, &low_io, &high_io, &low];
        resources.extend(high.iter().map(|h| h as &dyn Aml));
        Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &0u8),
                &Name::new("_BBN".into(), &0u8),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CCA".into(), &1u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
                &Name::new("_PRT".into(), &routing(pcie.first_pin)),
                &Osc,
            ],
        )
        .to_aml_bytes(sink);
        // Below 4 GiB: see the machine's map.
        let ecam = Memory32Fixed::new(true, pcie.ecam as u32, ECAM_SIZE);
        let (pm, sleep) = (IO::new(pcie.pm_base, pcie.pm_base, 1, 12), IO::new(pcie.sleep, pcie.sleep, 1, 2));
        Device::new(
            "RES0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam, &pm, &sleep])),
            ],
        )
        .to_aml_bytes(sink);
        let (ports, irq) = (Rtc::PORT as u16, interrupt(Rtc::GSI));
        let io = IO::new(ports, ports, 1, Rtc::PORTS as u8);
        Device::new(
            "RTC0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io, &irq])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// One package of (address, pin, source, GSI) for each pin of each slot; no source means that the last is a GSI.
fn routing(first: u32) -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in 0..SLOTS {
        for pin in 0..PINS {
            let mut entry = PackageBuilder::new();
            entry.add_element(&(slot << 16 | 0xffff));
            entry.add_element(&pin);
            entry.add_element(&ZERO);
            entry.add_element(&(first + (slot + pin) % PINS));
            table.add_element(&entry);
        }
    }
    table
}

/// `_OSC` (ACPI 6.4 §6.2.11.3): the call's buffer comes back with the status in its first word and what is granted in its third.
struct Osc;

impl Aml for Osc {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
        let (uuid, revision, buffer, asked) = (Arg(0), Arg(1), Arg(3), Local(0));
        let (first, third, one) = (0u8, 8u8, 1u8);
        let ours = Uuid::new(OSC_UUID);
        let is_ours = Equal::new(&uuid, &ours);
        let other_revision = NotEqual::new(&revision, &one);
        let less = NotEqual::new(&control, &asked);
        Method::new(
            "_OSC".into(),
            4,
            false,
            vec![
                &CreateDWordField::new(&status, &buffer, &first),
                &If::new(
                    &is_ours,
                    vec![
                        &CreateDWordField::new(&control, &buffer, &third),
                        &Store::new(&asked, &control),
                        &And::new(&control, &asked, &GRANTED),
                        &If::new(&other_revision, vec![&Or::new(&status, &status, &BAD_REVISION)]),
                        &If::new(&less, vec![&Or::new(&status, &status, &MASKED)]),
                    ],
                ),
                &Else::new(vec![&Or::new(&status, &status, &BAD_UUID)]),
                &Return::new(&buffer),
            ],
        )
        .to_aml_bytes(sink);
    }
}
