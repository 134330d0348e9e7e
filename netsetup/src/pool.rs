//! Which addresses a network has to give to its machines, and which of them is given next. Pure: no system call.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// Addresses from one to another, without those that somebody else has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    first: u32,
    last: u32,
    kept: BTreeSet<u32>,
}

/// Why a subnet has no such pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Too small for a host beside its router.
    #[error("{0} has no room for machines: use a prefix of 30 bits or less")]
    Narrow(Ipv4Net),
    /// The range is not of this subnet.
    #[error("{0} to {1} is not within the hosts of {2}")]
    Outside(Ipv4Addr, Ipv4Addr, Ipv4Net),
    /// The range ends before it begins, or holds nothing but what is kept.
    #[error("no address is left from {0} to {1}")]
    Empty(Ipv4Addr, Ipv4Addr),
}

impl Pool {
    /// The hosts of `subnet` from one to another (default: all of them) but those in `kept`.
    ///
    /// # Errors
    /// When nothing is left, or the range is not within the subnet.
    pub fn new(
        subnet: Ipv4Net,
        range: Option<(Ipv4Addr, Ipv4Addr)>,
        kept: impl IntoIterator<Item = Ipv4Addr>,
    ) -> Result<Pool, PoolError> {
        if subnet.prefix_len() > 30 {
            return Err(PoolError::Narrow(subnet.trunc()));
        }
        // Without the network's own address and the one for broadcasts.
        let (low, high) = (u32::from(subnet.network()) + 1, u32::from(subnet.broadcast()) - 1);
        let (first, last) = match range {
            Some((first, last)) => (u32::from(first), u32::from(last)),
            None => (low, high),
        };
        if first < low || last > high {
            return Err(PoolError::Outside(first.into(), last.into(), subnet.trunc()));
        }
        let kept = kept.into_iter().map(u32::from).filter(|address| (first..=last).contains(address));
        let pool = Pool { first, last, kept: kept.collect() };
        if first > last || pool.size() == 0 {
            return Err(PoolError::Empty(first.into(), last.into()));
        }
        Ok(pool)
    }

    /// How many addresses there are to give.
    #[must_use]
    pub fn size(&self) -> u64 {
        (u64::from(self.last) + 1).saturating_sub(u64::from(self.first)) - self.kept.len() as u64
    }

    /// Whether this is one of them.
    #[must_use]
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let address = u32::from(address);
        (self.first..=self.last).contains(&address) && !self.kept.contains(&address)
    }

    /// The lowest that is not taken; `None` when all are.
    #[must_use]
    pub fn free(&self, taken: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
        let free = |address: &u32| !self.kept.contains(address) && !taken.contains(&Ipv4Addr::from(*address));
        (self.first..=self.last).find(free).map(Ipv4Addr::from)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    #[test]
    fn pools() {
        let whole = Pool::new(net("10.5.0.1/24"), None, [ip("10.5.0.1")]).unwrap();
        assert_eq!((whole.size(), whole.free(&BTreeSet::new())), (253, Some(ip("10.5.0.2"))));
        for (address, given) in
            [("10.5.0.0", false), ("10.5.0.1", false), ("10.5.0.254", true), ("10.5.0.255", false)]
        {
            assert_eq!(whole.contains(ip(address)), given, "{address}");
        }
        let part = Pool::new(net("10.5.0.1/24"), Some((ip("10.5.0.9"), ip("10.5.0.11"))), [ip("10.5.0.10")])
            .unwrap();
        let mut taken = BTreeSet::from([ip("10.5.0.9")]);
        assert_eq!((part.size(), part.free(&taken)), (2, Some(ip("10.5.0.11"))));
        taken.insert(ip("10.5.0.11"));
        assert_eq!(part.free(&taken), None);
        assert_eq!(Pool::new(net("10.5.0.1/30"), None, [ip("10.5.0.1")]).unwrap().size(), 1);
        assert_eq!(Pool::new(net("0.0.0.0/0"), None, []).unwrap().size(), (1 << 32) - 2);
    }

    #[test]
    fn no_pools() {
        let range = |first, last| Some((ip(first), ip(last)));
        for (subnet, range, word) in [
            ("10.5.0.1/31", None, "no room"),
            ("10.5.0.1/32", None, "no room"),
            ("10.5.0.1/24", range("10.5.0.0", "10.5.0.9"), "not within"),
            ("10.5.0.1/24", range("10.5.0.9", "10.5.0.255"), "not within"),
            ("10.5.0.1/24", range("10.6.0.1", "10.6.0.9"), "not within"),
            ("10.5.0.1/24", range("10.5.0.9", "10.5.0.8"), "no address is left"),
            ("10.5.0.1/24", range("10.5.0.1", "10.5.0.1"), "no address is left"),
        ] {
            let error = Pool::new(net(subnet), range, [ip("10.5.0.1")]).unwrap_err().to_string();
            assert!(error.contains(word), "{subnet} {range:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_free_is_of_the_pool_and_not_taken(
            bits in 20u8..=32, own in any::<u32>(), range in any::<Option<(u32, u32)>>(),
            kept in proptest::collection::vec(any::<u32>(), 0..4), count in 0usize..40,
        ) {
            let subnet = Ipv4Net::new(own.into(), bits).unwrap();
            // Near the subnet, or nearly every case would be outside.
            let near = |n: u32| Ipv4Addr::from(u32::from(subnet.network()).wrapping_add(n % 5000).wrapping_sub(8));
            let range = range.map(|(first, last)| (near(first), near(last)));
            let kept: Vec<Ipv4Addr> = kept.into_iter().map(near).collect();
            let Ok(pool) = Pool::new(subnet, range, kept.clone()) else { return Ok(()) };
            let mut taken = BTreeSet::new();
            for _ in 0..count {
                let Some(address) = pool.free(&taken) else {
                    prop_assert_eq!(taken.len() as u64, pool.size());
                    break;
                };
                prop_assert!(pool.contains(address) && subnet.contains(&address) && !kept.contains(&address));
                prop_assert!(address != subnet.network() && address != subnet.broadcast());
                prop_assert!(taken.insert(address));
            }
        }
    }
}
