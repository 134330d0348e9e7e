//! MSI-X (PCI Local Bus 3.0 §6.8.2): owns a function's table, its pending bits, and the two masks.
//!
//! ```text
//!            not enabled            enabled, vector or function masked          enabled, unmasked
//! notify ──▶ nothing                pending bit set ──── unmask ──────────────▶ message
//! ```
//!
//! A function that may not master the bus sends nothing (PCIe 5.0 §7.5.1.1.3): to its vectors that is one more mask.
//!
//! `notify` comes from device threads, everything else from vCPUs. Each vector has a lock of its own, so queues on several threads do
//! not meet. A mask that is lifted looks at each pending bit under that lock after the new mask is visible: no interrupt is lost between the two.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::config::{CAP_MSIX, ConfigSpace};
use crate::bus::BusDevice;
use crate::irq::Messages;

/// Bytes of the BAR that holds table and pending bits.
pub const TABLE_SIZE: u64 = 0x1000;
/// Bytes of one vector in the table.
const ENTRY: u64 = 16;
/// Where the pending bits lie in the same BAR.
const PENDING: u64 = 0x800;
/// So many vectors fit in front of them.
const VECTORS_MAX: u16 = 128;

/// Message control: MSI-X is in use, and the interrupt pin is not.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Not of the register: the function may master the bus.
const MASTER: u16 = 1;
/// Vector control: this one is masked.
const VECTOR_MASK: u32 = 1;

/// One vector, to be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedVector {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

#[derive(Default)]
struct Vector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

/// The vectors of one function.
pub struct Msix {
    messages: Arc<dyn Messages>,
    control: AtomicU16,
    vectors: Vec<Mutex<Vector>>,
}

impl Msix {
    /// `vectors` vectors, 1 to 128, masked, as at reset.
    pub fn new(vectors: u16, messages: Arc<dyn Messages>) -> Arc<Self> {
        let vectors = vectors.clamp(1, VECTORS_MAX);
        let vectors = (0..vectors).map(|_| Mutex::default()).collect();
        let msix = Self { messages, control: AtomicU16::new(0), vectors };
        msix.reset();
        Arc::new(msix)
    }

