//! All that a program can see of its processor: fills it with values of its own, waits for a key, and says which of them have changed.
//! For snapshots and migration: what was saved in between must come back whole.
//!
//! Each register is read back before the wait and again after it, so that a processor may refuse what it does not have. What runs on by
//! itself (the time stamp, timers' counts) is left out. Everything is put back at the end: the console goes on.

use core::arch::{asm, global_asm};
use core::fmt;
use core::ptr::{addr_of, addr_of_mut};

use crate::{cpu, memory, say};

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
/// Bytes of an XSAVE area that we have room for: more than all components that [`COMPONENTS`] lets in.
const AREA: usize = 4096;
/// x87, SSE, AVX and the three of AVX-512 (Intel SDM vol. 1, 13.1): what needs no other bit in CR4 and no permission.
const COMPONENTS: u32 = 0b1110_0111;

/// Model-specific registers (Intel SDM vol. 4, AMD APM vol. 2 appendix A) and what is written to each; 0: only read. Addresses are those of
/// nothing, canonical; memory types are valid; the MTRRs' masks fit 36 bits.
const MSRS: &[(u32, u64)] = &[
    (0xc000_0080, 0),                     // EFER
    (0xc000_0081, 0x0023_0010_0000_0000), // STAR
    (0xc000_0082, 0x0000_7fff_1234_5000), // LSTAR
    (0xc000_0083, 0xffff_8000_0bad_c000), // CSTAR
    (0xc000_0084, 0x0004_7700),           // FMASK
    (0xc000_0100, 0x0000_1234_5678_9abc), // FS base
    (0xc000_0101, 0xffff_9999_8888_7777), // GS base
    (0xc000_0102, 0xffff_aaaa_bbbb_cccc), // KERNEL_GS_BASE
    (0xc000_0103, 0x0bad_cafe),           // TSC_AUX
    (0x1b, 0),                            // APIC base
    (0x3a, 0),                            // FEATURE_CONTROL
    (0x3b, 0x12_3456),                    // TSC_ADJUST: the time stamp moves once, for everybody
    (0x48, 0),                            // SPEC_CTRL
    (0x8b, 0),                            // BIOS_SIGN_ID
    (0xfe, 0),                            // MTRRcap
    (0x174, 0x18),                        // SYSENTER_CS
    (0x175, 0x1111_2000),                 // SYSENTER_ESP, of which KVM keeps 32 bits on AMD
    (0x176, 0x3333_4000),                 // SYSENTER_EIP, likewise
    (0x179, 0),                           // MCG_CAP
    (0x17a, 0x4),                         // MCG_STATUS
    (0x400, u64::MAX),                    // MC0_CTL
    (0x1a0, 0),                           // MISC_ENABLE
    (0x1d9, 0),                           // DEBUGCTL
    (0x200, 0x1_0000_0006),               // MTRR_PHYSBASE0
    (0x201, 0xf_f000_0800),               // MTRR_PHYSMASK0
    (0x202, 0x2_0000_0004),               // MTRR_PHYSBASE1
    (0x203, 0xf_e000_0800),               // MTRR_PHYSMASK1
    (0x20e, 0x3_0000_0005),               // MTRR_PHYSBASE7
    (0x250, 0x0606_0606_0606_0606),       // MTRR_FIX64K
    (0x258, 0x0604_0605_0606_0606),       // MTRR_FIX16K_80000
    (0x259, 0x0506_0606_0606_0604),       // MTRR_FIX16K_A0000
    (0x268, 0x0606_0606_0606_0605),       // MTRR_FIX4K_C0000
    (0x26f, 0x0405_0606_0606_0606),       // MTRR_FIX4K_F8000
    (0x277, 0x0005_0401_0007_0406),       // PAT
    (0x2ff, 0xc06),                       // MTRR_DEF_TYPE
    (0xda0, 0),                           // XSS
    (0x4b56_4d05, 1),                     // KVM: poll control
];

