//! The addresses of a q35, and where BARs may lie.

use crate::boot::{EventRegisters, Pcie};
use crate::memory::layout::{GAP_END, Q35_GAP_START};
use crate::pci::Window;

pub(super) const ECAM: u64 = 0xb000_0000;
pub(super) const ECAM_SIZE: u64 = 256 << 20;
const WINDOW32: Window = Window { base: 0xc000_0000, size: 768 << 20 };
/// Enough for every BAR of 31 devices with as much room as a guest likes to leave, little enough for 39 bits of address with 400 GiB of RAM.
const WINDOW64_SIZE: u64 = 32 << 30;
/// Guests line large windows up to this.
const WINDOW64_ALIGN: u64 = 1 << 30;

pub(super) const CONFIG_PORTS: u64 = 0xcf8;
const RESET: u16 = 0xcf9;
pub(super) const SLEEP: u16 = 0xce9;
pub(super) const PM_BASE: u16 = 0x600;
/// ACPI's interrupt.
pub(super) const SCI: u32 = 9;
/// Registers and interrupt of processors that come and go.
pub(super) const EVENTS: EventRegisters = EventRegisters { events: 0xf000_0000, cpus: 0xf000_0004, gsi: 10 };
/// GSI of pin A of slot 0.
pub(super) const FIRST_PIN: u32 = 16;
/// Lines that the pins of all slots share.
pub(super) const PINS: usize = 4;

/// The windows for BARs of a machine with so much RAM, and the whole map as the guest is told it.
pub(super) fn windows(ram: u64) -> (Vec<Window>, Pcie) {
    let end = GAP_END + ram.saturating_sub(Q35_GAP_START);
    let base = end.next_multiple_of(WINDOW64_ALIGN);
    let reachable = 1u64.checked_shl(address_bits()).unwrap_or(u64::MAX);
    let high = (base + WINDOW64_SIZE <= reachable).then_some(Window { base, size: WINDOW64_SIZE });
    let windows: Vec<Window> = std::iter::once(WINDOW32).chain(high).collect();
    let pcie = Pcie {
        pm_base: PM_BASE,
        sci: SCI,
        sleep: SLEEP,
        reset: RESET,
        ecam: ECAM,
        window32: (WINDOW32.base, WINDOW32.size),
        window64: high.map(|w| (w.base, w.size)),
        events: EVENTS,
        first_pin: FIRST_PIN,
    };
    (windows, pcie)
}

/// Bits of a physical address; the guest's processor has those of the host's (Intel SDM, CPUID leaf 8000_0008H).
fn address_bits() -> u32 {
    const HIGHEST: u32 = 0x8000_0000;
    const SIZES: u32 = 0x8000_0008;
    // What the architecture began with.
    const LEAST: u32 = 36;
    if std::arch::x86_64::__cpuid(HIGHEST).eax < SIZES {
        return LEAST;
    }
    std::arch::x86_64::__cpuid(SIZES).eax & 0xff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_lie_outside_ram() {
        for ram in [128 << 20, 2 << 30, 3 << 30, (6 << 30) + 4096] {
            let (windows, pcie) = windows(ram);
            assert_eq!(windows[0], WINDOW32);
            let Some(high) = windows.get(1) else { continue };
            assert!(high.base >= GAP_END + ram.saturating_sub(Q35_GAP_START));
            assert!(high.base.is_multiple_of(WINDOW64_ALIGN));
            assert_eq!(pcie.window64, Some((high.base, high.size)));
        }
        const { assert!(WINDOW32.base + WINDOW32.size <= EVENTS.events) }
        const { assert!(ECAM >= Q35_GAP_START && ECAM + ECAM_SIZE <= WINDOW32.base) }
    }
}
