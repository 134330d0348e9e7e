//! Disks, NICs and their back ends that come and go, and the descriptors that they are made of, over a real socket.

use super::*;

/// The seed's own lines, as they stand there.
#[test]
fn the_hot_plug_conversations_of_the_manual() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    for line in [
        r#"{"execute": "blockdev-add", "arguments": {"node-name": "drive-0", "file": {"driver": "file", "filename": "/path/to/block"}, "cache": {"direct": true}, "read-only": false}}"#,
        r#"{"execute": "device_add", "arguments": {"id": "drive-0", "driver": "virtio-blk-mmio", "addr": "0x1"}}"#,
        r#"{"execute":"netdev_add", "arguments":{"id":"net-0", "ifname":"tap0"}}"#,
        r#"{"execute":"device_add", "arguments":{"id":"net-0", "driver":"virtio-net-mmio", "addr":"0x0"}} "#,
    ] {
        assert_eq!(world.ask(&mut client, line), EMPTY, "{line}");
    }
    let deleted = world.ask(&mut client, r#"{"execute": "device_del", "arguments": {"id": "drive-0"}}"#);
    assert!(
        deleted.starts_with(
            r#"{"event":"DEVICE_DELETED","data":{"device":"drive-0","path":"drive-0"},"timestamp":{"#
        ),
        "{deleted}"
    );
    assert_eq!(world.line(&mut client), EMPTY);
    let asked = world.asked.lock().unwrap().clone();
    let drive = Drive { direct: true, ..Drive::new("drive-0", "/path/to/block") };
    assert_eq!(asked[0], format!("{drive:?}"));
    assert!(asked[1].contains(r#"addr: Some("0x1")"#), "{}", asked[1]);
    assert_eq!(asked[2], "net-0 tap0 1 false");
    assert_eq!(
        world.ask(&mut client, r#"{"execute":"device_del","arguments":{"id":"none"},"id":1}"#),
        r#"{"error":{"class":"DeviceNotFound","desc":"Device none not found"},"id":1}"#
    );
}

#[test]
fn what_lies_under_an_image_is_a_node_or_is_described() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    let add = |driver: &str, backing: &str| {
        format!(
            r#"{{"execute":"blockdev-add","arguments":{{"node-name":"n","driver":"{driver}","file":{{"driver":"file","filename":"/top"}},"backing":{backing}}}}}"#
        )
    };
    let file = |path: &str| format!(r#""file":{{"driver":"file","filename":"{path}"}}"#);
    let nested = format!(r#"{{"driver":"qcow2",{},"backing":{{{}}}}}"#, file("/mid"), file("/base"));
    let on_node = format!(r#"{{"driver":"qcow2",{},"backing":"base"}}"#, file("/mid"));
    for backing in ["\"base\"", nested.as_str(), on_node.as_str()] {
        assert_eq!(world.ask(&mut client, &add("qcow2", backing)), EMPTY, "{backing}");
    }
    let asked = world.asked.lock().unwrap().clone();
    assert_eq!(asked[0], r#"n [] Some("base")"#);
    let image = |path: &str, format: &str| format!(r#"BackingImage {{ file: "{path}", format: {format} }}"#);
    assert!(
        asked[1].contains(&format!("[{}, {}]", image("/mid", "Qcow2"), image("/base", "Raw"))),
        "{}",
        asked[1]
    );
    assert_eq!(asked[2], format!(r#"n [{}] Some("base")"#, image("/mid", "Qcow2")));
    let deep = (0..30).fold("null".to_owned(), |under, _| {
        format!(r#"{{"driver":"qcow2",{},"backing":{under}}}"#, file("/x"))
    });
    assert_eq!(world.ask(&mut client, &add("qcow2", &deep)), EMPTY);
    for (driver, backing, want) in [
        ("raw", "\"base\"", "a raw image has no backing file"),
        ("qcow2", "7", "argument 'backing' of command blockdev-add must be null or a string or an object"),
        ("qcow2", "{}", "argument 'backing.file' of command blockdev-add is missing"),
        (
            "qcow2",
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"/m"},"backing":{"driver":"raw"}}"#,
            "argument 'file' of command blockdev-add is missing",
        ),
        (
            "qcow2",
            r#"{"file":{"driver":"file","filename":"/m"},"backing":"x"}"#,
            "a raw image has no backing file",
        ),
    ] {
        let got = world.ask(&mut client, &add(driver, backing));
        assert!(got.contains(want), "{backing}: {got}");
    }
    let seen = r#"{"execute":"qom-list","arguments":{"path":"/machine/peripheral"}}"#;
    let got = world.ask(&mut client, seen);
    assert!(got.contains(r#"{"name":"rootfs","type":"child<virtio-blk-device>"}"#), "{got}");
}

#[test]
fn hot_plug_arguments_that_make_no_sense_are_refused_by_name() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    for (text, want) in [
        (r#"{"execute":"device_add"}"#, "argument 'id' of command device_add is missing"),
        (
            r#"{"execute":"device_add","arguments":{"id":"","driver":"x"}}"#,
            "argument 'id' must have 1 to 255 bytes",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"x","addres":"1"}}"#,
            "unknown argument 'addres'",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"x","mac":"01:00:00:00:00:00"}}"#,
            "argument 'mac'",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"virtio-blk-pci","num-queues":33}}"#,
            "argument 'num-queues' must be 1 to 32",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"virtio-net-pci","queue-size":128}}"#,
            "argument 'queue-size' must be a power of two from 256 to 4096",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"x","serial":"123456789012345678901"}}"#,
            "argument 'serial'",
        ),
        (
            r#"{"execute":"blockdev-add","arguments":{"node-name":"x","file":{"driver":"file"}}}"#,
            "argument 'file.filename' of command blockdev-add is missing",
        ),
        (
            r#"{"execute":"blockdev-add","arguments":{"node-name":"x","file":{"driver":"nbd","filename":"x"}}}"#,
            "argument 'file.driver' of command blockdev-add must be one of file, host_device",
        ),
        (
            r#"{"execute":"blockdev-add","arguments":{"node-name":"x","file":{"driver":"file","filename":"x","aio":"native"},"cache":{"direct":false}}}"#,
            "Invalid parameter 'aio'",
        ),
        (
            r#"{"execute":"blockdev-add","arguments":{"node-name":"x","file":{"driver":"file","filename":"x"},"throttling.iops-total":1000001}}"#,
            "at most 1000000",
        ),
        (r#"{"execute":"netdev_add","arguments":{"id":"x"}}"#, "Tap device is missing"),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","ifname":"0123456789abcdef"}}"#,
            "argument 'ifname' must have 1 to 15 bytes",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","ifname":"t","queues":17}}"#,
            "argument 'queues' must be 1 to 16",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","ifname":"t","path":""}}"#,
            "argument 'path' must be a path of 1 to 4095 bytes",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","chardev":"c","path":"/dev/tun2"}}"#,
            "argument 'path' is for a tap",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","fd":"t"}}"#,
            "no descriptor is called 't': send it with getfd first",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","ifname":"t","vhostfd":3}}"#,
            "no descriptor is called '3'",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","type":"vhost-user"}}"#,
            "argument 'chardev' of a vhost-user netdev is missing",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","chardev":"c","ifname":"t"}}"#,
            "argument 'ifname' is for a tap",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","chardev":"c","queues":17}}"#,
            "argument 'queues' must be 1 to 16",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"pty","data":{"addr":{"type":"unix","data":{"path":"/s"}}}}}}"#,
            "argument 'backend.type' of command chardev-add must be one of socket",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"inet","data":{"path":"/s"}}}}}}"#,
            "argument 'backend.data.addr.type' of command chardev-add must be one of unix",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/s"}},"server":true}}}}"#,
            "whose back end is the server",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":""}}}}}}"#,
            "must be a path of 1 to 107 bytes",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/s"}}}}}}"#,
            "argument 'id' must have 1 to 255 bytes",
        ),
        (r#"{"execute":"getfd","arguments":{"fdname":"x"}}"#, "Invalid SCM message"),
        (r#"{"execute":"getfd","arguments":{"fdname":"a:b"}}"#, "colon"),
    ] {
        let got = world.ask(&mut client, text);
        assert!(got.contains(r#""class":"GenericError""#) && got.contains(want), "{text}: {got}");
    }
    assert!(world.asked.lock().unwrap().is_empty());
}

#[test]
fn a_nic_gets_another_tap_and_its_link_goes_down_and_up() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    for line in [
        r#"{"execute":"netdev_replace","arguments":{"id":"net-0","ifname":"tap1"}}"#,
        r#"{"execute":"netdev_replace","arguments":{"id":"net-0","ifname":"tap1","path":"/dev/tun2","macnat":false}}"#,
        r#"{"execute":"netlink_set","arguments":{"id":"net-0","up":false}}"#,
        r#"{"execute":"netlink_set","arguments":{"id":"net-0","up":"on"}}"#,
    ] {
        assert_eq!(world.ask(&mut client, line), EMPTY, "{line}");
    }
    let asked = [
        r#"ReplaceTap { id: "net-0", ifname: "tap1", path: None }"#,
        r#"ReplaceTap { id: "net-0", ifname: "tap1", path: Some("/dev/tun2") }"#,
        r#"SetLink { id: "net-0", up: false }"#,
        r#"SetLink { id: "net-0", up: true }"#,
    ];
    assert_eq!(*world.asked.lock().unwrap(), asked);
    for (line, want) in [
        (
            r#"{"execute":"netdev_replace","arguments":{"id":"n"}}"#,
            "argument 'ifname' of command netdev_replace is missing",
        ),
        (
            r#"{"execute":"netdev_replace","arguments":{"id":"n","ifname":""}}"#,
            "argument 'ifname' must have 1 to 15 bytes",
        ),
        (
            r#"{"execute":"netlink_set","arguments":{"id":"n"}}"#,
            "argument 'up' of command netlink_set is missing",
        ),
    ] {
        let got = world.ask(&mut client, line);
        assert!(got.contains(want), "{line}: {got}");
    }
}

#[test]
fn sockets_of_processes_that_serve_devices_get_names() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    for line in [
        r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/run/c"}},"server":false}}}}"#,
        r#"{"execute":"netdev_add","arguments":{"id":"n","type":"vhost-user","chardev":"c"}}"#,
        r#"{"execute":"netdev_add","arguments":{"id":"o","chardev":"c","queues":4}}"#,
        r#"{"execute":"chardev-remove","arguments":{"id":"c"}}"#,
    ] {
        assert_eq!(world.ask(&mut client, line), EMPTY, "{line}");
    }
    let asked = world.asked.lock().unwrap();
    assert_eq!(
        *asked,
        [
            r#"AddChardev { id: "c", path: "/run/c" }"#,
            r#"n VhostUser { chardev: "c", queues: 1 }"#,
            r#"o VhostUser { chardev: "c", queues: 4 }"#,
            r#"RemoveChardev("c")"#,
        ]
    );
}

