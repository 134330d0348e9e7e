//! An installed package runs three Debian VMs: defined and started with `flotilla` and with `busctl` alone, seen by systemd's own
//! tools, alive through the daemon's death, true to what happens to them, and gone without a trace in the end.

#[path = "first_flight/networks.rs"]
mod networks;

use std::time::{Duration, Instant};

use tests::fleet::Fleet;
use tests::host::Host;
use tests::scenario::{BOOT, Guest, Outcome, SOON, check, host_with_package, step};

#[test]
fn three_debian_vms_from_an_installed_package() -> Outcome {
    let host = host_with_package("first-flight")?;
    let fleet = Fleet::on(&host);
    let outcome = first_flight(&host, &fleet);
    if outcome.is_err() {
        fleet.tell();
    }
    outcome
}

#[test]
fn guests_get_addresses_and_a_way_out() -> Outcome {
    let host = host_with_package("networks")?;
    let fleet = Fleet::on(&host);
    let outcome = networks::networks(&host, &fleet);
    if outcome.is_err() {
        fleet.tell();
    }
    outcome
}

fn first_flight(host: &Host, fleet: &Fleet<'_>) -> Outcome {
    host.ok("systemctl is-active flotillad && flotilla list")?;

    step("web and db with the flotilla command, mail with busctl alone");
    let (web, db, mail) =
        (Guest::new(host, "web", 1)?, Guest::new(host, "db", 2)?, Guest::new(host, "mail", 3)?);
    let guests = [&web, &db, &mail];
    fleet.define(&web)?;
    fleet.define(&db)?;
    host.ok("flotilla start web db")?;
    fleet.define_by_bus(&mail)?;
    fleet.manager("StartVm", "'ssa{sv}' mail run 0")?;

    step("the host pings each");
    for guest in guests {
        guest.answers(host)?;
    }
    step("list, QMP and console of each work");
    for guest in guests {
        fleet.works(guest)?;
    }
    systemd_shows_each(host, fleet, &guests)?;
    rights(host, fleet, &web, &db)?;
    the_bus_shows_them(host, fleet)?;
    kill_the_daemon(host, fleet, &guests)?;
    by_hand_from_ps(host, fleet, &guests)?;
    pause_and_resume(host, fleet, &web)?;

    ends_are_noticed(host, fleet, &guests)?;
    nothing_is_left(host, fleet, &guests)
}

fn systemd_shows_each(host: &Host, fleet: &Fleet<'_>, guests: &[&Guest]) -> Outcome {
    step("systemctl status, journalctl and systemd-cgls show them one by one");
    for guest in guests {
        let name = &guest.name;
        let pid = fleet.pid(name)?;
        let status = host.ok(&format!("systemctl status --no-pager -n 0 flotilla-vm@{name}"))?;
        check(status.contains("active (running)") && status.contains(&format!("{pid} (")), || {
            status.clone()
        })?;
        let groups =
            host.ok("systemd-cgls --no-pager -l /flotilla.slice 2>/dev/null || systemd-cgls --no-pager -l")?;
        check(groups.contains(&format!("flotilla-vm@{name}.service")), || groups.clone())?;
        let journal = host.ok(&format!("journalctl --no-pager -q -u flotilla-vm@{name}"))?;
        check(journal.lines().any(|line| line.contains(name.as_str())), || {
            format!("journal of {name}: {journal}")
        })?;
        let user = host.ok(&format!("stat -c %u /proc/{pid}"))?;
        check(user != "0", || format!("the VMM of {name} runs as root"))?;
    }
    let users = host.ok("stat -c %u $(pgrep -x flotilla-vmm | sed 's|^|/proc/|') | sort -u | wc -l")?;
    check(users == "3", || format!("three VMs share {users} users"))
}

