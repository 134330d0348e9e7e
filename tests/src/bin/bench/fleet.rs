//! Many VMs at once: how quickly they start, all staying alive, and what each then holds.

use std::time::{Duration, Instant};

use rustix::event::{Timespec, poll};

use crate::Result;
use crate::process::Vm;
use crate::subject::{Command, Setting, Subject};

const DEADLINE: Duration = Duration::from_secs(120);

/// What a fleet of one subject cost.
pub(crate) struct Fleet {
    /// VMs started per second, to their guests' first bytes.
    pub(crate) per_second: f64,
    /// Private memory of each beyond guest RAM, KiB, on average.
    pub(crate) private_each: f64,
}

/// Starts `count` VMs, a few on their way at a time (two for each processor), and keeps them all until the last one runs.
pub(crate) fn start(subject: &Subject, setting: &Setting, count: usize) -> Result<Fleet> {
    start_with(subject, setting, count, Command::Hold)
}

/// The same with another command for their guests.
pub(crate) fn start_with(
    subject: &Subject,
    setting: &Setting,
    count: usize,
    command: Command,
) -> Result<Fleet> {
    let at_once = 2 * std::thread::available_parallelism()?.get();
    let (mut running, mut starting): (Vec<Vm>, Vec<Vm>) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    let end = begin + DEADLINE;
    while running.len() < count {
        while starting.len() < at_once && running.len() + starting.len() < count {
            starting.push(Vm::start(subject, setting, running.len() + starting.len(), command, false)?);
        }
        let timeout = Timespec::try_from(end.saturating_duration_since(Instant::now()))?;
        let mut consoles = starting.iter().map(Vm::console).collect::<Result<Vec<_>>>()?;
        if poll(&mut consoles, Some(&timeout))? == 0 {
            return Err(format!(
                "{}: {} of {count} VMs started in {DEADLINE:?}",
                subject.name,
                running.len()
            )
            .into());
        }
        let ready: Vec<bool> = consoles.iter().map(|c| !c.revents().is_empty()).collect();
        for i in (0..ready.len()).rev().filter(|i| ready[*i]) {
            if starting[i].saw_first_byte()? {
                running.push(starting.swap_remove(i));
            }
        }
    }
    let per_second = count as f64 / begin.elapsed().as_secs_f64();
    // Every one would cost seconds of reading /proc; they are all alike.
    let sample = running.iter().step_by((count / 20).max(1));
    let private = sample.map(|vm| Ok(vm.maps(setting.memory)?.private)).collect::<Result<Vec<_>>>()?;
    let private_each = private.iter().sum::<u64>() as f64 / private.len() as f64;
    Ok(Fleet { per_second, private_each })
}
