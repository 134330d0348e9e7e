//! The installed bus policy and polkit actions name exactly what the API has: a method that is missing there could not be called.

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    const PROXIES: &str = include_str!("../src/proxy.rs");
    const POLICY: &str = include_str!("../../units/org.flotilla.Flotilla1.conf");
    const ACTIONS: &str = include_str!("../../units/org.flotilla.flotilla1.policy");

    /// `get_vm_by_uuid` is `GetVmByUuid` on the bus.
    fn on_the_bus(name: &str) -> String {
        let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
        name.split('_').map(capital).collect()
    }

    /// Interface and member of every method of the Manager and of VMs; signals and properties have an attribute of their own before them.
    fn methods() -> BTreeSet<(String, String)> {
        let mut found = BTreeSet::new();
        let (mut interface, mut is_method) = ("", true);
        for line in PROXIES.lines().map(str::trim) {
            if let Some(rest) = line.strip_prefix("pub trait ") {
                interface = rest.trim_end_matches(" {");
            } else if line.starts_with("#[zbus(signal") || line.starts_with("#[zbus(property") {
                is_method = false;
            } else if let Some(rest) = line.strip_prefix("fn ") {
                let name = rest.split('(').next().unwrap();
                if is_method {
                    found.insert((interface.to_owned(), on_the_bus(name)));
                }
                is_method = true;
            }
        }
        found
    }

    #[test]
    fn the_bus_lets_every_method_through_and_no_other() {
        let attribute = |line: &str, name: &str| {
            let rest = line.split(&format!("{name}=\"")).nth(1)?;
            rest.split('"').next().map(str::to_owned)
        };
        let allowed: BTreeSet<_> = POLICY
            .lines()
            .filter_map(|line| {
                let interface = attribute(line, "send_interface")?;
                let interface = interface.strip_prefix("org.flotilla.Flotilla1.")?.to_owned();
                Some((interface, attribute(line, "send_member")?))
            })
            .collect();
        let methods = methods();
        assert!(methods.contains(&("Manager".to_owned(), "ListVms".to_owned())));
        assert!(methods.contains(&("Vm".to_owned(), "OpenConsole".to_owned())));
        assert_eq!(methods, allowed);
    }

    #[test]
    fn every_action_is_defined() {
        for action in [
            dbus_api::ACTION_MANAGE,
            dbus_api::ACTION_HOST,
            dbus_api::ACTION_NETWORK,
            dbus_api::ACTION_CONSOLE,
            dbus_api::ACTION_QMP_QUERY,
            dbus_api::ACTION_QMP,
        ] {
            assert!(ACTIONS.contains(&format!("<action id=\"{action}\">")), "{action}");
        }
    }
}