/// Registers of the local APIC (Intel SDM vol. 3, 10.4) and what is written to each. Everything stays masked.
const LAPIC_REGISTERS: &[(u64, u32)] = &[
    (0x20, 0),            // ID: only read, what it may become is the processor's to say
    (0x80, 0x20),         // task priority: below our vectors
    (0xd0, 0x4200_0000),  // logical destination
    (0xe0, 0x0fff_ffff),  // its format: cluster
    (0xf0, 0x1ff),        // spurious vector
    (0x320, 0x3_00fe),    // timer: periodic, masked
    (0x330, 0x1_00f5),    // thermal
    (0x340, 0x1_00f4),    // performance counters
    (0x350, 0x1_8000),    // LINT0: level
    (0x360, 0x1_2400),    // LINT1: NMI, low
    (0x370, 0x1_00f3),    // error
    (0x380, 0x7654_3210), // initial count
    (0x3e0, 0b1001),      // divide by 64
];

/// Entries of the IOAPIC that no device here has, low words: masked, level, low active, lowest priority.
const PINS: &[(u32, u32)] = &[(20, 0x1_a1d0), (21, 0x1_29d1), (23, 0x1_81d3)];

global_asm!(
    r#"
/* Loads the general registers from the table `general`, waits for a byte on COM1 by polling, and stores them there again. rdi: the XSAVE area
   that is loaded before, rsi: the one that is stored after, edx: the components, 0 for FXSAVE. rax, rcx and rdx are used by the wait itself. */
.globl vcpu_wait, general
vcpu_wait:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [wait_stack], rsp
    mov [wait_area], rsi
    mov [wait_mask], edx
    test edx, edx
    mov eax, edx
    jz 1f
    xor edx, edx
    xrstor64 [rdi]
    jmp 2f
1:  fxrstor64 [rdi]
2:  push qword ptr [general + 104]
    popfq
    mov rbx, [general]
    mov rsi, [general + 8]
    mov rdi, [general + 16]
    mov rbp, [general + 24]
    mov r8, [general + 32]
    mov r9, [general + 40]
    mov r10, [general + 48]
    mov r11, [general + 56]
    mov r12, [general + 64]
    mov r13, [general + 72]
    mov r14, [general + 80]
    mov r15, [general + 88]
    mov rsp, [general + 96]
    mov edx, 0x3fd
3:  in al, dx
    test al, 1
    jz 3b
    mov [general], rbx
    mov [general + 8], rsi
    mov [general + 16], rdi
    mov [general + 24], rbp
    mov [general + 32], r8
    mov [general + 40], r9
    mov [general + 48], r10
    mov [general + 56], r11
    mov [general + 64], r12
    mov [general + 72], r13
    mov [general + 80], r14
    mov [general + 88], r15
    mov [general + 96], rsp
    mov rsp, [wait_stack]
    pushfq
    pop qword ptr [general + 104]
    push 2
    popfq
    mov rsi, [wait_area]
    mov eax, [wait_mask]
    xor edx, edx
    test eax, eax
    jz 4f
    xsave64 [rsi]
    jmp 5f
4:  fxsave64 [rsi]
5:  pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
.section .bss
.balign 8
general: .skip 112
wait_stack: .skip 8
wait_area: .skip 8
wait_mask: .skip 8
.section .text
"#
);

unsafe extern "C" {
    static mut general: [u64; 14];
}

/// rbx, rsi, rdi, rbp, r8 to r15, rsp (which points nowhere: no interrupt comes, and ring 0 has its own stack), and of the flags direction,
/// alignment check and ID, which the wait does not touch.
const GENERAL: [u64; 14] = [
    0x1111_2222_3333_4444,
    0x5555_6666_7777_8888,
    0x9999_aaaa_bbbb_cccc,
    0xdddd_eeee_ffff_0000,
    0x0808_0808_0808_0808,
    0x0909_0909_0909_0909,
    0x1010_1010_1010_1010,
    0x1111_1111_1111_1111,
    0x1212_1212_1212_1212,
    0x1313_1313_1313_1313,
    0x1414_1414_1414_1414,
    0x1515_1515_1515_1515,
    0x0000_dead_beef_0008,
    FLAGS | 2,
];
const FLAGS: u64 = 1 << 10 | 1 << 18 | 1 << 21;

