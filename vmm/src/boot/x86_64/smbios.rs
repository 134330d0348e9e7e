//! SMBIOS tables (DSP0134 3.0): what the board, its processors and its memory are called. Found by the anchor `_SM3_` on a 16-byte boundary of
//! the BIOS area.

use super::super::{BootError, Platform};
use super::write;
use crate::memory::GuestMemory;

/// The anchor; the tables follow.
const ANCHOR: u64 = 0xf_8000;
const ANCHOR_SIZE: u8 = 24;
const MIB: u64 = 1 << 20;
/// Longest text; more is cut off, so that all tables end before the reset vector.
const TEXT_MAX: usize = 128;
/// Processors described; there is one table for each socket.
const SOCKETS_MAX: u32 = 16;

/// What the tables say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Board {
    /// Texts by table and key, as `-smbios` names them; what is not said has a value of its own, or none.
    pub texts: Vec<(u8, &'static str, String)>,
    /// Identity of the VM.
    pub uuid: uuid::Uuid,
    /// Stretches of guest RAM: address and bytes.
    pub memory: Vec<(u64, u64)>,
}

impl Board {
    fn text(&self, table: u8, key: &str) -> Option<&str> {
        self.texts.iter().find(|(t, k, _)| (*t, *k) == (table, key)).map(|(_, _, value)| value.as_str())
    }

    fn number(&self, table: u8, key: &str) -> u16 {
        self.text(table, key).and_then(|text| text.parse().ok()).unwrap_or(0)
    }
}

pub(super) fn write_all(
    memory: &GuestMemory,
    board: &Board,
    platform: &Platform<'_>,
) -> Result<(), BootError> {
    let at = ANCHOR + 32;
    let (anchor, tables) = files(board, platform, at);
    write(memory, ANCHOR, &anchor, "the SMBIOS anchor")?;
    write(memory, at, &tables, "the SMBIOS tables")
}

/// The anchor, and the tables, which come to lie at `at`.
pub(super) fn files(board: &Board, platform: &Platform<'_>, at: u64) -> (Vec<u8>, Vec<u8>) {
    let tables = tables(board, platform);
    let mut anchor = b"_SM3_\0".to_vec();
    // Length, version 3.0, revision of the anchor.
    anchor.extend([ANCHOR_SIZE, 3, 0, 0, 1, 0]);
    anchor.extend((tables.len() as u32).to_le_bytes());
    anchor.extend(at.to_le_bytes());
    anchor[5] = anchor.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
    (anchor, tables)
}

/// One table in the making: its formatted part, and the texts that follow.
struct Table {
    bytes: Vec<u8>,
    texts: Vec<u8>,
    count: u8,
}

impl Table {
    fn new(kind: u8, handle: u16) -> Self {
        let [low, high] = handle.to_le_bytes();
        Self { bytes: vec![kind, 0, low, high], texts: Vec::new(), count: 0 }
    }

