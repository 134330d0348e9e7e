//! DSDT: the devices that cannot be found by looking, and the soft-off state.
//!
//! ```text
//! \_S5    soft off, through the sleep control register
//! \_SB.CLMP/CLMF   the claim port
//! \_SB.PWRB        PNP0C0C, the power button; \_SB.GED (ACPI0013) tells the guest of it when its interrupt comes
//! \_SB.COM1        PNP0501, when there is a serial port
//! \_SB.Vxxx        LNRO0005: virtio-mmio device xxx (hexadecimal). _STA writes xxx to the claim port.
//! ```
//!
//! A q35 has the first and COM1, and what `pci` and `cpus` add; every board what `generation` adds.
//!
//! A kernel with ACPI runs `_STA` of every device before it binds drivers, and so claims it; one without never does.
//! That is how the machine knows which of the device's two register windows the kernel will use.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
    Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Return,
    Scope, Store,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::generation::Generation;
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, STA_PRESENT, cpus, interrupt, pci};
use crate::boot::{Hardware, MmioSlot, Platform, Reduced, SerialPort};
use crate::device::SLEEP_TYPE_S5;

const REVISION: u8 = 2;
const HEADER: u32 = 36;

pub(super) fn table(platform: &Platform<'_>) -> Sdt {
    let mut aml = Vec::new();
    let (typ, zero) = (SLEEP_TYPE_S5, 0u8);
    Name::new("_S5_".into(), &Package::new(vec![&typ, &typ, &zero, &zero])).to_aml_bytes(&mut aml);

    let com1 = platform.serial.map(Com1);
    match &platform.hardware {
        Hardware::Reduced(reduced) => mmio_devices(reduced, com1.as_ref(), &mut aml),
        Hardware::Pcie(pcie) => {
            let host = pci::Host(*pcie);
            let mut children: Vec<&dyn Aml> = vec![&host, &Generation];
            let more = usize::from(platform.boot_cpus) < platform.processors.len();
            let processors = more.then_some(cpus::Processors { platform, events: pcie.events });
            children.extend(processors.iter().map(|p| p as &dyn Aml));
            children.extend(com1.iter().map(|d| d as &dyn Aml));
            Scope::new("_SB_".into(), children).to_aml_bytes(&mut aml);
        }
    }

    let mut table = Sdt::new(*b"DSDT", HEADER, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&aml);
    table
}

fn mmio_devices(reduced: &Reduced<'_>, com1: Option<&Com1>, aml: &mut Vec<u8>) {
    let (port, one) = (reduced.acpi.claim, 1u8);
    let region = OpRegion::new("CLMP".into(), OpRegionSpace::SystemIO, &port, &one);
    let field = Field::new(
        "CLMP".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"CLMF", 8)],
    );
    let button = PowerButton(reduced.button_irq);
    let devices: Vec<Virtio> =
        (0..).zip(reduced.slots).map(|(number, slot)| Virtio { number, slot }).collect();
    let mut children: Vec<&dyn Aml> = vec![&region, &field, &button, &Generation];
    children.extend(com1.map(|d| d as &dyn Aml));
    children.extend(devices.iter().map(|d| d as &dyn Aml));
    Scope::new("_SB_".into(), children).to_aml_bytes(aml);
}

/// Notification of a button that was pressed while the machine is on (ACPI 6.4 §4.8.2.2.1.2).
const PRESSED: u8 = 0x80;

/// The power button, and the generic event device that turns its interrupt into a notification (ACPI 6.4 §5.6.9): what a
/// hardware-reduced platform has instead of the fixed button.
struct PowerButton(u32);

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "PWRB".into(),
            vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &0u8)],
        )
        .to_aml_bytes(sink);
        let (button, event) = (Path::new("PWRB"), Arg(0));
        let notify = Notify::new(&button, &PRESSED);
        let ours = Equal::new(&event, &self.0);
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt(self.0)])),
                &Method::new("_EVT".into(), 1, true, vec![&If::new(&ours, vec![&notify])]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The first serial port. A hardware-reduced Linux gives ports no interrupt that ACPI does not name.
struct Com1(SerialPort);

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (io, irq) = (IO::new(self.0.port, self.0.port, 1, 8), interrupt(self.0.irq));
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io, &irq])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Virtio<'a> {
    number: u8,
    slot: &'a MmioSlot,
}

impl Aml for Virtio<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        // The window lies below 4 GiB: see the machine's map.
        let memory = Memory32Fixed::new(true, self.slot.acpi_base as u32, self.slot.size);
        let irq = interrupt(self.slot.irq);
        let (port, present) = (Path::new("CLMF"), STA_PRESENT);
        let claim = Store::new(&port, &self.number);
        Device::new(
            Path::new(&format!("V{:03X}", self.number)),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &self.number),
                &Name::new("_CCA".into(), &1u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &irq])),
                &Method::new("_STA".into(), 0, true, vec![&claim, &Return::new(&present)]),
            ],
        )
        .to_aml_bytes(sink);
    }
}
