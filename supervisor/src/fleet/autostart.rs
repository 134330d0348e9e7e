//! VMs that start with the host: once per boot, group after group. Owns the plan of a boot and its carrying out; called by main when the
//! daemon is ready.
//!
//! The plan is made by the first daemon of a boot and written down, so that a daemon that is killed meanwhile leaves the rest to the next one,
//! and one that is merely restarted starts nothing that an administrator has stopped, or has defined since.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::life::{State, Verb};
use super::registry::Fleet;
use super::view::View;
use crate::store::Plan;

/// A start has deadlines of its own, which are shorter.
const START: Duration = Duration::from_secs(120);

/// VMs that start together, and the pause before the next group.
#[derive(Debug, Default, PartialEq, Eq)]
struct Group {
    names: Vec<String>,
    delay: Duration,
}

/// The groups in their order: by `autostart_order`; the longest `autostart_delay` of a group counts.
fn groups(views: &[Arc<View>], plan: &Plan) -> Vec<Group> {
    let mut groups: BTreeMap<u16, Group> = BTreeMap::new();
    // One that has been started in this boot already is whatever somebody made of it.
    let due =
        |view: &&Arc<View>| view.state == State::Defined && plan.left.iter().any(|name| **name == *view.name);
    for view in views.iter().filter(due) {
        let group = groups.entry(view.spec.autostart_order).or_default();
        group.names.push(view.name.to_string());
        group.delay = group.delay.max(Duration::from_secs(u64::from(view.spec.autostart_delay)));
    }
    groups.into_values().collect()
}

impl Fleet {
    /// Starts what starts with the host, if that was not done in this boot. Returns when it is done.
    pub async fn autostart(&self) {
        let views = self.list();
        let boot = &self.context.boot_id;
        let mut plan = match self.context.store.load_plan() {
            Some(plan) if plan.boot_id == *boot => plan,
            _ => {
                let wanted = views.iter().filter(|view| view.spec.autostart);
                Plan::new(boot, wanted.map(|view| view.name.to_string()).collect())
            }
        };
        self.write_down(&plan);
        let groups = groups(&views, &plan);
        let last = groups.len().saturating_sub(1);
        for (at, group) in groups.into_iter().enumerate() {
            info!("starting with the host: {}", group.names.join(" "));
            join_all(group.names.iter().map(|name| self.start_with_host(name))).await;
            plan.left.retain(|name| !group.names.contains(name));
            self.write_down(&plan);
            if at < last {
                sleep(group.delay).await;
            }
        }
        if !plan.left.is_empty() {
            plan.left.clear();
            self.write_down(&plan);
        }
    }

    async fn start_with_host(&self, name: &str) {
        let end = match self.ask(name, Verb::Start { paused: false }).await {
            Ok(job) => self.wait_job(job),
            Err(error) => return warn!(FLOTILLA_VM = name, "it does not start with the host: {error}"),
        };
        // None: it has ended already; the VM's state says how.
        let Some(end) = end else { return };
        if let Ok(Ok(Err(error))) = timeout(START, end).await {
            warn!(FLOTILLA_VM = name, "it did not start with the host: {error}");
        }
    }

    fn write_down(&self, plan: &Plan) {
        if let Err(error) = self.context.store.save_plan(plan) {
            // At worst a VM that was stopped meanwhile is started once more.
            warn!("what starts with the host: {error}");
        }
    }
}
