//! An installed package with a pool: a Debian VM becomes a template while it runs, and clones of it take units that wait. Each has a name and an address
//! of its own, is found in the journal by its name and by the next daemon in its unit, and is a VM like any other afterwards.

use std::time::{Duration, Instant};

use tests::fleet::Fleet;
use tests::host::Host;
use tests::scenario::{BOOT, Guest, Outcome, SOON, check, host_with_package, step};

/// Spares that wait.
const POOL: usize = 3;

/// Runs in the guest that is cloned: when a clone's disk with its identity comes, the guest takes its name, the hardware address of its card, and an
/// address by its number. Sectors 1 to 7 of the disk are its meta-data.
const LEARN: &str = r#"(nohup sh -c 'until [ -b /dev/vdb ]; do sleep 0.2; done
until m=$(dd if=/dev/vdb bs=512 skip=1 count=7 2>/dev/null | tr -d "\000") && [ -n "$m" ]; do sleep 0.2; done
n=$(echo "$m" | sed -n "s/.*\"local-hostname\": \"\(.*\)\".*/\1/p"); k=$(echo "$m" | sed -n "s/.*\"number\": \([0-9]*\).*/\1/p")
a=$(echo "$m" | grep -o "..:..:[0-9a-f:]*" | head -1); busybox ip link set eth0 address $a
hostname $n; busybox ip addr flush dev eth0; busybox ip addr add 10.9.0.$((100 + k))/24 dev eth0' >/dev/null 2>&1 &)"#;

#[test]
fn clones_of_a_debian_vm_take_units_that_wait() -> Outcome {
    let host = host_with_package("clones")?;
    let fleet = Fleet::on(&host);
    let outcome = clones(&host, &fleet);
    if outcome.is_err() {
        fleet.tell();
    }
    outcome
}

/// Sets the pool's size.
fn pool(host: &Host, size: usize) -> Outcome {
    host.write("/etc/flotilla/flotillad.toml", format!("[pool]\nsize = {size}\n"))?;
    host.ok("systemctl restart flotillad && flotilla list")?;
    Ok(())
}

/// Waits until so many spares wait, and so many units of spares are there, with a VM or without.
fn spares(host: &Host, waiting: usize, units: usize) -> Outcome {
    let count = "systemctl list-units --all --plain --no-legend 'flotilla-vm@Spare-*' | grep -c .";
    let reached = format!(
        "pgrep -x flotilla-exec; test $(pgrep -xc flotilla-exec) = {waiting} && test $({count}) = {units}"
    );
    host.eventually(BOOT, &reached)?;
    Ok(())
}

fn clones(host: &Host, fleet: &Fleet<'_>) -> Outcome {
    step("a pool is filled");
    pool(host, POOL)?;
    spares(host, POOL, POOL)?;

    step("a Debian VM runs, and becomes a template without a pause that it notices");
    let web = Guest::new(host, "web", 1)?;
    fleet.define(&web)?;
    host.ok("flotilla start web")?;
    web.answers(host)?;
    let mut console = fleet.console("web")?;
    console.enter("")?;
    console.shell(&LEARN.replace('\n', "; "), SOON)?;
    drop(console);
    host.ok_for(BOOT, "flotilla template create web base")?;
    web.answers(host)?;

    step("three clones come from the pool");
    let began = Instant::now();
    host.ok_for(BOOT, "flotilla clone base --count 3 --name c-%")?;
    step(format!("  made within {:.2} s", began.elapsed().as_secs_f64()));
    let guests: Vec<Guest> = (1..=3)
        .map(|number| Guest {
            name: format!("c-{number}"),
            address: format!("10.9.0.{}", 100 + number),
            disk: String::new(),
        })
        .collect();
    let mut units = Vec::new();
    for guest in &guests {
        let unit = fleet.shown(&guest.name, "unit")?;
        check(unit.starts_with("flotilla-vm@Spare-"), || format!("{} runs in {unit}", guest.name))?;
        units.push(unit);
    }
    step("each answers on its own address, with its own name");
    for guest in &guests {
        guest.answers(host)?;
    }
    web.answers(host)?;
    let users = host.ok("stat -c %u $(pgrep -x flotilla-vmm | sed 's|^|/proc/|') | sort -u | wc -l")?;
    check(users == "4", || format!("four VMs have {users} users"))?;
    step("the pool is full again");
    spares(host, POOL, 2 * POOL)?;

    step("the next daemon finds them, and the spares");
    let waiting = host.ok("pgrep -x flotilla-exec | sort")?;
    let pids: Vec<u32> = guests.iter().map(|guest| fleet.pid(&guest.name)).collect::<Outcome<_>>()?;
    let old = host.ok("systemctl show -P MainPID flotillad")?;
    host.ok(&format!("kill -9 {old}"))?;
    host.eventually(SOON, &format!("[ $(systemctl show -P MainPID flotillad) != {old} ] && flotilla list"))?;
    for (guest, pid) in guests.iter().zip(pids) {
        fleet.becomes(&guest.name, "running", SOON)?;
        check(fleet.pid(&guest.name)? == pid, || format!("{} is another process", guest.name))?;
        guest.answers(host)?;
    }
    spares(host, POOL, 2 * POOL)?;
    let still = host.ok("pgrep -x flotilla-exec | sort")?;
    check(still == waiting, || format!("spares were {waiting}, and are {still}"))?;

    step("a clone is a VM like any other: systemctl stops its unit, its next start has one of its own name");
    host.refused("flotilla template rm base")?;
    host.ok(&format!("systemctl stop {}", units[0]))?;
    fleet.becomes("c-1", "stopped", SOON)?;
    for words in
        ["flotilla logs c-1", "journalctl -q --no-pager SYSLOG_IDENTIFIER=flotilla-vm FLOTILLA_VM=c-1"]
    {
        let log = host.ok(words)?;
        check(log.contains("the VM ends"), || format!("{words}: {log}"))?;
    }
    host.ok("flotilla start --paused c-1")?;
    fleet.becomes("c-1", "paused", SOON)?;
    let unit = fleet.shown("c-1", "unit")?;
    check(unit == "flotilla-vm@c-1.service", || unit.clone())?;
    for guest in &guests {
        host.ok_for(BOOT, &format!("flotilla rm --force {}", guest.name))?;
        let left = fleet.traces(&guest.name)?;
        check(left == tests::fleet::Traces::default(), || format!("{} has left {left}", guest.name))?;
    }
    spares(host, POOL, POOL)?;
    let sockets = host.ok("ls /run/flotilla-vm | grep Spare || true")?;
    check(sockets.is_empty(), || format!("directories are left: {sockets}"))?;

    step("without a pool nothing waits, and clones have units of their own");
    pool(host, 0)?;
    host.eventually(SOON, "! pgrep -x flotilla-exec")?;
    spares(host, 0, 0)?;
    let began = Instant::now();
    host.ok_for(BOOT, "flotilla clone base --name d")?;
    step(format!("  made within {:.2} s", began.elapsed().as_secs_f64()));
    let unit = fleet.shown("d", "unit")?;
    check(unit == "flotilla-vm@d.service", || unit.clone())?;
    let guest = Guest { name: "d".into(), address: "10.9.0.101".into(), disk: String::new() };
    guest.answers(host)?;
    host.ok_for(BOOT, "flotilla rm --force d && flotilla template rm base")?;
    let left = host.eventually(
        Duration::from_secs(10),
        "test -z \"$(ls /var/lib/flotilla/clones /var/lib/flotilla/templates | grep -v :)\"",
    );
    check(left.is_ok(), || "files of clones or templates are left".into())
}
