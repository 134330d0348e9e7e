//! `bench`: what starting and keeping a VM costs, for flotilla-vmm (as a microvm, and as a q35) and any other VMM at hand, beside the floor.
//!
//! All programs run interleaved, round by round, in one run on one machine, with the default guest told to halt after its first
//! byte; so only ratios to the floor carry over to another machine. It judges nothing: no threshold, no pass or fail.
//!
//! ```text
//! bench [--vmm PATH] [--floor PATH] [--guest PATH] [--peer NAME=PATH[,ARGUMENT...]]... [--runs N] [--fleet N] [--fleet-runs N] [--control-runs N]
//!       [--load-runs N] [--saved-runs N] [--memory MIB] [--json | --layout]
//! ```

mod control;
mod fleet;
mod lan;
mod layout;
mod load;
mod process;
mod report;
mod saved;
mod subject;
mod syscalls;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use subject::{Setting, Subject};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "\
usage: bench [OPTIONS]
  --vmm PATH         flotilla-vmm; default: beside this program
  --floor PATH       the floor program; default: beside this program
  --guest PATH       the default guest, an ELF kernel; default: beside this program, in
                     tests/guest/target/release, or the installed one
  --peer NAME=PATH[,ARGUMENT...]
                     another VMM. The names stratovirt, firecracker, cloud-hypervisor, qemu and flotilla (or NAME-anything) bring
                     their own arguments; for others give them, with {kernel} {flat} {command} {memory} {dir} filled in; block and network lines are for known names only
  --runs N           rounds for single starts (default 20)
  --fleet N          VMs alive at once (default 200; 0 leaves that part out)
  --fleet-runs N     rounds of that (default 3)
  --control-runs N   rounds of QMP round trips and pauses (default 10; 0 leaves that part out)
  --load-runs N      rounds of what disk and network carry (default 5; 0 leaves that part out). Needs root for a tap
  --saved-runs N     rounds of snapshots and of starts from them (default 5; 0 leaves that part out)
  --memory MIB       guest memory (default 256)
  --layout           instead of all that: follow one start of the VMM (built with --config profile.release.package.vmm.strip=false), and say what
                     vmm/layout.ld lacks and what it names in vain
  --json             one JSON object instead of tables";

struct Options {
    vmm: Option<PathBuf>,
    floor: Option<PathBuf>,
    guest: Option<PathBuf>,
    peers: Vec<Subject>,
    runs: usize,
    fleet: usize,
    fleet_runs: usize,
    control_runs: usize,
    load_runs: usize,
    saved_runs: usize,
    memory: usize,
    layout: bool,
    json: bool,
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options {
        vmm: None,
        floor: None,
        guest: None,
        peers: Vec::new(),
        runs: 20,
        fleet: 200,
        fleet_runs: 3,
        control_runs: 10,
        load_runs: 5,
        saved_runs: 5,
        memory: 256,
        layout: false,
        json: false,
    };
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{name}: needs a value"));
        match name.as_str() {
            "--vmm" => options.vmm = Some(value()?.into()),
            "--floor" => options.floor = Some(value()?.into()),
            "--guest" => options.guest = Some(value()?.into()),
            "--peer" => options.peers.push(Subject::peer(&value()?)?),
            "--runs" => options.runs = number(&name, &value()?, 1, 10_000)?,
            "--fleet" => options.fleet = number(&name, &value()?, 0, 5_000)?,
            "--fleet-runs" => options.fleet_runs = number(&name, &value()?, 1, 100)?,
            "--control-runs" => options.control_runs = number(&name, &value()?, 0, 1_000)?,
            "--load-runs" => options.load_runs = number(&name, &value()?, 0, 1_000)?,
            "--saved-runs" => options.saved_runs = number(&name, &value()?, 0, 1_000)?,
            "--memory" => options.memory = number(&name, &value()?, 128, 3072)?,
            "--layout" => options.layout = true,
            "--json" => options.json = true,
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("{name}: unknown option\n{USAGE}").into()),
        }
    }
    Ok(Some(options))
}

fn number(name: &str, text: &str, least: usize, most: usize) -> Result<usize> {
    match text.parse() {
        Ok(n) if (least..=most).contains(&n) => Ok(n),
        _ => Err(format!("{name} {text}: expected a number from {least} to {most}").into()),
    }
}

