//! A network that needs no hand work: Debian guests get their addresses by themselves, the fleet shows them, they reach the world under the
//! host's address and not each other; and everything is gone with the network.

use tests::fleet::Fleet;
use tests::host::Host;
use tests::scenario::{EMULATED, Guest, Outcome, SOON, check, step};

/// Runs on a host with the package.
pub(crate) fn networks(host: &Host, fleet: &Fleet<'_>) -> Outcome {
    step("a network with addresses and a way out, by one command");
    host.ok("sysctl -q -w net.ipv4.ip_forward=0; nft add table ip theirs")?;
    let said = host.ok(
        "flotilla network define lan --address 10.5.0.1/24 --isolated --nat --dhcp 10.5.0.100-10.5.0.120 --dns 192.0.2.2 2>&1",
    )?;
    check(said.contains("ip_forward"), || format!("the host does not forward, and nobody says so: {said}"))?;
    for command in ["flotilla network show lan", "flotilla doctor"] {
        let said = host.ok(&format!("{command} || true"))?;
        check(said.contains("ip_forward"), || format!("{command}: {said}"))?;
    }
    host.ok("sysctl -q -w net.ipv4.ip_forward=1")?;
    let healthy = "flotilla network show lan --json | jq -e '.problems == []'";
    host.eventually(SOON, healthy)?;
    let server = serves(host)?;
    let user = host.ok(&format!("stat -c %u /proc/{server}"))?;
    check(user != "0", || "the DHCP server runs as root".into())?;
    let exposure = host.ok("systemd-analyze security --no-pager flotilla-dhcp@lan.service | tail -n 1")?;
    step(format!("  {exposure}"));

    step("two guests that know nothing of it");
    let guests = [guest(host, fleet, "one", 1)?, guest(host, fleet, "two", 2)?];
    host.ok("flotilla start one two")?;
    for guest in &guests {
        step(format!("{} is at {}, by the list, and answers there", guest.name, guest.address));
        guest.answers(host)?;
    }
    let [one, two] = &guests;

    step("they reach an address behind the host, which knows no way back to theirs; and not each other");
    host.ok("ip netns add outside && ip link add up0 type veth peer name eth0 netns outside && ip link set up0 up && \
             ip address add 192.0.2.1/24 dev up0 && ip -n outside link set eth0 up && ip -n outside address add 192.0.2.2/24 dev eth0")?;
    let reaches = |from: &Guest, address: &str| -> Outcome<bool> {
        let mut console = fleet.console(&from.name)?;
        console.enter("")?;
        let ping = format!("busybox ping -c 2 -W 5 {address} > /dev/null && echo yes || echo no");
        let answer = console.shell(&ping, SOON)?;
        drop(console);
        host.eventually(SOON, &format!("! pgrep -f '[f]lotilla console {} '", from.name))?;
        Ok(answer == "yes")
    };
    check(reaches(one, "192.0.2.2")?, || "no way out".into())?;
    check(!reaches(one, &two.address)?, || "they are not isolated".into())?;
    host.refused(&format!("ip netns exec outside ping -c 1 -W 2 {}", one.address))?;

    step("the server outlives the daemon, and comes back when it dies");
    let daemon = host.ok("systemctl show -P MainPID flotillad")?;
    host.ok(&format!("kill -9 {daemon}"))?;
    host.eventually(SOON, &format!("systemctl is-active flotillad && [ $(systemctl show -P MainPID flotillad) != {daemon} ] && {healthy}"))?;
    check(serves(host)? == server, || "the server was started anew with the daemon".into())?;
    host.ok(&format!("kill -9 {server}"))?;
    host.eventually(SOON, &format!("systemctl is-active flotilla-dhcp@lan && [ $(systemctl show -P MainPID flotilla-dhcp@lan) != {server} ] && {healthy}"))?;
    step("a guest that starts again has the address that it had");
    host.ok("flotilla stop --now two && flotilla start two")?;
    two.answers(host)?;

    step("nothing is left of it, and nothing else is missing");
    host.refused("flotilla network rm lan")?;
    host.ok("flotilla stop --now one two && flotilla rm one two && flotilla network rm lan")?;
    let left = host.ok(
        "systemctl list-units --no-legend --all 'flotilla-dhcp@*'; ls /run/flotilla/dhcp /run/flotilla-dhcp /var/lib/flotilla/leases 2>/dev/null | grep lan; \
         ip -o link show | grep -o flbr-lan; nft list tables | grep flotilla; pgrep -a dnsmasq; true",
    )?;
    check(left.is_empty(), || format!("left: {left}"))?;
    host.ok("nft list table ip theirs && ip link show br0 && ip link show up0 && [ $(cat /proc/sys/net/ipv4/ip_forward) = 1 ]")?;
    Ok(())
}

/// The process of the network's server.
fn serves(host: &Host) -> Outcome<String> {
    host.ok("systemctl is-active flotilla-dhcp@lan")?;
    Ok(host.ok("systemctl show -P MainPID flotilla-dhcp@lan")?)
}

/// A guest that asks for its address; the fleet knows it beforehand.
fn guest(host: &Host, fleet: &Fleet<'_>, name: &str, number: u8) -> Outcome<Guest> {
    let mut guest = Guest::new(host, name, number)?;
    let mut definition = guest.definition();
    definition["append"] = format!("{EMULATED} guest.name={name} guest.ip=dhcp").into();
    definition["nics"] = serde_json::json!([{ "network": "lan" }]);
    host.write(&format!("/root/{name}.json"), definition.to_string())?;
    host.ok(&format!("flotilla define /root/{name}.json"))?;
    let rows = fleet.list()?;
    let row = rows.iter().find(|row| row["name"] == name).ok_or("it is not listed")?;
    let address = row["addresses"][0].as_str().ok_or_else(|| format!("no address: {row}"))?;
    let shown = fleet.shown(name, "nics[0].address")?;
    check(shown == address, || format!("list says {address}, show says {shown}"))?;
    address.clone_into(&mut guest.address);
    Ok(guest)
}
