//! Where each PCI device is: `bus=` and `addr=` as they are written, and the first free slot where the line says slot 0, which is the host bridge's.

use std::collections::BTreeMap;

use super::invalid::{InvalidConfig, bad};
use super::{Device, DeviceDriver, VmConfig, cmdline};

/// Name of the root bus.
pub const ROOT_BUS: &str = "pcie.0";
const HOST_BRIDGE: u8 = 0;
const LPC: u8 = 31;

/// Slot and function on a PCI bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciAddr {
    /// 0 to 31.
    pub slot: u8,
    /// 0 to 7.
    pub function: u8,
}

impl std::str::FromStr for PciAddr {
    type Err = ();

    /// `slot[.function]`, each decimal or hexadecimal.
    fn from_str(text: &str) -> Result<Self, ()> {
        let part = |text: &str, limit: u8| {
            let number = cmdline::number(text).and_then(|n| u8::try_from(n).ok());
            number.filter(|n| *n < limit).ok_or(())
        };
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        Ok(Self { slot: part(slot, 32)?, function: part(function, 8)? })
    }
}

/// Where a PCI device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PciPlace {
    /// On the root bus.
    Root(PciAddr),
    /// In the slot of the root port of this name.
    Port(String),
}

/// The places in order of the devices. Errors name the device that has none.
pub(super) fn places(config: &VmConfig) -> Result<Vec<Option<PciPlace>>, InvalidConfig> {
    let is_port = |name: &str| {
        let port = |d: &&Device| matches!(d.driver, DeviceDriver::PcieRootPort { .. });
        config.devices.iter().filter(port).any(|d| d.id == name)
    };
    let mut taken: BTreeMap<(u8, u8), &Device> = BTreeMap::new();
    let mut behind: Vec<&str> = Vec::new();
    let mut places = Vec::with_capacity(config.devices.len());
    for device in &config.devices {
        let id = &device.id;
        if matches!(device.driver, DeviceDriver::VirtConsole { .. } | DeviceDriver::VirtSerialPort { .. }) {
            places.push(None);
            continue;
        }
        let (Some(bus), Some(addr)) = (&device.bus, device.addr) else {
            return bad(format!(
                "device \"{id}\": a q35 has PCI devices only: use the -pci driver, with bus=pcie.0,addr=0x0 for the first free slot"
            ));
        };
        if bus != ROOT_BUS {
            if !is_port(bus) {
                return bad(format!(
                    "device \"{id}\": bus \"{bus}\" not found: use pcie.0, or add -device pcie-root-port,id={bus},bus=pcie.0,addr=…"
                ));
            }
            if matches!(device.driver, DeviceDriver::PcieRootPort { .. }) {
                return bad(format!("device \"{id}\": a root port is on pcie.0 only"));
            }
            // Whoever lets a device go that has a slot of its own must be able to do without it.
            if device.driver.memory().is_some() {
                return bad(format!(
                    "device \"{id}\" brings memory, which cannot leave a running VM: write bus={ROOT_BUS}"
                ));
            }
            if addr != (PciAddr { slot: 0, function: 0 }) {
                return bad(format!(
                    "device \"{id}\": there is one place behind a root port: write addr=0x0"
                ));
            }
            if behind.contains(&bus.as_str()) {
                return bad(format!("Location of the device {id} is same as one of the bus {bus}"));
            }
            behind.push(bus);
            places.push(Some(PciPlace::Port(bus.clone())));
            continue;
        }
        let automatic = addr == PciAddr { slot: HOST_BRIDGE, function: 0 };
        if !automatic {
            let reserved = matches!(addr.slot, HOST_BRIDGE | LPC);
            if reserved || taken.insert((addr.slot, addr.function), device).is_some() {
                return bad(format!("Location of the device {id} is same as one of the bus {bus}"));
            }
        }
        places.push(Some(PciPlace::Root(addr)));
    }
    // Behind those that say where they are.
    for (device, place) in config.devices.iter().zip(&mut places) {
        let Some(PciPlace::Root(addr)) = place else { continue };
        if addr.slot != HOST_BRIDGE {
            continue;
        }
        let free = (HOST_BRIDGE + 1..LPC).find(|slot| (0..8).all(|f| !taken.contains_key(&(*slot, f))));
        let Some(slot) = free else {
            return bad(format!("device \"{}\": no slot of pcie.0 is free", device.id));
        };
        *addr = PciAddr { slot, function: 0 };
        taken.insert((slot, 0), device);
    }
    // A driver looks at functions above 0 only where function 0 says that there are some.
    for ((slot, function), device) in &taken {
        let first = taken.get(&(*slot, 0)).filter(|d| d.multifunction);
        if *function != 0 && first.is_none() {
            return bad(format!(
                "device \"{}\": function 0 of slot {slot:#x} must be there with multifunction=on",
                device.id
            ));
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places_of(line: &[(&str, &str, (u8, u8), bool)]) -> Result<Vec<Option<PciPlace>>, String> {
        let mut config = VmConfig::default();
        for (id, bus, (slot, function), multifunction) in line {
            let driver = if id.starts_with("pcie") {
                DeviceDriver::PcieRootPort { port: 0 }
            } else {
                DeviceDriver::VirtioRng { rng: "r".into(), limit: None }
            };
            config.devices.push(Device {
                id: (*id).into(),
                bus: Some((*bus).into()),
                addr: Some(PciAddr { slot: *slot, function: *function }),
                multifunction: *multifunction,
                driver,
            });
        }
        places(&config).map_err(|e| e.to_string())
    }

    #[test]
    fn devices_are_where_the_line_says_and_the_rest_fills_up() {
        let root = |slot, function| Some(PciPlace::Root(PciAddr { slot, function }));
        let found = places_of(&[
            ("a", ROOT_BUS, (0, 0), false),
            ("b", ROOT_BUS, (1, 0), true),
            ("c", ROOT_BUS, (1, 7), false),
            ("pcie.1", ROOT_BUS, (3, 0), false),
            ("d", "pcie.1", (0, 0), false),
            ("e", ROOT_BUS, (0, 0), false),
        ]);
        let port = Some(PciPlace::Port("pcie.1".into()));
        assert_eq!(found.unwrap(), [root(2, 0), root(1, 0), root(1, 7), root(3, 0), port, root(4, 0)]);
    }

    #[test]
    fn says_which_device_has_no_place() {
        type Line<'a> = &'a [(&'a str, &'a str, (u8, u8), bool)];
        let cases: [(Line<'_>, &str); 7] = [
            (&[("a", ROOT_BUS, (2, 0), false), ("b", ROOT_BUS, (2, 0), false)], "Location of the device b"),
            (&[("a", ROOT_BUS, (31, 0), false)], "Location of the device a"),
            (&[("a", ROOT_BUS, (0, 1), false)], "Location of the device a"),
            (&[("a", "pcie.9", (0, 0), false)], "bus \"pcie.9\" not found"),
            (&[("pcie.1", ROOT_BUS, (1, 0), false), ("a", "pcie.1", (1, 0), false)], "write addr=0x0"),
            (&[("pcie.1", ROOT_BUS, (1, 0), false), ("pcie.2", "pcie.1", (0, 0), false)], "on pcie.0 only"),
            (&[("a", ROOT_BUS, (2, 0), false), ("b", ROOT_BUS, (2, 1), false)], "multifunction=on"),
        ];
        for (line, text) in cases {
            let error = places_of(line).unwrap_err();
            assert!(error.contains(text), "{error}");
        }
        let many: Vec<_> = (0..31).map(|_| ("a", ROOT_BUS, (0, 0), false)).collect();
        assert!(places_of(&many[..30]).is_ok());
        assert!(places_of(&many).unwrap_err().contains("no slot of pcie.0 is free"));
    }
}
