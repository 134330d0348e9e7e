//! What driver and device have told each other about the ports (virtio 1.2 §5.3.6.2). Pure: messages in, the next message out.
//!
//! ```text
//!   unknown ──DEVICE_READY──▶ PORT_ADD told ──PORT_READY──▶ CONSOLE_PORT, PORT_NAME told ──▶ PORT_OPEN 1 / 0 as clients come and go
//! ```
//!
//! There is no queue of messages: what has to be said follows from the state, so a driver that asks without listening costs nothing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// `le32` port, `le16` event, `le16` value.
pub(super) const HEADER: usize = 8;

/// What has been said about one port, and what has to be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Told {
    console: bool,
    name: Option<String>,
    /// To say: the port is there, it is a console, it has this name.
    say_add: bool,
    say_console: bool,
    say_name: bool,
    /// The driver knows the port.
    ready: bool,
    /// The host's side is open; the driver was told so; it must hear of a close in between.
    open: bool,
    told_open: bool,
    say_closed: bool,
}

/// The state of all ports.
#[derive(Default)]
pub(super) struct Control {
    ports: BTreeMap<u8, Told>,
}

/// What a message of the driver leads to, besides answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// The guest's side of a port was opened or closed.
    Guest {
        nr: u8,
        open: bool,
    },
    /// The message makes no sense.
    Nonsense,
}

impl Control {
    pub(super) fn add(&mut self, nr: u8, console: bool, name: Option<String>, open: bool) {
        self.ports.insert(nr, Told { console, name, open, ..Told::default() });
    }

    /// How things stand with a port.
    pub(super) fn told(&self, nr: u8) -> Told {
        self.ports.get(&nr).cloned().unwrap_or_default()
    }

    /// Goes on from where things stood with a port that is there.
    pub(super) fn go_on(&mut self, nr: u8, told: &Told) {
        if let Some(port) = self.ports.get_mut(&nr) {
            let Told { console, name, .. } = std::mem::take(port);
            *port = Told { console, name, ..told.clone() };
        }
    }

    /// The host's side of a port has opened or closed.
    pub(super) fn host(&mut self, nr: u8, open: bool) {
        if let Some(port) = self.ports.get_mut(&nr) {
            port.say_closed |= !open && port.told_open;
            port.open = open;
        }
    }

    /// A message of the driver.
    pub(super) fn message(&mut self, bytes: &[u8]) -> Effect {
        let Some([a, b, c, d, e, f, g, h]) = bytes.first_chunk::<HEADER>().copied() else {
            return Effect::Nonsense;
        };
        let id = u32::from_le_bytes([a, b, c, d]);
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        if event == DEVICE_READY {
            for port in self.ports.values_mut() {
                let Told { console, name, open, .. } = std::mem::take(port);
                *port = Told { console, name, open, say_add: value == 1, ..Told::default() };
            }
            return Effect::None;
        }
        let known = u8::try_from(id).ok().and_then(|nr| Some((nr, self.ports.get_mut(&nr)?)));
        match (event, known) {
            (PORT_READY, Some((_, port))) => {
                port.ready = value == 1;
                port.say_console = port.ready && port.console;
                port.say_name = port.ready && port.name.is_some();
                (port.told_open, port.say_closed) = (false, false);
                Effect::None
            }
            (PORT_OPEN, Some((nr, _))) => Effect::Guest { nr, open: value != 0 },
            _ => Effect::Nonsense,
        }
    }

    /// What is to be said next; [`said`](Self::said) when it was. `hold` names ports whose closing has to wait.
    pub(super) fn next(&self, hold: impl Fn(u8) -> bool) -> Option<(u8, Vec<u8>)> {
        self.ports.iter().find_map(|(nr, port)| {
            let message = |event: u16, value: u16, text: &[u8]| {
                let header = [&u32::from(*nr).to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()];
                Some((*nr, [&header.concat(), text].concat()))
            };
            if port.say_add {
                message(PORT_ADD, 1, &[])
            } else if !port.ready {
                None
            } else if port.say_console {
                message(CONSOLE_PORT, 1, &[])
            } else if port.say_name {
                message(PORT_NAME, 1, port.name.as_deref().unwrap_or_default().as_bytes())
            } else if port.say_closed {
                if hold(*nr) { None } else { message(PORT_OPEN, 0, &[]) }
            } else if port.open && !port.told_open {
                message(PORT_OPEN, 1, &[])
            } else {
                None
            }
        })
    }

