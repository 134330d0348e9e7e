//! The table of options: which exist, how many values each takes, and what `-help` says about it.
//!
//! Everything the parser and the help text know about an option's shape is in [`OPTIONS`], once.

/// How many values an option takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arity {
    /// None; may be written once.
    Flag,
    /// Exactly one; may be written once.
    One,
    /// One or none; may be written once.
    Optional,
    /// One or more; may be repeated.
    Many,
}

/// What happens to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Understood.
    Used,
    /// Accepted and without effect: management tools send it to every VMM. May be repeated.
    Ignored,
    /// Known, and refused: a later version will understand it.
    Unsupported,
}

/// One option.
pub(super) struct Spec {
    pub(super) name: &'static str,
    pub(super) arity: Arity,
    pub(super) class: Class,
    /// For `-help`: the value, then a tab, then what it does. Empty for options that are not `Used`.
    pub(super) help: &'static str,
}

const fn used(name: &'static str, arity: Arity, help: &'static str) -> Spec {
    Spec { name, arity, class: Class::Used, help }
}

const fn ignored(name: &'static str) -> Spec {
    Spec { name, arity: Arity::Optional, class: Class::Ignored, help: "" }
}

const fn unsupported(name: &'static str, arity: Arity) -> Spec {
    Spec { name, arity, class: Class::Unsupported, help: "" }
}

/// Second spellings.
pub(super) const ALIASES: [(&str, &str); 3] = [("-h", "-help"), ("-V", "-version"), ("-freeze", "-S")];

/// All options, in the order `-help` shows them.
pub(super) const OPTIONS: &[Spec] = &[
    used("-name", Arity::One, "NAME\tname of the VM, at most 255 bytes"),
    used("-uuid", Arity::One, "UUID\tidentity of the VM, reported over QMP"),
    used(
        "-machine",
        Arity::One,
        "microvm|q35[,dump-guest-core=on|off][,mem-share=on|off]\tthe board (default microvm)",
    ),
    used("-accel", Arity::One, "kvm\tthe accelerator (default kvm)"),
    used("-cpu", Arity::One, "host\tthe CPU model (default host)"),
    used(
        "-smp",
        Arity::One,
        "[cpus=]N[,maxcpus=N][,sockets=N][,dies=N][,clusters=N][,cores=N][,threads=N]\tvCPUs, 1 to 254 (default 1)",
    ),
    used(
        "-m",
        Arity::One,
        "[size=]N[K|M|G]\tguest memory, 128M to 512G; a bare number is MiB (default 256M)",
    ),
    used(
        "-global",
        Arity::Many,
        "pcie-root-port.fast-unplug=0|1\tguests let devices go at once, not after five seconds (default 0)",
    ),
    used(
        "-numa",
        Arity::Many,
        "node,nodeid=N,cpus=A-B:C,memdev=ID\ndist,src=N,dst=N,val=N\twhich vCPUs and memory objects belong together (q35)",
    ),
    used("-smbios", Arity::Many, "type=0|1|2|3|4|17,KEY=TEXT...\ttexts of the SMBIOS tables (q35)"),
    used("-mem-path", Arity::One, "PATH\tback guest memory with this file, or with a file in this directory"),
    used("-mem-prealloc", Arity::Flag, "\ttouch all guest memory before the guest starts"),
    used("-kernel", Arity::One, "FILE\tkernel: bzImage, ELF vmlinux or raw \"PE\" image"),
    used("-append", Arity::Many, "TEXT...\tkernel command line; several words are joined with blanks"),
    used("-initrd", Arity::One, "FILE\tinitial RAM disk"),
    used("-drive", Arity::Many, "id=ID,file=PATH[,readonly=on|off][,direct=on|off][,aio=MODE]\ta disk image"),
    used(
        "-netdev",
        Arity::Many,
        "tap,id=ID,ifname=NAME[,path=DEVICE][,queues=N]|fd=N|fds=A:B[,vhost=on[,vhostfd=N|vhostfds=A:B]]\ta network back end",
    ),
    used(
        "-device",
        Arity::Many,
        "virtio-blk-device,drive=ID[,id=ID][,serial=TEXT][,iothread=ID]\n\
         virtio-net-device,netdev=ID[,id=ID][,mac=MAC][,mq=on|off][,iothread=ID]\n\
         virtio-serial-device[,max_ports=N], then virtconsole|virtserialport,chardev=ID[,nr=N][,name=TEXT]\n\
         virtio-balloon-device[,deflate-on-oom=on][,free-page-reporting=on][,auto-balloon=on[,membuf-percent=N][,monitor-interval=SECONDS]]\n\
         virtio-rng-device,rng=ID[,max-bytes=N,period=MILLISECONDS]\n\
         vhost-vsock-device,guest-cid=N[,vhostfd=N]\n\
         vhost-user-fs-device,chardev=ID,tag=TEXT\n\
         virtio-mem-device,memdev=ID[,memaddr=ADDRESS][,requested-size=SIZE][,block-size=SIZE][,node=N]\n\
         virtio-pmem-device,memdev=ID[,memaddr=ADDRESS]\n\
         vhost-user-blk-device,chardev=ID[,num-queues=N][,queue-size=N]\ta device of the guest",
    ),
    used(
        "-chardev",
        Arity::Many,
        "stdio|pty|file|socket|redirect-to-log,id=ID[,path=PATH][,host=IP,port=N][,server][,nowait]\t\
         a character back end; a server without nowait makes the VM wait for its first client",
    ),
    used(
        "-serial",
        Arity::One,
        "stdio|pty|file,path=PATH|socket,path=PATH,server,nowait|chardev:ID\tthe serial port",
    ),
    used(
        "-object",
        Arity::Many,
        "iothread,id=ID\n\
         rng-random,id=ID,filename=PATH\n\
         memory-backend-ram|memory-backend-file|memory-backend-memfd,id=ID,size=N[,mem-path=PATH][,share=on|off][,readonly=on|off][,prealloc=on|off]\t\
         a thread for devices to run on (at most 8), a source of random bytes, guest memory, or memory that a device brings",
    ),
    used("-qmp", Arity::One, "unix:PATH,server,nowait|tcp:IP:PORT,server,nowait\twhere QMP clients connect"),
    used("-mon", Arity::One, "chardev=ID[,id=ID],mode=control\tQMP on a character back end"),
    used(
        "-incoming",
        Arity::One,
        "file:DIR[,mapped=on|off][,verify=on|off][,identity=same|new]\tgo on from the snapshot in DIR; the other options as when it was made (identity=new: but for addresses of NICs and read-only disks)",
    ),
    used("-S", Arity::Flag, "\tcreate the VM paused; `cont` over QMP starts it (also -freeze)"),
    used("-D", Arity::Optional, "[FILE]\tlog to FILE (default: standard error)"),
    used("-daemonize", Arity::Flag, "\tgo to the background once the VM is set up"),
    used("-pidfile", Arity::One, "FILE\twith -daemonize: write the process id to FILE, which must not exist"),
    used("-trace", Arity::One, "type=all|file=FILE\tlog what all trace points see, or those that FILE names"),
    used("-disable-seccomp", Arity::Flag, "\tdo not restrict the system calls of this process"),
    used("-help", Arity::Flag, "\tshow this text (also -h)"),
    used("-version", Arity::Flag, "\tshow the version (also -V)"),
    ignored("-overcommit"),
    ignored("-no-user-config"),
    ignored("-nodefaults"),
    ignored("-sandbox"),
    ignored("-msg"),
    ignored("-rtc"),
    ignored("-boot"),
    ignored("-nographic"),
    ignored("-realtime"),
    ignored("-display"),
    ignored("-usb"),
    unsupported("-hardware-signature", Arity::One),
    unsupported("-no-shutdown", Arity::Flag),
    unsupported("-battery", Arity::Flag),
    unsupported("-mod-test", Arity::One),
    unsupported("-vnc", Arity::One),
    unsupported("-cameradev", Arity::Many),
    unsupported("-windows_emu_pid", Arity::One),
];

