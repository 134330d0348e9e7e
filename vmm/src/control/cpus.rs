//! What clients are told about vCPUs: those that there are, and those that could be.

use serde_json::{Value, json};

use super::Control;
use crate::config::Smp;
use crate::machine::CpuInfo;

impl Control {
    pub(super) fn online(&self) -> Vec<CpuInfo> {
        self.vm.as_ref().map_or_else(Vec::new, |vm| vm.cpus())
    }

    /// `query-cpus`.
    pub(super) fn cpus(&self) -> Value {
        let cpus = self.online().into_iter().map(|cpu| {
            json!({
                "CPU": cpu.index,
                "arch": "x86",
                "current": true,
                "halted": false,
                "props": props(cpu.socket_id, cpu.die_id, cpu.core_id, cpu.thread_id),
                "qom_path": qom_path(cpu.index),
                "thread_id": cpu.host_tid,
            })
        });
        cpus.collect()
    }

    /// `query-hotpluggable-cpus`.
    pub(super) fn hotpluggable_cpus(&self) -> Value {
        let online = self.online();
        let cpus = (0..self.smp.max_cpus).map(|index| {
            let (socket, die, core, thread) = place(&self.smp, index);
            let mut cpu = json!({
                "props": props(socket, die, core, thread),
                "type": "host-x86-cpu",
                "vcpus-count": 1,
            });
            if let Some(known) = online.iter().find(|c| c.index == index) {
                cpu["props"] = props(known.socket_id, known.die_id, known.core_id, known.thread_id);
                cpu["qom-path"] = qom_path(index).into();
            }
            cpu
        });
        cpus.collect()
    }
}

/// The die is written with a dash by some clients and with an underscore by others.
fn props(socket: u8, die: u8, core: u8, thread: u8) -> Value {
    json!({ "socket-id": socket, "die-id": die, "die_id": die, "core-id": core, "thread-id": thread })
}

fn qom_path(index: u8) -> String {
    format!("/machine/unattached/device[{index}]")
}

/// Socket, die, core and thread of vCPU `index`: threads count fastest. Cores are numbered through the clusters of a die, since
/// x86 has no clusters.
fn place(smp: &Smp, index: u8) -> (u8, u8, u8, u8) {
    let (threads, cores) = (smp.threads.max(1), smp.cores.max(1).saturating_mul(smp.clusters.max(1)));
    let core = index / threads;
    let die = core / cores;
    (die / smp.dies.max(1), die % smp.dies.max(1), core % cores, index % threads)
}
