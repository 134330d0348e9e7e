//! For the fuzz targets only: page numbers and statistics that the guest tells, and a session on any rings.

use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::pages::Pages;
use super::port::Port;
use super::serve::{Follower, Parts, Server};
use super::stats::Stats;
use super::{PAGE, role};
use crate::memory::GuestMemory;
use crate::memory::discard::Discarder;
use crate::virtio::fuzz::{Flag, active};
use crate::virtio::queue::Queue;

/// Pages come into the balloon (`true`) and leave it, with host pages of `page_size` bytes and `ram` balloon pages of RAM. What goes to
/// the host is RAM, whole pages of the host.
pub fn pages(page_size: u64, ram: u64, rounds: impl IntoIterator<Item = (bool, Vec<u32>)>) {
    let mut pages = Pages::new(page_size);
    for (enter, mut numbers) in rounds {
        if !enter {
            pages.leave(&numbers);
            continue;
        }
        pages.enter(
            &mut numbers,
            |n| n < ram,
            |start, len| {
                assert!(start % page_size == 0 && len % page_size == 0 && len > 0, "{start:#x}+{len:#x}");
                assert!(start + len <= ram * PAGE, "{start:#x}+{len:#x} is not RAM");
            },
        );
    }
}

/// Reads statistics.
pub fn stats(bytes: &[u8]) {
    assert!(Stats::parse(bytes).named().count() <= 10);
}

/// A session on `queues` with the numbers from 0 on, `features` negotiated. Each byte of `turns` is the queue that has its turn next, or
/// the automatic, which wants statistics. Whether the device needs a reset then.
pub fn session(memory: Arc<GuestMemory>, queues: Vec<Queue>, features: u64, turns: &[u8]) -> bool {
    let (Some(queues), Ok(refresh), Ok(timer)) = (active(queues), EventFd::new(EFD_NONBLOCK), TimerFd::new())
    else {
        return false;
    };
    let interrupt = Arc::new(Flag::default());
    let queues: Vec<_> = queues.into_iter().filter_map(|q| Some((role(q.index, features)?, q))).collect();
    let count = queues.len();
    let mut server = Server::new(Parts {
        discarder: Discarder::new(memory),
        queues,
        port: Port::new(1 << 20),
        refresh: Arc::new(refresh),
        follower: Some(Follower { timer, interval: Duration::from_secs(300), percent: 50, waits: false }),
        interrupt: Arc::clone(&interrupt) as _,
    });
    for turn in turns {
        match usize::from(*turn) % (count + 1) {
            number if number < count => server.run(number),
            _ => server.look(),
        }
    }
    interrupt.is_set()
}