    /// The number of a text; 0 stands for none.
    fn text(mut self, text: Option<&str>) -> Self {
        let text = text.unwrap_or_default().as_bytes();
        let text = text.get(..text.len().min(TEXT_MAX)).unwrap_or_default();
        if text.is_empty() {
            self.bytes.push(0);
            return self;
        }
        self.texts.extend(text);
        self.texts.push(0);
        self.count += 1;
        self.bytes.push(self.count);
        self
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    fn finish(mut self, all: &mut Vec<u8>) {
        self.bytes[1] = self.bytes.len() as u8;
        if self.texts.is_empty() {
            self.texts.push(0);
        }
        self.texts.push(0);
        all.extend(self.bytes);
        all.extend(self.texts);
    }
}

/// Handle of the chassis, and of the array of memory.
const CHASSIS: u16 = 0x300;
const ARRAY: u16 = 0x1000;
const MAKER: &str = "Flotilla";

fn tables(board: &Board, platform: &Platform<'_>) -> Vec<u8> {
    let mut all = Vec::new();
    let text = |table, key| board.text(table, key);
    let maker = |table| board.text(table, "manufacturer").or(Some(MAKER));
    // Firmware: a virtual machine (characteristics extension 2, bit 4).
    Table::new(0, 0)
        .text(text(0, "vendor").or(Some(MAKER)))
        .text(text(0, "version").or(Some(env!("CARGO_PKG_VERSION"))))
        .put(&0xe000u16.to_le_bytes())
        .text(text(0, "date").or(Some("01/01/2026")))
        .put(&[0])
        .put(&(1u64 << 3).to_le_bytes())
        .put(&[0, 1 << 4, 0, 0, 0xff, 0xff])
        .finish(&mut all);
    let uuid = text(1, "uuid").and_then(|text| uuid::Uuid::parse_str(text).ok()).unwrap_or(board.uuid);
    // Wake-up type: power switch.
    Table::new(1, 0x100)
        .text(maker(1))
        .text(text(1, "product").or(Some("Standard VM (q35)")))
        .text(text(1, "version"))
        .text(text(1, "serial"))
        .put(&uuid.to_bytes_le())
        .put(&[6])
        .text(text(1, "sku"))
        .text(text(1, "family"))
        .finish(&mut all);
    if board.texts.iter().any(|(table, ..)| *table == 2) {
        // A hosting board, a motherboard.
        let mut base = Table::new(2, 0x200);
        for key in ["manufacturer", "product", "version", "serial", "asset"] {
            base = base.text(text(2, key));
        }
        base.put(&[1]).text(text(2, "location")).put(&CHASSIS.to_le_bytes()).put(&[10, 0]).finish(&mut all);
    }
    // Of type "other"; states safe, security none.
    Table::new(3, CHASSIS)
        .text(maker(3))
        .put(&[1])
        .text(text(3, "version"))
        .text(text(3, "serial"))
        .text(text(3, "asset"))
        .put(&[3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0])
        .text(text(3, "sku"))
        .finish(&mut all);
    let topology = platform.topology;
    let per_socket = topology.threads_per_socket().max(1);
    let most = platform.processors.len() as u32;
    for socket in 0..most.div_ceil(per_socket).min(SOCKETS_MAX) {
        processor(board, socket as u16, platform, &mut all);
    }
    memory(board, &mut all);
    // Boot status: no error.
    Table::new(32, 0x2000).put(&[0; 7]).finish(&mut all);
    Table::new(127, 0x7f00).finish(&mut all);
    all
}

fn processor(board: &Board, socket: u16, platform: &Platform<'_>, all: &mut Vec<u8>) {
    let name = format!("{}{socket}", board.text(4, "sock-pfx").unwrap_or("CPU"));
    let threads = platform.topology.threads_per_socket();
    let cores = threads / platform.topology.threads().max(1);
    let byte = |n: u32| u8::try_from(n).unwrap_or(0xff);
    let word = |n: u32| u16::try_from(n).unwrap_or(u16::MAX).to_le_bytes();
    // Central processor, family "other"; populated and enabled; no caches described; 64 bits.
    Table::new(4, 0x400 + socket)
        .text(Some(&name))
        .put(&[3, 1])
        .text(board.text(4, "manufacturer").or(Some(MAKER)))
        .put(&[0; 8])
        .text(board.text(4, "version"))
        .put(&[0, 0, 0])
        .put(&board.number(4, "max-speed").to_le_bytes())
        .put(&board.number(4, "current-speed").to_le_bytes())
        .put(&[0x41, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
        .text(board.text(4, "serial"))
        .text(board.text(4, "asset"))
        .text(board.text(4, "part"))
        .put(&[byte(cores), byte(cores), byte(threads)])
        .put(&4u16.to_le_bytes())
        .put(&1u16.to_le_bytes())
        .put(&word(cores))
        .put(&word(cores))
        .put(&word(threads))
        .finish(all);
}

/// One array with one module in it, and where it lies.
fn memory(board: &Board, all: &mut Vec<u8>) {
    let bytes: u64 = board.memory.iter().map(|(_, size)| size).sum();
    // System memory on the board, no error correction; capacity by its 64-bit field.
    Table::new(16, ARRAY)
        .put(&[3, 3, 3])
        .put(&0x8000_0000u32.to_le_bytes())
        .put(&0xfffeu16.to_le_bytes())
        .put(&1u16.to_le_bytes())
        .put(&bytes.to_le_bytes())
        .finish(all);
    let mib = bytes / MIB;
    // 0x7fff: by its 32-bit field.
    let size = u16::try_from(mib).ok().filter(|mib| *mib < 0x7fff).unwrap_or(0x7fff);
    let location = format!("{} 0", board.text(17, "loc-pfx").unwrap_or("DIMM"));
    // DIMM, RAM.
    Table::new(17, ARRAY + 0x100)
        .put(&ARRAY.to_le_bytes())
        .put(&0xfffeu16.to_le_bytes())
        .put(&[0xff; 4])
        .put(&size.to_le_bytes())
        .put(&[9, 0])
        .text(Some(&location))
        .text(board.text(17, "bank"))
        .put(&[7, 2, 0])
        .put(&board.number(17, "speed").to_le_bytes())
        .text(board.text(17, "manufacturer").or(Some(MAKER)))
        .text(board.text(17, "serial"))
        .text(board.text(17, "asset"))
        .text(board.text(17, "part"))
        .put(&[0])
        .put(&(mib as u32).to_le_bytes())
        .put(&board.number(17, "speed").to_le_bytes())
        .put(&[0; 6])
        .finish(all);
    for (number, (base, size)) in (0u16..).zip(&board.memory) {
        Table::new(19, ARRAY + 0x200 + number)
            .put(&[0xff; 8])
            .put(&ARRAY.to_le_bytes())
            .put(&[1])
            .put(&base.to_le_bytes())
            .put(&(base + size - 1).to_le_bytes())
            .finish(all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{AcpiPorts, Hardware, Reduced};
    use crate::cpu::Topology;

    /// Type, formatted part and texts of each table.
    fn parse(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut tables = Vec::new();
        while !bytes.is_empty() {
            let (fixed, rest) = bytes.split_at(bytes[1].into());
            let end = rest.windows(2).position(|w| w == [0, 0]).unwrap();
            let texts = rest[..end].split(|b| *b == 0).map(|t| String::from_utf8(t.to_vec()).unwrap());
            tables.push((fixed[0], fixed.to_vec(), texts.filter(|t| !t.is_empty()).collect()));
            bytes = &rest[end + 2..];
        }
        tables
    }

    #[test]
    fn each_table_has_its_length_and_its_texts() {
        let smp = crate::config::Smp {
            cpus: 8,
            max_cpus: 8,
            sockets: 2,
            dies: 1,
            clusters: 1,
            cores: 2,
            threads: 2,
        };
        let acpi = AcpiPorts { sleep_control: 0, sleep_status: 0, reset: 0, claim: 0 };
        let platform = Platform {
            boot_cpus: 8,
            processors: &[true; 8],
            topology: &Topology::new(&smp).unwrap(),
            hardware: Hardware::Reduced(Reduced { slots: &[], acpi, button_irq: 3 }),
            standard: None,
            serial: None,
            generation: crate::device::GenerationId::new(),
            dirty_memory: false,
        };
        let uuid = uuid::Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
        let board = Board {
            texts: vec![
                (1, "product", "Box".into()),
                (2, "serial", "77".into()),
                (17, "speed", "3200".into()),
            ],
            uuid,
            memory: vec![(0, 2 << 30), (4 << 30, 62 << 30)],
        };
        let parsed = parse(&tables(&board, &platform));
        let kinds: Vec<(u8, usize)> = parsed.iter().map(|(kind, fixed, _)| (*kind, fixed.len())).collect();
        let expected = [
            (0, 0x18),
            (1, 0x1b),
            (2, 0xf),
            (3, 0x16),
            (4, 0x30),
            (4, 0x30),
            (16, 0x17),
            (17, 0x28),
            (19, 0x1f),
            (19, 0x1f),
            (32, 0xb),
            (127, 4),
        ];
        assert_eq!(kinds, expected);
        let (_, system, texts) = &parsed[1];
        assert_eq!(texts, &["Flotilla", "Box"]);
        assert_eq!((system[5], &system[8..12]), (2, &[0x33, 0x22, 0x11, 0][..]));
        assert_eq!(parsed[2].2, ["77"]);
        let module = &parsed[7].1;
        assert_eq!((&module[0xc..0xe], &module[0x1c..0x20]), (&[0xff, 0x7f][..], &[0, 0, 1, 0][..]));
        assert_eq!(&module[0x15..0x17], &3200u16.to_le_bytes());
        let processor = &parsed[4].1;
        assert_eq!((processor[0x23], processor[0x25]), (2, 4));

        let memory = GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]).unwrap();
        write_all(&memory, &board, &platform).unwrap();
        let mut anchor = [0; 24];
        vm_memory::Bytes::read_slice(&memory, &mut anchor, vm_memory::GuestAddress(ANCHOR)).unwrap();
        assert_eq!((&anchor[..5], anchor.iter().fold(0u8, |s, b| s.wrapping_add(*b))), (&b"_SM3_"[..], 0));
        // However long the texts are, and however many sockets there are.
        let keys = [
            "manufacturer",
            "product",
            "version",
            "serial",
            "sku",
            "family",
            "asset",
            "location",
            "sock-pfx",
            "part",
        ];
        let long =
            keys.iter().flat_map(|key| [0, 1, 2, 3, 4, 17].map(|table| (table, *key, "x".repeat(4000))));
        let smp = crate::config::Smp { cpus: 254, max_cpus: 254, sockets: 254, cores: 1, threads: 1, ..smp };
        let topology = Topology::new(&smp).unwrap();
        let platform = Platform { processors: &[true; 254], topology: &topology, ..platform };
        let all = tables(&Board { texts: long.collect(), ..board }, &platform);
        assert!(ANCHOR + 32 + all.len() as u64 <= super::super::RESET_VECTOR, "{:#x}", all.len());
    }
}
