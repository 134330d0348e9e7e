//! The messages of a device of the host, MSI and MSI-X: owns the table that the guest writes, and the way of each message from the device to a vCPU.
//! It leads past this process: none of its threads runs when the device interrupts.
//!
//! ```text
//! device ──VFIO──▶ event ──irqfd──▶ route in KVM ──▶ vCPU
//! ```
//!
//! A vector has a way from the first time that it may be used; with hundreds of vectors a guest uses few:
//!
//! ```text
//!           unmasked             masked, or the function is
//! no way ─────────────▶ open ◀─────────────────────────────▶ closed        stop, or another kind: no way
//! ```
//!
//! A closed way has no irqfd: what the device says stays in its event, which is the pending bit. KVM looks into an event when its irqfd comes, and
//! ends what was on its way when it goes, so nothing is lost in between and nothing comes twice.
//!
//! Called from vCPU threads and from the thread that owns the machine.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ioctl::Irq;
use crate::bus::BusDevice;
use crate::irq::Message;

/// Bytes of one vector in the table (PCI 3.0 §6.8.2).
pub(super) const ENTRY: u64 = 16;
/// Where the pending bits lie for [`BusDevice`]: behind the longest table there can be.
pub(super) const PENDING: u64 = 2048 * ENTRY;
/// Vector control: this one is masked.
const MASK: u32 = 1;

/// What vectors are connected by: VFIO and KVM.
pub(super) trait Plant: Send + Sync {
    /// The device is to send so many messages of this kind, which go nowhere yet. Returns for how many the host has room.
    fn start(&self, irq: Irq, count: u32) -> io::Result<u32>;
    /// No more of them.
    fn stop(&self, irq: Irq) -> io::Result<()>;
    /// One of them writes to this event from now on.
    fn lead(&self, irq: Irq, vector: u32, event: &EventFd) -> io::Result<()>;
    /// A GSI for a message.
    fn take_gsi(&self) -> Option<u32>;
    /// Gives it back.
    fn give_gsi(&self, gsi: u32);
    /// It leads to this message.
    fn route(&self, gsi: u32, message: Message) -> io::Result<()>;
    /// The event raises it, also with what is in it already.
    fn open(&self, event: &EventFd, gsi: u32) -> io::Result<()>;
    /// It does no longer; what has been written until now has raised it.
    fn close(&self, event: &EventFd, gsi: u32) -> io::Result<()>;
}

/// What the guest's registers say of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// None.
    Off,
    /// MSI: `count`, a power of two, of which each takes the lowest bits of the data for its number (PCI 3.0 §6.8.1.6).
    Msi { message: Message, count: u16 },
    /// What the table says.
    Msix {
        /// The function's mask.
        masked: bool,
    },
}

impl Wanted {
    /// The kind, and how many messages of it; a table has as many as it has.
    fn kind(self, table: usize) -> Option<(Irq, u32)> {
        match self {
            Self::Off => None,
            Self::Msi { count, .. } => Some((Irq::Msi, count.into())),
            Self::Msix { .. } => Some((Irq::Msix, table as u32)),
        }
    }
}

#[derive(Clone, Copy)]
struct Entry {
    message: Message,
    control: u32,
}

const AT_RESET: Entry = Entry { message: Message { address: 0, data: 0 }, control: MASK };

struct Way {
    event: EventFd,
    gsi: u32,
    routed: Option<Message>,
    open: bool,
}

struct State {
    table: Vec<Entry>,
    wanted: Wanted,
    /// For as many messages as there is room.
    ways: Vec<Option<Way>>,
    /// The host's error has been logged; a guest can cause it without end.
    complained: bool,
}

impl State {
    /// Where a vector's message goes now; nowhere if it is masked.
    fn message(&self, vector: usize) -> Option<Message> {
        match self.wanted {
            Wanted::Off => None,
            Wanted::Msi { message: Message { address, data }, count } => {
                let low = u32::try_from(vector).ok().filter(|vector| *vector < count.into())?;
                Some(Message { address, data: data & !(u32::from(count) - 1) | low })
            }
            Wanted::Msix { masked } => {
                let entry = self.table.get(vector).filter(|entry| !masked && entry.control & MASK == 0)?;
                Some(entry.message)
            }
        }
    }

    fn complain(&mut self, what: &str, error: &io::Error) {
        if !std::mem::replace(&mut self.complained, true) {
            tracing::error!("a device of the host: {what}: {error} (more of this is not logged)");
        }
    }
}

/// The vectors of one function.
pub(super) struct Vectors {
    plant: Box<dyn Plant>,
    state: Mutex<State>,
}

