//! The VM Generation ID in the DSDT of every board.
//!
//! ```text
//! \_SB.VGEN        VM_Gen_Counter: ADDR says where the sixteen bytes lie
//! \_SB.GEDV        ACPI0013 (ACPI 6.4 §5.6.9): its interrupt notifies VGEN
//! ```
//!
//! A generic event device of its own: it needs no register to tell it from other events.

use acpi_tables::aml::{Device, Method, Name, Notify, Package, Path, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};

use super::interrupt;
use crate::device::{GENERATION_ADDRESS, GENERATION_IRQ};

/// By which drivers know the device, whatever its `_HID`.
const KIND: &str = "VM_Gen_Counter";
/// The sixteen bytes have changed.
const CHANGED: u8 = 0x80;
/// The first event device is the power button's.
const UID: u8 = 1;

pub(super) struct Generation;

impl Aml for Generation {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (low, high) = (GENERATION_ADDRESS as u32, (GENERATION_ADDRESS >> 32) as u32);
        Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"FLOT0001"),
                &Name::new("_CID".into(), &KIND),
                &Name::new("_DDN".into(), &KIND),
                &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
            ],
        )
        .to_aml_bytes(sink);
        let device = Path::new("VGEN");
        let notify = Notify::new(&device, &CHANGED);
        Device::new(
            "GEDV".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &UID),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt(GENERATION_IRQ)])),
                &Method::new("_EVT".into(), 1, true, vec![&notify]),
            ],
        )
        .to_aml_bytes(sink);
    }
}
