//! Misuse of what is on the board beside virtio devices: I/O ports in every width, and addresses where nothing is. The machine must go
//! on, with its first disk and its console.

use super::rig::Rig;
use super::{Case, Outcome, YES};
use crate::cpu;

/// COM1, the keyboard controller's command port, and the ACPI registers: sleep control, sleep status, reset, claim.
const COM1: u16 = 0x3f8;
const KEYBOARD: u16 = 0x64;
const SLEEP: u16 = 0x600;
const RESET: u16 = 0x602;
const CLAIM: u16 = 0x603;
/// SLP_EN with the type of soft off, in each byte.
const OFF: u32 = 0x3434_3434;

/// Where a device begins, ends, or is not.
const PORTS: [u16; 22] = [
    0x60, 0x61, 0x64, 0x65, 0x70, 0x71, 0x80, 0x92, 0x3f7, 0x3fa, 0x3fd, 0x3ff, 0x400, 0x5fd, 0x5ff, 0x600,
    0x602, 0x603, 0x604, 0xcf8, 0xcfc, 0xfffc,
];

/// After a misuse of the board, the disk has to serve.
fn then(rig: &mut Rig, misuse: impl FnOnce(&Rig)) -> Outcome {
    misuse(rig);
    rig.start();
    rig.good()
}

/// A misuse of COM1, and its registers as they were.
fn serial(rig: &mut Rig, misuse: fn()) -> Outcome {
    let [ier, lcr, mcr] = [1, 3, 4].map(|register| cpu::inb(COM1 + register));
    misuse();
    // Line control first: it says what the others are.
    for (register, value) in [(3, lcr), (4, mcr), (1, ier), (2, 0)] {
        cpu::outb(COM1 + register, value);
    }
    for _ in 0..256 {
        cpu::inb(COM1);
    }
    then(rig, |_| ())
}

/// Every width at an address of the device window.
fn touch(address: u64, write: bool) {
    // SAFETY: in the device window, which `paging` maps, and not at the interrupt controllers; nothing of ours is there.
    unsafe {
        cpu::read8(address);
        cpu::read16(address);
        cpu::read32(address);
        cpu::read64(address);
        if write {
            cpu::write8(address, 0x5a);
            cpu::write16(address, 0x5a5a);
            cpu::write32(address, 0x5a5a_5a5a);
            cpu::write64(address, 0x5a5a_5a5a_5a5a_5a5a);
        }
    }
}

/// The cases.
#[rustfmt::skip]
pub const CASES: &[Case] = &[
    Case { name: "port/read-in-every-width", allowed: YES, run: |rig| then(rig, |_| for port in PORTS {
        cpu::inb(port);
        cpu::inw(port);
        cpu::inl(port);
    }) },
    Case { name: "port/written-in-widths-that-no-register-has", allowed: YES, run: |rig| then(rig, |_| for port in PORTS {
        cpu::outw(port, 0xa5a5);
        cpu::outl(port, 0xa5a5_a5a5);
    }) },
    // A wide access is no way to a byte register: the machine neither goes off nor starts again.
    Case { name: "port/off-in-two-and-four-bytes", allowed: YES, run: |rig| then(rig, |_| for port in SLEEP - 3..=SLEEP {
        cpu::outw(port, OFF as u16);
        cpu::outl(port, OFF);
    }) },
    Case { name: "port/reset-in-two-and-four-bytes", allowed: YES, run: |rig| then(rig, |_| {
        cpu::outw(RESET, 0x0101);
        cpu::outl(RESET, 0x0101_0101);
        cpu::outw(KEYBOARD, 0xfefe);
        cpu::outl(KEYBOARD, 0xfefe_fefe);
    }) },
    Case { name: "port/sleep-states-that-do-not-exist", allowed: YES, run: |rig| then(rig, |_| for value in 0..=0xff {
        if value & 0x20 == 0 || value >> 2 & 7 != 5 { cpu::outb(SLEEP, value); }
        cpu::outb(SLEEP + 1, value);
    }) },
    Case { name: "port/reset-values-that-do-not-exist", allowed: YES, run: |rig| then(rig, |_| for value in 0..=0xff {
        if value != 1 { cpu::outb(RESET, value); }
        if value != 0xfe { cpu::outb(KEYBOARD, value); }
    }) },
    Case { name: "port/claims-of-devices-that-do-not-exist", allowed: YES, run: |rig| then(rig, |_| {
        for number in 64..=0xff { cpu::outb(CLAIM, number); }
        cpu::outw(CLAIM, 0);
        cpu::outl(CLAIM, 0);
    }) },
    Case { name: "port/strings-of-2-kib", allowed: YES, run: |rig| then(rig, |rig| {
        // SAFETY: the rig's buffers, which no device uses now.
        let bytes = unsafe { core::slice::from_raw_parts_mut(rig.data(0) as *mut u8, 2 << 10) };
        cpu::insb(0x80, bytes);
        bytes.fill(0xff);
        cpu::outsb(0x80, bytes);
        cpu::outsb(KEYBOARD, bytes);
    }) },
    Case { name: "serial/every-value-in-every-register", allowed: YES, run: |rig| serial(rig, || for register in 1..8 {
        for value in 0..=0xff { cpu::outb(COM1 + register, value); }
        cpu::outb(COM1 + 3, 3);
    }) },
    Case { name: "serial/registers-in-two-and-four-bytes", allowed: YES, run: |rig| serial(rig, || for register in 0..8 {
        cpu::inw(COM1 + register);
        cpu::inl(COM1 + register);
        cpu::outw(COM1 + register, 0xffff);
        cpu::outl(COM1 + register, 0xffff_ffff);
    }) },
    Case { name: "serial/loop-that-nobody-empties", allowed: YES, run: |rig| serial(rig, || {
        cpu::outb(COM1 + 3, 3);
        cpu::outb(COM1 + 4, 0x10);
        for _ in 0..3000 { cpu::outb(COM1, 0x55); }
    }) },
    Case { name: "memory/where-nothing-is", allowed: YES, run: |rig| then(rig, |_| {
        for address in [0xc000_0000, 0xd000_0000, 0xe000_0000, 0xfeb0_0000, 0xfed0_0000, 0xffff_fff8] { touch(address, true); }
    }) },
    Case { name: "memory/around-the-first-register-window", allowed: YES, run: |rig| then(rig, |rig| {
        for offset in 1..=8 { touch(rig.window.address - offset, false); }
        touch(rig.window.address - 0x1000, true);
    }) },
    Case { name: "memory/across-pages", allowed: YES, run: |rig| then(rig, |_| {
        for offset in 1..8 { touch(0xd000_1000 - offset, true); }
    }) },
];
