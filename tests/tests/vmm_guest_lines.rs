//! Whole command lines as scripts and orchestrators write them, each started as it stands, with only paths and names put in. On this machine's
//! own `/dev/kvm`; where there is none, on a test host.

use serde_json::Value;

use tests::host::Host;
use tests::qmp::Qmp;
use tests::scenario::{Outcome, SOON, check, here_or_on_a_host};

/// One machine, one tap, and one folder, for one VM after the other.
struct Place {
    host: Host,
    vmm: String,
    guest: String,
    dir: String,
    tap: String,
    /// Of vsock; a machine may have none.
    vhost: bool,
}

impl Place {
    fn new() -> Outcome<Self> {
        let (host, vmm, guest) = here_or_on_a_host("vmm-guest-lines")?;
        let me = std::process::id();
        let (dir, tap) = (format!("/run/vmm/lines-{me}"), format!("fll{me}"));
        host.ok(&format!(
            "mkdir -p {dir}/memory && truncate -s 16M {dir}/root {dir}/more && head -c 4096 /dev/zero > {dir}/initrd && \
             ip tuntap add {tap} mode tap && ip link set {tap} up"
        ))?;
        let vhost = host.run("test -c /dev/vhost-vsock -a -c /dev/vhost-net")?.code == 0;
        Ok(Self { host, vmm, guest, dir, tap, vhost })
    }

    /// Starts the VM; `{}` names in `line` are filled in. The line ends with `-daemonize`, or the shell puts it into the background.
    fn start(&self, line: &str) -> Outcome<Qmp> {
        let line = [("{dir}", &self.dir), ("{tap}", &self.tap), ("{kernel}", &self.guest)]
            .iter()
            .fold(line.to_owned(), |line, (name, value)| line.replace(name, value));
        let (dir, vmm) = (&self.dir, &self.vmm);
        // What a line leaves to the shell, such as standard streams, is none of a terminal's here.
        let run = if line.contains("-daemonize") {
            format!("{vmm} {line} < /dev/null > {dir}/out 2>&1")
        } else {
            format!("(setsid {vmm} {line} < /dev/null > {dir}/out 2>&1 &)")
        };
        let started = self.host.run(&format!("rm -f {dir}/out {dir}/pid {dir}/log; {run}"))?;
        let said = || self.host.ok(&format!("cat {dir}/out")).unwrap_or_default();
        check(started.code == 0, || format!("exit code {}: {}", started.code, said()))?;
        let socket = format!("{dir}/qmp.sock");
        self.host
            .eventually(SOON, &format!("test -S {socket}"))
            .map_err(|error| format!("{error}: {}", said()))?;
        Ok(Qmp::new(self.host.dial(&socket)?, SOON)?)
    }

    /// Ends the VM, and sees that it left nothing.
    fn end(&self, qmp: &mut Qmp) -> Outcome {
        qmp.ask("quit")?;
        let dir = &self.dir;
        self.host.eventually(SOON, &format!("! test -e {dir}/qmp.sock && ! test -e {dir}/pid"))?;
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (dir, tap) = (&self.dir, &self.tap);
        let _ = self.host.run(&format!(
            "for pid in $(grep -l {dir}/qmp.sock /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3); do \
             test $pid = $$ || kill -9 $pid; done; ip link del {tap}; rm -rf {dir}"
        ));
    }
}

const CONSOLE: &str = "-device virtio-serial-device -chardev socket,path={dir}/console.sock,id=virtioconsole0,server,nowait \
                       -device virtconsole,chardev=virtioconsole0,id=console_0";
const APPEND: &str =
    "-append \"rw console=hvc0 lastbus=0 reboot=k panic=1 tsc=reliable ipv6.disable=1 root=/dev/vda\"";

fn kind(devices: &Value, name: &str) -> Option<String> {
    let found = devices.as_array()?.iter().find(|d| d["name"] == name)?;
    found["type"].as_str().map(str::to_owned)
}

