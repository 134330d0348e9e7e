//! Output to the log of this process: owns the splitting into lines and the limit on how much a guest may write there.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{CharBackend, FrontEnd};

/// Longer lines are cut into pieces.
const LINE_MAX: usize = 1024;
/// Lines per second; the guest is not to fill the host's disk.
const LINES_PER_SECOND: u32 = 200;

/// Lines go to the log.
#[derive(Default)]
pub(super) struct Log {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    line: Vec<u8>,
    second: Option<Instant>,
    lines: u32,
}

impl State {
    fn end_line(&mut self) {
        let now = Instant::now();
        if self.second.is_none_or(|start| now.duration_since(start) >= Duration::from_secs(1)) {
            if self.lines > LINES_PER_SECOND {
                tracing::info!("guest: {} lines dropped", self.lines - LINES_PER_SECOND);
            }
            (self.second, self.lines) = (Some(now), 0);
        }
        self.lines = self.lines.saturating_add(1);
        if self.lines <= LINES_PER_SECOND {
            tracing::info!(
                "guest: {}",
                String::from_utf8_lossy(&self.line).trim_end_matches('\r').escape_debug()
            );
        }
        self.line.clear();
    }
}

impl CharBackend for Log {
    fn write(&self, data: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in data {
            if byte == b'\n' || state.line.len() >= LINE_MAX {
                state.end_line();
            }
            if byte != b'\n' {
                state.line.push(byte);
            }
        }
    }

    fn attach(&self, _: Arc<dyn FrontEnd>) {}

    fn front_end_ready(&self) {}
}
