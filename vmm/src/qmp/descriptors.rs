//! Descriptors that a client has sent: owns them from the message they came with until a command takes them or the client goes.
//!
//! ```text
//! message ──▶ received (in order) ──getfd NAME──▶ named ──netdev_add…──▶ the back end
//!                     └──────────────── the client goes: closed ◀┘
//! ```

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Descriptors that wait for their `getfd`. What comes beyond is closed at once.
const RECEIVED_MAX: usize = 64;
/// Names.
const NAMED_MAX: usize = 64;

#[derive(Debug, Default)]
struct Held {
    received: VecDeque<OwnedFd>,
    named: HashMap<String, OwnedFd>,
}

/// The descriptors of one client.
#[derive(Debug, Default)]
pub(super) struct Descriptors(Mutex<Held>);

/// Why a descriptor got no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoName {
    /// No descriptor came with the command.
    NothingReceived,
    /// Too many have names.
    TooMany,
}

impl Descriptors {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// They came with a message.
    pub(super) fn receive(&self, fds: Vec<OwnedFd>) {
        let mut held = self.held();
        let room = RECEIVED_MAX - held.received.len().min(RECEIVED_MAX);
        if fds.len() > room {
            tracing::warn!("a client sends descriptors without naming them: {} are closed", fds.len() - room);
        }
        held.received.extend(fds.into_iter().take(room));
    }

    /// Gives the oldest one without a name this name. One that had the name before is closed.
    pub(super) fn name(&self, name: String) -> Result<(), NoName> {
        let mut held = self.held();
        if held.named.len() >= NAMED_MAX && !held.named.contains_key(&name) {
            return Err(NoName::TooMany);
        }
        let fd = held.received.pop_front().ok_or(NoName::NothingReceived)?;
        held.named.insert(name, fd);
        Ok(())
    }

    /// Takes one by its name.
    pub(super) fn take(&self, name: &str) -> Option<OwnedFd> {
        self.held().named.remove(name)
    }

    /// Closes all of them.
    pub(super) fn clear(&self) {
        *self.held() = Held::default();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A descriptor and the end that notices when it is closed.
    fn pair() -> (OwnedFd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours.into(), theirs)
    }

    fn closed(mut peer: &UnixStream) -> bool {
        peer.read(&mut [0]).is_ok_and(|n| n == 0)
    }

    #[test]
    fn names_go_to_descriptors_in_the_order_they_came() {
        let descriptors = Descriptors::default();
        let (a, a_peer) = pair();
        let (b, b_peer) = pair();
        descriptors.receive(vec![a, b]);
        descriptors.name("x".into()).unwrap();
        assert!(descriptors.take("y").is_none());
        descriptors.name("x".into()).unwrap();
        assert!(closed(&a_peer) && !closed(&b_peer), "the first x was replaced");
        assert_eq!(descriptors.name("z".into()), Err(NoName::NothingReceived));
        let taken = descriptors.take("x").unwrap();
        descriptors.clear();
        assert!(!closed(&b_peer), "what was taken is somebody else's");
        drop(taken);
        assert!(closed(&b_peer));
    }

    #[test]
    fn what_is_too_much_or_left_over_is_closed() {
        let descriptors = Descriptors::default();
        let (fds, peers): (Vec<_>, Vec<_>) = (0..RECEIVED_MAX + 3).map(|_| pair()).unzip();
        descriptors.receive(fds);
        assert_eq!(peers.iter().filter(|p| closed(p)).count(), 3);
        for i in 0..NAMED_MAX {
            descriptors.name(i.to_string()).unwrap();
        }
        let (more, _peer) = pair();
        descriptors.receive(vec![more]);
        assert_eq!(descriptors.name("more".into()), Err(NoName::TooMany));
        descriptors.name("0".into()).unwrap();
        descriptors.clear();
        assert!(peers.iter().all(closed));
    }
}
