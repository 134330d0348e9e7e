//! What the devices differ in: type, queues, features, configuration. Pure.

use crate::vhost::user::CONFIG_MAX;

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
    /// A NIC with one pair of queues.
    Net {
        /// Its address.
        mac: [u8; 6],
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
    /// control queue is for: there is none.
    pub(super) const PASSED: u64 = 1 | 1 << 1 | 0xff << 7 | 1 << 15;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const LINK_UP: u16 = 1;
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
            // High priority, and requests; receive, and transmit.
            Self::Fs { .. } | Self::Net { .. } => 2,
            Self::Blk { queues } => *queues,
        }
    }

    /// Those, from the first on, without which nothing works. A disk's driver leaves out what it has no processor for.
    pub(super) fn needed_queues(&self) -> u16 {
        match self {
            Self::Blk { .. } => 1,
            other => other.queues(),
        }
    }

    /// Features of the device that the back end may have.
    pub(super) fn features(&self) -> u64 {
        match self {
            Self::Fs { .. } => 0,
            Self::Blk { .. } => blk::PASSED,
            Self::Net { .. } => net::PASSED,
        }
    }

    /// Features that are done here.
    pub(super) fn own_features(&self) -> u64 {
        match self {
            Self::Fs { .. } => 0,
            Self::Blk { queues } if *queues > 1 => blk::MQ,
            Self::Blk { .. } => 0,
            Self::Net { .. } => net::MAC | net::STATUS,
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
            // §5.1.4: mac, status.
            Self::Net { mac } => {
                told = mac.to_vec();
                told.extend(net::LINK_UP.to_le_bytes());
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
        let net = Model::Net { mac: [1, 2, 3, 4, 5, 6] }.config(Vec::new());
        assert_eq!(net, [1, 2, 3, 4, 5, 6, 1, 0]);
    }
}
