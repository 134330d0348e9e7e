//! Every table is well-formed and says what a kernel needs to know.

use super::*;
use crate::boot::{AcpiPorts, MmioSlot, SerialPort};
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
        cpus,
        topology: &Topology::new(&smp).unwrap(),
        slots: &slots,
        serial: serial.then_some(SerialPort { port: 0x3f8, irq: 4 }),
        acpi: AcpiPorts { sleep_control: 0x600, sleep_status: 0x601, reset: 0x602, claim: 0x603 },
        button_irq: 3,
        dirty_memory: false,
    };
    tables(AT, &platform)
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
        assert!(blob.len() < 0x1_0000, "runs into the MP table: {:#x}", blob.len());
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
