//! vhost-user messages: owns their numbers and layout (vhost-user specification, "Message Specification"). Pure: bytes in, bytes out.
//!
//! A message is a header of three 32-bit numbers (request, flags, length of what follows) and its payload, all in the byte order of the
//! host. A reply repeats the number of its request.

use crate::vhost::ioctl::Region;

/// Bytes of a header.
pub(super) const HEADER: usize = 12;
/// Most bytes of a device's configuration (VHOST_USER_MAX_CONFIG_SIZE).
pub const CONFIG_MAX: usize = 256;
/// Regions of memory that every back end takes (VHOST_MEMORY_BASELINE_NREGIONS).
pub(super) const REGIONS_MAX: usize = 8;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// In the number of a ring: no descriptor comes with the message.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// VHOST_USER_F_PROTOCOL_FEATURES: the bit, among those of virtio, that says that there are protocol features.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// VHOST_USER_PROTOCOL_F_*.
pub(super) mod protocol {
    /// Several queues, and a way to ask how many.
    pub(in super::super) const MQ: u64 = 1 << 0;
    /// A request can ask for an answer.
    pub(in super::super) const REPLY_ACK: u64 = 1 << 3;
    /// The back end knows the device's configuration.
    pub(in super::super) const CONFIG: u64 = 1 << 9;
}

/// VHOST_USER_*: what the front end can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
}

/// What a back end must not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Another version of the protocol, or no reply at all.
    #[error("what came is no reply (flags {0:#x})")]
    NoReply(u32),
    /// The reply to something else.
    #[error("the reply is to request {got}, not {wanted}")]
    OtherRequest {
        /// Number in the reply.
        got: u32,
        /// Number of the request.
        wanted: u32,
    },
    /// Too long or too short.
    #[error("the reply to request {request} has {got} bytes, not {wanted}")]
    Length {
        /// Number of the request.
        request: u32,
        /// Bytes in the reply.
        got: u32,
        /// Bytes that it must have.
        wanted: usize,
    },
    /// About another ring, or another part of the configuration.
    #[error("the reply to request {0} is about something else")]
    OtherThing(u32),
    /// A position that no ring has.
    #[error("the reply to request {0} is out of range")]
    Range(u32),
}

