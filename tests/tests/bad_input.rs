//! Bad input to an installed fleet: one clear line and a non-zero exit, and nothing half-made left behind. A corrupt record is set
//! aside and reported, and the other VMs come up.

use tests::fleet::{Fleet, Traces, manager_call};
use tests::host::Host;
use tests::scenario::{Guest, Outcome, SOON, check, host_with_package, step};

/// One clear line: it names all of `words`.
fn refused(host: &Host, command: &str, words: &[&str]) -> Outcome {
    let output = host.refused(command)?;
    let text = output.stderr.trim();
    check(text.lines().count() == 1 && words.iter().all(|word| text.contains(word)), || {
        format!("{command}: exit {}, stderr: {text:?}, wanted one line with {words:?}", output.code)
    })
}

#[test]
fn bad_input_leaves_a_clear_line_and_nothing_else() -> Outcome {
    let host = host_with_package("bad-input")?;
    let fleet = Fleet::on(&host);
    let good = Guest::new(&host, "good", 1)?;
    fleet.define(&good)?;
    host.ok("flotilla start good")?;
    host.ok("mkdir -p /root/bad/dir && seq 100000 > /root/bad/text && echo '{\"kernel\":\"/srv/guest/vmlinuz\",\"memroy\":\"1G\"}' > /root/bad/key.json")?;
    let before = fleet.taps()?;

    step("bad command lines and definitions");
    let kernel = "--kernel /srv/guest/vmlinuz";
    host.refused("flotilla frobnicate")?;
    host.refused("flotilla list --frobnicate")?;
    refused(&host, "flotilla define /root/bad/key.json", &["key.json", "memroy"])?;
    refused(&host, "flotilla define /root/bad/none.json", &["/root/bad/none.json"])?;
    refused(&host, "flotilla define /root/bad/text", &["/root/bad/text"])?;
    refused(&host, &format!("flotilla define good {kernel}"), &["good"])?;
    refused(&host, &format!("flotilla define small {kernel} --memory 64M"), &["128"])?;
    refused(&host, &format!("flotilla define large {kernel} --memory 600G"), &["512"])?;
    refused(&host, &format!("flotilla define ../x {kernel}"), &["../x"])?;
    refused(&host, "flotilla start nobody", &["nobody"])?;

    step("things a definition names that are not as they should be");
    for (name, options, words) in [
        ("nokernel", "--kernel /root/bad/none".to_owned(), &["/root/bad/none"][..]),
        ("dirkernel", "--kernel /root/bad/dir".to_owned(), &["/root/bad/dir"]),
        ("text", "--kernel /root/bad/text".to_owned(), &["/root/bad/text"]),
        ("nodisk", format!("{kernel} --disk /root/bad/none"), &["/root/bad/none"]),
        ("dirdisk", format!("{kernel} --disk /root/bad/dir"), &["/root/bad/dir"]),
        ("busydisk", format!("{kernel} --disk {}", good.disk), &[good.disk.as_str()]),
        ("nobridge", format!("{kernel} --bridge a-name-much-too-long"), &["a-name-much-too-long"]),
    ] {
        // `run` defines, starts, and undoes both when it fails.
        let output = host.refused(&format!("flotilla run {name} {options} --detach </dev/null"))?;
        // The line may be the VMM's own, from its log, between those that tell what was being done.
        let told = output.stderr.lines().any(|line| words.iter().all(|word| line.contains(word)));
        check(told, || format!("{name}: {}", output.stderr))?;
        let left = fleet.traces(name)?;
        check(left == Traces::default(), || format!("{name} has left {left}"))?;
    }

    step("the same over D-Bus, by name");
    for (call, error) in [
        (manager_call("StartVm", "'ssa{sv}' nobody run 0"), "nobody"),
        (manager_call("DefineVm", "'ssa{sv}' bad '{\"kernel\":\"/k\",\"memroy\":1}' 0"), "memroy"),
        (manager_call("DefineVm", "'ssa{sv}' bad 'not json' 0"), ""),
        (manager_call("DefineVm", &format!("'ssa{{sv}}' good '{}' 0", good.definition())), "good"),
        (manager_call("StartVm", "'ssa{sv}' good sideways 0"), "sideways"),
        (manager_call("GetVm", "s nobody"), "nobody"),
    ] {
        let output = host.refused(&call)?;
        check(output.stderr.contains(error), || format!("{call}: {}", output.stderr))?;
    }

    let named = host.refused(
        "dbus-send --system --print-reply --dest=org.flotilla.Flotilla1 /org/flotilla/Flotilla1 \
         org.flotilla.Flotilla1.Manager.GetVm string:nobody",
    )?;
    check(named.stderr.contains("org.flotilla.Flotilla1.Error.NoSuchVm"), || named.stderr.clone())?;

    who_may_do_what(&host, &fleet)?;

    step("the good one never noticed");
    good.answers(&host)?;
    fleet.works(&good)?;
    let after = fleet.taps()?;
    check(before == after, || format!("taps were {before:?}, are {after:?}"))?;
    let rows = fleet.list()?;
    check(rows.len() == 1, || format!("{rows:?}"))
}

