//! The interrupt controllers of a PC, in the kernel: PIC, IOAPIC, LAPICs, and the PIT that old kernels calibrate with.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip,
    kvm_pic_state, kvm_pit_config,
};
use kvm_ioctls::VmFd;

use super::IrqError;

/// Where KVM puts the IOAPIC's registers.
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// Where the local APICs' registers are at reset.
pub const LAPIC_BASE: u32 = 0xfee0_0000;
/// Inputs of KVM's IOAPIC.
pub const IOAPIC_PINS: u32 = 24;

/// A masked entry of the redirection table (82093AA §3.2.4).
const IOAPIC_MASKED: u64 = 1 << 16;
/// What KVM keeps for a channel that nobody has programmed.
const PIT_UNPROGRAMMED: u8 = 0xff;

/// Creates PIC, IOAPIC and PIT. Memory slots must exist by now, vCPUs must not.
pub fn create_controllers(vm: &VmFd) -> Result<(), IrqError> {
    let failed = |what| move |e: kvm_ioctls::Error| IrqError { what, source: e.into() };
    vm.create_irq_chip().map_err(failed("interrupt controllers"))?;
    // A kernel without ACPI takes its first ticks from the PIT and times its other clocks with channel 2, whose gate and output
    // are bits of port 0x61. The flag lets KVM answer that port itself, so that bit 5 is true to the channel.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(failed("interval timer"))
}

/// Puts PICs, IOAPIC and PIT into the state in which KVM creates them. No vCPU may run. The local APICs are the vCPUs' own.
pub fn reset_controllers(vm: &VmFd) -> Result<(), IrqError> {
    let failed = |what| move |e: kvm_ioctls::Error| IrqError { what, source: e.into() };
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(failed("PIC"))?;
        // Which lines may be level-triggered is wiring, not state.
        // SAFETY: KVM has filled in this member for a PIC's id.
        let elcr_mask = unsafe { chip.chip.pic.elcr_mask };
        chip.chip.pic = kvm_pic_state { elcr_mask, ..Default::default() };
        vm.set_irqchip(&chip).map_err(failed("PIC"))?;
    }
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(failed("IOAPIC"))?;
    // SAFETY: KVM has filled in this member for the IOAPIC's id; every bit pattern is a value of it.
    unsafe {
        let ioapic = &mut chip.chip.ioapic;
        (ioapic.ioregsel, ioapic.id, ioapic.irr) = (0, 0, 0);
        for entry in &mut ioapic.redirtbl {
            entry.bits = IOAPIC_MASKED;
        }
    }
    vm.set_irqchip(&chip).map_err(failed("IOAPIC"))?;
    let mut pit = vm.get_pit2().map_err(failed("interval timer"))?;
    for (number, channel) in pit.channels.iter_mut().enumerate() {
        *channel = kvm_bindings::kvm_pit_channel_state {
            mode: PIT_UNPROGRAMMED,
            // Channel 2's gate is a bit of port 0x61, clear at reset.
            gate: u8::from(number != 2),
            ..Default::default()
        };
    }
    vm.set_pit2(&pit).map_err(failed("interval timer"))
}