/// One message as it is sent.
pub(super) fn encode(request: Request, need_reply: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    for word in [request as u32, flags, u32::try_from(payload.len()).unwrap_or(u32::MAX)] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// Checks that a header is that of a reply to `request` with `wanted` bytes to follow.
pub(super) fn check_reply(header: [u8; HEADER], request: Request, wanted: usize) -> Result<(), Violation> {
    let (got, flags, length) = (word(&header, 0), word(&header, 4), word(&header, 8));
    let number = request as u32;
    if flags & VERSION_MASK != VERSION || flags & REPLY == 0 {
        return Err(Violation::NoReply(flags));
    }
    if got != number {
        return Err(Violation::OtherRequest { got, wanted: number });
    }
    if usize::try_from(length) != Ok(wanted) {
        return Err(Violation::Length { request: number, got: length, wanted });
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let part = bytes.get(at..at.saturating_add(4)).and_then(|b| b.try_into().ok());
    u32::from_ne_bytes(part.unwrap_or_default())
}

/// One 64-bit number.
pub(super) fn number(payload: [u8; 8]) -> u64 {
    u64::from_ne_bytes(payload)
}

/// `struct vhost_vring_state`: a ring and a number.
pub(super) fn ring_number(ring: u32, value: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&ring.to_ne_bytes());
    bytes[4..].copy_from_slice(&value.to_ne_bytes());
    bytes
}

/// The position that the reply to GET_VRING_BASE tells, which must be of `ring`.
pub(super) fn base(payload: [u8; 8], ring: u32) -> Result<u16, Violation> {
    let request = Request::GetVringBase as u32;
    if word(&payload, 0) != ring {
        return Err(Violation::OtherThing(request));
    }
    u16::try_from(word(&payload, 4)).map_err(|_| Violation::Range(request))
}

/// `struct vhost_vring_addr`.
pub(super) fn ring_address(ring: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut bytes = ring_number(ring, 0).to_vec();
    for number in [desc, used, avail, 0] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes
}

/// The number of a ring whose descriptor comes with the message. There are fewer than 256.
pub(super) fn ring_descriptor(ring: u32) -> [u8; 8] {
    (u64::from(ring) & (NO_DESCRIPTOR - 1)).to_ne_bytes()
}

/// SET_MEM_TABLE: regions of memory, and how far into the descriptor that comes for it each begins.
pub(super) fn memory_table(regions: &[(Region, u64)]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    let mut bytes = ring_number(count, 0).to_vec();
    for (region, offset) in regions {
        for number in [region.guest, region.size, region.host, *offset] {
            bytes.extend(number.to_ne_bytes());
        }
    }
    bytes
}

/// GET_CONFIG for the first `length` bytes: as it is sent, and as long as the reply is.
pub(super) fn config_request(length: usize) -> Vec<u8> {
    let length = length.min(CONFIG_MAX);
    let mut bytes = ring_number(0, u32::try_from(length).unwrap_or(0)).to_vec();
    bytes.extend([0; 4]);
    bytes.resize(CONFIG_HEADER + length, 0);
    bytes
}

/// Bytes before the configuration itself: offset, size, flags.
pub(super) const CONFIG_HEADER: usize = 12;

/// The configuration in a reply to [`config_request`].
pub(super) fn config(payload: &[u8], length: usize) -> Result<&[u8], Violation> {
    let other = Violation::OtherThing(Request::GetConfig as u32);
    let (offset, size) = (word(payload, 0), word(payload, 4));
    let right = offset == 0 && usize::try_from(size) == Ok(length);
    payload.get(CONFIG_HEADER..).filter(|bytes| right && bytes.len() == length).ok_or(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(words: [u32; 3]) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn messages_have_the_layout_of_the_specification() {
        let bytes = encode(Request::SetVringNum, true, &ring_number(3, 256));
        assert_eq!(bytes[..HEADER], header([8, 0x9, 8]));
        assert_eq!(bytes[HEADER..], [3u32.to_ne_bytes(), 256u32.to_ne_bytes()].concat());
        assert_eq!(encode(Request::SetOwner, false, &[]), header([3, 1, 0]));
        assert_eq!(ring_address(1, 2, 3, 4).len(), 40);
        assert_eq!(ring_descriptor(5), 5u64.to_ne_bytes());
        let region = Region { guest: 1, size: 2, host: 3, flags: 0 };
        let table = memory_table(&[(region, 4), (region, 5)]);
        assert_eq!((table.len(), word(&table, 0), word(&table, 4)), (72, 2, 0));
        assert_eq!(table[8..40], [1u64, 2, 3, 4].map(u64::to_ne_bytes).concat());
        assert_eq!(config_request(60).len(), 72);
        assert_eq!(config_request(usize::MAX).len(), CONFIG_HEADER + CONFIG_MAX);
    }

    #[test]
    fn only_the_right_reply_is_taken() {
        let check = |words| check_reply(header(words), Request::GetFeatures, 8);
        assert_eq!(check([1, 5, 8]), Ok(()));
        for (words, wanted) in [
            ([1, 1, 8], Violation::NoReply(1)),
            ([1, 4, 8], Violation::NoReply(4)),
            ([1, 6, 8], Violation::NoReply(6)),
            ([2, 5, 8], Violation::OtherRequest { got: 2, wanted: 1 }),
            ([1, 5, 0], Violation::Length { request: 1, got: 0, wanted: 8 }),
            ([1, 5, u32::MAX], Violation::Length { request: 1, got: u32::MAX, wanted: 8 }),
        ] {
            assert_eq!(check(words), Err(wanted));
        }
        assert_eq!(base(ring_number(1, 0xffff), 1), Ok(0xffff));
        assert_eq!(base(ring_number(1, 0x1_0000), 1), Err(Violation::Range(11)));
        assert_eq!(base(ring_number(2, 0), 1), Err(Violation::OtherThing(11)));
        let mut reply = config_request(4);
        reply[CONFIG_HEADER..].copy_from_slice(b"abcd");
        assert_eq!(config(&reply, 4), Ok(&b"abcd"[..]));
        for (reply, length) in
            [(&reply[..15], 4), (&reply[..], 3), (&[][..], 0), (&[][..], 4), (&[0xff; 16], 4)]
        {
            assert_eq!(config(reply, length), Err(Violation::OtherThing(24)));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_reply_or_not(bytes: [u8; HEADER], payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = check_reply(bytes, Request::GetConfig, 72);
            if let Ok(found) = config(&payload, 60) {
                prop_assert_eq!(found.len(), 60);
            }
        }
    }
}
