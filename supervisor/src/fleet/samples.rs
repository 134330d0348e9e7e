//! What VMMs say of themselves and the kernel cannot tell: balloons and the transfers of disks. Owns the newest answers and the asking.
//!
//! Whoever reads gets what is known, at once; that makes the VMMs be asked, if it was not done just now, for whoever reads next. So no VMM is
//! asked while nobody reads, and none can delay a reader. One that does not answer in time keeps its last sample and is left alone for a while.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use serde_json::Value;

use super::link::Wire;
use super::view::View;
use crate::qmp::{Monitor, QmpError};

/// Asked again after this long at the earliest.
const FRESH: Duration = Duration::from_secs(5);
/// A VMM answers such a question at once.
const ANSWER: Duration = Duration::from_secs(2);
/// One that did not is not asked again for so long.
const LEFT_ALONE: Duration = Duration::from_secs(60);
/// VMMs asked at the same time.
const AT_ONCE: usize = 16;
/// Disks of one VM that are counted, and the longest name of one: a VMM may be in its guest's hands.
const DISKS: usize = 64;
const LONGEST_NAME: usize = 64;

/// What one VMM said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sample {
    /// Memory that the guest has, in bytes; `None`: it has no balloon.
    pub balloon: Option<u64>,
    /// Each disk by name.
    pub disks: Vec<(String, Transfers)>,
}

/// What went to and from a disk, as the guest asked for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transfers {
    /// Bytes read and written.
    pub bytes: [u64; 2],
    /// Requests to read, to write and to flush.
    pub requests: [u64; 3],
}

/// Samples by VM.
pub type Samples = BTreeMap<Arc<str>, Sample>;

#[derive(Debug, Default)]
struct State {
    newest: Arc<Samples>,
    /// When they were asked for; while they are, too.
    asked: Option<Instant>,
    asking: bool,
    /// Who did not answer, and since when.
    silent: BTreeMap<Arc<str>, Instant>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Sampler {
    state: Mutex<State>,
}

impl Sampler {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known; `vms` are asked for the next reader.
    pub(super) fn read(self: &Arc<Self>, vms: impl FnOnce() -> Vec<(Arc<View>, Wire)>) -> Arc<Samples> {
        let mut state = self.lock();
        let newest = Arc::clone(&state.newest);
        if !state.asking && state.asked.is_none_or(|asked| asked.elapsed() >= FRESH) {
            state.asking = true;
            drop(state);
            let (this, vms) = (Arc::clone(self), vms());
            tokio::spawn(async move { this.ask(vms).await });
        }
        newest
    }

    async fn ask(&self, vms: Vec<(Arc<View>, Wire)>) {
        let (before, silent) = {
            let state = self.lock();
            (Arc::clone(&state.newest), state.silent.clone())
        };
        let left_alone =
            |view: &View| silent.get(&view.name).is_some_and(|since| since.elapsed() < LEFT_ALONE);
        let asked = vms.into_iter().map(|(view, wire)| {
            let monitor = wire.monitor().filter(|_| !left_alone(&view));
            async move {
                let sample = match monitor {
                    Some(monitor) => sample(&monitor, &view).await,
                    None => Err(true),
                };
                (view, sample)
            }
        });
        let answers: Vec<_> = stream::iter(asked).buffer_unordered(AT_ONCE).collect().await;
        let mut state = self.lock();
        let mut newest = Samples::new();
        for (view, sample) in answers {
            let name = &view.name;
            let sample = match sample {
                Ok(sample) => {
                    state.silent.remove(name);
                    Some(sample)
                }
                Err(known) => {
                    if !known {
                        state.silent.insert(Arc::clone(name), Instant::now());
                    }
                    before.get(name).cloned().filter(|_| view.main_pid != 0)
                }
            };
            newest.extend(sample.map(|sample| (Arc::clone(name), sample)));
        }
        state.silent.retain(|_, since| since.elapsed() < LEFT_ALONE);
        state.newest = Arc::new(newest);
        (state.asking, state.asked) = (false, Some(Instant::now()));
    }
}

/// Asks for what there is. `Err(false)`: it does not answer; `Err(true)`: there is nothing new, and that is no news.
async fn sample(monitor: &Monitor, view: &View) -> Result<Sample, bool> {
    let mut sample = Sample::default();
    let silent = |error: QmpError| !matches!(error, QmpError::Deadline { .. });
    if view.spec.balloon {
        let answer = monitor.execute("query-balloon", None, ANSWER).await.map_err(silent)?;
        sample.balloon = answer.get("actual").and_then(Value::as_u64);
    }
    if !view.disks.is_empty() {
        let answer = monitor.execute("query-blockstats", None, ANSWER).await.map_err(silent)?;
        sample.disks = disks(&answer);
    }
    Ok(sample)
}

/// The answer to `query-blockstats`.
fn disks(answer: &Value) -> Vec<(String, Transfers)> {
    let one = |disk: &Value| {
        let name = disk.get("device")?.as_str().filter(|name| name.len() <= LONGEST_NAME)?;
        let stats = disk.get("stats")?;
        let count = |name: &str| stats.get(name).and_then(Value::as_u64).unwrap_or(0);
        let transfers = Transfers {
            bytes: ["rd_bytes", "wr_bytes"].map(count),
            requests: ["rd_operations", "wr_operations", "flush_operations"].map(count),
        };
        Some((name.to_owned(), transfers))
    };
    answer.as_array().into_iter().flatten().take(DISKS).filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn disks_are_read_from_whatever_comes() {
        let stats = json!({"rd_bytes": 1, "wr_bytes": 2, "rd_operations": 3, "wr_operations": 4, "flush_operations": 5});
        let long = "d".repeat(LONGEST_NAME + 1);
        let answer = json!([
            {"device": "disk0", "stats": stats}, {"device": "disk1", "stats": {"rd_bytes": -1}}, {"device": long, "stats": stats}, {"device": 7},
            {"device": "disk2"}, null,
        ]);
        let all = Transfers { bytes: [1, 2], requests: [3, 4, 5] };
        assert_eq!(disks(&answer), [("disk0".to_owned(), all), ("disk1".to_owned(), Transfers::default())]);
        let many: Value = (0..1000).map(|_| json!({"device": "d", "stats": {}})).collect();
        assert_eq!(disks(&many).len(), DISKS);
        for other in [json!(null), json!({"return": []}), json!("text")] {
            assert_eq!(disks(&other), []);
        }
    }
}
