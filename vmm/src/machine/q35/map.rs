//! The addresses of a q35, and where BARs may lie.

use crate::boot::{EventRegisters, Pcie};
use crate::memory::layout::{GAP_END, Q35_GAP_START};
use crate::pci::Window;

pub(super) const ECAM: u64 = 0xb000_0000;
const ECAM_SIZE: u64 = 256 << 20;
const WINDOW32: Window = Window { base: 0xc000_0000, size: 768 << 20 };
/// Where BARs and ECAM may lie below 4 GiB: firmware has plans of its own.
const HOLE: Window = Window { base: Q35_GAP_START, size: EVENTS.events - Q35_GAP_START };
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

/// The windows for BARs of a machine with so much RAM, and other memory up to `beyond` (0: there is none); and the whole map as the guest is
/// told it. Firmware puts large BARs at the end of what its processor can address, so there the upper window goes so far.
pub(super) fn windows(ram: u64, beyond: u64, has_firmware: bool) -> (Vec<Window>, Pcie) {
    let end = beyond.max(GAP_END + ram.saturating_sub(Q35_GAP_START));
    let base = end.next_multiple_of(WINDOW64_ALIGN);
    let reachable = 1u64.checked_shl(address_bits()).unwrap_or(u64::MAX);
    let size = if has_firmware { reachable.saturating_sub(base) } else { WINDOW64_SIZE };
    let fits = size >= WINDOW64_SIZE && base.saturating_add(size) <= reachable;
    let high = fits.then_some(Window { base, size });
    let windows: Vec<Window> = std::iter::once(HOLE).chain(high).collect();
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

/// The map of a guest whose firmware has put ECAM elsewhere: BARs lie in the larger part of the hole beside it.
pub(super) fn with_ecam(pcie: Pcie, ecam: Option<u64>) -> Pcie {
    let Some(ecam) = ecam.filter(|at| *at >= HOLE.base && at.saturating_add(ECAM_SIZE) <= EVENTS.events)
    else {
        return pcie;
    };
    let behind = ecam + ECAM_SIZE;
    let below = (HOLE.base, ecam - HOLE.base);
    let above = (behind, EVENTS.events - behind);
    Pcie { ecam, window32: if above.1 >= below.1 { above } else { below }, ..pcie }
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
            let (windows, pcie) = windows(ram, 0, false);
            assert_eq!(windows[0], HOLE);
            let Some(high) = windows.get(1) else { continue };
            assert!(high.base >= GAP_END + ram.saturating_sub(Q35_GAP_START));
            assert!(high.base.is_multiple_of(WINDOW64_ALIGN));
            assert_eq!(pcie.window64, Some((high.base, high.size)));
            let (firmware, _) = super::windows(ram, 0, true);
            let beyond = (12 << 30) + 4096;
            if let Some(moved) = super::windows(ram, beyond, false).0.get(1) {
                assert_eq!(moved.base, 13 << 30);
            }
            assert!(firmware[1].base == high.base && firmware[1].size >= high.size);
        }
        const { assert!(WINDOW32.base + WINDOW32.size <= EVENTS.events) }
        const { assert!(HOLE.base + HOLE.size <= EVENTS.events) }
        const { assert!(ECAM >= Q35_GAP_START && ECAM + ECAM_SIZE <= WINDOW32.base) }
    }

    #[test]
    fn bars_go_beside_ecam() {
        let (_, pcie) = windows(1 << 30, 0, true);
        let at = |ecam| with_ecam(pcie, ecam);
        assert_eq!((at(None).ecam, at(None).window32), (ECAM, (WINDOW32.base, WINDOW32.size)));
        assert_eq!(at(Some(ECAM)).window32, (WINDOW32.base, WINDOW32.size));
        assert_eq!(at(Some(0xe000_0000)).window32, (0x8000_0000, 0x6000_0000));
        assert_eq!(at(Some(0x8000_0000)).window32, (0x9000_0000, 0x6000_0000));
        for nonsense in [0, 0x7000_0000, 0xf000_0000, 1 << 34, u64::MAX] {
            assert_eq!(at(Some(nonsense)).ecam, ECAM);
        }
    }
}