fn who_may_do_what(host: &Host, fleet: &Fleet<'_>) -> Outcome {
    step("an ordinary user sees VMs and changes none; a member of the group does");
    host.ok("useradd ann && useradd --groups flotilla bob")?;
    let seen = host.ok("runuser -u ann -- flotilla list")?;
    check(seen.contains("good"), || seen.clone())?;
    for verb in ["pause good", "stop good", "rm --force good", "qmp good quit", "run mine --detach"] {
        let command = format!("runuser -u ann -- flotilla {verb} </dev/null");
        let text = host.refused(&command)?.stderr;
        check(text.contains("not allowed") || text.contains("authoriz"), || format!("{verb}: {text}"))?;
    }
    let called = format!("runuser -u ann -- {}", manager_call("StopVm", "'ssa{sv}' good force 0"));
    host.refused(&called)?;
    host.refused("runuser -u ann -- socat - UNIX-CONNECT:/run/flotilla/qmp/good.sock </dev/null")?;
    let rows = fleet.list()?;
    check(rows.len() == 1 && rows[0]["state"] == "running", || format!("{rows:?}"))?;
    host.ok("runuser -u bob -- flotilla pause good && runuser -u bob -- flotilla resume good")?;
    Ok(())
}

#[test]
fn a_corrupt_record_is_set_aside_and_the_others_come_up() -> Outcome {
    let host = host_with_package("corrupt")?;
    let fleet = Fleet::on(&host);
    let good = Guest::new(&host, "good", 1)?;
    fleet.define(&good)?;
    host.ok("flotilla start good && flotilla define bad --kernel /srv/guest/vmlinuz")?;
    good.answers(&host)?;
    step("the daemon finds half a record, and one of noise");
    host.ok("set -e; systemctl stop flotillad; cd /var/lib/flotilla/vms
         truncate -s 20 bad.json; head -c 4096 /dev/urandom > worse.json; systemctl start flotillad")?;
    host.eventually(SOON, "flotilla list")?;
    fleet.works(&good)?;
    let rows = fleet.list()?;
    check(rows.len() == 1, || format!("{rows:?}"))?;
    step("both are kept, and reported");
    let kept = host.ok("ls /var/lib/flotilla/corrupt")?;
    check(kept.contains("bad") && kept.contains("worse"), || kept.clone())?;
    let property = |name: &str| {
        host.ok(&format!(
            "busctl get-property org.flotilla.Flotilla1 /org/flotilla/Flotilla1 org.flotilla.Flotilla1.Manager {name}"
        ))
    };
    let reported = property("CorruptRecords")?;
    check(reported.contains("bad") && reported.contains("worse"), || reported.clone())?;
    let state = property("State")?;
    check(state.contains("degraded"), || state.clone())?;
    let journal = host.ok("journalctl -q --no-pager -u flotillad")?;
    check(journal.contains("bad"), || journal.clone())?;
    step("the name is free again");
    host.ok(
        "flotilla define bad --kernel /srv/guest/vmlinuz && flotilla rm bad && flotilla rm --force good",
    )?;
    let left = fleet.traces("good")?;
    check(left == Traces::default(), || format!("good has left {left}"))
}
