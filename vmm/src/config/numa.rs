//! `-numa`: which vCPUs and which part of guest RAM belong together, and how far the parts are from each other. Owns the types and their rules.

use super::invalid::{InvalidConfig, bad};
use super::{MachineKind, MemoryBackendKind, VmConfig};

/// Most nodes.
const NODES_MAX: usize = 8;
/// Distance within a node, and between two that nothing is said of (ACPI 6.4 §5.2.17).
pub const LOCAL_DISTANCE: u8 = 10;
/// See [`LOCAL_DISTANCE`].
pub const REMOTE_DISTANCE: u8 = 20;

/// `-numa`; without nodes the machine is one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Numa {
    /// In order of their ids, which count from 0.
    pub nodes: Vec<NumaNode>,
    /// Source, destination, distance (10 to 254).
    pub distances: Vec<(u8, u8, u8)>,
}

/// `-numa node`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumaNode {
    /// `nodeid=`.
    pub id: u8,
    /// `cpus=`: vCPUs by number.
    pub cpus: Vec<u8>,
    /// `memdev=`: the memory object whose size is the node's. Guest RAM is made of the nodes', in their order.
    pub memdev: String,
}

impl Numa {
    /// The distance from one node to another. What is said of one direction counts for the other, too, if nothing is said of that.
    pub fn distance(&self, from: u8, to: u8) -> u8 {
        let said = |from, to| self.distances.iter().find(|(a, b, _)| (*a, *b) == (from, to)).map(|d| d.2);
        let default = if from == to { LOCAL_DISTANCE } else { REMOTE_DISTANCE };
        said(from, to).or_else(|| said(to, from)).unwrap_or(default)
    }
}

pub(super) fn validate(config: &VmConfig) -> Result<(), InvalidConfig> {
    let numa = &config.numa;
    if numa.nodes.is_empty() {
        return match numa.distances.first() {
            Some(_) => bad("-numa dist: there are no nodes: add -numa node,nodeid=0,cpus=…,memdev=…"),
            None => Ok(()),
        };
    }
    if config.machine.kind != MachineKind::Q35 {
        return bad("-numa: a microvm is one node: use -machine q35, or leave -numa out");
    }
    if numa.nodes.len() > NODES_MAX {
        return bad(format!("-numa: {} nodes are too many: at most {NODES_MAX}", numa.nodes.len()));
    }
    if numa.nodes.iter().zip(0u8..).any(|(node, id)| node.id != id) {
        return bad("-numa: the ids of the nodes must differ, and count from 0 without a gap");
    }
    let mut homes = [0u8; 256];
    for cpu in numa.nodes.iter().flat_map(|node| &node.cpus) {
        if let Some(home) = homes.get_mut(usize::from(*cpu)) {
            *home = home.saturating_add(1);
        }
    }
    let most = config.smp.max_cpus;
    let wrong = (0..=u8::MAX).zip(homes).find(|(cpu, nodes)| u8::from(*cpu < most) != *nodes);
    if let Some((cpu, nodes)) = wrong {
        return bad(format!(
            "-numa: vCPU {cpu} is in {nodes} nodes: each of the {most} vCPUs must be in exactly one"
        ));
    }
    memory(config)?;
    for (from, to, distance) in &numa.distances {
        let count = numa.nodes.len();
        if usize::from(*from) >= count || usize::from(*to) >= count {
            return bad(format!("-numa dist: there is no node {}", from.max(to)));
        }
        if from == to && *distance != LOCAL_DISTANCE {
            return bad(format!("-numa dist: a node is at distance {LOCAL_DISTANCE} from itself"));
        }
    }
    Ok(())
}

/// Guest RAM is one mapping, so the objects must be alike but for their sizes.
fn memory(config: &VmConfig) -> Result<(), InvalidConfig> {
    let objects = &config.memory.backends;
    let mut used = Vec::new();
    let mut total = 0u64;
    for node in &config.numa.nodes {
        let Some(object) = objects.iter().find(|b| b.id == node.memdev) else {
            return bad(format!(
                "-numa node {}: memdev \"{}\" not found: add -object memory-backend-ram,id={},size=…",
                node.id, node.memdev, node.memdev
            ));
        };
        if used.contains(&&object.id) {
            return bad(format!("-numa: memdev \"{}\" is used twice: give each node its own", object.id));
        }
        used.push(&object.id);
        total = total.saturating_add(object.size);
    }
    if let Some(idle) = objects.iter().find(|b| !used.contains(&&b.id)) {
        return bad(format!("memory object \"{}\" belongs to no -numa node: leave it out", idle.id));
    }
    if total != config.memory.size {
        return bad(format!(
            "-numa: the nodes have {total} bytes together, and guest memory (-m) {}: make them equal",
            config.memory.size
        ));
    }
    let [first, rest @ ..] = objects.as_slice() else { return Ok(()) };
    if config.memory.path.is_some() {
        return bad("-numa and -mem-path exclude each other: leave out -mem-path");
    }
    let same = |b: &&super::MemoryBackend| {
        (&b.kind, b.share, b.prealloc, b.dump_guest_core, b.placement)
            == (&first.kind, first.share, first.prealloc, first.dump_guest_core, first.placement)
    };
    let is_file = matches!(first.kind, MemoryBackendKind::File(_));
    if !rest.is_empty() && (is_file || !rest.iter().all(|b| same(&b))) {
        return bad(
            "-numa: the memory objects of the nodes must be memory-backend-ram or all memory-backend-memfd, and alike but for their sizes",
        );
    }
    Ok(())
}
