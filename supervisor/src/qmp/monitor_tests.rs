//! The client against a VMM that behaves, and one that does not.

use std::time::Duration;

use serde_json::json;
use tokio::sync::broadcast::error::RecvError;

use super::error::QmpError;
use super::fake::{FakeVmm, GREETING, PATIENCE};
use super::monitor::Monitor;

const SHORT: Duration = Duration::from_millis(50);

#[tokio::test]
async fn commands_are_answered_by_number() {
    let fake = FakeVmm::new();
    let (monitor, mut vmm) = fake.monitor().await;
    let first = monitor.execute("first", None, PATIENCE);
    let second = monitor.execute("second", Some(json!({"a": [1, null]})), PATIENCE);
    let vmm = async {
        let (one, two) = (vmm.message().await, vmm.message().await);
        assert_eq!((&one["execute"], one.get("arguments")), (&json!("first"), None));
        assert_eq!(two["arguments"], json!({"a": [1, null]}));
        // In the other order, with an event between.
        vmm.answer(&two, json!(2)).await;
        vmm.event("STOP", json!({})).await;
        vmm.answer(&one, json!(null)).await;
        vmm
    };
    let mut events = monitor.events();
    let (first, second, _vmm) = tokio::join!(first, second, vmm);
    assert_eq!((first.unwrap(), second.unwrap()), (json!(null), json!(2)));
    let event = events.recv().await.unwrap();
    assert_eq!((&*event.name, &*event.data, event.usec), ("STOP", &json!({}), 3_000_007));
    assert!(monitor.latency().is_some());
}

#[tokio::test]
async fn a_refusal_keeps_the_words() {
    let fake = FakeVmm::new();
    let (monitor, mut vmm) = fake.monitor().await;
    // With its number, and without: a VMM that could not read a request does not know it.
    for id in [true, false] {
        let (error, ()) = tokio::join!(monitor.execute("nope", None, PATIENCE), async {
            let request = vmm.message().await;
            let mut answer = json!({"error": {"class": "CommandNotFound", "desc": "no nope"}});
            if id {
                answer["id"] = request["id"].clone();
            }
            vmm.send(answer.to_string()).await;
        });
        let error = error.unwrap_err();
        assert!(matches!(&error, QmpError::Refused { class, .. } if class == "CommandNotFound"));
        assert_eq!(error.to_string(), "CommandNotFound: no nope");
    }
}

#[tokio::test]
async fn a_late_answer_is_nobodys() {
    let fake = FakeVmm::new();
    let (monitor, mut vmm) = fake.monitor().await;
    let error = monitor.execute("slow", None, SHORT).await.unwrap_err();
    assert!(matches!(&error, QmpError::Deadline { command, sent: true, .. } if command == "slow"), "{error}");
    let late = vmm.message().await;
    vmm.answer(&late, json!("late")).await;
    let (value, ()) = tokio::join!(monitor.execute("next", None, PATIENCE), async {
        let request = vmm.message().await;
        assert_ne!(request["id"], late["id"]);
        vmm.answer(&late, json!("late again")).await;
        vmm.answer(&request, json!("in time")).await;
        // Numbers that were never given, and no number at all.
        for forged in
            ["{\"return\":1,\"id\":99999}", "{\"return\":1}", "{\"return\":1,\"id\":\"x\"}", "{\"error\":{}}"]
        {
            vmm.send(forged).await;
        }
    });
    assert_eq!(value.unwrap(), "in time");
    assert!(!monitor.is_closed());
}

#[tokio::test]
async fn a_vmm_that_does_not_read_stops_nobody_for_longer_than_the_deadline() {
    let fake = FakeVmm::new();
    let (monitor, _vmm) = fake.monitor().await;
    // More than its socket buffer holds, so that later commands are not even taken.
    let big = json!({"x": "y".repeat(64 << 10)});
    let all = (0..64).map(|_| monitor.execute("big", Some(big.clone()), Duration::from_millis(500)));
    let answers = futures_util::future::join_all(all).await;
    let unsent =
        answers.iter().filter(|answer| matches!(answer, Err(QmpError::Deadline { sent: false, .. }))).count();
    assert!(answers.iter().all(|answer| matches!(answer, Err(QmpError::Deadline { .. }))));
    assert!(unsent > 0);
}

#[tokio::test]
async fn the_end_reaches_everybody() {
    let fake = FakeVmm::new();
    let (monitor, mut vmm) = fake.monitor().await;
    let mut events = monitor.events();
    let (error, ()) = tokio::join!(monitor.execute("quit", None, PATIENCE), async {
        vmm.message().await;
        vmm.event("SHUTDOWN", json!({"guest": false, "reason": "host-qmp-quit"})).await;
        drop(vmm);
    });
    assert!(matches!(error, Err(QmpError::Closed { .. })));
    tokio::time::timeout(PATIENCE, monitor.closed()).await.unwrap();
    assert!(monitor.is_closed());
    assert_eq!(&*events.recv().await.unwrap().name, "SHUTDOWN");
    assert!(matches!(events.recv().await, Err(RecvError::Closed)));
    assert!(matches!(monitor.events().recv().await, Err(RecvError::Closed)));
    let error = monitor.execute("query-status", None, PATIENCE).await.unwrap_err().to_string();
    assert!(error.contains("closed its QMP connection"), "{error}");
}

