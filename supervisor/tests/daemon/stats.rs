//! What the VMs use: over D-Bus, and as metrics for whoever asks on their socket. A VM that stands still is counted like the others.

use crate::lab::{Lab, name_of, none, pid};
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

async fn ask(lab: &Lab, request: &str) -> String {
    let mut client = UnixStream::connect(lab.path("run/metrics.sock")).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(crate::lab::PATIENCE, client.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn what_vms_use_is_told_without_asking_them() {
    let mut lab = Lab::bare().await;
    lab.own_network();
    lab.start_daemon().await;
    let disk = lab.path("disk");
    std::fs::write(&disk, [0; 512]).unwrap();
    lab.manager.define_network("lan", "{}", none()).await.unwrap();
    lab.define(
        "web",
        json!({"nics": [{"network": "lan"}], "memory": "1G", "balloon": true, "disks": [{"path": disk}]}),
    )
    .await
    .unwrap();
    lab.define("frozen", json!({"balloon": true})).await.unwrap();
    lab.define("off", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    lab.start("frozen").await.unwrap();
    let frozen = pid(lab.vm("frozen").await.main_pid().await.unwrap());
    kill(frozen, Signal::SIGSTOP).unwrap();

    let (_, stats) = lab.manager.get_stats(&[]).await.unwrap();
    assert_eq!(stats.len(), 2, "{stats:?}");
    let web = &stats["web"];
    assert_eq!((web["memory"], web["vcpus"]), (1 << 30, 1));
    assert!(web["resident"] > 0 && web["threads"] > 0 && web.contains_key("nic0.sent_packets"), "{web:?}");
    assert!(stats["frozen"]["resident"] > 0 && !stats["frozen"].contains_key("nic0.sent"));
    let (_, one) = lab.manager.get_stats(&["frozen", "off"]).await.unwrap();
    assert_eq!(one.keys().collect::<Vec<_>>(), ["frozen"]);
    assert_eq!(name_of(&lab.manager.get_stats(&["none"]).await.unwrap_err()), "NoSuchVm");

    let page = ask(&lab, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    let (head, page) = page.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", page.len())), "{head}");
    for line in [
        "flotilla_vms{state=\"defined\"} 1",
        "flotilla_vm_up{vm=\"off\"} 0",
        "flotilla_vm_up{vm=\"frozen\"} 1",
        "flotilla_vm_memory_bytes{vm=\"web\"} 1073741824",
        "flotilla_committed_vcpus 2",
        "flotilla_draining 0",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\n{page}");
    }
    for beginning in [
        "flotilla_vm_cpu_seconds_total{vm=\"frozen\"} ",
        "flotilla_vm_network_received_bytes_total{vm=\"web\",nic=\"nic0\"} ",
        "flotilla_adoption_seconds ",
        "flotilla_ready_seconds ",
        "flotilla_admission_refused_total 0",
        "flotilla_vm_restarts_total{vm=\"web\"} 0",
        "flotilla_vm_qmp_latency_seconds{vm=\"web\"} ",
    ] {
        assert!(page.lines().any(|found| found.starts_with(beginning)), "{beginning}\n{page}");
    }
    // What VMMs are asked for is there for the next reader; one that stands still delays nobody.
    lab.settle(async || {
        let page = ask(&lab, "GET /metrics HTTP/1.0\r\n\r\n").await;
        page.contains("flotilla_vm_balloon_bytes{vm=\"web\"} 268435456\n")
            && page.contains("flotilla_vm_block_written_bytes_total{vm=\"web\",disk=\"disk0\"} 4096\n")
    })
    .await;
    for (request, status) in [
        ("GET /other HTTP/1.1\r\n\r\n", "HTTP/1.1 404"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 400"),
        ("\0\u{1}\n\n", "HTTP/1.1 400"),
    ] {
        assert!(ask(&lab, request).await.starts_with(status), "{request:?}");
    }
    // Clients that say nothing take no place from others for long, and none from the fleet.
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(UnixStream::connect(lab.path("run/metrics.sock")).await.unwrap());
    }
    assert_eq!(lab.manager.list_vms().await.unwrap().len(), 3);
    drop(silent);
    assert!(ask(&lab, "GET /metrics HTTP/1.0\r\n\r\n").await.contains("flotilla_vms"));
    kill(frozen, Signal::SIGCONT).unwrap();

    // The next daemon serves them again.
    lab.end_daemon(Signal::SIGKILL);
    lab.start_daemon().await;
    assert!(ask(&lab, "GET /metrics HTTP/1.0\r\n\r\n").await.contains("flotilla_vm_up{vm=\"web\"} 1"));
}

#[tokio::test]
async fn one_that_stops_answering_is_shown_so_until_it_answers_again() {
    let lab = Lab::new().await;
    lab.define("web", json!({"balloon": true})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let number = pid(vm.main_pid().await.unwrap());
    kill(number, Signal::SIGSTOP).unwrap();
    // Whoever reads figures has it asked for them; one question it may answer still, as the signal reaches one thread first.
    lab.settle(async || {
        ask(&lab, "GET /metrics HTTP/1.0\r\n\r\n").await;
        vm.state().await.unwrap() == "quarantined"
    })
    .await;
    assert!(!vm.qmp_responsive().await.unwrap());
    assert_eq!(vm.intent().await.unwrap(), "running");
    kill(number, Signal::SIGCONT).unwrap();
    lab.settle(async || vm.state().await.unwrap() == "running").await;
    assert!(vm.qmp_responsive().await.unwrap());
    assert_eq!(pid(vm.main_pid().await.unwrap()), number);
}
