//! `flotilla doctor`: looks at the host and says what keeps VMs from running, or makes them slow, and how to mend it. Reads files only.
//!
//! Every check is a function of a [`Host`], a folder that is `/`, or a made-up one in tests.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::args::watch::DoctorArgs;
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::network;
use crate::output::{self, plain};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Mark {
    /// As it should be.
    Good,
    /// It works, and could be better.
    Hint,
    /// VMs do not run.
    Bad,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    mark: Mark,
    what: &'static str,
    text: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    mend: String,
}

fn good(what: &'static str, text: impl Into<String>) -> Finding {
    Finding { mark: Mark::Good, what, text: text.into(), mend: String::new() }
}

fn hint(what: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { mark: Mark::Hint, what, text: text.into(), mend: mend.into() }
}

fn bad(what: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { mark: Mark::Bad, what, text: text.into(), mend: mend.into() }
}

/// The host's files.
struct Host(PathBuf);

impl Host {
    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok().map(|text| text.trim().to_owned())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }
}

/// Everything that can be seen without the daemon.
fn examine(host: &Host) -> Vec<Finding> {
    [kvm, tun, cgroups, system, pages, clock, creation, bridges, programs, threads, descriptors]
        .into_iter()
        .flat_map(|check| check(host))
        .collect()
}

fn kvm(host: &Host) -> Vec<Finding> {
    let what = "kvm";
    let cpu = host.read("/proc/cpuinfo").unwrap_or_default();
    let flag = |flag: &str| {
        cpu.lines().any(|line| line.starts_with("flags") && line.split_whitespace().any(|word| word == flag))
    };
    let module = match (flag("vmx"), flag("svm")) {
        (true, _) => "kvm_intel",
        (_, true) => "kvm_amd",
        _ => {
            let text = "the processor shows no virtualisation (neither vmx nor svm)";
            let mend = "switch it on in the firmware's set-up (VT-x, AMD-V); on a VM, let its host pass it on (nested)";
            return vec![bad(what, text, mend)];
        }
    };
    let path = host.path("/dev/kvm");
    match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(_) => vec![good(what, "the processor virtualises, and /dev/kvm can be opened")],
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            vec![bad(what, "there is no /dev/kvm", format!("modprobe {module}"))]
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            // VMs of the fleet have the group; only VMs that this user starts by hand need it.
            let text = "this user may not open /dev/kvm; VMs of the fleet may";
            vec![hint(what, text, "usermod -aG kvm USER, for VMs that you run by hand")]
        }
        Err(error) => {
            vec![bad(what, format!("/dev/kvm: {error}"), format!("modprobe -r {module}; modprobe {module}"))]
        }
    }
}

fn tun(host: &Host) -> Vec<Finding> {
    let tap = match host.exists("/dev/net/tun") {
        true => good("network", "/dev/net/tun is there"),
        false => bad("network", "there is no /dev/net/tun, so no VM can have a card", "modprobe tun"),
    };
    let vhost = match host.exists("/dev/vhost-net") {
        true => good("vhost", "/dev/vhost-net is there"),
        false => {
            hint("vhost", "there is no /dev/vhost-net: cards with vhost=on do not work", "modprobe vhost_net")
        }
    };
    vec![tap, vhost]
}

fn cgroups(host: &Host) -> Vec<Finding> {
    let what = "cgroups";
    let Some(controllers) = host.read("/sys/fs/cgroup/cgroup.controllers") else {
        let mend = "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line";
        return vec![hint(what, "this host has no unified control groups: limits of VMs do not hold", mend)];
    };
    let missing: Vec<&str> = ["cpu", "cpuset", "io", "memory", "pids"]
        .into_iter()
        .filter(|wanted| !controllers.split_whitespace().any(|one| one == *wanted))
        .collect();
    if missing.is_empty() {
        return vec![good(what, "unified, with all controllers")];
    }
    let text = format!("limits by {} do not hold: the kernel does not offer them", missing.join(", "));
    let mend = match missing.contains(&"memory") {
        true => "boot with cgroup_enable=memory on the kernel's command line",
        false => "use a kernel that has these controllers",
    };
    vec![hint(what, text, mend)]
}

