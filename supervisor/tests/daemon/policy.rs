//! What the daemon does by itself when a VM ends: starts it again or not, as its definition says, and never against an administrator.

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use crate::lab::{Lab, none, pid};

#[tokio::test]
async fn a_vm_that_dies_is_started_again_and_one_that_is_stopped_is_not() {
    let mut lab = Lab::new().await;
    lab.define("web", json!({"restart": "on-failure"})).await.unwrap();
    lab.define("plain", json!({})).await.unwrap();
    for name in ["web", "plain"] {
        lab.start(name).await.unwrap();
    }
    let (web, plain) = (lab.vm("web").await, lab.vm("plain").await);
    let mut last = web.main_pid().await.unwrap();
    for row in 1..=2 {
        kill(pid(last), Signal::SIGKILL).unwrap();
        lab.settle(async || {
            let now = web.main_pid().await.unwrap();
            now != 0 && now != last && web.state().await.unwrap() == "running"
        })
        .await;
        last = web.main_pid().await.unwrap();
        assert_eq!(web.n_restarts().await.unwrap(), row);
    }
    kill(pid(plain.main_pid().await.unwrap()), Signal::SIGKILL).unwrap();
    lab.until("plain", "failed").await;
    assert_eq!(plain.exit_status().await.unwrap(), ("signal".to_owned(), "SIGKILL".to_owned()));

    // The time before the third restart outlives the daemon.
    kill(pid(last), Signal::SIGKILL).unwrap();
    lab.until("web", "failed").await;
    assert!(
        web.state_reason().await.unwrap().contains("starts again in 4 s"),
        "{:?}",
        web.state_reason().await
    );
    lab.end_daemon(Signal::SIGKILL);
    lab.start_daemon().await;
    lab.until("web", "running").await;
    assert_eq!(lab.vm("web").await.n_restarts().await.unwrap(), 3);

    lab.job(lab.manager.power_off_vm("web", none())).await.unwrap();
    let web = lab.vm("web").await;
    assert_eq!(
        (web.state().await.unwrap().as_str(), web.intent().await.unwrap().as_str()),
        ("stopped", "stopped")
    );
    // Whether it is about to be started again or is up already: a stop is a stop.
    lab.start("web").await.unwrap();
    kill(pid(web.main_pid().await.unwrap()), Signal::SIGKILL).unwrap();
    lab.job(lab.manager.power_off_vm("web", none())).await.unwrap();
    assert_eq!(
        (web.state().await.unwrap().as_str(), web.intent().await.unwrap().as_str()),
        ("stopped", "stopped")
    );
    assert_eq!(web.main_pid().await.unwrap(), 0);
}

