//! For the fuzz targets only: a session on any ring.

use std::sync::{Arc, LazyLock, Mutex};

use super::limit::Limiter;
use super::serve::{Parts, Server};
use super::{RngLimit, Source};
use crate::config::RngSource;
use crate::inherit::Inherited;
use crate::virtio::fuzz::{Flag, active};
use crate::virtio::queue::Queue;

static SOURCE: LazyLock<Option<Arc<Source>>> = LazyLock::new(|| {
    let zero = RngSource { id: "fuzz".into(), filename: "/dev/zero".into() };
    Source::open(&zero, &Inherited::default()).ok().map(Arc::new)
});

/// Serves `queue` as often as it is told; whether the device needs a reset then.
pub fn session(queue: Queue, limit: Option<RngLimit>, turns: u8) -> bool {
    let (Some(source), Some(queue)) = (SOURCE.clone(), active(vec![queue]).and_then(|mut q| q.pop())) else {
        return false;
    };
    let interrupt = Arc::new(Flag::default());
    let mut server = Server::new(Parts {
        source,
        limiter: limit.map(|limit| Arc::new(Mutex::new(Limiter::new(limit)))),
        timer: None,
        queue: queue.queue,
        notify: queue.notify,
        interrupt: Arc::clone(&interrupt) as _,
    });
    (0..turns).for_each(|_| server.run());
    interrupt.is_set()
}
