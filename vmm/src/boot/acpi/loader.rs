//! The ACPI tables as files that firmware reads, with a script that says where they go and what to change in them (QEMU's "linker/loader"):
//! pointers are offsets into the file they point to, until the firmware adds where that has come to lie.

use acpi_tables::rsdp::Rsdp;

use super::{ALIGN, Tables};

const TABLES: &str = "etc/acpi/tables";
const RSDP: &str = "etc/acpi/rsdp";
/// Bytes of a command, and of a file's name in it.
const COMMAND: usize = 128;
const NAME: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Where the firmware takes memory: anywhere, or below 1 MiB where operating systems look.
const ZONE_HIGH: u8 = 1;
const ZONE_BIOS: u8 = 2;

/// Bytes of a table's header; the length and the checksum in it.
const HEADER: usize = 36;
const LENGTH: usize = 4;
const CHECKSUM: usize = 9;
/// In the RSDP (ACPI 6.4 §5.2.5.3).
const RSDP_CHECKSUM: usize = 8;
const RSDP_XSDT: usize = 24;
const RSDP_EXTENDED_CHECKSUM: usize = 32;
const RSDP_OLD_LENGTH: usize = 20;
const RSDP_ALIGN: u32 = 16;
/// In the FADT (§5.2.9): the FACS, 4 bytes, and the DSDT, 8 bytes.
const FADT_FACS: usize = 36;
const FADT_DSDT: usize = 140;

/// What firmware reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// `etc/acpi/rsdp`.
    pub rsdp: Vec<u8>,
    /// `etc/acpi/tables`.
    pub tables: Vec<u8>,
    /// `etc/table-loader`.
    pub loader: Vec<u8>,
}

/// The script in the making.
#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, kind: u32, names: &[&str], rest: &[u8]) {
        let end = self.0.len() + COMMAND;
        self.0.extend(kind.to_le_bytes());
        for name in names {
            let at = self.0.len();
            self.0.extend(name.as_bytes());
            self.0.resize(at + NAME, 0);
        }
        self.0.extend(rest);
        self.0.resize(end, 0);
    }

    fn allocate(&mut self, file: &str, align: u32, zone: u8) {
        let mut rest = align.to_le_bytes().to_vec();
        rest.push(zone);
        self.command(ALLOCATE, &[file], &rest);
    }

    /// `size` bytes at `at` of `file` point into the tables.
    fn pointer(&mut self, file: &str, at: usize, size: u8) {
        let mut rest = (at as u32).to_le_bytes().to_vec();
        rest.push(size);
        self.command(ADD_POINTER, &[file, TABLES], &rest);
    }

    fn checksum(&mut self, file: &str, at: usize, start: usize, len: usize) {
        let rest = [at, start, len].map(|n| (n as u32).to_le_bytes());
        self.command(ADD_CHECKSUM, &[file], rest.as_flattened());
    }
}

fn clear(bytes: &mut [u8], at: usize) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte = 0;
    }
}

/// Of tables that have been made for address 0.
pub(super) fn files(Tables { blob: mut tables, fadt, xsdt }: Tables) -> Files {
    let mut rsdp: Vec<u8> = tables.iter().take(Rsdp::len()).copied().collect();
    // It is a file of its own.
    tables.iter_mut().take(Rsdp::len()).for_each(|byte| *byte = 0);
    let length = |at: usize| {
        let field = tables.get(at + LENGTH..at + LENGTH + 4).and_then(|f| <[u8; 4]>::try_from(f).ok());
        u32::from_le_bytes(field.unwrap_or_default()) as usize
    };
    let (fadt_len, xsdt_len) = (length(fadt), length(xsdt));
    let mut script = Script::default();
    script.allocate(TABLES, ALIGN as u32, ZONE_HIGH);
    script.allocate(RSDP, RSDP_ALIGN, ZONE_BIOS);
    script.pointer(TABLES, fadt + FADT_FACS, 4);
    script.pointer(TABLES, fadt + FADT_DSDT, 8);
    for entry in (xsdt + HEADER..xsdt + xsdt_len).step_by(8) {
        script.pointer(TABLES, entry, 8);
    }
    for (table, len) in [(fadt, fadt_len), (xsdt, xsdt_len)] {
        // The sum is taken over the old one, too.
        clear(&mut tables, table + CHECKSUM);
        script.checksum(TABLES, table + CHECKSUM, table, len);
    }
    script.pointer(RSDP, RSDP_XSDT, 8);
    for (at, len) in [(RSDP_CHECKSUM, RSDP_OLD_LENGTH), (RSDP_EXTENDED_CHECKSUM, Rsdp::len())] {
        clear(&mut rsdp, at);
        script.checksum(RSDP, at, 0, len);
    }
    Files { rsdp, tables, loader: script.0 }
}
