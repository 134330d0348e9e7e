//! `floor`: the smallest program that runs a guest with KVM, the measure that the benchmark divides by.
//!
//! One memory slot, the interrupt controllers, the PIT, one vCPU, an ELF kernel entered by the Linux 64-bit boot protocol; what the
//! guest writes to COM1 goes to standard output. No other device, no thread, no option that a VMM would need. It is also the
//! quickest way to try the default guest: `floor tests/guest/target/release/guest 'cmd=mem;uptime;reboot'`.

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "usage: floor [--memory MIB] [--exit-on-byte] KERNEL [COMMAND LINE]";
/// The zero page, the page tables and the command line: below 1 MiB, where kernels are not.
const ZERO_PAGE: usize = 0x7000;
const PML4: usize = 0x9000;
const COMMAND_LINE: usize = 0x2_0000;
/// End of conventional memory, start of the rest.
const LOW_END: usize = 0x9_fc00;
const HIGH: usize = 0x10_0000;
const MIB: usize = 1 << 20;
/// RAM ends below the device window.
const MOST_MIB: usize = 3072;

struct Options {
    memory: usize,
    exit_on_byte: bool,
    kernel: String,
    command_line: String,
}

fn options() -> Result<Options> {
    let mut options = Options {
        memory: 256 * MIB,
        exit_on_byte: false,
        kernel: String::new(),
        command_line: String::new(),
    };
    let mut arguments = std::env::args().skip(1).peekable();
    while let Some(option) = arguments.next_if(|a| a.starts_with("--")) {
        match option.as_str() {
            "--memory" => {
                let mib: usize = arguments.next().ok_or(USAGE)?.parse().map_err(|_| USAGE)?;
                if !(32..=MOST_MIB).contains(&mib) {
                    return Err(format!("--memory {mib}: from 32 to {MOST_MIB} MiB").into());
                }
                options.memory = mib * MIB;
            }
            "--exit-on-byte" => options.exit_on_byte = true,
            _ => return Err(USAGE.into()),
        }
    }
    options.kernel = arguments.next().ok_or(USAGE)?;
    options.command_line = arguments.collect::<Vec<_>>().join(" ");
    Ok(options)
}

/// Guest RAM: private, anonymous, zero.
fn guest_memory(size: usize) -> Result<&'static mut [u8]> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping, which nothing else refers to.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: `size` readable and writable bytes, never unmapped. The guest shares them once it runs; we do not look at them after that.
    Ok(unsafe { std::slice::from_raw_parts_mut(at.cast(), size) })
}

fn put(memory: &mut [u8], at: usize, bytes: &[u8]) -> Result<()> {
    let place = at.checked_add(bytes.len()).and_then(|end| memory.get_mut(at..end));
    place.ok_or("does not fit guest memory")?.copy_from_slice(bytes);
    Ok(())
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64> {
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(bytes.get(at..at + N).ok_or("kernel: truncated ELF header")?);
    Ok(u64::from_le_bytes(wide))
}

/// Reads the loadable segments of an ELF64 straight into guest memory; returns its entry.
fn load(kernel: &File, memory: &mut [u8]) -> Result<u64> {
    let mut head = [0; 1024];
    let length = kernel.read_at(&mut head, 0)?;
    let head = &head[..length];
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return Err("kernel: not a little-endian ELF64".into());
    }
    let (table, size, count) =
        (number::<8>(head, 32)? as usize, number::<2>(head, 54)? as usize, number::<2>(head, 56)? as usize);
    for i in 0..count {
        let header = head.get(table.saturating_add(i * size)..).ok_or("kernel: program headers too far")?;
        if number::<4>(header, 0)? != 1 {
            continue;
        }
        let (offset, address, bytes) =
            (number::<8>(header, 8)?, number::<8>(header, 24)? as usize, number::<8>(header, 32)? as usize);
        let place = address.checked_add(bytes).and_then(|end| memory.get_mut(address..end));
        kernel.read_exact_at(place.ok_or("kernel: does not fit guest memory")?, offset)?;
    }
    number::<8>(head, 24)
}

/// What the Linux boot protocol asks for: zero page, command line, and page tables that map the first GiB to itself.
fn boot_data(memory: &mut [u8], command_line: &str) -> Result<()> {
    put(memory, COMMAND_LINE, command_line.as_bytes())?;
    put(memory, ZERO_PAGE + 0x228, &(COMMAND_LINE as u32).to_le_bytes())?;
    put(memory, ZERO_PAGE + 0x1e8, &[2])?;
    let ranges = [(0, LOW_END), (HIGH, memory.len() - HIGH)];
    for (i, (start, size)) in ranges.into_iter().enumerate() {
        let entry = ZERO_PAGE + 0x2d0 + 20 * i;
        put(memory, entry, &(start as u64).to_le_bytes())?;
        put(memory, entry + 8, &(size as u64).to_le_bytes())?;
        put(memory, entry + 16, &1u32.to_le_bytes())?;
    }
    put(memory, PML4, &(PML4 as u64 + 0x1003).to_le_bytes())?;
    put(memory, PML4 + 0x1000, &(PML4 as u64 + 0x2003).to_le_bytes())?;
    for i in 0..512 {
        put(memory, PML4 + 0x2000 + 8 * i, &((i as u64) << 21 | 0x83).to_le_bytes())?;
    }
    Ok(())
}

/// 64-bit mode, flat segments, RSI at the zero page.
fn set_registers(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(type_ & 8 != 0),
        db: u8::from(type_ & 8 == 0),
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = flat(0x10, 0xb);
    (sregs.ds, sregs.es, sregs.ss) = (flat(0x18, 3), flat(0x18, 3), flat(0x18, 3));
    sregs.cr3 = PML4 as u64;
    sregs.cr4 = 0x20;
    sregs.cr0 |= 0x8000_0001;
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: entry, rsi: ZERO_PAGE as u64, rflags: 2, ..Default::default() })?;
    Ok(())
}

fn run(vcpu: &mut VcpuFd, exit_on_byte: bool) -> Result<()> {
    let mut output = io::stdout();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x3f8, bytes)) => {
                output.write_all(bytes)?;
                output.flush()?;
                if exit_on_byte {
                    return Ok(());
                }
            }
            // Transmitter empty, nothing received.
            Ok(VcpuExit::IoIn(0x3fd, data)) => data.fill(0x60),
            Ok(VcpuExit::IoOut(0x64, [0xfe]) | VcpuExit::Shutdown) => return Ok(()),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
            Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(other) => return Err(format!("the guest stopped: {other:?}").into()),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn floor() -> Result<()> {
    let options = options()?;
    let kernel = File::open(&options.kernel).map_err(|e| format!("{}: {e}", options.kernel))?;
    let kvm = Kvm::new().map_err(|e| format!("/dev/kvm: {e}"))?;
    let vm = kvm.create_vm()?;
    let memory = guest_memory(options.memory)?;
    // The slot comes before the interrupt controllers: afterwards KVM waits for readers of the tables that both change.
    let region = kvm_userspace_memory_region {
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the mapping stays for the life of the process.
    unsafe { vm.set_user_memory_region(region)? };
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })?;
    let entry = load(&kernel, memory)?;
    boot_data(memory, &options.command_line)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    set_registers(&vcpu, entry)?;
    run(&mut vcpu, options.exit_on_byte)
}

fn main() -> ExitCode {
    match floor() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error}");
            ExitCode::FAILURE
        }
    }
}
