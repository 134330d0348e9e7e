//! The function as drivers and attackers use it.

use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;

use super::*;
use crate::pci::test_wires::{Sent, Wire};
use crate::virtio::testing::{RAM, Ring, TestDoorbell, memory};
use crate::virtio::{ActivateError, Activation, F_INDIRECT_DESC, F_VERSION_1, read_config_bytes};

const BASE: u64 = 0xc000_4000;

#[derive(Default)]
struct Seen {
    resets: AtomicUsize,
    active: Mutex<Option<Activation>>,
}

/// Two queues, six bytes of configuration.
struct Probe(Arc<Seen>);

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        2
    }
    fn features(&self) -> u64 {
        F_VERSION_1 | F_INDIRECT_DESC
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[1, 2, 3, 4, 5, 6], offset, data);
    }
    fn write_config(&mut self, _: u64, _: &[u8]) {}
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
}

struct Rig {
    memory: Arc<GuestMemory>,
    seen: Arc<Seen>,
    doorbell: Arc<TestDoorbell>,
    sent: Arc<Sent>,
    wire: Arc<Wire>,
    card: Arc<PciTransport>,
    bar: Arc<dyn BusDevice>,
    msix: Arc<dyn BusDevice>,
}

fn rig() -> Rig {
    let memory = memory();
    let (seen, doorbell) = (Arc::new(Seen::default()), Arc::new(TestDoorbell::default()));
    let (sent, wire) = (Arc::new(Sent::default()), Arc::new(Wire::default()));
    let wires = Wires {
        memory: Arc::clone(&memory),
        doorbell: Arc::clone(&doorbell) as _,
        messages: Arc::clone(&sent) as _,
        line: Arc::clone(&wire) as _,
    };
    let place = Place { behind_port: true, multifunction: false };
    let card = PciTransport::new(Box::new(Probe(Arc::clone(&seen))), place, wires);
    assert!(card.write_config(0x14, &0xc000_0000u32.to_le_bytes()));
    card.write_config(0x20, &(BASE as u32).to_le_bytes());
    card.write_config(4, &[6]);
    let mut bars = card.mappings();
    let places: Vec<_> = bars.iter().map(|m| (m.bar, m.base, m.size)).collect();
    assert_eq!(places, [(1, 0xc000_0000, 0x1000), (4, BASE, 0x4000)]);
    card.mapped(1, Some(0xc000_0000));
    card.mapped(4, Some(BASE));
    let (bar, msix) = (bars.pop().unwrap().device, bars.pop().unwrap().device);
    Rig { memory, seen, doorbell, sent, wire, card, bar, msix }
}

impl Rig {
    fn get(&self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.bar.read(offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }
    fn set(&self, offset: u64, width: usize, value: u64) {
        self.bar.write(offset, &value.to_le_bytes()[..width]);
    }
    fn config(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.card.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }
    /// Offsets of the vendor capabilities by their type.
    fn capability(&self, kind: u8) -> u16 {
        let mut at = self.config(0x34) as u16 & 0xff;
        while at != 0 {
            let head = self.config(at).to_le_bytes();
            if head[0] == CAP_VENDOR && head[3] == kind {
                return at;
            }
            at = head[1].into();
        }
        panic!("no capability {kind}");
    }
    fn msix_on(&self) {
        self.card.write_config(self.card.at.msix + 2, &0x8000u16.to_le_bytes());
        for vector in 0..3u64 {
            for (word, value) in [0xfee0_0000, 0, vector as u32, 0].into_iter().enumerate() {
                self.msix.write(16 * vector + 4 * word as u64, &value.to_le_bytes());
            }
        }
    }
    fn msix_is_on(&self) -> bool {
        self.card.msix.enabled()
    }
    fn negotiate(&self) {
        for status in [0, 1, 3] {
            self.set(0x14, 1, status);
        }
        for (select, value) in [(0, 0), (1, 1)] {
            self.set(0x08, 4, select);
            self.set(0x0c, 4, value);
        }
        self.set(0x14, 1, 0xb);
        assert_eq!(self.get(0x14, 1), 0xb);
    }
    fn place(&self, index: u16, size: u16) -> Ring {
        let ring = Ring::new(&self.memory, index, size);
        self.set(0x16, 2, index.into());
        self.set(0x18, 2, size.into());
        for (offset, value) in [(0x20, ring.desc), (0x28, ring.avail), (0x30, ring.used)] {
            self.set(offset, 4, value & 0xffff_ffff);
            self.set(offset + 4, 4, value >> 32);
        }
        self.set(0x1c, 2, 1);
        ring
    }
    fn start(&self) {
        self.negotiate();
        self.place(0, 16);
        self.place(1, 8);
        self.set(0x14, 1, 0xf);
    }
    fn is_active(&self) -> bool {
        self.seen.active.lock().unwrap().is_some()
    }
    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.seen.active.lock().unwrap().as_ref().unwrap().interrupt)
    }
    fn up(&self) -> bool {
        self.wire.0.load(Ordering::Relaxed)
    }
}

