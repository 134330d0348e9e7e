//! For the fuzz targets only: a session on any ring, and requests of any kind, over memory that is not there.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::port::{Port, Store};
use super::request::Request;
use super::serve::{Parts, Server};
use crate::virtio::fuzz::{Flag, active};
use crate::virtio::queue::Queue;

/// Bytes of a block.
pub const BLOCK: u64 = 2 << 20;
/// Where the first is.
pub const BASE: u64 = 1 << 32;
const CHUNK: u64 = 8 * BLOCK;
/// The last chunk is half as large as the others.
const SIZE: u64 = 9 * CHUNK - CHUNK / 2;

/// Remembers what is within the guest's reach; some chunks cannot be.
struct Ledger {
    exposed: Mutex<[bool; 9]>,
    fails_at: usize,
}

impl Store for Ledger {
    fn base(&self) -> u64 {
        BASE
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn chunk(&self) -> u64 {
        CHUNK
    }

    fn expose(&self, chunk: usize, exposed: bool) -> io::Result<()> {
        if exposed && chunk == self.fails_at {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut known = self.exposed.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_mut(chunk);
        assert!(known.as_deref().is_some_and(|known| *known != exposed), "chunk {chunk} twice, or none");
        known.into_iter().for_each(|known| *known = exposed);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(
            len > 0 && offset % BLOCK == 0 && len % BLOCK == 0 && offset + len <= SIZE,
            "{offset:#x}+{len:#x}"
        );
        Ok(())
    }
}

fn port(requested: u64, fails_at: usize) -> (Arc<Port>, Arc<Ledger>) {
    let ledger = Arc::new(Ledger { exposed: Mutex::default(), fails_at });
    (Port::new(Arc::clone(&ledger) as _, BLOCK, 0, requested % (SIZE / BLOCK + 1) * BLOCK), ledger)
}

fn check(port: &Port, ledger: &Ledger) {
    let exposed = ledger.exposed.lock().unwrap_or_else(PoisonError::into_inner);
    let within = exposed.iter().filter(|exposed| **exposed).count() as u64 * CHUNK;
    let info = port.info();
    assert!(info.plugged_size <= within && info.plugged_size <= SIZE);
    assert_eq!(info.plugged_size == 0, within == 0);
}

/// Carries out requests that a driver has written. What is plugged is never more than the guest is to have, and always within its reach.
pub fn requests<'a>(requested: u64, fails_at: usize, requests: impl IntoIterator<Item = &'a [u8]>) {
    let (port, ledger) = port(requested, fails_at);
    for request in requests.into_iter().filter_map(Request::parse) {
        port.carry_out(request);
        check(&port, &ledger);
        assert!(port.info().plugged_size <= port.info().requested_size);
    }
    port.unplug_all();
    check(&port, &ledger);
    assert_eq!(port.info().plugged_size, 0);
}

/// Serves `queue` as often as it is told; whether the device needs a reset then.
pub fn session(queue: Queue, requested: u64, turns: u8) -> bool {
    let Some(queue) = active(vec![queue]).and_then(|mut queues| queues.pop()) else { return false };
    let (port, ledger) = port(requested, usize::MAX);
    let interrupt = Arc::new(Flag::default());
    let mut server = Server::new(Parts {
        port: Arc::clone(&port),
        queue: queue.queue,
        notify: queue.notify,
        interrupt: Arc::clone(&interrupt) as _,
    });
    (0..turns).for_each(|_| server.run());
    check(&port, &ledger);
    interrupt.is_set()
}