impl Vectors {
    /// `table`: vectors of MSI-X, 0 to 2048.
    pub(super) fn new(table: u16, plant: Box<dyn Plant>) -> Self {
        let table = vec![AT_RESET; table.into()];
        let state = State { table, wanted: Wanted::Off, ways: Vec::new(), complained: false };
        Self { plant, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's registers say this now. The device has no pin in use, unless this is [`Wanted::Off`].
    pub(super) fn set(&self, wanted: Wanted) {
        let mut state = self.lock();
        let state = &mut *state;
        let table = state.table.len();
        let before = std::mem::replace(&mut state.wanted, wanted);
        if before.kind(table) != wanted.kind(table) {
            self.stop(state, before);
            if let Some((irq, count)) = wanted.kind(table) {
                match self.plant.start(irq, count) {
                    Ok(room) => state.ways.resize_with(room.min(count) as usize, || None),
                    // It is tried again when the guest wants something else.
                    Err(error) => state.complain("its interrupts cannot be had", &error),
                }
            }
        }
        for vector in 0..state.ways.len() {
            self.settle(state, vector);
        }
    }

    /// As at power-on.
    pub(super) fn reset(&self) {
        self.set(Wanted::Off);
        self.lock().table.fill(AT_RESET);
    }

    fn stop(&self, state: &mut State, before: Wanted) {
        let Some((irq, _)) = before.kind(state.table.len()) else { return };
        if let Err(error) = self.plant.stop(irq) {
            state.complain("its interrupts stay on", &error);
        }
        for way in state.ways.drain(..).flatten() {
            if way.open {
                // Cannot fail for one that is there.
                let _ = self.plant.close(&way.event, way.gsi);
            }
            self.plant.give_gsi(way.gsi);
        }
    }

    /// Opens or closes a vector's way, and has it lead where it should.
    fn settle(&self, state: &mut State, vector: usize) {
        let message = state.message(vector);
        let kind = state.wanted.kind(state.table.len());
        let Some(place) = state.ways.get_mut(vector) else { return };
        if let Err(error) = self.settle_way(place, message, kind, vector as u32) {
            state.complain("an interrupt of it is lost", &error);
        }
    }

    fn settle_way(
        &self,
        place: &mut Option<Way>,
        message: Option<Message>,
        kind: Option<(Irq, u32)>,
        vector: u32,
    ) -> io::Result<()> {
        let (Some(message), Some((irq, _))) = (message, kind) else {
            if let Some(way) = place.as_mut().filter(|way| way.open) {
                self.plant.close(&way.event, way.gsi)?;
                way.open = false;
            }
            return Ok(());
        };
        let way = match place {
            Some(way) => way,
            None => place.insert(self.make(irq, vector)?),
        };
        if way.routed != Some(message) {
            self.plant.route(way.gsi, message)?;
            way.routed = Some(message);
        }
        if !way.open {
            self.plant.open(&way.event, way.gsi)?;
            way.open = true;
        }
        Ok(())
    }

    fn make(&self, irq: Irq, vector: u32) -> io::Result<Way> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let gsi = self.plant.take_gsi().ok_or(io::ErrorKind::QuotaExceeded)?;
        if let Err(error) = self.plant.lead(irq, vector, &event) {
            self.plant.give_gsi(gsi);
            return Err(error);
        }
        Ok(Way { event, gsi, routed: None, open: false })
    }

    fn read_word(&self, offset: u64) -> u32 {
        let state = self.lock();
        if let Some(offset) = offset.checked_sub(PENDING) {
            let first = usize::try_from(offset).unwrap_or(usize::MAX).saturating_mul(8);
            let bits = state.ways.iter().skip(first).take(32).enumerate();
            return bits.fold(0, |word, (bit, way)| word | u32::from(is_pending(way.as_ref())) << bit);
        }
        let entry = usize::try_from(offset / ENTRY).ok().and_then(|vector| state.table.get(vector));
        let Some(Entry { message, control }) = entry else { return 0 };
        match offset % ENTRY {
            0 => message.address as u32,
            4 => (message.address >> 32) as u32,
            8 => message.data,
            _ => *control,
        }
    }

    fn write_word(&self, offset: u64, value: u32) {
        let mut state = self.lock();
        let vector = usize::try_from(offset / ENTRY).unwrap_or(usize::MAX);
        let Some(Entry { message, control }) = state.table.get_mut(vector) else { return };
        match offset % ENTRY {
            0 => message.address = message.address & !0xffff_ffff | u64::from(value),
            4 => message.address = message.address & 0xffff_ffff | u64::from(value) << 32,
            8 => message.data = value,
            _ => *control = value & MASK,
        }
        // A message that changes while it is not masked may go to either place (PCI 3.0 §6.8.2.9): it follows at once.
        self.settle(&mut state, vector);
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        self.set(Wanted::Off);
    }
}

/// Whether the device has said something that nobody was told.
fn is_pending(way: Option<&Way>) -> bool {
    let Some(way) = way.filter(|way| !way.open) else { return false };
    // Nobody else reads it while it is closed; what the device adds meanwhile stays.
    way.event.read().is_ok() && way.event.write(1).is_ok()
}

/// The table at 0, the pending bits at [`PENDING`]. Accesses are aligned and four or eight bytes wide; others read as zero and do nothing.
impl BusDevice for Vectors {
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
            for (at, word) in (offset..).step_by(4).zip(data.as_chunks::<4>().0) {
                self.write_word(at, u32::from_le_bytes(*word));
            }
        }
    }
}

fn is_aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

#[cfg(test)]
mod tests;