#[test]
fn a_driver_finds_its_way() {
    let rig = rig();
    assert_eq!((rig.config(0), rig.config(8)), (0x1042_1af4, 0x0100_0001));
    for (kind, offset, length) in
        [(1, 0, 0x38), (2, 0x3000, 0x1000), (3, 0x1000, 1), (4, 0x2000, 0x1000), (5, 0, 0)]
    {
        let at = rig.capability(kind);
        assert_eq!((rig.config(at + 8), rig.config(at + 12)), (offset, length), "{kind}");
        assert_eq!(rig.config(at + 4) & 0xff, if kind == 5 { 0 } else { 4 });
    }
    assert_eq!(rig.config(rig.capability(2) + 16), 4);
    // One vector for each queue and one for the configuration; table and pending bits in BAR 1.
    assert_eq!(rig.config(rig.card.at.msix) >> 16 & 0x7ff, 2);
    assert_eq!((rig.config(rig.card.at.msix + 4), rig.config(rig.card.at.msix + 8)), (1, 0x801));
    assert_eq!((rig.get(0x12, 2), rig.get(0x18, 2), rig.get(0x1e, 2)), (2, 16, 0));
    rig.set(0x16, 2, 1);
    assert_eq!((rig.get(0x18, 2), rig.get(0x1e, 2), rig.get(0x1c, 2)), (8, 1, 0));
    rig.set(0x16, 2, 2);
    assert_eq!((rig.get(0x18, 2), rig.get(0x1a, 2)), (0, 0xffff));
    assert_eq!((rig.get(0x2000, 1), rig.get(0x2004, 4)), (1, 0x0605));
}

#[test]
fn a_driver_with_messages() {
    let rig = rig();
    rig.msix_on();
    rig.negotiate();
    rig.set(0x10, 2, 0);
    rig.place(0, 16);
    rig.set(0x1a, 2, 1);
    rig.place(1, 8);
    rig.set(0x1a, 2, 2);
    assert_eq!((rig.get(0x10, 2), rig.get(0x1a, 2), rig.get(0x20, 8)), (0, 2, 0x1_1000));
    // A vector that is not there is not granted.
    rig.set(0x10, 2, 3);
    assert_eq!(rig.get(0x10, 2), 0xffff);
    rig.set(0x10, 2, 0);
    rig.set(0x14, 1, 0xf);
    assert_eq!(*rig.doorbell.attached.lock().unwrap(), [(BASE + 0x3000, 0), (BASE + 0x3004, 1)]);
    rig.set(0x3004, 2, 1);
    {
        let active = rig.seen.active.lock().unwrap();
        let queues = &active.as_ref().unwrap().queues;
        assert_eq!(queues[1].notify.read().unwrap(), 1);
        assert!(queues[0].notify.read().is_err());
    }
    let interrupt = rig.interrupt();
    interrupt.queue(0);
    interrupt.queue(1);
    interrupt.queue(7);
    interrupt.config();
    let data: Vec<u32> = rig.sent.0.lock().unwrap().iter().map(|(_, data)| *data).collect();
    assert_eq!((data, rig.get(0x15, 1)), (vec![1, 2, 0], 1));
    assert_eq!((rig.up(), rig.get(0x1000, 1)), (false, 0), "neither pin nor ISR");
    interrupt.needs_reset();
    interrupt.needs_reset();
    assert_eq!((rig.sent.0.lock().unwrap().len(), rig.get(0x14, 1)), (4, 0x4f));

    rig.set(0x14, 1, 0);
    assert_eq!((rig.get(0x14, 1), rig.get(0x10, 2), rig.get(0x1c, 2)), (0, 0xffff, 0));
    assert_eq!((rig.seen.resets.load(Ordering::Relaxed), rig.is_active()), (1, false));
    assert!(rig.doorbell.attached.lock().unwrap().is_empty());
    rig.start();
    assert!(rig.is_active());
}

