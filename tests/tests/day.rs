//! An administrator's day on one host with three Debian guests made of an image: limits, a VM that freezes and one that crashes, a daemon that
//! is killed fifty times under load, an upgrade, a reboot, a drain, and the end of it all. No VM is lost, none is left over, and what is shown is true.

use std::time::{Duration, Instant};

use tests::fleet::{Fleet, Traces};
use tests::host::Host;
use tests::scenario::{
    BOOT, BRIDGE, EMULATED, Guest, Outcome, SOON, check, host_with_package, install, next_package, step,
};

/// How often the daemon is killed.
const KILLS: u32 = 50;
/// An emulated host's reboot.
const REBOOT: Duration = Duration::from_secs(300);

#[test]
fn an_administrators_day() -> Outcome {
    let host = host_with_package("day")?;
    let fleet = Fleet::on(&host);
    let outcome = day(&host, &fleet);
    if outcome.is_err() {
        fleet.tell();
    }
    outcome
}

fn day(host: &Host, fleet: &Fleet<'_>) -> Outcome {
    let guests = [guest("web", 1), guest("db", 2), guest("mail", 3)];
    let [web, db, mail] = &guests;
    made_of_an_image(host, fleet, &guests)?;
    limits(host, fleet, web)?;
    frozen(host, fleet, web, db)?;
    crashed(host, fleet, mail)?;
    killed_again_and_again(host, fleet, &guests)?;
    upgraded(host, fleet, &guests)?;
    rebooted(host, fleet, &guests)?;
    drained(host, fleet, &guests)?;
    removed(host, fleet, &guests)
}

/// A guest whose disk is `flotilla create`'s to make.
fn guest(name: &str, number: u8) -> Guest {
    Guest {
        name: name.to_owned(),
        address: format!("10.9.0.{}", 10 + number),
        disk: format!("/var/lib/flotilla/clones/{name}"),
    }
}

/// Runs a line in a guest, on its console.
fn inside(host: &Host, fleet: &Fleet<'_>, guest: &Guest, line: &str) -> Outcome<String> {
    let mut console = fleet.console(&guest.name)?;
    console.enter("")?;
    let answer = console.shell(line, SOON)?;
    drop(console);
    host.eventually(SOON, &format!("! pgrep -f '[f]lotilla console {} '", guest.name))?;
    Ok(answer)
}

/// Changes a VM's definition as `flotilla edit` does, with an editor that runs this jq program.
fn edit(host: &Host, name: &str, program: &str) -> Outcome {
    host.write(
        "/root/editor",
        format!(
            "#!/bin/sh\njq '{program}' \"$1\" > \"$1.new\" && cat \"$1.new\" > \"$1\" && rm \"$1.new\"\n"
        ),
    )?;
    host.ok(&format!("chmod +x /root/editor && EDITOR=/root/editor flotilla edit {name}"))?;
    Ok(())
}

