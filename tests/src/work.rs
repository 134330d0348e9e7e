//! Work that is under way in a Debian guest while something happens to its VM, and the proof that it went on where it was: a computation, a file
//! that is being copied, a TCP connection to the host, and somebody who sleeps.

use std::time::Duration;

use crate::console::Console;
use crate::host::Host;
use crate::scenario::{BOOT, Outcome, SOON, check};

/// The host's end of the connection.
const PORT: u16 = 7070;
/// What has come over it, on the host.
const HEARD: &str = "/var/tmp/heard";
/// Lines that the guest sends, one each twentieth of a second of its own.
const LINES: u32 = 400;
/// Blocks of 16 KiB of the file; each is written through to the disk before the next.
const BLOCKS: u32 = 200;
/// Steps of the computation.
const STEPS: u64 = 60_000;
/// What the sleeper sleeps, in seconds of the guest's.
const SLEEP: u32 = 10;
/// How long all of it may take, on an emulated host.
const DONE: Duration = BOOT;

/// Starts all of it, with the host's end at `address`, and returns when each has begun.
///
/// # Errors
/// When it does not.
pub fn begin(host: &Host, address: &str, console: &mut Console) -> Outcome {
    host.ok(&format!(
        "rm -f {HEARD}; (setsid socat -u TCP-LISTEN:{PORT},reuseaddr,bind={address} CREATE:{HEARD} </dev/null >/dev/null 2>&1 &)"
    ))?;
    console.shell("rm -f /tmp/work-*; head -c 3276800 /dev/urandom > /root/source; sync", SOON)?;
    for line in [
        format!(
            "(i=0; s=0; while [ $i -lt {STEPS} ]; do i=$((i+1)); s=$(((s*31+i)%1000003)); done; echo $s > /tmp/work-sum) &"
        ),
        format!(
            "(i=0; while [ $i -lt {BLOCKS} ]; do dd if=/root/source of=/root/copy bs=16k count=1 skip=$i seek=$i conv=notrunc,fsync 2>/dev/null; \
             i=$((i+1)); echo $i > /tmp/work-block; done; touch /tmp/work-copied) &"
        ),
        format!(
            "(i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo $i; busybox sleep 0.05; done | socat -u - TCP:{address}:{PORT}) 2>/dev/null &"
        ),
        format!(
            "(a=$(cut -d. -f1 /proc/uptime); busybox sleep {SLEEP}; b=$(cut -d. -f1 /proc/uptime); echo $((b-a)) > /tmp/work-slept) &"
        ),
    ] {
        console.shell(&line, SOON)?;
    }
    host.eventually(SOON, &format!("test $(wc -l < {HEARD}) -ge 3"))?;
    console.shell("while [ ! -s /tmp/work-block ]; do busybox sleep 0.1; done", SOON)?;
    Ok(())
}

/// The guest stands still: something of it has been done, and not all.
///
/// # Errors
/// When it was all done.
pub fn stands(host: &Host) -> Outcome {
    let lines: u32 = host.ok(&format!("wc -l < {HEARD}"))?.trim().parse()?;
    check((1..LINES).contains(&lines), || format!("{lines} lines of {LINES} have come"))
}

/// Everything goes on to its end: the right sum, the same file, each line once and in order, the whole sleep; and the kernel has nothing to
/// complain of.
///
/// # Errors
/// When something is missing or wrong.
pub fn goes_on(host: &Host, console: &mut Console) -> Outcome {
    let wait = "for f in sum copied slept; do while [ ! -e /tmp/work-$f ]; do busybox sleep 0.2; done; done";
    console.shell(wait, DONE)?;
    let sum = (1..=STEPS).fold(0, |sum, step| (sum * 31 + step) % 1_000_003);
    let found = console.shell("cat /tmp/work-sum", SOON)?;
    check(found == sum.to_string(), || format!("the computation gave {found} and not {sum}"))?;
    console.shell("busybox cmp /root/source /root/copy && rm /root/source /root/copy", SOON)?;
    let slept: u32 = console.shell("cat /tmp/work-slept", SOON)?.parse()?;
    check(slept + 1 >= SLEEP, || format!("woke after {slept} seconds"))?;
    host.eventually(DONE, &format!("tail -n 1 {HEARD} | grep -qx {LINES}"))?;
    host.ok(&format!("seq {LINES} | cmp - {HEARD}"))?;
    let complaints = console
        .shell("dmesg | grep -i 'lockup\\|stall\\|unstable\\|I/O error\\|WARNING' | head -n 3; true", SOON)?;
    check(complaints.is_empty(), || complaints.clone())
}
