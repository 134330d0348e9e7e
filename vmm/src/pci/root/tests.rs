//! A root bus as kernels and attackers use it.

use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;

use super::*;
use crate::pci::config::{BarKind, COMMAND, ConfigSpace, Identity};
use crate::pci::intx::tests::Wire;
use crate::pci::msix::tests::Sent;
use crate::pci::{HostBridge, PortEvents, PortOptions, lpc};

const WINDOWS: [Window; 2] =
    [Window { base: 0xc000_0000, size: 0x3000_0000 }, Window { base: 4 << 30, size: 1 << 30 }];

/// Reads as its own number.
struct Region(u8);
impl BusDevice for Region {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn write(&self, _: u64, _: &[u8]) {}
}

/// One 64-bit and one 32-bit BAR.
struct Card {
    config: Mutex<ConfigSpace>,
    mark: u8,
    at: Mutex<[Option<u64>; 6]>,
}

impl Card {
    fn new(mark: u8) -> Arc<Self> {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_00_00,
            subsystem: (0, 0),
            multifunction: false,
        };
        let config = ConfigSpace::endpoint(&identity).with_bar(0, 0x4000, BarKind::Memory64).with_bar(
            2,
            0x1000,
            BarKind::Memory32,
        );
        Arc::new(Self { config: Mutex::new(config), mark, at: Mutex::default() })
    }
}

impl Function for Card {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        self.config.lock().unwrap().write(offset, data);
        true
    }
    fn mappings(&self) -> Vec<Mapping> {
        let config = self.config.lock().unwrap();
        let device = |bar| Arc::new(Region(self.mark + bar)) as _;
        config.bars().map(|(bar, base, size)| Mapping { bar, base, size, device: device(bar) }).collect()
    }
    fn mapped(&self, bar: u8, base: Option<u64>) {
        self.at.lock().unwrap()[usize::from(bar)] = base;
    }
    fn reset(&self) {
        self.config.lock().unwrap().reset();
    }
}

#[derive(Default)]
struct Left(AtomicUsize);
impl PortEvents for Left {
    fn left(&self, _: Arc<dyn Function>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Rig {
    root: Arc<Root>,
    mmio: Arc<Bus>,
    ecam: Arc<dyn BusDevice>,
    cards: [Arc<Card>; 3],
    port: Arc<RootPort>,
    left: Arc<Left>,
    sent: Arc<Sent>,
    wire: Arc<Wire>,
}

fn at(device: u8) -> Address {
    Address { device, function: 0 }
}

/// Two cards on the root bus at 2 and 3, a port at 5, and a third card for it.
fn rig() -> Rig {
    let mmio = Arc::new(Bus::new());
    // What must never be covered.
    mmio.insert(0xb000_0000, 0x1000_0000, Arc::new(Region(0xec))).unwrap();
    mmio.insert(0xf010_0000, 0x1000, Arc::new(Region(0xed))).unwrap();
    let root = Root::new(Arc::clone(&mmio), WINDOWS.to_vec());
    let cards = [10, 20, 30].map(Card::new);
    root.add(at(0), HostBridge::new(0xb000_0000, root.ecam())).unwrap();
    root.add(at(31), lpc(0x600)).unwrap();
    root.add(at(2), Arc::clone(&cards[0]) as _).unwrap();
    root.add(at(3), Arc::clone(&cards[1]) as _).unwrap();
    let (left, sent, wire) =
        (Arc::new(Left::default()), Arc::new(Sent::default()), Arc::new(Wire::default()));
    let options = PortOptions { number: 5, ..PortOptions::default() };
    let port = RootPort::new(options, Arc::clone(&sent) as _, Arc::clone(&wire) as _, Arc::clone(&left) as _);
    root.add_port(at(5), &port).unwrap();
    assert_eq!(root.add(at(5), Card::new(0)), Err(RootError(at(5))));
    let ecam = root.ecam();
    Rig { root, mmio, ecam, cards, port, left, sent, wire }
}

impl Rig {
    fn get(&self, bus: u64, device: u64, register: u64) -> u32 {
        let mut word = [0; 4];
        self.ecam.read(bus << 20 | device << 15 | register, &mut word);
        u32::from_le_bytes(word)
    }
    fn put(&self, bus: u64, device: u64, register: u64, value: u32) {
        self.ecam.write(bus << 20 | device << 15 | register, &value.to_le_bytes());
    }
    fn put16(&self, bus: u64, device: u64, register: u64, value: u16) {
        self.ecam.write(bus << 20 | device << 15 | register, &value.to_le_bytes());
    }
    fn byte(&self, address: u64) -> u8 {
        let mut byte = [0];
        self.mmio.read(address, &mut byte);
        byte[0]
    }
    /// Opens the port: bus 1 behind it, 2 MiB of memory.
    fn open_port(&self) {
        self.put(0, 5, 0x18, 0x00_01_01_00);
        self.put(0, 5, 0x20, 0xd010_d000);
        self.put(0, 5, 0x04, 6);
    }
}

#[test]
fn functions_are_found_by_both_ways() {
    let rig = rig();
    assert_eq!((rig.get(0, 0, 0), rig.get(0, 31, 0)), (0x29c0_8086, 0x2918_8086));
    assert_eq!((rig.get(0, 2, 0), rig.get(0, 4, 0), rig.get(1, 0, 0)), (0x1042_1af4, u32::MAX, u32::MAX));
    let resets = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&resets);
    let ports = rig.root.ports(Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    }));
    let read = |offset, len: usize| {
        let mut data = [0; 8];
        ports.read(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    };
    assert_eq!(read(4, 4), 0xffff_ffff, "nothing selected");
    ports.write(0, &0x8000_f800u32.to_le_bytes());
    assert_eq!((read(0, 4), read(4, 4), read(6, 2), read(7, 1)), (0x8000_f800, 0x2918_8086, 0x2918, 0x29));
    assert_eq!((read(6, 4), read(4, 8)), (0xffff_ffff, u64::MAX), "over the end");
    for (value, expected) in [(0, 0), (2, 0), (4, 0), (6, 1), (0xe, 2)] {
        ports.write(1, &[value]);
        assert_eq!(resets.load(Ordering::Relaxed), expected);
    }
    assert_eq!((read(1, 1), read(0, 4)), (0, 0x8000_f800), "the address is not the reset register");
}

