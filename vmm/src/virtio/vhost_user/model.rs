//! What the devices differ in: type, queues, features, configuration. Pure.
//!
//! A NIC with several pairs of queues has a control queue behind them, on which the driver says how many are in use. It stays here: the back
//! end hears of it ring by ring.

use crate::vhost::user::CONFIG_MAX;
use crate::virtio::net::LINK_UP;
use crate::virtio::net::feature::{CTRL_VQ, MAC, MQ, STATUS};

/// Most bytes of a file system's tag.
pub const TAG_MAX: usize = 36;

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Model {
    /// virtio-fs: a directory of the host.
    Fs {
        /// The name that the guest mounts it by; at most [`TAG_MAX`] bytes.
        tag: String,
    },
    /// A disk.
    Blk {
        /// Queues, 1 to 32.
        queues: u16,
    },
    /// A NIC.
    Net {
        /// Its address.
        mac: [u8; 6],
        /// Pairs of queues, 1 to 16.
        pairs: u16,
    },
}

/// VIRTIO_BLK_F_*.
mod blk {
    /// SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, DISCARD, WRITE_ZEROES: all that the back end does by itself. Not
    /// CONFIG_WCE, with which the driver would write to the configuration.
    pub(super) const PASSED: u64 =
        1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14;
    pub(super) const MQ: u64 = 1 << 12;
    /// `struct virtio_blk_config`.
    pub(super) const CONFIG_BYTES: usize = 60;
    /// Of `num_queues` in it.
    pub(super) const NUM_QUEUES: usize = 34;
}

/// VIRTIO_NET_F_*.
mod net {
    /// CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_UFO, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO, MRG_RXBUF. Not what the
    /// driver would ask for on the control queue: there it can only say how many pairs are in use.
    pub(super) const PASSED: u64 = 1 | 1 << 1 | 0xff << 7 | 1 << 15;
}

impl Model {
    /// Device type (virtio 1.2 §5).
    pub(super) fn device_type(&self) -> u32 {
        match self {
            Self::Fs { .. } => 26,
            Self::Blk { .. } => 2,
            Self::Net { .. } => 1,
        }
    }

    pub(super) fn queues(&self) -> u16 {
        match self {
            // High priority, and requests.
            Self::Fs { .. } => 2,
            Self::Blk { queues } => *queues,
            // Receive, and transmit; several pairs of them, and control.
            Self::Net { pairs: ..=1, .. } => 2,
            Self::Net { pairs, .. } => 2 * pairs + 1,
        }
    }

    /// Those, from the first on, that the back end serves for a driver with these features.
    pub(super) fn served_queues(&self, features: u64) -> u16 {
        match self {
            Self::Net { pairs, .. } if features & MQ != 0 => 2 * pairs,
            Self::Net { .. } => 2,
            other => other.queues(),
        }
    }

    /// The control queue (virtio 1.2 §5.1.2): behind all pairs, or behind the first if the driver does not know of several.
    pub(super) fn control_queue(&self, features: u64) -> Option<u16> {
        (self.has_pairs() && features & CTRL_VQ != 0).then(|| self.served_queues(features))
    }

    /// Queues that come in pairs, of which the driver uses both or none.
    pub(super) fn has_pairs(&self) -> bool {
        matches!(self, Self::Net { .. })
    }

    /// Those, from the first on, without which nothing works. A disk's driver leaves out what it has no processor for.
    pub(super) fn needed_queues(&self) -> u16 {
        match self {
            Self::Blk { .. } => 1,
            Self::Fs { .. } | Self::Net { .. } => 2,
        }
    }

    /// Features of the device that the back end must have.
    pub(super) fn needed_features(&self) -> u64 {
        match self {
            Self::Net { pairs: 2.., .. } => MQ,
            _ => 0,
        }
    }

    /// Features of the device that the back end may have.
    pub(super) fn features(&self) -> u64 {
        match self {
            Self::Fs { .. } => 0,
            Self::Blk { .. } => blk::PASSED,
            Self::Net { .. } => net::PASSED | self.needed_features(),
        }
    }

    /// Features that are done here.
    pub(super) fn own_features(&self) -> u64 {
        match self {
            Self::Fs { .. } => 0,
            Self::Blk { queues } if *queues > 1 => blk::MQ,
            Self::Blk { .. } => 0,
            Self::Net { pairs: ..=1, .. } => MAC | STATUS,
            Self::Net { .. } => MAC | STATUS | CTRL_VQ,
        }
    }

    /// Bytes of configuration to ask the back end for.
    pub(super) fn config_bytes(&self) -> usize {
        match self {
            Self::Blk { .. } => blk::CONFIG_BYTES.min(CONFIG_MAX),
            Self::Fs { .. } | Self::Net { .. } => 0,
        }
    }

    /// The configuration space: what the back end says, and what is decided here.
    pub(super) fn config(&self, mut told: Vec<u8>) -> Vec<u8> {
        match self {
            // §5.11.4: tag, num_request_queues.
            Self::Fs { tag } => {
                told = tag.bytes().take(TAG_MAX).collect();
                told.resize(TAG_MAX, 0);
                told.extend(1u32.to_le_bytes());
            }
            Self::Blk { queues } => {
                let place = blk::NUM_QUEUES..blk::NUM_QUEUES + 2;
                if let Some(to) = told.get_mut(place) {
                    to.copy_from_slice(&queues.to_le_bytes());
                }
            }
            // §5.1.4: mac, status, max_virtqueue_pairs.
            Self::Net { mac, pairs } => {
                told = mac.to_vec();
                told.extend(LINK_UP.to_le_bytes());
                told.extend(pairs.to_le_bytes());
            }
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_are_those_of_the_specification() {
        let fs = Model::Fs { tag: "share".into() }.config(vec![9; 60]);
        assert_eq!((fs.len(), &fs[..6], &fs[36..]), (40, &b"share\0"[..], &[1, 0, 0, 0][..]));
        let long = Model::Fs { tag: "x".repeat(40) }.config(Vec::new());
        assert_eq!((long.len(), long[35]), (40, b'x'));
        let blk = Model::Blk { queues: 4 }.config(vec![9; 60]);
        assert_eq!((blk.len(), &blk[33..37]), (60, &[9, 4, 0, 9][..]));
        assert!(Model::Blk { queues: 4 }.config(Vec::new()).is_empty());
        let net = Model::Net { mac: [1, 2, 3, 4, 5, 6], pairs: 3 }.config(Vec::new());
        assert_eq!(net, [1, 2, 3, 4, 5, 6, 1, 0, 3, 0]);
    }

    #[test]
    fn the_control_queue_is_behind_what_the_driver_knows_of() {
        let [one, four] = [1, 4].map(|pairs| Model::Net { mac: [2; 6], pairs });
        assert_eq!((one.queues(), one.own_features() & CTRL_VQ, one.needed_features()), (2, 0, 0));
        assert_eq!((four.queues(), four.own_features() & CTRL_VQ, four.needed_features()), (9, CTRL_VQ, MQ));
        for (features, served, control) in
            [(0, 2, None), (CTRL_VQ, 2, Some(2)), (CTRL_VQ | MQ, 8, Some(8)), (MQ, 8, None)]
        {
            assert_eq!((four.served_queues(features), four.control_queue(features)), (served, control));
        }
        assert_eq!(Model::Blk { queues: 4 }.served_queues(CTRL_VQ | MQ), 4);
    }
}
