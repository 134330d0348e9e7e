//! The QMP sockets of the whole daemon: they outlive it, what clients do there is known and written down, and some may only look.

use std::collections::HashMap;
use std::os::unix::net::UnixStream as StdStream;

use crate::lab::{Lab, Qmp, none};
use nix::sys::signal::Signal;
use serde_json::json;
use zbus::Variant;

#[tokio::test]
async fn clients_wait_while_the_daemon_is_away() {
    let mut lab = Lab::bare().await;
    lab.keep_descriptors();
    lab.start_daemon().await;
    for name in ["web", "db", "gone"] {
        lab.define(name, json!({})).await.unwrap();
    }
    lab.start("web").await.unwrap();
    let (web, db) =
        (lab.vm("web").await.qmp_socket().await.unwrap(), lab.vm("db").await.qmp_socket().await.unwrap());
    for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGTERM] {
        lab.end_daemon(signal);
        // Nobody is there, and nobody is refused.
        let mut waiting = Vec::new();
        for path in [&web, &web, &db] {
            let stream = StdStream::connect(path).unwrap();
            std::io::Write::write_all(&mut &stream, b"{\"execute\":\"query-status\"}").unwrap();
            waiting.push(Qmp::of(stream));
        }
        if signal == Signal::SIGKILL {
            // A VM whose definition is taken away meanwhile: its socket goes with the next daemon.
            std::fs::remove_file(lab.path("state/vms/gone.json")).unwrap();
        }
        lab.start_daemon().await;
        for (at, client) in waiting.iter_mut().enumerate() {
            assert!(client.next().await.unwrap()["QMP"].is_object());
            let answer = client.next().await.unwrap();
            match at {
                2 => assert!(answer["error"]["desc"].as_str().unwrap().contains("not running"), "{answer}"),
                _ => assert_eq!(answer["return"]["running"], true, "{answer}"),
            }
        }
    }
    lab.until_kept(2).await;
    lab.job(lab.manager.power_off_vm("web", none())).await.unwrap();
    for name in ["web", "db"] {
        lab.manager.undefine_vm(name, none()).await.unwrap();
    }
    lab.until_kept(0).await;
    assert!(StdStream::connect(&web).is_err() && !std::path::Path::new(&web).exists());
}

#[tokio::test]
async fn what_clients_do_is_known_and_written_down() {
    let mut lab = Lab::new().await;
    let disk = lab.path("disk.img");
    std::fs::write(&disk, vec![0; 4096]).unwrap();
    lab.define("web", json!({"disks": [{"path": disk}]})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let mut client = lab.qmp("web").await;
    client.ask("stop").await;
    lab.until("web", "paused").await;
    // The event comes first, then the answer, which says that somebody wanted it.
    lab.settle(async || vm.intent().await.unwrap() == "paused").await;
    client.ask("cont").await;
    lab.settle(async || vm.intent().await.unwrap() == "running").await;
    lab.until("web", "running").await;
    client.ask_with("device_del", json!({"id": "disk0"})).await;
    client
        .ask_with("device_add", json!({"id": "data", "driver": "virtio-blk-device", "secret": "pssst"}))
        .await;
    lab.settle(async || vm.added_devices().await.unwrap() == ["data"]).await;
    assert_eq!(vm.removed_devices().await.unwrap(), ["disk0"]);
    let log = lab.log();
    let own = std::process::id();
    for line in [
        format!("QMP command stop by user 0 (process {own})"),
        format!("QMP command device_del disk0 by user 0 (process {own})"),
        format!("QMP command device_add data by user 0 (process {own})"),
    ] {
        assert!(log.contains(&line), "{line}\n{log}");
    }
    assert!(!log.contains("pssst") && !log.contains("QMP command query"), "{log}");
    // The next daemon knows it still.
    lab.end_daemon(Signal::SIGKILL);
    lab.start_daemon().await;
    lab.until_responsive("web").await;
    let vm = lab.vm("web").await;
    assert_eq!(vm.removed_devices().await.unwrap(), ["disk0"]);
    // A VMM that is told to end, and ends without a word, has ended as wanted.
    let mut client = lab.qmp("web").await;
    client.tell("quit").await;
    lab.until("web", "stopped").await;
    assert_eq!(
        (vm.intent().await.unwrap().as_str(), vm.removed_devices().await.unwrap().len()),
        ("stopped", 0)
    );
}

#[tokio::test]
async fn some_clients_may_only_look() {
    let lab = Lab::new().await;
    lab.define("web", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let query = || HashMap::from([("mode", Variant::from("query"))]);
    let mut looker =
        Qmp::of(StdStream::from(std::os::fd::OwnedFd::from(vm.open_qmp(query()).await.unwrap())));
    assert!(looker.next().await.unwrap()["QMP"].is_object());
    let refused = looker.ask("stop").await;
    assert!(refused["error"]["desc"].as_str().unwrap().contains("read-only"), "{refused}");
    assert_eq!(looker.ask("query-status").await["return"]["running"], true);
    let refused = vm.qmp_command("\"stop\"", query()).await.unwrap_err();
    assert!(format!("{refused:?}").contains("read-only"), "{refused:?}");
    assert!(vm.qmp_command("\"query-status\"", query()).await.is_ok());
    let wrong = HashMap::from([("mode", Variant::from("fast"))]);
    assert!(format!("{:?}", vm.open_qmp(wrong).await.unwrap_err()).contains("fast"));
    // It is told of events all the same.
    lab.job(vm.pause(none())).await.unwrap();
    assert_eq!(looker.next().await.unwrap()["event"], "STOP");
}
