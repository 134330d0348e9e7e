//! What VMs use of the host: processor time, memory, disk and network, read from the kernel's own accounts of each VMM's process and of each
//! tap. No VMM is asked, so a VM that hangs is counted like the others. Kept for a second: many readers cost as much as one.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::view::View;

/// How old an answer may be.
const FRESH: Duration = Duration::from_secs(1);

/// What one VM has used since its process began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time of all its threads, in microseconds.
    pub cpu_usec: u64,
    /// Memory that is there now, in bytes: the guest's and the VMM's own.
    pub resident: u64,
    /// Threads.
    pub threads: u64,
    /// Bytes read from and written to storage; what the host's page cache had does not count.
    pub disk: [u64; 2],
    /// Each card that has a tap: id, and what the guest received and sent.
    pub nics: Vec<(String, Traffic)>,
}

/// What went through a card, as the guest sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes and packets received.
    pub received: [u64; 2],
    /// Bytes and packets sent.
    pub sent: [u64; 2],
}

/// All running VMs by name.
pub type Usages = BTreeMap<Arc<str>, Usage>;

/// The accounts, at most a second old.
#[derive(Debug, Default)]
pub struct Meter {
    newest: Mutex<Option<(Instant, Arc<Usages>)>>,
}

impl Meter {
    /// What the VMs of `views` use. One reader at a time looks; those that wait for it get the same.
    pub async fn read(&self, views: Vec<Arc<View>>) -> Arc<Usages> {
        let mut newest = self.newest.lock().await;
        if let Some((at, usages)) = &*newest
            && at.elapsed() < FRESH
        {
            return Arc::clone(usages);
        }
        // A few thousand small files of procfs: memory, but many system calls.
        let looked = tokio::task::spawn_blocking(move || look(Path::new("/proc"), &views)).await;
        let usages = Arc::new(looked.unwrap_or_default());
        *newest = Some((Instant::now(), Arc::clone(&usages)));
        usages
    }
}

fn look(proc: &Path, views: &[Arc<View>]) -> Usages {
    let links = std::fs::read_to_string(proc.join("self/net/dev")).unwrap_or_default();
    let links = parse_links(&links);
    let running = views.iter().filter(|view| view.main_pid != 0);
    let one = |view: &Arc<View>| {
        let mut usage = process(&proc.join(view.main_pid.to_string()))?;
        let traffic = |(id, tap, ..): &(String, String, String, String)| Some((id.clone(), *links.get(tap)?));
        usage.nics = view.nics.iter().filter_map(traffic).collect();
        Some((Arc::clone(&view.name), usage))
    };
    running.filter_map(one).collect()
}

/// One process; `None` when it has ended.
fn process(folder: &Path) -> Option<Usage> {
    let mut usage = parse_stat(&std::fs::read_to_string(folder.join("stat")).ok()?)?;
    // Not ours to read on a host that forbids it: then there is no count.
    let io = std::fs::read_to_string(folder.join("io")).unwrap_or_default();
    let field = |name: &str| {
        let line = io.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    usage.disk = [field("read_bytes:").unwrap_or(0), field("write_bytes:").unwrap_or(0)];
    Some(usage)
}

/// `/proc/PID/stat` (proc(5)). The name in it may hold blanks and brackets: the fields begin behind the last bracket.
fn parse_stat(text: &str) -> Option<Usage> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    // Field 3 is the first of them.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let (ticks, page) =
        (setting(libc::_SC_CLK_TCK).unwrap_or(100), setting(libc::_SC_PAGESIZE).unwrap_or(4096));
    Some(Usage {
        cpu_usec: field(14)?.saturating_add(field(15)?).saturating_mul(1_000_000) / ticks,
        threads: field(20)?,
        resident: field(24)?.saturating_mul(page),
        ..Usage::default()
    })
}

fn setting(name: libc::c_int) -> Option<u64> {
    // SAFETY: sysconf takes any number, touches no memory of ours, and says -1 to what it does not know.
    let value = unsafe { libc::sysconf(name) };
    u64::try_from(value).ok().filter(|value| *value > 0)
}

/// `/proc/net/dev`. What a tap sends is what its guest receives.
fn parse_links(text: &str) -> HashMap<String, Traffic> {
    let row = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let pair = |at: usize| Some([*numbers.get(at)?, *numbers.get(at + 1)?]);
        Some((name.trim().to_owned(), Traffic { received: pair(8)?, sent: pair(0)? }))
    };
    text.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let usage = process(Path::new("/proc/self")).unwrap();
        assert!(usage.resident > 1 << 20 && usage.threads >= 1, "{usage:?}");
        let text = "7 (a ) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 6 0 100 1000 25 18446744073709551615 1";
        let usage = parse_stat(text).unwrap();
        assert_eq!((usage.cpu_usec, usage.threads, usage.resident), (2_000_000, 6, 25 * 4096));
        assert_eq!(process(Path::new("/proc/0")), None);
    }

    #[test]
    fn a_tap_counts_the_other_way_round() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
                    lo:       1       2    0    0    0     0          0         0        3       4    0    0    0     0       0          0\n\
                    fl-web-0:5 6 0 0 0 0 0 0 70 8 0 0 0 0 0 0\n";
        let links = parse_links(text);
        assert_eq!(links["fl-web-0"], Traffic { received: [70, 8], sent: [5, 6] });
        assert_eq!(links.len(), 2);
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic(text in "[ -~\n]{0,300}") {
            let _ = parse_stat(&text);
            let _ = parse_links(&text);
        }
    }
}
