//! The table against a model, and its texts.

use proptest::prelude::*;

use super::*;
use crate::config::{NetBackend, TapSource};

fn netdev(id: &str) -> Netdev {
    let source = TapSource::Name("tap0".into());
    Netdev {
        id: id.into(),
        backend: NetBackend::Tap { source, queues: 1, vhost: false, vhost_fds: Vec::new(), path: None },
    }
}

fn table() -> Table {
    Table::new(&VmConfig::default(), []).unwrap()
}

fn nic(id: &str, netdev: Option<&str>, addr: Option<&str>) -> NewDevice {
    NewDevice {
        id: id.into(),
        driver: "virtio-net-mmio".into(),
        netdev: netdev.map(Into::into),
        addr: addr.map(Into::into),
        ..Default::default()
    }
}

#[test]
fn slots_are_named_by_addr_by_lun_or_not_at_all() {
    let mut table = table();
    table.nets.add("n", netdev("n")).unwrap();
    let slot = |addr: Option<&str>, lun| {
        table.plan(&NewDevice { lun, ..nic("n", None, addr) }).map(|p| p.slot).map_err(|e| e.to_string())
    };
    let too_far = Err("A maximum of net 2 replaceable devices are supported.".to_owned());
    let bad = Err("Invalid addr for device n".to_owned());
    for (addr, lun, want) in [
        (None, None, Ok(0)),
        (Some("0x1"), None, Ok(1)),
        (Some("1"), Some(7), Ok(1)),
        (Some("0x1.0x0"), None, Ok(1)),
        (None, Some(0), Ok(1)),
        (None, Some(1), too_far.clone()),
        (Some("2"), None, too_far.clone()),
        (Some("0xffffffffffffffff"), None, too_far),
        (None, Some(u64::MAX), bad.clone()),
        (Some(""), None, bad.clone()),
        (Some("0x"), None, bad.clone()),
        (Some("+1"), None, bad.clone()),
        (Some("1.1"), None, bad.clone()),
        (Some("0x10000000000000000"), None, bad),
    ] {
        assert_eq!(slot(addr, lun), want, "{addr:?} {lun:?}");
    }
}

#[test]
fn says_what_does_not_fit() {
    let mut config = VmConfig::default();
    config.netdevs.push(netdev("lan"));
    let plugged = [(SlotKind::Net, 0, "eth".to_owned(), "lan".to_owned())];
    let mut table = Table::new(&config, plugged).unwrap();
    table.nets.add("n", netdev("n")).unwrap();
    let text = |device: &NewDevice| table.plan(device).unwrap_err().to_string();
    assert_eq!(text(&nic("n", None, Some("0"))), "The slot 0 is occupied already.");
    assert_eq!(text(&nic("eth", Some("n"), Some("1"))), "Device id eth already existed.");
    assert_eq!(text(&nic("x", None, Some("1"))), "Failed to find device configuration.");
    assert!(text(&nic("x", Some("lan"), Some("1"))).starts_with("lan is in use by device eth"));
    let disk = NewDevice { driver: "virtio-blk-mmio".into(), ..nic("n", None, None) };
    assert_eq!(text(&disk), "The device type is block, but the target config is not for this type.");
    let vfio = NewDevice { driver: "vfio-pci".into(), ..nic("n", None, None) };
    assert_eq!(text(&vfio), "Unsupported replaceable device type.");
    assert_eq!(table.nets.add("n", netdev("n")).unwrap_err().to_string(), "n is already registered.");
    assert_eq!(table.nets.remove("y").unwrap_err().to_string(), "Netdev y not found");
    assert_eq!(table.blocks.remove("y").unwrap_err().to_string(), "Drive y not found");
    assert_eq!(table.removal("y").unwrap_err().to_string(), "Device y not found");
    assert_eq!(table.removal("eth"), Ok(Removal::Slot(SlotKind::Net, 0)));
    assert_eq!(table.removal("n"), Ok(Removal::Backend(SlotKind::Net)));
}

