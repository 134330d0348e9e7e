//! Keeps `vmm/layout.ld` true: a breakpoint at each function of flotilla-vmm tells which of them a start runs, and that is compared
//! with what the layout has put together.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::Result;
use crate::subject::{Setting, Subject};
use crate::syscalls::trace;

/// The output section that the layout makes for what a start runs.
const START: &str = ".text.start";
/// The kernel brings so many bytes of a file around each page that is touched.
const WINDOW: u64 = 64 << 10;

/// A function of the program.
struct Function {
    start: u64,
    size: u64,
    name: String,
}

/// What the layout has, and what a start has run.
pub(crate) struct Layout {
    /// Ran, and lies elsewhere.
    missing: Vec<Function>,
    /// Lies there, and did not run.
    vain: Vec<Function>,
    /// Bytes of functions there, and of those among them that ran.
    bytes: [u64; 2],
    windows: usize,
}

fn output(command: &mut Command) -> Result<String> {
    let done = command.output().map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    if !done.status.success() {
        return Err(String::from_utf8_lossy(&done.stderr).into_owned().into());
    }
    Ok(String::from_utf8(done.stdout)?)
}

fn hex(text: &str) -> Result<u64> {
    Ok(u64::from_str_radix(text, 16)?)
}

/// The program's functions, by address. Several names of one place count once.
fn functions(program: &Path) -> Result<BTreeMap<u64, Function>> {
    let text = output(Command::new("nm").args(["--defined-only", "--print-size"]).arg(program))?;
    let mut functions = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        if let [start, size, "t" | "T" | "w" | "W", name] = words[..] {
            let (start, size) = (hex(start)?, hex(size)?);
            functions.insert(start, Function { start, size, name: name.to_owned() });
        }
    }
    if functions.is_empty() {
        return Err(format!(
            "{}: no symbols; build it with --config profile.release.package.vmm.strip=false",
            program.display()
        )
        .into());
    }
    Ok(functions)
}

/// First address and length of the layout's section.
fn section(program: &Path) -> Result<(u64, u64)> {
    let text = output(Command::new("readelf").args(["--section-headers", "--wide"]).arg(program))?;
    let line = text.lines().find(|l| l.split_whitespace().any(|w| w == START));
    let words: Vec<&str> = line.unwrap_or_default().split_whitespace().skip_while(|w| *w != START).collect();
    match words[..] {
        [_, _, address, _, size, ..] => Ok((hex(address)?, hex(size)?)),
        _ => Err(format!("{}: it has no {START}", program.display()).into()),
    }
}

/// Where the program was loaded.
fn base(pid: i32, program: &Path) -> Option<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let line = maps.lines().find(|l| l.ends_with(&*program.to_string_lossy()))?;
    u64::from_str_radix(line.split('-').next()?, 16).ok()
}

/// Where in its registers a thread's next instruction is.
const RIP: usize = std::mem::offset_of!(libc::user_regs_struct, rip);
/// `int3`.
const BREAK: u8 = 0xcc;

/// A program with a breakpoint at each function that has not run yet.
struct Planted {
    base: u64,
    memory: File,
    /// Their first bytes, by place.
    bytes: BTreeMap<u64, u8>,
    ran: BTreeSet<u64>,
}

impl Planted {
    fn new(pid: i32, program: &Path, places: impl Iterator<Item = u64>) -> Result<Self> {
        let base = base(pid, program).ok_or("its program is not loaded")?;
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        let mut bytes = BTreeMap::new();
        for place in places {
            let mut byte = [0];
            memory.read_exact_at(&mut byte, base + place)?;
            memory.write_all_at(&[BREAK], base + place)?;
            bytes.insert(place, byte[0]);
        }
        Ok(Self { base, memory, bytes, ran: BTreeSet::new() })
    }

    /// A thread has stopped at a breakpoint: it goes on with what stood there. False: it stands somewhere else.
    fn hit(&mut self, pid: i32) -> bool {
        // SAFETY: reads a word of the thread's registers; takes an offset, and no address of ours.
        let next = unsafe { libc::ptrace(libc::PTRACE_PEEKUSER, pid, RIP, 0) };
        let Some(place) = next.cast_unsigned().checked_sub(self.base + 1) else { return false };
        let Some(byte) = self.bytes.get(&place) else { return false };
        if self.memory.write_all_at(&[*byte], self.base + place).is_err() {
            return false;
        }
        self.ran.insert(place);
        // SAFETY: writes a word of the thread's registers: the place of the instruction that it has not run.
        unsafe { libc::ptrace(libc::PTRACE_POKEUSER, pid, RIP, next - 1) != -1 }
    }
}

/// Looks at one start.
///
/// # Errors
/// No symbols, no such section, or a start that fails.
pub(crate) fn look(subject: &Subject, setting: &Setting) -> Result<Layout> {
    let program = subject.program.canonicalize()?;
    let functions = functions(&program)?;
    let (start, length) = section(&program)?;
    let mut planted: Option<Result<Planted>> = None;
    trace(subject, setting, libc::PTRACE_CONT, |pid, signal| match &mut planted {
        None => {
            planted = Some(Planted::new(pid, &program, functions.keys().copied()));
            true
        }
        Some(Ok(planted)) => signal == libc::SIGTRAP && planted.hit(pid),
        Some(Err(_)) => false,
    })?;
    let ran = planted.ok_or("it never stopped")??.ran;
    let mut layout = Layout { missing: Vec::new(), vain: Vec::new(), bytes: [0; 2], windows: 0 };
    let mut windows = BTreeSet::new();
    for (place, function) in functions {
        let did = ran.contains(&place);
        let there = (start..start + length).contains(&place);
        if there {
            layout.bytes[0] += function.size;
            layout.bytes[1] += if did { function.size } else { 0 };
        }
        if did {
            windows.insert(place / WINDOW);
        }
        match (did, there) {
            (true, false) => layout.missing.push(function),
            (false, true) => layout.vain.push(function),
            _ => {}
        }
    }
    layout.windows = windows.len();
    Ok(layout)
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (title, functions) in
            [("ran, and is not in", &self.missing), ("did not run, and is in", &self.vain)]
        {
            for function in functions {
                writeln!(
                    f,
                    "{title} {START}: {:6} bytes at {:7x}  {}",
                    function.size, function.start, function.name
                )?;
            }
        }
        let [all, ran] = self.bytes;
        writeln!(
            f,
            "{START}: {all} bytes, {ran} of them of functions that ran; a start touches {} windows of 64 KiB",
            self.windows
        )
    }
}
