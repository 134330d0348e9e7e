//! A vCPU as after power-on, without making a new one: KVM cannot take a vCPU out of a VM.
//!
//! The first vCPU is then given its [`BootState`]; the others wait for the guest's INIT, on which KVM itself resets what is left.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, Msrs, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::super::{CpuError, Vcpu};
use super::{
    BootState, MISC_ENABLE_FAST_STRING, MSR_MISC_ENABLE, MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK,
};
use crate::irq::LAPIC_BASE;

const APIC_BASE_ENABLE: u64 = 1 << 11;
const CR0_RESET: u64 = 0x6000_0010;
const RFLAGS_RESET: u64 = 2;
const DR6_RESET: u64 = 0xffff_0ff0;
const DR7_RESET: u64 = 0x400;
const FCW_RESET: u32 = 0x37f;
const MXCSR_RESET: u32 = 0x1f80;
/// x87 state is always enabled.
const XCR0_RESET: u64 = 1;

/// MSRs and their values after reset (Intel SDM vol. 3 table 10-1, vol. 4). KVM's own come first: each makes KVM write to an address of the guest,
/// which may be anything else after the reset. The time-stamp counter goes on, as it does over INIT.
const MSRS: &[(u32, u64)] = &[
    (0x4b56_4d01, 0),               // MSR_KVM_SYSTEM_TIME_NEW
    (0x4b56_4d00, 0),               // MSR_KVM_WALL_CLOCK_NEW
    (0x12, 0),                      // MSR_KVM_SYSTEM_TIME
    (0x11, 0),                      // MSR_KVM_WALL_CLOCK
    (0x4b56_4d02, 0),               // MSR_KVM_ASYNC_PF_EN
    (0x4b56_4d06, 0),               // MSR_KVM_ASYNC_PF_INT
    (0x4b56_4d03, 0),               // MSR_KVM_STEAL_TIME
    (0x4b56_4d04, 0),               // MSR_KVM_PV_EOI_EN
    (0x4b56_4d05, 1),               // MSR_KVM_POLL_CONTROL
    (0x6e0, 0),                     // IA32_TSC_DEADLINE
    (0x38f, 0),                     // IA32_PERF_GLOBAL_CTRL
    (0x1d9, 0),                     // IA32_DEBUGCTL
    (0x48, 0),                      // IA32_SPEC_CTRL
    (0x174, 0),                     // IA32_SYSENTER_CS
    (0x175, 0),                     // IA32_SYSENTER_ESP
    (0x176, 0),                     // IA32_SYSENTER_EIP
    (0xc000_0081, 0),               // IA32_STAR
    (0xc000_0082, 0),               // IA32_LSTAR
    (0xc000_0083, 0),               // IA32_CSTAR
    (0xc000_0084, 0),               // IA32_FMASK
    (0xc000_0102, 0),               // IA32_KERNEL_GS_BASE
    (0xc000_0103, 0),               // IA32_TSC_AUX
    (0x277, 0x0007_0406_0007_0406), // IA32_PAT
    (0xda0, 0),                     // IA32_XSS
    (0x17a, 0),                     // IA32_MCG_STATUS
    (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
];

/// Offsets in the page of a local APIC (Intel SDM vol. 3 table 11-1).
mod lapic {
    pub(super) const ID: usize = 0x20;
    pub(super) const TPR: usize = 0x80;
    pub(super) const LDR: usize = 0xd0;
    pub(super) const DFR: usize = 0xe0;
    pub(super) const SVR: usize = 0xf0;
    /// ISR, TMR and IRR, eight registers each.
    pub(super) const ISR: usize = 0x100;
    pub(super) const IRR_END: usize = 0x280;
    pub(super) const ESR: usize = 0x280;
    pub(super) const LVT_CMCI: usize = 0x2f0;
    pub(super) const ICR_LOW: usize = 0x300;
    pub(super) const ICR_HIGH: usize = 0x310;
    pub(super) const LVT_TIMER: usize = 0x320;
    pub(super) const LVT_LINT0: usize = 0x350;
    pub(super) const LVT_ERROR: usize = 0x370;
    pub(super) const TIMER_INITIAL: usize = 0x380;
    pub(super) const TIMER_CURRENT: usize = 0x390;
    pub(super) const TIMER_DIVIDE: usize = 0x3e0;
    pub(super) const MASKED: u32 = 1 << 16;
    /// LINT0 as KVM has it at reset: the PIC's interrupts come through.
    pub(super) const EXTINT: u32 = 7 << 8;
}

/// Resets `vcpu`, which must not run; `boot` is what the first one then starts with. Call on the vCPU's own thread, if it has one.
pub fn reset(vcpu: &Vcpu, apic_id: u8, boot: Option<&BootState>) -> Result<(), CpuError> {
    let fd = vcpu.fd();
    let first = vcpu.index() == 0;
    for (index, data) in MSRS {
        let entry = [kvm_msr_entry { index: *index, data: *data, ..Default::default() }];
        let msrs = Msrs::from_entries(&entry)
            .map_err(|e| CpuError::Kvm { what: "list MSRs", source: std::io::Error::other(e) })?;
        // One at a time: KVM stops at the first that this processor does not have.
        let _ = fd.set_msrs(&msrs);
    }
    events(fd)?;
    // Out of long mode and x2APIC mode before the local APIC gets registers in xAPIC's format.
    let mut sregs = fd.get_sregs().map_err(CpuError::kvm("read the special registers"))?;
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer) = (CR0_RESET, 0, 0, 0, 0);
    sregs.apic_base = u64::from(LAPIC_BASE) | APIC_BASE_ENABLE | (sregs.apic_base & (1 << 8));
    sregs.interrupt_bitmap = Default::default();
    (sregs.cs.l, sregs.cs.db) = (0, 1);
    fd.set_sregs(&sregs).map_err(CpuError::kvm("set the special registers"))?;
    let regs = kvm_regs { rflags: RFLAGS_RESET, ..Default::default() };
    fd.set_regs(&regs).map_err(CpuError::kvm("set the registers"))?;
    local_apic(fd, apic_id)?;
    floating_point(fd)?;
    let debug = kvm_debugregs { dr6: DR6_RESET, dr7: DR7_RESET, ..Default::default() };
    fd.set_debug_regs(&debug).map_err(CpuError::kvm("set the debug registers"))?;
    let mp_state = if first { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(CpuError::kvm("set the run state"))?;
    if first { boot.map_or(Ok(()), |boot| boot.apply(fd)) } else { Ok(()) }
}

/// Nothing is pending.
fn events(fd: &VcpuFd) -> Result<(), CpuError> {
    let flags =
        KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    let none = kvm_vcpu_events { flags, ..Default::default() };
    fd.set_vcpu_events(&none).map_err(CpuError::kvm("clear pending events"))
}

fn local_apic(fd: &VcpuFd, apic_id: u8) -> Result<(), CpuError> {
    // Read first: the version register and what else there may be stay.
    let mut state = fd.get_lapic().map_err(CpuError::kvm("read the local APIC"))?;
    let mut set = |offset: usize, value: u32| put(&mut state, offset, value);
    set(lapic::ID, u32::from(apic_id) << 24);
    for offset in (lapic::ISR..lapic::IRR_END).step_by(0x10) {
        set(offset, 0);
    }
    for offset in [lapic::TPR, lapic::LDR, lapic::ESR, lapic::ICR_LOW, lapic::ICR_HIGH] {
        set(offset, 0);
    }
    for offset in [lapic::TIMER_INITIAL, lapic::TIMER_CURRENT, lapic::TIMER_DIVIDE] {
        set(offset, 0);
    }
    set(lapic::DFR, u32::MAX);
    set(lapic::SVR, 0xff);
    for offset in (lapic::LVT_TIMER..=lapic::LVT_ERROR).step_by(0x10).chain([lapic::LVT_CMCI]) {
        set(offset, lapic::MASKED);
    }
    set(lapic::LVT_LINT0, lapic::EXTINT);
    fd.set_lapic(&state).map_err(CpuError::kvm("set the local APIC"))
}

fn put(state: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (to, from) in state.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *to = from as libc::c_char;
    }
}

/// All components as after XRSTOR of nothing; x87 and SSE control words at their defaults.
fn floating_point(fd: &VcpuFd) -> Result<(), CpuError> {
    let mut xsave = kvm_xsave::default();
    xsave.region[0] = FCW_RESET;
    xsave.region[6] = MXCSR_RESET;
    // SAFETY: the VM has not enabled any dynamically enabled component (ARCH_REQ_XCOMP_GUEST_PERM), so KVM reads no further
    // than this structure.
    unsafe { fd.set_xsave(&xsave) }.map_err(CpuError::kvm("set the floating-point state"))?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = XCR0_RESET;
    match fd.set_xcrs(&xcrs) {
        // EINVAL: a processor without XSAVE.
        Err(e) if e.errno() != libc::EINVAL => Err(CpuError::kvm("set XCR0")(e)),
        _ => Ok(()),
    }
}
