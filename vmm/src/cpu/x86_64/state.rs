//! Everything of a vCPU that a guest can see, to be saved and given to another vCPU: owns the order in which KVM needs it.
//!
//! ```text
//! read:   run state (which may move a pending INIT or SIPI), then the rest in any order
//! write:  CPUID, which decides what exists · special registers (they switch the modes on) · XCR0, XSAVE · MSRs with the time-stamp
//!         counter · local APIC · its deadline timer · debug registers · run state · pending events, which the others would overwrite
//! ```
//!
//! A state that was read back is bytes that anybody may have written: KVM checks it, and what it lets pass harms only the guest. Nested
//! virtualisation is not carried: a guest that runs guests must have stopped them.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::CpuError;
use super::msrs;

/// What one part of a vCPU's state is called, and its bytes.
pub type Part = (&'static str, Vec<u8>);

/// Time-stamp counters of hosts differ by this many parts in a million though they are of one kind; guests do not mind.
const TSC_TOLERANCE_PPM: u64 = 250;

/// The state of one vCPU.
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// 0: this KVM does not say.
    tsc_khz: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    msrs: Vec<kvm_msr_entry>,
    lapic: kvm_lapic_state,
    debug: kvm_debugregs,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
}

/// One structure of KVM's interface from its bytes.
fn exactly<T: FromBytes>(name: &'static str, bytes: &[u8]) -> Result<T, CpuError> {
    T::read_from_bytes(bytes).map_err(|_| CpuError::BadState(name))
}

/// A list of them.
fn list<T: FromBytes>(name: &'static str, bytes: &[u8], most: usize) -> Result<Vec<T>, CpuError> {
    let entries = bytes.chunks(size_of::<T>()).take(most + 1).map(|entry| exactly(name, entry));
    let entries: Vec<T> = entries.collect::<Result<_, _>>()?;
    if entries.len() > most { Err(CpuError::BadState(name)) } else { Ok(entries) }
}

fn bytes<T: IntoBytes + Immutable>(entries: &[T]) -> Vec<u8> {
    entries.as_bytes().to_vec()
}

/// Most MSRs that are read back.
const MSRS_MAX: usize = 1024;

impl VcpuState {
    /// Reads the state of a vCPU that does not run. Call on the vCPU's own thread.
    pub fn read(fd: &VcpuFd) -> Result<Self, CpuError> {
        let mp_state = fd.get_mp_state().map_err(CpuError::kvm("read the run state"))?;
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(CpuError::kvm("read CPUID"))?;
        Ok(Self {
            mp_state,
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            regs: fd.get_regs().map_err(CpuError::kvm("read the registers"))?,
            sregs: fd.get_sregs().map_err(CpuError::kvm("read the special registers"))?,
            xcrs: match fd.get_xcrs() {
                // A processor without XSAVE.
                Err(e) if e.errno() == libc::EINVAL => kvm_xcrs::default(),
                xcrs => xcrs.map_err(CpuError::kvm("read XCR0"))?,
            },
            // Complete in this form: no component that is larger has been asked for (ARCH_REQ_XCOMP_GUEST_PERM).
            xsave: fd.get_xsave().map_err(CpuError::kvm("read the floating-point state"))?,
            msrs: msrs::read(fd)?,
            lapic: fd.get_lapic().map_err(CpuError::kvm("read the local APIC"))?,
            debug: fd.get_debug_regs().map_err(CpuError::kvm("read the debug registers"))?,
            events: fd.get_vcpu_events().map_err(CpuError::kvm("read pending events"))?,
        })
    }

