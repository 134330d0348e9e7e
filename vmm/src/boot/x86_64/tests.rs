//! Whole loads: every kind of kernel, and files that only look like one.

use std::io::Write as _;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::boot::{AcpiPorts, Hardware, MmioSlot, Reduced};
use crate::config::Smp;
use crate::cpu::Topology;

const MIB: u64 = 1 << 20;

fn memory(size: u64) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), size as usize)]).unwrap()
}

fn boot(memory: &GuestMemory, config: &BootConfig) -> Result<BootState, BootError> {
    let smp = Smp { cpus: 2, max_cpus: 2, sockets: 1, dies: 1, clusters: 1, cores: 2, threads: 1 };
    let slots = [MmioSlot { cmdline_base: 0xf010_0000, acpi_base: 0xf020_0000, size: 512, irq: 5 }];
    let platform = Platform {
        boot_cpus: 2,
        processors: &[true; 2],
        topology: &Topology::new(&smp).unwrap(),
        hardware: Hardware::Reduced(Reduced {
            slots: &slots,
            acpi: AcpiPorts { sleep_control: 0x600, sleep_status: 0x601, reset: 0x602, claim: 0x603 },
            button_irq: 3,
        }),
        standard: None,
        serial: None,
        generation: crate::device::GenerationId::new(),
        dirty_memory: false,
    };
    let mut files = BootFiles::open(config, &Inherited::default())?;
    load(memory, &mut files, &config.append, &platform)
}

fn file(data: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(data).unwrap();
    file
}

fn config(kernel: &Path) -> BootConfig {
    BootConfig { kernel: Some(kernel.into()), initrd: None, append: "quiet".into() }
}

fn try_kernel(data: &[u8], size: u64) -> Result<BootState, BootError> {
    boot(&memory(size), &config(file(data).path()))
}

/// A bzImage with one setup sector and 4 KiB of payload, each byte of which is 0x5a.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &256u32.to_le_bytes()); // syssize
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]); // loadflags
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x236, &[1, 0]); // xloadflags
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x258, &(16 * MIB).to_le_bytes()); // pref_address
    put(0x260, &(8u32 << 20).to_le_bytes()); // init_size
    image.resize(1024 + 4096, 0x5a);
    image
}

fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    memory.read_slice(&mut data, GuestAddress(at)).unwrap();
    data
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry() {
    let memory = memory(64 * MIB);
    let kernel = file(&bzimage());
    let initrd = file(&[0x77; 5000]);
    let mut config = config(kernel.path());
    config.initrd = Some(initrd.path().into());
    let state = boot(&memory, &config).unwrap();
    let expected = BootState::Linux64 {
        entry: 0x10_0200,
        zero_page: PARAMS,
        page_table: PAGE_TABLES,
        stack: BOOT_STACK,
        gdt: GDT,
    };
    assert_eq!(state, expected);
    assert_eq!(read(&memory, 0x10_0000, 4097), [&[0x5a; 4096][..], &[0]].concat());
    assert_eq!(read(&memory, CMDLINE, 46), b"quiet virtio_mmio.device=512@0xf0100000:5\0\0\0\0\0");
    let place = 64 * MIB - 8192;
    assert_eq!(read(&memory, place, 5001), [&[0x77; 5000][..], &[0]].concat());
    assert_eq!(read(&memory, PARAMS + 0x218, 4), (place as u32).to_le_bytes());
    assert_eq!(read(&memory, PARAMS + 0x210, 1), [0xff], "loader type");
    assert_eq!(read(&memory, PAGE_TABLES + 2 * 4096 + 8, 8), 0x20_0083_u64.to_le_bytes());
}

