//! Processors that come and go, in the DSDT of a machine that has room for more than it starts with.
//!
//! ```text
//! \_SB.GED         ACPI0013: its interrupt says that something has happened; _EVT reads what, and calls who it concerns
//! \_SB.PRES        the registers (see `device::CpuController`) and the methods that use them
//!   .CSTA(n) .CEJ(n)   whether processor n is there; it has been let go
//!   .CSCN()            looks who has come or is to leave, and tells the guest
//!   .Cnnn          ACPI0007: processor nnn (decimal), with _STA, _MAT and, if it can leave, _EJ0
//! ```

use acpi_tables::aml::{
    Acquire, Add, And, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, If, LessThan, Local, Method, MethodCall, Mutex, Name, Notify, OpRegion,
    OpRegionSpace, Path, Release, ResourceTemplate, Return, Store, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::{STA_PRESENT, interrupt};
use crate::boot::{EventRegisters, Platform};
use crate::device::EVENT_CPUS;

/// `Notify` of a processor: look whether it is there; let it go (ACPI 6.4 §5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
const PRESENT: u8 = 1;
const CAME: u8 = 2;
const LEAVES: u8 = 4;
/// For ever: whoever holds the mutex gives it back in a moment.
const NO_TIMEOUT: u16 = 0xffff;

pub(super) struct Processors<'a> {
    pub(super) platform: &'a Platform<'a>,
    pub(super) events: EventRegisters,
}

fn name(index: u8) -> String {
    format!("C{index:03}")
}

impl Aml for Processors<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        self.event_device(sink);
        let (address, size) = (self.events.cpus, 3u8);
        let region = OpRegion::new("PRST".into(), OpRegionSpace::SystemMemory, &address, &size);
        let field = Field::new(
            "PRST".into(),
            FieldAccessType::Byte,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            vec![
                FieldEntry::Named(*b"CSEL", 8),
                FieldEntry::Named(*b"CSTS", 8),
                FieldEntry::Named(*b"CEJT", 8),
            ],
        );
        let (hid, uid) = (EISAName::new("PNP0A06"), "processors");
        let (hid, uid) = (Name::new("_HID".into(), &hid), Name::new("_UID".into(), &uid));
        let mutex = Mutex::new("CPLK".into(), 0);
        let most = self.platform.processors.len() as u8;
        let processors: Vec<Processor<'_>> =
            (0..most).map(|index| Processor { index, platform: self.platform }).collect();
        let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &region, &field, &mutex, &Status, &Eject];
        children.extend(processors.iter().map(|p| p as &dyn Aml));
        let (tell, scan) = (Tell(most), Scan(most));
        children.extend([&tell as &dyn Aml, &scan]);
        Device::new("PRES".into(), children).to_aml_bytes(sink);
    }
}

