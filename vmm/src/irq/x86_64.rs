//! The interrupt controllers of a PC, in the kernel: PIC, IOAPIC, LAPICs, and the PIT that old kernels calibrate with.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;

use super::IrqError;

/// Where KVM puts the IOAPIC's registers.
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// Where the local APICs' registers are at reset.
pub const LAPIC_BASE: u32 = 0xfee0_0000;
/// Inputs of KVM's IOAPIC.
pub const IOAPIC_PINS: u32 = 24;

/// Creates PIC, IOAPIC and PIT. Memory slots must exist by now, vCPUs must not.
pub fn create_controllers(vm: &VmFd) -> Result<(), IrqError> {
    let failed = |what| move |e: kvm_ioctls::Error| IrqError { what, source: e.into() };
    vm.create_irq_chip().map_err(failed("interrupt controllers"))?;
    // A kernel without ACPI takes its first ticks from the PIT and times its other clocks with channel 2, whose gate and output
    // are bits of port 0x61. The flag lets KVM answer that port itself, so that bit 5 is true to the channel.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(failed("interval timer"))
}