/// What the daemon, and a VM that its guest has taken over, may do on this host.
fn rights(host: &Host, fleet: &Fleet<'_>, one: &Guest, other: &Guest) -> Outcome {
    step(
        "the daemon has a user of its own and one capability; systemd finds little to hold against it and its VMs",
    );
    let daemon = "/proc/$(systemctl show -P MainPID flotillad)";
    let user = host.ok(&format!("stat -c %U {daemon}"))?;
    check(user == "flotillad", || format!("the daemon runs as {user}"))?;
    let capabilities =
        host.ok(&format!("grep -E '^Cap(Prm|Eff|Bnd)' {daemon}/status | cut -f 2 | sort -u"))?;
    check(u64::from_str_radix(&capabilities, 16) == Ok(1 << 12), || capabilities.clone())?;
    for (unit, most) in
        [("flotillad.service".to_owned(), 2.5), (format!("flotilla-vm@{}.service", one.name), 1.5)]
    {
        let said = host.ok(&format!("systemd-analyze --no-pager security {unit} | grep Overall"))?;
        let score: f64 = said
            .split_once("service: ")
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .ok_or_else(|| said.clone())?
            .parse()?;
        step(format!("  {unit}: {score}"));
        check(score <= most, || format!("{said}: more than {most}"))?;
    }
    step("flotillad may start and end VMs, and no other unit");
    let ask = |verb: &str, unit: &str| {
        format!(
            "setpriv --reuid=flotillad --regid=flotillad --clear-groups systemctl --no-ask-password {verb} {unit}"
        )
    };
    host.ok(&ask("start", &format!("flotilla-vm@{}.service", one.name)))?;
    for unit in [
        "systemd-tmpfiles-clean.service",
        "flotillad.service",
        "flotilla-vm@x.timer",
        "flotilla-other@x.service",
    ] {
        let denied = host.refused(&ask("start", unit))?;
        check(denied.stderr.contains("authentication"), || format!("{unit}: {}", denied.stderr))?;
    }
    step("a VM's user reaches neither another VM's files nor the daemon's");
    let (mine, other_pid) = (fleet.pid(&one.name)?, fleet.pid(&other.name)?);
    let uid = host.ok(&format!("stat -c %u /proc/{mine}"))?;
    let name = &other.name;
    // In the VM's own view of the host, too: what it hides is no excuse for what it shows.
    for view in [String::new(), format!("nsenter --mount --target {mine} ")] {
        let as_vm = |command: &str| {
            format!(
                "{view}setpriv --reuid={uid} --regid={uid} --clear-groups --no-new-privs sh -c '{command}'"
            )
        };
        host.ok(&as_vm("test -r /proc/self/stat"))?;
        for command in [
            format!("cat {}", other.disk),
            format!("cat {}", one.disk),
            format!("cat /var/lib/flotilla/vms/{name}.json"),
            "ls /var/lib/flotilla".to_owned(),
            "ls /run/flotilla-vm".to_owned(),
            format!("ls /run/flotilla-vm/{}", one.name),
            format!("socat -u UNIX-CONNECT:/run/flotilla-vm/{name}/qmp.sock STDOUT"),
            format!("socat -u UNIX-CONNECT:/run/flotilla-vm/{name}/console.sock STDOUT"),
            format!("socat -u UNIX-CONNECT:/run/flotilla/qmp/{name}.sock STDOUT"),
            "touch /run/flotilla/x".to_owned(),
            "touch /run/flotilla/qmp/x".to_owned(),
            format!("ls /proc/{other_pid}/fd"),
            format!("kill -0 {other_pid}"),
            format!("kill -0 {mine} && ls /proc/$(systemctl show -P MainPID flotillad)/fd"),
        ] {
            host.refused(&as_vm(&command))?;
        }
        let answer = host.ok(&as_vm(&format!(
            "printf \"launch {name}\\n\" | socat -t 5 - UNIX-CONNECT:/run/flotilla/launch.sock | tr -d \"\\0\""
        )))?;
        check(answer.contains("does not run in the unit"), || answer.clone())?;
    }
    Ok(())
}

