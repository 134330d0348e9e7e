//! The balloon as the rest of the process sees it: how much the host wants, how much the guest has given.
//!
//! Locks: `live` and `stats`, each held for a moment and never while the other, or anything outside, is called. The transport's lock
//! may be held by the caller (vCPU threads); nothing here waits for it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::PAGE;
use super::follow::{self, View};
use super::stats::Stats;
use crate::virtio::Interrupt;

/// Told the guest's memory in bytes when it has changed: on a vCPU's thread, with locks held. Must not block or call the port.
type OnChange = Box<dyn Fn(u64) + Send + Sync>;

/// A handle on one balloon; works whether a driver is there or not.
pub struct Port {
    /// Guest RAM at boot.
    memory: u64,
    /// Pages that the host wants.
    wanted: AtomicU32,
    /// Those that a client wants; the automatic may want more.
    asked: AtomicU32,
    /// Pages that the guest says it has given.
    actual: AtomicU32,
    on_change: OnceLock<OnChange>,
    live: Mutex<Option<Live>>,
    stats: Mutex<Option<Stats>>,
}

/// The way to a driver, while there is one.
struct Live {
    interrupt: Arc<dyn Interrupt>,
    refresh: Arc<EventFd>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port {
    pub(super) fn new(memory: u64) -> Arc<Self> {
        Arc::new(Self {
            memory,
            wanted: AtomicU32::new(0),
            asked: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            on_change: OnceLock::new(),
            live: Mutex::new(None),
            stats: Mutex::new(None),
        })
    }

    /// From now on `told` hears of each change of [`actual`](Self::actual), in bytes; on a vCPU's thread, so it must only pass
    /// the number on. The first caller wins.
    pub fn on_change(&self, told: impl Fn(u64) + Send + Sync + 'static) {
        let _ = self.on_change.set(Box::new(told));
    }

    /// Asks the guest to keep `bytes` of memory and give up the rest. More than it had at boot is that; parts of a page are rounded
    /// in the guest's favour. A guest without a driver hears of it when it has one.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(self.memory.saturating_sub(bytes) / PAGE).unwrap_or(u32::MAX);
        self.asked.store(pages, Ordering::Release);
        self.wanted.store(pages, Ordering::Release);
        self.tell_wanted();
    }

    /// What the automatic makes of the newest statistics: the balloon holds more than a client has asked for, or as much.
    pub(super) fn follow(&self, percent: u8) {
        let Some(available) = self.stats().and_then(|stats| stats.available()) else { return };
        let given = u64::from(self.actual_pages()) * PAGE;
        let bytes = follow::target(View { memory: self.memory, given, available }, percent);
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        let pages = pages.max(self.asked.load(Ordering::Acquire));
        if self.wanted.swap(pages, Ordering::AcqRel) != pages {
            self.tell_wanted();
        }
    }

    fn tell_wanted(&self) {
        let interrupt = lock(&self.live).as_ref().map(|live| Arc::clone(&live.interrupt));
        if let Some(interrupt) = interrupt {
            interrupt.config();
        }
    }

    /// Memory that the guest has, in bytes: that at boot without what is in the balloon.
    pub fn actual(&self) -> u64 {
        self.memory.saturating_sub(u64::from(self.actual_pages()) * PAGE)
    }

    /// Whether a driver serves the balloon.
    pub fn has_driver(&self) -> bool {
        lock(&self.live).is_some()
    }

    /// What the guest last said about its memory.
    pub fn stats(&self) -> Option<Stats> {
        lock(&self.stats).clone()
    }

    /// Asks the guest for newer [`stats`](Self::stats), which come a moment later.
    pub fn refresh_stats(&self) {
        let refresh = lock(&self.live).as_ref().map(|live| Arc::clone(&live.refresh));
        if let Some(refresh) = refresh {
            // Fails only when it has been asked very often already.
            let _ = refresh.write(1);
        }
    }

    pub(super) fn wanted_pages(&self) -> u32 {
        self.wanted.load(Ordering::Acquire)
    }

    pub(super) fn actual_pages(&self) -> u32 {
        self.actual.load(Ordering::Acquire)
    }

    /// The guest has said how many pages are in the balloon; no more than it had can be.
    pub(super) fn set_actual_pages(&self, pages: u32) {
        let most = u32::try_from(self.memory / PAGE).unwrap_or(u32::MAX);
        let pages = pages.min(most);
        if self.actual.swap(pages, Ordering::AcqRel) != pages
            && let Some(told) = self.on_change.get()
        {
            told(self.memory.saturating_sub(u64::from(pages) * PAGE));
        }
    }

    pub(super) fn set_stats(&self, stats: Stats) {
        *lock(&self.stats) = Some(stats);
    }

    pub(super) fn connect(&self, interrupt: Arc<dyn Interrupt>, refresh: Arc<EventFd>) {
        *lock(&self.live) = Some(Live { interrupt, refresh });
    }

    pub(super) fn disconnect(&self) {
        *lock(&self.live) = None;
        // Another kernel, other numbers.
        *lock(&self.stats) = None;
    }
}