#[test]
fn a_driver_with_the_pin() {
    let rig = rig();
    rig.start();
    let interrupt = rig.interrupt();
    interrupt.queue(0);
    assert!(rig.up());
    assert_eq!(rig.config(4) >> 16 & 8, 8);
    assert_eq!((rig.get(0x1000, 1), rig.up(), rig.get(0x1000, 1)), (1, false, 0));
    interrupt.config();
    interrupt.queue(1);
    assert_eq!((rig.up(), rig.get(0x1000, 4)), (true, 3));
    interrupt.queue(0);
    rig.card.write_config(5, &[4]);
    assert!(!rig.up(), "INTx disable");
    rig.card.write_config(5, &[0]);
    assert!(rig.up());
    rig.msix_on();
    assert!(!rig.up(), "messages instead");
    rig.card.reset();
    interrupt.queue(0);
    assert!(rig.up());
    rig.card.reset();
    assert!(!rig.up() && rig.card.mappings().is_empty());
}

#[test]
fn doorbells_move_with_the_bar() {
    let rig = rig();
    rig.start();
    rig.card.mapped(4, None);
    assert!(rig.doorbell.attached.lock().unwrap().is_empty());
    rig.card.mapped(4, Some(5 << 32));
    let there = 5 << 32 | 0x3000;
    assert_eq!(*rig.doorbell.attached.lock().unwrap(), [(there, 0), (there + 4, 1)]);
    rig.card.mapped(1, None);
    assert_eq!(rig.doorbell.attached.lock().unwrap().len(), 2);
}

#[test]
fn the_window_in_configuration_space_leads_into_the_bars() {
    let rig = rig();
    let at = rig.capability(5);
    let aim = |bar: u8, offset: u32, length: u32| {
        rig.card.write_config(at + 4, &[bar]);
        rig.card.write_config(at + 8, &offset.to_le_bytes());
        rig.card.write_config(at + 12, &length.to_le_bytes());
    };
    aim(4, 0x14, 1);
    rig.card.write_config(at + 16, &[1]);
    assert_eq!((rig.get(0x14, 1), rig.config(at + 16)), (1, 1));
    aim(4, 0x2000, 4);
    assert_eq!(rig.config(at + 16), 0x0403_0201);
    aim(1, 8, 4);
    rig.card.write_config(at + 16, &7u32.to_le_bytes());
    assert_eq!(rig.config(at + 16), 7);
    for (bar, offset, length) in [
        (0, 0, 4),
        (5, 0, 4),
        (4, 0x4000, 4),
        (4, 0x3ffe, 4),
        (4, 1, 2),
        (4, 0, 3),
        (4, u32::MAX, 1),
        (1, 0x1000, 1),
    ] {
        aim(bar, offset, length);
        rig.card.write_config(at + 16, &[0xff; 4]);
        assert_eq!(rig.config(at + 16), 0, "{bar} {offset:#x} {length}");
    }
}

#[test]
fn nothing_changes_behind_a_running_device_and_bad_queues_need_a_reset() {
    let rig = rig();
    rig.place(0, 8);
    assert_eq!(rig.get(0x1c, 2), 0, "too early");
    rig.start();
    rig.set(0x16, 2, 0);
    for (offset, width, value) in [(0x18, 2, 4), (0x20, 8, 0xf00), (0x1c, 2, 0), (0x0c, 4, 0)] {
        rig.set(offset, width, value);
    }
    assert_eq!((rig.get(0x18, 2), rig.get(0x20, 8), rig.get(0x1c, 2)), (16, 0x1000, 1));
    type Setup = fn(&Rig);
    let cases: [(&str, Setup); 5] = [
        ("none enabled", |_| {}),
        ("size 3", |r| drop(r.place(0, 3))),
        ("size above the maximum", |r| drop(r.place(1, 16))),
        ("misaligned", |r| {
            r.place(0, 8);
            r.set(0x20, 4, 0x1001);
        }),
        ("outside RAM", |r| {
            r.place(0, 8);
            r.set(0x30, 8, RAM);
        }),
    ];
    for (name, setup) in cases {
        rig.negotiate();
        setup(&rig);
        rig.set(0x14, 1, 0xf);
        assert!(!rig.is_active(), "{name}");
        assert_eq!((rig.get(0x14, 1), rig.up()), (0x4f, true), "{name}");
        rig.set(0x3000, 2, 0);
        assert!(rig.doorbell.attached.lock().unwrap().is_empty(), "{name}");
    }
    rig.start();
    assert!(rig.is_active());
}

