//! The command line of `flotilla`: verbs, options and their help. Owns no behaviour; every other file of the command may use its types.

pub(crate) mod create;
pub(crate) mod device;
pub(crate) mod job;
pub(crate) mod network;
pub(crate) mod spec;
pub(crate) mod template;
pub(crate) mod watch;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use spec::SpecArgs;

const AFTER_HELP: &str = "\
Exit status:
  0  done
  1  it failed; the message says why
  2  wrong usage of the command line
  3  no such VM
  4  flotillad cannot be reached
  5  the definition is not valid
  6  the VM's state does not allow it, or another verb is under way
  7  not allowed
  8  it took too long

Examples:
  flotilla run                         boot the small guest that comes with Flotilla
  flotilla define web.toml             store a VM named \"web\"
  flotilla start web && flotilla console web
  flotilla list";

/// Runs virtual machines as services of this host.
///
/// Talks to flotillad over D-Bus. A VM is a short JSON or TOML file; a kernel alone is enough.
#[derive(Debug, Parser)]
#[command(name = "flotilla", version, after_help = AFTER_HELP, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Bus that flotillad is on: "system", "session" or a D-Bus address.
    #[arg(long, global = true, env = "FLOTILLA_BUS", default_value = "system", value_name = "BUS")]
    pub(crate) bus: Bus,
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Which bus to talk on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Bus {
    /// The host's.
    System,
    /// The user's.
    Session,
    /// At an address.
    Address(String),
}

impl std::str::FromStr for Bus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "system" => Ok(Self::System),
            "session" => Ok(Self::Session),
            address if address.contains(':') => Ok(Self::Address(address.to_owned())),
            _ => Err("write \"system\", \"session\" or an address such as unix:path=/run/bus".to_owned()),
        }
    }
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Define a VM, start it and show its console
    ///
    /// Without a kernel or a definition file it boots the small guest that comes with Flotilla. Ctrl-] leaves the console; the
    /// VM runs on. When the standard input is not a terminal, it is typed into the console line by line as it comes, and the command
    /// ends when the input has ended and the guest has been quiet for a while.
    #[command(after_help = "\
Examples:
  flotilla run
  echo help | flotilla run --rm
  flotilla run web.toml
  flotilla run web --kernel /boot/vmlinuz --initrd /boot/initrd.img --disk web.img --bridge br0 --memory 1G
  flotilla run web --kernel vmlinux --append \"console=ttyS0\" --detach")]
    Run(RunArgs),
    /// Store a VM's definition
    ///
    /// Reads it from a JSON or TOML file ("-" is the standard input), or makes it from options. Relative paths in a file count from the
    /// file's folder. The VM's name is the file's, without its ending, unless --name says otherwise.
    #[command(after_help = "\
