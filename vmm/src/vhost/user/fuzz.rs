//! For the fuzz targets only: a back end that says anything.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::{CONFIG_MAX, Front, PATIENCE};

/// All that a back end ever says is `bytes`, and then it is gone. What it is asked is what every device asks.
pub fn replies(bytes: &[u8], config: usize) {
    let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
    if ours.set_nonblocking(true).is_err() || theirs.set_nonblocking(true).is_err() {
        return;
    }
    // What does not fit into a socket's buffer is more than anybody reads.
    let _ = theirs.write(bytes);
    let _ = theirs.shutdown(std::net::Shutdown::Write);
    let Ok(front) = Front::new(ours.into()) else { return };
    assert_eq!(front.features() & 1 << 30, 0);
    let _ = (front.check_queues(2), front.check_pairs(2));
    if let Ok(bytes) = front.config(config) {
        assert_eq!(bytes.len(), config.min(CONFIG_MAX));
    }
    for ring in 0..2 {
        let _ = front.stop_ring(ring, Instant::now() + PATIENCE);
    }
    let _ = front.is_well();
}