/// Sends `text` with descriptors that say these words when read.
fn send_with(client: &Client, text: &str, words: &[&str]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let fds: Vec<OwnedFd> = words
        .iter()
        .map(|word| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(word.as_bytes()).unwrap();
            ours.into()
        })
        .collect();
    let borrowed: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    let sent =
        sendmsg(&client.socket, &[std::io::IoSlice::new(text.as_bytes())], &mut control, SendFlags::empty());
    assert_eq!(sent, Ok(text.len()));
}

#[test]
fn descriptors_come_with_getfd_and_go_to_the_netdev_that_names_them() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    // Two descriptors with one message, each with a getfd of its own; then one alone.
    let two =
        r#"{"execute":"getfd","arguments":{"fdname":"7"}}{"execute":"getfd","arguments":{"fdname":"b"}}"#;
    send_with(&client, two, &["first", "second"]);
    assert_eq!(world.line(&mut client), EMPTY);
    assert_eq!(world.line(&mut client), EMPTY);
    send_with(&client, r#"{"execute":"getfd","arguments":{"fdname":"c"}}"#, &["third"]);
    assert_eq!(world.line(&mut client), EMPTY);
    assert_eq!(
        world.ask(
            &mut client,
            r#"{"execute":"netdev_add","arguments":{"id":"n","type":"tap","fds":"b:7","vhost":false}}"#
        ),
        EMPTY
    );
    assert_eq!(*world.asked.lock().unwrap(), ["n second+first 2 false"]);
    // A tap of a name is opened through another device, one that is open already through none.
    let through = r#"{"execute":"netdev_add","arguments":{"id":"p","ifname":"tap9","path":"/dev/tun2"}}"#;
    assert_eq!(world.ask(&mut client, through), EMPTY);
    assert_eq!(world.asked.lock().unwrap().last().unwrap(), "p tap9 1 false through /dev/tun2");
    send_with(&client, r#"{"execute":"getfd","arguments":{"fdname":"d"}}"#, &["fourth"]);
    assert_eq!(world.line(&mut client), EMPTY);
    let both = world
        .ask(&mut client, r#"{"execute":"netdev_add","arguments":{"id":"q","fd":"d","path":"/dev/tun2"}}"#);
    assert!(both.contains("argument 'path' is where a tap of a name is opened"), "{both}");
    // Those of a snapshot likewise.
    let pair =
        r#"{"execute":"getfd","arguments":{"fdname":"s"}}{"execute":"getfd","arguments":{"fdname":"m"}}"#;
    send_with(&client, pair, &["state", "memory"]);
    assert_eq!((world.line(&mut client).as_str(), world.line(&mut client).as_str()), (EMPTY, EMPTY));
    let migrate = r#"{"execute":"migrate","arguments":{"uri":"fd:s:m"}}"#;
    assert!(world.ask(&mut client, migrate).contains("\"STOP\""));
    assert_eq!(world.line(&mut client), EMPTY);
    assert_eq!(world.asked.lock().unwrap().last().unwrap(), "save state memory");
    assert!(world.ask(&mut client, migrate).contains("no descriptor is called 's'"));
    // A name is good once, and for the client that gave it.
    let gone = world.ask(&mut client, r#"{"execute":"netdev_add","arguments":{"id":"m","fd":7}}"#);
    assert!(gone.contains("no descriptor is called '7'"), "{gone}");
    drop(client);
    let mut client = world.connect("a");
    world.line(&mut client);
    let gone = world.ask(&mut client, r#"{"execute":"netdev_add","arguments":{"id":"m","fd":"c"}}"#);
    assert!(gone.contains("no descriptor is called 'c'"), "{gone}");
}

#[test]
fn a_descriptor_stands_for_the_file_of_a_disk() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    let two =
        r#"{"execute":"getfd","arguments":{"fdname":"top"}}{"execute":"getfd","arguments":{"fdname":"low"}}"#;
    send_with(&client, two, &["first", "second"]);
    assert_eq!((world.line(&mut client), world.line(&mut client)), (EMPTY.into(), EMPTY.into()));
    let add = r#"{"execute":"blockdev-add","arguments":{"node-name":"n","driver":"qcow2","file":{"driver":"file","filename":"/t.qcow2","fd":"top"},
        "backing":{"driver":"raw","file":{"driver":"file","filename":"/b.img","fd":"low"}}}}"#;
    assert_eq!(world.ask(&mut client, add), EMPTY);
    assert_eq!(*world.asked.lock().unwrap(), ["/t.qcow2=first /b.img=second"]);
    let gone = world.ask(&mut client, add);
    assert!(gone.contains("no descriptor is called 'top'"), "{gone}");
}
