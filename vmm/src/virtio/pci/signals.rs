//! What a device on PCI says to its driver: which vector for what, the ISR status, the pin. Shared with the device's threads; the way of
//! a message takes no lock but that of its vector.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::pci::{Intx, Msix};
use crate::virtio::Interrupt;

/// No vector (virtio 1.2 §4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

pub(super) struct Signals {
    msix: Arc<Msix>,
    intx: Intx,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    needs_reset: AtomicBool,
    generation: AtomicU8,
}

impl Signals {
    pub(super) fn new(msix: Arc<Msix>, intx: Intx, queues: u16) -> Self {
        Self {
            msix,
            intx,
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        }
    }

    /// After a reset of the device.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.needs_reset.store(false, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.update();
    }

    pub(super) fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// A vector that is there, or none: what the driver reads back tells it whether it was granted.
    fn granted(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.granted(vector), Ordering::Release);
    }

    /// ISR status, whether the device needs a reset, and the generation of its configuration.
    pub(super) fn saved(&self) -> (u32, bool, u32) {
        (self.isr.load(Ordering::Acquire).into(), self.is_broken(), self.generation().into())
    }

    /// Takes them; `None` if they make no sense.
    pub(super) fn restore(&self, isr: u32, needs_reset: bool, generation: u32) -> Option<()> {
        self.isr.store(isr.try_into().ok()?, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
        self.generation.store(generation.try_into().ok()?, Ordering::Release);
        Some(())
    }

    /// The vectors of the configuration and of the queues.
    pub(super) fn vectors(&self) -> (u16, Vec<u16>) {
        let queues = self.queue_vectors.iter().map(|v| v.load(Ordering::Acquire));
        (self.config_vector(), queues.collect())
    }

    /// Takes them; `None` if they are not of such a device.
    pub(super) fn set_vectors(&self, config: u16, queues: &[u16]) -> Option<()> {
        self.set_config_vector(config);
        for (place, vector) in self.queue_vectors.iter().zip(queues) {
            place.store(self.granted(*vector), Ordering::Release);
        }
        (queues.len() == self.queue_vectors.len()).then_some(())
    }

    fn of_queue(&self, queue: u32) -> Option<&AtomicU16> {
        usize::try_from(queue).ok().and_then(|q| self.queue_vectors.get(q))
    }

    pub(super) fn queue_vector(&self, queue: u32) -> u16 {
        self.of_queue(queue).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire))
    }

    pub(super) fn set_queue_vector(&self, queue: u32, vector: u16) {
        if let Some(place) = self.of_queue(queue) {
            place.store(self.granted(vector), Ordering::Release);
        }
    }

    /// Reads the ISR status, which clears it and lets the pin go (§4.1.4.5).
    pub(super) fn take_isr(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::AcqRel);
        self.update();
        isr
    }

    pub(super) fn allow_pin(&self, allowed: bool) {
        self.intx.allow(allowed);
    }

    pub(super) fn pin_wanted(&self) -> bool {
        self.intx.wanted()
    }

    /// Puts the pin where ISR status and MSI-X say.
    pub(super) fn update(&self) {
        self.intx.settle(|| self.isr.load(Ordering::Acquire) != 0 && !self.msix.enabled());
    }

    fn raise(&self, vector: u16, bit: u8) {
        if self.msix.enabled() {
            self.msix.notify(vector);
        } else {
            self.isr.fetch_or(bit, Ordering::AcqRel);
            self.update();
        }
    }
}

impl Interrupt for Signals {
    fn queue(&self, index: u16) {
        self.raise(self.queue_vector(index.into()), ISR_QUEUE);
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(self.config_vector(), ISR_CONFIG);
    }

    fn needs_reset(&self) {
        // Devices run only while DRIVER_OK is set, so the driver always wants to know (§2.1.2). Once is enough.
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.config();
        }
    }
}