#[test]
fn a_device_touches_memory_only_while_it_may_master_the_bus() {
    let rig = rig();
    rig.msix_on();
    rig.card.write_config(4, &[2]);
    rig.start();
    assert_eq!((rig.get(0x14, 1), rig.is_active()), (0xf, false), "it waits");
    rig.set(0x3000, 2, 0);
    rig.card.write_config(4, &[6]);
    assert!(rig.is_active());
    rig.card.write_config(4, &[6]);
    assert_eq!(rig.seen.resets.load(Ordering::Relaxed), 0, "nothing new");
    rig.interrupt().queue(0);
    // Taken away while it runs: it stops, and its driver hears of it when it may be told.
    rig.card.write_config(4, &[2]);
    assert_eq!((rig.seen.resets.load(Ordering::Relaxed), rig.is_active()), (1, false));
    assert!(rig.doorbell.attached.lock().unwrap().is_empty());
    rig.card.write_config(4, &[6]);
    assert_eq!((rig.get(0x14, 1), rig.is_active()), (0x4f, false));
    rig.start();
    assert!(rig.is_active());
}

#[test]
fn a_function_level_reset_is_one_of_everything() {
    let rig = rig();
    rig.msix_on();
    rig.start();
    let at = rig.card.at.express;
    assert_eq!(rig.config(at + 4) >> 28 & 1, 1, "it says that it can");
    assert!(rig.card.write_config(at + 8, &0x8000u16.to_le_bytes()));
    assert_eq!((rig.seen.resets.load(Ordering::Relaxed), rig.is_active(), rig.get(0x14, 1)), (1, false, 0));
    assert_eq!((rig.config(4) & 0xffff, rig.config(0x14), rig.config(at + 8) & 0x8000), (0, 0, 0));
    assert!(!rig.msix_is_on() && rig.card.mappings().is_empty());
    // By its byte alone; and other bits of the register reset nothing.
    assert!(rig.card.write_config(at + 9, &[0x80]));
    rig.card.write_config(at + 8, &[0xff]);
    rig.card.write_config(at + 8, &[0xff, 0x7f]);
    assert_eq!(rig.config(at + 8) & 0xffff, 0x7fff);
    rig.card.write_config(4, &[6]);
    rig.start();
    assert!(rig.is_active());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any accesses, of any width, to the BARs and to configuration space: no panic, and the function can be used afterwards.
    #[test]
    fn any_access_is_harmless(
        accesses in prop::collection::vec((0u8..3, 0u64..0x4000, any::<u64>(), 0usize..9), 0..80)
    ) {
        let rig = rig();
        for (what, offset, value, width) in accesses {
            let bytes = &value.to_le_bytes()[..width];
            let mut data = [0xaa; 8];
            match what {
                0 => {
                    // Most of it is in the first bytes.
                    let offset = if value & 1 == 0 { offset % 0x40 } else { offset };
                    rig.bar.write(offset, bytes);
                    rig.bar.read(offset, &mut data[..width]);
                }
                1 => {
                    rig.msix.write(offset % 0x1000, bytes);
                    rig.msix.read(offset % 0x1000, &mut data[..width]);
                }
                _ => {
                    let offset = (offset % 0x108) as u16;
                    rig.card.write_config(offset, bytes);
                    rig.card.read_config(offset, &mut data[..width]);
                }
            }
            prop_assert_eq!(&data[width..], &[0xaa; 8][width..]);
        }
        rig.card.reset();
        rig.card.write_config(4, &[6]);
        rig.start();
        prop_assert!(rig.is_active());
    }
}