fn system(host: &Host) -> Vec<Finding> {
    match host.exists("/run/systemd/system") {
        true => vec![good("systemd", "runs")],
        false => vec![hint(
            "systemd",
            "does not run here: VMs are plain children of flotillad, without limits and users of their own",
            "start flotillad with --launcher process, or use a host with systemd",
        )],
    }
}

/// The word in brackets: `always [madvise] never`.
fn chosen(text: &str) -> &str {
    text.split('[').nth(1).and_then(|rest| rest.split(']').next()).unwrap_or(text)
}

fn pages(host: &Host) -> Vec<Finding> {
    let what = "huge pages";
    let huge = host.read("/sys/kernel/mm/transparent_hugepage/enabled");
    let mut findings = vec![match huge.as_deref().map(chosen) {
        Some("never") => hint(
            what,
            "transparent huge pages are off: guests fault in 4 KiB at a time, and run slower",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(word) => good(what, format!("transparent huge pages: {word}")),
        None => hint(
            what,
            "this kernel has no transparent huge pages: guests run slower",
            "use a kernel that has them",
        ),
    }];
    if host.number("/proc/sys/vm/overcommit_memory") == Some(2) {
        findings.push(hint(
            "memory",
            "vm.overcommit_memory is 2: guests' memory counts in full from the start, used or not",
            "sysctl vm.overcommit_memory=0",
        ));
    }
    findings
}

fn clock(host: &Host) -> Vec<Finding> {
    let source = host.read("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    match source.as_deref() {
        Some("tsc" | "kvm-clock" | "hyperv_clocksource_tsc_page") | None => Vec::new(),
        Some(other) => vec![hint(
            "clock",
            format!("the clock is {other}: every look at it is slow, in guests too"),
            "see `dmesg | grep -i clocksource` for why tsc was given up; boot with tsc=reliable if it is sound",
        )],
    }
}

/// What makes a new VM wait: each costs milliseconds.
fn creation(host: &Host) -> Vec<Finding> {
    let what = "start";
    let mitigated = host.read("/sys/module/kvm/parameters/nx_huge_pages").is_some_and(|text| text == "Y");
    let mounts = host.read("/proc/self/mounts").unwrap_or_default();
    let favours = mounts
        .lines()
        .filter(|line| line.split_whitespace().nth(2) == Some("cgroup2"))
        .any(|line| line.contains("favordynmods"));
    let mut findings = Vec::new();
    if mitigated && !favours {
        // The recovery thread joins the VMM's control group, which waits for an RCU grace period unless the hierarchy favours moves.
        findings.push(hint(
            what,
            "each VM waits for the kernel while its helper thread joins a control group (kvm.nx_huge_pages)",
            "mount -o remount,favordynmods /sys/fs/cgroup; or boot with kvm.nx_huge_pages=never where the guests are trusted",
        ));
    }
    if findings.is_empty() {
        findings.push(good(what, "nothing is known to hold a new VM up"));
    }
    findings
}

fn bridges(host: &Host) -> Vec<Finding> {
    if host.number("/proc/sys/net/bridge/bridge-nf-call-iptables") != Some(1) {
        return Vec::new();
    }
    vec![hint(
        "bridges",
        "what goes over bridges passes through iptables (bridge-nf-call-iptables): slower, and rules for the host may drop it",
        "sysctl net.bridge.bridge-nf-call-iptables=0, if no container engine needs it",
    )]
}

/// What networks with NAT and with DHCP are made with.
fn programs(host: &Host) -> Vec<Finding> {
    let there = |program: &str| {
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| host.exists(&format!("{dir}/{program}")))
    };
    [
        ("nat", "nft", "apt install nftables, or dnf install nftables"),
        ("dhcp", "dnsmasq", "apt install dnsmasq-base, or dnf install dnsmasq"),
    ]
    .into_iter()
    .map(|(what, program, mend)| match there(program) {
        true => good(what, format!("{program} is there")),
        false => hint(what, format!("there is no {program}: networks with {what} cannot be defined"), mend),
    })
    .collect()
}

