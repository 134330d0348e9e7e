//! Saving a transport on PCI, and giving its registers to another one. Where its BARs come to lie follows from its configuration space: the root
//! complex maps them once all functions have theirs.

use super::super::state::{PciState, StateError, Suspend, TransportState};
use super::PciTransport;
use crate::pci::config::{COMMAND, COMMAND_INTX_DISABLE};

impl Suspend for PciTransport {
    fn suspend(&self) -> Result<(), StateError> {
        self.shared.lock().suspend()
    }

    fn hold(&self) -> Result<(), StateError> {
        self.shared.lock().hold()
    }

    fn save(&self) -> Result<TransportState, StateError> {
        let signals = &self.shared.signals;
        let (interrupt_status, needs_reset, config_generation) = signals.saved();
        let (config_vector, queue_vectors) = signals.vectors();
        let config = self.config().saved();
        let pci = PciState { config, msix: self.msix.saved(), config_vector, queue_vectors };
        let state = self.shared.lock().saved()?;
        Ok(TransportState { needs_reset, interrupt_status, config_generation, pci: Some(pci), ..state })
    }

    fn restore(&self, state: &TransportState) -> Result<(), StateError> {
        self.shared.lock().take_saved(state, true, &self.shared.memory)?;
        let pci = state.pci.as_ref().ok_or(StateError::Malformed("function on PCI"))?;
        let mut config = self.config();
        config.restore(&pci.config).ok_or(StateError::Malformed("configuration space"))?;
        let (command, control) = (config.u16(COMMAND), config.u16(self.at.msix + 2));
        let master = config.is_master();
        drop(config);
        self.shared.lock().master = master;
        let signals = &self.shared.signals;
        signals
            .restore(state.interrupt_status, state.needs_reset, state.config_generation)
            .and_then(|()| signals.set_vectors(pci.config_vector, &pci.queue_vectors))
            .ok_or(StateError::Malformed("interrupt of a function"))?;
        self.msix.restore(&pci.msix).ok_or(StateError::Malformed("table of MSI-X"))?;
        // Now what was pending may come: the processors have their state.
        self.msix.set_control(control, master);
        signals.allow_pin(command & COMMAND_INTX_DISABLE == 0);
        signals.update();
        Ok(())
    }

    fn resume(&self) -> Result<(), StateError> {
        let broken = self.shared.signals.is_broken();
        let mut registers = self.shared.lock();
        self.shared.with_link(|link| registers.resume(broken, link))
    }
}
