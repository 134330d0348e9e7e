//! Every table is well-formed and says what a kernel needs to know.

use super::*;
use crate::boot::{AcpiPorts, EventRegisters, MmioSlot, NumaNode, Pcie, Reduced, SerialPort, Standard};
use crate::config::Smp;
use crate::cpu::Topology;

const AT: u64 = 0xe_0000;

fn blob(cpus: u8, serial: bool) -> Vec<u8> {
    let smp = Smp { cpus, max_cpus: cpus, sockets: 1, dies: 1, clusters: 1, cores: cpus, threads: 1 };
    let slots: Vec<MmioSlot> = (0..8)
        .map(|i| MmioSlot {
            cmdline_base: 0xf010_0000,
            acpi_base: 0xf020_0000 + i * 0x200,
            size: 0x200,
            irq: 5 + i as u32,
        })
        .collect();
    let platform = Platform {
        boot_cpus: cpus,
        processors: &vec![true; cpus.into()],
        topology: &Topology::new(&smp).unwrap(),
        hardware: Hardware::Reduced(Reduced {
            slots: &slots,
            acpi: AcpiPorts { sleep_control: 0x600, sleep_status: 0x601, reset: 0x602, claim: 0x603 },
            button_irq: 3,
        }),
        standard: None,
        serial: serial.then_some(SerialPort { port: 0x3f8, irq: 4 }),
        generation: crate::device::GenerationId::new(),
        dirty_memory: false,
    };
    tables(AT, &platform).blob
}

/// A q35 with two processors, and more if `processors` has more.
fn q35(processors: &[bool], numa: bool) -> Vec<u8> {
    q35_tables(processors, numa, AT).blob
}

fn q35_tables(processors: &[bool], numa: bool, address: u64) -> Tables {
    let most = processors.len() as u8;
    let smp = Smp { cpus: 2, max_cpus: most, sockets: 1, dies: 1, clusters: 1, cores: most, threads: 1 };
    let pcie = Pcie {
        pm_base: 0x600,
        sci: 9,
        sleep: 0xce9,
        reset: 0xcf9,
        ecam: 0xb000_0000,
        window32: (0xc000_0000, 0x3000_0000),
        window64: Some((5 << 30, 32 << 30)),
        events: EventRegisters { events: 0xf000_0000, cpus: 0xf000_0004, gsi: 10 },
        first_pin: 16,
    };
    type Ranges<'a> = &'a [(u64, u64)];
    let node = |cpus: &[u8], memory: Ranges<'_>, device_memory: Ranges<'_>, distances: &[u8]| NumaNode {
        cpus: cpus.into(),
        memory: memory.into(),
        device_memory: device_memory.into(),
        distances: distances.into(),
    };
    let numa = if numa {
        vec![
            node(&[1], &[(0, 1 << 30)], &[(8 << 30, 2 << 30)], &[10, 31]),
            node(&[0], &[(1 << 30, 1 << 30), (4 << 30, 1 << 30)], &[], &[31, 10]),
        ]
    } else {
        Vec::new()
    };
    let standard = Standard { numa, ..Standard::default() };
    let platform = Platform {
        boot_cpus: 2,
        processors,
        topology: &Topology::new(&smp).unwrap(),
        hardware: Hardware::Pcie(pcie),
        standard: Some(&standard),
        serial: None,
        generation: crate::device::GenerationId::new(),
        dirty_memory: false,
    };
    tables(address, &platform)
}

/// What firmware does with the files: it puts them somewhere, and carries the script out.
#[test]
fn firmware_puts_the_tables_together_elsewhere() {
    const TABLES: u64 = 0x7e00_0040;
    let Files { rsdp, tables, loader } = loader::files(q35_tables(&[true; 2], true, 0));
    let mut files = [("etc/acpi/tables", TABLES, tables), ("etc/acpi/rsdp", 0xf_5040, rsdp)];
    assert_eq!(loader.len() % 128, 0);
    for command in loader.chunks(128) {
        let name =
            |from: usize| std::str::from_utf8(&command[from..from + 56]).unwrap().trim_end_matches('\0');
        let find = |name: &str| files.iter().position(|(n, ..)| *n == name).unwrap();
        let word = |from: usize| number(&command[from..from + 4]);
        match word(0) {
            1 => assert!(matches!((find(name(4)), word(60), command[64]), (0, 64, 1) | (1, 16, 2))),
            2 => {
                let (file, at, size) = (find(name(4)), word(116), usize::from(command[120]));
                assert_eq!(find(name(60)), 0);
                let field = &mut files[file].2[at..at + size];
                let value = number(field) as u64 + TABLES;
                field.copy_from_slice(&value.to_le_bytes()[..size]);
            }
            3 => {
                let bytes = &mut files[find(name(4))].2;
                let (at, start, len) = (word(60), word(64), word(68));
                bytes[at] = bytes[start..start + len].iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
            }
            other => panic!("command {other}"),
        }
    }
    let [(_, _, tables), (_, _, rsdp)] = &files;
    assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(rsdp)), (&b"RSD PTR "[..], 0, 0));
    let get = |address: usize| {
        let at = address - TABLES as usize;
        let len = number(&tables[at + 4..at + 8]);
        &tables[at..at + len]
    };
    let xsdt = get(number(&rsdp[24..32]));
    assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
    let all: Vec<&[u8]> = xsdt[36..].chunks(8).map(|entry| get(number(entry))).collect();
    let signatures: Vec<&[u8]> = all.iter().map(|t| &t[..4]).collect();
    assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG", b"SRAT", b"SLIT"]);
    assert!(all.iter().all(|t| sum(t) == 0));
    let (facs, dsdt) = (get(number(&all[0][36..40])), get(number(&all[0][140..148])));
    assert_eq!((&facs[..4], &dsdt[..4], sum(dsdt)), (&b"FACS"[..], &b"DSDT"[..], 0));
}

