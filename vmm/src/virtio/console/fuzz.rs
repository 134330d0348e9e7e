//! For the fuzz targets only: the messages of a driver about ports, and a session on any rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::PortOptions;
use super::control::{Control, Effect};
use super::port::PortEnd;
use super::serve::Server;
use crate::chardev::{CharBackend, FrontEnd};
use crate::virtio::fuzz::{Flag, active};
use crate::virtio::queue::Queue;

/// Takes messages of the driver, each with what the host does then: a port's client comes or goes. What there is to say comes to an
/// end, whatever is said.
pub fn control<'a>(messages: impl IntoIterator<Item = (&'a [u8], u8, bool)>) {
    let mut control = Control::default();
    control.add(0, true, None, true);
    control.add(1, false, Some("a name".into()), false);
    for (message, nr, open) in messages {
        if let Effect::Guest { nr, .. } = control.message(message) {
            assert!(nr < 2, "a port that is not there was opened");
        }
        control.host(nr, open);
        let mut said = 0;
        while let Some((nr, answer)) = control.next(|_| false) {
            assert!(answer.len() >= super::control::HEADER);
            control.said(nr);
            said += 1;
            assert!(said <= 10, "it has something to say without end");
        }
    }
}

/// Takes a few bytes, then nothing until it is asked again.
struct Slow(AtomicUsize);

impl CharBackend for Slow {
    fn write(&self, data: &[u8]) {
        assert!(data.len() <= self.0.swap(0, Ordering::Relaxed), "more than there is room for");
    }

    fn room(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn attach(&self, _: Arc<dyn FrontEnd>) {}

    fn front_end_ready(&self) {}
}

/// A session of a device with a stream as port 1, on `queues` with the numbers from 0 on. Each byte of `events` is something that happens.
/// Whether the device needs a reset then.
pub fn session(queues: Vec<Queue>, multiport: bool, events: &[u8]) -> bool {
    let backend = Arc::new(Slow(AtomicUsize::new(0)));
    let end = PortEnd::new(PortOptions {
        nr: u8::from(multiport),
        console: false,
        name: Some("stream".into()),
        backend: Arc::clone(&backend) as _,
    });
    let nr = end.nr;
    let Some(queues) = active(queues) else { return false };
    let count = queues.len() as u16;
    let interrupt = Arc::new(Flag::default());
    let mut server = Server::new(&[end], queues, multiport, Arc::clone(&interrupt) as _);
    for event in events {
        let argument = event >> 3;
        match event & 7 {
            0..=2 => server.notified(u16::from(argument) % count),
            3 => {
                let room = server.room(nr).min(usize::from(argument) * 100);
                server.receive(nr, &vec![0x55; room]);
                assert!(!interrupt.is_set() || server.room(nr) == 0, "broken, and takes more");
            }
            4 | 5 => {
                backend.0.store(usize::from(argument) * 50, Ordering::Relaxed);
                server.writable(nr);
            }
            _ => server.host_changed(nr, argument & 1 != 0),
        }
    }
    interrupt.is_set()
}
