//! Which number each port of the virtio-serial device has: `nr=` where it is written, the next free one where it is not.
//!
//! The first virtconsole is port 0, where a guest looks for its console before it knows of other ports (virtio 1.2 §5.3.2).

use super::invalid::{InvalidConfig, bad};
use super::{Device, DeviceDriver, VmConfig};

/// A port of the virtio-serial device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialPort {
    /// From 0; less than `max_ports` of the device.
    pub nr: u8,
    /// Id of the chardev behind it.
    pub chardev: String,
    /// A terminal (`virtconsole`) and not a plain stream of bytes.
    pub console: bool,
    /// How the guest finds it.
    pub name: Option<String>,
}

/// The ports in order of their number. Errors name the port that has no place.
pub(super) fn number(config: &VmConfig) -> Result<Vec<SerialPort>, InvalidConfig> {
    let mut max_ports = None;
    for Device { id, driver, .. } in &config.devices {
        if let DeviceDriver::VirtioSerial { max_ports: ports } = driver
            && max_ports.replace(*ports).is_some()
        {
            return bad(format!("device \"{id}\": a VM has one virtio-serial device only"));
        }
    }
    let mut wanted = Vec::new();
    for Device { id, driver, .. } in &config.devices {
        let (chardev, nr, console, name) = match driver {
            DeviceDriver::VirtConsole { chardev, nr } => (chardev, nr, true, None),
            DeviceDriver::VirtSerialPort { chardev, nr, name } => (chardev, nr, false, name.clone()),
            _ => continue,
        };
        let Some(max_ports) = max_ports else {
            return bad(format!(
                "device \"{id}\": there is no virtio-serial device to plug it into: add -device virtio-serial-device"
            ));
        };
        if nr.is_some_and(|nr| nr >= max_ports) {
            return bad(format!(
                "device \"{id}\": nr={} is not less than max_ports={max_ports} of the virtio-serial device",
                nr.unwrap_or_default()
            ));
        }
        if !console && *nr == Some(0) {
            return bad(format!(
                "device \"{id}\": Port number 0 on virtio-serial devices reserved for virtconsole device."
            ));
        }
        wanted.push((id, max_ports, SerialPort { nr: 0, chardev: chardev.clone(), console, name }, *nr));
    }
    // Numbers that were asked for come first, so that one without a wish does not sit on one of them.
    let mut ports: Vec<SerialPort> = Vec::with_capacity(wanted.len());
    wanted.sort_by_key(|(_, _, _, nr)| nr.is_none());
    for (id, max_ports, mut port, nr) in wanted {
        let free = |nr: &u8| !ports.iter().any(|p| p.nr == *nr);
        let first = if port.console { 0 } else { 1 };
        port.nr = match nr {
            Some(nr) if !free(&nr) => {
                return bad(format!("device \"{id}\": nr={nr} is taken by another port already"));
            }
            Some(nr) => nr,
            None => match (first..max_ports).find(free) {
                Some(nr) => nr,
                None => {
                    return bad(format!(
                        "device \"{id}\": no free port: raise max_ports={max_ports} of the virtio-serial device (31 at most)"
                    ));
                }
            },
        };
        ports.push(port);
    }
    ports.sort_by_key(|p| p.nr);
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(max_ports: u8, ports: &[(bool, Option<u8>)]) -> Result<Vec<(u8, String)>, String> {
        let device = |id: String, driver| Device { id, bus: None, addr: None, multifunction: false, driver };
        let mut config = VmConfig::default();
        for (i, (console, nr)) in ports.iter().enumerate() {
            let (chardev, nr) = (i.to_string(), *nr);
            let driver = if *console {
                DeviceDriver::VirtConsole { chardev, nr }
            } else {
                DeviceDriver::VirtSerialPort { chardev, nr, name: None }
            };
            config.devices.push(device(format!("p{i}"), driver));
        }
        config.devices.push(device("s".into(), DeviceDriver::VirtioSerial { max_ports }));
        let ports = config.serial_ports().map_err(|e| e.to_string())?;
        Ok(ports.into_iter().map(|p| (p.nr, p.chardev)).collect())
    }

    fn is(got: &Result<Vec<(u8, String)>, String>, want: &[(u8, &str)]) {
        let want: Vec<_> = want.iter().map(|(nr, chardev)| (*nr, (*chardev).to_owned())).collect();
        assert_eq!(*got, Ok(want));
    }

    #[test]
    fn consoles_start_at_0_ports_at_1_and_wishes_come_first() {
        is(&numbers(31, &[(false, None), (true, None), (true, None)]), &[(0, "1"), (1, "0"), (2, "2")]);
        is(
            &numbers(31, &[(false, None), (false, Some(1)), (true, Some(5))]),
            &[(1, "1"), (2, "0"), (5, "2")],
        );
        is(&numbers(1, &[(true, None)]), &[(0, "0")]);
    }

    #[test]
    fn says_which_port_has_no_place() {
        for (max, ports, want) in [
            (1, &[(false, None)][..], "device \"p0\": no free port"),
            (31, &[(false, Some(0))], "device \"p0\": Port number 0"),
            (4, &[(true, Some(4))], "device \"p0\": nr=4 is not less than max_ports=4"),
            (4, &[(true, Some(2)), (false, Some(2))], "device \"p1\": nr=2 is taken"),
        ] {
            let error = numbers(max, ports).unwrap_err();
            assert!(error.starts_with(want), "{error}");
        }
    }
}
