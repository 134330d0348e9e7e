//! What a snapshot costs: the save and what it writes, the start of a VM from it, the guest's first touch of its memory afterwards, and many
//! clones at once.

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use tests::qmp::Qmp;

use crate::Result;
use crate::fleet::{self, Fleet};
use crate::process::Vm;
use crate::subject::{Command, Setting, Subject};

const LIMIT: Duration = Duration::from_secs(30);
/// Guest RAM in MiB, whatever the other measurements use: what is written must not depend on it.
pub(crate) const MEMORY: usize = 1024;

/// Of one VM.
pub(crate) struct Saved {
    /// From the command to its end, in seconds: of a guest that uses 64 MiB, and of one that uses 900.
    pub(crate) save: [f64; 2],
    /// What the files of each take on disk, in MiB.
    pub(crate) size: [f64; 2],
    /// From before the fork to the restored guest's answer to a byte that waits for it, in seconds: the same two.
    pub(crate) restore: [f64; 2],
    /// The restored guest's first write to each page of what it had used, in microseconds a page.
    pub(crate) touch: f64,
}

/// Takes all of it from two VMs, one after the other; leaves the snapshot of the smaller one for [`clones`]. `None` for a VMM that cannot.
pub(crate) fn measure(subject: &Subject, setting: &Setting) -> Result<Option<Saved>> {
    if !subject.has(Command::Restored) {
        return Ok(None);
    }
    let (large, size_large, restore_large, _) = one(subject, setting, Command::Used900)?;
    let (small, size_small, restore_small, touch) = one(subject, setting, Command::Used64)?;
    Ok(Some(Saved {
        save: [small, large],
        size: [size_small, size_large],
        restore: [restore_small, restore_large],
        touch,
    }))
}

/// Clones of what [`measure`] has left, all alive at once.
pub(crate) fn clones(subject: &Subject, setting: &Setting, count: usize) -> Result<Option<Fleet>> {
    let template = subject.has(Command::Restored) && setting.saved(subject).exists();
    template.then(|| fleet::start_with(subject, setting, count, Command::Clone)).transpose()
}

fn one(subject: &Subject, setting: &Setting, used: Command) -> Result<(f64, f64, f64, f64)> {
    let mut vm = Vm::start(subject, setting, 0, used, false)?;
    vm.line("touch: ", LIMIT)?;
    let mut qmp = Qmp::new(UnixStream::connect(subject.qmp_socket(setting, 0))?, LIMIT)?;
    qmp.ask("stop")?;
    let directory = setting.saved(subject);
    // A peer may not write over an old one.
    let _ = std::fs::remove_dir_all(&directory);
    let begin = Instant::now();
    qmp.execute("migrate", &serde_json::json!({ "uri": format!("file:{}", directory.display()) }), LIMIT)?;
    while qmp.ask("query-migrate")?["status"] != "completed" {
        if begin.elapsed() > LIMIT {
            return Err(format!("{}: the snapshot is not complete after {LIMIT:?}", subject.name).into());
        }
    }
    let save = begin.elapsed().as_secs_f64();
    drop(vm);
    let size = size(&directory)?;
    let begin = Instant::now();
    let mut vm = Vm::start(subject, setting, 0, Command::Restored, false)?;
    vm.wait_for_first_byte()?;
    let restore = begin.elapsed().as_secs_f64();
    // What was typed says: write to the same pages again. "touch: N pages in T us".
    let line = vm.line("touch: ", LIMIT)?;
    let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [pages, microseconds] = numbers[..] else { return Err(line.into()) };
    Ok((save, size, restore, microseconds / pages))
}

/// What all files in a directory take on disk, in MiB.
fn size(directory: &Path) -> Result<f64> {
    let mut blocks = 0;
    for entry in std::fs::read_dir(directory)? {
        blocks += entry?.metadata()?.blocks();
    }
    Ok(blocks as f64 / 2048.0)
}