#[test]
fn processors_that_may_come_are_described() {
    let mut processors = vec![true; 254];
    processors[2..].fill(false);
    let blob = q35(&processors, false);
    assert!(blob.len() as u64 <= crate::device::GENERATION_ADDRESS - AT, "{:#x}", blob.len());
    let find = |name: &[u8]| blob.windows(name.len()).filter(|w| w == &name).count();
    // Each is named where it is described and where it is told.
    assert_eq!((find(b"C000"), find(b"C253"), find(b"C254")), (2, 2, 0));
    assert_eq!((find(b"_EJ0"), find(b"ACPI0013"), find(b"ACPI0007")), (252, 2, 254));
    let xsdt = at(&blob, number(&blob[24..32]));
    let madt =
        xsdt[36..].chunks(8).map(|entry| at(&blob, number(entry))).find(|t| &t[..4] == b"APIC").unwrap();
    let flags: Vec<u8> = (0..254).map(|i| madt[44 + 8 * i + 4]).collect();
    assert_eq!((&flags[..3], flags[253]), (&[1, 1, 2][..], 2), "enabled, or can be put online");
    let plain = q35(&[true; 2], false);
    assert!(!plain.windows(4).any(|w| w == b"PRES"), "nothing of it where none can come");
}

#[test]
fn a_q35_has_acpi_hardware_and_a_pcie_root() {
    let blob = q35(&[true; 2], false);
    assert!(blob.len() as u64 <= crate::device::GENERATION_ADDRESS - AT, "{:#x}", blob.len());
    let xsdt = at(&blob, number(&blob[24..32]));
    let tables: Vec<&[u8]> = xsdt[36..].chunks(8).map(|entry| at(&blob, number(entry))).collect();
    let signatures: Vec<&[u8]> = tables.iter().map(|t| &t[..4]).collect();
    assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
    assert!(tables.iter().all(|t| sum(t) == 0));
    let fadt = tables[0];
    assert_eq!(number(&fadt[112..116]) & (1 << 20 | 1 << 4), 0, "ACPI hardware, with the fixed power button");
    assert_eq!((number(&fadt[46..48]), number(&fadt[48..52])), (9, 0), "SCI, and ACPI mode from the start");
    assert_eq!((number(&fadt[56..60]), number(&fadt[64..68]), number(&fadt[76..80])), (0x600, 0x604, 0x608));
    assert_eq!((number(&fadt[120..128]), fadt[128]), (0xcf9, 0xf));
    let facs = number(&fadt[36..40]);
    assert_eq!((&at(&blob, facs)[..4], at(&blob, facs).len(), facs % 64), (&b"FACS"[..], 64, 0));
    assert_eq!(number(&tables[2][44..52]), 0xb000_0000);
    let find = |name: &[u8]| blob.windows(name.len()).any(|w| w == name);
    assert!([&b"PCI0"[..], b"_PRT", b"_OSC", b"_CRS", b"RES0", b"_S5_"].iter().all(|n| find(n)));
    assert!(!find(b"LNRO0005"));
    // The override of the SCI: level, active high.
    assert!(find(&[2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]));
    // Pin D of slot 31: GSI 16 + (31 + 3) % 4.
    assert!(find(&[0x0c, 0xff, 0xff, 0x1f, 0, 0x0a, 3, 0, 0x0a, 18]));
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |n, b| (n << 8) | usize::from(*b))
}

fn at(blob: &[u8], address: usize) -> &[u8] {
    let start = address - AT as usize;
    let length = number(&blob[start + 4..start + 8]);
    &blob[start..start + length]
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
}