fn the_bus_shows_them(host: &Host, fleet: &Fleet<'_>) -> Outcome {
    step("busctl shows what the command shows");
    let rows = fleet.manager("ListVms", "")?;
    for name in ["web", "db", "mail"] {
        check(rows.contains(&format!("\"{name}\"")), || rows.clone())?;
    }
    let path = fleet.manager("GetVm", "s web")?;
    let path = path.trim_start_matches("o ").trim_matches('"').to_owned();
    let state = host
        .ok(&format!("busctl get-property org.flotilla.Flotilla1 {path} org.flotilla.Flotilla1.Vm State"))?;
    check(state == "s \"running\"", || state.clone())?;
    let shown =
        host.ok(&format!("busctl introspect org.flotilla.Flotilla1 {path} org.flotilla.Flotilla1.Vm"))?;
    for word in [".Start", ".Shutdown", ".PowerOff", ".Pause", ".Resume", ".State", ".MainPID", ".Spec"] {
        check(shown.contains(word), || format!("introspect does not show {word}: {shown}"))?;
    }
    Ok(())
}

/// Reads every guest's uptime, runs `interruption`, and sees that the same processes and the same kernels run on.
fn runs_through(
    host: &Host,
    fleet: &Fleet<'_>,
    guests: &[&Guest],
    interruption: impl FnOnce() -> Outcome,
) -> Outcome {
    let mut before = Vec::new();
    for guest in guests {
        before.push((fleet.pid(&guest.name)?, guest.uptime(host)?));
    }
    interruption()?;
    for (guest, (pid, uptime)) in guests.iter().zip(before) {
        fleet.works(guest)?;
        let (pid_now, uptime_now) = (fleet.pid(&guest.name)?, guest.uptime(host)?);
        check(pid_now == pid && uptime_now > uptime, || {
            format!("{}: pid {pid} → {pid_now}, uptime {uptime} → {uptime_now}", guest.name)
        })?;
    }
    Ok(())
}

/// The promise is: list, QMP and console work within 2 seconds of the daemon's restart. A test host is emulated: a program
/// starts there tens of times slower than on the machine that emulates it (`flotillad --version`: 0.2 s and more, against
/// 5 ms), so 2 seconds there would measure the emulator. Five times is granted, and the figures are printed.
const RETURN: f64 = 2.0 * 5.0;

fn kill_the_daemon(host: &Host, fleet: &Fleet<'_>, guests: &[&Guest]) -> Outcome {
    step("kill -9 of flotillad: the guests run on, and all answers are back as soon as the daemon is");
    runs_through(host, fleet, guests, || {
        let old = host.ok("systemctl show -P MainPID flotillad")?;
        host.ok(&format!("kill -9 {old}"))?;
        let is_new =
            format!("pid=$(systemctl show -P MainPID flotillad); [ $pid != 0 ] && [ $pid != {old} ]");
        host.eventually(SOON, &format!("{is_new} && systemctl is-active flotillad"))?;
        // The order is what counts: once systemd has heard that the daemon is ready, each thing works at the first try.
        for guest in guests {
            fleet.works(guest)?;
        }
        let stamp = |name: &str| -> Outcome<f64> {
            Ok(host.ok(&format!("systemctl show -P {name}TimestampMonotonic flotillad"))?.parse::<f64>()?
                / 1e6)
        };
        let took = stamp("ActiveEnter")? - stamp("ExecMainStart")?;
        step(format!("  back {took:.2} s after the daemon's start, by the emulated host's clock"));
        check(took < RETURN, || format!("the daemon took {took:.2} s to come back"))
    })
}

