//! Opening KVM and creating the VM, with errors that say what to do.

use std::os::fd::IntoRawFd;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm, VmFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::CpuError;
use crate::inherit::Inherited;

/// KVM's device node.
pub const KVM_PATH: &str = "/dev/kvm";

/// `KVM_API_VERSION`: has been 12 since the interface became stable.
const API_VERSION: i32 = 12;

/// What no VM of ours works without. NESTED_STATE is not among them: hosts without nested virtualisation lack it.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// Opens KVM (or takes the descriptor that the launcher passed) and creates a VM.
pub fn open(inherited: &Inherited) -> Result<(Kvm, VmFd), CpuError> {
    let fd = match inherited.take_path(Path::new(KVM_PATH)) {
        Some(fd) => fd,
        None => {
            let flags = OFlags::RDWR | OFlags::CLOEXEC;
            rustix::fs::open(KVM_PATH, flags, Mode::empty()).map_err(|e| match e {
                Errno::NOENT | Errno::NXIO | Errno::NODEV => CpuError::NoKvm,
                Errno::ACCESS | Errno::PERM => CpuError::Permission,
                e => CpuError::Open(e.into()),
            })?
        }
    };
    // SAFETY: the descriptor is open and ours; `Kvm` owns it from here on.
    let kvm = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd.into_raw_fd()) };
    let kvm: Kvm = kvm;
    match kvm.get_api_version() {
        API_VERSION => {}
        version => return Err(CpuError::ApiVersion(version)),
    }
    // The one capability whose absence no later call reports: KVM would ignore the flag, and vCPUs would not stop.
    if !kvm.check_extension(Cap::ImmediateExit) {
        return Err(CpuError::Missing("KVM_CAP_IMMEDIATE_EXIT"));
    }
    let vm = create_vm(&kvm).map_err(|e| explain(&kvm, CpuError::kvm("create a VM")(e)))?;
    Ok((kvm, vm))
}

/// KVM_CREATE_VM starts threads on some hosts and gives up with EINTR when a signal comes while it waits for them.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    const TRIES: u32 = 5;
    for _ in 1..TRIES {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            result => return result,
        }
    }
    kvm.create_vm()
}

/// After a failure: is it that KVM lacks something? Asked only then, so that a start that works pays nothing for it.
pub(super) fn explain(kvm: &Kvm, error: CpuError) -> CpuError {
    NEEDED
        .iter()
        .find(|(cap, _)| !kvm.check_extension(*cap))
        .map_or(error, |(_, name)| CpuError::Missing(name))
}
