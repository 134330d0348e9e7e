//! A hostile guest on a VMM that is watched from outside: owns what the scenarios with the default guest's `hostile` command share.
//! The table of cases and of what each may end in is the guest's.

use std::time::Duration;

use crate::console::Console;
use crate::host::Host;
use crate::scenario::{Outcome, Vmm, check};

/// For all cases, on an emulated machine that does other things too; this machine's own /dev/kvm takes a minute.
const ALL: Duration = Duration::from_secs(900);

/// What the VMM holds.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    /// Resident memory, guest RAM included.
    pub rss_kib: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
}

/// KiB by which the VMM may grow from one run of all cases to the next.
const GROWTH: u64 = 8 << 10;

impl Held {
    /// An error if the VMM holds more than it did at `first`.
    pub fn no_more_than(&self, first: &Self) -> Outcome {
        let grows = self.descriptors > first.descriptors
            || self.threads > first.threads
            || self.rss_kib > first.rss_kib + GROWTH;
        check(!grows, || format!("it grows: {first:?}, then {self:?}"))
    }
}

/// A network of its own for the VMM: a tap, and a neighbour that sends a packet every 20 ms.
pub struct Net<'a> {
    host: &'a Host,
    /// Of the network namespace.
    pub name: String,
}

impl<'a> Net<'a> {
    /// Makes it.
    ///
    /// # Errors
    /// When the host has no network namespaces or taps.
    pub fn new(host: &'a Host) -> Outcome<Self> {
        let name = format!("hostile-{}", std::process::id());
        let net = Self { host, name };
        let inside = "ip link set lo up && ip tuntap add tap0 mode tap vnet_hdr && ip address add 10.9.7.1/24 dev tap0 && ip link set tap0 up && \
                      ip neighbour add 10.9.7.2 lladdr 02:00:00:00:00:02 dev tap0 nud permanent";
        let packets = "while sleep 0.02; do echo packet > /dev/udp/10.9.7.2/9; done";
        net.host.ok(&format!(
            "ip netns add {0} && ip netns exec {0} sh -c '{inside}' && \
             (setsid ip netns exec {0} bash -c '{packets}' < /dev/null > /dev/null 2>&1 & echo $! > /run/{0}.pid)",
            net.name
        ))?;
        Ok(net)
    }
}

impl Drop for Net<'_> {
    fn drop(&mut self) {
        let _ = self
            .host
            .run(&format!("kill $(cat /run/{0}.pid); rm -f /run/{0}.pid; ip netns delete {0}", self.name));
    }
}

/// What a VMM holds now.
///
/// # Errors
/// When it is gone.
pub fn held(host: &Host, vmm: &Vmm<'_>) -> Outcome<Held> {
    let text = host.ok(&format!(
        "pid=$(cat {}); awk '/^VmRSS/ {{ print $2 }}' /proc/$pid/status; ls /proc/$pid/fd | wc -l; ls /proc/$pid/task | wc -l",
        vmm.path("pid")
    ))?;
    let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    match numbers[..] {
        [rss_kib, descriptors, threads] => Ok(Held { rss_kib, descriptors, threads }),
        _ => Err(format!("not three numbers: {text}").into()),
    }
}

/// Runs the cases whose name starts with `prefix` and checks each one's line:
/// `case NAME: OUTCOME; allowed: OUTCOME...; again: served; others: work`. Returns how many there were.
///
/// # Errors
/// When a case did not end as it may, or a target had none.
pub fn run_all(console: &mut Console, prefix: &str, targets: &[&str]) -> Outcome<usize> {
    console.enter(format!("hostile {prefix}").trim_end())?;
    let before = console.text().len();
    let last = console.expect_line(" bad", ALL)?;
    let text = console.text()[before..].replace('\r', "");
    let (mut count, mut bad) = (0, Vec::new());
    for line in text.lines().filter(|line| line.starts_with("case ")) {
        count += 1;
        let fine = line.split_once(": ").and_then(|(_, rest)| {
            let (outcome, rest) = rest.split_once("; allowed: ")?;
            let (allowed, rest) = rest.split_once("; ")?;
            Some(allowed.split(' ').any(|a| a == outcome) && rest == "again: served; others: work")
        });
        if fine != Some(true) {
            bad.push(line.to_owned());
        }
    }
    check(bad.is_empty(), || bad.join("\n"))?;
    check(last == format!("hostile: {count} cases, 0 bad"), || {
        format!("{count} cases seen, but \"{last}\"")
    })?;
    for target in targets {
        let ran = text.lines().any(|line| line.starts_with(&format!("case {target}/")));
        check(ran, || format!("no case of {target} ran"))?;
    }
    Ok(count)
}

/// Arguments for a vsock device, where the host's kernel has its side of it; else says why there is none.
pub fn vsock(host: &Host, cid: u32) -> String {
    match host.ok("modprobe -q vhost_vsock; test -c /dev/vhost-vsock") {
        Ok(_) => format!("-device vhost-vsock-device,guest-cid={cid},id=vsock0"),
        Err(_) => {
            println!("SKIPPED vsock: the host's kernel has no /dev/vhost-vsock (module vhost_vsock)");
            String::new()
        }
    }
}
