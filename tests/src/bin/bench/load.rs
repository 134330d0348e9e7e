//! What a disk and a network card carry when the guest does nothing but drive them: a polling driver in the guest, a file in the
//! page cache, a tap that leads nowhere.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::Result;
use crate::lan::{self, Flood};
use crate::process::Vm;
use crate::subject::{Command, Setting, Subject};

const LIMIT: Duration = Duration::from_secs(30);

/// One line of the report.
pub(crate) struct Line {
    /// What is counted.
    pub(crate) name: &'static str,
    /// Its unit.
    pub(crate) unit: &'static str,
    /// How many of the unit one of the guest's requests is.
    each: f64,
}

const fn line(name: &'static str, unit: &'static str, each: f64) -> Line {
    Line { name, unit, each }
}

/// In the order in which the guests of [`Command::Disk`], [`Command::Send`] and [`Command::Receive`] report.
pub(crate) const LINES: [Line; 9] = [
    line("random read, 4 KiB, depth 32", "k/s", 1e-3),
    line("random read, 4 KiB, depth 1", "k/s", 1e-3),
    line("random write, 4 KiB, depth 32", "k/s", 1e-3),
    line("random write, 4 KiB, depth 1", "k/s", 1e-3),
    line("sequential read, 128 KiB, depth 4", "GB/s", 131_072e-9),
    line("transmit, 64 bytes", "k/s", 1e-3),
    line("transmit, 1514 bytes", "k/s", 1e-3),
    line("receive, 64 bytes", "k/s", 1e-3),
    line("receive, 1514 bytes", "k/s", 1e-3),
];

/// Units per second, as [`LINES`] has them; none of a subject without such a device.
pub(crate) type Rates = [Option<f64>; LINES.len()];

/// Takes all of them from `subject`, with three VMs one after the other.
pub(crate) fn measure(subject: &Subject, setting: &Setting) -> Result<Rates> {
    let mut rates = [None; LINES.len()];
    let mut keep = |from: usize, counts: Vec<Count>| {
        for ((rate, line), count) in rates.iter_mut().zip(&LINES).skip(from).zip(counts) {
            *rate = Some(count.per_second * line.each);
        }
    };
    if subject.has(Command::Disk) {
        setting.fresh_disk()?;
        keep(0, run(subject, setting, Command::Disk, 5, |_| ())?);
    }
    if subject.has(Command::Send) {
        keep(5, lan::within(|| send(subject, setting))?);
        keep(7, lan::within(|| receive(subject, setting))?);
    }
    Ok(rates)
}

struct Count {
    per_second: f64,
    total: u64,
}

/// Starts a VM and reads the `lines` counts that its guest reports; `next` is told after each how many there have been.
fn run(
    subject: &Subject,
    setting: &Setting,
    command: Command,
    lines: usize,
    next: impl Fn(usize),
) -> Result<Vec<Count>> {
    let mut vm = Vm::start(subject, setting, 0, command, false)?;
    let mut counts = Vec::new();
    while counts.len() < lines {
        let text = vm.line("load: ", LIMIT)?;
        counts.push(parse(&text).ok_or_else(|| format!("{}: its guest says: {text}", subject.name))?);
        next(counts.len());
    }
    Ok(counts)
}

/// From `COUNT in TIME us, BELLS bells, TOTAL in all`.
fn parse(text: &str) -> Option<Count> {
    let mut numbers = text.split(' ').filter_map(|word| word.parse::<u64>().ok());
    let [count, time, _, total] = [numbers.next()?, numbers.next()?, numbers.next()?, numbers.next()?];
    (time > 0).then(|| Count { per_second: count as f64 * 1e6 / time as f64, total })
}

fn send(subject: &Subject, setting: &Setting) -> Result<Vec<Count>> {
    let counts = run(subject, setting, Command::Send, 2, |_| ())?;
    let (told, arrived) = (counts.iter().map(|c| c.total).sum::<u64>(), lan::arrived()?);
    // A device may drop what the host does not take. One that drops what it is slow with must not look quick.
    if arrived < told / 100 * 99 {
        return Err(
            format!("{}: {arrived} of {told} frames that the guest sent arrived", subject.name).into()
        );
    }
    Ok(counts)
}

fn receive(subject: &Subject, setting: &Setting) -> Result<Vec<Count>> {
    let flood = Flood::default();
    flood.length.store(64, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| flood.run());
        let counts =
            run(subject, setting, Command::Receive, 2, |_| flood.length.store(1514, Ordering::Relaxed));
        flood.stop.store(true, Ordering::Relaxed);
        sender.join().map_err(|_| "the sender panicked")??;
        counts
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_guest_reports() {
        let count = parse("84128 in 800000 us, 2630 bells, 99328 in all").unwrap();
        assert_eq!((count.per_second, count.total), (105_160.0, 99_328));
        assert!(parse("a request failed").is_none());
        assert!(parse("1 in 0 us, 0 bells, 1 in all").is_none());
    }
}
