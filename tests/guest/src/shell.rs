//! The console's commands, and the state that they share: what was found, which devices are driven.

use crate::blk::{self, Disk};
use crate::boot::BootInfo;
use crate::load::{self, Pattern};
use crate::more::{self, More, Seen};
use crate::net::{self, Card};
use crate::text::{Interface, Ipv4, Size, number};
use crate::virtio::{self, Window};
use crate::work::{self, Crc32};
use crate::{acpi, clock, console, cpu, hostile, irq, memory, power, put, say, vcpu};

const MAX_DISKS: usize = 16;
const HELP: &str = "\
help                       this list
mem                        memory map
devices                    virtio devices
uptime                     seconds since start
echo TEXT                  print TEXT
spin MS                    keep a CPU busy
touch MIB                  write to each page of MIB of memory
dirty MIB RATE [SECONDS]   dirty MIB of memory again and again, RATE pages a second (0: at full speed)
sleep MS                   wait, idle
tick MS                    print dots, one each millisecond
disk [vdX] read SECTOR [COUNT]         CRC-32 and first bytes
disk [vdX] write SECTOR COUNT [SEED]   write a pattern
disk [vdX] check SECTOR COUNT [SEED]   compare with the pattern
disk [vdX] sum [SECTOR COUNT]          CRC-32 of all or some
disk [vdX] flush                       make writes durable
net                        the network card
net up ADDR/LEN            give it an address
net ping ADDR [COUNT]      ping
load disk read|write|scan DEPTH KIB MS  keep the disk busy, polling, and count; takes it over
load net send BYTES MS                 send frames, likewise
load net receive MS                    count frames
more plug|unplug|state FIRST COUNT      ask for blocks of more memory (virtio-mem)
more none                  give all of them back
more fill|look FIRST COUNT write to blocks, or look at them
vcpu                       fill the processor's registers, wait for a key, say which changed
hostile [PREFIX]           misuse the devices, case by case; takes them over for good
halt                       stop the processor for good
poweroff, reboot, fault    end the VM: ACPI, keyboard controller, triple fault";

/// Why a command did not work; printed after its name.
enum Failure {
    Usage,
    Text(&'static str),
}

impl From<&'static str> for Failure {
    fn from(text: &'static str) -> Self {
        Self::Text(text)
    }
}

type Outcome = Result<(), Failure>;

/// The console.
pub struct Shell {
    boot: &'static BootInfo,
    start: u64,
    disks: [Option<Disk>; MAX_DISKS],
    card: Option<Card>,
    more: Option<More>,
}

impl Shell {
    /// `start` is the time stamp of the start.
    pub fn new(boot: &'static BootInfo, start: u64) -> Self {
        Self { boot, start, disks: [const { None }; MAX_DISKS], card: None, more: None }
    }

    /// Banner, commands of the command line, then the prompt for ever.
    pub fn run(&mut self) -> ! {
        console::open();
        let quiet = self.boot.flag("quiet");
        if !quiet {
            self.banner();
        }
        let boot = self.boot;
        if let Some(text) = boot.options("ip").next() {
            match Interface::parse(text) {
                Some(interface) => self.report("net", |shell| shell.net_up(interface)),
                None => say!("ip={text}: not an address; expected ip=ADDR/LEN"),
            }
        }
        for script in boot.options("cmd") {
            let spaced = script.contains(' ');
            for command in script.split(';') {
                self.execute(command, if spaced { ' ' } else { ',' });
            }
        }
        let mut line = Line::new();
        loop {
            put!("guest> ");
            let text = line.read(|| self.idle());
            self.execute(text, ' ');
        }
    }

    /// Waits for a key or a frame at no cost.
    fn idle(&mut self) -> u8 {
        loop {
            if let Some(key) = console::key() {
                return key;
            }
            match &mut self.card {
                Some(card) if card.pending() => card.serve(),
                // One halt each: a key's edge cannot be seen in memory.
                _ => cpu::idle(),
            }
        }
    }

