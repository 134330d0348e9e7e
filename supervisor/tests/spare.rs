//! `flotilla-exec` in a spare, as a real process, before a launch socket of the test's own: it waits, through the end of a daemon, and becomes what it
//! is told; or it is not needed and ends in peace.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail with it")]

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};

use supervisor::launch::handover::{encode, send_with};

fn start(socket: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_flotilla-exec"))
        .arg("Spare-7")
        .env("FLOTILLA_LAUNCH_SOCKET", socket)
        .spawn()
        .unwrap()
}

/// The next process that asks.
fn asked(listener: &UnixListener) -> UnixStream {
    let (socket, _) = listener.accept().unwrap();
    let mut line = String::new();
    BufReader::new(&socket).read_line(&mut line).unwrap();
    assert_eq!(line, "spare Spare-7\n");
    socket
}

#[test]
fn it_waits_through_a_daemons_end_and_becomes_what_the_next_one_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("launch.sock");
    let mut child = {
        let listener = UnixListener::bind(&path).unwrap();
        let child = start(&path);
        // The daemon ends while it waits, and its socket with it.
        drop(asked(&listener));
        child
    };
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let socket = asked(&listener);
    let out = dir.path().join("out");
    std::fs::write(dir.path().join("disk"), "content").unwrap();
    let disk = std::fs::File::open(dir.path().join("disk")).unwrap();
    let script = format!("echo $FLOTILLA_FDS $FLOTILLA_JOURNAL $$ $(cat <&3) >{}", out.display());
    let answer = encode(["ok", "table", "/bin/sh", "-c", &script, "-name", "web"]).unwrap();
    assert_eq!(send_with(&socket, &answer, &[disk.as_raw_fd()]).unwrap(), answer.len());
    let id = child.id();
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read_to_string(out).unwrap(), format!("table web {id} content\n"));
}

#[test]
fn one_that_is_not_needed_ends_in_peace() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("launch.sock");
    let listener = UnixListener::bind(&path).unwrap();
    for (answer, good) in [(["ok"].as_slice(), true), (&["error", "no"], false)] {
        let mut child = start(&path);
        let socket = asked(&listener);
        send_with(&socket, &encode(answer.iter().copied()).unwrap(), &[]).unwrap();
        assert_eq!(child.wait().unwrap().success(), good);
    }
}