fn threads(host: &Host) -> Vec<Finding> {
    // A VM has a handful of threads; this is room for a thousand VMs.
    const ROOM: u64 = 16_384;
    let low: Vec<&str> = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"]
        .into_iter()
        .filter(|path| host.number(path).is_some_and(|number| number < ROOM))
        .collect();
    let name = |path: &str| path.trim_start_matches("/proc/sys/").replace('/', ".");
    low.into_iter()
        .map(|path| {
            let text = format!("{} leaves no room for a thousand VMs", name(path));
            hint("limits", text, format!("sysctl {}=65536", name(path)))
        })
        .collect()
}

fn descriptors(host: &Host) -> Vec<Finding> {
    match host.number("/proc/sys/fs/nr_open") {
        Some(number) if number < 524_288 => vec![hint(
            "limits",
            "fs.nr_open is below what flotillad asks for (524288 descriptors)",
            "sysctl fs.nr_open=1048576",
        )],
        _ => Vec::new(),
    }
}

/// What the daemon says of itself.
async fn daemon(bus: &crate::args::Bus) -> Vec<Finding> {
    let what = "flotillad";
    let state = async {
        let client = Client::connect(bus).await?;
        let state = client.manager.state().await.map_err(|error| client.bus_failed(error))?;
        let corrupt = client.manager.corrupt_records().await.map_err(|error| client.bus_failed(error))?;
        let orphans = client.manager.orphans().await.map_err(|error| client.bus_failed(error))?;
        let rows = client.manager.list_vms().await.map_err(|error| client.failed(error))?;
        let networks = network::all_problems(&client).await?;
        Ok::<_, Failure>((state, corrupt, orphans, rows, networks))
    };
    let (state, corrupt, orphans, rows, networks) = match state.await {
        Ok(found) => found,
        Err(failure) => return vec![bad(what, failure.to_string(), "systemctl enable --now flotillad")],
    };
    let mut findings = Vec::new();
    for (path, reason) in corrupt {
        let text = format!("a record was set aside: {}: {}", plain(&path), plain(&reason));
        findings.push(hint(what, text, "define that VM or network again, then remove the file"));
    }
    for (name, unit, pid) in orphans {
        let text = format!("process {pid} is VM {}'s, but no such VM is defined", plain(&name));
        let end = if unit.is_empty() {
            format!("kill {pid}")
        } else {
            format!("systemctl stop '{}'", plain(&unit))
        };
        findings.push(hint(
            what,
            text,
            format!("define that VM again and restart flotillad, or end it: {end}"),
        ));
    }
    for (name, problem) in networks {
        // The text says what to do.
        let text = format!("network {}: {}", plain(&name), plain(&problem));
        findings.push(hint(
            "network",
            text,
            format!("then look again: flotilla network show {}", plain(&name)),
        ));
    }
    for row in rows.iter().filter(|row| row.2 == "quarantined") {
        let text = format!("VM {} does not answer", plain(&row.0));
        findings.push(hint(what, text, format!("flotilla logs {0}; flotilla stop --now {0}", plain(&row.0))));
    }
    if state == "draining" {
        findings.push(hint(what, "the host is drained: nothing is started", "flotilla undrain"));
    }
    if findings.is_empty() {
        findings.push(good(what, format!("{state}, {} VMs", rows.len())));
    }
    findings
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.mark {
            Mark::Good => "ok  ",
            Mark::Hint => "hint",
            Mark::Bad => "BAD ",
        };
        text += &format!("{mark}  {:<10}  {}\n", finding.what, finding.text);
        if !finding.mend.is_empty() {
            text += &format!("                  mend: {}\n", finding.mend);
        }
    }
    text
}

