//! The registers, through both windows, as drivers and attackers use them.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::virtio::testing::{RAM, Rig, Ring, TestDoorbell, W1, W2};
use crate::virtio::{
    ActivateError, Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, read_config_bytes,
};

#[derive(Default)]
struct Seen {
    resets: AtomicUsize,
    shut_down: AtomicUsize,
    active: Mutex<Option<Activation>>,
    config: Mutex<Vec<u8>>,
}

/// Does nothing but remember.
struct Probe(Arc<Seen>);

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[1, 2, 3, 4, 5, 6], offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        *self.0.config.lock().unwrap() = [&[offset as u8], data].concat();
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.queues.is_empty() {
            return Err(ActivateError::MissingQueue(0));
        }
        *self.0.active.lock().unwrap() = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.0.resets.fetch_add(1, Ordering::Relaxed);
        self.0.active.lock().unwrap().take();
    }
    fn shut_down(&mut self) -> io::Result<()> {
        self.0.shut_down.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn rig() -> (Rig, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    (Rig::new(Probe(Arc::clone(&seen))), seen)
}

fn is_active(seen: &Seen) -> bool {
    seen.active.lock().unwrap().is_some()
}

#[test]
fn a_driver_by_the_book() {
    let (rig, seen) = rig();
    assert_eq!((rig.get(0), rig.get(4), rig.get(8), rig.get(0xc)), (0x7472_6976, 2, 42, 0));
    assert_eq!(rig.offered(), F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX);
    rig.set(0x14, 2);
    assert_eq!(rig.get(0x10), 0);
    let features = rig.negotiate(F_EVENT_IDX);
    rig.set(0x30, 1);
    assert_eq!((rig.get(0x34), rig.get(0x44)), (8, 0));
    rig.queue(0, 16);
    rig.queue(1, 8);
    assert_eq!(rig.get(0x44), 1);
    assert!(!is_active(&seen));
    rig.driver_ok();
    assert_eq!(rig.get(0x70), 0xf);
    assert_eq!(*rig.doorbell.attached.lock().unwrap(), [(W1 + 0x50, 0), (W1 + 0x50, 1)]);
    let active = seen.active.lock().unwrap();
    let active = active.as_ref().unwrap();
    assert_eq!((active.features, active.queues.len(), active.queues[1].queue.size()), (features, 2, 8));

    // A write that does reach us signals the same descriptor.
    rig.set(0x50, 1);
    assert_eq!(active.queues[1].notify.read().unwrap(), 1);
    assert!(active.queues[0].notify.read().is_err());

    active.interrupt.queue(1);
    assert_eq!((rig.get(0x60), rig.line.edges()), (1, 1));
    active.interrupt.config();
    assert_eq!((rig.get(0x60), rig.line.edges(), rig.get(0xfc)), (3, 2, 1));
    rig.set(0x64, 1);
    assert_eq!(rig.get(0x60), 2);
    rig.set(0x64, u32::MAX);
    assert_eq!(rig.get(0x60), 0);
}

#[test]
fn a_reset_puts_everything_back() {
    let (rig, seen) = rig();
    rig.start(0, 2, 8);
    assert!(is_active(&seen));
    rig.set(0x70, 0);
    assert_eq!((rig.get(0x70), rig.get(0x44), rig.get(0x60)), (0, 0, 0));
    assert!(!is_active(&seen));
    assert!(rig.doorbell.attached.lock().unwrap().is_empty());
    assert_eq!(seen.resets.load(Ordering::Relaxed), 1);
    rig.set(0x50, 0);
    rig.set(0x70, 0);
    assert_eq!(seen.resets.load(Ordering::Relaxed), 1, "nothing ran, nothing to stop");
    rig.start(0, 2, 8);
    assert!(is_active(&seen));
    rig.transport.shut_down().unwrap();
    assert_eq!(seen.shut_down.load(Ordering::Relaxed), 1);
    assert_eq!(rig.get(0x70), 0);
}

#[test]
fn each_window_works_and_no_kernel_sees_both() {
    let (rig, seen) = rig();
    let read = |offset| {
        let mut word = [0; 4];
        rig.w2.read(offset, &mut word);
        u32::from_le_bytes(word)
    };
    assert_eq!((rig.get(8), read(8)), (42, 42));
    rig.transport.claim_acpi();
    assert_eq!(
        (rig.get(0), rig.get(4), rig.get(8), rig.get(0x34), rig.get(0x100)),
        (0x7472_6976, 2, 0, 0, 0)
    );
    assert_eq!(read(8), 42);
    rig.set(0x70, 1);
    assert_eq!(read(0x70), 0, "writes to the placeholder do nothing");

    let acpi = Rig { w1: Arc::clone(&rig.w2), ..rig };
    acpi.start(0, 2, 8);
    assert_eq!(*acpi.doorbell.attached.lock().unwrap(), [(W2 + 0x50, 0), (W2 + 0x50, 1)]);
    acpi.set(0x70, 0);
    assert_eq!(acpi.get(8), 42, "a reset of the device is not one of the machine");
    acpi.start(0, 2, 8);
    acpi.transport.reset();
    assert!(!is_active(&seen));
    let mut word = [0; 4];
    acpi.transport.command_line_window(W1).read(8, &mut word);
    assert_eq!(u32::from_le_bytes(word), 42);
}

#[test]
fn a_doorbell_that_cannot_be_attached_is_done_without() {
    let (mut rig, seen) = rig();
    rig.doorbell = Arc::new(TestDoorbell { refuse: true, ..TestDoorbell::default() });
    let device = Box::new(Probe(Arc::clone(&seen)));
    let line = Arc::clone(&rig.line) as Arc<dyn Line>;
    rig.transport = MmioTransport::new(device, Arc::clone(&rig.memory), line, Arc::clone(&rig.doorbell) as _);
    rig.w1 = rig.transport.command_line_window(W1);
    rig.start(0, 1, 8);
    rig.set(0x50, 0);
    assert_eq!(seen.active.lock().unwrap().as_ref().unwrap().queues[0].notify.read().unwrap(), 1);
}

#[test]
fn features_that_are_refused() {
    let (rig, _) = rig();
    // low, high, selector 2
    let cases = [(0, 0, 0), (1, 1, 0), (0, 3, 0), (1 << 28, 0, 0), (0, 1, 1)];
    for (low, high, beyond) in cases {
        rig.set(0x70, 0);
        rig.set(0x70, 3);
        for (selector, value) in [(0, low), (1, high), (2, beyond)] {
            rig.set(0x24, selector);
            rig.set(0x20, value);
        }
        rig.set(0x70, 0xb);
        assert_eq!(rig.get(0x70), 3, "{low:#x} {high:#x} {beyond:#x}");
        rig.set(0x70, 0xf);
        assert_eq!(rig.get(0x70), 3);
    }
}

#[test]
fn queues_that_make_no_sense_need_a_reset() {
    type Setup = fn(&Rig);
    let cases: [(&str, Setup); 9] = [
        ("none enabled", |_| {}),
        ("size 0", |r| {
            r.queue(0, 8);
            r.set(0x38, 0);
        }),
        ("size 3", |r| {
            r.queue(0, 8);
            r.set(0x38, 3);
        }),
        ("size above the maximum", |r| {
            r.queue(1, 8);
            r.set(0x38, 16);
        }),
        ("size beyond 16 bits", |r| {
            r.queue(0, 8);
            r.set(0x38, 0x1_0008);
        }),
        ("misaligned table", |r| {
            r.queue(0, 8);
            r.set(0x80, 0x1001);
        }),
        ("available ring in a hole", |r| {
            r.queue(0, 8);
            r.set(0x90, RAM as u32);
        }),
        ("used ring over the end of RAM", |r| {
            r.queue(0, 8);
            r.set(0xa0, RAM as u32 - 8);
        }),
        ("table beyond 64 bits", |r| {
            r.queue(0, 8);
            r.set(0x80, 0xffff_fff0);
            r.set(0x84, u32::MAX);
        }),
    ];
    for (name, setup) in cases {
        let (rig, seen) = rig();
        rig.negotiate(0);
        setup(&rig);
        rig.driver_ok();
        assert!(!is_active(&seen), "{name}");
        assert_eq!((rig.get(0x70), rig.get(0x60), rig.line.edges()), (0x4f, 2, 1), "{name}");
        assert!(rig.doorbell.attached.lock().unwrap().is_empty(), "{name}");
        rig.set(0x50, 0);
        rig.start(0, 1, 8);
        assert!(is_active(&seen), "{name}: works after a reset");
    }
}

#[test]
fn nothing_changes_behind_a_running_device() {
    let (rig, seen) = rig();
    let ring = Ring::new(&rig.memory, 0, 8);
    // Before FEATURES_OK the queue registers are closed too.
    rig.place(&ring);
    assert_eq!(rig.get(0x44), 0);
    rig.start(0, 1, 8);
    for (register, value) in
        [(0x38, 16), (0x44, 0), (0x80, 0xf010_0000), (0x90, 1), (0xa0, 3), (0x20, u32::MAX)]
    {
        rig.set(0x30, 0);
        rig.set(register, value);
    }
    assert_eq!(rig.get(0x44), 1);
    rig.set(0x70, 0xf);
    assert_eq!(seen.active.lock().unwrap().as_ref().unwrap().queues[0].queue.size(), 8);
    // A queue that was not enabled at DRIVER_OK stays so.
    rig.set(0x30, 1);
    rig.set(0x44, 1);
    assert_eq!(rig.get(0x44), 0);
    rig.set(0x50, 1);
}

#[test]
fn numbers_that_the_guest_makes_up() {
    let (rig, _) = rig();
    rig.start(0, 1, 8);
    for queue in [2, 8, 0xffff, 0x1_0000, u32::MAX] {
        rig.set(0x30, queue);
        assert_eq!((rig.get(0x34), rig.get(0x44)), (0, 0), "queue {queue}");
        rig.set(0x44, 1);
        rig.set(0x50, queue);
    }
    rig.set(0x14, u32::MAX);
    rig.set(0x24, u32::MAX);
    assert_eq!(rig.get(0x10), 0);
    // Status has 8 bits.
    rig.set(0x70, 0x100);
    rig.set(0x70, u32::MAX);
    assert_eq!(rig.get(0x70) & 0x7f, 0xf);
}

#[test]
fn every_width_at_every_offset() {
    let (rig, seen) = rig();
    rig.set(0x70, 3);
    for window in [&rig.w1, &rig.w2] {
        for offset in 0..WINDOW_SIZE {
            for width in 1..=8usize {
                let mut data = [0xaa; 8];
                window.read(offset, &mut data[..width]);
                if offset < 0x100 && (width != 4 || offset % 4 != 0) {
                    assert_eq!(data[..width], [0; 8][..width], "{offset:#x}/{width}");
                }
                assert_eq!(data[width..], [0xaa; 8][width..]);
                // All ones are harmless everywhere: no such queue, no such status.
                if offset != 0x70 {
                    window.write(offset, &[0xff; 8][..width]);
                }
            }
        }
    }
    for (offset, width, expected) in [
        (0x100, 1, &[1, 0][..1]),
        (0x101, 2, &[2, 3]),
        (0x104, 4, &[5, 6, 0, 0]),
        (0x106, 2, &[0, 0]),
        (0x1ff, 8, &[0; 8]),
    ] {
        let mut data = [0xaa; 8];
        rig.w1.read(offset, &mut data[..width]);
        assert_eq!(&data[..width], expected);
    }
    rig.w1.write(0x103, &[7, 8]);
    assert_eq!(*seen.config.lock().unwrap(), [3, 7, 8]);
    assert_eq!(rig.get(0xb0), u32::MAX, "no shared memory region");
}
