//! The registers that the first vCPU starts with: one state for the Linux 64-bit boot protocol, one for PVH, and that after a reset for firmware.
//!
//! The `boot` room puts kernel, parameters, page tables and `gdt` into guest memory; the machine then calls [`BootState::apply`].

use kvm_bindings::{kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::super::CpuError;
use super::{MSR_MTRR_DEF_TYPE, msrs};
use crate::irq::LAPIC_BASE;

/// Where and how a kernel is entered. All addresses are guest physical ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootState {
    /// Linux x86 boot protocol, "64-bit boot protocol": long mode with identity-mapped pages, RSI points to `boot_params`.
    Linux64 {
        /// First instruction.
        entry: u64,
        /// `struct boot_params`.
        zero_page: u64,
        /// Top-level page table.
        page_table: u64,
        /// Stack pointer; the kernel soon sets its own.
        stack: u64,
        /// Descriptor table with the content of `gdt`.
        gdt: u64,
    },
    /// Xen PVH direct boot: 32-bit protected mode without paging, EBX points to `hvm_start_info`.
    Pvh {
        /// First instruction.
        entry: u32,
        /// `struct hvm_start_info`.
        start_info: u32,
        /// Descriptor table with the content of `gdt`.
        gdt: u64,
    },
    /// Firmware: real mode, sixteen bytes below 4 GiB (Intel SDM vol. 3 table 10-1).
    Reset,
}

/// Selectors that the Linux boot protocol fixes: `__BOOT_CS` and `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Entries of the descriptor table.
pub const GDT_ENTRIES: usize = 5;

/// Of the reset state: a segment as real mode has it, the one with the first instruction, and that instruction's place in it.
const REAL_LIMIT: u32 = 0xffff;
const RESET_BASE: u64 = 0xffff_0000;
const RESET_SELECTOR: u16 = 0xf000;
const RESET_RIP: u64 = 0xfff0;
/// Family 6, no more than that.
const RESET_RDX: u64 = 0x600;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
/// Caches off: CD and NW.
const CR0_UNCACHED: u64 = 0x6000_0000;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS: u64 = 2;
const APIC_BASE_BSP: u64 = 1 << 8;
const APIC_BASE_ENABLE: u64 = 1 << 11;

/// Flat code segment, 64-bit or 32-bit.
fn code(long: bool) -> kvm_segment {
    kvm_segment { type_: 0xb, l: u8::from(long), db: u8::from(!long), selector: CODE, ..flat() }
}

fn data() -> kvm_segment {
    kvm_segment { type_: 0x3, db: 1, selector: DATA, ..flat() }
}

/// VM entry wants a usable busy TSS (Intel SDM vol. 3 "Checks on guest segment registers").
fn task() -> kvm_segment {
    kvm_segment { limit: 0x67, type_: 0xb, present: 1, selector: TASK, ..Default::default() }
}

fn flat() -> kvm_segment {
    kvm_segment { base: 0, limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() }
}

/// The descriptor that loads `segment` (base 0, as all here are).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flag = |value: u8, bit: u32| u64::from(value) << bit;
    (limit & 0xffff)
        | flag(segment.type_, 40)
        | flag(segment.s, 44)
        | flag(segment.dpl, 45)
        | flag(segment.present, 47)
        | ((limit >> 16) << 48)
        | flag(segment.avl, 52)
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
}

impl BootState {
    /// The descriptor table that matches the segments of this state.
    pub fn gdt(&self) -> [u64; GDT_ENTRIES] {
        let long = matches!(self, Self::Linux64 { .. });
        if *self == Self::Reset {
            return [0; GDT_ENTRIES];
        }
        [0, 0, descriptor(&code(long)), descriptor(&data()), descriptor(&task())]
    }

    /// Puts the first vCPU into this state.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), CpuError> {
        if *self == Self::Reset {
            // Firmware sets the memory types up itself, and expects to find none.
            let entry = kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data: 0, ..Default::default() };
            msrs::write(vcpu, &[entry])?;
        }
        vcpu.set_sregs(&self.sregs()).map_err(CpuError::kvm("set the special registers"))?;
        vcpu.set_regs(&self.regs()).map_err(CpuError::kvm("set the registers"))
    }

    fn regs(&self) -> kvm_regs {
        match *self {
            Self::Linux64 { entry, zero_page, stack, .. } => kvm_regs {
                rip: entry,
                rsi: zero_page,
                rsp: stack,
                rbp: stack,
                rflags: RFLAGS,
                ..Default::default()
            },
            Self::Pvh { entry, start_info, .. } => {
                kvm_regs { rip: entry.into(), rbx: start_info.into(), rflags: RFLAGS, ..Default::default() }
            }
            Self::Reset => kvm_regs { rip: RESET_RIP, rdx: RESET_RDX, rflags: RFLAGS, ..Default::default() },
        }
    }

    /// Complete, so that KVM need not be asked for what it has.
    fn sregs(&self) -> kvm_sregs {
        let gdt = match *self {
            Self::Linux64 { gdt, .. } | Self::Pvh { gdt, .. } => gdt,
            Self::Reset => return reset_sregs(),
        };
        let data = data();
        let mut sregs = kvm_sregs {
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: task(),
            ldt: kvm_segment { limit: 0xffff, type_: 2, present: 0, unusable: 1, ..Default::default() },
            gdt: kvm_dtable { base: gdt, limit: (GDT_ENTRIES * 8 - 1) as u16, ..Default::default() },
            idt: kvm_dtable { base: 0, limit: 0, ..Default::default() },
            cr0: CR0_PE | CR0_ET,
            apic_base: u64::from(LAPIC_BASE) | APIC_BASE_ENABLE | APIC_BASE_BSP,
            ..Default::default()
        };
        match *self {
            Self::Linux64 { page_table, .. } => {
                sregs.cs = code(true);
                sregs.cr0 |= CR0_PG;
                sregs.cr3 = page_table;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
            }
            Self::Pvh { .. } | Self::Reset => sregs.cs = code(false),
        }
        sregs
    }
}

fn reset_sregs() -> kvm_sregs {
    let data = kvm_segment { limit: REAL_LIMIT, type_: 3, present: 1, s: 1, ..Default::default() };
    let cs = kvm_segment { base: RESET_BASE, selector: RESET_SELECTOR, type_: 0xb, ..data };
    let table = kvm_dtable { base: 0, limit: REAL_LIMIT as u16, ..Default::default() };
    kvm_sregs {
        cs,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: kvm_segment { limit: REAL_LIMIT, type_: 0xb, present: 1, ..Default::default() },
        ldt: kvm_segment { limit: REAL_LIMIT, type_: 2, present: 1, ..Default::default() },
        gdt: table,
        idt: table,
        cr0: CR0_ET | CR0_UNCACHED,
        apic_base: u64::from(LAPIC_BASE) | APIC_BASE_ENABLE | APIC_BASE_BSP,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_match_the_known_flat_ones() {
        let linux = BootState::Linux64 { entry: 0, zero_page: 0, page_table: 0, stack: 0, gdt: 0 };
        assert_eq!(linux.gdt(), [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]);
        let pvh = BootState::Pvh { entry: 0, start_info: 0, gdt: 0 };
        assert_eq!(pvh.gdt()[2], 0x00cf_9b00_0000_ffff);
    }
}