/// Looks at the host; fails when VMs cannot run on it.
pub(crate) async fn doctor(bus: &crate::args::Bus, args: &DoctorArgs) -> Result<(), Failure> {
    let mut findings = examine(&Host(Path::new("/").to_owned()));
    findings.extend(daemon(bus).await);
    if args.json {
        output::json(&findings)?;
    } else {
        output::print(&text(&findings))?;
    }
    match findings.iter().filter(|finding| finding.mark == Mark::Bad).count() {
        0 => Ok(()),
        count => Err(Failure::new(Exit::Failed, format!("{count} of these keep VMs from running"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host(dir.path().to_owned());
        (dir, host)
    }

    fn found(files: &[(&str, &str)], what: &str) -> Option<Finding> {
        let (_dir, host) = host(files);
        examine(&host).into_iter().filter(|finding| finding.what == what).max_by_key(|finding| finding.mark)
    }

    #[test]
    fn a_good_host_gets_no_advice() {
        let files = [
            ("proc/cpuinfo", "flags\t\t: fpu vmx"),
            ("dev/kvm", ""),
            ("dev/net/tun", ""),
            ("dev/vhost-net", ""),
            ("usr/sbin/nft", ""),
            ("usr/bin/dnsmasq", ""),
            ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids rdma"),
            ("run/systemd/system/x", ""),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never"),
            ("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc"),
            ("proc/sys/kernel/pid_max", "4194304"),
        ];
        let (_dir, host) = host(&files);
        let findings = examine(&host);
        assert!(findings.iter().all(|finding| finding.mark == Mark::Good), "{}", text(&findings));
    }

    #[test]
    fn every_trouble_has_a_mend() {
        let cases: &[(&str, &str, &str, &str)] = &[
            ("proc/cpuinfo", "flags : fpu", "kvm", "firmware"),
            ("proc/cpuinfo", "flags : svm", "kvm", "modprobe kvm_amd"),
            ("x", "", "network", "modprobe tun"),
            ("x", "", "nat", "install nftables"),
            ("x", "", "dhcp", "dnsmasq"),
            ("sys/fs/cgroup/cgroup.controllers", "cpu io pids cpuset", "cgroups", "cgroup_enable=memory"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]", "huge pages", "madvise"),
            ("sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet", "clock", "tsc"),
            ("sys/module/kvm/parameters/nx_huge_pages", "Y", "start", "favordynmods"),
            ("proc/sys/net/bridge/bridge-nf-call-iptables", "1", "bridges", "sysctl"),
            ("proc/sys/kernel/pid_max", "4096", "limits", "kernel.pid_max=65536"),
            ("proc/sys/vm/overcommit_memory", "2", "memory", "sysctl"),
        ];
        for (path, content, what, mend) in cases {
            let finding = found(&[(path, content)], what).unwrap();
            assert!(finding.mark > Mark::Good && finding.mend.contains(mend), "{path}: {finding:?}");
        }
        // A hierarchy that favours moves has no wait.
        let favoured = [
            ("sys/module/kvm/parameters/nx_huge_pages", "Y"),
            ("proc/self/mounts", "c /sys/fs/cgroup cgroup2 rw,favordynmods 0 0"),
        ];
        assert_eq!(found(&favoured, "start").unwrap().mark, Mark::Good);
    }

    #[test]
    fn it_reads_well() {
        let text = text(&[good("kvm", "fine"), bad("network", "no tun", "modprobe tun")]);
        assert_eq!(
            text,
            "ok    kvm         fine\nBAD   network     no tun\n                  mend: modprobe tun\n"
        );
    }
}