#[test]
fn whole_lines_run_as_they_stand() -> Outcome {
    let place = Place::new()?;
    let manual = "-machine microvm -kernel {kernel} -smp 1 -m 1024 \
        -append \"console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda\" \
        -drive file={dir}/root,id=rootfs,readonly=off,direct=off -device virtio-blk-device,drive=rootfs \
        -qmp unix:{dir}/qmp.sock,server,nowait -serial stdio";
    let mut qmp = place.start(manual)?;
    place.host.eventually(SOON, &format!("grep 'guest>' {}/out", place.dir))?;
    place.end(&mut qmp)?;

    // The orchestrator's tests: everything that they write, in their order.
    let vhost = if place.vhost { "-device vhost-vsock-device,id=vsock-7,guest-cid=7" } else { "" };
    let net = if place.vhost { ",vhost=on" } else { "" };
    let most = format!(
        "-name microvm -D {{dir}}/log -qmp unix:{{dir}}/qmp.sock,server,nowait -pidfile {{dir}}/pid \
         -machine microvm,dump-guest-core=on,mem-share=on -daemonize -S {CONSOLE} \
         -netdev tap,id={{tap}},ifname={{tap}}{net} -device virtio-net-device,netdev={{tap}},id={{tap}},iothread=iothread1,mac=52:54:00:12:34:57 \
         -object rng-random,id=objrng0,filename=/dev/urandom -device virtio-rng-device,rng=objrng0,max-bytes=1000,period=1000 {vhost} \
         -device virtio-balloon-device,deflate-on-oom=true,free-page-reporting=true -object iothread,id=iothread1 \
         -kernel {{kernel}} {APPEND} -initrd {{dir}}/initrd -smp 4 -m 2048 -mem-path {{dir}}/memory -cpu host \
         -drive id=rootfs,file={{dir}}/root,readonly=off,direct=on,throttling.iops-total=1000 \
         -device virtio-blk-device,drive=rootfs,id=rootfs,iothread=iothread1,serial=1234 \
         -drive id=more,file={{dir}}/more,readonly=on -device virtio-blk-device,drive=more,id=more"
    );
    let mut qmp = place.start(&most)?;
    check(qmp.ask("query-status")?["status"] == "paused", || "-S was overlooked".into())?;
    qmp.ask("cont")?;
    check(qmp.ask("query-cpus")?.as_array().is_some_and(|cpus| cpus.len() == 4), || "not 4 vCPUs".into())?;
    check(qmp.ask("query-balloon")?["actual"] == 2048u64 << 20, || "the balloon holds something".into())?;
    let path = serde_json::json!({ "path": "/machine/peripheral" });
    let devices = qmp.execute("qom-list", &path, SOON)?;
    for (id, driver) in [
        ("rootfs", "virtio-blk-device"),
        ("more", "virtio-blk-device"),
        (place.tap.as_str(), "virtio-net-device"),
        ("console_0", "virtconsole"),
    ] {
        check(kind(&devices, id) == Some(format!("child<{driver}>")), || format!("{id}: {devices}"))?;
    }
    place
        .host
        .ok(&format!("test -S {0}/console.sock && kill -0 $(cat {0}/pid) && test -f {0}/log", place.dir))?;
    place.end(&mut qmp)?;

    // The container runtime: descriptors that it has opened, log on standard error.
    let kata = "-name sandbox-1 -uuid 6f1c2b1e-7d1a-4a58-9f0e-5b7c1f6f9a10 -smp 1 -m 2048M -kernel {kernel} \
        -append \"tsc=reliable no_timer_check pci=off iommu=off acpi=off\" -qmp unix:{dir}/qmp.sock,server,nowait -D -disable-seccomp \
        -machine type=microvm,dump-guest-core=off,mem-share=on -initrd {dir}/initrd \
        -object rng-random,id=objrng0,filename=/dev/urandom -device virtio-rng-device,id=virtio-rng0,rng=objrng0 \
        -device virtio-serial-device,id=virtio-serial0 -chardev socket,id=charconsole0,path={dir}/console.sock,server,nowait \
        -device virtconsole,id=virtio-console0,chardev=charconsole0,nr=0 \
        -drive id=rootfs,file={dir}/root,readonly=on,direct=off -device virtio-blk-device,drive=rootfs,id=rootfs";
    let mut qmp = place.start(kata)?;
    check(qmp.ask("query-status")?["status"] == "running", || "it does not run".into())?;
    let uuid = qmp.ask("query-uuid")?;
    check(uuid["UUID"] == "6f1c2b1e-7d1a-4a58-9f0e-5b7c1f6f9a10", || uuid.to_string())?;
    place.end(&mut qmp)?;
    place.host.ok(&format!("grep -q ':INFO: ' {}/out", place.dir))?;

    // What libvirt asks a VMM before it uses it.
    let libvirt = "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg -daemonize \
        -qmp unix:{dir}/qmp.sock,server,nowait -pidfile {dir}/pid";
    let mut qmp = place.start(libvirt)?;
    for command in [
        "query-version",
        "query-commands",
        "query-kvm",
        "query-machines",
        "query-qmp-schema",
        "qom-list-types",
    ] {
        qmp.ask(command)?;
    }
    place.end(&mut qmp)
}
