//! The processor: ports, time stamp, CPUID, and the gates into ring 0.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, CpuidResult};

/// Time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: ring 3 may read it: CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// One leaf of CPUID.
pub fn cpuid(leaf: u32) -> CpuidResult {
    __cpuid(leaf)
}

/// Reads one byte from a port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: the TSS opens all ports; reading one does not touch our memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes one byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: the TSS opens all ports; no device here does DMA on a port write.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes two bytes to a port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads two bytes from a port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: as in `inb`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads four bytes from a port.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as in `inb`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes four bytes to a port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// Fills `bytes` from one port by a string instruction.
pub fn insb(port: u16, bytes: &mut [u8]) {
    // SAFETY: writes `bytes` only.
    unsafe {
        asm!("rep insb", in("dx") port, inout("rdi") bytes.as_mut_ptr() => _, inout("rcx") bytes.len() => _, options(nostack, preserves_flags));
    }
}

/// Writes all of `bytes` to one port: a string instruction, which a VMM may take in one exit.
pub fn outsb(port: u16, bytes: &[u8]) {
    // SAFETY: reads `bytes` only.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _, options(readonly, nostack, preserves_flags));
    }
}

/// The gates into ring 0, in the order of their table in `entry`.
#[derive(Clone, Copy)]
enum Gate {
    Idle,
    Wrmsr,
    Flush,
    Hold,
    Fault,
    Rdmsr,
    Xcr0,
    ReadSpecial,
    WriteSpecial,
}

/// What the gate left in rax, rcx and rdx: meaningful for gates that answer.
fn enter(gate: Gate, a: u32, b: u32, c: u32) -> [u64; 3] {
    let (rax, rcx, rdx);
    // SAFETY: the gate changes no register but these; memory may have changed by DMA meanwhile.
    unsafe {
        asm!("call enter_gate", inout("rax") gate as u64 => rax, out("rcx") rcx, out("rdx") rdx, in("r8") u64::from(a),
            in("r9") u64::from(b), in("r10") u64::from(c));
    }
    [rax, rcx, rdx]
}

/// Halts until an interrupt; interrupts are only ever delivered in here. Returns at once when one is pending.
pub fn idle() {
    enter(Gate::Idle, 0, 0, 0);
}

/// Writes a model-specific register; says whether the processor took it. Callers write those whose effect is on memory that they own.
pub fn wrmsr(register: u32, value: u64) -> bool {
    enter(Gate::Wrmsr, register, value as u32, (value >> 32) as u32)[1] == 0
}

/// Reads a model-specific register; `None` if the processor has none of this number.
pub fn rdmsr(register: u32) -> Option<u64> {
    let [low, refused, high] = enter(Gate::Rdmsr, register, 0, 0);
    (refused == 0).then_some(low & 0xffff_ffff | high << 32)
}

/// Lets XSAVE and its kin work, for the components of `mask`, which CPUID offers.
pub fn open_xsave(mask: u32) {
    enter(Gate::Xcr0, mask, 0, 0);
}

unsafe extern "C" {
    static mut special: [u64; 11];
}

/// CR0, CR2, CR3, CR4, CR8, DR0 to DR3, DR6 and DR7.
pub fn special_registers() -> [u64; 11] {
    enter(Gate::ReadSpecial, 0, 0, 0);
    // SAFETY: written by the gate, which nothing runs beside.
    unsafe { core::ptr::addr_of!(special).read() }
}

/// Sets CR2 and the debug registers from what has the order of [`special_registers`].
pub fn set_special_registers(values: [u64; 11]) {
    // SAFETY: as there; CR2 and breakpoints that never match have no effect on anybody.
    unsafe { core::ptr::addr_of_mut!(special).write(values) };
    enter(Gate::WriteSpecial, 0, 0, 0);
}

/// Forgets cached translations.
pub fn flush_tlb() {
    enter(Gate::Flush, 0, 0, 0);
}

/// Stops for good, interrupts off. The VM stays there, at no cost.
pub fn hold() -> ! {
    loop {
        enter(Gate::Hold, 0, 0, 0);
    }
}

/// Triple fault.
pub fn triple_fault() -> ! {
    loop {
        enter(Gate::Fault, 0, 0, 0);
    }
}

/// For loops that wait on memory.
pub fn pause() {
    core::hint::spin_loop();
}

/// Reads a 32-bit device register.
///
/// # Safety
/// `address` is mapped and reading it has no effect that the caller did not mean.
pub unsafe fn read32(address: u64) -> u32 {
    let value;
    // SAFETY: the caller's. One plain `mov`, the form that every VMM's and KVM's emulator knows.
    unsafe {
        asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
    };
    value
}

/// Reads an 8-bit device register.
///
/// # Safety
/// As [`read32`].
pub unsafe fn read8(address: u64) -> u8 {
    let value;
    // SAFETY: the caller's.
    unsafe {
        asm!("mov {0}, byte ptr [{1}]", out(reg_byte) value, in(reg) address, options(nostack, preserves_flags))
    };
    value
}

/// Writes a 32-bit device register.
///
/// # Safety
/// `address` is mapped, and what the write makes the device do is sound.
pub unsafe fn write32(address: u64, value: u32) {
    // SAFETY: the caller's.
    unsafe {
        asm!("mov dword ptr [{1}], {0:e}", in(reg) value, in(reg) address, options(nostack, preserves_flags))
    };
}

/// The processor's brand string, trimmed; empty if it has none.
pub fn brand(buffer: &mut [u8; 48]) -> &str {
    if cpuid(0x8000_0000).eax < 0x8000_0004 {
        return "";
    }
    for i in 0..3 {
        let leaf = cpuid(0x8000_0002 + i as u32);
        for (j, register) in [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx].into_iter().enumerate() {
            buffer[i * 16 + j * 4..][..4].copy_from_slice(&register.to_le_bytes());
        }
    }
    let end = buffer.iter().position(|b| *b == 0).unwrap_or(buffer.len());
    core::str::from_utf8(&buffer[..end]).unwrap_or("").trim()
}

/// Writes an 8-bit device register.
///
/// # Safety
/// As [`write32`].
pub unsafe fn write8(address: u64, value: u8) {
    // SAFETY: the caller's.
    unsafe {
        asm!("mov byte ptr [{1}], {0}", in(reg_byte) value, in(reg) address, options(nostack, preserves_flags))
    };
}

/// Reads a 16-bit device register.
///
/// # Safety
/// As [`read32`].
pub unsafe fn read16(address: u64) -> u16 {
    let value;
    // SAFETY: the caller's.
    unsafe {
        asm!("mov {0:x}, word ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
    };
    value
}

/// Reads a 64-bit device register.
///
/// # Safety
/// As [`read32`].
pub unsafe fn read64(address: u64) -> u64 {
    let value;
    // SAFETY: the caller's.
    unsafe {
        asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
    };
    value
}

/// Writes a 16-bit device register.
///
/// # Safety
/// As [`write32`].
pub unsafe fn write16(address: u64, value: u16) {
    // SAFETY: the caller's.
    unsafe {
        asm!("mov word ptr [{1}], {0:x}", in(reg) value, in(reg) address, options(nostack, preserves_flags))
    };
}

/// Writes a 64-bit device register.
///
/// # Safety
/// As [`write32`].
pub unsafe fn write64(address: u64, value: u64) {
    // SAFETY: the caller's.
    unsafe {
        asm!("mov qword ptr [{1}], {0}", in(reg) value, in(reg) address, options(nostack, preserves_flags))
    };
}
