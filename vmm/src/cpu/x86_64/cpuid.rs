//! What the guest learns from CPUID: all that KVM supports on this host, with the topology replaced by the VM's own.
//!
//! Built once; for each further vCPU only its APIC id is patched in. Sources: Intel SDM vol. 2A "CPUID", AMD APM vol. 3
//! appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use crate::cpu::Topology;

const LEAF_VENDOR: u32 = 0;
const LEAF_FEATURES: u32 = 1;
const LEAF_CACHES: u32 = 4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

// Leaf 1.
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
// Leaf 0x8000_0001.
const ECX_CMP_LEGACY: u32 = 1 << 1;

// Level types of leaves 0xB and 0x1F.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
const LEVEL_DIE: u32 = 5;

/// CPUID of one VM.
pub(super) struct CpuidPolicy {
    cpuid: CpuId,
}

/// Replaces the bits `low..low + width` of a register.
fn put(register: &mut u32, low: u32, width: u32, value: u32) {
    let mask = (u32::MAX >> (32 - width)) << low;
    *register = (*register & !mask) | ((value << low) & mask);
}

fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..Default::default() }
}

impl CpuidPolicy {
    /// Policy from what KVM supports.
    pub(super) fn new(supported: &CpuId, topology: &Topology, deadline_timer: bool) -> Self {
        let mut entries = supported.as_slice().to_vec();
        let has = |leaf| entries.iter().any(|e| e.function == leaf);
        // AMD and Hygon describe topology in leaves of their own, besides the common ones.
        let amd = entries
            .iter()
            .any(|e| e.function == LEAF_VENDOR && matches!(&e.ebx.to_le_bytes(), b"Auth" | b"Hygo"));
        let die_level = topology.dies() > 1 || has(LEAF_TOPOLOGY_V2);
        let highest = if die_level { LEAF_TOPOLOGY_V2 } else { LEAF_TOPOLOGY };
        entries.retain(|e| !matches!(e.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2));
        for e in &mut entries {
            match e.function {
                LEAF_VENDOR => e.eax = e.eax.max(highest),
                LEAF_FEATURES => features(e, topology, deadline_timer),
                LEAF_CACHES if !amd => caches(e, topology),
                LEAF_AMD_FEATURES if amd => {
                    put(
                        &mut e.ecx,
                        ECX_CMP_LEGACY.trailing_zeros(),
                        1,
                        u32::from(topology.threads_per_socket() > 1),
                    );
                }
                LEAF_AMD_SIZES if amd => {
                    put(&mut e.ecx, 0, 8, topology.threads_per_socket() - 1);
                    put(&mut e.ecx, 12, 4, topology.socket_shift());
                }
                LEAF_AMD_CACHES if amd => caches(e, topology),
                LEAF_AMD_TOPOLOGY if amd => {
                    put(&mut e.ebx, 8, 8, topology.threads() - 1);
                    // One node for each die.
                    put(&mut e.ecx, 8, 3, topology.dies() - 1);
                }
                _ => {}
            }
        }
        topology_levels(&mut entries, LEAF_TOPOLOGY, topology, false);
        if die_level {
            topology_levels(&mut entries, LEAF_TOPOLOGY_V2, topology, true);
        }
        // KVM takes this many at most and the host's own set is far below it.
        entries.truncate(KVM_MAX_CPUID_ENTRIES);
        let cpuid = CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone());
        Self { cpuid }
    }

    /// The set for the vCPU with this APIC id.
    pub(super) fn for_apic_id(&mut self, apic_id: u32, topology: &Topology) -> &CpuId {
        for e in self.cpuid.as_mut_slice() {
            match e.function {
                LEAF_FEATURES => put(&mut e.ebx, 24, 8, apic_id),
                LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => e.edx = apic_id,
                LEAF_AMD_TOPOLOGY => {
                    e.eax = apic_id;
                    put(
                        &mut e.ebx,
                        0,
                        8,
                        (apic_id & ((1 << topology.socket_shift()) - 1)) >> topology.core_shift(),
                    );
                    put(&mut e.ecx, 0, 8, apic_id >> topology.die_shift());
                }
                _ => {}
            }
        }
        &self.cpuid
    }
}

fn features(e: &mut kvm_cpuid_entry2, topology: &Topology, deadline_timer: bool) {
    // How many APIC ids a package spans; 8 bits, and only meaningful with HTT set.
    put(&mut e.ebx, 16, 8, (1 << topology.socket_shift()).min(255));
    put(&mut e.edx, EDX_HTT.trailing_zeros(), 1, u32::from(topology.threads_per_socket() > 1));
    e.ecx |= ECX_HYPERVISOR;
    // KVM emulates the deadline timer in its LAPIC but leaves it to us to say so. On a hardware-reduced platform Linux has
    // no PIT to calibrate the LAPIC's own counter with.
    put(&mut e.ecx, ECX_TSC_DEADLINE.trailing_zeros(), 1, u32::from(deadline_timer));
}

/// Leaves 4 (Intel) and 0x8000_001D (AMD): who shares each cache. The sizes stay those of the host.
fn caches(e: &mut kvm_cpuid_entry2, topology: &Topology) {
    let (kind, level) = (e.eax & 0x1f, (e.eax >> 5) & 7);
    if kind == 0 {
        return;
    }
    let shift = if level <= 2 { topology.core_shift() } else { topology.die_shift() };
    put(&mut e.eax, 14, 12, (1 << shift) - 1);
    if e.function == LEAF_CACHES {
        put(&mut e.eax, 26, 6, (1 << (topology.socket_shift() - topology.core_shift())) - 1);
    }
}