#[test]
fn bars_follow_the_registers() {
    let rig = rig();
    rig.put(0, 2, 0x10, 0xc000_0000);
    rig.put(0, 2, 0x18, 0xc000_4000);
    assert_eq!(rig.byte(0xc000_0000), 0xff, "decoding is off");
    rig.put(0, 2, 4, 2);
    assert_eq!((rig.byte(0xc000_3fff), rig.byte(0xc000_4000)), (10, 12));
    // Another card over the first: not mapped while it overlaps, and then it is.
    rig.put(0, 3, 0x10, 0xc000_0000);
    rig.put(0, 3, 4, 2);
    assert_eq!(rig.byte(0xc000_0000), 10);
    rig.put(0, 2, 0x14, 1);
    assert_eq!((rig.byte(0xc000_0000), rig.byte(0x1_c000_0000)), (20, 0xff), "outside the windows");
    rig.put(0, 2, 0x10, 0);
    assert_eq!((rig.byte(4 << 30), rig.cards[0].at.lock().unwrap()[0]), (10, Some(4 << 30)));
    // RAM, ECAM, what lies above the window.
    for base in [0x1000, 0x8000_0000, 0xb000_0000, 0xefff_e000, 0xf010_0000, 0xfee0_0000] {
        rig.put(0, 2, 0x14, 0);
        rig.put(0, 2, 0x10, base);
        rig.put(0, 2, 0x18, base);
        let covered = [10, 12].contains(&rig.byte(base.into()));
        assert_eq!(covered, base == 0xefff_e000, "{base:#x}");
    }
    rig.root.reset();
    assert_eq!((rig.byte(0xefff_e000), rig.byte(0xc000_0000), rig.get(0, 3, 0x10)), (0xff, 0xff, 0xc));
}

