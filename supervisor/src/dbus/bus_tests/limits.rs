//! Limits, from the definition to the launcher: at a start, and at once for a VM that runs.

use serde_json::Value;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_from_the_start_and_change_at_once() {
    let (bus, dir) = (Bus::new(), tempfile::tempdir().unwrap());
    let launcher = FakeLauncher::new(dir.path().join("vm"));
    let daemon = Daemon::start(&bus, dir.path(), &launcher).await;
    let set = || launcher.vmms.lock().unwrap().limits.clone();
    let define = async |limits: Value| {
        let mut spec: Value = serde_json::from_str(&kernel(dir.path())).unwrap();
        spec["limits"] = limits;
        daemon.manager.define_vm("web", &spec.to_string(), option("replace", true)).await
    };
    define(json!({"cpu_quota": 50})).await.unwrap();
    assert!(set().is_empty(), "it does not run");
    daemon.job(async |m| m.start_vm("web", "run", none()).await).await;
    assert_eq!(set(), ["web {\"cpu_quota\":50}"]);
    define(json!({"cpu_quota": 150, "tasks_max": 100})).await.unwrap();
    assert_eq!(set()[1..], ["web {\"cpu_quota\":150,\"tasks_max\":100}"]);
    let vm = daemon.vm("web").await;
    assert_eq!((vm.generation().await.unwrap(), vm.applied_generation().await.unwrap()), (2, 2));
    assert!(matches!(define(json!({"cpu_quota": 0})).await, Err(Error::InvalidSpec(_))));
    assert_eq!(set().len(), 2);
    // A crash, and what it said.
    launcher.act("web", Act::Crash);
    daemon.wait_state("web", "failed").await;
    timeout(PATIENCE, async {
        while vm.last_log().await.unwrap() != ["web: it hurts"] {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}
