//! What VMs use of the host, as `GetStats` tells it: a flat table of counts, so that new ones need no new signature.

use std::collections::HashMap;

use dbus_api::error::Error;
use dbus_api::proxy::Stats;

use super::named;
use crate::fleet::Fleet;
use crate::fleet::usage::Usage;
use crate::fleet::view::View;

/// The counts of these VMs, or of all; those that do not run have none.
pub(super) async fn stats(fleet: &Fleet, names: &[String]) -> Result<(u64, Stats), Error> {
    let sequence = fleet.sequence();
    let all = fleet.list();
    let usages = fleet.usages(all.clone()).await;
    let row = |view: &View| Some((view.name.to_string(), counts(view, usages.get(&view.name)?)));
    if names.is_empty() {
        return Ok((sequence, all.iter().filter_map(|view| row(view)).collect()));
    }
    let mut stats = HashMap::new();
    for name in names {
        stats.extend(row(&*fleet.get(name).map_err(named)?));
    }
    Ok((sequence, stats))
}

fn counts(view: &View, usage: &Usage) -> HashMap<String, u64> {
    let mut counts: HashMap<String, u64> = [
        ("cpu_usec", usage.cpu_usec),
        ("threads", usage.threads),
        ("resident", usage.resident),
        ("disk_read", usage.disk[0]),
        ("disk_written", usage.disk[1]),
        ("memory", view.spec.memory.0),
        ("vcpus", view.spec.cpus.into()),
    ]
    .into_iter()
    .map(|(name, count)| (name.to_owned(), count))
    .collect();
    for (nic, traffic) in &usage.nics {
        let [received, received_packets] = traffic.received;
        let [sent, sent_packets] = traffic.sent;
        counts.insert(format!("{nic}.received"), received);
        counts.insert(format!("{nic}.received_packets"), received_packets);
        counts.insert(format!("{nic}.sent"), sent);
        counts.insert(format!("{nic}.sent_packets"), sent_packets);
    }
    counts
}
