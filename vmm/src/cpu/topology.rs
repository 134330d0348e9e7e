//! Where each vCPU sits (socket, die, cluster, core, thread) and which APIC id that gives it.
//!
//! An APIC id is the concatenation of the five coordinates, each in as many bits as its level needs (Intel SDM vol. 3,
//! "Hierarchical mapping of CPUID extended topology leaf"), so ids have gaps where a level is not a power of two.

use super::CpuError;
use crate::config::Smp;

/// The shape that `-smp` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    dies: u32,
    clusters: u32,
    cores: u32,
    threads: u32,
}

/// Coordinates of one vCPU, each counted within the level above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Socket.
    pub socket: u32,
    /// Die in the socket.
    pub die: u32,
    /// Cluster in the die.
    pub cluster: u32,
    /// Core in the cluster.
    pub core: u32,
    /// Thread in the core.
    pub thread: u32,
}

/// Bits that number `count` things.
fn bits(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

impl Topology {
    /// Checks that every vCPU up to `max_cpus` has an APIC id. 255 is the broadcast address of xAPIC mode.
    pub fn new(smp: &Smp) -> Result<Self, CpuError> {
        let topology = Self {
            dies: u32::from(smp.dies.max(1)),
            clusters: u32::from(smp.clusters.max(1)),
            cores: u32::from(smp.cores.max(1)),
            threads: u32::from(smp.threads.max(1)),
        };
        match topology.apic_id(smp.max_cpus.max(smp.cpus).saturating_sub(1)) {
            id @ 255.. => Err(CpuError::ApicId(id)),
            _ => Ok(topology),
        }
    }

    /// Where vCPU `index` sits.
    pub fn place(&self, index: u8) -> Place {
        let i = u32::from(index);
        let (thread, i) = (i % self.threads, i / self.threads);
        let (core, i) = (i % self.cores, i / self.cores);
        let (cluster, i) = (i % self.clusters, i / self.clusters);
        Place { thread, core, cluster, die: i % self.dies, socket: i / self.dies }
    }

    /// Number of a core in its die, counted on through the clusters.
    pub fn core_in_die(&self, place: &Place) -> u32 {
        place.cluster * self.cores + place.core
    }

    /// The APIC id of vCPU `index`; also its KVM vCPU id.
    pub fn apic_id(&self, index: u8) -> u32 {
        let place = self.place(index);
        let mut id = place.socket;
        for (value, count) in [
            (place.die, self.dies),
            (place.cluster, self.clusters),
            (place.core, self.cores),
            (place.thread, self.threads),
        ] {
            id = (id << bits(count)) | value;
        }
        id
    }

    /// Threads in a core.
    pub fn threads(&self) -> u32 {
        self.threads
    }

    /// Threads in a die.
    pub fn threads_per_die(&self) -> u32 {
        self.threads * self.cores * self.clusters
    }

    /// Threads in a socket.
    pub fn threads_per_socket(&self) -> u32 {
        self.threads_per_die() * self.dies
    }

    /// Dies in a socket.
    pub fn dies(&self) -> u32 {
        self.dies
    }

    /// Bits of an APIC id below the core's number.
    pub fn core_shift(&self) -> u32 {
        bits(self.threads)
    }

    /// Bits of an APIC id below the die's number.
    pub fn die_shift(&self) -> u32 {
        self.core_shift() + bits(self.cores) + bits(self.clusters)
    }

    /// Bits of an APIC id below the socket's number.
    pub fn socket_shift(&self) -> u32 {
        self.die_shift() + bits(self.dies)
    }
}

#[cfg(test)]
pub(crate) fn smp(sockets: u8, dies: u8, clusters: u8, cores: u8, threads: u8) -> Smp {
    let cpus = sockets * dies * clusters * cores * threads;
    Smp { cpus, max_cpus: cpus, sockets, dies, clusters, cores, threads }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn apic_ids_have_gaps_where_a_level_is_no_power_of_two() {
        let t = Topology::new(&smp(2, 1, 1, 3, 2)).unwrap();
        let ids: Vec<u32> = (0..12).map(|i| t.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(t.place(7), Place { socket: 1, die: 0, cluster: 0, core: 0, thread: 1 });
    }

    #[test]
    fn a_flat_machine_numbers_its_cpus_from_0_to_253() {
        let t = Topology::new(&smp(1, 1, 1, 254, 1)).unwrap();
        assert_eq!(t.apic_id(253), 253);
        assert_eq!(t.socket_shift(), 8);
    }

    #[test]
    fn refuses_ids_beyond_the_xapic() {
        // 84 sockets of 3 cores: 2 bits for the core, 7 for the socket.
        assert!(matches!(Topology::new(&smp(84, 1, 1, 3, 1)), Err(CpuError::ApicId(334))));
    }

    proptest! {
        #[test]
        fn ids_are_distinct_and_ascend(
            sockets in 1u8..4, dies in 1u8..3, clusters in 1u8..3, cores in 1u8..6, threads in 1u8..3,
        ) {
            let smp = smp(sockets, dies, clusters, cores, threads);
            if let Ok(t) = Topology::new(&smp) {
                for i in 1..smp.cpus {
                    prop_assert!(t.apic_id(i) > t.apic_id(i - 1));
                    prop_assert_eq!(t.apic_id(i) >> t.socket_shift(), t.place(i).socket);
                }
            }
        }
    }
}