/// Values that are compared, a few hundred; the name of each only when it differs.
struct Seen {
    values: [u64; 128],
    count: usize,
}

impl Seen {
    fn add(&mut self, value: u64) {
        if let Some(slot) = self.values.get_mut(self.count) {
            *slot = value;
            self.count += 1;
        }
    }
}

/// Which register the value of this index is.
struct Name(usize);

const SPECIAL: [&str; 11] = ["CR0", "CR2", "CR3", "CR4", "CR8", "DR0", "DR1", "DR2", "DR3", "DR6", "DR7"];
const TABLES: [&str; 8] = ["GDTR base", "GDTR limit", "IDTR base", "IDTR limit", "LDTR", "TR", "DS", "SS"];

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut index = self.0;
        if let Some((number, _)) = MSRS.get(index) {
            return write!(f, "MSR {number:#x}");
        }
        index -= MSRS.len();
        if let Some(name) = SPECIAL.get(index).or_else(|| TABLES.get(index.checked_sub(SPECIAL.len())?)) {
            return f.write_str(name);
        }
        index -= SPECIAL.len() + TABLES.len();
        if let Some((register, _)) = LAPIC_REGISTERS.get(index) {
            return write!(f, "local APIC {register:#x}");
        }
        index -= LAPIC_REGISTERS.len();
        match PINS.get(index / 2) {
            Some((pin, _)) => write!(f, "IOAPIC pin {pin}, word {}", index % 2),
            None => f.write_str(
                ["8259 mask 1", "8259 mask 2", "8254 counter 2"].get(index - 2 * PINS.len()).unwrap_or(&"?"),
            ),
        }
    }
}

fn lapic(register: u64) -> u32 {
    // SAFETY: mapped by `paging`; reading these has no effect.
    unsafe { cpu::read32(LAPIC + register) }
}

fn set_lapic(register: u64, value: u32) {
    // SAFETY: a local APIC does no DMA, and what is written is masked.
    unsafe { cpu::write32(LAPIC + register, value) };
}

fn ioapic(register: u32) -> u32 {
    // SAFETY: as for the local APIC.
    unsafe {
        cpu::write32(IOAPIC, register);
        cpu::read32(IOAPIC + 0x10)
    }
}

fn set_ioapic(register: u32, value: u32) {
    // SAFETY: as for the local APIC.
    unsafe {
        cpu::write32(IOAPIC, register);
        cpu::write32(IOAPIC + 0x10, value);
    }
}

/// Descriptor table registers and selectors.
fn tables() -> [u64; 8] {
    let (mut gdt, mut idt) = ([0u8; 10], [0u8; 10]);
    let (ldt, task, data, stack): (u16, u16, u16, u16);
    // SAFETY: stores ten bytes each into our arrays; CR4.UMIP is clear.
    unsafe {
        asm!("sgdt [{}]", in(reg) gdt.as_mut_ptr(), options(nostack, preserves_flags));
        asm!("sidt [{}]", in(reg) idt.as_mut_ptr(), options(nostack, preserves_flags));
        asm!("sldt {0:x}", "str {1:x}", "mov {2:x}, ds", "mov {3:x}, ss", out(reg) ldt, out(reg) task, out(reg) data,
            out(reg) stack, options(nomem, nostack, preserves_flags));
    }
    let base = |table: &[u8; 10]| table[2..].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let limit = |table: &[u8; 10]| u64::from(u16::from_le_bytes([table[0], table[1]]));
    [base(&gdt), limit(&gdt), base(&idt), limit(&idt), ldt.into(), task.into(), data.into(), stack.into()]
}

