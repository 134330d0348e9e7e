//! One running VMM: starting it, waiting for its guest's first byte, and what it has used by then.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Result;
use crate::subject::{Command as Then, Setting, Subject};

const DEADLINE: Duration = Duration::from_secs(30);

/// A VMM; killed and reaped when dropped.
pub(crate) struct Vm {
    child: Child,
    label: String,
    /// The guest's first byte. Not a byte of any log line that a VMM may print before.
    first_byte: u8,
    errors: std::path::PathBuf,
    /// What [`Vm::line`] has read beyond the last line.
    text: Vec<u8>,
}

/// What one start cost.
pub(crate) struct Single {
    /// From before the fork to the guest's first byte, in seconds.
    pub(crate) wall: f64,
    /// CPU time of all threads until then, in seconds.
    pub(crate) cpu: f64,
    /// What is mapped then.
    pub(crate) maps: Maps,
    /// Threads.
    pub(crate) threads: u64,
}

/// Sums over a process's mappings, in KiB.
pub(crate) struct Maps {
    /// Private memory, guest RAM left out.
    pub(crate) private: u64,
    /// Size of the mappings of binary and libraries.
    pub(crate) code: u64,
}

impl Vm {
    /// Starts VM `index` of `subject`; `traced` stops it at its exec for a tracer on this thread.
    pub(crate) fn start(
        subject: &Subject,
        setting: &Setting,
        index: usize,
        then: Then,
        traced: bool,
    ) -> Result<Self> {
        let arguments = subject.arguments(setting, index, then)?;
        let errors = subject.errors(setting, index);
        let mut command = Command::new(&subject.program);
        let typed = then.typed();
        command.args(arguments).stdin(if typed.is_empty() { Stdio::null() } else { Stdio::piped() });
        command.stdout(Stdio::piped()).stderr(File::create(&errors)?);
        if traced {
            // SAFETY: ptrace(2) is async-signal-safe; it takes no arguments for this request.
            unsafe {
                command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
                    -1 => Err(std::io::Error::last_os_error()),
                    _ => Ok(()),
                });
            }
        }
        let mut child = command.spawn().map_err(|e| format!("{}: {e}", subject.program.display()))?;
        if let Some(input) = &mut child.stdin {
            input.write_all(typed)?;
        }
        let first_byte = then.first_byte();
        Ok(Self { child, label: subject.name.clone(), first_byte, errors, text: Vec::new() })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its guest's console comes out.
    pub(crate) fn console(&self) -> Result<PollFd<'_>> {
        let output = self.child.stdout.as_ref().ok_or("no standard output")?;
        Ok(PollFd::new(output, PollFlags::IN))
    }

    /// Reads what is there; says whether the guest's first byte was among it. Call it when [`Vm::console`] is readable.
    pub(crate) fn saw_first_byte(&mut self) -> Result<bool> {
        let mut bytes = [0; 4096];
        let count = match &mut self.child.stdout {
            Some(output) => output.read(&mut bytes)?,
            None => 0,
        };
        if count == 0 {
            return Err(
                format!("{} ended before its guest's first byte: {}", self.label, self.complaint()).into()
            );
        }
        Ok(bytes[..count].contains(&self.first_byte))
    }

    fn complaint(&self) -> String {
        let text = fs::read(&self.errors).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it said nothing").trim().to_owned()
    }

    /// Waits for it, with a deadline.
    pub(crate) fn wait_for_first_byte(&mut self) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left)?;
            if poll(&mut [self.console()?], Some(&timeout))? == 0 {
                return Err(format!(
                    "{}: no byte from its guest in {DEADLINE:?}: {}",
                    self.label,
                    self.complaint()
                )
                .into());
            }
            if self.saw_first_byte()? {
                return Ok(());
            }
        }
    }

    /// The rest of the next line of the guest that begins with `start`, waiting for it.
    pub(crate) fn line(&mut self, start: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            while let Some(length) = self.text.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.text.drain(..=length).collect();
                let line = String::from_utf8_lossy(&line);
                if let Some((_, rest)) = line.trim_end().split_once(start) {
                    return Ok(rest.to_owned());
                }
            }
            let timeout = Timespec::try_from(end.saturating_duration_since(Instant::now()))?;
            let mut bytes = [0; 4096];
            let count = match poll(&mut [self.console()?], Some(&timeout))? {
                0 => 0,
                _ => self.child.stdout.as_mut().map_or(Ok(0), |output| output.read(&mut bytes))?,
            };
            if count == 0 {
                return Err(
                    format!("{}: no {start:?} from its guest: {}", self.label, self.complaint()).into()
                );
            }
            self.text.extend_from_slice(&bytes[..count]);
        }
    }

    /// CPU time of all its threads so far.
    fn cpu(&self) -> Result<f64> {
        // The clock id of another process: its number inverted, and "scheduler clock" (clock_getcpuclockid(3) makes the same).
        let clock = (!libc::clockid_t::try_from(self.pid())? << 3) | 2;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes one timespec.
        if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
    }

    /// Its mappings now.
    pub(crate) fn maps(&self, guest_mib: usize) -> Result<Maps> {
        Ok(sum_maps(&fs::read_to_string(format!("/proc/{}/smaps", self.pid()))?, guest_mib as u64 * 1024))
    }

    /// Its threads now.
    pub(crate) fn threads(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|l| l.strip_prefix("Threads:"));
        Ok(line.ok_or("no thread count")?.trim().parse()?)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended by itself; then there is only the reaping to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Private pages are those that no other process maps: of a VMM that runs alone this counts its code too, of one among many only its
/// own data. Guest RAM is any mapping of at least half of it (VMMs may split it); a neighbour that the kernel merged with it goes unseen.
fn sum_maps(smaps: &str, guest_kib: u64) -> Maps {
    let mut maps = Maps { private: 0, code: 0 };
    let (mut file, mut ram) = (false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(key) = words.next() else { continue };
        if !key.ends_with(':') {
            file = words.nth(4).is_some_and(|path| path.starts_with('/'));
            continue;
        }
        let kib = words.next().and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
        match key {
            "Size:" => {
                ram = kib >= guest_kib / 2;
                if file && !ram {
                    maps.code += kib;
                }
            }
            "Private_Clean:" | "Private_Dirty:" if !ram => maps.private += kib,
            _ => {}
        }
    }
    maps
}

/// Starts one VM and takes its measure.
pub(crate) fn single(subject: &Subject, setting: &Setting) -> Result<Single> {
    let start = Instant::now();
    let mut vm = Vm::start(subject, setting, 0, Then::Hold, false)?;
    vm.wait_for_first_byte()?;
    let wall = start.elapsed().as_secs_f64();
    let cpu = vm.cpu()?;
    // What the VMM still has to do after the vCPU runs is part of what it keeps.
    std::thread::sleep(Duration::from_millis(20));
    Ok(Single { wall, cpu, maps: vm.maps(setting.memory)?, threads: vm.threads()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_private_memory_without_guest_ram() {
        let smaps = "\
00400000-00452000 r-xp 00000000 08:02 1 /usr/bin/x\nSize: 328 kB\nPrivate_Clean: 100 kB\nPrivate_Dirty: 0 kB\n\
7f00-7f01 rw-p 00000000 00:00 0 \nSize: 262144 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 9000 kB\n\
7f02-7f03 rw-p 00000000 00:00 0 [heap]\nSize: 132 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 12 kB\n";
        let maps = sum_maps(smaps, 256 * 1024);
        assert_eq!((maps.private, maps.code), (112, 328));
    }
}