    fn banner(&self) {
        let mut brand = [0; 48];
        say!("Flotilla guest {} is up.", env!("CARGO_PKG_VERSION"));
        say!("cpus    {} x {}", acpi::processors(self.boot), cpu::brand(&mut brand));
        say!("memory  {}", Size(self.boot.ram().map(|r| r.size).sum::<u64>().next_multiple_of(1 << 20)));
        self.devices(false);
        say!("Type help for the commands.");
    }

    fn windows(&self) -> impl Iterator<Item = (Window, u32)> {
        virtio::windows(self.boot).filter_map(|w| Some((w, w.kind()?)))
    }

    fn of_kind(&self, kind: u32) -> impl Iterator<Item = Window> {
        self.windows().filter(move |(_, k)| *k == kind).map(|(w, _)| w)
    }

    /// Lists devices; `all` also shows empty slots and where each one is.
    fn devices(&self, all: bool) {
        let (mut disks, mut cards) = (0u8, 0u8);
        for (window, kind) in self.windows() {
            let place = Place(all.then_some(window));
            match kind {
                blk::KIND => {
                    let (name, sectors) = (char::from(b'a' + disks % 26), blk::capacity(window));
                    disks += 1;
                    if sectors != 0 {
                        let mode = if blk::read_only(window) { ", read-only" } else { "" };
                        say!("disk    vd{name} {}{mode}{place}", Size(sectors.saturating_mul(512)));
                    } else if all {
                        say!("disk    vd{name} empty{place}");
                    }
                }
                net::KIND => {
                    let (mac, link) = net::describe(window);
                    if link || all {
                        say!("network eth{cards} {mac}{}{place}", if link { "" } else { " no link" });
                    }
                    cards += 1;
                }
                0 => {}
                other => say!("device  virtio type {other}{place}"),
            }
        }
    }

    fn report(&mut self, name: &str, action: impl FnOnce(&mut Self) -> Outcome) {
        match action(self) {
            Ok(()) => {}
            Err(Failure::Text(text)) => say!("{name}: {text}"),
            Err(Failure::Usage) => {
                for line in HELP.lines().filter(|l| l.starts_with(name)) {
                    say!("usage: {line}");
                }
            }
        }
    }

    /// Runs one command whose words `separator` separates.
    fn execute(&mut self, command: &str, separator: char) {
        let command = command.trim_ascii();
        let (name, rest) = command.split_once(separator).unwrap_or((command, ""));
        let mut words = rest.split(separator).filter(|w| !w.is_empty());
        let mut arguments = [""; 6];
        let mut count = 0;
        for slot in &mut arguments {
            let Some(word) = words.next() else { break };
            (*slot, count) = (word, count + 1);
        }
        let arguments = &arguments[..count];
        self.report(name, |shell| match name {
            "" => Ok(()),
            "help" => {
                say!("{HELP}");
                Ok(())
            }
            "mem" => {
                shell.mem();
                Ok(())
            }
            "devices" => {
                shell.devices(true);
                Ok(())
            }
            "uptime" => {
                let us = clock::to_microseconds(cpu::tsc() - shell.start);
                say!("up {}.{:06} s, {} ticks a second", us / 1_000_000, us % 1_000_000, clock::hz());
                Ok(())
            }
            "echo" => {
                say!("{rest}");
                Ok(())
            }
            "spin" => {
                let rounds = work::spin(numbers::<1>(arguments, 1)?[0]);
                say!("spin: {rounds} rounds");
                Ok(())
            }
            "sleep" => {
                let [ms] = numbers(arguments, 1)?;
                irq::wait(ms.saturating_mul(1000), || (), || false);
                Ok(())
            }
            "tick" => {
                work::tick(numbers::<1>(arguments, 1)?[0]);
                Ok(())
            }
            "touch" => {
                let [mib] = numbers(arguments, 1)?;
                let start = cpu::tsc();
                let pages = work::touch(shell.boot, mib.saturating_mul(256));
                say!("touch: {pages} pages in {} us", clock::to_microseconds(cpu::tsc() - start));
                Ok(())
            }
            "dirty" => {
                let [mib, rate, seconds] = numbers(arguments, 2)?;
                let (pages, us) = work::dirty(shell.boot, mib.saturating_mul(256), rate, seconds);
                say!("dirty: {pages} pages in {us} us");
                Ok(())
            }
            "disk" => shell.disk(arguments),
            "net" => shell.net(arguments),
            "load" => shell.load(arguments),
            "more" => shell.more(arguments),
            "vcpu" => Ok(vcpu::run(|| while console::key().is_some() {})?),
            "hostile" => Ok(hostile::run(shell.boot, arguments.first().copied().unwrap_or(""))?),
            "halt" => {
                say!("halted");
                cpu::hold()
            }
            "poweroff" => power::off(),
            "reboot" => power::reset(),
            "fault" => cpu::triple_fault(),
            _ => Err("no such command; help lists them".into()),
        });
    }

