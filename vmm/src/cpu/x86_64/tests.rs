//! What a new vCPU is, on the host's KVM. Without `/dev/kvm` there is nothing to test here.

use super::*;
use crate::cpu::topology::smp;
use crate::inherit::Inherited;
use crate::{cpu, irq};

/// LINT0 of the local APIC, as an offset into its registers.
const LVT_LINT0: usize = 0x350;

#[test]
fn reset_leaves_what_boot_relies_on() {
    if !std::path::Path::new(cpu::KVM_PATH).exists() {
        eprintln!("no /dev/kvm: skipped");
        return;
    }
    let topology = Topology::new(&smp(1, 1, 1, 2, 1)).unwrap();
    let (kvm, vm) = cpu::open(&Inherited::default()).unwrap();
    prepare_vm(&kvm, &vm).unwrap();
    irq::create_controllers(&vm).unwrap();
    let vcpus = create_vcpus(&kvm, &vm, &topology, 2).unwrap();
    let first = vcpus[0].fd();
    // KVM_GET_FPU and KVM_SET_FPU do not carry MXCSR; the XSAVE area does, as 32-bit word 6 of its legacy part.
    assert_eq!(first.get_fpu().unwrap().fcw, 0x37f);
    assert_eq!(first.get_xsave().unwrap().region[6], 0x1f80);
    let lapic = first.get_lapic().unwrap();
    let lint0: Vec<u8> = lapic.regs[LVT_LINT0..LVT_LINT0 + 4].iter().map(|b| *b as u8).collect();
    assert_eq!(lint0[1] & 7, 7, "delivery mode ExtINT: {lint0:?}");
    let state = BootState::Linux64 {
        entry: 0x10_0200,
        zero_page: 0x7000,
        page_table: 0x9000,
        stack: 0x8ff0,
        gdt: 0x500,
    };
    state.apply(first).unwrap();
    let (regs, sregs) = (first.get_regs().unwrap(), first.get_sregs().unwrap());
    assert_eq!((regs.rip, regs.rsi), (0x10_0200, 0x7000));
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.ds.selector), (0x10, 1, 0x18));
    assert_eq!((sregs.cr3, sregs.efer & 0x500), (0x9000, 0x500));
    let cpuid = vcpus[1].fd().get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
    let ids = cpuid.as_slice().iter().filter(|e| e.function == 1).map(|e| e.ebx >> 24);
    assert_eq!(ids.collect::<Vec<_>>(), [1]);
}