impl Processors<'_> {
    fn event_device(&self, sink: &mut dyn AmlSink) {
        let (address, size) = (self.events.events, 4u8);
        let (events, register) = (Local(0), Path::new("GEDF"));
        let scan = MethodCall::new("\\_SB_.PRES.CSCN".into(), vec![]);
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt(self.events.gsi)])),
                &OpRegion::new("GEDR".into(), OpRegionSpace::SystemMemory, &address, &size),
                &Field::new(
                    "GEDR".into(),
                    FieldAccessType::DWord,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    vec![FieldEntry::Named(*b"GEDF", 32)],
                ),
                &Method::new(
                    "_EVT".into(),
                    1,
                    true,
                    vec![
                        // Reading clears: once.
                        &Store::new(&events, &register),
                        &If::new(&And::new(&ZERO, &events, &EVENT_CPUS), vec![&scan]),
                    ],
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// `CSTA(n)`.
struct Status;

impl Aml for Status {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (select, status, number, found) = (Path::new("CSEL"), Path::new("CSTS"), Arg(0), Local(0));
        Method::new(
            "CSTA".into(),
            1,
            true,
            vec![
                &Acquire::new("CPLK".into(), NO_TIMEOUT),
                &Store::new(&select, &number),
                &And::new(&found, &status, &PRESENT),
                &Release::new("CPLK".into()),
                &If::new(&found, vec![&Return::new(&STA_PRESENT)]),
                &Return::new(&ZERO),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// `CEJ(n)`.
struct Eject;

impl Aml for Eject {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (select, eject, number, one) = (Path::new("CSEL"), Path::new("CEJT"), Arg(0), 1u8);
        Method::new(
            "CEJ_".into(),
            1,
            true,
            vec![
                &Acquire::new("CPLK".into(), NO_TIMEOUT),
                &Store::new(&select, &number),
                &Store::new(&eject, &one),
                &Release::new("CPLK".into()),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// `CTEL(n, what)`: notifies the processor of that number, for names cannot be computed.
struct Tell(u8);

impl Aml for Tell {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (number, what) = (Arg(0), Arg(1));
        let paths: Vec<(u8, Path)> = (0..self.0).map(|index| (index, Path::new(&name(index)))).collect();
        let cases: Vec<(Equal<'_>, Notify<'_>)> = paths
            .iter()
            .map(|(index, path)| (Equal::new(&number, index), Notify::new(path, &what)))
            .collect();
        let cases: Vec<If<'_>> = cases.iter().map(|(ours, notify)| If::new(ours, vec![notify])).collect();
        let cases = cases.iter().map(|case| case as &dyn Aml).collect();
        Method::new("CTEL".into(), 2, true, cases).to_aml_bytes(sink);
    }
}

/// `CSCN()`. An event is cleared before it is told, so that one that comes meanwhile is found by the next scan.
struct Scan(u8);

impl Aml for Scan {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (select, status) = (Path::new("CSEL"), Path::new("CSTS"));
        let (number, found, one) = (Local(0), Local(1), 1u8);
        let come = MethodCall::new("CTEL".into(), vec![&number, &DEVICE_CHECK]);
        let leave = MethodCall::new("CTEL".into(), vec![&number, &EJECT_REQUEST]);
        let (has_come, leaves) = (And::new(&ZERO, &found, &CAME), And::new(&ZERO, &found, &LEAVES));
        Method::new(
            "CSCN".into(),
            0,
            true,
            vec![
                &Acquire::new("CPLK".into(), NO_TIMEOUT),
                &Store::new(&number, &ZERO),
                &While::new(
                    &LessThan::new(&number, &self.0),
                    vec![
                        &Store::new(&select, &number),
                        &Store::new(&found, &status),
                        &If::new(&has_come, vec![&Store::new(&status, &CAME), &come]),
                        &If::new(&leaves, vec![&Store::new(&status, &LEAVES), &leave]),
                        &Add::new(&number, &number, &one),
                    ],
                ),
                &Release::new("CPLK".into()),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Processor<'a> {
    index: u8,
    platform: &'a Platform<'a>,
}

impl Aml for Processor<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const LOCAL_APIC: u8 = 0;
        const LENGTH: u8 = 8;
        let index = self.index;
        // The topology has checked that every id fits.
        let id = self.platform.topology.apic_id(index) as u8;
        // The processor's entry in the MADT, as it is once the processor is there.
        let entry = BufferData::new(vec![LOCAL_APIC, LENGTH, index, id, 1, 0, 0, 0]);
        let status = MethodCall::new("CSTA".into(), vec![&index]);
        let leave = MethodCall::new("CEJ_".into(), vec![&index]);
        let can_leave = index >= self.platform.boot_cpus;
        let eject = can_leave.then(|| Method::new("_EJ0".into(), 1, true, vec![&leave]));
        let (hid, uid) = (Name::new("_HID".into(), &"ACPI0007"), Name::new("_UID".into(), &index));
        let (status, entry) = (Return::new(&status), Name::new("_MAT".into(), &entry));
        let status = Method::new("_STA".into(), 0, true, vec![&status]);
        let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &status, &entry];
        children.extend(eject.iter().map(|e| e as &dyn Aml));
        Device::new(Path::new(&name(index)), children).to_aml_bytes(sink);
    }
}
