//! NAT and DHCP on real links: `nft` and `dnsmasq` do what our texts say, seen from machines behind a bridge.
//!
//! Needs root, `nft` (package nftables), `dnsmasq` (package dnsmasq-base) and `busybox`: without them every test here **fails and says so**.

use std::path::Path;
use std::process::Command;

use crate::space::{Peer, in_namespace, ip};
use netsetup::{
    BridgeSpec, DhcpServer, NatNetwork, Net, NetError, apply_ruleset, check_forwarding, dhcp_hosts,
    nat_ruleset,
};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

async fn bridge(net: &Net, name: &str, address: &str) {
    let addresses = vec![address.parse().unwrap()];
    net.ensure_bridge(&BridgeSpec { name: name.to_owned(), addresses, mtu: None }).await.unwrap();
}

fn network(bridge: &str, subnet: &str) -> NatNetwork {
    NatNetwork { bridge: bridge.to_owned(), subnets: vec![subnet.parse().unwrap()] }
}

fn nft(arguments: &str) -> String {
    let output = Command::new("nft").args(arguments.split(' ')).output().expect("these tests need nft");
    assert!(output.status.success(), "nft {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn forward(on: bool) {
    // What this thread sees here is of its own namespace.
    std::fs::write("/proc/sys/net/ipv4/ip_forward", if on { "1" } else { "0" }).unwrap();
}

/// A machine on a bridge, at `host` of its subnet of 24 bits.
fn machine(bridge: &str, port: &str, address: &str, router: &str) -> Peer {
    let peer = Peer::new();
    peer.plug(port, "eth0");
    ip(&format!("link set {port} master {bridge}"));
    peer.ok(&format!("ip address add {address}/24 dev eth0"));
    peer.ok(&format!("ip route add default via {router}"));
    peer
}

fn reaches(from: &Peer, address: &str) -> bool {
    // Ports of a bridge come up a moment after their cable.
    from.run(&format!("busybox ping -q -c 1 -W 1 -w 10 {address}")).status.success()
}

fn is_shut_out(from: &Peer, address: &str) -> bool {
    !from.run(&format!("busybox ping -q -c 1 -W 1 {address}")).status.success()
}

#[test]
fn machines_reach_out_under_the_hosts_address_and_nobody_reaches_in() {
    in_namespace(|net| async move {
        forward(false);
        assert!(matches!(check_forwarding(), Err(NetError::Forwarding)));
        forward(true);
        check_forwarding().unwrap();
        nft("add table ip theirs");
        bridge(&net, "flbr-lan", "10.5.0.1/24").await;
        let one = machine("flbr-lan", "one0", "10.5.0.2", "10.5.0.1");
        // Outside knows the host's address, and has no way to the network's.
        let outside = Peer::new();
        outside.plug("up0", "eth0");
        ip("address add 192.0.2.1/24 dev up0");
        outside.ok("ip address add 192.0.2.2/24 dev eth0");
        assert!(reaches(&one, "10.5.0.1"));
        assert!(is_shut_out(&one, "192.0.2.2"));

        let text = nat_ruleset(&[network("flbr-lan", "10.5.0.1/24")], &[]).unwrap();
        for _ in 0..2 {
            // Again changes nothing: no rule is there twice.
            apply_ruleset(&text).await.unwrap();
            assert_eq!(nft("list table ip flotilla").matches("masquerade").count(), 1);
        }
        assert!(reaches(&one, "192.0.2.2"));
        // Whoever finds the way is shut out all the same, but for what the administrator lets in.
        outside.ok("ip route add 10.5.0.0/24 via 192.0.2.1");
        assert!(is_shut_out(&outside, "10.5.0.2"));
        nft("add chain ip theirs pre { type nat hook prerouting priority dstnat; }");
        nft("add rule ip theirs pre iifname up0 ip daddr 192.0.2.1 dnat to 10.5.0.2");
        assert!(reaches(&outside, "192.0.2.1"));

        apply_ruleset(&nat_ruleset(&[], &[]).unwrap()).await.unwrap();
        let tables = nft("list tables");
        assert!(tables.contains("theirs") && !tables.contains("flotilla"), "{tables}");
        apply_ruleset(&nat_ruleset(&[], &[]).unwrap()).await.unwrap();
    });
}

#[test]
fn the_host_leads_nobody_around_the_isolation_of_a_bridge() {
    in_namespace(|net| async move {
        forward(true);
        bridge(&net, "flbr-lan", "10.5.0.1/24").await;
        let one = machine("flbr-lan", "one0", "10.5.0.2", "10.5.0.1");
        let two = machine("flbr-lan", "two0", "10.5.0.3", "10.5.0.1");
        for port in ["one0", "two0"] {
            ip(&format!("link set {port} type bridge_slave isolated on"));
        }
        // Everything over the router, as a machine does that wants around.
        for (machine, other) in [(&one, "10.5.0.3"), (&two, "10.5.0.2")] {
            machine.ok(&format!("ip route add {other} via 10.5.0.1"));
        }
        std::fs::write("/proc/sys/net/ipv4/conf/all/send_redirects", "0").unwrap();
        assert!(reaches(&one, "10.5.0.3"), "this is the way around");
        let lan = [network("flbr-lan", "10.5.0.1/24")];
        apply_ruleset(&nat_ruleset(&lan, &["flbr-lan".to_owned()]).unwrap()).await.unwrap();
        assert!(is_shut_out(&one, "10.5.0.3"));
        assert!(reaches(&one, "10.5.0.1"));
    });
}

#[test]
fn what_nft_does_not_take_is_told_in_its_words_and_leaves_what_was_there() {
    in_namespace(|_| async move {
        let text = nat_ruleset(&[network("flbr-lan", "10.5.0.1/24")], &[]).unwrap();
        apply_ruleset(&text).await.unwrap();
        let before = nft("list ruleset");
        let error =
            apply_ruleset(&(text + "table ip flotilla { chain broken { nonsense } }\n")).await.unwrap_err();
        assert!(matches!(&error, NetError::Nft { text } if text.contains("syntax error")), "{error}");
        assert_eq!(nft("list ruleset"), before);
    });
}

/// dnsmasq with our files, as its unit runs it but for the user.
struct Dnsmasq(Option<i32>);

impl Dnsmasq {
    fn start(folder: &Path, config: &str, hosts: &str) -> Dnsmasq {
        for (name, text) in [("conf", config), ("hosts", hosts)] {
            std::fs::write(folder.join(name), text).unwrap();
        }
        let path = |name: &str| folder.join(name).display().to_string();
        let output = Command::new("dnsmasq")
            .arg(format!("--conf-file={}", path("conf")))
            .arg(format!("--dhcp-hostsfile={}", path("hosts")))
            .arg(format!("--dhcp-leasefile={}", path("leases")))
            .arg(format!("--pid-file={}", path("pid")))
            .arg(format!("--log-facility={}", path("log")))
            .arg("--user=root")
            .output()
            .expect("these tests need dnsmasq (package dnsmasq-base)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Dnsmasq(Some(std::fs::read_to_string(path("pid")).unwrap().trim().parse().unwrap()))
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.unwrap()), signal).unwrap();
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        self.signal(nix::sys::signal::Signal::SIGKILL);
    }
}

