//! The requests of a driver and the answers (virtio 1.2 §5.15.6), as bytes. Pure.

/// `struct virtio_mem_req`.
pub(super) const REQUEST_BYTES: usize = 24;
/// `struct virtio_mem_resp`.
pub(super) const ANSWER_BYTES: usize = 10;

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// To use these blocks.
    Plug(Stretch),
    /// To give these back.
    Unplug(Stretch),
    /// To give back all that it has.
    UnplugAll,
    /// To know what these are.
    State(Stretch),
}

/// Blocks that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    /// Guest physical address of the first.
    pub(super) addr: u64,
    /// How many.
    pub(super) blocks: u16,
}

/// What the blocks of a stretch are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// All plugged.
    Plugged,
    /// None plugged.
    Unplugged,
    /// Some.
    Mixed,
}

/// What the device says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Ack,
    /// To a question.
    State(State),
    /// More than the host wants the guest to have.
    Nack,
    /// Not now.
    Busy,
    /// It makes no sense.
    Error,
}

impl Request {
    /// Reads a request. What comes behind the part that its type has is of no interest.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| bytes.get(at..)?.first_chunk().map(|word| u16::from_le_bytes(*word));
        let stretch = || {
            let addr = bytes.get(8..)?.first_chunk().map(|addr| u64::from_le_bytes(*addr))?;
            Some(Stretch { addr, blocks: word(16)? })
        };
        match word(0)? {
            0 => stretch().map(Self::Plug),
            1 => stretch().map(Self::Unplug),
            2 => Some(Self::UnplugAll),
            3 => stretch().map(Self::State),
            _ => None,
        }
    }
}

impl Answer {
    /// As the driver reads it.
    pub(super) fn bytes(self) -> [u8; ANSWER_BYTES] {
        let (kind, state) = match self {
            Self::Ack | Self::State(State::Plugged) => (0, 0),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        // Two 16-bit numbers; between them, three of padding.
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_are_read() {
        let bytes = |kind: u16, addr: u64, blocks: u16| {
            let mut bytes = [0xee; REQUEST_BYTES];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&addr.to_le_bytes());
            bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
            bytes
        };
        let stretch = Stretch { addr: 0x1_2340_0000, blocks: 7 };
        for (kind, want) in [
            (0, Some(Request::Plug(stretch))),
            (1, Some(Request::Unplug(stretch))),
            (2, Some(Request::UnplugAll)),
            (3, Some(Request::State(stretch))),
            (4, None),
            (u16::MAX, None),
        ] {
            assert_eq!(Request::parse(&bytes(kind, stretch.addr, stretch.blocks)), want, "{kind}");
        }
        // Cut off: one that has no stretch needs its type only.
        let all = bytes(2, 0, 0);
        assert_eq!(Request::parse(&all[..2]), Some(Request::UnplugAll));
        assert_eq!((Request::parse(&all[..1]), Request::parse(&[])), (None, None));
        assert_eq!(Request::parse(&bytes(0, 0, 1)[..17]), None);
    }

    #[test]
    fn answers_have_a_type_and_a_state() {
        let short = |answer: Answer| (answer.bytes()[0], answer.bytes()[8]);
        assert_eq!(
            [Answer::Ack, Answer::Nack, Answer::Busy, Answer::Error].map(short),
            [(0, 0), (1, 0), (2, 0), (3, 0)]
        );
        assert_eq!(
            [State::Plugged, State::Unplugged, State::Mixed].map(|state| short(Answer::State(state))),
            [(0, 0), (0, 1), (0, 2)]
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Some(Request::Plug(stretch) | Request::Unplug(stretch) | Request::State(stretch)) = Request::parse(&bytes) {
                prop_assert_eq!(&bytes[8..16], &stretch.addr.to_le_bytes()[..]);
                prop_assert_eq!(&bytes[16..18], &stretch.blocks.to_le_bytes()[..]);
            }
        }
    }
}
