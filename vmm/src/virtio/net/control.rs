//! Commands of the control queue (virtio 1.2 §5.1.6.5): owns the queue, the commands' form, and which of them the driver may use. `serve` does
//! them; for a NIC whose packets another process moves, `vhost_user` does.
//!
//! The device filters nothing: it delivers whatever the tap brings, so every receive mode and every address table is already
//! granted. VLAN filters are not offered, and refused.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::feature;
use crate::virtio::queue::{Chain, Position, QueueError};
use crate::virtio::{ActiveQueue, Interrupt};

/// Longest command that is read. Linux sends at most a few hundred addresses.
const LONGEST: u64 = 16 << 10;
/// Commands per wake-up.
const COMMANDS: u32 = 32;

const OK: u8 = 0;
const ERR: u8 = 1;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_MQ: u8 = 4;
const CLASS_OFFLOADS: u8 = 5;

/// What a driver may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::virtio) enum Command {
    /// Granted already.
    Granted,
    /// The NIC's address.
    Mac([u8; 6]),
    /// So many pairs of queues are in use; at least one.
    Pairs(u16),
    /// Offloads of the direction to the guest, as feature bits; a subset of those accepted.
    Offloads(u64),
}

/// The queue that they come on.
pub(in crate::virtio) struct ControlQueue {
    ring: ActiveQueue,
    chain: Chain,
    command: Vec<u8>,
}

impl ControlQueue {
    pub(in crate::virtio) fn new(ring: ActiveQueue) -> Self {
        Self { ring, chain: Chain::default(), command: Vec::new() }
    }

    /// Its number.
    pub(in crate::virtio) fn index(&self) -> u16 {
        self.ring.index
    }

    /// Signalled when there are commands.
    pub(in crate::virtio) fn notify(&self) -> Arc<EventFd> {
        Arc::clone(&self.ring.notify)
    }

    /// Its number, and where it stands between two commands.
    pub(in crate::virtio) fn place(&self) -> (u16, Position) {
        (self.ring.index, self.ring.queue.position(0))
    }

    /// Does what the driver says: `obey` is asked for each command that a driver with these `features` may use, and says whether it was done.
    /// After an error the queue must not be used again.
    pub(in crate::virtio) fn run(
        &mut self,
        features: u64,
        interrupt: &dyn Interrupt,
        obey: impl FnMut(Command) -> bool,
    ) -> Result<(), QueueError> {
        let ended = self.commands(features, obey);
        if self.ring.queue.publish() {
            interrupt.queue(self.ring.index);
        }
        if ended == Ok(true) {
            // The watches are edge-triggered: this makes an edge.
            let _ = self.ring.notify.write(1);
        }
        ended.map(|_| ())
    }

    /// True: there may be more.
    fn commands(&mut self, features: u64, mut obey: impl FnMut(Command) -> bool) -> Result<bool, QueueError> {
        let Self { ring, chain, command } = self;
        for _ in 0..COMMANDS {
            if !ring.queue.pop(chain)? {
                if ring.queue.enable_notify()? {
                    continue;
                }
                return Ok(false);
            }
            let len = chain.readable.len();
            command.clear();
            if len <= LONGEST {
                command.resize(len as usize, 0);
                chain.readable.take(command);
            }
            let done = parse(command, features).is_some_and(&mut obey);
            let written = chain.writable.fill(&[if done { OK } else { ERR }]);
            ring.queue.complete(chain.head, written as u32);
        }
        Ok(true)
    }
}

/// Reads a command; `None` is to be refused.
pub(super) fn parse(bytes: &[u8], features: u64) -> Option<Command> {
    let has = |bit| features & bit != 0;
    let [class, command, body @ ..] = bytes else { return None };
    match (*class, *command) {
        // Promiscuous and all-multicast; the rest came later, with a feature of its own.
        (CLASS_RX, 0 | 1) if has(feature::CTRL_RX) => mode(body),
        (CLASS_RX, 2..=5) if has(feature::CTRL_RX_EXTRA) => mode(body),
        (CLASS_MAC, 0) if has(feature::CTRL_RX) => {
            let rest = skip_table(skip_table(body)?)?;
            rest.is_empty().then_some(Command::Granted)
        }
        (CLASS_MAC, 1) if has(feature::CTRL_MAC_ADDR) => {
            let mac = <[u8; 6]>::try_from(body).ok()?;
            (mac[0] & 1 == 0 && mac != [0; 6]).then_some(Command::Mac(mac))
        }
        (CLASS_MQ, 0) if has(feature::MQ) => {
            let pairs = u16::from_le_bytes(body.try_into().ok()?);
            (pairs > 0).then_some(Command::Pairs(pairs))
        }
        (CLASS_OFFLOADS, 0) if has(feature::CTRL_GUEST_OFFLOADS) => {
            let wanted = u64::from_le_bytes(body.try_into().ok()?);
            let allowed = features & (feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6);
            (wanted & !allowed == 0).then_some(Command::Offloads(wanted))
        }
        _ => None,
    }
}

fn mode(body: &[u8]) -> Option<Command> {
    matches!(body, [0 | 1]).then_some(Command::Granted)
}

/// What follows one `struct virtio_net_ctrl_mac`: a count and so many addresses.
fn skip_table(bytes: &[u8]) -> Option<&[u8]> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    rest.get(len..)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_was_negotiated_and_well_formed() {
        use Command::{Granted, Mac, Offloads, Pairs};
        let all = !0;
        let cases: [(&[u8], u64, Option<Command>); 24] = [
            (&[], all, None),
            (&[0], all, None),
            (&[0, 0, 1], all, Some(Granted)),
            (&[0, 1, 0], all, Some(Granted)),
            (&[0, 0, 2], all, None),
            (&[0, 0], all, None),
            (&[0, 0, 1, 1], all, None),
            (&[0, 5, 1], all, Some(Granted)),
            (&[0, 5, 1], feature::CTRL_RX, None),
            (&[0, 6, 1], all, None),
            (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], all, Some(Granted)),
            (&[1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0], all, Some(Granted)),
            (&[1, 0, 2, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0], all, None),
            (&[1, 0, 255, 255, 255, 255, 0, 0, 0, 0], all, None),
            (&[1, 1, 2, 3, 4, 5, 6, 7], all, Some(Mac([2, 3, 4, 5, 6, 7]))),
            (&[1, 1, 3, 3, 4, 5, 6, 7], all, None),
            (&[1, 1, 0, 0, 0, 0, 0, 0], all, None),
            (&[1, 1, 2, 3, 4, 5, 6], all, None),
            (&[2, 0, 1, 0], all, None),
            (&[4, 0, 2, 0], all, Some(Pairs(2))),
            (&[4, 0, 0, 0], all, None),
            (&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0], all, Some(Offloads(0x82))),
            (&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0], feature::CTRL_GUEST_OFFLOADS, None),
            (&[5, 0, 0, 4, 0, 0, 0, 0, 0, 0], all, None),
        ];
        for (bytes, features, want) in cases {
            assert_eq!(parse(bytes, features), want, "{bytes:?}");
            assert_eq!(parse(bytes, 0), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_a_guest_writes_hurts(
            class in 0u8..8, command in 0u8..8, body in proptest::collection::vec(any::<u8>(), 0..64), features: u64,
        ) {
            let bytes = [&[class, command], &body[..]].concat();
            if let Some(Command::Offloads(bits)) = parse(&bytes, features) {
                prop_assert_eq!(bits & !features, 0);
            }
        }
    }
}