#[tokio::test]
async fn the_last_handle_hangs_up() {
    let fake = FakeVmm::new();
    let (monitor, mut vmm) = fake.monitor().await;
    let other = monitor.clone();
    drop(monitor);
    let (value, ()) = tokio::join!(other.execute("x", None, PATIENCE), async {
        let request = vmm.message().await;
        vmm.answer(&request, json!(1)).await;
    });
    assert_eq!(value.unwrap(), 1);
    drop(other);
    assert!(vmm.next().await.is_none());
}

#[tokio::test]
async fn unknown_events_and_a_little_nonsense_are_survived() {
    let fake = FakeVmm::new();
    let (monitor, mut vmm) = fake.monitor().await;
    let mut events = monitor.events();
    for nonsense in [
        "garbage\n",
        "{\"event\":7}",
        "{\"a\":]}\n",
        "[1,2]",
        "{}",
        "{\"return\":1,\"error\":2}",
        "\u{0}\u{1}\n",
    ] {
        vmm.send(nonsense).await;
    }
    vmm.send("{\"event\":\"NEVER_HEARD_OF\",\"new\":{\"x\":1},").await;
    tokio::task::yield_now().await;
    vmm.send("\"data\":{\"y\":2}}{\"event\":\"BARE\"}").await;
    assert_eq!(events.recv().await.unwrap().data["y"], 2);
    let bare = events.recv().await.unwrap();
    assert_eq!((&*bare.name, &*bare.data, bare.usec), ("BARE", &json!(null), 0));
    let (value, ()) = tokio::join!(monitor.execute("x", None, PATIENCE), async {
        let request = vmm.message().await;
        vmm.answer(&request, json!("fine")).await;
    });
    assert_eq!(value.unwrap(), "fine");
}

#[tokio::test]
async fn too_much_nonsense_is_the_end() {
    let fake = FakeVmm::new();
    let (monitor, mut vmm) = fake.monitor().await;
    vmm.send("nonsense\n".repeat(100)).await;
    tokio::time::timeout(PATIENCE, monitor.closed()).await.unwrap();
    let error = monitor.execute("x", None, PATIENCE).await.unwrap_err().to_string();
    assert!(error.contains("does not speak QMP"), "{error}");
}

#[tokio::test]
async fn a_flood_of_events_is_bounded_and_noticed() {
    let fake = FakeVmm::new();
    let (monitor, mut vmm) = fake.monitor().await;
    let mut events = monitor.events();
    for n in 0..2000 {
        vmm.event("BALLOON_CHANGED", json!({"actual": n})).await;
    }
    let (value, ()) = tokio::join!(monitor.execute("x", None, PATIENCE), async {
        let request = vmm.message().await;
        vmm.answer(&request, json!(1)).await;
    });
    assert_eq!(value.unwrap(), 1);
    assert!(matches!(events.recv().await, Err(RecvError::Lagged(_))));
}

#[tokio::test]
async fn what_cannot_be_connected_to() {
    let fake = FakeVmm::new();
    let missing = fake.directory.path().join("missing.sock");
    let error = Monitor::connect(&missing, PATIENCE).await.unwrap_err();
    assert!(
        matches!(error, QmpError::Connect { .. }) && error.to_string().contains("missing.sock"),
        "{error}"
    );

    // Listens and says nothing: an early answer only.
    let error = Monitor::connect(&fake.path(), SHORT).await.unwrap_err();
    assert!(matches!(error, QmpError::Deadline { .. }), "{error}");
    drop(fake.accept().await);

    let path = fake.path();
    for greeting in ["", "HTTP/1.1 200 OK\r\n", "{\"return\":{}}", "{\"event\":\"STOP\"}", "{\"QMP\":"] {
        let (error, ()) = tokio::join!(Monitor::connect(&path, PATIENCE), async {
            let mut vmm = fake.accept().await;
            vmm.send(greeting).await;
        });
        assert!(matches!(error, Err(QmpError::NotQmp { .. })), "{greeting:?}");
    }
    let (error, ()) = tokio::join!(Monitor::connect(&path, PATIENCE), async {
        let mut vmm = fake.accept().await;
        vmm.send(GREETING).await;
        let request = vmm.message().await;
        vmm.send(
            json!({"error": {"class": "GenericError", "desc": "busy"}, "id": request["id"]}).to_string(),
        )
        .await;
    });
    assert!(error.unwrap_err().to_string().contains("busy"));
}

#[tokio::test]
async fn events_during_the_negotiation_do_not_confuse_it() {
    let fake = FakeVmm::new();
    let path = fake.path();
    let (monitor, mut vmm) = tokio::join!(Monitor::connect(&path, PATIENCE), async {
        let mut vmm = fake.accept().await;
        vmm.send(GREETING).await;
        let request = vmm.message().await;
        vmm.event("STOP", json!({})).await;
        vmm.answer(&request, json!({})).await;
        vmm
    });
    let monitor = monitor.unwrap();
    let (value, ()) = tokio::join!(monitor.execute("x", None, PATIENCE), async {
        let request = vmm.message().await;
        vmm.answer(&request, json!(1)).await;
    });
    assert_eq!(value.unwrap(), 1);
}
