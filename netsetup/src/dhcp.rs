//! What dnsmasq (8) is told when it is the DHCP server of one bridge: owns the texts of its files. Pure: no system call.
//!
//! It answers those alone whose hardware address has an address of its own here, and nobody else on the bridge; it serves no names
//! (`port=0`), and hears nothing that does not come in by the bridge. What it hands out is written down elsewhere, so that its leases may be
//! forgotten at any time: with `dhcp-authoritative` clients go on with the address that they have.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::error::NetError;
use crate::name::check_plain;

/// More than a bridge has ports (BR_MAX_PORTS, 1024). dnsmasq's own limit is 1000.
const CLIENTS: u32 = 2048;

/// The DHCP server of a bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DhcpServer {
    /// The bridge.
    pub bridge: String,
    /// The subnet, by the bridge's own address in it.
    pub subnet: Ipv4Net,
    /// For how long a client may use its address before it asks again, in seconds; dnsmasq makes two minutes of less.
    pub lease: u32,
    /// The way to other networks; `None`: clients are told of none.
    pub router: Option<Ipv4Addr>,
    /// Who answers their questions for names; empty: they are told of nobody.
    pub dns: Vec<Ipv4Addr>,
    /// Largest packet of the network, in bytes; `None`: clients are not told.
    pub mtu: Option<u32>,
}

impl DhcpServer {
    /// The text of its configuration file.
    ///
    /// # Errors
    /// [`NetError::Name`] when the bridge's name could mean something else in that file.
    pub fn config(&self) -> Result<String, NetError> {
        check_plain(&self.bridge)?;
        let mut text = format!(
            "# Written by flotillad; changes are lost.\n\
             port=0\nno-resolv\nno-hosts\nno-ping\n\
             interface={}\nexcept-interface=lo\nbind-interfaces\n\
             dhcp-authoritative\ndhcp-ignore=tag:!known\ndhcp-lease-max={CLIENTS}\n\
             dhcp-range={},static,{},{}\n",
            self.bridge,
            self.subnet.network(),
            self.subnet.netmask(),
            self.lease,
        );
        let mut option = |name: &str, values: &[Ipv4Addr]| {
            // Without a value: it is not told at all. Left to itself dnsmasq names itself as router and for names.
            let values: String = values.iter().map(|value| format!(",{value}")).collect();
            // Writing into a text cannot fail.
            let _ = writeln!(text, "dhcp-option=option:{name}{values}");
        };
        option("router", self.router.as_slice());
        option("dns-server", &self.dns);
        if let Some(mtu) = self.mtu.and_then(|mtu| u16::try_from(mtu).ok()) {
            let _ = writeln!(text, "dhcp-option=option:mtu,{mtu}");
        }
        Ok(text)
    }
}

/// The text of the file of those who have an address.
#[must_use]
pub fn dhcp_hosts(hosts: impl IntoIterator<Item = ([u8; 6], Ipv4Addr)>) -> String {
    let mut text = String::new();
    for ([a, b, c, d, e, f], address) in hosts {
        let _ = writeln!(text, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x},{address}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> DhcpServer {
        DhcpServer {
            bridge: "flbr-lan".to_owned(),
            subnet: "10.5.0.1/24".parse().unwrap(),
            lease: 3600,
            router: None,
            dns: Vec::new(),
            mtu: None,
        }
    }

    #[test]
    fn the_least_is_told() {
        let text = server().config().unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for line in [
            "port=0",
            "interface=flbr-lan",
            "bind-interfaces",
            "dhcp-ignore=tag:!known",
            "dhcp-range=10.5.0.0,static,255.255.255.0,3600",
            "dhcp-option=option:router",
            "dhcp-option=option:dns-server",
        ] {
            assert!(lines.contains(&line), "{line}:\n{text}");
        }
        assert!(!text.contains("mtu"), "{text}");
    }

    #[test]
    fn and_what_was_asked_for() {
        let ip = |text: &str| text.parse().unwrap();
        let all = DhcpServer {
            router: Some(ip("10.5.0.1")),
            dns: vec![ip("9.9.9.9"), ip("10.5.0.3")],
            mtu: Some(1400),
            ..server()
        };
        let text = all.config().unwrap();
        for line in ["option:router,10.5.0.1\n", "option:dns-server,9.9.9.9,10.5.0.3\n", "option:mtu,1400\n"]
        {
            assert!(text.contains(line), "{line}:\n{text}");
        }
        assert_eq!(
            dhcp_hosts([([0x52, 0x54, 0, 0, 0, 0xa], ip("10.5.0.2")), ([2, 0, 0, 0, 0, 1], ip("10.5.0.3"))]),
            "52:54:00:00:00:0a,10.5.0.2\n02:00:00:00:00:01,10.5.0.3\n"
        );
    }

    #[test]
    fn a_name_that_means_more_than_itself_is_refused() {
        for name in ["br*", "br\"0", "br$0", "#br", "a=b", "br\\", "br;0", "-br"] {
            let server = DhcpServer { bridge: name.to_owned(), ..server() };
            assert!(matches!(server.config(), Err(NetError::Name { .. })), "{name}");
        }
    }
}