Keys of a definition (only \"kernel\" is required, and not even that where there is \"firmware\"):
  kernel       image: bzImage, ELF vmlinux or raw (PE) kernel
  firmware     { code, vars }: images of firmware for a q35, such as OVMF; vars is written to, each VM has its own
  initrd       initial RAM disk
  append       kernel command line
  memory       guest RAM: \"512M\", \"2G\", or a number of MiB; 256M when absent
  cpus         vCPUs, 1 to 254; 1 when absent
  disks        list of { path, format, backing, backing_format, readonly, direct, serial, aio, iops, discard, number };
               the first is /dev/vda
  nics         list of { network or bridge, mac, number }; the first is eth0
  balloon, rng true for these devices
  restart      \"never\", \"on-failure\" or \"always\" (when the guest powers off, too)
  autostart    true: starts with the host; autostart_order, autostart_delay (seconds before the next order)
  host_shutdown \"shutdown\" or \"power-off\": what it does when the host shuts down, and when its unit is stopped;
               host_shutdown_timeout (seconds until it is powered off, 30 when absent)
  limits       { cpu_weight, cpu_quota, cpu_set, memory_nodes, memory_max, memory_high, io_weight, tasks_max }
  machine      \"microvm\" or \"q35\" (PCIe, ACPI)
  uuid, description, labels

A definition, web.toml:
  kernel = \"/boot/vmlinuz\"
  initrd = \"/boot/initrd.img\"
  memory = \"1G\"
  disks = [{ path = \"web.img\" }]
  nics = [{ bridge = \"br0\" }]

Examples:
  flotilla define web.toml
  flotilla define web.toml --name web2
  jq '.memory=\"2G\"' web.json | flotilla define - --name web --replace
  flotilla define web --kernel /boot/vmlinuz --disk web.img --bridge br0")]
    Define(DefineArgs),
    /// Make a VM from a cloud image, and start it
    ///
    /// Its first disk comes of the image: it shares blocks with it where the file system can do that, or else lies over it, and then the image must
    /// stay as it is (--whole copies it). Its guest finds its name, its ssh keys and its user-data on a small disk, as cloud-init looks for them.
    /// Without a kernel the VM is a q35 with the host's firmware (package ovmf or edk2-ovmf). Its disk goes with it: see `flotilla rm`.
    #[command(after_help = "\
Examples:
  flotilla create web --image debian-12-genericcloud-amd64.qcow2 --ssh-key ~/.ssh/id_ed25519.pub
  flotilla create web --image debian.qcow2 --size 20G --memory 2G --cpus 2 --network lan --user-data user-data.yaml
  flotilla create tiny --image rootfs.img --kernel vmlinuz --append root=/dev/vda")]
    Create(create::CreateArgs),
    /// Change a VM's definition in your editor
    ///
    /// $VISUAL or $EDITOR gets it as JSON. Limits and the restart policy hold at once; everything else from the next start on.
    #[command(after_help = "\
Examples:
  flotilla edit web
  EDITOR='sed -i s/256M/512M/' flotilla edit web")]
    Edit(EditArgs),
    /// Start VMs
    #[command(after_help = "\
Examples:
  flotilla start web db
  flotilla start web --paused")]
    Start(StartArgs),
    /// Stop VMs
    ///
    /// Asks the guest to shut down and powers the VM off when that takes longer than --timeout.
    #[command(after_help = "\
Examples:
  flotilla stop web
  flotilla stop web --timeout 2m
  flotilla stop web db --now")]
    Stop(StopArgs),
    /// Pause VMs: their vCPUs stand still, their memory stays
    #[command(after_help = "Example:\n  flotilla pause web")]
    Pause(NamesArgs),
    /// Let paused VMs go on
    #[command(after_help = "Example:\n  flotilla resume web")]
    Resume(NamesArgs),
    /// List the VMs
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  flotilla list
  flotilla list --json | jq -r '.[] | select(.state==\"running\").name'"
    )]
    List(ListArgs),
    /// Show all about a VM
    #[command(after_help = "\
Examples:
  flotilla show web
  flotilla show web --json | jq .spec")]
    Show(ShowArgs),
    /// Use a VM's serial console
    ///
    /// Ctrl-] leaves it. The newest output from before is shown first.
    #[command(after_help = "\
Examples:
  flotilla console web
  echo uptime | flotilla console web")]
    Console(ConsoleArgs),
    /// Remove VMs' definitions; their disks stay, but for those that `create` or `clone` made
    #[command(
        visible_alias = "remove",
        after_help = "\
Examples:
  flotilla rm web
  flotilla rm web db --force"
    )]
    Rm(RmArgs),
    /// Show what a VM's process has logged
    ///
    /// That is flotilla-vmm's own log, from the journal. What the guest prints is on its console.
    #[command(after_help = "\
Examples:
  flotilla logs web
  flotilla logs web -f -n 20")]
    Logs(LogsArgs),
    /// Talk QMP with a VM
    ///
    /// Sends one command and prints its answer. Without a command, the standard input goes to the VM and what the VM says comes back, with
    /// its events, until the input has ended and everything is answered.
    #[command(after_help = "\
Examples:
  flotilla qmp web query-status
  flotilla qmp web '{\"execute\":\"query-cpus\"}'
  flotilla qmp web --read-only
  jq -c . commands.json | flotilla qmp web")]
    Qmp(QmpArgs),
    /// Define, list and remove networks
    #[command(subcommand)]
    Network(network::NetworkVerb),
    /// Give network cards to a VM that runs, take them away, list them
    #[command(subcommand)]
    Nic(device::NicVerb),
    /// Give disks to a VM that runs, take them away, list them
    #[command(subcommand)]
    Disk(device::DiskVerb),
    /// Make templates of VMs that run, list and remove them
    #[command(subcommand)]
    Template(template::TemplateVerb),
    /// Make VMs from a template: they go on where it was, each with an identity of its own
    ///
    /// A clone has its own name, uuid, sockets, taps, hardware addresses and disks; it is a VM like any other. Its guest learns who it is from a
    /// small read-only disk with the serial number flotilla-identity, in cloud-init's NoCloud format.
    #[command(after_help = "\
Examples:
  flotilla clone base --name web
  flotilla clone base --count 20 --name web-%%
  flotilla clone base -n 3 --user-data user-data.yaml --label role=web --json")]
    Clone(template::CloneArgs),
    /// List what is under way, and cancel it
    #[command(subcommand)]
    Job(job::JobVerb),
    /// Show what happens to the VMs, as it happens
    ///
    /// First how each stands, then every change: numbered, in order, none left out. When some were missed all of them are shown anew.
    #[command(after_help = "\
Examples:
  flotilla events
  flotilla events web --json | jq -r 'select(.kind==\"state\").new'")]
    Events(watch::EventsArgs),
    /// Wait until a VM is in a state
    #[command(after_help = "\
Examples:
  flotilla wait web --for stopped --timeout 2m
  flotilla wait web --for down,gone")]
    Wait(watch::WaitForArgs),
    /// Show what the running VMs use: processor, memory, disk, network
    ///
    /// On a terminal it is shown anew until Ctrl-C. Processor time is in percent of one processor; the other rates are per second.
    #[command(after_help = "\
Examples:
  flotilla top
  flotilla top web db --interval 5s
  flotilla top --count 1 --json")]
    Top(watch::TopArgs),
    /// Check this host: what keeps VMs from running or makes them slow, and how to mend it
    #[command(after_help = "Example:\n  flotilla doctor")]
    Doctor(watch::DoctorArgs),
    /// Start no VM on this host any more, until `flotilla undrain`
    ///
    /// For maintenance: it holds over restarts of the daemon and of the host. VMs that run go on, unless --stop is given.
    #[command(after_help = "\
Examples:
  flotilla drain
  flotilla drain --stop --timeout 2m")]
    Drain(DrainArgs),
    /// Let VMs start on this host again
    #[command(after_help = "Example:\n  flotilla undrain")]
    Undrain,
    /// Write man pages or shell completions into a folder
    #[command(hide = true)]
    Generate(GenerateArgs),
}

