//! Saving a transport over MMIO, and giving its registers to another one.

use std::sync::atomic::Ordering;

use super::super::state::{StateError, Suspend, TransportState};
use super::MmioTransport;

impl Suspend for MmioTransport {
    fn suspend(&self) -> Result<(), StateError> {
        self.lock().suspend()
    }

    fn hold(&self) -> Result<(), StateError> {
        self.lock().hold()
    }

    fn save(&self) -> Result<TransportState, StateError> {
        Ok(TransportState {
            needs_reset: self.signals.needs_reset.load(Ordering::Acquire),
            interrupt_status: self.signals.pending.load(Ordering::Acquire),
            config_generation: self.signals.generation.load(Ordering::Acquire),
            claimed: self.claimed.load(Ordering::Acquire),
            ..self.lock().saved()?
        })
    }

    fn restore(&self, state: &TransportState) -> Result<(), StateError> {
        self.lock().take_saved(state, false, &self.memory)?;
        self.signals.pending.store(state.interrupt_status, Ordering::Release);
        self.signals.needs_reset.store(state.needs_reset, Ordering::Release);
        self.signals.generation.store(state.config_generation, Ordering::Release);
        self.claimed.store(state.claimed, Ordering::Release);
        Ok(())
    }

    fn resume(&self) -> Result<(), StateError> {
        let broken = self.signals.needs_reset.load(Ordering::Acquire);
        let mut registers = self.lock();
        // Doorbells stay where they are, so it does not matter by which window they were found.
        self.with_link(0, |link| registers.resume(broken, link))
    }
}
