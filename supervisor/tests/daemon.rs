//! flotillad as a whole, on a private bus with the process launcher: defines, drives, loses and finds VMs again.
//!
//! The VMMs are fakes (see `lab/vmm.rs`); the rest is real: the program, D-Bus, QMP sockets, the proxy, files, links.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test's way to fail")]

#[path = "daemon/addresses.rs"]
mod addresses;
#[path = "daemon/create.rs"]
mod create;
#[path = "daemon/jobs.rs"]
mod jobs;
mod lab;
#[path = "daemon/networks.rs"]
mod networks;
#[path = "daemon/plug.rs"]
mod plug;
#[path = "daemon/policy.rs"]
mod policy;
#[path = "daemon/proxy.rs"]
mod proxy;
#[path = "daemon/random.rs"]
mod random;
#[path = "daemon/stats.rs"]
mod stats;
#[path = "daemon/templates.rs"]
mod templates;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lab::{Lab, PATIENCE, name_of, none, pid};
use nix::sys::signal::{Signal, kill};
use serde_json::json;

/// Not a test: what the daemon starts as its VMM is this program with this name.
#[test]
fn this_program_is_the_vmm() {
    lab::vmm::run_if_asked();
}

#[tokio::test]
async fn a_vm_lives_its_life() {
    let lab = Lab::new().await;
    lab.define("web", json!({"memory": "128M"})).await.unwrap();
    let vm = lab.vm("web").await;
    assert_eq!((vm.state().await.unwrap(), vm.main_pid().await.unwrap()), ("defined".to_owned(), 0));
    lab.start("web").await.unwrap();
    assert_eq!(
        (vm.state().await.unwrap().as_str(), vm.intent().await.unwrap().as_str()),
        ("running", "running")
    );
    assert!(vm.qmp_responsive().await.unwrap());
    let line = vm.command_line().await.unwrap().join(" ");
    for part in ["-name web", "-m 128M", "-machine microvm", "qmp.sock,server,nowait"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let number = vm.main_pid().await.unwrap();
    assert!(std::path::Path::new(&format!("/proc/{number}")).exists());

    lab.job(lab.manager.pause_vm("web", none())).await.unwrap();
    assert_eq!(vm.state().await.unwrap(), "paused");
    lab.job(vm.resume(none())).await.unwrap();
    assert_eq!(vm.state().await.unwrap(), "running");
    let answer = vm.qmp_command("{\"execute\":\"query-status\"}", none()).await.unwrap();
    assert!(answer.contains("\"running\":true"), "{answer}");

    let row = lab.manager.list_vms().await.unwrap().remove(0);
    assert_eq!((row.0.as_str(), row.2.as_str(), row.4), ("web", "running", number));
    lab.job(lab.manager.power_off_vm("web", none())).await.unwrap();
    assert_eq!((vm.state().await.unwrap().as_str(), vm.main_pid().await.unwrap()), ("stopped", 0));
    let socket = vm.qmp_socket().await.unwrap();
    lab.manager.undefine_vm("web", none()).await.unwrap();
    assert!(lab.manager.list_vms().await.unwrap().is_empty());
    assert!(!std::path::Path::new(&socket).exists());
    for left in ["run/vm/web", "state/vms/web.json"] {
        assert!(!lab.path(left).exists(), "{left}");
    }
}

#[tokio::test]
async fn what_happens_over_qmp_shows_on_the_bus() {
    let lab = Lab::new().await;
    lab.define("web", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let mut changes = lab.manager.receive_vm_state_changed().await.unwrap();
    let mut events = vm.receive_event().await.unwrap();
    let (mut one, mut two) = (lab.qmp("web").await, lab.qmp("web").await);
    assert_eq!(one.ask("stop").await, json!({"return": {}}));
    assert_eq!(two.next().await.unwrap()["event"], "STOP");
    lab.until("web", "paused").await;
    one.ask("cont").await;
    lab.until("web", "running").await;
    // The guest ends itself: the clients get everything, then the end.
    assert_eq!(two.next().await.unwrap()["event"], "RESUME");
    one.ask("x-poweroff").await;
    assert_eq!(two.next().await.unwrap()["event"], "SHUTDOWN");
    assert!(two.next().await.is_none());
    lab.until("web", "stopped").await;
    assert!(vm.state_reason().await.unwrap().contains("guest"), "{:?}", vm.state_reason().await);
    // The socket is still there and says what is the matter.
    let answer = lab.qmp("web").await.ask("query-status").await;
    assert_eq!(answer["error"]["desc"], "VM \"web\" is not running");

    let mut last = 0;
    let mut seen = Vec::new();
    while seen.last().map(String::as_str) != Some("stopped") {
        let signal = tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap();
        let args = signal.args().unwrap();
        assert!(*args.seq() > last);
        last = *args.seq();
        seen.push(args.new().clone());
    }
    assert_eq!(seen[..2], ["paused", "running"]);
    let mut names = Vec::new();
    while names.len() < 3 {
        let signal = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap();
        names.push(signal.args().unwrap().qmp_event().clone());
    }
    assert_eq!(names, ["STOP", "RESUME", "SHUTDOWN"]);
}

#[tokio::test]
async fn vms_outlive_the_daemon() {
    let mut lab = Lab::new().await;
    let mut pids = HashMap::new();
    for name in ["a", "b", "c"] {
        lab.define(name, json!({})).await.unwrap();
        lab.start(name).await.unwrap();
        pids.insert(name, lab.vm(name).await.main_pid().await.unwrap());
    }
    lab.job(lab.manager.pause_vm("b", none())).await.unwrap();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        lab.end_daemon(signal);
        // One ends meanwhile, and nobody sees it.
        if signal == Signal::SIGTERM {
            kill(pid(pids["c"]), Signal::SIGKILL).unwrap();
        }
        lab.start_daemon().await;
        for (name, state) in [("a", "running"), ("b", "paused")] {
            lab.until_responsive(name).await;
            assert_eq!(lab.vm(name).await.state().await.unwrap(), state, "{signal}");
            assert_eq!(lab.vm(name).await.main_pid().await.unwrap(), pids[name], "{signal}");
            assert!(lab.qmp(name).await.ask("query-status").await["return"].is_object());
        }
        lab.job(lab.manager.resume_vm("b", none())).await.unwrap();
        lab.job(lab.manager.pause_vm("b", none())).await.unwrap();
    }
    let state = lab.vm("c").await.state().await.unwrap();
    assert!(["failed", "stopped"].contains(&state.as_str()), "{state}");
    assert_eq!(lab.vm("c").await.main_pid().await.unwrap(), 0);
    lab.start("c").await.unwrap();
    // A VM that was adopted ends like any other.
    lab.job(lab.manager.power_off_vm("a", none())).await.unwrap();
    assert_eq!(lab.vm("a").await.state().await.unwrap(), "stopped");
}

#[tokio::test]
async fn a_vmm_that_dies_is_seen_and_can_be_started_again() {
    let lab = Lab::new().await;
    lab.define("web", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    kill(pid(vm.main_pid().await.unwrap()), Signal::SIGKILL).unwrap();
    lab.until("web", "failed").await;
    assert_eq!(vm.exit_status().await.unwrap(), ("signal".to_owned(), "SIGKILL".to_owned()));
    lab.start("web").await.unwrap();
    let crash = vm.qmp_command("{\"execute\":\"x-crash\"}", none()).await.unwrap_err();
    assert!(["VmmDied", "QmpTimeout"].contains(&name_of(&crash).as_str()), "{crash:?}");
    lab.until("web", "failed").await;
    assert_eq!(vm.exit_status().await.unwrap().1, "SIGABRT");
}

#[tokio::test]
async fn a_start_that_fails_leaves_no_process() {
    let lab = Lab::new().await;
    lab.define("web", json!({"append": "fake=die"})).await.unwrap();
    let error = lab.start("web").await.unwrap_err();
    assert!(error.contains('3'), "the exit code: {error}");
    let vm = lab.vm("web").await;
    assert_eq!((vm.state().await.unwrap().as_str(), vm.main_pid().await.unwrap()), ("failed", 0));
    // A kernel that is gone since it was defined.
    lab.define("db", json!({})).await.unwrap();
    std::fs::rename(lab.path("kernel"), lab.path("elsewhere")).unwrap();
    let error = lab.start("db").await.unwrap_err();
    assert!(error.contains("kernel"), "{error}");
    assert_eq!(lab.vm("db").await.main_pid().await.unwrap(), 0);
}

#[tokio::test]
async fn one_silent_vmm_holds_up_nobody() {
    let lab = Lab::new().await;
    for name in ["frozen", "fine"] {
        lab.define(name, json!({})).await.unwrap();
        lab.start(name).await.unwrap();
    }
    let frozen = lab.vm("frozen").await;
    let number = pid(frozen.main_pid().await.unwrap());
    kill(number, Signal::SIGSTOP).unwrap();
    let paused = tokio::spawn({
        let manager = lab.manager.clone();
        async move { manager.pause_vm("frozen", none()).await }
    });
    let begin = Instant::now();
    for _ in 0..20 {
        assert_eq!(lab.manager.list_vms().await.unwrap().len(), 2);
        frozen.state().await.unwrap();
        assert!(lab.qmp("fine").await.ask("query-status").await["return"].is_object());
    }
    // No figure of speed: a wait for the frozen one would take its deadline each time.
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    paused.await.unwrap().unwrap();
    // It can be ended although it does not listen.
    lab.job(lab.manager.power_off_vm("frozen", none())).await.unwrap();
    assert_eq!(frozen.main_pid().await.unwrap(), 0);
}

#[tokio::test]
async fn a_vmm_that_never_listens_can_be_ended() {
    let lab = Lab::new().await;
    lab.define("mute", json!({"append": "fake=mute"})).await.unwrap();
    lab.manager.start_vm("mute", "run", none()).await.unwrap();
    let vm = lab.vm("mute").await;
    let launched = async {
        while vm.main_pid().await.unwrap() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, launched).await.unwrap();
    // There is a process, so a command waits for it, but not for ever.
    let answer = lab.qmp("mute").await.ask("x").await;
    assert_eq!(answer["error"]["desc"], "the VMM did not take \"x\" within 5000 ms");
    lab.job(lab.manager.power_off_vm("mute", none())).await.unwrap();
    assert_eq!(vm.main_pid().await.unwrap(), 0);
    lab.manager.undefine_vm("mute", none()).await.unwrap();
}

#[tokio::test]
async fn mistakes_have_names() {
    let lab = Lab::new().await;
    lab.define("web", json!({})).await.unwrap();
    let errors = [
        ("VmExists", lab.define("web", json!({})).await.unwrap_err(), "web"),
        ("InvalidSpec", lab.define("x", json!({"memroy": "1G"})).await.unwrap_err(), "memroy"),
        ("InvalidSpec", lab.define("x", json!({"memory": "1M"})).await.unwrap_err(), "memory"),
        ("InvalidSpec", lab.define("../x", json!({})).await.unwrap_err(), "../x"),
        ("InvalidSpec", lab.define("", json!({})).await.unwrap_err(), ""),
        ("InvalidSpec", lab.manager.define_vm("x", "{", none()).await.unwrap_err(), ""),
        ("NoSuchVm", lab.manager.start_vm("nope", "run", none()).await.unwrap_err(), "nope"),
        ("NoSuchVm", lab.manager.undefine_vm("nope", none()).await.unwrap_err(), "nope"),
        ("InvalidState", lab.manager.pause_vm("web", none()).await.unwrap_err(), "web"),
        (
            "InvalidState",
            lab.vm("web").await.qmp_command("{\"execute\":\"stop\"}", none()).await.unwrap_err(),
            "web",
        ),
    ];
    for (name, error, word) in errors {
        assert_eq!(name_of(&error), name, "{error:?}");
        assert!(format!("{error:?}").contains(word), "{error:?}");
    }
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let error = lab.manager.start_vm("web", "run", none()).await.unwrap_err();
    assert_eq!(name_of(&error), "InvalidState", "{error:?}");
    let error = lab.manager.undefine_vm("web", none()).await.unwrap_err();
    assert_eq!(name_of(&error), "InvalidState", "{error:?}");
    for (command, name) in
        [("nonsense", "QmpError"), ("{}", "QmpError"), ("{\"execute\":\"nope\"}", "QmpError")]
    {
        let error = vm.qmp_command(command, none()).await.unwrap_err();
        assert_eq!(name_of(&error), name, "{command}: {error:?}");
    }
    // Nothing of all this did any harm.
    assert_eq!(lab.manager.list_vms().await.unwrap().len(), 1);
    assert_eq!(vm.state().await.unwrap(), "running");
}

#[tokio::test]
async fn a_corrupt_record_is_set_aside_and_the_others_come_up() {
    let mut lab = Lab::new().await;
    lab.define("web", json!({})).await.unwrap();
    lab.define("db", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    lab.end_daemon(Signal::SIGKILL);
    let record = lab.path("state/vms/db.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, &text[..text.len() / 2]).unwrap();
    lab.start_daemon().await;
    lab.until("web", "running").await;
    let names: Vec<String> = lab.manager.list_vms().await.unwrap().into_iter().map(|row| row.0).collect();
    assert_eq!(names, ["web"]);
    let settled = async {
        while lab.manager.state().await.unwrap() == "starting" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, settled).await.unwrap();
    assert_eq!(lab.manager.state().await.unwrap(), "degraded");
    let corrupt = lab.manager.corrupt_records().await.unwrap();
    assert!(corrupt.len() == 1 && corrupt[0].0.contains("db"), "{corrupt:?}");
    assert!(!record.exists() && std::path::Path::new(&corrupt[0].0).exists());
    lab.define("db", json!({})).await.unwrap();
}

#[tokio::test]
async fn what_runs_without_a_definition_is_shown_and_left_alone() {
    let mut lab = Lab::new().await;
    lab.define("web", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    assert_eq!(lab.manager.orphans().await.unwrap(), []);
    let number = lab.vm("web").await.main_pid().await.unwrap();
    let (record, aside) = (lab.path("state/vms/web.json"), lab.path("aside"));
    lab.end_daemon(Signal::SIGKILL);
    std::fs::rename(&record, &aside).unwrap();
    lab.start_daemon().await;
    lab.settle(async || lab.manager.state().await.unwrap() == "degraded").await;
    assert_eq!(lab.manager.list_vms().await.unwrap().len(), 0);
    assert_eq!(lab.manager.orphans().await.unwrap(), [("web".to_owned(), String::new(), number)]);
    // With its definition it is the VM that it was.
    lab.end_daemon(Signal::SIGKILL);
    std::fs::rename(&aside, &record).unwrap();
    lab.start_daemon().await;
    lab.until("web", "running").await;
    assert_eq!(lab.vm("web").await.main_pid().await.unwrap(), number);
    assert_eq!(lab.manager.orphans().await.unwrap(), []);
    // One that ends is none any more.
    lab.end_daemon(Signal::SIGKILL);
    std::fs::remove_file(&record).unwrap();
    lab.start_daemon().await;
    assert_eq!(lab.manager.orphans().await.unwrap().len(), 1);
    kill(pid(number), Signal::SIGKILL).unwrap();
    lab.settle(async || lab.manager.state().await.unwrap() == "running").await;
    assert_eq!(lab.manager.orphans().await.unwrap(), []);
}

#[tokio::test]
async fn bridges_and_taps_come_and_go_with_their_vms() {
    let mut lab = Lab::bare().await;
    lab.own_network();
    std::fs::write(
        lab.path("flotillad.toml"),
        "[[bridge]]\nname = \"br0\"\naddresses = [\"10.99.0.1/24\"]\n",
    )
    .unwrap();
    lab.start_daemon().await;
    // The daemon answers before the host's links are in order.
    lab.settle(async || lab.ip("address show br0").contains("10.99.0.1/24")).await;
    let disk = lab.path("disk.img");
    std::fs::write(&disk, vec![0; 4096]).unwrap();
    lab.define("web", json!({"nics": [{"bridge": "br0"}], "disks": [{"path": disk}]})).await.unwrap();
    lab.define("db", json!({"nics": [{"bridge": "br0"}, {"bridge": "flbr9"}]})).await.unwrap();
    lab.start("web").await.unwrap();
    lab.start("db").await.unwrap();
    let shown = lab.ip("link show master br0");
    assert!(shown.contains("fl-web-0") && shown.contains("fl-db-0"), "{shown}");
    assert!(lab.ip("link show master flbr9").contains("fl-db-1"));
    // The VMM has all of it by descriptor, the tap included.
    let handed = lab.vm("web").await.qmp_command("{\"execute\":\"x-fds\"}", none()).await.unwrap();
    for part in ["kernel", "disk.img", "fl-web-0", "/dev/net/tun"] {
        assert!(handed.contains(part), "{part}: {handed}");
    }
    // Another daemon finds the links as they are, and takes away what a crash left.
    lab.end_daemon(Signal::SIGKILL);
    lab.ip("tuntap add dev orphan mode tap");
    lab.ip("link set orphan alias flotilla:2f1c7f3e-0000-4000-8000-00000000dead");
    lab.ip("tuntap add dev foreign mode tap");
    lab.start_daemon().await;
    lab.until("web", "running").await;
    lab.settle(async || !lab.ip("-o link show").contains("orphan")).await;
    let links = lab.ip("-o link show");
    assert!(links.contains("foreign"), "{links}");
    assert!(links.contains("fl-web-0") && links.contains("fl-db-1"), "{links}");

    for name in ["web", "db"] {
        lab.job(lab.manager.power_off_vm(name, none())).await.unwrap();
        lab.manager.undefine_vm(name, none()).await.unwrap();
    }
    let links = lab.ip("-o link show");
    assert!(!links.contains("fl-") && !links.contains("flbr9"), "{links}");
    assert!(links.contains("br0") && links.contains("foreign"), "{links}");
}
