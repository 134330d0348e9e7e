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

const CREATE: &str = "create a vCPU";

/// Tells KVM where it may keep its real-mode pages. Call before the first vCPU exists.
pub fn prepare_vm(kvm: &Kvm, vm: &VmFd) -> Result<(), CpuError> {
    vm.set_identity_map_address(IDENTITY_MAP)
        .map_err(|e| kvm::explain(kvm, CpuError::kvm("set the identity map's address")(e)))?;
    vm.set_tss_address(TSS).map_err(|e| kvm::explain(kvm, CpuError::kvm("set the TSS's address")(e)))
}

/// Creates `count` vCPUs: see [`VcpuMaker`]. Interrupt controllers must exist.
pub fn create_vcpus(kvm: &Kvm, vm: &VmFd, topology: &Topology, count: u8) -> Result<Vec<Vcpu>, CpuError> {
    VcpuMaker::new(kvm, topology)?.make_first(kvm, vm, topology, count)
}

/// Makes the vCPUs of one VM, which differ in their APIC ids only.
pub struct VcpuMaker {
    policy: CpuidPolicy,
    msrs: Msrs,
}

impl VcpuMaker {
    /// For vCPUs that can do all that this host's KVM supports.
    pub fn new(kvm: &Kvm, topology: &Topology) -> Result<Self, CpuError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| kvm::explain(kvm, CpuError::kvm("read the supported CPUID")(e)))?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        let policy = CpuidPolicy::new(&supported, topology, deadline_timer);
        let msrs = [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)]
            .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
        let msrs = Msrs::from_entries(&msrs)
            .map_err(|e| CpuError::Kvm { what: "list MSRs", source: std::io::Error::other(e) })?;
        Ok(Self { policy, msrs })
    }

    /// Creates the vCPUs from 0 to `count`. The first waits for its [`BootState`].
    pub fn make_first(
        &mut self,
        kvm: &Kvm,
        vm: &VmFd,
        topology: &Topology,
        count: u8,
    ) -> Result<Vec<Vcpu>, CpuError> {
        let explain = |error| match (error, kvm.get_max_vcpus()) {
            (CpuError::Kvm { what: CREATE, .. }, max) if max < usize::from(count) => CpuError::TooMany(max),
            (error @ CpuError::Kvm { what: CREATE, .. }, _) => kvm::explain(kvm, error),
            (error, _) => error,
        };
        (0..count).map(|index| self.make(vm, topology, index).map_err(explain)).collect()
    }

    /// Creates one vCPU as it is after reset, with its CPUID. It waits for the guest to start it (INIT, SIPI).
    ///
    /// KVM's reset state already has what is not set here: the FPU as after FNINIT, and LINT0 of the first local APIC as ExtINT.
    pub fn make(&mut self, vm: &VmFd, topology: &Topology, index: u8) -> Result<Vcpu, CpuError> {
        let apic_id = topology.apic_id(index);
        let fd = vm.create_vcpu(u64::from(apic_id)).map_err(CpuError::kvm(CREATE))?;
        fd.set_cpuid2(self.policy.for_apic_id(apic_id, topology)).map_err(CpuError::kvm("set CPUID"))?;
        let set = fd.set_msrs(&self.msrs).map_err(CpuError::kvm("set MSRs"))?;
        if let Some(msr) = self.msrs.as_slice().get(set) {
            // Not fatal: a guest without these two only runs slower.
            tracing::warn!(index = msr.index, "KVM does not take this MSR");
        }
        Ok(Vcpu::new(index, fd))
    }
}

#[cfg(test)]
mod tests;
