//! The hostile driver: misuses devices one case after the other in one VM, and proves after each case that it did no harm.
//!
//! ```text
//! a case:  misuse ─▶ outcome ─▶ reset ─▶ a good request to the same device ─▶ a read from another disk ─▶ one line on the console
//! ```
//!
//! `registers` and `rings` hold the cases that fit any device; the `*_cases` those of one kind. The line tells the outcome and those
//! that are allowed, so the table has one place: here. `rig` is what cases are made with, `good` how each queue is used by the book.
//! To add a device: a row in [`TARGETS`], its good request in `good`, and a file with its own cases.

use crate::blk::{self, Disk};
use crate::boot::BootInfo;
use crate::virtio::{self, Problem, reg};
use crate::{more, net, put, say};

mod blk_cases;
mod board_cases;
mod control_cases;
mod good;
mod memory_cases;
mod net_cases;
mod pci_cases;
mod registers;
mod rig;
mod rings;
mod small_cases;
mod vsock_cases;

use good::Prompt;
use rig::{Rig, Space};

/// How a case ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The device did what it was asked, or what a good request asked after the misuse.
    Served,
    /// The device said no: to features, or in its answer to a request.
    Refused,
    /// DEVICE_NEEDS_RESET.
    NeedsReset,
    /// A register write had no effect, or a queue that is not enabled was left alone.
    Ignored,
    /// No answer of any kind. Never allowed.
    Stuck,
    /// Something happened that must not. Never allowed.
    Wrong(&'static str),
}

use Outcome::{Ignored, NeedsReset, Refused, Served};

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Served => "served",
            Refused => "refused",
            NeedsReset => "needs-reset",
            Ignored => "ignored",
            Self::Stuck => "stuck",
            Self::Wrong(what) => what,
        }
    }
}

/// Outcomes that a case may have.
pub type Allowed = &'static [Outcome];

/// The device must not take it.
pub const NO: Allowed = &[NeedsReset, Refused];
/// The device must not care.
pub const YES: Allowed = &[Served];
/// The specification leaves it open; only harm is forbidden.
pub const ANY: Allowed = &[Served, Refused, NeedsReset];
/// The request fails, and the device goes on.
pub const ERROR: Allowed = &[Refused];
/// The queue is not there: a device that cannot do without it says so, another one leaves it alone.
pub const NO_QUEUE: Allowed = &[NeedsReset, Refused, Ignored];
/// The register stays as it is.
pub const NOTHING: Allowed = &[Ignored];

/// One misuse.
pub struct Case {
    /// `group/words`.
    pub name: &'static str,
    /// How it may end.
    pub allowed: Allowed,
    /// Does it. The rig is reset before and after.
    pub run: fn(&mut Rig) -> Outcome,
}

/// Where a device is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// Anywhere.
    Any,
    /// On MMIO.
    Mmio,
    /// On PCI.
    Pci,
}

/// A queue under attack.
pub struct Target {
    /// Starts the names of its cases.
    pub name: &'static str,
    /// Device type.
    pub kind: u32,
    /// Queues that its driver sets up.
    pub queues: u16,
    /// The one that is misused.
    pub queue: u16,
    /// Feature bits that the queue comes with.
    pub features: u64,
    /// What makes the device give requests back.
    pub prompt: Prompt,
    /// Requests of this queue are for the device to write to.
    pub writable: bool,
    /// The cases of `registers` run here too: once for each device.
    pub registers: bool,
    /// Those of `rings` do.
    pub rings: bool,
    /// The only bus that it is on.
    pub bus: Bus,
    /// Cases of its own.
    pub cases: &'static [&'static [Case]],
}

/// Virtio device types.
pub const NET: u32 = net::KIND;
/// As above.
pub const BLK: u32 = blk::KIND;
/// As above.
pub const CONSOLE: u32 = 3;
/// As above.
pub const RNG: u32 = 4;
/// As above.
pub const BALLOON: u32 = 5;
/// As above.
pub const VSOCK: u32 = 19;

/// As above.
pub const MEM: u32 = more::KIND;
/// As above.
pub const PMEM: u32 = 27;

/// VIRTIO_BLK_F_MQ.
const QUEUES: u64 = 1 << 12;
/// VIRTIO_CONSOLE_F_MULTIPORT.
const MULTIPORT: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_STATS_VQ.
const STATS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_REPORTING.
const REPORTING: u64 = 1 << 5;

/// Most rows differ from this in a few fields only.
const PLAIN: Target = Target {
    name: "",
    kind: 0,
    queues: 1,
    queue: 0,
    features: 0,
    prompt: Prompt::None,
    writable: false,
    registers: false,
    rings: true,
    bus: Bus::Any,
    cases: &[],
};

