//! Introspection tells one level, also of objects that come and go.

use zbus::fdo::IntrospectableProxy;

use super::*;

async fn introspect(daemon: &Daemon, path: &str) -> zbus::fdo::Result<String> {
    let object = IntrospectableProxy::builder(&daemon.client).destination(BUS_NAME).path(path.to_owned());
    object.build().await.unwrap().introspect().await
}

/// The names of what is under an object.
fn children(text: &str) -> Vec<&str> {
    let mut names: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("<node name=\"")?.strip_suffix("\"/>"))
        .collect();
    names.sort_unstable();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn introspection_tells_one_level() {
    let (bus, dir) = (Bus::new(), tempfile::tempdir().unwrap());
    let launcher = FakeLauncher::new(dir.path().join("vm"));
    let daemon = Daemon::start(&bus, dir.path(), &launcher).await;
    let vms = format!("{MANAGER_PATH}/vm");
    let way = async || {
        for (path, child) in [("/", "org"), ("/org", "flotilla"), ("/org/flotilla", "Flotilla1")] {
            let text = introspect(&daemon, path).await.unwrap();
            assert_eq!(children(&text), [child], "{path}");
            assert!(!text.contains(dbus_api::MANAGER_INTERFACE), "{path}");
        }
    };
    way().await;
    let spec = kernel(dir.path());
    // Twice: the folder goes with the last of them.
    for _ in 0..2 {
        let text = introspect(&daemon, MANAGER_PATH).await.unwrap();
        assert!(text.contains(dbus_api::MANAGER_INTERFACE) && text.contains("ListVms"), "{text}");
        assert_eq!(children(&text), [""; 0]);
        assert!(introspect(&daemon, &vms).await.is_err());
        for name in ["web", "a-b"] {
            daemon.manager.define_vm(name, &spec, none()).await.unwrap();
        }
        assert_eq!(children(&introspect(&daemon, MANAGER_PATH).await.unwrap()), ["vm"]);
        let text = introspect(&daemon, &vms).await.unwrap();
        assert_eq!(children(&text), ["a_2db", "web"]);
        assert!(!text.contains(dbus_api::VM_INTERFACE), "{text}");
        let text = introspect(&daemon, &dbus_api::vm_path("a-b")).await.unwrap();
        assert!(text.contains(dbus_api::VM_INTERFACE), "{text}");
        way().await;
        for name in ["web", "a-b"] {
            daemon.manager.undefine_vm(name, none()).await.unwrap();
        }
    }
}