/// `flotilla run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Name of the new VM, made up when absent; or a definition file
    #[arg(value_name = "NAME|FILE")]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
    /// Do not show the console
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Power the VM off and remove its definition at the end
    #[arg(long, conflicts_with = "detach")]
    pub(crate) rm: bool,
    #[command(flatten)]
    pub(crate) linger: LingerArgs,
}

/// `flotilla define`.
#[derive(Debug, Args)]
pub(crate) struct DefineArgs {
    /// Definition file, or "-"; with --kernel the VM's name
    #[arg(value_name = "FILE|NAME")]
    pub(crate) source: String,
    /// Name of the VM when it is not the file's
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    pub(crate) name: Option<String>,
    /// Replace the definition of a VM that exists; a running VM keeps the old one until it is started again
    #[arg(long)]
    pub(crate) replace: bool,
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
}

/// `flotilla edit`.
#[derive(Debug, Args)]
pub(crate) struct EditArgs {
    /// VM
    pub(crate) name: String,
}

/// `flotilla start`.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// VMs
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Leave the vCPUs standing; `flotilla resume` lets them go
    #[arg(long)]
    pub(crate) paused: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// `flotilla stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// VMs
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Power off at once, without asking the guest
    #[arg(long, conflicts_with = "timeout")]
    pub(crate) now: bool,
    /// How long the guest may take, such as 30s or 2m
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// `flotilla drain`.
#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// Shut down all VMs that run, too, and wait for their end
    #[arg(long)]
    pub(crate) stop: bool,
    /// How long the guests may take, such as 30s or 2m
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration, requires = "stop")]
    pub(crate) timeout: Duration,
}

