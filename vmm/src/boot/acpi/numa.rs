//! SRAT and SLIT (ACPI 6.4 §5.2.16, §5.2.17): which processors and which memory belong together, also memory that devices hand out, and how far
//! the nodes are from each other.

use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::boot::{NumaNode, Platform};

const HEADER: u32 = 36;
const ENABLED: u32 = 1;
/// Nothing may be there yet, and what is may leave (§5.2.16.2). Linux plans for it, and gives what comes to the node.
const HOT_PLUGGABLE: u32 = 1 << 1;

fn new(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, HEADER, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

/// Processors are those of xAPIC mode, by 8 bits of APIC id.
pub(super) fn srat(platform: &Platform<'_>, nodes: &[NumaNode]) -> Sdt {
    const REVISION: u8 = 3;
    let mut body = Vec::new();
    // For compatibility, one; eight reserved bytes.
    body.extend(1u32.to_le_bytes());
    body.extend([0; 8]);
    for (node, id) in nodes.iter().zip(0u32..) {
        for cpu in &node.cpus {
            // The topology has checked that every id fits.
            let apic_id = platform.topology.apic_id(*cpu) as u8;
            let node = id.to_le_bytes();
            body.extend([0, 16, node[0], apic_id]);
            body.extend(ENABLED.to_le_bytes());
            body.extend([0, node[1], node[2], node[3]]);
            body.extend([0; 4]);
        }
        let ram = node.memory.iter().map(|range| (range, ENABLED));
        let to_come = node.device_memory.iter().map(|range| (range, ENABLED | HOT_PLUGGABLE));
        for ((base, size), flags) in ram.chain(to_come) {
            body.extend([1, 40]);
            body.extend(id.to_le_bytes());
            body.extend([0; 2]);
            body.extend(base.to_le_bytes());
            body.extend(size.to_le_bytes());
            body.extend([0; 4]);
            body.extend(flags.to_le_bytes());
            body.extend([0; 8]);
        }
    }
    let mut table = new(*b"SRAT", REVISION);
    table.append_slice(&body);
    table
}

pub(super) fn slit(nodes: &[NumaNode]) -> Sdt {
    const REVISION: u8 = 1;
    let mut body = (nodes.len() as u64).to_le_bytes().to_vec();
    body.extend(nodes.iter().flat_map(|node| &node.distances));
    let mut table = new(*b"SLIT", REVISION);
    table.append_slice(&body);
    table
}