fn topology_levels(entries: &mut Vec<kvm_cpuid_entry2>, leaf: u32, topology: &Topology, die: bool) {
    let mut levels = vec![(LEVEL_SMT, topology.core_shift(), topology.threads())];
    if die && topology.dies() > 1 {
        levels.push((LEVEL_CORE, topology.die_shift(), topology.threads_per_die()));
        levels.push((LEVEL_DIE, topology.socket_shift(), topology.threads_per_socket()));
    } else {
        levels.push((LEVEL_CORE, topology.socket_shift(), topology.threads_per_socket()));
    }
    // The level of type 0 ends the list.
    levels.push((0, 0, 0));
    for (index, (kind, shift, count)) in (0..).zip(levels) {
        entries.push(kvm_cpuid_entry2 {
            eax: shift,
            ebx: count,
            ecx: (kind << 8) | index,
            ..entry(leaf, index)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::topology::smp;

    fn supported(vendor: [u8; 4]) -> CpuId {
        let leaf = |function, index, eax, ebx| kvm_cpuid_entry2 { eax, ebx, ..entry(function, index) };
        CpuId::from_entries(&[
            leaf(LEAF_VENDOR, 0, 7, u32::from_le_bytes(vendor)),
            leaf(LEAF_FEATURES, 0, 0, 0xffff_0000),
            leaf(LEAF_CACHES, 0, (1 << 5) | 1, 0),
            leaf(LEAF_CACHES, 3, (3 << 5) | 3, 0),
            leaf(LEAF_AMD_FEATURES, 0, 0, 0),
            leaf(LEAF_AMD_SIZES, 0, 0, 0),
            leaf(LEAF_AMD_TOPOLOGY, 0, 0, 0),
        ])
        .unwrap()
    }

    fn get(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn describes_128_vcpus_as_128_cores_of_one_socket() {
        let topology = Topology::new(&smp(1, 1, 1, 128, 1)).unwrap();
        let mut policy = CpuidPolicy::new(&supported(*b"Genu"), &topology, true);
        let cpuid = policy.for_apic_id(77, &topology);
        let features = get(cpuid, LEAF_FEATURES, 0);
        assert_eq!(features.ebx >> 24, 77);
        assert_eq!((features.ebx >> 16) & 0xff, 128);
        assert_eq!(features.ecx & (ECX_TSC_DEADLINE | ECX_HYPERVISOR), ECX_TSC_DEADLINE | ECX_HYPERVISOR);
        assert_ne!(features.edx & EDX_HTT, 0);
        assert_eq!(get(cpuid, LEAF_VENDOR, 0).eax, LEAF_TOPOLOGY);
        let smt = get(cpuid, LEAF_TOPOLOGY, 0);
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (0, 1, 0x100, 77));
        let core = get(cpuid, LEAF_TOPOLOGY, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (7, 128, 0x201, 77));
        assert_eq!(get(cpuid, LEAF_TOPOLOGY, 2).ecx, 2);
        // L1 belongs to one thread, L3 to all ids of the socket.
        assert_eq!((get(cpuid, LEAF_CACHES, 0).eax >> 14) & 0xfff, 0);
        assert_eq!((get(cpuid, LEAF_CACHES, 3).eax >> 14) & 0xfff, 127);
    }

    #[test]
    fn dies_need_the_second_topology_leaf() {
        let topology = Topology::new(&smp(2, 2, 1, 2, 2)).unwrap();
        let mut policy = CpuidPolicy::new(&supported(*b"Genu"), &topology, false);
        let cpuid = policy.for_apic_id(9, &topology);
        assert_eq!(get(cpuid, LEAF_VENDOR, 0).eax, LEAF_TOPOLOGY_V2);
        let levels: Vec<_> =
            (0..4).map(|i| get(cpuid, LEAF_TOPOLOGY_V2, i)).map(|e| (e.ecx, e.eax, e.ebx)).collect();
        assert_eq!(levels, [(0x100, 1, 2), (0x201, 2, 4), (0x502, 3, 8), (3, 0, 0)]);
        assert_eq!(get(cpuid, LEAF_TOPOLOGY, 1).eax, 3);
        assert_eq!(get(cpuid, LEAF_FEATURES, 0).ecx & ECX_TSC_DEADLINE, 0);
    }

    #[test]
    fn amd_leaves_follow() {
        let topology = Topology::new(&smp(2, 1, 1, 4, 2)).unwrap();
        let mut policy = CpuidPolicy::new(&supported(*b"Auth"), &topology, true);
        let cpuid = policy.for_apic_id(13, &topology);
        assert_eq!(get(cpuid, LEAF_AMD_FEATURES, 0).ecx & ECX_CMP_LEGACY, ECX_CMP_LEGACY);
        assert_eq!(get(cpuid, LEAF_AMD_SIZES, 0).ecx, 7 | (3 << 12));
        let place = get(cpuid, LEAF_AMD_TOPOLOGY, 0);
        assert_eq!((place.eax, place.ebx, place.ecx), (13, (1 << 8) | 2, 1));
    }

    #[test]
    fn one_vcpu_is_one_thread() {
        let topology = Topology::new(&smp(1, 1, 1, 1, 1)).unwrap();
        let mut policy = CpuidPolicy::new(&supported(*b"Auth"), &topology, true);
        let cpuid = policy.for_apic_id(0, &topology);
        assert_eq!(get(cpuid, LEAF_FEATURES, 0).edx & EDX_HTT, 0);
        assert_eq!(get(cpuid, LEAF_AMD_FEATURES, 0).ecx & ECX_CMP_LEGACY, 0);
    }
}
