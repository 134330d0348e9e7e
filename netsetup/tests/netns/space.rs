//! A network namespace for a test, and more of them for those it talks to. All are gone with the test.
//!
//! `unshare` and rtnetlink sockets go by thread, so each test has a thread, and a runtime that never leaves it.

use std::future::Future;
use std::process::{Child, Command, Output};

use netsetup::Net;

/// Runs a test in an empty network namespace.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(Net) -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap_or_else(|error| {
            panic!("no network namespace ({error}): these tests need root and CAP_SYS_ADMIN")
        });
        assert!(std::path::Path::new("/dev/net/tun").exists(), "no /dev/net/tun: load the tun module");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let test = test(Net::connect().unwrap());
            tokio::time::timeout(std::time::Duration::from_secs(60), test).await.expect("the test hangs");
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// `ip` speaks for the administrator here, and is a second witness of what we did.
pub(crate) fn ip(arguments: &str) -> String {
    let output =
        Command::new("ip").args(arguments.split(' ')).output().expect("these tests need ip (iproute2)");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Another host: a namespace that a process holds.
pub(crate) struct Peer(Child);

impl Peer {
    /// One without links.
    pub(crate) fn new() -> Peer {
        let peer = Peer(Command::new("unshare").args(["--net", "sleep", "120"]).spawn().unwrap());
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let theirs = format!("/proc/{}/ns/net", peer.0.id());
        for _ in 0..5000 {
            if std::fs::read_link(&theirs).is_ok_and(|theirs| theirs != own) {
                return peer;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        panic!("unshare --net does not begin");
    }

    /// A cable: `here` stays, `there` is theirs.
    pub(crate) fn plug(&self, here: &str, there: &str) {
        ip(&format!("link add {here} type veth peer name {there} netns {}", self.0.id()));
        ip(&format!("link set {here} up"));
        self.ok(&format!("ip link set {there} up"));
    }

    /// Runs a program there.
    pub(crate) fn run(&self, line: &str) -> Output {
        let space = format!("--net=/proc/{}/ns/net", self.0.id());
        Command::new("nsenter").arg(space).args(line.split(' ')).output().unwrap()
    }

    /// As [`Peer::run`]; it must succeed.
    pub(crate) fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
