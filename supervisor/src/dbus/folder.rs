//! Introspection of the objects that have others below them: themselves and the names of their children, as the specification has it ("one
//! level"). The library's own answer holds the whole tree: with a few thousand VMs that is tens of megabytes for whoever asks, and meanwhile
//! no object can be added.
//!
//! The publisher puts a [`Folder`] in place of the library's when objects come; where the last child goes, the library takes the object away
//! with everything on it.

use std::fmt::Write as _;

use dbus_api::{MANAGER_PATH, job_path, network_path, template_path, vm_path};
use zbus::names::InterfaceName;
use zbus::object_server::Interface;
use zbus::{ObjectServer, interface};

use super::Shared;
use super::manager::Manager;

const INTROSPECTABLE: &str = "org.freedesktop.DBus.Introspectable";

const HEAD: &str = r#"<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
<node>
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect">
      <arg name="xml" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="Ping"/>
    <method name="GetMachineId">
      <arg name="machine_uuid" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg type="v" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <method name="GetAll">
      <arg name="interface_name" type="s" direction="in"/>
      <arg type="a{sv}" direction="out"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface_name" type="s"/>
      <arg name="changed_properties" type="a{sv}"/>
      <arg name="invalidated_properties" type="as"/>
    </signal>
  </interface>
"#;

/// Which of them it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On the way to the Manager; the name of the next step.
    Way(&'static str),
    Manager,
    Vms,
    Networks,
    Templates,
    Jobs,
}

/// Where they are.
const PLACES: [(&str, Place); 8] = [
    ("/", Place::Way("org")),
    ("/org", Place::Way("flotilla")),
    ("/org/flotilla", Place::Way("Flotilla1")),
    (MANAGER_PATH, Place::Manager),
    ("/org/flotilla/Flotilla1/vm", Place::Vms),
    ("/org/flotilla/Flotilla1/network", Place::Networks),
    ("/org/flotilla/Flotilla1/template", Place::Templates),
    ("/org/flotilla/Flotilla1/job", Place::Jobs),
];

/// See the module.
pub(super) struct Folder {
    shared: Shared,
    place: Place,
}

/// Puts itself on the object over this one; on all of those over that, too, when it is the Manager.
pub(super) async fn over(server: &ObjectServer, shared: &Shared, path: &str) -> zbus::Result<()> {
    for (folder, place) in PLACES {
        let parent = path.rsplit_once('/').is_some_and(|(parent, _)| parent == folder);
        if !parent && (path != MANAGER_PATH || !path.starts_with(folder)) {
            continue;
        }
        if server.interface::<_, Folder>(folder).await.is_err() {
            server.remove_named(folder, InterfaceName::from_static_str(INTROSPECTABLE)?).await?;
            server.at(folder, Folder { shared: shared.clone(), place }).await?;
        }
    }
    Ok(())
}

#[interface(name = "org.freedesktop.DBus.Introspectable", introspection_docs = false)]
impl Folder {
    #[zbus(out_args("xml"))]
    async fn introspect(&self) -> String {
        let mut text = HEAD.to_owned();
        if self.place == Place::Manager {
            Manager::new(self.shared.clone()).introspect_to_writer(&mut text, 2);
        }
        for child in self.children() {
            let name = child.rsplit('/').next().unwrap_or_default();
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  <node name=\"{name}\"/>");
        }
        text + "</node>\n"
    }
}

impl Folder {
    fn of(&self, place: Place) -> Self {
        Self { shared: self.shared.clone(), place }
    }

    /// Paths or names.
    fn children(&self) -> Vec<String> {
        let Shared { fleet, templates, .. } = &self.shared;
        match self.place {
            Place::Way(step) => vec![step.to_owned()],
            Place::Manager => {
                let below = PLACES.iter().filter(|(path, _)| path.len() > MANAGER_PATH.len());
                let there = below.filter(|(_, place)| !self.of(*place).children().is_empty());
                there.map(|(path, _)| (*path).to_owned()).collect()
            }
            Place::Vms => fleet.list().iter().map(|view| vm_path(&view.name)).collect(),
            Place::Networks => fleet.networks().iter().map(|(name, _)| network_path(name)).collect(),
            Place::Templates => templates.list().iter().map(|record| template_path(&record.name)).collect(),
            Place::Jobs => fleet.jobs().iter().map(|job| job_path(job.id)).collect(),
        }
    }
}