/// Looks an option up by either of its spellings.
pub(super) fn find(name: &str) -> Option<&'static Spec> {
    let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, name)| name);
    OPTIONS.iter().find(|spec| spec.name == name)
}

/// The text of `-help`.
pub fn help() -> String {
    let mut text = String::from(
        "Usage: flotilla-vmm [OPTION VALUE]...\n\
         Runs one virtual machine until its guest ends or QMP says quit.\n\
         \n\
         Examples:\n\
         \x20 flotilla-vmm -kernel vmlinuz -initrd initrd.img -append \"console=ttyS0\" -serial stdio\n\
         \x20 flotilla-vmm -kernel vmlinuz -smp 2 -m 1G -append \"console=ttyS0 root=/dev/vda\" -serial stdio \\\n\
         \x20   -drive id=root,file=root.img,direct=off -device virtio-blk-device,drive=root \\\n\
         \x20   -netdev tap,id=lan,ifname=tap0 -device virtio-net-device,netdev=lan \\\n\
         \x20   -qmp unix:/tmp/vm.sock,server,nowait\n\
         \n\
         Options:\n",
    );
    for spec in OPTIONS.iter().filter(|spec| spec.class == Class::Used) {
        let (value, what) = spec.help.split_once('\t').unwrap_or(("", spec.help));
        for (i, form) in value.split('\n').enumerate() {
            let blank = if form.is_empty() { "" } else { " " };
            let break_before = if i == 0 { "  " } else { "\n  " };
            text.push_str(&format!("{break_before}{}{blank}{form}", spec.name));
        }
        text.push_str(&format!("\n        {what}\n"));
    }
    text.push_str(
        "\nIn a value, ',,' stands for a comma. Accepted without effect, for the sake of management tools:\n ",
    );
    for spec in OPTIONS.iter().filter(|spec| spec.class == Class::Ignored) {
        text.push_str(&format!(" {}", spec.name));
    }
    text.push_str(
        "\n\nEnvironment:\n  FLOTILLA_LOG, STRATOVIRT_LOG_LEVEL\n        error, warn, info, debug or trace (default info)\n\
         \x20 FLOTILLA_FDS\n        descriptors that stand for paths and taps of the command line\n\
         \x20 FLOTILLA_JOURNAL\n        name under which messages go straight to the journal\n",
    );
    text
}