#[tokio::test]
async fn always_means_also_when_the_guest_ends_it() {
    let lab = Lab::new().await;
    lab.define("web", json!({"restart": "always"})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let first = vm.main_pid().await.unwrap();
    lab.qmp("web").await.tell("x-poweroff").await;
    lab.settle(async || {
        let now = vm.main_pid().await.unwrap();
        now != 0 && now != first && vm.state().await.unwrap() == "running"
    })
    .await;
    lab.qmp("web").await.tell("quit").await;
    lab.until("web", "stopped").await;
    assert_eq!(vm.intent().await.unwrap(), "stopped");
}

#[tokio::test]
async fn what_a_vm_said_before_it_failed_is_shown() {
    let lab = Lab::new().await;
    lab.define("web", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    lab.qmp("web").await.tell("x-crash").await;
    lab.until("web", "failed").await;
    lab.settle(async || {
        vm.last_log().await.unwrap().last().is_some_and(|line| line.ends_with("fake: I die"))
    })
    .await;
    assert_eq!(vm.exit_status().await.unwrap(), ("signal".to_owned(), "SIGABRT".to_owned()));
    lab.start("web").await.unwrap();
    assert!(vm.last_log().await.unwrap().is_empty());
}

#[tokio::test]
async fn limits_need_systemd_and_what_holds_at_once_needs_no_new_start() {
    let lab = Lab::new().await;
    lab.define("web", json!({"limits": {"cpu_quota": 50}})).await.unwrap();
    let refused = lab.start("web").await.unwrap_err();
    assert!(refused.contains("limits: plain processes have none"), "{refused}");
    let replace = || std::collections::HashMap::from([("replace", zbus::Variant::from(true))]);
    let define =
        async |spec: serde_json::Value| lab.manager.define_vm("web", &spec.to_string(), replace()).await;
    let kernel = lab.path("kernel");
    define(json!({"kernel": kernel})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let generations = async || (vm.generation().await.unwrap(), vm.applied_generation().await.unwrap());
    assert_eq!(generations().await, (2, 2));
    define(json!({"kernel": kernel, "restart": "on-failure"})).await.unwrap();
    assert_eq!(generations().await, (3, 3));
    define(json!({"kernel": kernel, "limits": {"cpu_quota": 50}})).await.unwrap_err();
    assert_eq!(generations().await, (3, 3));
    define(json!({"kernel": kernel, "cpus": 2})).await.unwrap();
    assert_eq!(generations().await, (4, 3));
}

#[tokio::test]
async fn a_host_has_limits_and_can_be_drained() {
    let mut lab = Lab::bare().await;
    std::fs::write(lab.path("flotillad.toml"), "[admission]\nmax_vms = 2\nmax_memory = \"1G\"\n").unwrap();
    lab.start_daemon().await;
    for (name, memory) in [("a", "512M"), ("b", "640M"), ("c", "256M"), ("d", "128M")] {
        lab.define(name, json!({"memory": memory})).await.unwrap();
    }
    lab.start("a").await.unwrap();
    let refused = lab.start("b").await.unwrap_err();
    assert!(refused.contains("ResourceExhausted") && refused.contains("max_memory"), "{refused}");
    lab.start("c").await.unwrap();
    assert!(lab.start("d").await.unwrap_err().contains("max_vms"));
    // What runs counts for the next daemon, too.
    lab.end_daemon(Signal::SIGKILL);
    lab.start_daemon().await;
    assert!(lab.start("d").await.unwrap_err().contains("max_vms"));
    lab.job(lab.manager.power_off_vm("c", none())).await.unwrap();
    lab.start("d").await.unwrap();

    let stop = std::collections::HashMap::from([("stop", zbus::Variant::from(true))]);
    assert_eq!(lab.manager.drain(stop).await.unwrap().len(), 2);
    for name in ["a", "d"] {
        lab.until(name, "stopped").await;
    }
    assert!(lab.manager.draining().await.unwrap());
    for round in 0..2 {
        let refused = lab.start("a").await.unwrap_err();
        assert!(refused.contains("Draining"), "{round}: {refused}");
        lab.end_daemon(Signal::SIGTERM);
        lab.start_daemon().await;
    }
    lab.manager.undrain().await.unwrap();
    lab.start("a").await.unwrap();
    assert!(!lab.manager.draining().await.unwrap());
}

#[tokio::test]
async fn vms_start_with_the_host_in_their_order_and_once() {
    let mut lab = Lab::new().await;
    lab.settle(async || lab.path("run/autostart.json").exists()).await;
    for (name, order) in [("late", 2), ("early", 1), ("too", 1)] {
        lab.define(name, json!({"autostart": true, "autostart_order": order})).await.unwrap();
    }
    lab.define("other", json!({})).await.unwrap();
    lab.end_daemon(Signal::SIGTERM);
    // Defined in this boot, none is started by a daemon that is merely restarted; then the host boots.
    lab.start_daemon().await;
    lab.settle(async || lab.manager.state().await.unwrap() == "running").await;
    assert_eq!(lab.vm("early").await.state().await.unwrap(), "defined");
    lab.end_daemon(Signal::SIGTERM);
    std::fs::remove_file(lab.path("run/autostart.json")).unwrap();
    lab.start_daemon().await;
    for name in ["early", "too", "late"] {
        lab.until(name, "running").await;
    }
    let since = async |name: &str| lab.vm(name).await.state_change_timestamp().await.unwrap();
    let late = since("late").await;
    assert!(since("early").await < late && since("too").await < late);
    assert_eq!(lab.vm("other").await.state().await.unwrap(), "defined");
    // What was stopped stays so over a restart of the daemon.
    lab.job(lab.manager.power_off_vm("too", none())).await.unwrap();
    lab.end_daemon(Signal::SIGKILL);
    lab.start_daemon().await;
    lab.until("early", "running").await;
    lab.settle(async || lab.manager.state().await.unwrap() == "running").await;
    assert_eq!(lab.vm("too").await.state().await.unwrap(), "stopped");
}
