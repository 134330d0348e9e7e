//! Lines that people type, and trace points, over a real socket.

use super::*;

fn type_in(world: &mut World, client: &mut Client, line: &str) -> String {
    let request = json!({ "execute": "human-monitor-command", "arguments": { "command-line": line } });
    world.ask(client, &request.to_string())
}

#[test]
fn lines_do_what_the_commands_do() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    for (line, want) in [
        ("info status", "VM status: running\r\n"),
        ("  info   status ", "VM status: running\r\n"),
        ("info name", "web\r\n"),
        ("info cpus", "  CPU #0: thread_id=8439\r\n  CPU #1: thread_id=8439\r\n"),
        ("info iothreads", "iothread1:\r\n  thread_id=77\r\n"),
        ("info block", ""),
        ("info network", ""),
        ("info kvm", "kvm support: enabled\r\n"),
        ("info qtree", "bus: main-system-bus\r\n  dev: virtio-blk-device, id \"rootfs\"\r\n"),
        ("info migrate", "Migration status: setup\r\n"),
        ("help cont", "cont|c -- let the vCPUs run\r\n"),
        ("drive_add 0 if=none,id=d,file=/a,,b,direct=off", "OK\r\n"),
        ("drive_del d", ""),
        ("device_add virtio-blk-mmio,id=d,lun=1,share-rw", ""),
        ("netdev_add tap,id=n,ifname=tap0,vhost=on", ""),
        ("netdev_del n", ""),
        ("migrate -d file:/snap", ""),
        // The snapshot has paused it.
    ] {
        let mut got = type_in(&mut world, &mut client, line);
        if got.contains("\"event\":\"STOP\"") {
            got = world.line(&mut client);
        }
        assert_eq!(got, json!({ "return": want }).to_string(), "{line}");
    }
    assert_eq!(
        type_in(&mut world, &mut client, "stop"),
        r#"{"error":{"class":"GenericError","desc":"the VM is paused already"}}"#
    );
    assert!(type_in(&mut world, &mut client, "c").contains("RESUME"));
    assert_eq!(world.line(&mut client), r#"{"return":""}"#);
    assert!(type_in(&mut world, &mut client, "device_del d").contains("DEVICE_DELETED"));
    assert_eq!(world.line(&mut client), r#"{"return":""}"#);
    let asked = world.asked.lock().unwrap().join("\n");
    for words in [
        "file: \"/a,b\"",
        "RemoveDrive(\"d\")",
        "lun: Some(1)",
        "n tap0 1 true",
        "save /snap",
        "Unplug(\"d\")",
    ] {
        assert!(asked.contains(words), "{words}: {asked}");
    }
    // All that `info` names is there.
    let all: Value = serde_json::from_str(&type_in(&mut world, &mut client, "info")).unwrap();
    for line in all["return"].as_str().unwrap().lines() {
        let (line, _) = line.split_once(" -- ").unwrap();
        let got = type_in(&mut world, &mut client, line);
        assert_eq!(got.contains("error"), line == "info balloon", "{line}: {got}");
    }
    for (line, want) in [
        ("", "is empty: try help"),
        ("nope x", "Unsupported command: nope (try help)"),
        ("info nope", "Unsupported command: info nope (try info)"),
        ("help nope", "Unsupported command: nope"),
        ("info balloon", "DeviceNotActive"),
        ("stop now", "stop: unexpected 'now'"),
        ("balloon lots", "write a whole number of MiB"),
        ("balloon 18446744073709551615", "write a whole number of MiB"),
        ("device_del", "device_del: write one id after it"),
        ("device_add virtio-blk-mmio", "argument 'id' of command device_add is missing"),
        ("device_add x,id=1,nope=2", "unknown argument 'nope'"),
        ("drive_add 0", "write a slot"),
        ("drive_add 0 id=d,file=/a,aio=native,direct=off", "aio=native should be used with direct=on"),
        ("trace-event qmp_reply", "write a name and on or off"),
        ("a\u{7}b", "Unsupported command: a\\\\u{7}b"),
    ] {
        let got = type_in(&mut world, &mut client, line);
        assert!(got.starts_with("{\"error\"") && got.contains(want), "{line}: {got}");
    }
    let long = "x".repeat(5000);
    assert!(type_in(&mut world, &mut client, &long).contains("at most 4096 bytes"));
    assert_eq!(type_in(&mut world, &mut client, "q"), r#"{"return":""}"#);
    assert!(world.line(&mut client).contains("host-qmp-quit"));
}

#[test]
fn trace_points_are_switched_by_name_and_pattern() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    let mut ask = |command: &str, arguments: &str| {
        let text = format!(r#"{{"execute":"{command}","arguments":{arguments}}}"#);
        world.ask(&mut client, &text)
    };
    let one = r#"{"name":"balloon_target"}"#;
    assert_eq!(ask("trace-get-state", one), r#"{"return":[{"name":"balloon_target","state":false}]}"#);
    assert_eq!(ask("trace-set-state", r#"{"name":"balloon_t*","enable":true}"#), EMPTY);
    assert_eq!(ask("trace-get-state", one), r#"{"return":[{"name":"balloon_target","state":true}]}"#);
    assert_eq!(
        ask("trace-event-get-state", r#"{"name":"balloon_?arget"}"#),
        r#"{"return":[{"name":"balloon_target","state":"enabled","vcpu":false}]}"#
    );
    assert!(
        ask("human-monitor-command", r#"{"command-line":"info trace-events"}"#)
            .contains("balloon_target : state 1\\r\\n")
    );
    let off = r#"{"command-line":"trace-event balloon_target off"}"#;
    assert_eq!(ask("human-monitor-command", off), r#"{"return":""}"#);
    assert_eq!(ask("trace-get-state", one), r#"{"return":[{"name":"balloon_target","state":false}]}"#);
    assert_eq!(ask("trace-get-state", r#"{"name":"no*"}"#), r#"{"return":[]}"#);
    assert!(
        ask("trace-event-set-state", r#"{"name":"nope","enable":true}"#)
            .contains("trace event 'nope' not found")
    );
}
