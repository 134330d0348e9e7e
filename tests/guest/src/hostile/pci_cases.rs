//! Misuse of PCI: configuration space of every function, BARs, tables of MSI-X, the parts of a virtio device, root ports and their slots. Whatever
//! was written, the disk has to serve when its registers are as they were.

use super::rig::Rig;
use super::{Case, Outcome, YES};
use crate::cpu;
use crate::pci::{Function, Parts, functions};

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const COMMAND: u8 = 0x04;
const MASTER: u32 = 1 << 2;
const BAR0: u8 = 0x10;
const BUSES: u8 = 0x18;
const MEMORY_WINDOW: u8 = 0x20;
const CAP_VENDOR: u8 = 0x09;
const CAP_EXPRESS: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;
/// Of the host bridge: where configuration space is in memory, and that it is there.
const PCIEXBAR: u8 = 0x60;
/// In the gigabyte that is mapped for devices.
const ECAM: u64 = 0xd000_0000;
/// Functions that are kept.
const MOST: usize = 24;

/// Values that find what is wrong with a register.
const VALUES: [u32; 8] = [u32::MAX, 0, 1, 0x8000_0000, 0x5555_5555, 0xaaaa_aaaa, 0xfee0_0000, 0x0000_ffff];

/// Configuration space of all functions.
struct Kept {
    all: [Option<(Function, [u32; 64])>; MOST],
}

impl Kept {
    fn new() -> Self {
        let mut all = [None; MOST];
        for (place, function) in all.iter_mut().zip(functions()) {
            let mut words = [0; 64];
            (0u8..).zip(&mut words).for_each(|(n, word)| *word = function.read(4 * n));
            *place = Some((function, words));
        }
        Self { all }
    }

    /// Everything as it was: deaf while BARs and windows move. Whoever was a master of the bus stays one: a device that runs would need a reset.
    fn restore(&self) {
        for (function, words) in self.all.iter().flatten() {
            function.write(COMMAND, words[1] & MASTER);
        }
        for (function, words) in self.all.iter().flatten() {
            for (n, word) in (0u8..).zip(words).skip(4) {
                function.write(4 * n, *word);
            }
        }
        for (function, words) in self.all.iter().flatten() {
            // Status bits are cleared by ones.
            function.write(COMMAND, words[1] & 0xffff);
        }
    }
}

/// After a misuse everything is put back, and the disk has to serve from the beginning.
fn then(rig: &mut Rig, misuse: impl FnOnce(&mut Rig, Parts)) -> Outcome {
    let Some(parts) = rig.window.pci else { return Outcome::Wrong("not-on-pci") };
    let kept = Kept::new();
    misuse(rig, parts);
    kept.restore();
    if !rig.reset() {
        return Outcome::Wrong("no-reset-after");
    }
    rig.start();
    rig.good()
}

/// All functions but virtio devices that are not under attack: those go on working, and a register of theirs resets them.
fn but_others(parts: Parts) -> impl Iterator<Item = Function> {
    functions().filter(move |f| *f == parts.function || f.read(0) & 0xffff != 0x1af4)
}

/// Every width at an address of the device window, also across its neighbours.
fn touch(address: u64, value: Option<u64>) {
    // SAFETY: in the device window, which `paging` maps, and not at the interrupt controllers; nothing of ours is there.
    unsafe {
        cpu::read8(address);
        cpu::read16(address);
        cpu::read32(address);
        cpu::read64(address);
        if let Some(value) = value {
            cpu::write8(address, value as u8);
            cpu::write16(address, value as u16);
            cpu::write32(address, value as u32);
            cpu::write64(address, value);
        }
    }
}

/// Four bytes of the device window.
fn put(address: u64, value: u32) {
    // SAFETY: as in `touch`.
    unsafe { cpu::write32(address, value) };
}

/// The table of MSI-X, and how many vectors there are.
fn table(function: Function) -> Option<(u8, u64, u64)> {
    let at = function.capabilities(CAP_MSIX).next()?;
    let (vectors, place) = ((function.read(at) >> 16 & 0x7ff) + 1, function.read(at + 4));
    Some((at, function.bar((place & 7) as u8) + u64::from(place & !7), vectors.into()))
}

/// Bridges with a slot.
fn ports() -> impl Iterator<Item = Function> {
    functions().filter(|f| f.read(8) >> 16 == 0x0604)
}

