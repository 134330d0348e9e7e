//! What the interrupt controllers and the interval timer hold, to be saved and given to those of another VM.
//!
//! The local APICs belong to their vCPUs. Set these before devices may interrupt: what KVM is given replaces what has come meanwhile.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::IrqError;

/// Controllers by name.
const CHIPS: [(&str, u32); 3] = [
    ("pic-master", KVM_IRQCHIP_PIC_MASTER),
    ("pic-slave", KVM_IRQCHIP_PIC_SLAVE),
    ("ioapic", KVM_IRQCHIP_IOAPIC),
];
const PIT: &str = "pit";

/// Names of all that is saved.
pub const PARTS: [&str; 4] = ["pic-master", "pic-slave", "ioapic", PIT];

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> IrqError {
    move |e| IrqError { what, source: e.into() }
}

/// Reads all of them, in the form of KVM's interface. No vCPU may run.
pub fn read_controllers(vm: &VmFd) -> Result<Vec<(&'static str, Vec<u8>)>, IrqError> {
    let mut parts = Vec::with_capacity(PARTS.len());
    for (name, chip_id) in CHIPS {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(failed(name))?;
        parts.push((name, chip.as_bytes().to_vec()));
    }
    let pit = vm.get_pit2().map_err(failed(PIT))?;
    parts.push((PIT, pit.as_bytes().to_vec()));
    Ok(parts)
}

/// Gives one of [`PARTS`] to this VM's controllers.
pub fn write_controller(vm: &VmFd, name: &'static str, bytes: &[u8]) -> Result<(), IrqError> {
    let malformed = || IrqError { what: name, source: std::io::ErrorKind::InvalidData.into() };
    match CHIPS.iter().find(|(chip, _)| *chip == name) {
        Some((_, chip_id)) => {
            let mut chip = kvm_irqchip::read_from_bytes(bytes).map_err(|_| malformed())?;
            // The file says what is in it, not where it goes.
            chip.chip_id = *chip_id;
            vm.set_irqchip(&chip).map_err(failed(name))
        }
        None => {
            let pit = kvm_pit_state2::read_from_bytes(bytes).map_err(|_| malformed())?;
            vm.set_pit2(&pit).map_err(failed(PIT))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu;
    use crate::inherit::Inherited;

    #[test]
    fn what_is_restored_is_saved_again() {
        if !std::path::Path::new(cpu::KVM_PATH).exists() {
            eprintln!("no /dev/kvm: skipped");
            return;
        }
        let vm = || {
            let (_, vm) = cpu::open(&Inherited::default()).unwrap();
            super::super::create_controllers(&vm).unwrap();
            vm
        };
        let (first, second) = (vm(), vm());
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        first.get_irqchip(&mut chip).unwrap();
        // SAFETY: KVM has filled in this member for the IOAPIC's id.
        unsafe { chip.chip.ioapic.redirtbl[5].bits = 0x0100_0000_0000_0031 };
        first.set_irqchip(&chip).unwrap();
        let saved = read_controllers(&first).unwrap();
        assert_eq!(saved.iter().map(|p| p.0).collect::<Vec<_>>(), PARTS);
        for (name, bytes) in &saved {
            write_controller(&second, name, bytes).unwrap();
            write_controller(&second, name, &bytes[1..]).unwrap_err();
        }
        let again = read_controllers(&second).unwrap();
        // The interval timer counts on.
        assert_eq!(saved[..3], again[..3]);
    }
}