#[test]
fn a_device_in_a_slot_comes_goes_and_is_reached_through_the_bridge_only() {
    let rig = rig();
    let express = 0x40;
    assert_eq!(rig.get(0, 5, 0), 0x000c_1b36);
    assert_eq!((rig.get(0, 5, 0x34) & 0xff, rig.get(0, 5, express) & 0xff), (0x40, 0x10));
    rig.open_port();
    assert_eq!(rig.get(1, 0, 0), u32::MAX);
    // Linux's enables, and messages on.
    rig.put(0, 5, 0x10, 0xd800_0000);
    let msix = u64::from(rig.get(0, 5, express) >> 8 & 0xff);
    rig.put16(0, 5, msix + 2, 0x8000);
    for (word, value) in [0xfee0_1000, 0, 0x31, 0u32].into_iter().enumerate() {
        rig.mmio.write(0xd800_0000 + 4 * word as u64, &value.to_le_bytes());
    }
    rig.put16(0, 5, express + 0x18, 0x07f9);
    rig.put16(0, 5, express + 0x1a, 0x1f);
    rig.sent.0.lock().unwrap().clear();

    assert!(rig.port.plug(Arc::clone(&rig.cards[2]) as _).is_ok());
    assert!(rig.port.plug(Card::new(0)).is_err(), "occupied");
    assert_eq!(*rig.sent.0.lock().unwrap(), [(0xfee0_1000, 0x31)]);
    assert_eq!(rig.get(0, 5, express + 0x18) >> 16, 0x49);
    assert_eq!(rig.get(0, 5, express + 0x10) >> 16, 0x2011, "link active");
    rig.put16(0, 5, express + 0x1a, 0x1f);
    assert_eq!(rig.get(1, 0, 0), u32::MAX, "there is no power");
    rig.put16(0, 5, express + 0x18, 0x01f9);
    assert_eq!(rig.get(1, 0, 0), 0x1042_1af4);
    assert_eq!(rig.get(1, 1, 0), u32::MAX, "one device");
    rig.put(1, 0, 0x10, 0xd000_0000);
    rig.put(1, 0, 0x18, 0xc000_0000);
    rig.put(1, 0, 4, 2);
    assert_eq!((rig.byte(0xd000_0000), rig.byte(0xc000_0000)), (30, 0xff), "the bridge lets one through");
    rig.put(0, 5, 4, 0);
    assert_eq!(rig.byte(0xd000_0000), 0xff, "closed");
    rig.put(0, 5, 4, 6);
    assert_eq!(rig.byte(0xd000_0000), 30);

    rig.put16(0, 5, express + 0x1a, 0x1f);
    rig.port.ask_removal().unwrap();
    rig.port.ask_removal().unwrap_err();
    rig.put16(0, 5, express + 0x1a, 1);
    rig.put16(0, 5, express + 0x18, 0x06f9);
    rig.port.ask_removal().unwrap_err();
    assert_eq!(rig.left.0.load(Ordering::Relaxed), 0);
    assert_eq!((rig.get(1, 0, 0), rig.byte(0xd000_0000)), (u32::MAX, 0xff), "the power has gone");
    rig.put16(0, 5, express + 0x18, 0x01f9);
    assert_eq!((rig.get(1, 0, 0x10), rig.get(1, 0, 4) & 7), (0xc, 0), "and comes back as after a reset");
    rig.put16(0, 5, express + 0x18, 0x07f9);
    assert_eq!((rig.left.0.load(Ordering::Relaxed), rig.byte(0xd000_0000)), (1, 0xff));
    assert_eq!((rig.get(1, 0, 0), rig.cards[2].at.lock().unwrap()[0]), (u32::MAX, None));
    assert!(rig.port.device().is_none());
    // What nobody has taken goes at once, unseen.
    assert!(rig.port.plug(Arc::clone(&rig.cards[2]) as _).is_ok());
    rig.port.ask_removal().unwrap();
    assert_eq!(rig.left.0.load(Ordering::Relaxed), 2);
    assert!(rig.port.device().is_none() && rig.port.plug(Card::new(0)).is_ok());
}

#[test]
fn without_messages_the_pin_is_held_until_the_driver_has_read() {
    let rig = rig();
    let up = || rig.wire.0.load(Ordering::Relaxed);
    rig.put16(0, 5, 0x58, 0x07f9);
    rig.put16(0, 5, 0x5a, 0x1f);
    assert!(!up());
    assert!(rig.port.plug(Arc::clone(&rig.cards[2]) as _).is_ok());
    assert!(up());
    assert_eq!(rig.get(0, 5, 4) >> 16 & 8, 8);
    rig.put16(0, 5, 4, 1 << 10);
    assert!(!up());
    rig.put16(0, 5, 4, 0);
    assert!(up());
    rig.put16(0, 5, 0x5a, 0x1f);
    assert!(!up());
    // A device asked to leave does so with a reset.
    rig.put16(0, 5, 0x58, 0x01f9);
    rig.put16(0, 5, 0x5a, 0x1f);
    rig.port.ask_removal().unwrap();
    rig.root.reset();
    assert_eq!(rig.left.0.load(Ordering::Relaxed), 1);
    assert!(!up());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any writes to any function's registers: what must not be covered is not, and the bus agrees with what functions were told.
    #[test]
    fn nothing_that_a_guest_writes_covers_anything(
        writes in prop::collection::vec(
            (0u64..3, prop::sample::select(vec![0u64, 2, 3, 5, 31]), 0u64..0x104,
             prop_oneof![any::<u32>(), Just(2), Just(7), 0xb000_0000u32..0xf100_0000, Just(0x0001_0100), Just(4)], 1usize..9),
            0..60)
    ) {
        let rig = rig();
        prop_assert!(rig.port.insert_cold(Arc::clone(&rig.cards[2]) as _).is_ok());
        for (bus, device, register, value, width) in writes {
            let bytes = u64::from(value).to_le_bytes();
            rig.ecam.write(bus << 20 | device << 15 | register, &bytes[..width]);
            prop_assert_eq!((rig.byte(0xb000_0000), rig.byte(0xf010_0000)), (0xec, 0xed));
            for card in &rig.cards {
                for (bar, base) in card.at.lock().unwrap().iter().enumerate() {
                    if let Some(base) = base {
                        prop_assert_eq!(rig.byte(*base), card.mark + bar as u8);
                        prop_assert!(WINDOWS.iter().any(|w| *base >= w.base && *base < w.base + w.size));
                    }
                }
            }
        }
        // Decoding is a bit like any other: with a clean slate everything works.
        rig.root.reset();
        prop_assert!(rig.cards.iter().all(|c| c.at.lock().unwrap().iter().all(Option::is_none)));
        prop_assert_eq!(rig.get(0, 2, u64::from(COMMAND)) & 0xffff, 0);
    }
}