/// Whether a verb waits for its end.
#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// Wait until it is done (the default)
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Return as soon as the daemon has taken it on
    #[arg(long, overrides_with = "wait")]
    pub(crate) no_wait: bool,
}

/// Verbs that take names only.
#[derive(Debug, Args)]
pub(crate) struct NamesArgs {
    /// VMs
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

/// `flotilla list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `flotilla show`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// VM
    pub(crate) name: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How long to listen after the end of an input that is no terminal.
#[derive(Debug, Args)]
pub(crate) struct LingerArgs {
    /// When the input is no terminal and has ended: leave once the guest has been quiet for so long
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = parse_duration)]
    pub(crate) linger: Duration,
}

/// `flotilla console`.
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// VM
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) linger: LingerArgs,
}

/// `flotilla rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// VMs
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Power a running VM off first
    #[arg(long, short)]
    pub(crate) force: bool,
}

/// `flotilla logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// VM
    pub(crate) name: String,
    /// Go on with new lines as they come
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only the newest N lines
    #[arg(long, short = 'n', value_name = "N")]
    pub(crate) lines: Option<u32>,
}

/// `flotilla qmp`.
#[derive(Debug, Args)]
pub(crate) struct QmpArgs {
    /// VM
    pub(crate) name: String,
    /// Command as JSON, or just its name
    pub(crate) command: Option<String>,
    /// Refuse commands that change something
    #[arg(long)]
    pub(crate) read_only: bool,
}

/// `flotilla generate`.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// What to write
    pub(crate) what: Generated,
    /// Folder, which must exist
    pub(crate) folder: PathBuf,
}

/// Files made from the command line's description.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Generated {
    /// Man pages, section 1.
    Man,
    /// bash, zsh and fish completions.
    Completions,
}

/// `30`, `30s`, `500ms`, `2m`, `1h`; at most a day, so that sums with it cannot overflow.
fn parse_duration(text: &str) -> Result<Duration, String> {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| "write 30s, 500ms or 2m".to_owned())?;
    let unit = match &text[digits.len()..] {
        "ms" => Duration::from_millis(1),
        "" | "s" => Duration::from_secs(1),
        "m" | "min" => Duration::from_secs(60),
        "h" => Duration::from_secs(3600),
        unit => return Err(format!("unknown unit \"{unit}\": write 30s, 500ms or 2m")),
    };
    u32::try_from(number)
        .ok()
        .and_then(|number| unit.checked_mul(number))
        .filter(|duration| *duration <= DAY)
        .ok_or_else(|| "at most one day".to_owned())
}

impl Cli {
    /// The whole command, for generators. Without the help verb, which would give each man page a twin.
    pub(crate) fn description() -> clap::Command {
        <Self as clap::CommandFactory>::command().disable_help_subcommand(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    /// The lines of every "Examples" that call this command.
    fn examples(command: &clap::Command, found: &mut Vec<String>) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let lines = help.lines().filter_map(|line| line.strip_prefix("  "));
        found.extend(lines.filter(|line| line.starts_with("flotilla ")).map(str::to_owned));
        command.get_subcommands().for_each(|verb| examples(verb, found));
    }

    #[test]
    fn every_example_of_the_help_is_right() {
        let mut found = Vec::new();
        examples(&<Cli as clap::CommandFactory>::command(), &mut found);
        assert!(found.len() > 20, "{found:?}");
        for line in found {
            // An explanation stands three blanks off; a shell takes what is behind its own words.
            let line = line.split("   ").next().unwrap();
            let line = line.split([';', '|', '<', '>', '&']).next().unwrap();
            let words = line.split_whitespace().map(|word| word.trim_matches(['\'', '"']));
            if let Err(error) = <Cli as Parser>::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in
            [("30", 30_000), ("30s", 30_000), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)));
        }
        for text in ["", "s", "-1s", "1.5s", "1d", "25h", "99999999999999999999s", "4294967296h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn buses() {
        assert_eq!("system".parse(), Ok(Bus::System));
        assert_eq!("unix:path=/x".parse(), Ok(Bus::Address("unix:path=/x".into())));
        assert!("sesion".parse::<Bus>().is_err());
    }
}
