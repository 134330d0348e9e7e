//! Misuse of the register window, for any device (virtio 1.2 §2.1, §3.1.1, §4.2.2).

use super::rig::{DEVICE_NEEDS_RESET, DRIVER_OK, Desc, FEATURES_OK, Layout, Rig, SIZE};
use super::{ANY, Case, NO, NO_QUEUE, NOTHING, Outcome, YES};
use crate::cpu;
use crate::virtio::{VERSION_1, reg};

/// By the book but for the layout of the queue.
fn laid_out(rig: &mut Rig, change: fn(&Rig, &mut Layout)) -> Outcome {
    if !rig.negotiate(rig.features()) {
        return Outcome::Wrong("no-features");
    }
    let mut layout = rig.own();
    change(rig, &mut layout);
    rig.queues(|own| *own = layout);
    rig.go();
    rig.good()
}

/// Features are offered to the device; refused unless it sets FEATURES_OK.
fn features(rig: &mut Rig, features: u64) -> Outcome {
    if rig.negotiate(features) { Outcome::Wrong("features-accepted") } else { Outcome::Refused }
}

/// Something is done to a running device, then a good request has to be served.
fn running(rig: &mut Rig, misuse: fn(&Rig)) -> Outcome {
    rig.start();
    if rig.good() != Outcome::Served {
        return Outcome::Wrong("no-good-start");
    }
    misuse(rig);
    rig.good()
}

/// A running device's queue registers are written; it has to go on with what it had.
fn rewritten(rig: &mut Rig, change: fn(&Rig, &mut Layout)) -> Outcome {
    rig.start();
    if rig.good() != Outcome::Served {
        return Outcome::Wrong("no-good-start");
    }
    let mut layout = rig.own();
    change(rig, &mut layout);
    rig.set_queue(rig.target.queue, layout);
    rig.good()
}

/// A status is written to a running device and must change nothing.
fn no_status(rig: &mut Rig, write: fn(&Rig)) -> Outcome {
    rig.start();
    write(rig);
    match rig.status() {
        DRIVER_OK if rig.good() == Outcome::Served => Outcome::Ignored,
        DRIVER_OK => Outcome::Wrong("not-served-after"),
        _ => Outcome::Wrong("status-changed"),
    }
}

/// Statuses are written one after the other; refused unless DRIVER_OK comes to be set.
fn statuses(rig: &mut Rig, values: &[u32]) -> Outcome {
    for value in values {
        rig.window.write(reg::STATUS, *value);
    }
    if rig.status() & 4 == 0 { Outcome::Refused } else { rig.settle(1) }
}

/// A register is written at its address with another width, or beside its address.
fn write8(rig: &Rig, register: u64, value: u8) {
    // SAFETY: in the device's window; the device only knows addresses of the rig's own memory.
    unsafe { cpu::write8(rig.window.address + register, value) };
}

fn write16(rig: &Rig, register: u64, value: u16) {
    // SAFETY: as in `write8`.
    unsafe { cpu::write16(rig.window.address + register, value) };
}

fn write64(rig: &Rig, register: u64, value: u64) {
    // SAFETY: as in `write8`.
    unsafe { cpu::write64(rig.window.address + register, value) };
}

/// Reads with every width at every `step`th offset from `first` to `last`.
fn read_all(rig: &Rig, first: u64, last: u64, step: u64) {
    let mut at = rig.window.address + first;
    while at <= rig.window.address + last {
        // SAFETY: in the window of the device, or the one behind it; reading registers changes nothing of ours.
        unsafe {
            cpu::read8(at);
            cpu::read16(at);
            cpu::read32(at);
            cpu::read64(at);
        }
        at += step;
    }
}