    fn mem(&self) {
        for r in self.boot.regions() {
            let kind = if r.kind == 1 { "RAM" } else { "reserved" };
            say!("{:#014x} to {:#014x} {kind} {}", r.start, r.start.saturating_add(r.size), Size(r.size));
        }
        say!("free for touch and dirty: {} MiB", memory::arena_size(self.boot) >> 20);
    }

    fn disk(&mut self, arguments: &[&str]) -> Outcome {
        let (index, arguments) = match arguments.first().and_then(|w| w.strip_prefix("vd")).map(str::as_bytes)
        {
            Some([letter @ b'a'..=b'p']) => (usize::from(letter - b'a'), &arguments[1..]),
            _ => (0, arguments),
        };
        let (&action, rest) = arguments.split_first().ok_or(Failure::Usage)?;
        let window = self.of_kind(blk::KIND).nth(index).ok_or("there is no such disk")?;
        let slot = &mut self.disks[index];
        if slot.is_none() {
            *slot = Some(Disk::open(window)?);
        }
        let disk = slot.as_mut().ok_or("there is no such disk")?;
        let capacity = disk.capacity();
        if capacity == 0 {
            return Err("the slot is empty".into());
        }
        let inside = |sector: u64, count: u64| match sector.checked_add(count) {
            Some(end) if end <= capacity => Ok(()),
            _ => Err(Failure::Text("beyond the end of the disk")),
        };
        let start = cpu::tsc();
        let sectors = match action {
            "read" => {
                let [sector, count] = numbers(rest, 1)?;
                let count = count.max(1);
                inside(sector, count)?;
                let mut first = [0; 16];
                first.copy_from_slice(&disk.read(sector, 1)?[..16]);
                let crc = sum(disk, sector, count)?;
                say!("disk: crc32 {crc:08x}, starts with {first:02x?}");
                count
            }
            "sum" => {
                let [sector, count] = numbers(rest, 0)?;
                let count = if rest.len() < 2 { capacity.saturating_sub(sector) } else { count };
                inside(sector, count)?;
                let crc = sum(disk, sector, count)?;
                say!("disk: crc32 {crc:08x}");
                count
            }
            "write" | "check" => {
                let [sector, count, seed] = numbers(rest, 2)?;
                inside(sector, count)?;
                if action == "write" {
                    write(disk, sector, count, seed)?
                } else {
                    check(disk, sector, count, seed)?
                };
                count
            }
            "flush" => {
                disk.flush()?;
                0
            }
            _ => return Err(Failure::Usage),
        };
        say!("disk: {action} {sectors} sectors in {} us", clock::to_microseconds(cpu::tsc() - start));
        Ok(())
    }