#[test]
fn a_spent_back_end_can_be_added_removed_or_plugged_again() {
    let mut table = table();
    let round = |table: &mut Table| {
        table.nets.plug("n", "n", 1).unwrap();
        assert_eq!(table.removal("n"), Ok(Removal::Slot(SlotKind::Net, 1)));
        table.nets.unplug(1);
        assert_eq!(table.removal("n"), Err(Refusal::NoDevice("n".into())));
        assert_eq!(table.nets.live().count(), 0);
    };
    table.nets.add("n", netdev("n")).unwrap();
    round(&mut table);
    table.nets.add("n", netdev("n")).unwrap();
    round(&mut table);
    round(&mut table);
    table.nets.remove("n").unwrap();
    assert!(table.nets.remove("n").is_err());
    for i in 0..200 {
        let name = i.to_string();
        table.nets.add(&name, netdev(&name)).unwrap();
        table.nets.plug(&name, &name, 0).unwrap();
        table.nets.unplug(0);
    }
    assert!(table.nets.backends.len() <= SPENT_MAX);
    for i in 0..BACKENDS_MAX {
        table.nets.add(&format!("live{i}"), netdev("x")).unwrap();
    }
    assert_eq!(table.nets.add("more", netdev("x")), Err(Refusal::TooMany(SlotKind::Net)));
}

#[derive(Debug, Clone)]
enum Step {
    Add(u8),
    Remove(u8),
    Plug(u8, u8, usize),
    Unplug(u8),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4u8).prop_map(Step::Add),
        (0..4u8).prop_map(Step::Remove),
        (0..4u8, 0..4u8, 0..3usize).prop_map(|(d, b, s)| Step::Plug(d, b, s)),
        (0..4u8).prop_map(Step::Unplug),
    ]
}

proptest! {
    #[test]
    fn a_slot_holds_one_device_and_a_back_end_serves_one(steps in proptest::collection::vec(any_step(), 0..60)) {
        let mut table = table();
        let name = |prefix: &str, n: u8| format!("{prefix}{n}");
        for step in steps {
            match step {
                Step::Add(n) => {
                    let name = name("b", n);
                    let was = table.nets.find(&name).is_none_or(|b| b.state == State::Spent);
                    prop_assert_eq!(table.nets.add(&name, netdev(&name)).is_ok(), was);
                }
                Step::Remove(n) => {
                    let name = name("b", n);
                    let was = table.nets.find(&name).is_some_and(|b| b.state != State::Plugged);
                    prop_assert_eq!(table.nets.remove(&name).is_ok(), was);
                }
                Step::Plug(d, b, slot) => {
                    let (device, backend) = (name("d", d), name("b", b));
                    let request = nic(&device, Some(&backend), Some(&slot.to_string()));
                    if let Ok(plan) = table.plan(&request) {
                        prop_assert_eq!(plan.slot, slot);
                        table.nets.plug(&device, &plan.backend, plan.slot).unwrap();
                    } else {
                        let free = table.nets.slots.get(slot).is_some_and(Option::is_none);
                        let usable = table.nets.find(&backend).is_some_and(|b| b.state != State::Plugged);
                        prop_assert!(!(free && usable) || table.nets.slot_of(&device).is_some());
                    }
                }
                Step::Unplug(d) => {
                    if let Ok(Removal::Slot(SlotKind::Net, slot)) = table.removal(&name("d", d)) {
                        table.nets.unplug(slot);
                        prop_assert!(table.nets.slots[slot].is_none());
                    }
                }
            }
            let plugged: Vec<_> = table.nets.plugged().map(|(_, _, b)| b.to_owned()).collect();
            let states = table.nets.backends.iter().filter(|b| b.state == State::Plugged).count();
            prop_assert_eq!(plugged.len(), states, "each plugged back end is in one slot");
            for backend in plugged {
                prop_assert_eq!(table.nets.find(&backend).map(|b| b.state), Some(State::Plugged));
            }
        }
    }
}