/// The cases.
#[rustfmt::skip]
pub const CASES: &[Case] = &[
    // Status.
    Case { name: "status/driver-without-acknowledge", allowed: NO, run: |rig| statuses(rig, &[2, 2 | 8, 2 | 8 | 4]) },
    Case { name: "status/driver-ok-at-once", allowed: NO, run: |rig| statuses(rig, &[DRIVER_OK]) },
    Case { name: "status/driver-ok-without-features-ok", allowed: NO, run: |rig| statuses(rig, &[1, 3, 7]) },
    Case { name: "status/features-ok-without-driver", allowed: NO, run: |rig| statuses(rig, &[1, 9, 13]) },
    Case { name: "status/failed-then-driver-ok", allowed: NO, run: |rig| {
        rig.negotiate(rig.features());
        statuses(rig, &[FEATURES_OK | 128, DRIVER_OK, DRIVER_OK | 128])
    } },
    Case { name: "status/driver-ok-without-queues", allowed: NO_QUEUE, run: |rig| {
        rig.negotiate(rig.features());
        statuses(rig, &[DRIVER_OK])
    } },
    Case { name: "status/bit-taken-back", allowed: NOTHING, run: |rig| no_status(rig, |rig| rig.window.write(reg::STATUS, 7)) },
    Case { name: "status/acknowledge-only-while-running", allowed: NOTHING, run: |rig| no_status(rig, |rig| rig.window.write(reg::STATUS, 1)) },
    Case { name: "status/needs-reset-by-the-driver", allowed: NOTHING, run: |rig| no_status(rig, |rig| rig.window.write(reg::STATUS, DRIVER_OK | DEVICE_NEEDS_RESET)) },
    Case { name: "status/bits-nobody-knows", allowed: NOTHING, run: |rig| no_status(rig, |rig| rig.window.write(reg::STATUS, DRIVER_OK | 0x30)) },
    Case { name: "status/bits-above-eight", allowed: NOTHING, run: |rig| no_status(rig, |rig| rig.window.write(reg::STATUS, 0xffff_ff00)) },
    Case { name: "status/driver-ok-again", allowed: NOTHING, run: |rig| no_status(rig, |rig| rig.go()) },
    Case { name: "status/zero-in-one-byte", allowed: NOTHING, run: |rig| no_status(rig, |rig| write8(rig, reg::STATUS, 0)) },
    Case { name: "status/zero-in-two-bytes", allowed: NOTHING, run: |rig| no_status(rig, |rig| write16(rig, reg::STATUS, 0)) },
    Case { name: "status/zero-in-eight-bytes", allowed: NOTHING, run: |rig| no_status(rig, |rig| write64(rig, reg::STATUS, 0)) },
    Case { name: "status/zero-one-byte-on", allowed: NOTHING, run: |rig| no_status(rig, |rig| {
        // SAFETY: as in `write8`.
        unsafe { cpu::write32(rig.window.address + reg::STATUS + 1, 0) };
    }) },
    Case { name: "status/failed-while-running", allowed: ANY, run: |rig| {
        rig.start();
        rig.window.write(reg::STATUS, DRIVER_OK | 128);
        rig.good()
    } },
    // Features.
    Case { name: "features/none", allowed: NO, run: |rig| features(rig, 0) },
    Case { name: "features/without-version-1", allowed: NO, run: |rig| { let all = rig.window.features(); features(rig, all & !VERSION_1) } },
    Case { name: "features/not-offered", allowed: NO, run: |rig| features(rig, VERSION_1 | 1 << 50) },
    Case { name: "features/all-there-are", allowed: NO, run: |rig| features(rig, u64::MAX) },
    Case { name: "features/in-the-third-word", allowed: NO, run: |rig| {
        rig.window.write(reg::STATUS, 1);
        rig.window.write(reg::STATUS, 3);
        for (half, value) in [(0, 0), (1, 1), (2, 0xffff_ffff)] {
            rig.window.write(reg::DRIVER_FEATURES_SEL, half);
            rig.window.write(reg::DRIVER_FEATURES, value);
        }
        rig.window.write(reg::STATUS, FEATURES_OK);
        if rig.status() & 8 != 0 { Outcome::Wrong("features-accepted") } else { Outcome::Refused }
    } },
    Case { name: "features/selector-without-end", allowed: YES, run: |rig| running(rig, |rig| {
        for word in [2, 3, 0x8000_0000, u32::MAX] {
            rig.window.write(reg::DEVICE_FEATURES_SEL, word);
            rig.window.read(reg::DEVICE_FEATURES);
            rig.window.write(reg::DRIVER_FEATURES_SEL, word);
            rig.window.write(reg::DRIVER_FEATURES, u32::MAX);
        }
    }) },
    Case { name: "features/before-driver", allowed: NO, run: |rig| {
        for half in 0..2 {
            rig.window.write(reg::DRIVER_FEATURES_SEL, half);
            rig.window.write(reg::DRIVER_FEATURES, half);
        }
        statuses(rig, &[1, 3, FEATURES_OK, DRIVER_OK])
    } },
    Case { name: "features/after-features-ok", allowed: YES, run: |rig| {
        rig.negotiate(rig.features());
        for half in 0..2 {
            rig.window.write(reg::DRIVER_FEATURES_SEL, half);
            rig.window.write(reg::DRIVER_FEATURES, u32::MAX);
        }
        rig.queues(|_| ());
        rig.go();
        rig.good()
    } },
    Case { name: "features/after-driver-ok", allowed: YES, run: |rig| running(rig, |rig| {
        for half in 0..2 {
            rig.window.write(reg::DRIVER_FEATURES_SEL, half);
            rig.window.write(reg::DRIVER_FEATURES, 0);
        }
    }) },
    // Queue registers, before DRIVER_OK.
    Case { name: "queue/size-0", allowed: NO, run: |rig| laid_out(rig, |_, own| own.size = 0) },
    Case { name: "queue/size-3", allowed: NO, run: |rig| laid_out(rig, |_, own| own.size = 3) },
    Case { name: "queue/size-63", allowed: NO, run: |rig| laid_out(rig, |_, own| own.size = 63) },
    Case { name: "queue/size-twice-the-largest", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.size = 2 * rig.window.read(reg::QUEUE_NUM_MAX)) },
    Case { name: "queue/size-32768", allowed: NO, run: |rig| laid_out(rig, |_, own| own.size = 32768) },
    Case { name: "queue/size-65536", allowed: NO, run: |rig| laid_out(rig, |_, own| own.size = 65536) },
    Case { name: "queue/size-65536-and-a-good-one", allowed: NO, run: |rig| laid_out(rig, |_, own| own.size = 65536 + u32::from(SIZE)) },
    Case { name: "queue/size-ffffffff", allowed: NO, run: |rig| laid_out(rig, |_, own| own.size = u32::MAX) },
    Case { name: "queue/descriptors-misaligned", allowed: NO, run: |rig| laid_out(rig, |_, own| own.desc += 8) },
    Case { name: "queue/driver-area-misaligned", allowed: NO, run: |rig| laid_out(rig, |_, own| own.driver += 1) },
    Case { name: "queue/device-area-misaligned", allowed: NO, run: |rig| laid_out(rig, |_, own| own.device += 2) },
    Case { name: "queue/descriptors-behind-ram", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.desc = rig.ram_end()) },
    Case { name: "queue/driver-area-behind-ram", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.driver = rig.ram_end()) },
    Case { name: "queue/device-area-behind-ram", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.device = rig.ram_end()) },
    Case { name: "queue/descriptors-across-the-end-of-ram", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.desc = rig.ram_end() - 512) },
    Case { name: "queue/driver-area-across-the-end-of-ram", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.driver = rig.ram_end() - 64) },
    Case { name: "queue/device-area-across-the-end-of-ram", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.device = rig.ram_end() - 64) },
    Case { name: "queue/descriptors-at-its-registers", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.desc = rig.window.address) },
    Case { name: "queue/driver-area-at-its-registers", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.driver = rig.window.address) },
    Case { name: "queue/device-area-at-its-registers", allowed: NO, run: |rig| laid_out(rig, |rig, own| own.device = rig.window.address) },
    Case { name: "queue/descriptors-wrap", allowed: NO, run: |rig| laid_out(rig, |_, own| own.desc = 0xffff_ffff_ffff_fff0) },
    Case { name: "queue/driver-area-wraps", allowed: NO, run: |rig| laid_out(rig, |_, own| own.driver = 0xffff_ffff_ffff_fffe) },
    Case { name: "queue/device-area-wraps", allowed: NO, run: |rig| laid_out(rig, |_, own| own.device = 0xffff_ffff_ffff_fffc) },
    Case { name: "queue/high-halves-only", allowed: NO, run: |rig| laid_out(rig, |_, own| (own.desc, own.driver, own.device) = (1 << 40, 1 << 40, 1 << 40)) },
    Case { name: "queue/all-areas-in-one-place", allowed: ANY, run: |rig| {
        rig.negotiate(rig.features());
        rig.queues(|own| (own.driver, own.device) = (own.desc, own.desc));
        // What it finds there: descriptors 0 as flags and index, and so an index that jumps.
        rig.put(0, &[Desc(0x0050_0000, 0, 0, 0)]);
        rig.go();
        rig.notify();
        rig.settle(1)
    } },
    Case { name: "queue/not-ready", allowed: NO_QUEUE, run: |rig| laid_out(rig, |_, own| own.ready = 0) },
    Case { name: "queue/ready-is-2", allowed: NO_QUEUE, run: |rig| laid_out(rig, |_, own| own.ready = 2) },
    Case { name: "queue/set-up-before-features-ok", allowed: NO_QUEUE, run: |rig| {
        rig.queues(|_| ());
        rig.negotiate(rig.features());
        rig.go();
        rig.good()
    } },
    Case { name: "queue/one-that-does-not-exist", allowed: YES, run: |rig| {
        rig.negotiate(rig.features());
        for queue in [32, 0x7fff, 0xffff] {
            let layout = rig.own();
            rig.set_queue(queue, layout);
            if rig.window.read(reg::QUEUE_NUM_MAX) != 0 || rig.window.read(reg::QUEUE_READY) != 0 {
                return Outcome::Wrong("a-queue-that-does-not-exist");
            }
        }
        rig.window.write(reg::QUEUE_SEL, u32::MAX);
        rig.window.write(reg::QUEUE_NUM, 64);
        rig.window.write(reg::QUEUE_READY, 1);
        rig.queues(|_| ());
        rig.go();
        rig.good()
    } },
    // Queue registers, after DRIVER_OK.
    Case { name: "live/size-changed", allowed: YES, run: |rig| rewritten(rig, |_, own| own.size = 1024) },
    Case { name: "live/size-0", allowed: YES, run: |rig| rewritten(rig, |_, own| own.size = 0) },
    Case { name: "live/size-ffffffff", allowed: YES, run: |rig| rewritten(rig, |_, own| own.size = u32::MAX) },
    Case { name: "live/descriptors-moved", allowed: YES, run: |rig| rewritten(rig, |rig, own| own.desc = rig.ram_end()) },
    Case { name: "live/driver-area-moved", allowed: YES, run: |rig| rewritten(rig, |rig, own| own.driver = rig.ram_end()) },
    Case { name: "live/device-area-moved", allowed: YES, run: |rig| rewritten(rig, |rig, own| own.device = rig.window.address) },
    Case { name: "live/ready-taken-back", allowed: YES, run: |rig| rewritten(rig, |_, own| own.ready = 0) },
    // Notifications.
    Case { name: "notify/queues-that-do-not-exist", allowed: YES, run: |rig| running(rig, |rig| {
        for queue in [8, 9, 31, 0x7fff, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX] { rig.window.write(reg::QUEUE_NOTIFY, queue); }
    }) },
    Case { name: "notify/before-driver-ok", allowed: YES, run: |rig| {
        rig.notify();
        rig.negotiate(rig.features());
        rig.notify();
        rig.queues(|_| ());
        rig.notify();
        rig.go();
        rig.good()
    } },
    Case { name: "notify/storm", allowed: YES, run: |rig| running(rig, |rig| (0..3000).for_each(|_| rig.notify())) },
    Case { name: "notify/storm-of-queues-that-do-not-exist", allowed: YES, run: |rig| running(rig, |rig| {
        for queue in 0..1000 { rig.window.write(reg::QUEUE_NOTIFY, 100 + queue); }
    }) },
    Case { name: "notify/in-one-byte", allowed: YES, run: |rig| running(rig, |rig| write8(rig, reg::QUEUE_NOTIFY, 0)) },
    Case { name: "notify/in-two-bytes", allowed: YES, run: |rig| running(rig, |rig| write16(rig, reg::QUEUE_NOTIFY, 0)) },
    Case { name: "notify/in-eight-bytes", allowed: YES, run: |rig| running(rig, |rig| write64(rig, reg::QUEUE_NOTIFY, 0)) },
    Case { name: "notify/while-it-needs-a-reset", allowed: NO, run: |rig| {
        let way = rig.way();
        let outcome = rig.chain(&[Desc(u64::MAX, 16, way, 0)]);
        for _ in 0..200 { rig.notify(); }
        outcome
    } },
    // Interrupts.
    Case { name: "interrupt/acknowledge-everything", allowed: YES, run: |rig| running(rig, |rig| {
        for value in [u32::MAX, 0, 0x8000_0000] { rig.window.write(reg::INTERRUPT_ACK, value); }
    }) },
    Case { name: "interrupt/never-acknowledged", allowed: YES, run: |rig| {
        rig.start();
        for _ in 0..50 {
            if rig.good() != Outcome::Served { return Outcome::Wrong("not-served"); }
        }
        Outcome::Served
    } },
    // Widths and offsets.
    Case { name: "width/every-register-read-every-way", allowed: YES, run: |rig| running(rig, |rig| read_all(rig, 0, 0xff, 4)) },
    Case { name: "width/misaligned-reads", allowed: YES, run: |rig| running(rig, |rig| read_all(rig, 1, 0xff, 3)) },
    Case { name: "width/across-registers-and-configuration", allowed: YES, run: |rig| running(rig, |rig| read_all(rig, 0xf9, 0x107, 1)) },
    Case { name: "width/across-the-end-of-the-window", allowed: YES, run: |rig| running(rig, |rig| read_all(rig, 0x1f9, 0x1ff, 1)) },
    Case { name: "width/read-only-registers-written", allowed: YES, run: |rig| running(rig, |rig| {
        for register in [reg::MAGIC, reg::VERSION, reg::DEVICE_ID, 0xc, reg::DEVICE_FEATURES, reg::QUEUE_NUM_MAX, reg::INTERRUPT_STATUS, 0xfc] {
            rig.window.write(register, 0xdead_beef);
        }
    }) },
    Case { name: "width/write-only-registers-read", allowed: YES, run: |rig| running(rig, |rig| {
        for register in [0x14, 0x20, 0x24, 0x30, 0x38, 0x50, 0x64, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] { rig.window.read(register); }
    }) },
    Case { name: "width/registers-that-do-not-exist", allowed: YES, run: |rig| running(rig, |rig| {
        for register in (0xa8..0xfc).step_by(4).chain([0x18, 0x1c, 0x28, 0x2c, 0x3c, 0x40, 0x48, 0x4c, 0x54, 0x58, 0x5c, 0x68, 0x6c, 0x74]) {
            rig.window.write(register, u32::MAX);
            rig.window.read(register);
        }
    }) },
    Case { name: "width/queue-addresses-in-eight-bytes", allowed: NO, run: |rig| {
        rig.negotiate(rig.features());
        let own = rig.own();
        rig.queues(|layout| layout.ready = 0);
        rig.window.write(reg::QUEUE_SEL, u32::from(rig.target.queue));
        rig.window.write(reg::QUEUE_DESC, 0);
        rig.window.write(reg::QUEUE_DESC + 4, 0xffff_ffff);
        // Not a way to write the register (§4.2.2.2): it keeps the address that is nowhere.
        write64(rig, reg::QUEUE_DESC, own.desc);
        rig.window.write(reg::QUEUE_READY, 1);
        rig.go();
        rig.good()
    } },
    // Configuration space.
    Case { name: "config/read-to-the-end-and-beyond", allowed: YES, run: |rig| running(rig, |rig| read_all(rig, 0x100, 0x1f8, 8)) },
    Case { name: "config/misaligned-reads", allowed: YES, run: |rig| running(rig, |rig| read_all(rig, 0x101, 0x140, 1)) },
    Case { name: "config/written-everywhere", allowed: YES, run: |rig| running(rig, |rig| {
        for offset in 0x100..0x180 { write8(rig, offset, 0xa5); }
        for offset in (0x180..0x1f8).step_by(8) { write64(rig, offset, u64::MAX); }
    }) },
    // Resets.
    Case { name: "reset/a-hundred-times", allowed: YES, run: |rig| {
        for _ in 0..100 { rig.window.write(reg::STATUS, 0); }
        rig.start();
        rig.good()
    } },
    Case { name: "reset/start-and-stop", allowed: YES, run: |rig| {
        for _ in 0..30 {
            rig.start();
            if !rig.reset() { return Outcome::Wrong("no-reset"); }
        }
        rig.start();
        rig.good()
    } },
    Case { name: "reset/in-mid-flight", allowed: YES, run: |rig| {
        for _ in 0..30 {
            rig.start();
            for head in (0..SIZE - 3).step_by(4) { rig.put_good(head); rig.offer(head); }
            rig.notify();
            if !rig.reset() { return Outcome::Wrong("no-reset"); }
        }
        rig.start();
        rig.good()
    } },
    Case { name: "reset/nothing-is-written-after-it", allowed: YES, run: |rig| {
        for _ in 0..20 {
            rig.start();
            for head in (0..SIZE - 3).step_by(4) { rig.put_good(head); rig.offer(head); }
            rig.notify();
            if !rig.reset() { return Outcome::Wrong("no-reset"); }
            for at in 0x4_0000..0x8_0000 { rig.fill(at, &[0x3c]); }
            crate::irq::wait(2000, || (), || false);
            if (0x4_0000..0x8_0000).any(|at| rig.byte(at) != 0x3c) || rig.used() != 0 { return Outcome::Wrong("written-after-the-reset"); }
        }
        rig.start();
        rig.good()
    } },
    Case { name: "reset/of-a-broken-ring", allowed: YES, run: |rig| {
        for _ in 0..10 {
            let way = rig.way();
            if rig.chain(&[Desc(u64::MAX, 16, way, 0)]) == Outcome::Served { return Outcome::Wrong("served"); }
            if !rig.reset() { return Outcome::Wrong("no-reset"); }
        }
        rig.start();
        rig.good()
    } },
];
