//! Kernels and initrds: whatever their bytes are, they are refused or are in guest memory, and the first vCPU begins in them.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;
use vmm::boot::{AcpiPorts, BootFiles, Hardware, MmioSlot, Platform, Reduced, load};
use vmm::config::{BootConfig, Smp};
use vmm::cpu::Topology;
use vmm::cpu::x86_64::BootState;
use vmm::device::GenerationId;
use vmm::inherit::Inherited;
use vmm::memory::GuestMemory;

/// Enough for a bzImage that is to lie at 16 MiB.
const RAM: u64 = 32 << 20;
const MIB: u64 = 1 << 20;

static MEMORY: LazyLock<GuestMemory> =
    LazyLock::new(|| GuestMemory::from_ranges(&[(GuestAddress(0), RAM as usize)]).expect("32 MiB of memory"));

/// A file with this content, and its name.
fn file(name: &'static std::ffi::CStr, content: &[u8]) -> (File, PathBuf) {
    // SAFETY: a name that ends with a zero byte; the kernel makes a descriptor that nobody else has.
    let mut file: File = unsafe { std::os::fd::FromRawFd::from_raw_fd(memfd_create(name.as_ptr(), 1)) };
    file.write_all(content).expect("memory for a small file");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

fuzz_target!(|data: &[u8]| {
    // How long the initrd is, in units of 64 bytes, then that, then the kernel.
    let Some((first, rest)) = data.split_first() else { return };
    let (initrd, kernel) = rest.split_at(rest.len().min(usize::from(*first >> 1) * 64));
    let (_kernel, path) = file(c"kernel", kernel);
    let initrd = (!initrd.is_empty()).then(|| file(c"initrd", initrd));
    let config = BootConfig {
        kernel: Some(path),
        initrd: initrd.as_ref().map(|(_, path)| path.clone()),
        append: "quiet".into(),
    };
    let smp = Smp { cpus: 2, max_cpus: 2, sockets: 1, dies: 1, clusters: 1, cores: 2, threads: 1 };
    let slots = [MmioSlot { cmdline_base: 0xf010_0000, acpi_base: 0xf020_0000, size: 512, irq: 5 }];
    let platform = Platform {
        boot_cpus: 2,
        processors: &[true; 2],
        topology: &Topology::new(&smp).expect("two cores"),
        hardware: Hardware::Reduced(Reduced {
            slots: &slots,
            acpi: AcpiPorts { sleep_control: 0x600, sleep_status: 0x601, reset: 0x602, claim: 0x603 },
            button_irq: 3,
        }),
        standard: None,
        serial: None,
        generation: GenerationId::new(),
        dirty_memory: first & 1 != 0,
    };
    let mut files = BootFiles::open(&config, &Inherited::default()).expect("plain files");
    match load(&MEMORY, &mut files, &config.append, &platform) {
        Ok(BootState::Linux64 { entry, .. }) => assert!((MIB..RAM).contains(&entry), "{entry:#x}"),
        Ok(BootState::Pvh { entry, .. }) => assert!((MIB..RAM).contains(&entry.into()), "{entry:#x}"),
        Ok(BootState::Reset) => panic!("a kernel was given, and the vCPU begins in firmware"),
        Err(error) => {
            let text = error.to_string();
            assert!(text.starts_with('-') && !text.contains('\n'), "{text}");
        }
    }
});

unsafe extern "C" {
    fn memfd_create(name: *const std::ffi::c_char, flags: u32) -> i32;
}
