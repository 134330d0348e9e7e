//! Real links, each test in a network namespace of its own that is gone with the test.
//!
//! `unshare` and rtnetlink sockets go by thread, so each test has a thread, and a runtime that never leaves it.
//! Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN) and `/dev/net/tun`: without them every test here **fails and says so**.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test's way to fail")]

mod serving;
mod space;

use std::os::fd::AsRawFd;
use std::process::Command;

use netsetup::{BRIDGE_TAG, BridgeSpec, Link, LinkKind, Net, NetError, Outcome, TapSpec};
use space::{in_namespace, ip};

const TAG: &str = "flotilla:2f1c7f3e-0000-4000-8000-000000000001";
const OTHER_TAG: &str = "flotilla:2f1c7f3e-0000-4000-8000-000000000002";

fn gone(name: &str) -> bool {
    !Command::new("ip").args(["link", "show", name]).output().unwrap().status.success()
}

fn bridge(name: &str, addresses: &[&str]) -> BridgeSpec {
    BridgeSpec {
        name: name.to_owned(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        mtu: None,
    }
}

fn tap(name: &str, bridge: Option<&str>) -> TapSpec {
    TapSpec {
        name: name.to_owned(),
        bridge: bridge.map(str::to_owned),
        owner: None,
        tag: TAG.to_owned(),
        mtu: None,
        isolated: false,
    }
}

fn with(link: &Link, outcome: Outcome) -> Link {
    let mut link = link.clone();
    link.outcome = outcome;
    link
}

fn names(links: &[Link]) -> Vec<&str> {
    let mut names: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
    names.sort_unstable();
    names
}

#[test]
fn bridge_and_tap_are_made_once() {
    in_namespace(|net| async move {
        let spec = bridge("flbr0", &["10.77.0.1/24", "fd77::1/64"]);
        let made = net.ensure_bridge(&spec).await.unwrap();
        assert_eq!((made.outcome, made.kind.clone(), made.up), (Outcome::Created, LinkKind::Bridge, true));
        assert_eq!(made.tag.as_deref(), Some(BRIDGE_TAG));
        let again = net.ensure_bridge(&spec).await.unwrap();
        assert_eq!(again, with(&made, Outcome::Unchanged));

        let spec = TapSpec { owner: Some(4321), ..tap("fl-web-0", Some("flbr0")) };
        let port = net.ensure_tap(&spec).await.unwrap();
        assert_eq!(port.outcome, Outcome::Created);
        assert_eq!(port.kind, LinkKind::Tap { owner: Some(4321), multi_queue: false });
        assert_eq!((port.controller, port.up, port.tag.as_deref()), (Some(made.index), true, Some(TAG)));
        let again = net.ensure_tap(&spec).await.unwrap();
        assert_eq!(again, with(&port, Outcome::Unchanged));

        let shown = ip("-d link show fl-web-0");
        for part in [
            "type tap",
            "persist on",
            "user 4321",
            "master flbr0",
            "addrgenmode none",
            &format!("alias {TAG}"),
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        let shown = ip("address show flbr0");
        assert!(shown.contains("inet 10.77.0.1/24") && shown.contains("inet6 fd77::1/64"), "{shown}");

        let tagged = net.tagged().await.unwrap();
        assert_eq!(names(&tagged), ["fl-web-0", "flbr0"]);
        net.remove("fl-web-0", TAG).await.unwrap();
        net.remove("fl-web-0", TAG).await.unwrap();
        net.remove("flbr0", BRIDGE_TAG).await.unwrap();
        assert!(net.tagged().await.unwrap().is_empty());
        assert!(gone("fl-web-0") && gone("flbr0"));
    });
}

#[test]
fn ports_are_isolated_and_addresses_go() {
    in_namespace(|net| async move {
        net.ensure_bridge(&bridge("flbr0", &["10.77.0.1/24", "10.78.0.1/24", "fd77::1/64"])).await.unwrap();
        let spec = TapSpec { isolated: true, ..tap("fl-web-0", Some("flbr0")) };
        let made = net.ensure_tap(&spec).await.unwrap();
        assert!(made.isolated && ip("-d link show fl-web-0").contains("isolated on"));
        assert_eq!(net.ensure_tap(&spec).await.unwrap(), with(&made, Outcome::Unchanged));
        // On another bridge it is isolated as well, and no more when nobody asks.
        net.ensure_bridge(&bridge("flbr1", &[])).await.unwrap();
        let moved =
            net.ensure_tap(&TapSpec { bridge: Some("flbr1".to_owned()), ..spec.clone() }).await.unwrap();
        assert!(moved.isolated && moved.outcome == Outcome::Updated);
        let open = net.ensure_tap(&tap("fl-web-0", Some("flbr1"))).await.unwrap();
        assert!(!open.isolated && ip("-d link show fl-web-0").contains("isolated off"));

        let drop = ["10.78.0.1/24", "fd77::1/64", "10.79.0.1/24"].map(|address| address.parse().unwrap());
        net.drop_addresses("flbr0", &drop).await.unwrap();
        let shown = ip("address show flbr0");
        assert!(
            shown.contains("10.77.0.1/24") && !shown.contains("10.78") && !shown.contains("fd77"),
            "{shown}"
        );
        // Of a bridge that is not ours nothing is taken.
        ip("link add br7 type bridge");
        ip("address add 10.78.0.1/24 dev br7");
        net.drop_addresses("br7", &drop).await.unwrap();
        net.drop_addresses("nobody", &drop).await.unwrap();
        assert!(ip("address show br7").contains("10.78.0.1/24"));
    });
}

#[test]
fn bridge_keeps_its_address_as_ports_come() {
    in_namespace(|net| async move {
        let before = net.ensure_bridge(&bridge("flbr0", &[])).await.unwrap();
        for n in 0..8 {
            net.ensure_tap(&tap(&format!("fl-a-{n}"), Some("flbr0"))).await.unwrap();
        }
        let after = net.ensure_bridge(&bridge("flbr0", &[])).await.unwrap();
        assert_eq!(before.index, after.index);
        assert_eq!(after.outcome, Outcome::Unchanged);
        assert_eq!(before, with(&after, Outcome::Created));
    });
}

#[test]
fn drift_is_mended_and_reported() {
    in_namespace(|net| async move {
        let spec = BridgeSpec { mtu: Some(1400), ..bridge("flbr0", &["10.77.0.1/24"]) };
        net.ensure_bridge(&spec).await.unwrap();
        let port = TapSpec { mtu: Some(1400), owner: Some(7), ..tap("fl-web-0", Some("flbr0")) };
        net.ensure_tap(&port).await.unwrap();
        ip("link add other type bridge");
        for (command, of_bridge) in [
            ("link set flbr0 down", true),
            ("link set flbr0 mtu 1300", true),
            ("address del 10.77.0.1/24 dev flbr0", true),
            ("link set fl-web-0 down", false),
            ("link set fl-web-0 nomaster", false),
            ("link set fl-web-0 master other", false),
            ("link set fl-web-0 mtu 1300", false),
            ("link set fl-web-0 addrgenmode eui64", false),
        ] {
            ip(command);
            let (on_bridge, on_tap) =
                (net.ensure_bridge(&spec).await.unwrap(), net.ensure_tap(&port).await.unwrap());
            let expected = if of_bridge {
                (Outcome::Updated, Outcome::Unchanged)
            } else {
                (Outcome::Unchanged, Outcome::Updated)
            };
            assert_eq!((on_bridge.outcome, on_tap.outcome), expected, "{command}");
            assert_eq!(
                (on_bridge.mtu, on_tap.mtu, on_tap.controller),
                (1400, 1400, Some(on_bridge.index)),
                "{command}"
            );
        }
        let given = net.ensure_tap(&TapSpec { owner: Some(8), ..port }).await.unwrap();
        assert_eq!(
            (given.outcome, given.kind),
            (Outcome::Updated, LinkKind::Tap { owner: Some(8), multi_queue: false })
        );
    });
}

#[test]
fn a_bridge_of_the_administrator_is_used_and_never_changed() {
    in_namespace(|net| async move {
        ip("link add br0 type bridge");
        ip("address add 10.1.0.1/24 dev br0");
        ip("link set br0 mtu 9000");
        let before = ip("-d link show br0");
        let adopted = net.ensure_bridge(&bridge("br0", &["10.1.0.1/24"])).await.unwrap();
        assert_eq!((adopted.outcome, adopted.tag, adopted.up), (Outcome::Unchanged, None, false));
        let error = net.ensure_bridge(&bridge("br0", &["10.1.0.1/24", "10.2.0.1/24"])).await.unwrap_err();
        assert!(error.to_string().contains("ip address add 10.2.0.1/24 dev br0"), "{error}");
        let error =
            net.ensure_bridge(&BridgeSpec { mtu: Some(1400), ..bridge("br0", &[]) }).await.unwrap_err();
        assert!(matches!(error, NetError::ForeignBridge { .. }), "{error}");
        let error = net.remove("br0", BRIDGE_TAG).await.unwrap_err();
        assert!(matches!(error, NetError::Foreign { .. }), "{error}");
        assert_eq!(ip("-d link show br0"), before);
        // An alias of the administrator's own is no tag.
        ip("link set br0 alias uplink:bridge");
        assert!(net.tagged().await.unwrap().is_empty());
        net.ensure_bridge(&bridge("br0", &[])).await.unwrap();
        assert!(matches!(net.remove("br0", BRIDGE_TAG).await, Err(NetError::Foreign { .. })));
    });
}

#[test]
fn a_tap_does_not_shrink_a_jumbo_bridge() {
    in_namespace(|net| async move {
        ip("tuntap add dev port0 mode tap");
        ip("link set port0 mtu 9000");
        ip("link add br0 type bridge");
        ip("link set port0 master br0");
        let before = net.ensure_bridge(&bridge("br0", &[])).await.unwrap().mtu;
        let port = net.ensure_tap(&tap("fl-web-0", Some("br0"))).await.unwrap();
        assert_eq!((before, port.mtu), (9000, 9000));
        assert_eq!(net.ensure_bridge(&bridge("br0", &[])).await.unwrap().mtu, before);
    });
}

#[test]
fn names_that_are_taken() {
    in_namespace(|net| async move {
        ip("link property add dev lo altname nick");
        ip("tuntap add dev tun0 mode tun");
        ip("tuntap add dev tap0 mode tap");
        ip("tuntap add dev tapmq mode tap multi_queue");
        ip("link add br0 type bridge");

        for name in ["lo", "tun0", "tap0"] {
            let error = net.ensure_bridge(&bridge(name, &[])).await.unwrap_err();
            assert!(matches!(error, NetError::WrongKind { .. }), "{name}: {error}");
        }
        for name in ["lo", "tun0", "br0"] {
            let error = net.ensure_tap(&tap(name, None)).await.unwrap_err();
            assert!(matches!(error, NetError::WrongKind { .. }), "{name}: {error}");
            let error = net.open_tap(name).await.unwrap_err();
            assert!(matches!(error, NetError::WrongKind { .. }), "{name}: {error}");
        }
        let error = net.ensure_tap(&tap("tap0", None)).await.unwrap_err();
        assert!(matches!(error, NetError::Foreign { .. }), "{error}");
        for error in [
            net.ensure_tap(&tap("nick", None)).await.unwrap_err(),
            net.ensure_bridge(&bridge("nick", &[])).await.unwrap_err(),
            net.remove("nick", TAG).await.unwrap_err(),
        ] {
            assert!(matches!(&error, NetError::AlternativeName { real, .. } if real == "lo"), "{error}");
        }
        assert!(matches!(net.open_tap("tapmq").await, Err(NetError::TapMode { .. })));
        assert!(matches!(net.open_tap("nothing").await, Err(NetError::Missing { .. })));
        assert!(gone("nothing"));
        for port in [tap("fl-a-0", Some("nothing")), tap("fl-a-0", Some("lo"))] {
            net.ensure_tap(&port).await.unwrap_err();
            assert!(gone("fl-a-0"));
        }

        net.ensure_tap(&tap("fl-web-0", None)).await.unwrap();
        let other = TapSpec { tag: OTHER_TAG.to_owned(), ..tap("fl-web-0", None) };
        let error = net.ensure_tap(&other).await.unwrap_err().to_string();
        assert!(error.contains(TAG) && error.contains(OTHER_TAG), "{error}");
        assert!(matches!(net.remove("fl-web-0", OTHER_TAG).await, Err(NetError::Foreign { .. })));
        assert!(matches!(net.remove("fl-web-0", "fl-web-0").await, Err(NetError::Tag { .. })));
        assert!(!gone("fl-web-0"));
    });
}

#[test]
fn a_tap_that_cannot_be_set_up_leaves_nothing() {
    in_namespace(|net| async move {
        ip("link add br0 type bridge");
        // A bridge takes 1023 ports (BR_MAX_PORTS); the next one is refused after the tap was made.
        let ports: String =
            (0..1023).map(|n| format!("tuntap add dev p{n} mode tap\nlink set p{n} master br0\n")).collect();
        let batch = std::env::temp_dir().join(format!("netsetup-ports-{}", std::process::id()));
        std::fs::write(&batch, ports).unwrap();
        ip(&format!("-batch {}", batch.display()));
        std::fs::remove_file(&batch).unwrap();
        let error = net.ensure_tap(&tap("fl-web-0", Some("br0"))).await.unwrap_err();
        assert!(matches!(error, NetError::Refused { .. }), "{error}");
        assert!(gone("fl-web-0"));
        assert!(net.tagged().await.unwrap().is_empty());
    });
}

#[test]
fn an_mtu_no_tap_can_have() {
    in_namespace(|net| async move {
        let error = net.ensure_tap(&TapSpec { mtu: Some(65522), ..tap("fl-b-0", None) }).await.unwrap_err();
        assert!(matches!(error, NetError::Mtu { .. }), "{error}");
        assert!(gone("fl-b-0"));
        // A bridge may have a larger one: its ports take what they can.
        ip("link add br0 mtu 65535 type bridge");
        assert_eq!(net.ensure_tap(&tap("fl-a-0", Some("br0"))).await.unwrap().mtu, 65521);
    });
}

#[test]
fn a_tap_is_handed_over_and_one_process_has_it() {
    in_namespace(|net| async move {
        net.ensure_bridge(&bridge("flbr0", &[])).await.unwrap();
        net.ensure_tap(&tap("fl-web-0", Some("flbr0"))).await.unwrap();
        let fd = net.open_tap("fl-web-0").await.unwrap();
        let shown = ip("-d link show fl-web-0");
        assert!(shown.contains("vnet_hdr on") && shown.contains("LOWER_UP"), "{shown}");
        // Non-blocking: a read with nothing there says so instead of waiting.
        let mut frame = [0u8; 2048];
        while nix::unistd::read(&fd, &mut frame).is_ok() {}
        assert!(matches!(net.open_tap("fl-web-0").await, Err(NetError::Busy { .. })));
        // Ensuring a tap that a VM has is fine as long as nothing must change that needs the tap itself.
        assert_eq!(
            net.ensure_tap(&tap("fl-web-0", Some("flbr0"))).await.unwrap().outcome,
            Outcome::Unchanged
        );
        let given = TapSpec { owner: Some(1), ..tap("fl-web-0", Some("flbr0")) };
        assert!(matches!(net.ensure_tap(&given).await, Err(NetError::Busy { .. })));
        assert!(fd.as_raw_fd() > 2);
        drop(fd);
        assert!(!gone("fl-web-0"), "a persistent tap outlives its descriptor");
        drop(net.open_tap("fl-web-0").await.unwrap());
    });
}

#[test]
fn removal_by_tag_takes_all_and_only_those() {
    in_namespace(|net| async move {
        net.ensure_bridge(&bridge("flbr0", &[])).await.unwrap();
        for n in 0..3 {
            net.ensure_tap(&tap(&format!("fl-a-{n}"), Some("flbr0"))).await.unwrap();
        }
        net.ensure_tap(&TapSpec { tag: OTHER_TAG.to_owned(), ..tap("fl-b-0", Some("flbr0")) }).await.unwrap();
        ip("tuntap add dev tap0 mode tap");
        // In use: removed all the same, its holder gets EBADFD.
        let _held = net.open_tap("fl-a-1").await.unwrap();
        let mut removed = net.remove_tagged(TAG).await.unwrap();
        removed.sort_unstable();
        assert_eq!(removed, ["fl-a-0", "fl-a-1", "fl-a-2"]);
        assert_eq!(names(&net.tagged().await.unwrap()), ["fl-b-0", "flbr0"]);
        assert!(!gone("tap0"));
        assert!(net.remove_tagged(TAG).await.unwrap().is_empty());
    });
}

#[test]
fn two_at_once_share_one_bridge() {
    in_namespace(|net| async move {
        let spec = bridge("flbr0", &["10.77.0.1/24"]);
        let made = futures_util::future::join_all((0..8).map(|_| net.ensure_bridge(&spec))).await;
        let made: Vec<Link> = made.into_iter().map(Result::unwrap).collect();
        assert_eq!(made.iter().filter(|link| link.outcome == Outcome::Created).count(), 1);
        assert!(made.iter().all(|link| link.index == made[0].index));
        let specs: Vec<TapSpec> = (0..32).map(|n| tap(&format!("fl-v{n}-0"), Some("flbr0"))).collect();
        for port in futures_util::future::join_all(specs.iter().map(|spec| net.ensure_tap(spec))).await {
            assert_eq!(port.unwrap().controller, Some(made[0].index));
        }
        assert_eq!(net.tagged().await.unwrap().len(), 33);
    });
}

#[test]
fn outside_a_runtime_is_an_error() {
    assert!(matches!(Net::connect(), Err(NetError::NoRuntime)));
}

/// Reads what comes in at a tap until a frame with this word in it, or nothing more is there.
fn hears(tap: &std::os::fd::OwnedFd, word: &[u8]) -> bool {
    let mut frame = [0u8; 2048];
    while let Ok(length) = nix::unistd::read(tap, &mut frame) {
        if frame[..length].windows(word.len()).any(|window| window == word) {
            return true;
        }
    }
    false
}

#[test]
fn isolated_taps_hear_everybody_but_each_other() {
    in_namespace(|net| async move {
        net.ensure_bridge(&bridge("flbr0", &[])).await.unwrap();
        let mut taps = Vec::new();
        for (name, isolated) in [("fl-a-0", true), ("fl-b-0", true), ("fl-c-0", false)] {
            net.ensure_tap(&TapSpec { isolated, ..tap(name, Some("flbr0")) }).await.unwrap();
            taps.push(net.open_tap(name).await.unwrap());
        }
        // To all, from an address of its own, of a type for experiments; before it, ten bytes of the virtio-net header.
        let say = |from: usize, word: &[u8; 4]| {
            let mut frame = [0u8; 10 + 60];
            frame[10..16].fill(0xff);
            frame[16..22].copy_from_slice(&[2, 0, 0, 0, 0, from as u8]);
            frame[22..24].copy_from_slice(&[0x88, 0xb5]);
            frame[24..28].copy_from_slice(word);
            // A port that is not up yet takes nothing.
            let _ = nix::unistd::write(&taps[from], &frame);
        };
        // The bridge gives a frame to all its ports at once: when one has it the others have what they will ever have.
        let heard = async |from: usize, word: &[u8; 4], by: usize| {
            loop {
                say(from, word);
                if hears(&taps[by], word) {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        heard(2, b"up-a", 0).await;
        heard(2, b"up-b", 1).await;
        heard(0, b"from", 2).await;
        assert!(!hears(&taps[1], b"from"));
        // Not isolated any more, it is heard: so it was that which kept it.
        net.ensure_tap(&tap("fl-a-0", Some("flbr0"))).await.unwrap();
        heard(0, b"open", 1).await;
    });
}