    /// Gives the state to a new vCPU that has not run.
    pub fn write(&self, fd: &VcpuFd) -> Result<(), CpuError> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| CpuError::BadState("cpu-cpuid"))?;
        fd.set_cpuid2(&cpuid).map_err(CpuError::kvm("set CPUID"))?;
        self.write_frequency(fd)?;
        fd.set_sregs(&self.sregs).map_err(CpuError::kvm("set the special registers"))?;
        fd.set_regs(&self.regs).map_err(CpuError::kvm("set the registers"))?;
        if self.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&self.xcrs).map_err(CpuError::kvm("set XCR0"))?;
        }
        // SAFETY: the VM has not enabled any dynamically enabled component (ARCH_REQ_XCOMP_GUEST_PERM), so KVM reads no further than
        // this structure.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(CpuError::kvm("set the floating-point state"))?;
        let (deadline, others): (Vec<_>, Vec<_>) =
            self.msrs.iter().partition(|msr| msr.index == msrs::TSC_DEADLINE);
        msrs::write(fd, &others)?;
        fd.set_lapic(&self.lapic).map_err(CpuError::kvm("set the local APIC"))?;
        msrs::write(fd, &deadline)?;
        fd.set_debug_regs(&self.debug).map_err(CpuError::kvm("set the debug registers"))?;
        fd.set_mp_state(self.mp_state).map_err(CpuError::kvm("set the run state"))?;
        fd.set_vcpu_events(&self.events).map_err(CpuError::kvm("set pending events"))?;
        // Tells the guest's watchdogs that time has passed. EINVAL: this guest does not use kvmclock.
        let _ = fd.kvmclock_ctrl();
        Ok(())
    }

    fn write_frequency(&self, fd: &VcpuFd) -> Result<(), CpuError> {
        let (saved, host) = (u64::from(self.tsc_khz), u64::from(fd.get_tsc_khz().unwrap_or(0)));
        if saved == 0 || host == 0 || saved.abs_diff(host) * 1_000_000 <= saved * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        fd.set_tsc_khz(self.tsc_khz).map_err(|_| CpuError::TscFrequency { saved, host })
    }

    /// Refuses a state that needs more than `fd`, a vCPU of this host as it is made for a new VM, offers.
    pub fn check_features(&self, fd: &VcpuFd) -> Result<(), CpuError> {
        let here = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(CpuError::kvm("read CPUID"))?;
        let find = |set: &[kvm_cpuid_entry2], function, index| {
            set.iter().find(|e| (e.function, e.index) == (function, index)).copied().unwrap_or_default()
        };
        let registers = |e: &kvm_cpuid_entry2| [e.eax, e.ebx, e.ecx, e.edx];
        let vendor = |set: &[kvm_cpuid_entry2]| {
            let entry = find(set, 0, 0);
            (entry.ebx, entry.edx, entry.ecx)
        };
        if vendor(&self.cpuid) != vendor(here.as_slice()) {
            return Err(CpuError::Vendor);
        }
        for (function, index, masks) in FEATURES {
            let saved = registers(&find(&self.cpuid, *function, *index));
            let host = registers(&find(here.as_slice(), *function, *index));
            for (register, ((saved, host), mask)) in saved.iter().zip(host).zip(masks).enumerate() {
                let missing = saved & !host & mask;
                if missing != 0 {
                    let register = ["eax", "ebx", "ecx", "edx"].get(register).copied().unwrap_or_default();
                    return Err(CpuError::Features { leaf: *function, index: *index, register, missing });
                }
            }
        }
        Ok(())
    }

    /// The state as named bytes, in the form of KVM's interface.
    pub fn parts(&self) -> Vec<Part> {
        vec![
            ("cpu-cpuid", bytes(&self.cpuid)),
            ("cpu-tsc-khz", self.tsc_khz.to_le_bytes().to_vec()),
            ("cpu-regs", bytes(&[self.regs])),
            ("cpu-sregs", bytes(&[self.sregs])),
            ("cpu-xcrs", bytes(&[self.xcrs])),
            ("cpu-xsave", bytes(std::slice::from_ref(&self.xsave))),
            ("cpu-msrs", bytes(&self.msrs)),
            ("cpu-lapic", bytes(&[self.lapic])),
            ("cpu-debug", bytes(&[self.debug])),
            ("cpu-mp-state", bytes(&[self.mp_state])),
            ("cpu-events", bytes(&[self.events])),
        ]
    }

    /// A state from its parts, which `part` looks up by their names.
    pub fn from_parts<E: From<CpuError>>(
        mut part: impl FnMut(&'static str) -> Result<Vec<u8>, E>,
    ) -> Result<Self, E> {
        let mut cpuid = part("cpu-cpuid")?;
        let state = Self {
            cpuid: list("cpu-cpuid", &std::mem::take(&mut cpuid), KVM_MAX_CPUID_ENTRIES)?,
            tsc_khz: u32::from_le_bytes(exactly("cpu-tsc-khz", &part("cpu-tsc-khz")?)?),
            regs: exactly("cpu-regs", &part("cpu-regs")?)?,
            sregs: exactly("cpu-sregs", &part("cpu-sregs")?)?,
            xcrs: exactly("cpu-xcrs", &part("cpu-xcrs")?)?,
            xsave: exactly("cpu-xsave", &part("cpu-xsave")?)?,
            msrs: list("cpu-msrs", &part("cpu-msrs")?, MSRS_MAX)?,
            lapic: exactly("cpu-lapic", &part("cpu-lapic")?)?,
            debug: exactly("cpu-debug", &part("cpu-debug")?)?,
            mp_state: exactly("cpu-mp-state", &part("cpu-mp-state")?)?,
            events: exactly("cpu-events", &part("cpu-events")?)?,
        };
        Ok(state)
    }
}

