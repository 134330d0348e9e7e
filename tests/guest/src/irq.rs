//! Interrupts: owns the IDT, the local APIC and its timer, and the IOAPIC. Everything waits here.
//!
//! No device has a handler. An interrupt only ends the halt; whoever waits looks at memory again. Nothing is lost: an edge that
//! comes between the look and the halt stays pending in the local APIC, because interrupts are off outside the halt.

use core::ptr::addr_of_mut;

use crate::{clock, cpu};

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
const SPURIOUS: u32 = 0xff;
const TIMER: u32 = 0xfe;
/// Vector of IOAPIC pin 0.
const PINS: u32 = 0x30;

unsafe extern "C" {
    static mut idt: [[u64; 2]; 256];
    static exceptions: [u8; 0];
    static interrupt: [u8; 0];
    static spurious: [u8; 0];
    #[link_name = "gate"]
    static gate_entry: [u8; 0];
}

/// An interrupt gate (Intel SDM vol. 3, 6.14.1) to our ring-0 code segment.
fn gate(handler: u64) -> [u64; 2] {
    let low = (handler & 0xffff) | (0x08 << 16) | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

fn lapic(register: u64, value: u32) {
    // SAFETY: mapped by `paging`; a local APIC does no DMA.
    unsafe { cpu::write32(LAPIC + register, value) };
}

fn ioapic(register: u32, value: u32) {
    // SAFETY: as for `lapic`.
    unsafe {
        cpu::write32(IOAPIC, register);
        cpu::write32(IOAPIC + 0x10, value);
    }
}

/// Fills the IDT: from here on exceptions are reported and the gates into ring 0 work.
pub fn init_vectors() {
    // SAFETY: the one place that writes the table, before anything can use it; the addresses are those of the code in `entry`.
    let table = unsafe { &mut *addr_of_mut!(idt) };
    let (first, any) = (addr_of_label(&raw const exceptions), addr_of_label(&raw const interrupt));
    for (vector, slot) in table.iter_mut().enumerate() {
        *slot = if vector < 32 { gate(first + 16 * vector as u64) } else { gate(any) };
    }
    table[6] = gate(addr_of_label(&raw const gate_entry));
    table[SPURIOUS as usize] = gate(addr_of_label(&raw const spurious));
}

/// Opens the local APIC, which `paging` must have mapped. The 8259s are masked: their lines reach us through the IOAPIC.
pub fn init_controllers() {
    cpu::outb(0x21, 0xff);
    cpu::outb(0xa1, 0xff);
    lapic(0xf0, 0x100 | SPURIOUS);
    // KVM opens LINT0 to the 8259s at reset.
    lapic(0x350, 0x1_0000);
    lapic(0x320, TIMER);
    lapic(0x3e0, 0b1011);
}

fn addr_of_label(label: *const [u8; 0]) -> u64 {
    label as u64
}

/// Lets edges of IOAPIC pin `pin` end the halt.
pub fn open(pin: u32) {
    if pin < 24 {
        // SAFETY: reads the APIC ID.
        let id = unsafe { cpu::read32(LAPIC + 0x20) };
        ioapic(0x11 + 2 * pin, id & 0xff00_0000);
        ioapic(0x10 + 2 * pin, PINS + pin);
    }
}

/// Waits until `done` or for `microseconds`; says whether it is done. Spins shortly, then halts between looks.
///
/// `arm` runs before each halt and may ask a device for an interrupt; `done` is asked again after it.
pub fn wait(microseconds: u64, mut arm: impl FnMut(), mut done: impl FnMut() -> bool) -> bool {
    let (spin_until, end) = (clock::deadline(50), clock::deadline(microseconds));
    let mut armed = false;
    loop {
        if done() {
            return true;
        }
        let now = cpu::tsc();
        if now >= end {
            return false;
        }
        if now < spin_until {
            cpu::pause();
            continue;
        }
        if !armed {
            arm();
            armed = true;
            continue;
        }
        // The timer's frequency is not known and need not be: whenever it fires, we look at the clock. KVM's is 1 GHz.
        lapic(0x380, clock::to_microseconds(end - now).saturating_mul(1000).clamp(1000, 1 << 31) as u32);
        cpu::idle();
        armed = false;
    }
}
