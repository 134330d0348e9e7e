//! The model-specific registers that belong to a saved vCPU: owns the list.
//!
//! KVM has a list of its own, which leaves some out (MTRRs, on many kernels) and needs /dev/kvm, closed long before a VM is saved. Here is
//! all that KVM keeps for a guest; what this host's KVM does not know is left out. Names are those of Intel SDM vol. 4, AMD APM vol. 2
//! appendix A, and Documentation/virt/kvm/x86/msr.rst.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::super::CpuError;

/// KVM takes fewer than 256 at a time.
const BATCH: usize = 200;

/// Only counts on in deadline mode of a local APIC that has been restored.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// First and last of each run, in the order in which they are restored: the time-stamp counter before what is measured by it.
const RUNS: &[(u32, u32)] = &[
    (0x3b, 0x3b),               // IA32_TSC_ADJUST
    (0x10, 0x10),               // IA32_TSC
    (0xc000_0103, 0xc000_0103), // IA32_TSC_AUX
    (0xc000_0104, 0xc000_0104), // TSC_RATIO
    (0x3a, 0x3a),               // IA32_FEATURE_CONTROL
    (0x48, 0x48),               // IA32_SPEC_CTRL
    (0x8b, 0x8b),               // IA32_BIOS_SIGN_ID
    (0xce, 0xce),               // MSR_PLATFORM_INFO
    (0xe1, 0xe1),               // IA32_UMWAIT_CONTROL
    (0x10a, 0x10a),             // IA32_ARCH_CAPABILITIES
    (0x122, 0x122),             // IA32_TSX_CTRL
    (0x140, 0x140),             // MISC_FEATURE_ENABLES
    (0x174, 0x176),             // IA32_SYSENTER_*
    (0x17a, 0x17b),             // IA32_MCG_STATUS, IA32_MCG_CTL
    (0x4d0, 0x4d0),             // IA32_MCG_EXT_CTL
    (0x400, 0x47f),             // IA32_MCi_*
    (0x1a0, 0x1a0),             // IA32_MISC_ENABLE
    (0x1c4, 0x1c5),             // IA32_XFD, IA32_XFD_ERR
    (0x1d9, 0x1d9),             // IA32_DEBUGCTL
    (0x277, 0x277),             // IA32_PAT
    (0x200, 0x20f),             // IA32_MTRR_PHYS*
    (0x250, 0x250),             // IA32_MTRR_FIX64K
    (0x258, 0x259),             // IA32_MTRR_FIX16K
    (0x268, 0x26f),             // IA32_MTRR_FIX4K
    (0x2ff, 0x2ff),             // IA32_MTRR_DEF_TYPE, which switches the others on
    (0xda0, 0xda0),             // IA32_XSS
    (0x6a0, 0x6a0),             // IA32_U_CET
    (0x6a2, 0x6a2),             // IA32_S_CET
    (0x6a4, 0x6a8),             // IA32_PL*_SSP, IA32_INTERRUPT_SSP_TABLE_ADDR
    (0xc000_0081, 0xc000_0084), // STAR, LSTAR, CSTAR, FMASK
    (0xc000_0102, 0xc000_0102), // KERNEL_GS_BASE
    (0xc001_0015, 0xc001_0015), // HWCR
    (0xc001_1029, 0xc001_1029), // DE_CFG
    (0xc001_0114, 0xc001_0114), // VM_CR
    (0xc001_0117, 0xc001_0117), // VM_HSAVE_PA
    (0xc001_011f, 0xc001_011f), // VIRT_SPEC_CTRL
    // Performance counters: what they count, the counts, and last what lets them count.
    (0x186, 0x18d),             // IA32_PERFEVTSEL*
    (0xc1, 0xc8),               // IA32_PMC*
    (0x309, 0x30c),             // IA32_FIXED_CTR*
    (0x38d, 0x38d),             // IA32_FIXED_CTR_CTRL
    (0x3f1, 0x3f2),             // IA32_PEBS_ENABLE, MSR_PEBS_DATA_CFG
    (0x600, 0x600),             // IA32_DS_AREA
    (0x38f, 0x38f),             // IA32_PERF_GLOBAL_CTRL
    (0xc001_0000, 0xc001_0007), // PERF_LEGACY_CTL*, PERF_LEGACY_CTR*
    (0xc001_0200, 0xc001_020b), // PERF_CTL*, PERF_CTR*
    (0xc000_0301, 0xc000_0301), // PERF_CNTR_GLOBAL_CTL
    // KVM's own. The new name of the clock after the old one, which KVM takes for a sign of an old guest.
    (0x11, 0x12),               // MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME
    (0x4b56_4d00, 0x4b56_4d01), // MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME_NEW
    (0x4b56_4d03, 0x4b56_4d06), // steal time, end of interrupt, poll control, vector of page faults
    (0x4b56_4d02, 0x4b56_4d02), // asynchronous page faults, which the vector must precede
    (0x4b56_4d08, 0x4b56_4d08), // MSR_KVM_MIGRATION_CONTROL
    (TSC_DEADLINE, TSC_DEADLINE),
];

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, CpuError> {
    Msrs::from_entries(entries)
        .map_err(|e| CpuError::Kvm { what: "list MSRs", source: std::io::Error::other(e) })
}

/// Reads all that this KVM has, in the order of the list.
pub(super) fn read(fd: &VcpuFd) -> Result<Vec<kvm_msr_entry>, CpuError> {
    let numbers = RUNS.iter().flat_map(|(first, last)| *first..=*last);
    let wanted: Vec<_> = numbers.map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let (mut found, mut rest) = (Vec::with_capacity(wanted.len()), wanted.as_slice());
    while !rest.is_empty() {
        let batch = rest.get(..BATCH.min(rest.len())).unwrap_or_default();
        let mut msrs = list(batch)?;
        // KVM stops at the first that it does not have, or that this guest's processor does not.
        let count = fd.get_msrs(&mut msrs).map_err(CpuError::kvm("read MSRs"))?;
        found.extend(msrs.as_slice().iter().take(count));
        let skipped = usize::from(count < batch.len());
        rest = rest.get(count + skipped..).unwrap_or_default();
    }
    Ok(found)
}

/// Writes them, in their order.
pub(super) fn write(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), CpuError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let batch = rest.get(..BATCH.min(rest.len())).unwrap_or_default();
        let count = fd.set_msrs(&list(batch)?).map_err(CpuError::kvm("set MSRs"))?;
        let Some(refused) = batch.get(count) else {
            rest = rest.get(batch.len()..).unwrap_or_default();
            continue;
        };
        // What this host lacks and the guest has not used.
        if refused.data != 0 {
            return Err(CpuError::Msr { index: refused.index, value: refused.data });
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(())
}