/// All but the general registers and the XSAVE components, in the order of [`Name`]; all ones for what is not there.
fn read_all() -> Seen {
    let mut seen = Seen { values: [0; 128], count: 0 };
    for (register, _) in MSRS {
        seen.add(cpu::rdmsr(*register).unwrap_or(u64::MAX));
    }
    for value in cpu::special_registers().into_iter().chain(tables()) {
        seen.add(value);
    }
    for (register, _) in LAPIC_REGISTERS {
        seen.add(lapic(*register).into());
    }
    for (pin, _) in PINS {
        seen.add(ioapic(0x10 + 2 * pin).into());
        seen.add(ioapic(0x11 + 2 * pin).into());
    }
    seen.add(cpu::inb(0x21).into());
    seen.add(cpu::inb(0xa1).into());
    // Read-back (8254 data sheet): the status of counter 2, without its output and "null count", which come and go.
    cpu::outb(0x43, 0b1110_1000);
    seen.add(u64::from(cpu::inb(0x42) & 0x3f));
    seen
}

/// Writes our own value to whatever takes it.
fn write_all() {
    for (register, value) in MSRS.iter().filter(|(_, value)| *value != 0) {
        cpu::wrmsr(*register, *value);
    }
    let mut values = [0; 11];
    values[1] = 0x0000_5678_9abc_d000;
    // Breakpoints on what nobody runs or touches; bit 10 of DR7 is always set, 0x55 enables all four in this task.
    values[5..9].copy_from_slice(&[0x10_0000_0000, 0x20_0000_0000, 0x30_0000_0000, 0x40_0000_0000]);
    values[9] = 0xffff_0ff0 | 0x5;
    values[10] = 0x455;
    cpu::set_special_registers(values);
    for (register, value) in LAPIC_REGISTERS.iter().filter(|(_, value)| *value != 0) {
        set_lapic(*register, *value);
    }
    for (pin, low) in PINS {
        set_ioapic(0x10 + 2 * pin, *low);
        set_ioapic(0x11 + 2 * pin, (*pin) << 24);
    }
    cpu::outb(0x21, 0xa5);
    cpu::outb(0xa1, 0x5a);
    // Counter 2, square wave, both bytes.
    for (port, value) in [(0x43, 0b1011_0110), (0x42, 0x34), (0x42, 0x12)] {
        cpu::outb(port, value);
    }
}

/// Puts back what was there, except what only goes forward (the time stamp).
fn put_back(before: &Seen) {
    let mut values = before.values.iter().copied();
    for (register, value) in MSRS {
        let old = values.next().unwrap_or(0);
        if *value != 0 && *register != 0x3b {
            cpu::wrmsr(*register, old);
        }
    }
    let mut special = [0; 11];
    special.iter_mut().zip(&mut values).for_each(|(slot, value)| *slot = value);
    cpu::set_special_registers(special);
    let mut values = values.skip(TABLES.len());
    for (register, value) in LAPIC_REGISTERS {
        let old = values.next().unwrap_or(0);
        if *value != 0 {
            set_lapic(*register, old as u32);
        }
    }
    for (pin, _) in PINS {
        set_ioapic(0x10 + 2 * pin, values.next().unwrap_or(0x1_0000) as u32);
        set_ioapic(0x11 + 2 * pin, values.next().unwrap_or(0) as u32);
    }
    for port in [0x21, 0xa1] {
        cpu::outb(port, values.next().unwrap_or(0xff) as u8);
    }
}

/// Which components there are to fill; 0 where XSAVE is not to be had, and FXSAVE must do. Opens them.
fn components() -> u32 {
    if cpu::cpuid(1).ecx >> 26 & 1 == 0 {
        return 0;
    }
    let offered = cpu::cpuid(0xd).eax & COMPONENTS;
    // All of AVX-512 or none of it, and that only with AVX (Intel SDM vol. 1, 13.3).
    let offered = if offered & 0xe4 == 0xe4 { offered } else { offered & 0b111 };
    cpu::open_xsave(offered);
    // An emulated host may lose it on the way through the VMM.
    cpu::inb(0x61);
    let open: u32;
    // SAFETY: reads XCR0, which has just been opened.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") open, out("edx") _, options(nomem, nostack, preserves_flags))
    };
    if open == offered { offered } else { 0 }
}