fn made_of_an_image(host: &Host, fleet: &Fleet<'_>, guests: &[Guest]) -> Outcome {
    step("three VMs of one image, each with a line");
    host.write("/root/id.pub", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIflotilla me@desk\n")?;
    host.write("/root/user-data", "#cloud-config\nruncmd: [touch /was-here]\n")?;
    let lines: Vec<String> = guests
        .iter()
        .map(|guest| {
            format!(
                "flotilla create {} --image /srv/guest/root.img --size 1G --memory 256M --bridge {BRIDGE} \
                 --ssh-key /root/id.pub --user-data /root/user-data \
                 --kernel /srv/guest/vmlinuz --initrd /srv/guest/initrd.gz --append '{EMULATED} guest.name={0} guest.ip={1}/24'",
                guest.name, guest.address
            )
        })
        .collect();
    host.ok_for(BOOT, &lines.join(" && "))?;
    for guest in guests {
        guest.answers(host)?;
        fleet.works(guest)?;
    }
    step(
        "each has a disk of the size that was asked for, and a seed with its name, the key and the user-data",
    );
    for guest in guests {
        let name = &guest.name;
        let seed: Vec<String> =
            [&format!("local-hostname.*{name}"), "AAAAIflotilla me@desk", "touch /was-here"]
                .map(|text| format!("$(grep -a -q '{text}' /dev/vdb && echo yes)"))
                .into();
        let line = format!(
            "echo mine-{name} > /root/mine; sync; echo $(cat /sys/class/block/vda/size) {}",
            seed.join(" ")
        );
        let is = inside(host, fleet, guest, &line)?;
        check(is == "2097152 yes yes yes", || format!("{name}: {is}"))?;
    }
    step("and a disk of its own");
    for guest in guests {
        let mine = inside(host, fleet, guest, "cat /root/mine")?;
        check(mine == format!("mine-{}", guest.name), || format!("{} reads {mine}", guest.name))?;
    }
    Ok(())
}

fn limits(host: &Host, fleet: &Fleet<'_>, web: &Guest) -> Outcome {
    step("limits are changed while it runs");
    let pid = fleet.pid(&web.name)?;
    edit(host, &web.name, ".limits = {cpu_quota: 150, memory_max: \"600M\", tasks_max: 64}")?;
    let unit = format!("flotilla-vm@{}.service", web.name);
    let group = format!("/sys/fs/cgroup$(systemctl show -P ControlGroup {unit})");
    for (file, wanted) in [("cpu.max", "150000 100000"), ("memory.max", "629145600"), ("pids.max", "64")] {
        let is = host.ok(&format!("cat {group}/{file}"))?;
        check(is == wanted, || format!("{file}: {is}"))?;
    }
    check(fleet.pid(&web.name)? == pid, || "it was started anew".into())?;
    check(fleet.shown(&web.name, "spec.limits.cpu_quota")? == "150", || "the limit is not shown".into())
}

/// What is asked of everything else while one VM does not answer: each within this time, on an emulated host.
const QUICK: Duration = Duration::from_secs(5);

fn frozen(host: &Host, fleet: &Fleet<'_>, web: &Guest, db: &Guest) -> Outcome {
    step(
        "one VM freezes: it is shown as one that does not answer, all else is as quick as ever, nobody kills it",
    );
    let pid = fleet.pid(&db.name)?;
    host.ok(&format!("kill -STOP {pid}"))?;
    // Whoever watches the host asks for figures; the VM owes its own.
    let figures = "printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' | socat -t 5 - UNIX-CONNECT:/run/flotilla/metrics.sock | grep flotilla_vms";
    host.ok(figures)?;
    fleet.becomes(&db.name, "quarantined", SOON)?;
    for command in [
        "flotilla list".to_owned(),
        format!("flotilla show {}", db.name),
        format!("flotilla qmp {} query-status", web.name),
        format!("flotilla pause {0} && flotilla resume {0}", web.name),
        "flotilla network list".to_owned(),
        "flotilla doctor || true".to_owned(),
        "flotilla top --count 1".to_owned(),
        figures.to_owned(),
    ] {
        let began = Instant::now();
        host.ok(&command)?;
        let took = began.elapsed();
        step(format!("  {:.2} s: {command}", took.as_secs_f64()));
        check(took < QUICK, || format!("`{command}` took {took:?}"))?;
    }
    step("also for a daemon that finds it so");
    restart_by_kill(host)?;
    fleet.becomes(&db.name, "quarantined", SOON)?;
    fleet.works(web)?;
    check(fleet.pid(&db.name)? == pid, || "it was killed".into())?;
    step("it goes on, and is shown running");
    host.ok(&format!("kill -CONT {pid}"))?;
    fleet.becomes(&db.name, "running", SOON)?;
    db.answers(host)?;
    fleet.works(db)?;
    check(fleet.pid(&db.name)? == pid, || "it is another process".into())
}

fn crashed(host: &Host, fleet: &Fleet<'_>, mail: &Guest) -> Outcome {
    step("one VM crashes, and is started again as its policy says; what happened is shown");
    edit(host, &mail.name, ".restart = \"on-failure\"")?;
    let pid = fleet.pid(&mail.name)?;
    host.ok(&format!("kill -SEGV {pid}"))?;
    host.eventually(
        SOON,
        &format!("new=$(flotilla show {} --json | jq -er .pid) && [ $new != {pid} ]", mail.name),
    )?;
    fleet.becomes(&mail.name, "running", SOON)?;
    mail.answers(host)?;
    let restarts = host.ok(&format!("flotilla show {}", mail.name))?;
    check(restarts.to_lowercase().contains("restart"), || restarts.clone())?;
    let log = host.ok("journalctl -q --no-pager -u flotillad")?;
    check(log.contains("signal SIGSEGV"), || "the journal does not say how it ended".into())
}

/// Kills the daemon and waits for the next one.
fn restart_by_kill(host: &Host) -> Outcome {
    let old = host.ok("systemctl show -P MainPID flotillad")?;
    host.ok(&format!("kill -9 {old}"))?;
    host.eventually(
        SOON,
        &format!("[ $(systemctl show -P MainPID flotillad) != {old} ] && systemctl is-active flotillad"),
    )?;
    Ok(())
}

fn pids(fleet: &Fleet<'_>, guests: &[Guest]) -> Outcome<Vec<u32>> {
    guests.iter().map(|guest| fleet.pid(&guest.name)).collect()
}

fn killed_again_and_again(host: &Host, fleet: &Fleet<'_>, guests: &[Guest]) -> Outcome {
    step(format!("the daemon is killed {KILLS} times, at any instant, while it is called"));
    let before = pids(fleet, guests)?;
    let uptimes: Vec<f64> = guests.iter().map(|guest| guest.uptime(host)).collect::<Outcome<_>>()?;
    // Callers that read, change and talk; what they ask is lost now and then, and they ask again. The unit's limit of starts is not what is tested.
    let began = Instant::now();
    let said = host.ok_for(
        3 * BOOT,
        &format!(
            "cd /root; touch load
             for calls in 'flotilla list; flotilla qmp mail query-status; flotilla define extra --kernel /srv/guest/vmlinuz; flotilla rm extra' \
               'flotilla pause db; flotilla show web; flotilla resume db'; do
               (while [ -e load ]; do timeout 60 sh -c \"$calls\"; done >/dev/null 2>&1) & jobs=\"$jobs $!\"
             done
             killed=0
             while [ $killed -lt {KILLS} ]; do
               sleep 0.$((RANDOM % 10))
               [ $((killed % 15)) != 14 ] || systemctl reset-failed flotillad
               pid=$(pidof flotillad) || continue
               kill -9 $pid && killed=$((killed + 1))
             done
             rm load; wait $jobs; echo $killed"
        ),
    )?;
    step(format!("  {said} kills within {:.0} s", began.elapsed().as_secs_f64()));
    host.eventually(SOON, "systemctl is-active flotillad && flotilla list")?;
    host.ok("flotilla rm extra 2>/dev/null || true")?;
    host.ok("flotilla resume db 2>/dev/null || true")?;
    for ((guest, pid), uptime) in guests.iter().zip(before).zip(uptimes) {
        fleet.becomes(&guest.name, "running", SOON)?;
        fleet.works(guest)?;
        let now = fleet.pid(&guest.name)?;
        check(now == pid, || format!("{} was process {pid} and is {now}", guest.name))?;
        check(guest.uptime(host)? > uptime, || format!("{} has booted anew", guest.name))?;
    }
    nothing_but(host, fleet, guests)
}

/// The host runs these VMs and no other: processes, units, records, taps.
fn nothing_but(host: &Host, fleet: &Fleet<'_>, guests: &[Guest]) -> Outcome {
    let count = guests.len().to_string();
    for command in [
        "pgrep -x flotilla-vmm | wc -l",
        "systemctl list-units --plain --no-legend --state=active 'flotilla-vm@*' | wc -l",
        "ls /var/lib/flotilla/vms | grep -c json",
        "ls /run/flotilla/qmp | grep -c sock",
    ] {
        let is = host.ok(command)?;
        check(is == count, || format!("{command}: {is}"))?;
    }
    let (taps, list) = (fleet.taps()?, fleet.list()?);
    check(taps.len() == guests.len(), || format!("taps: {taps:?}"))?;
    check(list.len() == guests.len(), || format!("VMs: {list:?}"))
}

fn upgraded(host: &Host, fleet: &Fleet<'_>, guests: &[Guest]) -> Outcome {
    step("the package is upgraded: another daemon, the same VMs");
    let (before, old) = (pids(fleet, guests)?, host.ok("systemctl show -P MainPID flotillad")?);
    // As versions left it whose daemon ran as root.
    host.ok("chown -R root:root /var/lib/flotilla")?;
    let folder = tempfile::tempdir()?;
    install(host, &next_package(folder.path())?)?;
    let version = host.ok("dpkg-query -W -f '${Version}' flotilla")?;
    check(version.ends_with("+1"), || version.clone())?;
    host.eventually(SOON, "systemctl is-active flotillad && flotilla list")?;
    let foreign = host.ok("find /var/lib/flotilla ! -user flotillad")?;
    check(foreign.is_empty(), || format!("not the daemon's: {foreign}"))?;
    check(host.ok("systemctl show -P MainPID flotillad")? != old, || "the old daemon runs on".into())?;
    check(pids(fleet, guests)? == before, || "VMs were started anew".into())?;
    for guest in guests {
        fleet.works(guest)?;
    }
    step("it cannot be removed while VMs run");
    host.refused("DEBIAN_FRONTEND=noninteractive apt-get remove -q -y flotilla")?;
    Ok(())
}

fn rebooted(host: &Host, fleet: &Fleet<'_>, guests: &[Guest]) -> Outcome {
    let [web, db, mail] = guests else { return Err("three guests".into()) };
    step("the host reboots: first db starts again, then mail, and web does not");
    edit(host, &db.name, ".autostart = true | .autostart_order = 1 | .autostart_delay = 5")?;
    edit(host, &mail.name, ".autostart = true | .autostart_order = 2")?;
    step("  db's guest heeds the power button, mail's does not and has five seconds, web is not asked");
    edit(host, &mail.name, ".host_shutdown_timeout = 5")?;
    edit(host, &web.name, ".host_shutdown = \"power-off\"")?;
    // What a session manager would do; it listens before the button is pressed.
    let listen = "exec 9< /dev/input/event0; \
                  (head -c 24 <&9 > /dev/null; echo asked > /root/last; sync; busybox poweroff -f) > /dev/null 2>&1 & true";
    inside(host, fleet, db, listen)?;
    let boot = host.ok("cat /proc/sys/kernel/random/boot_id")?;
    host.run("systemctl --no-block reboot")?;
    let began = Instant::now();
    loop {
        // No answer is what a host gives that reboots.
        match host.run("cat /proc/sys/kernel/random/boot_id") {
            Ok(output) if output.code == 0 && output.stdout.trim() != boot => break,
            _ if began.elapsed() > REBOOT => return Err("the host does not come back".into()),
            _ => std::thread::sleep(Duration::from_secs(1)),
        }
    }
    step(format!("  it is back after {:.0} s", began.elapsed().as_secs_f64()));
    host.eventually(BOOT, "systemctl is-active flotillad && flotilla list")?;
    for guest in [db, mail] {
        fleet.becomes(&guest.name, "running", BOOT)?;
    }
    // The bridge that the administrator made by hand went with the reboot: this one is the daemon's.
    host.ok(&format!("ip address replace 10.9.0.1/24 dev {BRIDGE} && ip link set {BRIDGE} up"))?;
    for guest in [db, mail] {
        guest.answers(host)?;
    }
    check(fleet.state(&web.name)? == "defined", || {
        format!("web is {}", fleet.state(&web.name).unwrap_or_default())
    })?;
    let since = |name: &str| -> Outcome<u64> {
        Ok(host
            .ok(&format!("systemctl show -P ActiveEnterTimestampMonotonic flotilla-vm@{name}"))?
            .parse()?)
    };
    let (first, second) = (since(&db.name)?, since(&mail.name)?);
    check(second >= first + 5_000_000, || format!("db at {first} us, mail at {second} us"))?;
    for (guest, wanted) in [(db, "mine-db asked"), (mail, "mine-mail")] {
        let is = inside(host, fleet, guest, "echo $(cat /root/mine /root/last 2> /dev/null)")?;
        check(is == wanted, || format!("{} reads {is:?}", guest.name))?;
    }
    host.ok(&format!("flotilla start {}", web.name))?;
    web.answers(host)
}

fn drained(host: &Host, fleet: &Fleet<'_>, guests: &[Guest]) -> Outcome {
    step("drained: what runs is ended, and nothing starts");
    host.ok_for(BOOT, "flotilla drain --stop --timeout 5s")?;
    for guest in guests {
        fleet.becomes(&guest.name, "stopped", SOON)?;
        let said = host.refused(&format!("flotilla start {}", guest.name))?;
        check(said.stderr.contains("drain"), || said.stderr.clone())?;
    }
    let state = host.ok(
        "busctl get-property org.flotilla.Flotilla1 /org/flotilla/Flotilla1 org.flotilla.Flotilla1.Manager State",
    )?;
    check(state.contains("draining"), || state.clone())
}

fn removed(host: &Host, fleet: &Fleet<'_>, guests: &[Guest]) -> Outcome {
    step("the VMs go, with the disks that were made for them; the package is purged, and nothing is left");
    for guest in guests {
        host.ok(&format!("flotilla rm {}", guest.name))?;
        let left = fleet.traces(&guest.name)?;
        check(left == Traces::default(), || format!("{} has left {left}", guest.name))?;
        host.ok(&format!("! test -e {}", guest.disk))?;
    }
    check(fleet.taps()?.is_empty(), || "taps are left".into())?;
    host.ok_for(BOOT, "DEBIAN_FRONTEND=noninteractive apt-get purge -q -y flotilla")?;
    host.eventually(SOON, "! pgrep -x 'flotillad|flotilla-vmm|flotilla-exec|dnsmasq'")?;
    let left = host.ok(
        "ls -d /var/lib/flotilla /run/flotilla /run/flotilla-vm /etc/flotilla /usr/bin/flotilla* /usr/sbin/flotillad /usr/libexec/flotilla \
           /run/systemd/system.control/flotilla* /etc/systemd/system/*.wants/flotilla* 2>/dev/null; \
         systemctl list-units --no-legend --all 'flotilla*'; ip -o link show | grep 'flotilla:'; nft list tables 2>/dev/null | grep flotilla; true",
    )?;
    check(left.is_empty(), || format!("left: {left}"))?;
    host.ok(&format!("test -f /srv/guest/root.img && ! ip link show {BRIDGE}"))?;
    Ok(())
}
