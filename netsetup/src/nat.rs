//! Outgoing NAT: one nftables table of our own, `ip flotilla`, replaced as a whole in one transaction or not there at all. Nothing outside it
//! is read or changed; what other tables drop stays dropped. The kernel's switch for forwarding is looked at and never touched.
//!
//! By `nft` (8), in its own language: the one interface of nftables that is kept stable.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use ipnet::Ipv4Net;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::error::NetError;
use crate::name::check_plain;

/// The table's name, in the family `ip`.
pub(crate) const TABLE: &str = "flotilla";
/// Whether the kernel forwards between networks.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
/// `nft` takes milliseconds, or as long as somebody else changes a large ruleset.
const DEADLINE: Duration = Duration::from_secs(10);

/// A network whose machines reach others under the host's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NatNetwork {
    /// Its bridge.
    pub bridge: String,
    /// Its subnets.
    pub subnets: Vec<Ipv4Net>,
}

/// Whether the kernel forwards between networks at all; NAT does nothing without.
///
/// # Errors
/// [`NetError::Forwarding`] with what to do.
pub fn check_forwarding() -> Result<(), NetError> {
    match fs::read_to_string(FORWARDING) {
        Ok(text) if text.trim() != "0" => Ok(()),
        _ => Err(NetError::Forwarding),
    }
}

/// The table as `nft -f` reads it: whatever was in it before is gone with the same transaction. Without networks there is none.
///
/// From a network everything goes out; back come the answers, and what the administrator forwards to a machine (DNAT) on purpose. Between
/// the machines of an `isolated` bridge the host does not forward: it would lead around the bridge's own isolation.
///
/// # Errors
/// [`NetError::Name`] when a bridge's name could mean something else there.
pub fn nat_ruleset(networks: &[NatNetwork], isolated: &[String]) -> Result<String, NetError> {
    // The first line makes it, so that the second finds it.
    let mut text = "table ip flotilla\ndelete table ip flotilla\n".to_owned();
    if networks.is_empty() {
        return Ok(text);
    }
    let (mut out, mut forward) = (String::new(), String::new());
    for bridge in isolated {
        check_plain(bridge)?;
        let _ = writeln!(forward, "    iifname \"{bridge}\" oifname \"{bridge}\" drop");
    }
    for NatNetwork { bridge, subnets } in networks {
        check_plain(bridge)?;
        for subnet in subnets {
            let subnet = subnet.trunc();
            let _ = writeln!(
                out,
                "    ip saddr {subnet} ip daddr != {subnet} oifname != \"{bridge}\" masquerade"
            );
        }
        let into = format!("    iifname != \"{bridge}\" oifname \"{bridge}\"");
        let _ = write!(
            forward,
            "{into} ct state established,related accept\n{into} ct status dnat accept\n{into} drop\n"
        );
    }
    let _ = write!(
        text,
        "table ip flotilla {{\n  chain postrouting {{\n    type nat hook postrouting priority srcnat; policy accept;\n{out}  }}\n  \
         chain forward {{\n    type filter hook forward priority filter; policy accept;\n{forward}  }}\n}}\n"
    );
    Ok(text)
}

/// Gives the kernel a text of [`nat_ruleset`]: all of it or nothing.
///
/// # Errors
/// [`NetError::NftMissing`], [`NetError::Nft`] with what it says, [`NetError::Deadline`].
pub async fn apply_ruleset(text: &str) -> Result<(), NetError> {
    nft(&["-f", "-"], text).await.map(drop)
}

/// The table as the kernel has it, without counters: to be compared with what it was. An error when there is none.
///
/// # Errors
/// As [`apply_ruleset`].
pub async fn list_ruleset() -> Result<String, NetError> {
    nft(&["-s", "list", "table", "ip", TABLE], "").await
}

/// Runs `nft` with this input; what it prints.
async fn nft(arguments: &[&str], text: &str) -> Result<String, NetError> {
    let mut command = Command::new("nft");
    command.args(arguments).env("LC_ALL", "C").kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = async {
        let mut nft = command.spawn().map_err(|source| NetError::NftMissing { source })?;
        let fail = |source: io::Error| NetError::Nft { text: source.to_string() };
        if let Some(mut input) = nft.stdin.take() {
            // One that ends without having read everything says why.
            match input.write_all(text.as_bytes()).await {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(fail(error)),
                _ => {}
            }
        }
        let output = nft.wait_with_output().await.map_err(fail)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let first = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it does not say why");
        Err(NetError::Nft { text: first.trim().to_owned() })
    };
    match tokio::time::timeout(DEADLINE, run).await {
        Ok(done) => done,
        Err(_) => Err(NetError::Deadline {
            what: "take the table flotilla",
            name: "nft".to_owned(),
            after: DEADLINE,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(bridge: &str, subnets: &[&str]) -> NatNetwork {
        let subnets = subnets.iter().map(|subnet| subnet.parse().unwrap()).collect();
        NatNetwork { bridge: bridge.to_owned(), subnets }
    }

    #[test]
    fn without_networks_there_is_no_table() {
        let text = nat_ruleset(&[], &["flbr-a".to_owned()]).unwrap();
        assert_eq!(text, "table ip flotilla\ndelete table ip flotilla\n");
    }

    #[test]
    fn the_table() {
        let networks =
            [network("flbr-lan", &["10.5.0.1/24"]), network("br0", &["10.6.0.1/16", "10.8.0.1/24"])];
        let text = nat_ruleset(&networks, &["br0".to_owned()]).unwrap();
        assert_eq!(
            text,
            r#"table ip flotilla
delete table ip flotilla
table ip flotilla {
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 10.5.0.0/24 ip daddr != 10.5.0.0/24 oifname != "flbr-lan" masquerade
    ip saddr 10.6.0.0/16 ip daddr != 10.6.0.0/16 oifname != "br0" masquerade
    ip saddr 10.8.0.0/24 ip daddr != 10.8.0.0/24 oifname != "br0" masquerade
  }
  chain forward {
    type filter hook forward priority filter; policy accept;
    iifname "br0" oifname "br0" drop
    iifname != "flbr-lan" oifname "flbr-lan" ct state established,related accept
    iifname != "flbr-lan" oifname "flbr-lan" ct status dnat accept
    iifname != "flbr-lan" oifname "flbr-lan" drop
    iifname != "br0" oifname "br0" ct state established,related accept
    iifname != "br0" oifname "br0" ct status dnat accept
    iifname != "br0" oifname "br0" drop
  }
}
"#
        );
    }

    #[test]
    fn no_name_gets_out_of_its_quotes() {
        for name in ["br*", "a\"", "a\\", "$a", "a{b}", "a;b"] {
            let wrong = nat_ruleset(&[network(name, &["10.5.0.1/24"])], &[]);
            assert!(matches!(wrong, Err(NetError::Name { .. })), "{name}");
            let wrong = nat_ruleset(&[network("br0", &["10.5.0.1/24"])], &[name.to_owned()]);
            assert!(matches!(wrong, Err(NetError::Name { .. })), "{name}");
        }
    }
}