/// Where each component lies in the area: x87 registers, SSE registers, and those after the header.
fn places(components: u32) -> impl Iterator<Item = (usize, usize)> {
    // Control, status and tag words, then ten bytes in each of eight places of sixteen; then MXCSR; then the sixteen XMM registers.
    let x87 = (0..8).map(|i| (32 + 16 * i, 10));
    let fixed = [(0, 5), (24, 4), (160, 256)].into_iter();
    let rest = (2..32).filter(move |i| components >> i & 1 == 1).map(|i| {
        let leaf = core::arch::x86_64::__cpuid_count(0xd, i);
        (leaf.ebx as usize, leaf.eax as usize)
    });
    fixed.chain(x87).chain(rest).filter(|(start, size)| start + size <= AREA)
}

/// The command. `key` takes the byte that ends the wait.
pub fn run(key: impl FnOnce()) -> Result<(), &'static str> {
    let area = memory::pages(2).ok_or("no memory for the XSAVE areas")?;
    let (load, store) = area.split_at_mut(AREA);
    let components = components();
    fill(load, components);
    let original = read_all();
    write_all();
    let before = read_all();
    let set = before.values.iter().zip(&original.values).filter(|(a, b)| a != b).count();
    let bytes: usize = places(components).map(|(_, size)| size).sum();
    // SAFETY: ours; nothing runs beside.
    unsafe { addr_of_mut!(general).write(GENERAL) };
    say!(
        "vcpu: 14 general registers, {bytes} bytes of XCR0 {components:#x}, {set} of {} others set; waits for a key",
        before.count
    );
    // SAFETY: `load` is a valid area for these components, `store` large enough; the routine keeps what the ABI asks for, beyond the
    // floating-point registers, which are named.
    unsafe {
        asm!("call vcpu_wait", inout("rdi") load.as_ptr() => _, inout("rsi") store.as_mut_ptr() => _, inout("rdx") u64::from(components) => _,
            clobber_abi("C"));
    }
    let after = read_all();
    key();
    // SAFETY: as above.
    let now = unsafe { addr_of!(general).read() };
    put_back(&original);
    let mut changed = 0;
    for (i, (was, is)) in GENERAL.into_iter().zip(now).enumerate() {
        let mask = if i == 13 { FLAGS } else { u64::MAX };
        if was & mask != is & mask {
            say!("vcpu: general register {i} was {was:#x} and is {is:#x}");
            changed += 1;
        }
    }
    for (start, size) in places(components) {
        if load[start..start + size] != store[start..start + size] {
            say!("vcpu: {size} bytes at {start} of the XSAVE area have changed");
            changed += 1;
        }
    }
    for (i, (was, is)) in before.values.iter().zip(&after.values).enumerate().take(before.count) {
        if was != is {
            say!("vcpu: {} was {was:#x} and is {is:#x}", Name(i));
            changed += 1;
        }
    }
    say!("vcpu: {changed} changed");
    Ok(())
}

/// Makes an area to load: a pattern in every register.
fn fill(area: &mut [u8], components: u32) {
    for (start, size) in places(components) {
        for (i, byte) in area[start..start + size].iter_mut().enumerate() {
            *byte = (start + 7 * i) as u8 | 1;
        }
    }
    // All exceptions masked, other rounding and precision than at reset; status: no exception pending, top of stack 5; all registers full.
    area[..5].copy_from_slice(&[0x7f, 0x0e, 0x00, 0x28, 0xff]);
    // MXCSR: all exceptions masked, round up, flush to zero.
    area[24..28].copy_from_slice(&0xdf80u32.to_le_bytes());
    // XSTATE_BV; XCOMP_BV stays 0: the standard form.
    area[512..516].copy_from_slice(&components.to_le_bytes());
}
