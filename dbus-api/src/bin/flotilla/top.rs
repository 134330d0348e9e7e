//! `flotilla top`: what the running VMs use, as rates between two looks at the daemon's counts.

use std::io::IsTerminal;
use std::time::Duration;

use comfy_table::Cell;
use dbus_api::proxy::Stats;
use dbus_api::spec::Size;
use serde::Serialize;
use tokio::time::Instant;

use crate::args::watch::TopArgs;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, plain};

/// The daemon's counts are that old: looking more often shows them twice.
const SHORTEST: Duration = Duration::from_secs(1);
/// Cursor home and the rest of the screen gone.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

/// One VM between two looks.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    name: String,
    /// Percent of one processor.
    cpu: f64,
    vcpus: u64,
    resident: u64,
    memory: u64,
    /// Bytes a second from here on.
    disk_read: u64,
    disk_written: u64,
    received: u64,
    sent: u64,
}

/// `flotilla top`.
pub(crate) async fn top(client: &Client, args: TopArgs) -> Result<(), Failure> {
    let names: Vec<&str> = args.names.iter().map(String::as_str).collect();
    let look = async || {
        let stats = client.manager.get_stats(&names).await.map_err(|error| client.failed(error))?;
        Ok::<_, Failure>((Instant::now(), stats.1))
    };
    let screen = std::io::stdout().is_terminal() && !args.json;
    let count = args.count.unwrap_or(if std::io::stdout().is_terminal() { u64::MAX } else { 1 });
    let mut before = look().await?;
    for _ in 0..count {
        tokio::time::sleep(args.interval.max(SHORTEST)).await;
        let now = look().await?;
        let rows = rows(&before.1, &now.1, now.0 - before.0);
        if args.json {
            let line = serde_json::to_string(&rows).unwrap_or_default();
            output::print(&format!("{line}\n"))?;
        } else {
            output::print(&format!("{}{}", if screen { CLEAR } else { "" }, table(&rows)))?;
        }
        before = now;
    }
    Ok(())
}

/// The busiest first. A VM that was not there before is counted from its start on the next time.
fn rows(before: &Stats, now: &Stats, passed: Duration) -> Vec<Row> {
    let row = |(name, counts): (&String, &std::collections::HashMap<String, u64>)| {
        let old = before.get(name)?;
        let count = |key: &str| counts.get(key).copied().unwrap_or(0);
        let rate =
            |key: &str| per_second(count(key).saturating_sub(old.get(key).copied().unwrap_or(0)), passed);
        let all_nics = |what: &str| {
            let keys = counts.keys().filter(|key| key.starts_with("nic") && key.ends_with(what));
            keys.map(|key| rate(key)).sum::<f64>()
        };
        Some(Row {
            name: name.clone(),
            // Tenths are enough, and do not flicker.
            cpu: (rate("cpu_usec") / 1000.0).round() / 10.0,
            vcpus: count("vcpus"),
            resident: count("resident"),
            memory: count("memory"),
            disk_read: whole(rate("disk_read")),
            disk_written: whole(rate("disk_written")),
            received: whole(all_nics(".received")),
            sent: whole(all_nics(".sent")),
        })
    };
    let mut rows: Vec<Row> = now.iter().filter_map(row).collect();
    rows.sort_by(|a, b| b.cpu.total_cmp(&a.cpu).then_with(|| a.name.cmp(&b.name)));
    rows
}

fn per_second(count: u64, passed: Duration) -> f64 {
    count as f64 / passed.as_secs_f64().max(1e-3)
}

fn whole(rate: f64) -> u64 {
    rate.round() as u64
}

fn table(rows: &[Row]) -> String {
    let header =
        ["NAME", "CPU%", "VCPUS", "RESIDENT", "MEMORY", "READ/S", "WRITTEN/S", "RECEIVED/S", "SENT/S"];
    let cells = rows.iter().map(|row| {
        [
            plain(&row.name),
            format!("{:.1}", row.cpu),
            row.vcpus.to_string(),
            short(row.resident),
            Size(row.memory).to_string(),
            short(row.disk_read),
            short(row.disk_written),
            short(row.received),
            short(row.sent),
        ]
        .into_iter()
        .map(Cell::new)
        .collect()
    });
    output::table(&header, cells.collect(), output::coloured())
}

/// A size in the largest unit that leaves something before the point.
fn short(bytes: u64) -> String {
    let units = ["K", "M", "G", "T"];
    let mut value = bytes as f64;
    let mut unit = "";
    for next in units {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit.is_empty() { bytes.to_string() } else { format!("{value:.1}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(vms: &[(&str, &[(&str, u64)])]) -> Stats {
        let counts = |counts: &[(&str, u64)]| counts.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect();
        vms.iter().map(|(name, of)| ((*name).to_owned(), counts(of))).collect()
    }

    #[test]
    fn rates_are_between_two_looks() {
        let before = stats(&[
            ("idle", &[("cpu_usec", 5), ("nic0.received", 100)]),
            ("busy", &[("cpu_usec", 1_000_000), ("disk_read", 10)]),
        ]);
        let now = stats(&[
            ("idle", &[("cpu_usec", 5), ("nic0.received", 300), ("nic1.received", 2000), ("resident", 7)]),
            ("busy", &[("cpu_usec", 4_000_000), ("disk_read", 4)]),
            ("new", &[("cpu_usec", 9)]),
        ]);
        let rows = rows(&before, &now, Duration::from_secs(2));
        assert_eq!(rows.iter().map(|row| &*row.name).collect::<Vec<_>>(), ["busy", "idle"]);
        // A process that was replaced counts from nothing again: no rate below zero.
        assert_eq!((rows[0].cpu, rows[0].disk_read), (150.0, 0));
        assert_eq!((rows[1].cpu, rows[1].received, rows[1].resident), (0.0, 1100, 7));
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in
            [(0, "0"), (1023, "1023"), (1536, "1.5K"), (1 << 30, "1.0G"), (u64::MAX, "16777216.0T")]
        {
            assert_eq!(short(bytes), text);
        }
    }
}
