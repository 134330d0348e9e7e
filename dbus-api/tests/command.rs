//! The `flotilla` command against a small fake of the daemon on a bus of its own: what it calls, prints, and exits with.
//!
//! Needs `dbus-daemon`; without it the tests say so loudly and pass.

#[cfg(test)]
mod fake;

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use crate::fake::{Fleet, Ran};

    /// The fleet, or `None` (said on the standard error) where there is no `dbus-daemon`.
    fn fleet() -> Option<Fleet> {
        let fleet = Fleet::start();
        if fleet.is_none() {
            eprintln!("SKIPPED: dbus-daemon is not installed, so nothing was tested");
        }
        fleet
    }

    fn expect(ran: &Ran, status: i32, out: &str, err: &str) {
        assert_eq!(ran.status, status, "{ran:?}");
        assert!(ran.out.contains(out), "{out:?} in {ran:?}");
        assert!(ran.err.contains(err), "{err:?} in {ran:?}");
    }

    #[test]
    fn a_vm_lives_its_life() {
        let Some(fleet) = fleet() else { return };
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("web.toml");
        std::fs::write(&file, "kernel = \"vmlinuz\"\nmemory = \"1G\"\n").unwrap();
        expect(&fleet.run(&["list"]), 0, "", "No VMs");
        expect(&fleet.run(&["list", "--json"]), 0, "[]", "");
        expect(&fleet.run(&["define", file.to_str().unwrap()]), 0, "web defined\n", "");
        let shown = fleet.run(&["show", "web", "--json"]);
        let shown: serde_json::Value = serde_json::from_str(&shown.out).unwrap();
        assert_eq!(shown["spec"]["kernel"], folder.path().join("vmlinuz").to_str().unwrap());
        expect(&fleet.run(&["define", file.to_str().unwrap()]), 6, "", "--replace");
        expect(&fleet.run(&["define", file.to_str().unwrap(), "--replace"]), 0, "defined again", "");
        expect(&fleet.run(&["start", "web"]), 0, "web started\n", "");
        expect(&fleet.run(&["list"]), 0, "running", "");
        expect(&fleet.run(&["show", "web"]), 0, "State       running", "");
        expect(&fleet.run(&["top", "--interval", "0s"]), 0, "web   0.0   0      3.0M      1G", "");
        expect(&fleet.run(&["top", "none"]), 3, "", "none");
        expect(&fleet.run(&["show", "web"]), 0, "Removed     disk1, over QMP", "");
        expect(&fleet.run(&["pause", "web"]), 0, "web paused\n", "");
        expect(&fleet.run(&["resume", "web"]), 0, "web resumed\n", "");
        expect(&fleet.run(&["qmp", "web", "query-status"]), 0, "query-status", "");
        expect(&fleet.run(&["qmp", "web", "query-status", "--read-only"]), 0, "query-status", "");
        let stream = fleet.run_with_input(&["qmp", "web"], "{\"execute\":\"stop\"}\n");
        expect(&stream, 0, "{\"QMP\":{}}\r\n{\"execute\":\"stop\"}\n", "");
        expect(&fleet.run_with_input(&["qmp", "web", "--read-only"], ""), 0, "QMP", "");
        for call in ["read-only web", "stream full web", "stream read-only web"] {
            assert!(fleet.calls().contains(&call.to_owned()), "{call}");
        }
        expect(&fleet.run(&["rm", "web"]), 6, "", "running");
        expect(&fleet.run(&["stop", "web", "--timeout", "5s"]), 0, "web stopped\n", "");
        expect(&fleet.run(&["rm", "web"]), 0, "web removed\n", "");
        assert!(fleet.calls().contains(&"shutdown web 5000000".to_owned()), "{:?}", fleet.calls());
    }

    #[test]
    fn a_definition_is_edited_in_place() {
        let Some(fleet) = fleet() else { return };
        let folder = tempfile::tempdir().unwrap();
        fleet.environment("TMPDIR", folder.path().to_str().unwrap());
        fleet.environment("VISUAL", "");
        expect(&fleet.run(&["define", "web", "--kernel", "/k"]), 0, "", "");
        fleet.environment("EDITOR", "sed -i s/256M/512M/");
        expect(&fleet.run(&["edit", "web"]), 0, "web defined again", "");
        expect(&fleet.run(&["show", "web"]), 0, "Memory      512M", "");
        fleet.environment("EDITOR", "true");
        expect(&fleet.run(&["edit", "web"]), 0, "web unchanged\n", "");
        fleet.environment("EDITOR", "false");
        expect(&fleet.run(&["edit", "web"]), 1, "", "nothing was changed");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no draft is left");
        // What cannot be taken is kept, and said where.
        fleet.environment("EDITOR", "sed -i s/memory/memroy/");
        expect(&fleet.run(&["edit", "web"]), 5, "", "memroy");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        expect(&fleet.run(&["edit", "nope"]), 3, "", "nope");
    }

    #[test]
    fn a_vm_is_made_from_an_image_in_one_line() {
        let Some(fleet) = fleet() else { return };
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("id.pub"), "ssh-ed25519 AAAA me\n").unwrap();
        std::fs::write(path("user-data"), "#cloud-config\n").unwrap();
        let line = ["create", "web", "--image", "/images/debian.qcow2", "--size", "20G", "--cpus", "2"];
        let (key, data) = (path("id.pub"), path("user-data"));
        let more = ["--ssh-key", &key, "--user-data", &data, "--network", "lan"];
        expect(&fleet.run(&[&line[..], &more[..]].concat()), 0, "web created and started\n", "");
        let call = fleet.calls().remove(0);
        for part in [
            "create web /images/debian.qcow2 ",
            "21474836480 ",
            "ssh-ed25519 AAAA me",
            "#cloud-config",
            "start=true",
            "whole=false",
            "\"memory\":\"1G\"",
            "\"network\":\"lan\"",
        ] {
            assert!(call.contains(part), "{part}: {call}");
        }
        assert!(!call.contains("machine") && !call.contains("kernel"), "{call}");
        expect(&fleet.run(&["create", "web", "--image", "x"]), 6, "", "exists");
        std::fs::write(path("id"), "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
        expect(&fleet.run(&["create", "b", "--image", "x", "--ssh-key", &path("id")]), 5, "", "private key");
        expect(&fleet.run(&["create", "b", "--image", "x", "--user-data", "/none"]), 1, "", "/none");
        assert_eq!(fleet.calls().iter().filter(|call| call.starts_with("create b")).count(), 0);
    }

    #[test]
    fn jobs_are_cancelled_by_number() {
        let Some(fleet) = fleet() else { return };
        expect(&fleet.run(&["job", "list"]), 0, "", "No jobs");
        expect(&fleet.run(&["job", "list", "--json"]), 0, "[]", "");
        let ran = fleet.run(&["job", "cancel", "17", "18"]);
        assert!(ran.status != 0 && ran.out == "job 17 is being cancelled\n", "{ran:?}");
        assert!(ran.err.contains("job 18"), "{ran:?}");
        assert_eq!(fleet.calls(), ["cancel 17", "cancel 18"]);
        assert_eq!(fleet.run(&["job", "cancel", "x"]).status, 2);
    }

    #[test]
    fn a_host_is_drained_and_not_any_more() {
        let Some(fleet) = fleet() else { return };
        expect(&fleet.run(&["define", "web", "--kernel", "/k"]), 0, "", "");
        expect(&fleet.run(&["drain"]), 0, "drained: no VM starts", "");
        expect(&fleet.run(&["drain", "--stop", "--timeout", "5s"]), 0, "drained: no VM starts", "");
        expect(&fleet.run(&["undrain"]), 0, "may start", "");
        assert_eq!(fleet.calls()[1..], ["drain", "drain", "undrain"]);
    }

    #[test]
    fn many_names_at_once_and_one_that_fails() {
        let Some(fleet) = fleet() else { return };
        for name in ["a", "b"] {
            expect(&fleet.run(&["define", name, "--kernel", "/k"]), 0, "", "");
        }
        let ran = fleet.run(&["start", "a", "nope", "b"]);
        expect(&ran, 3, "a started\nb started\n", "nope");
        expect(&fleet.run(&["start", "a"]), 6, "", "a: running already");
        expect(&fleet.run(&["stop", "a", "b", "--now"]), 0, "a stopped\nb stopped\n", "");
        assert!(fleet.calls().contains(&"power-off b".to_owned()));
    }

    #[test]
    fn a_failed_job_gives_its_reason_and_its_status() {
        let Some(fleet) = fleet() else { return };
        fleet.run(&["define", "broken", "--kernel", "/k"]);
        expect(&fleet.run(&["start", "broken"]), 1, "", "broken: no such kernel");
        // What `run` has made for a start that fails is gone afterwards.
        fleet.run(&["rm", "broken"]);
        expect(&fleet.run(&["run", "broken", "--kernel", "/k"]), 1, "", "broken: no such kernel");
        expect(&fleet.run(&["list", "--json"]), 0, "[]", "");
    }

    #[test]
    fn run_shows_the_console_and_types_what_comes_in() {
        let Some(fleet) = fleet() else { return };
        let ran = fleet.run_with_input(&["run", "web", "--kernel", "/k", "--linger", "200ms"], "hello\n");
        expect(&ran, 0, "guest says: hello", "web runs on");
        assert_eq!(fleet.calls()[1..4], ["start web paused", "console web", "resume web"]);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("db.json");
        std::fs::write(&file, r#"{"kernel":"k","memory":"512M"}"#).unwrap();
        let ran = fleet.run(&["run", file.to_str().unwrap(), "--detach"]);
        expect(&ran, 0, "db started\n", "Defined db: 512M");
        let ran = fleet.run_with_input(&["console", "web", "--linger", "200ms"], "bye\n");
        expect(&ran, 0, "guest says: bye", "has ended");
    }

    #[test]
    fn a_terminal_is_raw_meanwhile_and_as_before_afterwards() {
        use std::io::{Read, Write};

        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        use rustix::termios::{LocalModes, tcgetattr};

        let Some(fleet) = fleet() else { return };
        fleet.run(&["define", "web", "--kernel", "/k"]);
        let (mut keyboard, screen) = crate::fake::terminal();
        let before = tcgetattr(&screen).unwrap().local_modes;
        assert!(before.contains(LocalModes::ICANON));
        let running = fleet.spawn_on(&["console", "web"], &screen);
        let mut seen = String::new();
        let mut read_until = |text: &str, from: &mut std::fs::File| {
            let mut buffer = [0; 1024];
            while !seen.contains(text) {
                let mut ready = [PollFd::new(&*from, PollFlags::IN)];
                let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
                assert_eq!(poll(&mut ready, Some(&limit)).unwrap(), 1, "no {text:?} after {seen:?}");
                let count = from.read(&mut buffer).unwrap();
                seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        };
        read_until("Ctrl-] leaves it", &mut keyboard);
        keyboard.write_all(b"hello\n").unwrap();
        read_until("guest says: hello", &mut keyboard);
        assert!(!tcgetattr(&screen).unwrap().local_modes.contains(LocalModes::ICANON));
        keyboard.write_all(b"\x1d").unwrap();
        assert_eq!(running.wait().status, 0);
        assert_eq!(tcgetattr(&screen).unwrap().local_modes, before);
    }

    #[test]
    fn run_makes_up_a_name_for_the_default_guest() {
        let Some(fleet) = fleet() else { return };
        let guest = tempfile::NamedTempFile::new().unwrap();
        fleet.environment("FLOTILLA_GUEST", guest.path().to_str().unwrap());
        let ran = fleet.run_with_input(&["run", "--rm", "--linger", "100ms"], "x\n");
        expect(&ran, 0, "guest says: x", "Removed ");
        expect(&fleet.run(&["list", "--json"]), 0, "[]", "");
        fleet.environment("FLOTILLA_GUEST", "/nonexistent");
        expect(&fleet.run(&["run"]), 1, "", "FLOTILLA_GUEST: /nonexistent");
    }

    #[test]
    fn errors_are_one_line_with_a_status() {
        let Some(fleet) = fleet() else { return };
        for (args, status, err) in [
            (&["show", "nope"][..], 3, "no VM \"nope\""),
            (&["console", "nope"], 3, "no VM \"nope\""),
            (&["rm", "nope"], 3, "no VM \"nope\""),
            (&["define", "bad!name", "--kernel", "/k"], 5, "bad!name"),
            (&["define", "/nonexistent.toml"], 1, "/nonexistent.toml"),
            (&["define", "/"], 5, "folder"),
            (&["qmp", "nope", "{"], 2, "JSON"),
        ] {
            let ran = fleet.run(args);
            expect(&ran, status, "", err);
            assert_eq!(ran.err.lines().count(), 1, "{ran:?}");
        }
        expect(&fleet.run(&["start"]), 2, "", "Usage");
        expect(&fleet.run(&["--bus", "unix:path=/nonexistent", "list"]), 4, "", "cannot reach the bus");
    }

    #[test]
    fn a_daemon_that_is_not_there_or_goes_away_is_noticed() {
        let Some(fleet) = fleet() else { return };
        fleet.run(&["define", "slow", "--kernel", "/k"]);
        let begun = Instant::now();
        let running = fleet.spawn(&["start", "slow"]);
        while !fleet.calls().contains(&"start slow run".to_owned()) {
            assert!(begun.elapsed() < Duration::from_secs(30), "the call never came");
            std::thread::sleep(Duration::from_millis(10));
        }
        fleet.go_away();
        expect(&running.wait(), 4, "", "went away");
        expect(&fleet.run(&["list"]), 4, "", "flotillad is not running");
    }
}