#[test]
fn refuses_bzimages_that_cannot_work() {
    let with = |at: usize, bytes: &[u8]| {
        let mut image = bzimage();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    for (image, size, expected) in [
        (with(0x206, &[5, 2]), 64, "boot protocol 2.5 is too old"),
        (with(0x211, &[0]), 64, "zImage"),
        (with(0x236, &[0]), 64, "32-bit kernel"),
        (with(0x1f4, &[0, 2]), 64, "is cut short"),
        (with(0x1f1, &[9]), 64, "is cut short"),
        (bzimage()[..0x230].to_vec(), 64, "cut short in its header"),
        (bzimage(), 20, "give the VM more memory"),
        (with(0x258, &[0xff; 8]), 64, "give the VM more memory"),
    ] {
        let error = try_kernel(&image, size * MIB).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let mut long = config(Path::new("x"));
    let kernel = file(&bzimage());
    long.kernel = Some(kernel.path().into());
    long.append = "x".repeat(2020);
    let error = boot(&memory(64 * MIB), &long).unwrap_err().to_string();
    assert!(error.starts_with("-append: the kernel command line is 2056 bytes long"), "{error}");
}

#[test]
fn refuses_files_that_are_no_kernels() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    for (path, expected) in [
        (directory.path(), "is a directory, not a file"),
        (&missing, "no such file"),
        (&fifo, "is a pipe or socket, not a file"),
        (Path::new("/dev/zero"), "is a device, not a file"),
        (Path::new("/etc/passwd"), "is text"),
        (Path::new("/proc/self/exe"), "segment at 0x0"),
    ] {
        let error = boot(&memory(64 * MIB), &config(path)).unwrap_err().to_string();
        assert!(error.starts_with("-kernel ") && error.contains(expected), "{error}");
    }
    let none = BootConfig::default();
    assert!(matches!(boot(&memory(64 * MIB), &none), Err(BootError::NoKernel)));
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let kernel = file(&bzimage());
    let initrd = tempfile::NamedTempFile::new().unwrap();
    initrd.as_file().set_len(45 * MIB).unwrap();
    let mut config = config(kernel.path());
    config.initrd = Some(initrd.path().into());
    // The kernel may use everything up to 24 MiB.
    boot(&memory(69 * MIB), &config).unwrap();
    let error = boot(&memory(68 * MIB), &config).unwrap_err().to_string();
    assert!(error.contains("give the VM more memory"), "{error}");
    initrd.as_file().set_len(0).unwrap();
    let error = boot(&memory(68 * MIB), &config).unwrap_err().to_string();
    assert!(error.ends_with("the file is empty"), "{error}");
}

#[test]
fn the_memory_map_leaves_out_what_is_not_ram() {
    let map = memory_map(&memory(64 * MIB));
    let usable: Vec<_> = map.iter().filter(|e| e.usable).map(|e| (e.base, e.size)).collect();
    assert_eq!(usable, [(0, EBDA_START), (MIB, 63 * MIB)]);
    let both = GuestMemory::from_ranges(&[
        (GuestAddress(0), GAP_START as usize),
        (GuestAddress(GAP_END), MIB as usize),
    ])
    .unwrap();
    let map = memory_map(&both);
    assert!(map.windows(2).all(|w| w[0].base + w[0].size <= w[1].base));
    assert_eq!(map.last(), Some(&MapEntry { base: GAP_END, size: MIB, usable: true }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a header says: an error or a load, never a panic, never a write outside of guest memory.
    #[test]
    fn hostile_bzimage_headers_are_harmless(
        changes in proptest::collection::vec((0x1f1usize..0x270, any::<u8>()), 0..12),
        cut in 0usize..6000,
    ) {
        let mut image = bzimage();
        for (at, value) in changes {
            if !(0x202..0x206).contains(&at) {
                image[at] = value;
            }
        }
        image.truncate(cut);
        let _ = try_kernel(&image, 32 * MIB);
    }

    #[test]
    fn hostile_elf_headers_are_harmless(
        changes in proptest::collection::vec((4usize..0xb0, any::<u8>()), 0..8),
        words in proptest::collection::vec((0usize..21, prop_oneof![any::<u64>(), Just(u64::MAX), 0u64..0x4000]), 0..4),
        cut in 0usize..1200,
    ) {
        let mut image = elf();
        for (word, value) in words {
            image[8 * word + 8..8 * word + 16].copy_from_slice(&value.to_le_bytes());
        }
        for (at, value) in changes {
            image[at] = value;
        }
        image.truncate(cut);
        let _ = try_kernel(&image, 32 * MIB);
    }

    #[test]
    fn any_bytes_are_harmless(data in proptest::collection::vec(any::<u8>(), 0..9000)) {
        let _ = try_kernel(&data, 32 * MIB);
    }
}

/// An ELF file with a segment at 2 MiB and a PVH note.
fn elf() -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [2 * MIB, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    for (kind, offset, at, size) in [(1u32, 0x200u64, 2 * MIB, 0x200u64), (4, 0x100, 0, 20)] {
        file.extend(kind.to_le_bytes());
        file.extend([7, 0, 0, 0]);
        for word in [offset, at, at, size, size * 4, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    file.resize(0x100, 0);
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 2 << 20] {
        file.extend(word.to_le_bytes());
    }
    file.resize(0x200, 0);
    file.resize(0x400, 0x90);
    file
}

#[test]
fn an_elf_with_a_pvh_note_is_entered_by_pvh() {
    let memory = memory(64 * MIB);
    let state = boot(&memory, &config(file(&elf()).path())).unwrap();
    assert_eq!(state, BootState::Pvh { entry: 2 << 20, start_info: PARAMS as u32, gdt: GDT });
    assert_eq!(read(&memory, 2 * MIB, 0x201), [&[0x90; 0x200][..], &[0]].concat());
    // Without the note: by the 64-bit protocol, at its entry.
    let mut plain = elf();
    plain[0x108] = 17;
    assert!(matches!(try_kernel(&plain, 64 * MIB).unwrap(), BootState::Linux64 { entry: 0x20_0000, .. }));
}

#[test]
fn refuses_elf_files_that_cannot_work() {
    let with = |at: usize, bytes: &[u8]| {
        let mut image = elf();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    for (image, expected) in [
        (with(4, &[1]), "another kind of processor"),
        (with(5, &[2]), "another kind of processor"),
        (with(18, &[183]), "another kind of processor"),
        (with(16, &[1]), "object or core file"),
        (with(54, &[57]), "program headers make no sense"),
        (with(57, &[1]), "program headers make no sense"),
        (with(64, &[6]), "nothing to load"),
        (elf()[..0x300].to_vec(), "cut short"),
        (elf()[..100].to_vec(), "cut short in its program headers"),
        (elf()[..40].to_vec(), "cut short"),
        (with(64 + 24, &0x8000u64.to_le_bytes()), "below 1 MiB"),
        (with(64 + 24, &u64::MAX.to_le_bytes()), "give the VM more memory"),
        (with(64 + 32, &u64::MAX.to_le_bytes()), "larger in the file than in memory"),
        (with(0x100 + 16, &[0, 0, 0, 0x40]), "PVH entry 0x40000000 is outside"),
    ] {
        let error = try_kernel(&image, 64 * MIB).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_raw_kernel_goes_to_16_mib() {
    let mut code = vec![0x90; 8192];
    code[..4].copy_from_slice(&[0x48, 0x8d, 0x25, 0x11]);
    let memory = memory(64 * MIB);
    let state = boot(&memory, &config(file(&code).path())).unwrap();
    assert!(matches!(state, BootState::Linux64 { entry: 0x100_0000, .. }));
    assert_eq!(read(&memory, 16 * MIB, 8192), code);
}
