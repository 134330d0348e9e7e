//! The descriptions of the interfaces that packages install (`units/interfaces/`) say what the code says.
//!
//! They are written by this test, not by hand: after a change of the interfaces
//! `FLOTILLA_WRITE_INTERFACES=1 cargo test -p supervisor --lib interfaces`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use zbus::object_server::Interface;

use super::*;
use crate::dbus::{job, manager, network, template, vm};

/// As the D-Bus specification wants a description to begin.
const HEAD: &str = concat!(
    "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n",
    " \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n<node>\n",
);

fn description(interface: &dyn Interface) -> String {
    let mut text = HEAD.to_owned();
    interface.introspect_to_writer(&mut text, 2);
    text + "</node>\n"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_installed_interfaces_are_those_of_the_code() {
    let (bus, dir) = (Bus::new(), tempfile::tempdir().unwrap());
    let launcher = FakeLauncher::new(dir.path().join("vm"));
    let daemon = Daemon::start(&bus, dir.path(), &launcher).await;
    let fleet = Arc::clone(&daemon.fleet);
    let templates = Templates::open(Arc::clone(&fleet), None);
    let access = Arc::new(Access::SameUser(daemon.connection.clone()));
    let shared = Shared { fleet, templates, access };
    let name = || "web".to_owned();
    let job = job::Job { shared: shared.clone(), id: 1, kind: "start", name: "web".into() };
    let all: [(&str, &dyn Interface); 5] = [
        (dbus_api::MANAGER_INTERFACE, &manager::Manager::new(shared.clone())),
        (dbus_api::VM_INTERFACE, &vm::Vm::new(shared.clone(), "web".into())),
        (dbus_api::NETWORK_INTERFACE, &network::Network::new(shared.clone(), name())),
        (dbus_api::TEMPLATE_INTERFACE, &template::Template::new(shared.clone(), name())),
        (dbus_api::JOB_INTERFACE, &job),
    ];
    let place = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../units/interfaces"));
    let write = std::env::var_os("FLOTILLA_WRITE_INTERFACES").is_some();
    let mut names = BTreeSet::new();
    for (name, interface) in all {
        let path = place.join(format!("{name}.xml"));
        let said = description(interface);
        assert!(said.contains(&format!("<interface name=\"{name}\">")), "{said}");
        // A comment of XML holds no two hyphens in a row.
        let marks = said.matches("<!--").count() + said.matches("-->").count();
        assert_eq!(said.matches("--").count(), marks, "{name}: \"--\" in a comment");
        // Everything that can be called, read or heard is explained.
        let mut explained = false;
        for line in said.lines().map(str::trim) {
            if ["<method ", "<signal ", "<property "].iter().any(|word| line.starts_with(word)) {
                assert!(explained, "{name}: no comment before {line}");
            }
            explained = line.ends_with("-->");
        }
        if write {
            std::fs::write(&path, &said).unwrap();
        }
        let installed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            installed == said,
            "{}: it is not what the code says: write it anew, see above",
            path.display()
        );
        names.insert(path);
    }
    let there = std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(names, there, "what is no interface any more");
}