    fn more(&mut self, arguments: &[&str]) -> Outcome {
        let (&action, rest) = arguments.split_first().ok_or(Failure::Usage)?;
        if self.more.is_none() {
            let window = self.of_kind(more::KIND).next().ok_or("there is no such device")?;
            self.more = Some(More::open(window)?);
        }
        let more = self.more.as_mut().ok_or("there is no such device")?;
        let [first, count] = numbers(rest, if action == "none" { 0 } else { 2 })?;
        let beyond = Failure::Text("beyond the end");
        let kind = match action {
            "plug" => 0,
            "unplug" => 1,
            "none" => 2,
            "state" => 3,
            "fill" => {
                say!("more: wrote {} words", more.fill(first, count).ok_or(beyond)?);
                return Ok(());
            }
            "look" => {
                let Seen { kept, zero, absent, other } = more.look(first, count).ok_or(beyond)?;
                say!("more: {kept} kept, {zero} zero, {absent} absent, {other} other");
                return Ok(());
            }
            _ => return Err(Failure::Usage),
        };
        let count = u16::try_from(count).map_err(|_| Failure::Text("at most 65535 blocks"))?;
        let answer = match (more.ask(kind, first, count)?, action) {
            ((0, 0), "state") => "all there",
            ((0, 1), "state") => "none there",
            ((0, 2), "state") => "some there",
            ((0, 0), _) => "done",
            ((1, 0), _) => "refused",
            ((2, 0), _) => "busy",
            ((3, 0), _) => "nonsense",
            _ => "an answer of no kind",
        };
        say!("more: {answer}");
        Ok(())
    }

    /// The first device of its kind that is there for use: a disk with sectors, a card with a link.
    fn load(&mut self, arguments: &[&str]) -> Outcome {
        let disk = || self.of_kind(blk::KIND).find(|w| blk::capacity(*w) != 0).ok_or("there is no disk");
        let card = || self.of_kind(net::KIND).find(|w| net::describe(*w).1).ok_or("there is no network card");
        let done = match arguments {
            ["disk", pattern, rest @ ..] => {
                let pattern = match *pattern {
                    "read" => Pattern::Read,
                    "write" => Pattern::Write,
                    "scan" => Pattern::Scan,
                    _ => return Err(Failure::Usage),
                };
                load::disk(self.boot, disk()?, pattern, numbers(rest, 3)?)?
            }
            ["net", "send", rest @ ..] => load::transmit(self.boot, card()?, numbers(rest, 2)?)?,
            ["net", "receive", rest @ ..] => load::receive(self.boot, card()?, numbers::<1>(rest, 1)?[0])?,
            _ => return Err(Failure::Usage),
        };
        let load::Done { count, microseconds, bells, total } = done;
        say!("load: {count} in {microseconds} us, {bells} bells, {total} in all");
        Ok(())
    }

    fn net(&mut self, arguments: &[&str]) -> Outcome {
        match arguments {
            [] => {
                let Some(card) = &self.card else {
                    return Err("not in use; `net up ADDR/LEN` starts it".into());
                };
                put!("net: {} {}", card.mac, if card.link() { "link up" } else { "no link" });
                if let Some(own) = card.interface {
                    put!(", {}/{}", own.address, own.prefix);
                }
                say!(
                    ", {} frames in, {} out, {} pings answered",
                    card.frames[0],
                    card.frames[1],
                    card.answered
                );
                Ok(())
            }
            ["up", address] => {
                self.net_up(Interface::parse(address).ok_or("not an address; expected ADDR/LEN")?)
            }
            ["ping", address, count @ ..] => {
                let to = Ipv4::parse(address).ok_or("not an address")?;
                let [count] = numbers(count, 0)?;
                let card = self.card.as_mut().ok_or("not in use; `net up ADDR/LEN` starts it")?;
                let mut answers = 0;
                let count = count.clamp(1, 65535);
                for sequence in 1..=count {
                    match card.ping(to, sequence as u16)? {
                        Some(us) => {
                            answers += 1;
                            say!("net: {to} answered in {us} us");
                        }
                        None => say!("net: {to} does not answer"),
                    }
                }
                say!("net: {answers} of {count} answered");
                Ok(())
            }
            _ => Err(Failure::Usage),
        }
    }