/// What a client on a cable is told, as udhcpc's variables; `None`: nobody answers.
fn lease(client: &Peer, folder: &Path, tries: u32) -> Option<String> {
    let script = folder.join("script");
    std::fs::write(
        &script,
        "#!/bin/sh\n[ \"$1\" = bound ] && echo \"$ip/$mask router=$router dns=$dns mtu=$mtu\"\nexit 0\n",
    )
    .unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = client
        .run(&format!("busybox udhcpc -f -q -n -t {tries} -T 1 -O mtu -i eth0 -s {}", script.display()));
    let text = String::from_utf8(output.stdout).unwrap();
    output.status.success().then(|| text.trim().to_owned())
}

#[test]
fn each_machine_gets_the_address_that_is_its_own_and_strangers_none() {
    in_namespace(|net| async move {
        let folder = std::env::temp_dir().join(format!("netsetup-dhcp-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        bridge(&net, "flbr-lan", "10.5.0.1/24").await;
        bridge(&net, "flbr-two", "10.6.0.1/24").await;
        let client = |bridge: &str, port: &str, mac: &str| {
            let peer = Peer::new();
            peer.plug(port, "eth0");
            ip(&format!("link set {port} master {bridge}"));
            peer.ok(&format!("ip link set eth0 address {mac}"));
            peer
        };
        let known = client("flbr-lan", "one0", "52:54:00:00:00:01");
        let stranger = client("flbr-lan", "two0", "52:54:00:00:00:02");
        let elsewhere = client("flbr-two", "three0", "52:54:00:00:00:01");
        let server = DhcpServer {
            bridge: "flbr-lan".to_owned(),
            subnet: "10.5.0.1/24".parse().unwrap(),
            lease: 600,
            router: Some("10.5.0.1".parse().unwrap()),
            dns: vec!["9.9.9.9".parse().unwrap()],
            mtu: Some(1400),
        };
        let at = |last: u8| std::net::Ipv4Addr::new(10, 5, 0, last);
        let config = server.config().unwrap();
        let dnsmasq = Dnsmasq::start(&folder, &config, &dhcp_hosts([(MAC, at(7))]));
        let all = "10.5.0.7/24 router=10.5.0.1 dns=9.9.9.9 mtu=1400";
        assert_eq!(lease(&known, &folder, 10).as_deref(), Some(all));
        assert_eq!(lease(&stranger, &folder, 1), None);
        assert_eq!(lease(&elsewhere, &folder, 1), None);
        assert!(ip("-4 -o address show flbr-two").contains("10.6.0.1"));

        // One that comes later is known after a word, and nobody has to be asked twice.
        let two = [0x52, 0x54, 0, 0, 0, 2];
        std::fs::write(folder.join("hosts"), dhcp_hosts([(MAC, at(7)), (two, at(9))])).unwrap();
        dnsmasq.signal(nix::sys::signal::Signal::SIGHUP);
        assert!(lease(&stranger, &folder, 10).is_some_and(|told| told.starts_with("10.5.0.9/24 ")));
        drop(dnsmasq);

        // Another server knows no lease; the address that was one machine's is another's at once, and nothing is told that was not asked for.
        for name in ["leases", "pid"] {
            let _ = std::fs::remove_file(folder.join(name));
        }
        let plain = DhcpServer { router: None, dns: Vec::new(), mtu: None, ..server };
        let _dnsmasq = Dnsmasq::start(&folder, &plain.config().unwrap(), &dhcp_hosts([(two, at(7))]));
        assert_eq!(lease(&stranger, &folder, 10).as_deref(), Some("10.5.0.7/24 router= dns= mtu="));
        std::fs::remove_dir_all(&folder).unwrap();
    });
}