    /// Adds the capability to `config`, its table in BAR `bar`. Returns where the capability lies.
    pub fn add_capability(&self, config: &mut ConfigSpace, bar: u8) -> Option<u16> {
        let last = self.vectors() - 1;
        let mut body = last.to_le_bytes().to_vec();
        body.extend(u32::from(bar).to_le_bytes());
        body.extend((PENDING as u32 | u32::from(bar)).to_le_bytes());
        config.add_capability(CAP_MSIX, &body, &(ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// How many there are.
    pub fn vectors(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Whether the driver uses MSI-X and not the interrupt pin.
    pub fn enabled(&self) -> bool {
        self.control.load(Ordering::Acquire) & ENABLE != 0
    }

    /// The driver has written message control, or has let the function master the bus, or not. Of two calls the later one must bring what
    /// the registers say then.
    pub fn set_control(&self, value: u16, master: bool) {
        let master = if master { MASTER } else { 0 };
        self.control.store(value & (ENABLE | FUNCTION_MASK) | master, Ordering::Release);
        for vector in &self.vectors {
            self.deliver(&mut lock(vector));
        }
    }

    /// The table. Message control is in configuration space.
    pub fn saved(&self) -> Vec<SavedVector> {
        let saved = |vector: &Mutex<Vector>| {
            let Vector { address, data, control, pending } = *lock(vector);
            SavedVector { address, data, masked: control & VECTOR_MASK != 0, pending }
        };
        self.vectors.iter().map(saved).collect()
    }

    /// Takes a table; what is pending comes with [`set_control`](Self::set_control). `None`: it has another length.
    pub fn restore(&self, saved: &[SavedVector]) -> Option<()> {
        if saved.len() != self.vectors.len() {
            return None;
        }
        for (vector, SavedVector { address, data, masked, pending }) in self.vectors.iter().zip(saved) {
            let control = if *masked { VECTOR_MASK } else { 0 };
            *lock(vector) = Vector { address: *address, data: *data, control, pending: *pending };
        }
        Some(())
    }

    /// As at power-on.
    pub fn reset(&self) {
        self.control.store(0, Ordering::Release);
        for vector in &self.vectors {
            *lock(vector) = Vector { control: VECTOR_MASK, ..Vector::default() };
        }
    }

    /// The device has an interrupt for `vector`; one that is not there is dropped.
    pub fn notify(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            let mut vector = lock(vector);
            vector.pending = true;
            self.deliver(&mut vector);
        }
    }

    fn deliver(&self, vector: &mut Vector) {
        let control = self.control.load(Ordering::Acquire);
        if control & ENABLE == 0 {
            // Nobody listens, and what happened before the driver switched over is not for it.
            vector.pending = false;
        } else if vector.pending
            && control & (FUNCTION_MASK | MASTER) == MASTER
            && vector.control & VECTOR_MASK == 0
        {
            vector.pending = false;
            self.messages.send(vector.address, vector.data);
        }
    }

    fn read_word(&self, offset: u64) -> u32 {
        if let Some(offset) = offset.checked_sub(PENDING) {
            let first = usize::try_from(offset).unwrap_or(usize::MAX).saturating_mul(8);
            let bits = self.vectors.iter().skip(first).take(32).enumerate();
            return bits.fold(0, |word, (bit, vector)| word | u32::from(lock(vector).pending) << bit);
        }
        let Some(vector) = self.vector(offset) else { return 0 };
        let vector = lock(vector);
        match offset % ENTRY {
            0 => vector.address as u32,
            4 => (vector.address >> 32) as u32,
            8 => vector.data,
            _ => vector.control,
        }
    }

    fn write_word(&self, offset: u64, value: u32) {
        let Some(vector) = self.vector(offset) else { return };
        let mut vector = lock(vector);
        match offset % ENTRY {
            0 => vector.address = vector.address & !0xffff_ffff | u64::from(value),
            4 => vector.address = vector.address & 0xffff_ffff | u64::from(value) << 32,
            8 => vector.data = value,
            _ => {
                vector.control = value & VECTOR_MASK;
                self.deliver(&mut vector);
            }
        }
    }

    fn vector(&self, offset: u64) -> Option<&Mutex<Vector>> {
        usize::try_from(offset / ENTRY).ok().and_then(|index| self.vectors.get(index))
    }
}

fn lock(vector: &Mutex<Vector>) -> MutexGuard<'_, Vector> {
    vector.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The table and the pending bits. Accesses are aligned and four or eight bytes wide; others read as zero and do nothing.
impl BusDevice for Msix {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if is_aligned(offset, data.len()) {
            for (at, word) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
                word.copy_from_slice(&self.read_word(at).to_le_bytes());
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if is_aligned(offset, data.len()) {
            for (at, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
                let word = <[u8; 4]>::try_from(word).unwrap_or_default();
                self.write_word(at, u32::from_le_bytes(word));
            }
        }
    }
}

fn is_aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Keeps what is sent.
    #[derive(Default)]
    pub(crate) struct Sent(pub(crate) Mutex<Vec<(u64, u32)>>);

    impl Messages for Sent {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    fn with(vectors: u16) -> (Arc<Msix>, Arc<Sent>) {
        let sent = Arc::new(Sent::default());
        (Msix::new(vectors, Arc::clone(&sent) as _), sent)
    }

    fn put(msix: &Msix, vector: u64, word: u64, value: u32) {
        msix.write(16 * vector + 4 * word, &value.to_le_bytes());
    }

    fn get(msix: &Msix, offset: u64) -> u32 {
        let mut word = [0; 4];
        msix.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn program(msix: &Msix, vector: u64) {
        put(msix, vector, 0, 0xfee0_0000 + vector as u32);
        put(msix, vector, 1, 0);
        put(msix, vector, 2, 0x40);
        put(msix, vector, 3, 0);
    }

    #[test]
    fn a_message_goes_where_the_driver_said() {
        let (msix, sent) = with(3);
        msix.notify(1);
        assert_eq!(get(&msix, PENDING), 0, "not in use: nothing is kept");
        msix.set_control(ENABLE, true);
        program(&msix, 1);
        msix.notify(1);
        msix.notify(3);
        msix.notify(u16::MAX);
        assert_eq!(*sent.0.lock().unwrap(), [(0xfee0_0001, 0x40)]);
        let mut entry = [0; 8];
        msix.read(16, &mut entry);
        assert_eq!(entry, [1, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
        assert_eq!(get(&msix, 12), 1, "masked at reset");
    }

    #[test]
    fn masks_hold_an_interrupt_back_and_keep_it() {
        let (msix, sent) = with(40);
        msix.set_control(ENABLE, true);
        program(&msix, 0);
        program(&msix, 33);
        put(&msix, 33, 3, 1);
        msix.notify(33);
        msix.notify(33);
        assert_eq!((get(&msix, PENDING), get(&msix, PENDING + 4)), (0, 2));
        put(&msix, 33, 3, 0);
        assert_eq!((sent.0.lock().unwrap().len(), get(&msix, PENDING + 4)), (1, 0));
        msix.set_control(ENABLE | FUNCTION_MASK, true);
        msix.notify(0);
        msix.notify(33);
        assert_eq!((sent.0.lock().unwrap().len(), get(&msix, PENDING), get(&msix, PENDING + 4)), (1, 1, 2));
        msix.set_control(ENABLE, true);
        assert_eq!(sent.0.lock().unwrap().len(), 3);
        msix.notify(0);
        assert_eq!(sent.0.lock().unwrap().len(), 4);
        msix.reset();
        assert!(!msix.enabled());
        assert_eq!((get(&msix, 0), get(&msix, 12)), (0, 1));
    }

    #[test]
    fn nothing_is_sent_while_the_bus_is_not_the_functions() {
        let (msix, sent) = with(1);
        msix.set_control(ENABLE, false);
        program(&msix, 0);
        msix.notify(0);
        assert_eq!((sent.0.lock().unwrap().len(), get(&msix, PENDING)), (0, 1));
        msix.set_control(ENABLE, true);
        assert_eq!((sent.0.lock().unwrap().len(), get(&msix, PENDING)), (1, 0));
    }

    #[test]
    fn more_vectors_than_fit_are_not_there() {
        let (msix, _) = with(u16::MAX);
        assert_eq!(msix.vectors(), VECTORS_MAX);
        assert_eq!(u64::from(VECTORS_MAX) * ENTRY, PENDING);
    }

    proptest! {
        /// Any accesses: no panic, and a message never carries what was not programmed into its vector.
        #[test]
        fn any_access_is_harmless(accesses in prop::collection::vec((0u64..0x1008, any::<u32>(), 0usize..9, 0u16..6), 0..60)) {
            let (msix, _) = with(5);
            for (offset, value, width, vector) in accesses {
                let bytes = u64::from(value).to_le_bytes();
                msix.write(offset, &bytes[..width]);
                let mut data = [0; 8];
                msix.read(offset, &mut data[..width]);
                msix.notify(vector);
                msix.set_control(value as u16, value >> 16 & 1 == 1);
                if !msix.enabled() {
                    prop_assert_eq!(get(&msix, PENDING), 0);
                }
            }
        }
    }
}