    /// Gives the first card with a link (else the first one) an address and starts it.
    fn net_up(&mut self, interface: Interface) -> Outcome {
        if let Some(card) = &mut self.card {
            card.interface = Some(interface);
        } else {
            let window = self
                .of_kind(net::KIND)
                .find(|w| net::describe(*w).1)
                .or_else(|| self.of_kind(net::KIND).next())
                .ok_or("there is no network card")?;
            self.card = Some(Card::open(window, Some(interface))?);
        }
        say!("net: {}/{}", interface.address, interface.prefix);
        Ok(())
    }
}

/// Up to `N` numbers, at least `least`; those left out are 0.
fn numbers<const N: usize>(words: &[&str], least: usize) -> Result<[u64; N], Failure> {
    if words.len() < least || words.len() > N {
        return Err(Failure::Usage);
    }
    let mut values = [0; N];
    for (value, word) in values.iter_mut().zip(words) {
        *value = number(word).ok_or(Failure::Text("expected a number"))?;
    }
    Ok(values)
}

fn batches(sector: u64, count: u64) -> impl Iterator<Item = (u64, usize)> {
    let batch = blk::BATCH as u64;
    (0..count.div_ceil(batch)).map(move |i| (sector + i * batch, (count - i * batch).min(batch) as usize))
}

fn sum(disk: &mut Disk, sector: u64, count: u64) -> Result<u32, Failure> {
    let mut crc = Crc32::new();
    for (at, length) in batches(sector, count) {
        crc.update(disk.read(at, length)?);
    }
    Ok(crc.finish())
}

fn write(disk: &mut Disk, sector: u64, count: u64, seed: u64) -> Outcome {
    for (at, length) in batches(sector, count) {
        disk.write(at, length, |data| {
            for (i, bytes) in data.chunks_mut(blk::SECTOR).enumerate() {
                work::pattern(bytes, at + i as u64, seed);
            }
        })?;
    }
    Ok(())
}

fn check(disk: &mut Disk, sector: u64, count: u64, seed: u64) -> Outcome {
    let mut bad = 0;
    for (at, length) in batches(sector, count) {
        for (i, bytes) in disk.read(at, length)?.chunks(blk::SECTOR).enumerate() {
            let mut expected = [0; blk::SECTOR];
            work::pattern(&mut expected, at + i as u64, seed);
            bad += u64::from(bytes != expected);
        }
    }
    if bad != 0 {
        say!("disk: {bad} of {count} sectors differ");
        return Err("not what was written".into());
    }
    say!("disk: {count} sectors as written");
    Ok(())
}

/// Where a device is, if that is wanted.
struct Place(Option<Window>);

impl core::fmt::Display for Place {
    fn fmt(&self, f: &mut core::fmt::Formatter) -> core::fmt::Result {
        match self.0 {
            Some(window) => write!(f, " at {:#x} irq {}", window.address, window.irq),
            None => Ok(()),
        }
    }
}

/// One line of input, with the editing that a terminal in raw mode leaves to us.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Line {
    fn new() -> Self {
        Self { bytes: [0; 256], length: 0 }
    }

    fn read(&mut self, mut key: impl FnMut() -> u8) -> &str {
        self.length = 0;
        loop {
            match key() {
                b'\r' | b'\n' => break,
                8 | 127 if self.length > 0 => {
                    self.length -= 1;
                    put!("\x08 \x08");
                }
                // Ctrl-U and Ctrl-C drop the line.
                3 | 21 => {
                    put!("^C");
                    self.length = 0;
                    break;
                }
                byte @ b' '..=b'~' if self.length < self.bytes.len() => {
                    self.bytes[self.length] = byte;
                    self.length += 1;
                    put!("{}", char::from(byte));
                }
                _ => {}
            }
        }
        put!("\n");
        core::str::from_utf8(&self.bytes[..self.length]).unwrap_or("")
    }
}
