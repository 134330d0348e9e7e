//! The address of a PCI function of the host.

/// A PCI function of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostAddress(String);

impl std::str::FromStr for HostAddress {
    type Err = ();

    /// `domain:bus:slot.function`, as sysfs names it: nothing else can be part of a path.
    fn from_str(text: &str) -> Result<Self, ()> {
        let hex = |part: Option<&str>, digits: usize, limit: u32| {
            let part = part.filter(|p| p.len() == digits && p.bytes().all(|b| b.is_ascii_hexdigit()));
            part.and_then(|p| u32::from_str_radix(p, 16).ok()).filter(|n| *n < limit).ok_or(())
        };
        let mut parts = text.split(':');
        let (domain, bus) = (hex(parts.next(), 4, 0x1_0000)?, hex(parts.next(), 2, 0x100)?);
        let (slot, function) = parts.next().and_then(|rest| rest.split_once('.')).ok_or(())?;
        let (slot, function) = (hex(Some(slot), 2, 32)?, hex(Some(function), 1, 8)?);
        if parts.next().is_some() {
            return Err(());
        }
        Ok(Self(format!("{domain:04x}:{bus:02x}:{slot:02x}.{function}")))
    }
}

impl HostAddress {
    /// The address out of `host=` and `sysfsdev=`, of which there must be one, not checked yet.
    pub fn given(host: Option<String>, sysfsdev: Option<String>) -> Option<String> {
        match (host, sysfsdev) {
            (Some(host), None) => Some(host),
            (None, Some(path)) => Some(path.trim_end_matches('/').rsplit('/').next()?.to_owned()),
            _ => None,
        }
    }

    /// As sysfs names it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for HostAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_two_says_it() {
        let given = |host: Option<&str>, path: Option<&str>| {
            HostAddress::given(host.map(Into::into), path.map(Into::into))
        };
        assert_eq!(given(Some("a"), None).as_deref(), Some("a"));
        assert_eq!(given(None, Some("/sys/bus/pci/devices/b/")).as_deref(), Some("b"));
        assert_eq!((given(None, None), given(Some("a"), Some("a"))), (None, None));
    }

    #[test]
    fn an_address_is_one_and_nothing_else() {
        for good in ["0000:1a:00.3", "ffff:FF:1f.7"] {
            let address: HostAddress = good.parse().unwrap();
            assert_eq!(address.to_string(), good.to_lowercase());
        }
        for bad in [
            "",
            "1a:00.3",
            "0000:1a:00",
            "0000:1a:00.8",
            "0000:1a:20.0",
            "0000:1a:00.3:0",
            "0000:1a:00.3 ",
            "0000:+a:00.3",
            "../..:1a:00.3",
            "0000:1a:00.33",
            "00000:1a:00.3",
        ] {
            assert!(bad.parse::<HostAddress>().is_err(), "{bad}");
        }
    }
}