/// The cases.
#[rustfmt::skip]
pub const CASES: &[Case] = &[
    Case { name: "config/every-value-in-every-register", allowed: YES, run: |rig| then(rig, |_, parts| for function in but_others(parts) {
        for register in (0..=0xfc).step_by(4) {
            for value in VALUES { function.write(register, value); }
        }
    }) },
    Case { name: "config/registers-in-one-and-two-bytes", allowed: YES, run: |rig| then(rig, |_, parts| for function in but_others(parts) {
        for register in (0..=0xfc).step_by(4) {
            function.select(register);
            for byte in 0..4 {
                cpu::outb(DATA + byte, 0xff);
                cpu::outw(DATA + byte, 0xa5a5);
                cpu::inw(DATA + byte);
                cpu::inl(DATA + byte);
            }
        }
    }) },
    Case { name: "config/buses-and-functions-that-do-not-exist", allowed: YES, run: |rig| then(rig, |_, _| for bus in 0..=0xffu32 {
        for rest in [0x0800, 0x7f00, 0xf8fc, 0xfffc] {
            cpu::outl(ADDRESS, 1 << 31 | 1 << 24 | bus << 16 | rest);
            cpu::inl(DATA);
            if bus != 0 { cpu::outl(DATA, u32::MAX); }
        }
    }) },
    Case { name: "config/address-in-one-and-two-bytes", allowed: YES, run: |rig| then(rig, |_, _| for byte in 0..4 {
        // Not the reset register in the middle.
        if byte != 1 { cpu::outb(ADDRESS + byte, 0xff); }
        if byte > 1 { cpu::outw(ADDRESS + byte, 0xffff); }
        cpu::inb(ADDRESS + byte);
        cpu::inl(ADDRESS + byte);
    }) },
    Case { name: "config/in-memory-in-every-width", allowed: YES, run: |rig| then(rig, |_, _| if let Some(bridge) = functions().next() {
        bridge.write(PCIEXBAR, ECAM as u32 | 1);
        for device in 0..32 {
            for register in [0, 3, 0xffc, 0xfff] { touch(ECAM + (device << 15) + register, Some(u64::MAX)); }
        }
        bridge.write(PCIEXBAR, ECAM as u32 | 1);
        for at in [0x10, 0x14, 0x3f, 0xfd, 0x101] { touch(ECAM + (1 << 15) + at, Some(0x00ff_00ff_00ff_00ff)); }
    }) },
    Case { name: "config/in-memory-that-moves-about", allowed: YES, run: |rig| then(rig, |_, _| if let Some(bridge) = functions().next() {
        for at in [0u32, 0xf000_0000, 0xe000_0000, 0xc000_0000, 0xfff0_0000, 0x1000_0000] {
            for high in [0, 1, u32::MAX] {
                bridge.write(PCIEXBAR + 4, high);
                bridge.write(PCIEXBAR, at | 1);
                bridge.write(PCIEXBAR, at);
            }
        }
    }) },
    Case { name: "bar/over-ram-and-controllers", allowed: YES, run: |rig| then(rig, |rig, parts| for bar in 0..6 {
        for at in [0, rig.data(0) as u32, 0xfec0_0000, 0xfee0_0000, 0xffff_0000, 0xb000_0000, 0xf000_0000] {
            parts.function.write(BAR0 + 4 * bar, at);
        }
    }) },
    Case { name: "bar/over-each-other", allowed: YES, run: |rig| then(rig, |_, _| {
        for function in functions() {
            for bar in 0..6 { function.write(BAR0 + 4 * bar, 0xc800_0000); }
        }
        for offset in (0..0x4000).step_by(0x400) { touch(0xc800_0000 + offset, Some(0)); }
    }) },
    Case { name: "bar/at-the-end-of-everything", allowed: YES, run: |rig| then(rig, |_, parts| for high in [1, 0xff, 0xffff, u32::MAX] {
        for bar in 0..6 { parts.function.write(BAR0 + 4 * bar, if bar % 2 == 0 { u32::MAX } else { high }); }
    }) },
    Case { name: "bar/switched-off-and-on-under-requests", allowed: YES, run: |rig| then(rig, |rig, parts| {
        rig.start();
        for _ in 0..200 {
            rig.notify();
            parts.function.write(COMMAND, 0);
            parts.function.write(COMMAND, 2);
            parts.function.write(COMMAND, 6);
        }
    }) },
    Case { name: "msix/every-value-in-the-table", allowed: YES, run: |rig| then(rig, |_, parts| if let Some((at, table, vectors)) = table(parts.function) {
        for control in [0x8000_0000, 0xc000_0000, 0] {
            parts.function.write(at, control);
            for offset in (0..16 * vectors + 32).step_by(4) {
                for value in VALUES { put(table + offset, value); }
            }
        }
    }) },
    Case { name: "msix/table-in-widths-that-it-has-not", allowed: YES, run: |rig| then(rig, |_, parts| if let Some((at, table, vectors)) = table(parts.function) {
        parts.function.write(at, 0x8000_0000);
        for offset in 0..16 * vectors + 8 { touch(table + offset, Some(u64::MAX)); }
        for offset in [0x7f9, 0x800, 0x808, 0xff8, 0xff9] { touch(table + offset, Some(u64::MAX)); }
    }) },
    Case { name: "msix/messages-to-nobody", allowed: YES, run: |rig| then(rig, |rig, parts| if let Some((at, table, vectors)) = table(parts.function) {
        parts.function.write(at, 0x8000_0000);
        for (low, high, data) in [(0, 0, 0), (u32::MAX, u32::MAX, u32::MAX), (0xfee0_0000, 0, 0), (0xfeef_f000, 0, 0xff00), (rig.data(0) as u32, 0, 1), (0xfee0_0000, 1, 0x20)] {
            for vector in 0..vectors {
                for (word, value) in (0..).zip([low, high, data, 0]) { put(table + 16 * vector + 4 * word, value); }
            }
            if !rig.reset() { return; }
            // SAFETY: as in `touch`. Configuration and queue 0 have vector 0.
            unsafe {
                cpu::write16(parts.common + 0x10, 0);
                cpu::write16(parts.common + 0x16, 0);
                cpu::write16(parts.common + 0x1a, 0);
            }
            rig.start();
            for _ in 0..10 {
                rig.good();
                parts.function.write(at, 0xc000_0000);
                rig.good();
                parts.function.write(at, 0x8000_0000);
            }
        }
        parts.function.write(at, 0);
    }) },
    Case { name: "parts/common-in-every-width", allowed: YES, run: |rig| then(rig, |_, parts| for value in [0, u64::MAX, 0x0101_0101_0101_0101] {
        for offset in 0..0x60 { touch(parts.common + offset, Some(value)); }
        touch(parts.common + 0xff9, Some(value));
    }) },
    Case { name: "parts/queues-of-every-size", allowed: YES, run: |rig| then(rig, |_, parts| for size in [0u32, 1, 3, 0x7fff, 0x8000, 0xffff] {
        // Selected, sized, with a vector that is not there, and on.
        for queue in [0, 1, 63, 0xffff] {
            put(parts.common + 0x14, queue << 16 | 0x0b);
            put(parts.common + 0x18, 0x1234 << 16 | size);
            put(parts.common + 0x1c, 1);
        }
        put(parts.common + 0x14, 0x0f);
    }) },
    Case { name: "parts/notifications-everywhere", allowed: YES, run: |rig| then(rig, |_, parts| for offset in 0..0x400 {
        touch(parts.notify + offset, Some(0x0001_ffff_0000_0001));
    }) },
    Case { name: "parts/isr-and-configuration-written", allowed: YES, run: |rig| then(rig, |_, parts| for offset in 0..0x80 {
        touch(parts.isr + offset, Some(u64::MAX));
        touch(parts.device + offset, Some(u64::MAX));
    }) },
    Case { name: "parts/by-way-of-configuration-space", allowed: YES, run: |rig| then(rig, |_, parts| for at in parts.function.capabilities(CAP_VENDOR) {
        if parts.function.read(at) >> 24 != 5 { continue; }
        for bar in [0, 1, 4, 5, 6, 0xff] {
            for offset in [0, 1, 0x13, 0xfff, 0x3fff, 0x4000, u32::MAX] {
                for length in [0, 1, 2, 3, 4, 5, u32::MAX] {
                    parts.function.write(at + 4, bar);
                    parts.function.write(at + 8, offset);
                    parts.function.write(at + 12, length);
                    parts.function.read(at + 16);
                    parts.function.write(at + 16, 0);
                }
            }
        }
    }) },
    Case { name: "port/every-value-in-slot-control-and-status", allowed: YES, run: |rig| then(rig, |_, _| for port in ports() {
        let Some(at) = port.capabilities(CAP_EXPRESS).next() else { continue };
        for value in 0..=0x1fff { port.write(at + 0x18, value | 0xffff << 16); }
    }) },
    Case { name: "port/buses-that-make-no-sense", allowed: YES, run: |rig| then(rig, |_, _| for port in ports() {
        for buses in [0u32, 0x0000_0100, 0x00ff_ff00, 0x0001_0100, 0x0000_ff00, 0xffff_ffff, 0x0005_0a00] {
            port.write(BUSES, buses);
            cpu::outl(ADDRESS, 1 << 31 | (buses >> 8 & 0xff) << 16);
            cpu::inl(DATA);
        }
    }) },
    Case { name: "port/windows-that-make-no-sense", allowed: YES, run: |rig| then(rig, |_, _| for port in ports() {
        for window in [0u32, 0xfff0_0000, 0x0000_fff0, 0xfff0_fff0, 0xc000_d000, 0xfee0_fec0] {
            for register in 0..4 { port.write(MEMORY_WINDOW + 4 * register, window); }
            port.write(COMMAND, 7);
        }
    }) },
];