/// The path given, or the first of `places` that exists.
fn find(given: Option<PathBuf>, option: &str, places: &[PathBuf]) -> Result<PathBuf> {
    let found = match given {
        Some(path) => path.exists().then_some(path.clone()).ok_or(path),
        None => places.iter().find(|p| p.exists()).cloned().ok_or_else(|| places[0].clone()),
    };
    found.map_err(|path| format!("{}: no such file; build it or use {option}", path.display()).into())
}

fn bench() -> Result<()> {
    let Some(options) = parse(std::env::args().skip(1))? else {
        println!("{USAGE}");
        return Ok(());
    };
    let own = std::env::current_exe()?;
    let beside = |name: &str| own.parent().unwrap_or(Path::new(".")).join(name);
    let guest = find(
        options.guest,
        "--guest",
        &[beside("guest"), "tests/guest/target/release/guest".into(), "/usr/share/flotilla/guest.elf".into()],
    )?;
    let vmm = find(options.vmm, "--vmm", &[beside("flotilla-vmm"), "/usr/bin/flotilla-vmm".into()])?;
    if options.layout {
        let setting = Setting::new(&guest, options.memory)?;
        print!("{}", layout::look(&Subject::named("flotilla", vmm)?, &setting)?);
        return Ok(());
    }
    let mut subjects = vec![
        Subject::named("floor", find(options.floor, "--floor", &[beside("floor")])?)?,
        Subject::named("flotilla", vmm.clone())?,
        Subject::named("flotilla-q35", vmm)?,
    ];
    subjects.extend(options.peers);
    let setting = Setting::new(&guest, options.memory)?;

    let mut results: Vec<report::Results> = subjects.iter().map(report::Results::new).collect();
    // Every subject once, unmeasured: page cache, and whether it works at all.
    for (subject, result) in subjects.iter().zip(&mut results) {
        if let Err(error) =
            process::single(subject, &setting).and_then(|_| result.describe(subject, &setting))
        {
            result.failure = Some(error.to_string());
        }
    }
    for round in 0..options.runs {
        for i in order(round, subjects.len()) {
            if results[i].failure.is_none() {
                let sample = process::single(&subjects[i], &setting);
                results[i].add_single(sample);
            }
        }
    }
    for round in 0..options.control_runs {
        for i in order(round, subjects.len()) {
            if results[i].failure.is_none() {
                let sample = control::measure(&subjects[i], &setting);
                results[i].add_control(sample);
            }
        }
    }
    for round in 0..options.load_runs {
        for i in order(round, subjects.len()) {
            if results[i].failure.is_none() {
                let sample = load::measure(&subjects[i], &setting);
                results[i].add_load(sample);
            }
        }
    }
    let large = Setting::new(&guest, saved::MEMORY)?;
    for round in 0..options.saved_runs {
        for i in order(round, subjects.len()) {
            if results[i].failure.is_none() {
                let sample = saved::measure(&subjects[i], &large);
                results[i].add_saved(sample);
            }
        }
    }
    for round in 0..if options.fleet == 0 || options.saved_runs == 0 { 0 } else { options.fleet_runs } {
        for i in order(round, subjects.len()) {
            if results[i].failure.is_none() {
                let sample = saved::clones(&subjects[i], &large, options.fleet);
                results[i].add_clones(sample);
            }
        }
    }
    for round in 0..if options.fleet == 0 { 0 } else { options.fleet_runs } {
        for i in order(round, subjects.len()) {
            if results[i].failure.is_none() {
                let sample = fleet::start(&subjects[i], &setting, options.fleet);
                results[i].add_fleet(sample);
            }
        }
    }
    let report = report::Report { results, memory: options.memory, fleet: options.fleet };
    if options.json {
        println!("{}", report.json());
    } else {
        print!("{report}");
    }
    Ok(())
}

/// Each round starts with another subject, so that none always follows the same one.
fn order(round: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |i| (i + round) % count)
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_options_and_refuses_bad_ones() {
        let parse = |line: &str| parse(line.split_whitespace().map(str::to_owned));
        let options = parse("--runs 3 --fleet 0 --peer qemu=/bin/q --peer x=/bin/x,-k,{kernel} --json")
            .unwrap()
            .unwrap();
        assert_eq!((options.runs, options.fleet, options.peers.len(), options.json), (3, 0, 2, true));
        assert!(parse("--help").unwrap().is_none());
        for bad in [
            "--runs",
            "--runs 0",
            "--runs x",
            "--memory 1",
            "--peer qemu",
            "--peer unknown=/bin/x",
            "--what",
            "x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rounds_rotate() {
        assert_eq!(order(1, 3).collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!(order(3, 3).collect::<Vec<_>>(), [0, 1, 2]);
    }
}
