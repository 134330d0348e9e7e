//! Messages straight to the journal, for a VM whose unit has another name than it: the unit's own field would say that one. Used by the log only.
//!
//! The native protocol of systemd-journald: one datagram is one message, a line for each field (systemd's JOURNAL_NATIVE_PROTOCOL).

use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;

use tracing::Level;

/// Says under which name the messages go to the journal.
const VARIABLE: &str = "FLOTILLA_JOURNAL";
/// Where journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";

/// The journal, and under which name one speaks there.
#[derive(Debug)]
pub(super) struct Journal {
    socket: UnixDatagram,
    name: String,
}

impl Journal {
    /// What the environment asks for, if it does. A journal that is not there is no reason to be silent: the unit's own stream is. Opened once:
    /// the sandbox lets nobody open it later.
    pub(super) fn asked() -> Option<&'static Self> {
        static JOURNAL: OnceLock<Option<Journal>> = OnceLock::new();
        let open = || Self::at(SOCKET, std::env::var(VARIABLE).ok()?).ok();
        JOURNAL.get_or_init(open).as_ref()
    }

    fn at(path: &str, name: String) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, name })
    }

    /// Sends one message, which must be one line. A full journal loses it.
    pub(super) fn send(&self, level: Level, line: &str) -> io::Result<()> {
        // The numbers of syslog(3).
        let priority = match level {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        let name = &self.name;
        let message = format!(
            "PRIORITY={priority}\nSYSLOG_IDENTIFIER=flotilla-vm\nFLOTILLA_VM={name}\nMESSAGE={line}\n"
        );
        // Not send(): every kind of thread may write.
        rustix::io::write(&self.socket, message.as_bytes())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_whose_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::at(path.to_str().unwrap(), "web".to_owned()).unwrap();
        journal.send(Level::WARN, "it hurts").unwrap();
        let mut datagram = [0; 200];
        let length = journald.recv(&mut datagram).unwrap();
        let expected = "PRIORITY=4\nSYSLOG_IDENTIFIER=flotilla-vm\nFLOTILLA_VM=web\nMESSAGE=it hurts\n";
        assert_eq!(std::str::from_utf8(&datagram[..length]), Ok(expected));
        drop(journald);
        assert!(journal.send(Level::INFO, "nobody hears").is_err());
    }
}
