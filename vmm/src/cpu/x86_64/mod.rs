//! What is particular to x86_64: CPUID, and the registers that a vCPU starts with.

pub mod boot_state;
mod cpuid;
mod msrs;
mod reset;
pub mod state;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::{CpuError, Topology, Vcpu, kvm};
pub use boot_state::BootState;
use cpuid::CpuidPolicy;
pub use reset::reset;

/// Four pages below the LAPIC's, in the hole: Intel processors without "unrestricted guest" run real mode in an address space
/// that KVM keeps there (three pages of TSS after one page of identity-mapped page table).
const IDENTITY_MAP: u64 = 0xfef0_c000;
const TSS: usize = 0xfef0_d000;

/// `IA32_MISC_ENABLE`: Linux takes a clear bit 0 (fast strings) for a processor without quick `rep movs` (Intel SDM vol. 4).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: firmware leaves memory write-back (type 6) with MTRRs on (bit 11). Kernels turn PAT off where they
/// find MTRRs off.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

/// Tells KVM where it may keep its real-mode pages. Call before the first vCPU exists.
pub fn prepare_vm(kvm: &Kvm, vm: &VmFd) -> Result<(), CpuError> {
    vm.set_identity_map_address(IDENTITY_MAP)
        .map_err(|e| kvm::explain(kvm, CpuError::kvm("set the identity map's address")(e)))?;
    vm.set_tss_address(TSS).map_err(|e| kvm::explain(kvm, CpuError::kvm("set the TSS's address")(e)))
}

/// Creates `count` vCPUs as they are after reset, with their CPUID; the first waits for its [`BootState`], the others for the
/// guest to start them (INIT, SIPI). Interrupt controllers must exist.
///
/// KVM's reset state already has what is not set here: the FPU as after FNINIT, and LINT0 of the first local APIC as ExtINT.
pub fn create_vcpus(kvm: &Kvm, vm: &VmFd, topology: &Topology, count: u8) -> Result<Vec<Vcpu>, CpuError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| kvm::explain(kvm, CpuError::kvm("read the supported CPUID")(e)))?;
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut policy = CpuidPolicy::new(&supported, topology, deadline_timer);
    let msrs = [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&msrs)
        .map_err(|e| CpuError::Kvm { what: "list MSRs", source: std::io::Error::other(e) })?;
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for index in 0..count {
        let apic_id = topology.apic_id(index);
        let fd = vm.create_vcpu(u64::from(apic_id)).map_err(|e| match kvm.get_max_vcpus() {
            max if max < usize::from(count) => CpuError::TooMany(max),
            _ => kvm::explain(kvm, CpuError::kvm("create a vCPU")(e)),
        })?;
        fd.set_cpuid2(policy.for_apic_id(apic_id, topology)).map_err(CpuError::kvm("set CPUID"))?;
        let set = fd.set_msrs(&msrs).map_err(CpuError::kvm("set MSRs"))?;
        if set != msrs.as_slice().len() {
            // Not fatal: a guest without these two only runs slower.
            tracing::warn!(index = msrs.as_slice()[set].index, "KVM does not take this MSR");
        }
        vcpus.push(Vcpu::new(index, fd));
    }
    Ok(vcpus)
}

#[cfg(test)]
mod tests;