#[test]
fn every_table_is_reachable_and_sums_to_zero() {
    for cpus in [1, 2, 254] {
        let blob = blob(cpus, true);
        assert!(blob.len() as u64 <= crate::device::GENERATION_ADDRESS - AT, "{:#x}", blob.len());
        let rsdp = &blob[..36];
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(rsdp)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = at(&blob, number(&rsdp[24..32]));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let mut signatures = vec![];
        for entry in xsdt[36..].chunks(8) {
            let table = at(&blob, number(entry));
            assert_eq!(sum(table), 0);
            signatures.push(table[..4].to_vec());
            if &table[..4] == b"FACP" {
                assert_eq!(number(&table[112..116]) & (1 << 20), 1 << 20, "hardware-reduced");
                assert_eq!(number(&table[120..128]), 0x602, "reset register");
                assert_eq!(number(&table[248..256]), 0x600, "sleep control register");
                let dsdt = at(&blob, number(&table[140..148]));
                assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
            } else {
                assert_eq!(table.len(), 44 + usize::from(cpus) * 8 + 12 + 6);
            }
        }
        assert_eq!(signatures, [b"FACP", b"APIC"]);
    }
}

#[test]
fn the_serial_port_is_described_only_if_there_is_one() {
    let count = |blob: &[u8], name: &[u8]| blob.windows(name.len()).filter(|w| w == &name).count();
    assert_eq!(count(&blob(1, true), b"COM1"), 1);
    assert_eq!(count(&blob(1, false), b"COM1"), 0);
    assert_eq!(count(&blob(1, false), b"LNRO0005"), 8);
}

#[test]
fn the_power_button_is_a_device_that_an_interrupt_reports() {
    let blob = blob(1, false);
    let find = |name: &[u8]| blob.windows(name.len()).position(|w| w == name);
    assert!(find(b"ACPI0013").is_some() && find(b"_EVT").is_some());
    // PNP0C0C as a compressed EISA id, and Notify (PWRB, 0x80).
    assert!(find(&[0x0c, 0x41, 0xd0, 0x0c, 0x0c]).is_some());
    assert!(find(b"\x86PWRB\x0a\x80").is_some());
}

#[test]
fn the_generation_id_is_found_by_its_kind_and_where_the_tables_say() {
    let blob = blob(1, false);
    let find = |name: &[u8]| blob.windows(name.len()).position(|w| w == name);
    assert!(find(b"_CID\x0dVM_Gen_Counter\0").is_some());
    // Package (2) { 0x000ef000, 0 }
    let at = find(b"ADDR\x12").unwrap();
    assert_eq!(blob[at + 6..at + 13], [2, 0x0c, 0x00, 0xf0, 0x0e, 0x00, 0x00]);
    // The method does nothing but Notify (VGEN, 0x80).
    assert!(find(b"_EVT\x09\x86VGEN\x0a\x80").is_some());
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let generation = crate::device::GenerationId::new();
    generation.write(&memory).unwrap();
    let mut bytes = [0; 18];
    memory.read_slice(&mut bytes, GuestAddress(0xe_efff)).unwrap();
    assert_eq!((bytes[0], bytes[17]), (0, 0));
    assert_ne!(bytes, [0; 18]);
}

#[test]
fn nodes_say_who_belongs_together_and_how_far_they_are() {
    let blob = q35(&[true; 2], true);
    let xsdt = at(&blob, number(&blob[24..32]));
    let find = |signature: &[u8]| {
        let tables = xsdt[36..].chunks(8).map(|entry| at(&blob, number(entry)));
        tables.into_iter().find(|t| &t[..4] == signature).unwrap()
    };
    let (srat, slit) = (find(b"SRAT"), find(b"SLIT"));
    assert_eq!((sum(srat), sum(slit)), (0, 0));
    assert_eq!((srat.len(), slit.len()), (48 + 2 * 16 + 4 * 40, 36 + 8 + 4));
    // The first node: processor 1, a GiB from 0.
    assert_eq!(srat[48..56], [0, 16, 0, 1, 1, 0, 0, 0]);
    assert_eq!(
        (&srat[64..70], number(&srat[72..80]), number(&srat[80..88])),
        (&[1, 40, 0, 0, 0, 0][..], 0, 1 << 30)
    );
    assert_eq!(number(&srat[92..96]), 1);
    // And what a device of its node hands out: it may come and go.
    assert_eq!(
        (&srat[104..110], number(&srat[112..120]), number(&srat[120..128]), number(&srat[132..136])),
        (&[1, 40, 0, 0, 0, 0][..], 8 << 30, 2 << 30, 3)
    );
    assert_eq!((number(&slit[36..44]), &slit[44..]), (2, &[10, 31, 31, 10][..]));
}