#[rustfmt::skip]
const TARGETS: &[Target] = &[
    Target { name: "pci", kind: BLK, rings: false, bus: Bus::Pci, cases: &[pci_cases::CASES], ..PLAIN },
    Target { name: "board", kind: BLK, rings: false, bus: Bus::Mmio, cases: &[board_cases::CASES], ..PLAIN },
    Target { name: "blk", kind: BLK, registers: true, cases: &[blk_cases::REQUESTS, blk_cases::SEGMENTS], ..PLAIN },
    Target { name: "blk-second", kind: BLK, queues: 2, queue: 1, features: QUEUES, ..PLAIN },
    Target { name: "net-tx", kind: NET, queues: 2, queue: 1, registers: true, cases: &[net_cases::TRANSMIT], ..PLAIN },
    Target { name: "net-rx", kind: NET, queues: 2, writable: true, cases: &[net_cases::RECEIVE], ..PLAIN },
    Target { name: "net-control", kind: NET, queues: 3, queue: 2, features: control_cases::NET_FEATURES, cases: &[control_cases::NET], ..PLAIN },
    Target { name: "console-tx", kind: CONSOLE, queues: 2, queue: 1, registers: true, ..PLAIN },
    Target { name: "console-rx", kind: CONSOLE, queues: 2, writable: true, cases: &[small_cases::INPUT], ..PLAIN },
    Target { name: "serial-control-rx", kind: CONSOLE, queues: 4, queue: 2, features: MULTIPORT, prompt: Prompt::Message { queue: 3 }, writable: true, cases: &[control_cases::SERIAL_ANSWERS], ..PLAIN },
    Target { name: "serial-control-tx", kind: CONSOLE, queues: 4, queue: 3, features: MULTIPORT, cases: &[control_cases::SERIAL], ..PLAIN },
    Target { name: "serial-port-tx", kind: CONSOLE, queues: 6, queue: 5, features: MULTIPORT, ..PLAIN },
    Target { name: "rng", kind: RNG, writable: true, registers: true, cases: &[small_cases::RANDOM], ..PLAIN },
    Target { name: "balloon-inflate", kind: BALLOON, queues: 2, registers: true, cases: &[small_cases::PAGES], ..PLAIN },
    Target { name: "balloon-deflate", kind: BALLOON, queues: 2, queue: 1, cases: &[small_cases::PAGES], ..PLAIN },
    Target { name: "balloon-stats", kind: BALLOON, queues: 3, queue: 2, features: STATS, prompt: Prompt::Another, cases: &[small_cases::STATISTICS], ..PLAIN },
    Target { name: "balloon-reporting", kind: BALLOON, queues: 5, queue: 4, features: STATS | REPORTING, writable: true, cases: &[small_cases::REPORTS], ..PLAIN },
    Target { name: "mem", kind: MEM, registers: true, cases: &[memory_cases::BLOCKS], ..PLAIN },
    Target { name: "pmem", kind: PMEM, registers: true, cases: &[memory_cases::FLUSHES], ..PLAIN },
    Target { name: "vsock-tx", kind: VSOCK, queues: 3, queue: 1, prompt: Prompt::Feed { queue: 0 }, registers: true, cases: &[vsock_cases::PACKETS], ..PLAIN },
    Target { name: "vsock-rx", kind: VSOCK, queues: 3, prompt: Prompt::Message { queue: 1 }, writable: true, cases: &[vsock_cases::BUFFERS], ..PLAIN },
];

/// Runs the cases whose full name (`TARGET/GROUP/WORDS`) starts with `prefix`, on the first device of each kind. The second disk
/// is the other device that must go on working.
pub fn run(boot: &BootInfo, prefix: &str) -> Result<(), Problem> {
    let of_kind = |kind| virtio::windows(boot).filter(move |w| w.kind() == Some(kind));
    let mut other = of_kind(BLK).nth(1).map(Disk::open).ok_or("it needs a second disk")??;
    let before = other.read(0, 1)?[..16].try_into().unwrap_or([0u8; 16]);
    let space = Space::new(boot)?;
    let (mut count, mut bad) = (0, 0);
    for target in TARGETS {
        let Some(window) = of_kind(target.kind).next() else {
            say!("hostile: there is no {}", target.name);
            continue;
        };
        let bus = if window.pci.is_some() { Bus::Pci } else { Bus::Mmio };
        if target.bus != Bus::Any && target.bus != bus {
            continue;
        }
        window.write(reg::QUEUE_SEL, u32::from(target.queue));
        if window.read(reg::QUEUE_NUM_MAX) == 0 {
            say!("hostile: there is no queue of {}", target.name);
            continue;
        }
        let mut rig = Rig::new(space, window, target);
        let own = target.cases.iter().copied();
        // Their offsets are those of MMIO.
        let all = (target.registers && bus == Bus::Mmio).then_some(registers::CASES).into_iter();
        let rings = [rings::CASES, rings::INDIRECT_CASES].into_iter().filter(|_| target.rings);
        for case in all.chain(rings).chain(own).flatten() {
            if !starts_with(target.name, case.name, prefix) {
                continue;
            }
            count += 1;
            // Told before it runs: if the VM does not survive it, this is the last line.
            put!("case {}/{}: ", target.name, case.name);
            let outcome = rig.attempt(case.run);
            let may = allowed(target, case);
            let fine = may.contains(&outcome);
            put!("{}; allowed:", outcome.name());
            for allowed in may {
                put!(" {}", allowed.name());
            }
            let again = rig.recover();
            let others = other.read(0, 1).is_ok_and(|sector| sector[..16] == before);
            put!("; again: {}; others: {}", again.name(), if others { "work" } else { "broken" });
            say!("{}", if fine && again == Served && others { "" } else { " BAD" });
            bad += u32::from(!(fine && again == Served && others));
        }
        rig.reset();
    }
    say!("hostile: {count} cases, {bad} bad");
    Ok(())
}

/// What the host's kernel does with rings that it serves: it takes what it can read, even where a driver must not have written it so
/// (descriptors that were not negotiated, a NEXT that has no use, more buffers than it fills).
const BY_THE_KERNEL: [&str; 3] = ["chain/sum-over-four-gib", "indirect/not-negotiated", "indirect/and-next"];

/// How a case may end with this target.
fn allowed(target: &Target, case: &Case) -> Allowed {
    if target.kind == VSOCK && BY_THE_KERNEL.contains(&case.name) { ANY } else { case.allowed }
}

fn starts_with(target: &str, case: &str, prefix: &str) -> bool {
    match prefix.strip_prefix(target) {
        Some("") => true,
        Some(rest) => rest.strip_prefix('/').is_some_and(|rest| case.starts_with(rest)),
        None => target.starts_with(prefix),
    }
}