    /// The message that [`next`](Self::next) gave for `nr` is with the driver.
    pub(super) fn said(&mut self, nr: u8) {
        let Some(port) = self.ports.get_mut(&nr) else { return };
        if port.say_add {
            port.say_add = false;
        } else if port.say_console {
            port.say_console = false;
        } else if port.say_name {
            port.say_name = false;
        } else if port.say_closed {
            (port.say_closed, port.told_open) = (false, false);
        } else {
            port.told_open = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(nr: u32, event: u16, value: u16) -> Vec<u8> {
        [&nr.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
    }

    fn say(control: &mut Control) -> Vec<(u8, u16, u16)> {
        let mut all = vec![];
        while let Some((nr, bytes)) = control.next(|_| false) {
            control.said(nr);
            all.push((
                nr,
                u16::from_le_bytes([bytes[4], bytes[5]]),
                u16::from_le_bytes([bytes[6], bytes[7]]),
            ));
            assert!(all.len() < 100);
        }
        all
    }

    fn control() -> Control {
        let mut control = Control::default();
        control.add(0, true, None, true);
        control.add(3, false, Some("agent".into()), false);
        control
    }

    #[test]
    fn ports_are_made_known_step_by_step() {
        let mut c = control();
        assert_eq!(say(&mut c), []);
        c.host(3, true);
        c.host(3, false);
        c.message(&message(0, DEVICE_READY, 1));
        assert_eq!(say(&mut c), [(0, PORT_ADD, 1), (3, PORT_ADD, 1)]);
        c.message(&message(0, PORT_READY, 1));
        assert_eq!(say(&mut c), [(0, CONSOLE_PORT, 1), (0, PORT_OPEN, 1)]);
        c.message(&message(3, PORT_READY, 1));
        let (_, bytes) = c.next(|_| false).unwrap();
        assert_eq!(bytes[8..], *b"agent");
        assert_eq!(say(&mut c), [(3, PORT_NAME, 1)]);
        c.host(3, true);
        assert_eq!(say(&mut c), [(3, PORT_OPEN, 1)]);
        // A client that goes while another comes: the driver hears both.
        c.host(3, false);
        c.host(3, true);
        assert_eq!(c.next(|nr| nr == 3), None);
        assert_eq!(say(&mut c), [(3, PORT_OPEN, 0), (3, PORT_OPEN, 1)]);
        assert_eq!(c.message(&message(3, PORT_OPEN, 1)), Effect::Guest { nr: 3, open: true });
    }

    #[test]
    fn nonsense_is_seen() {
        let mut c = control();
        for bytes in [
            vec![],
            vec![0; 7],
            message(1, PORT_READY, 1),
            message(256, PORT_OPEN, 1),
            message(u32::MAX, PORT_OPEN, 1),
            message(0, PORT_ADD, 1),
            message(0, 99, 1),
        ] {
            assert_eq!(c.message(&bytes), Effect::Nonsense, "{bytes:?}");
        }
        assert_eq!(say(&mut c), []);
    }

    proptest! {
        /// Whatever a driver says, what there is to say comes to an end.
        #[test]
        fn always_finishes(messages in proptest::collection::vec((0u32..5, 0u16..9, 0u16..3, any::<bool>()), 0..60)) {
            let mut c = control();
            for (nr, event, value, open) in messages {
                c.message(&message(nr, event, value));
                c.host(nr as u8, open);
                prop_assert!(say(&mut c).len() <= 10);
            }
        }
    }
}