fn by_hand_from_ps(host: &Host, fleet: &Fleet<'_>, guests: &[&Guest]) -> Outcome {
    step("the same three by hand, from the command lines that ps shows, as root");
    let mut lines = Vec::new();
    for guest in guests {
        // Word by word as the kernel has it, quoted for the shell: what a person gets who copies it with care.
        let pid = fleet.pid(&guest.name)?;
        lines.push(host.ok(&format!("xargs -0 printf '%q ' < /proc/{pid}/cmdline"))?);
    }
    for guest in guests {
        host.ok(&format!("flotilla stop --now {}", guest.name))?;
        fleet.becomes(&guest.name, "stopped", SOON)?;
    }
    for (guest, line) in guests.iter().zip(&lines) {
        host.ok(&format!("(setsid {line} </dev/null >/root/by-hand.{} 2>&1 &)", guest.name))?;
    }
    for (guest, line) in guests.iter().zip(&lines) {
        if guest.answers(host).is_err() {
            let says = host.ok(&format!("cat /root/by-hand.{}", guest.name))?;
            return Err(format!("{line}\nsays: {says}").into());
        }
    }
    for guest in guests {
        let process = format!("'^[^ ]*flotilla-vmm -name {} '", guest.name);
        host.ok(&format!("pkill -f -- {process}"))?;
        host.eventually(SOON, &format!("! pgrep -f -- {process}"))?;
    }
    step("and the fleet takes them up again");
    for guest in guests {
        host.ok(&format!("flotilla start {}", guest.name))?;
    }
    for guest in guests {
        guest.answers(host)?;
        fleet.works(guest)?;
    }
    Ok(())
}

fn pause_and_resume(host: &Host, fleet: &Fleet<'_>, guest: &Guest) -> Outcome {
    step("pause stops the guest's clock, resume lets it go on");
    let name = &guest.name;
    host.ok(&format!("flotilla pause {name}"))?;
    fleet.becomes(name, "paused", SOON)?;
    host.refused(&format!("ping -c 2 -W 1 {}", guest.address))?;
    host.ok(&format!("flotilla resume {name}"))?;
    fleet.becomes(name, "running", SOON)?;
    guest.answers(host)
}

fn ends_are_noticed(host: &Host, fleet: &Fleet<'_>, guests: &[&Guest]) -> Outcome {
    let [web, db, mail] = guests else { return Err("three guests".into()) };
    step("systemctl stop of a VM's unit shows in the list");
    host.ok(&format!("systemctl stop flotilla-vm@{}", web.name))?;
    fleet.becomes(&web.name, "stopped", SOON)?;
    step("a guest that powers itself off shows in the list");
    db.ask(host, "poweroff")?;
    fleet.becomes(&db.name, "stopped", SOON)?;
    step("a VMM that is killed shows in the list, with the signal");
    host.ok(&format!("kill -9 {}", fleet.pid(&mail.name)?))?;
    fleet.becomes(&mail.name, "failed", SOON)?;
    let status = fleet.shown(&mail.name, "exit_status")?;
    check(status.contains("signal") && status.contains("KILL"), || status.clone())?;
    step("a VM that failed starts again");
    host.ok(&format!("flotilla start {}", mail.name))?;
    mail.answers(host)?;
    let began = Instant::now();
    host.ok(&format!("flotilla stop --timeout 5s {}", mail.name))?;
    fleet.becomes(&mail.name, "stopped", BOOT)?;
    step(format!("stopped after {:.1} s", began.elapsed().as_secs_f64()));
    Ok(())
}

fn nothing_is_left(host: &Host, fleet: &Fleet<'_>, guests: &[&Guest]) -> Outcome {
    step("flotilla rm leaves nothing behind, and takes nothing that is not its own");
    for guest in guests {
        host.ok(&format!("flotilla rm {}", guest.name))?;
    }
    for guest in guests {
        let left = fleet.traces(&guest.name)?;
        check(left == tests::fleet::Traces::default(), || format!("{} has left {left}", guest.name))?;
        host.ok(&format!("test -f {}", guest.disk))?;
    }
    let taps = fleet.taps()?;
    check(taps.is_empty(), || format!("taps are left: {taps:?}"))?;
    host.ok("ip link show br0")?;
    step("the package goes too");
    host.ok("DEBIAN_FRONTEND=noninteractive apt-get remove -q -y flotilla")?;
    let gone = host.eventually(Duration::from_secs(20), "! pgrep -x flotillad");
    check(gone.is_ok(), || "flotillad runs on without its package".into())
}