/// Reads the clock that guests keep time by (kvmclock). No vCPU may run.
pub fn read_clock(vm: &VmFd) -> Result<Vec<u8>, CpuError> {
    Ok(vm.get_clock().map_err(CpuError::kvm("read the clock"))?.as_bytes().to_vec())
}

/// Lets the clock go on from where it was: to the guest no time has passed.
pub fn write_clock(vm: &VmFd, bytes: &[u8]) -> Result<(), CpuError> {
    let saved: kvm_clock_data = exactly("clock", bytes)?;
    // Without KVM_CLOCK_REALTIME, which would have KVM add the time since.
    let clock = kvm_clock_data { clock: saved.clock, ..Default::default() };
    vm.set_clock(&clock).map_err(CpuError::kvm("set the clock"))
}

const ALL: u32 = u32::MAX;
/// KVM sets this while the guest has CR4.OSXSAVE set.
const OSXSAVE: u32 = 1 << 27;
/// The same for CR4.PKE.
const OSPKE: u32 = 1 << 4;

/// Leaf, index, and which bits of eax, ebx, ecx and edx say that the processor can do something (Intel SDM vol. 2A, AMD APM vol. 3).
const FEATURES: &[(u32, u32, [u32; 4])] = &[
    (1, 0, [0, 0, !OSXSAVE, ALL]),
    (7, 0, [0, ALL, !OSPKE, ALL]),
    (7, 1, [ALL, 0, 0, ALL]),
    (0xd, 0, [ALL, 0, 0, ALL]),
    (0xd, 1, [ALL, 0, ALL, ALL]),
    (0x8000_0001, 0, [0, 0, ALL, ALL]),
    (0x8000_0007, 0, [0, 0, 0, ALL]),
    (0x8000_0008, 0, [0, ALL, 0, 0]),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::topology::smp;
    use crate::cpu::x86_64::BootState;
    use crate::cpu::{self, Topology};
    use crate::inherit::Inherited;
    use crate::irq;

    /// A VM with one vCPU, if this host can.
    fn vm() -> Option<(VmFd, cpu::Vcpu)> {
        if !std::path::Path::new(cpu::KVM_PATH).exists() {
            eprintln!("no /dev/kvm: skipped");
            return None;
        }
        let topology = Topology::new(&smp(1, 1, 1, 1, 1)).unwrap();
        let (kvm, vm) = cpu::open(&Inherited::default()).unwrap();
        super::super::prepare_vm(&kvm, &vm).unwrap();
        irq::create_controllers(&vm).unwrap();
        let vcpu = super::super::create_vcpus(&kvm, &vm, &topology, 1).unwrap().remove(0);
        Some((vm, vcpu))
    }

    /// What goes on by itself: the time-stamp counter.
    fn at_rest(parts: Vec<Part>) -> Vec<Part> {
        let still = |(name, bytes): Part| {
            let clocks = [0x10u32, msrs::TSC_DEADLINE].map(u32::to_le_bytes);
            let entries =
                bytes.chunks(16).filter(|e| name != "cpu-msrs" || !clocks.iter().any(|c| e.starts_with(c)));
            (name, entries.flatten().copied().collect())
        };
        parts.into_iter().map(still).collect()
    }

    #[test]
    fn what_is_restored_is_saved_again() {
        let (Some((_vm, first)), Some((_vm2, second))) = (vm(), vm()) else { return };
        let boot = BootState::Linux64 {
            entry: 0x10_0200,
            zero_page: 0x7000,
            page_table: 0x9000,
            stack: 0x8ff0,
            gdt: 0x500,
        };
        boot.apply(first.fd()).unwrap();
        let mut state = VcpuState::read(first.fd()).unwrap();
        // Something in every corner.
        state.regs.r15 = 0x1234_5678_9abc_def0;
        // The task priority is CR8 too.
        state.lapic.regs[0x80] = 0x30;
        state.xsave.region[40..44].fill(0x5a5a_5a5a);
        state.xsave.region[128] = 3;
        state.debug.db[1] = 0x1000;
        state.events.nmi.masked = 1;
        state.events.interrupt.shadow = 1;
        for (index, data) in
            [(0xc000_0082, 0xffff_8000_0000_1000), (0x174, 0x10), (0xc000_0102, 0x7000), (0x200, 6)]
        {
            if let Some(msr) = state.msrs.iter_mut().find(|m| m.index == index) {
                msr.data = data;
            }
        }
        state.write(first.fd()).unwrap();
        let saved = VcpuState::read(first.fd()).unwrap();
        assert_eq!((saved.regs.r15, saved.sregs.cr8), (state.regs.r15, 3));
        assert_eq!(saved.xsave.region[40], 0x5a5a_5a5a);
        assert_eq!(
            saved.msrs.iter().find(|m| m.index == 0xc000_0082).map(|m| m.data),
            Some(0xffff_8000_0000_1000)
        );
        let parts = saved.parts();
        let loaded = VcpuState::from_parts::<CpuError>(|name| {
            Ok(parts.iter().find(|p| p.0 == name).ok_or(CpuError::BadState(name))?.1.clone())
        });
        let loaded = loaded.unwrap();
        loaded.check_features(second.fd()).unwrap();
        loaded.write(second.fd()).unwrap();
        let again = at_rest(VcpuState::read(second.fd()).unwrap().parts());
        for (saved, again) in at_rest(parts).into_iter().zip(again) {
            assert_eq!(saved, again);
        }
    }

    #[test]
    fn nonsense_is_refused_and_never_kills() {
        let Some((_vm, vcpu)) = vm() else { return };
        let good = VcpuState::read(vcpu.fd()).unwrap().parts();
        for name in good.iter().map(|p| p.0) {
            for change in [
                (|b| b.truncate(b.len() - 1)) as fn(&mut Vec<u8>),
                |b| b.push(0),
                |b| b.fill(0xff),
                |b| b.extend(vec![0; 1 << 20]),
            ] {
                let mut parts = good.clone();
                parts.iter_mut().filter(|p| p.0 == name).for_each(|p| change(&mut p.1));
                let state = VcpuState::from_parts::<CpuError>(|n| {
                    Ok(parts.iter().find(|p| p.0 == n).unwrap().1.clone())
                });
                if let Ok(state) = state {
                    let _ = state.check_features(vcpu.fd()).and_then(|()| state.write(vcpu.fd()));
                }
            }
        }
        let mut other = VcpuState::read(vcpu.fd()).unwrap();
        other.cpuid.iter_mut().filter(|e| e.function == 7).for_each(|e| e.ebx = u32::MAX);
        let error = other.check_features(vcpu.fd()).unwrap_err().to_string();
        assert!(error.contains("CPUID leaf 0x7, index 0, ebx"), "{error}");
        other.cpuid.clear();
        assert!(matches!(other.check_features(vcpu.fd()), Err(CpuError::Vendor)));
    }
}
