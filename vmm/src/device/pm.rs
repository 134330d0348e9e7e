//! The power management registers of a PC's chipset: ACPI's fixed hardware (ACPI 6.4 §4.8.3), where the ICH9 has it.
//!
//! ```text
//! +0 PM1 status    write ones to clear; bit 8: the power button was pressed
//! +2 PM1 enable    which of them interrupt
//! +4 PM1 control   bit 0 SCI_EN, always set; bits 10-12 SLP_TYP; bit 13 SLP_EN: sleep now
//! +8 PM timer      32 bits at 3.579545 MHz
//! ```
//!
//! The interrupt (SCI) is level-triggered: up while a bit is set in both of the first two.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{OnPower, PowerRequest, SLEEP_TYPE_S5};
use crate::bus::BusDevice;
use crate::irq::Level;

const TIMER_HZ: u128 = 3_579_545;
const NANOS: u128 = 1_000_000_000;

const BUTTON: u16 = 1 << 8;
const SCI_EN: u16 = 1;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_EN: u16 = 1 << 13;

#[derive(Default)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
    /// Ticks that the timer is ahead of the time since the start: those of the VM that was saved.
    ahead: u32,
}

/// The registers, to be saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPm {
    status: u16,
    enable: u16,
    control: u16,
    timer: u32,
}

/// The registers.
pub struct PmRegisters {
    on_power: OnPower,
    sci: Arc<dyn Level>,
    started: Instant,
    state: Mutex<State>,
}

impl PmRegisters {
    /// I/O ports that they take.
    pub const PORTS: u64 = 12;

    /// Registers that report sleep to `on_power` and interrupt by `sci`.
    pub fn new(on_power: OnPower, sci: Arc<dyn Level>) -> Arc<Self> {
        Arc::new(Self { on_power, sci, started: Instant::now(), state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Presses the power button. A guest that has not enabled it does not notice.
    pub fn press_button(&self) {
        let mut state = self.lock();
        state.status |= BUTTON;
        self.settle(&state);
    }

    /// As at power-on. The timer runs on.
    pub fn reset(&self) {
        let mut state = self.lock();
        *state = State { ahead: state.ahead, ..State::default() };
        self.settle(&state);
    }

    /// The registers.
    pub fn saved(&self) -> SavedPm {
        let state = self.lock();
        let State { status, enable, control, ahead } = *state;
        SavedPm { status, enable, control, timer: self.timer(ahead) }
    }

    /// Goes on from them: the timer from where it stood.
    pub fn restore(&self, saved: &SavedPm) {
        let mut state = self.lock();
        let ahead = saved.timer.wrapping_sub(self.timer(0));
        let control = saved.control & !SLP_EN;
        *state = State { status: saved.status, enable: saved.enable, control, ahead };
        self.settle(&state);
    }

    fn settle(&self, state: &State) {
        self.sci.set(state.status & state.enable != 0);
    }

    fn timer(&self, ahead: u32) -> u32 {
        ((self.started.elapsed().as_nanos() * TIMER_HZ / NANOS) as u32).wrapping_add(ahead)
    }

    fn bytes(&self) -> [u8; Self::PORTS as usize] {
        let mut bytes = [0; Self::PORTS as usize];
        let state = self.lock();
        bytes[0..2].copy_from_slice(&state.status.to_le_bytes());
        bytes[2..4].copy_from_slice(&state.enable.to_le_bytes());
        bytes[4..6].copy_from_slice(&(state.control | SCI_EN).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.timer(state.ahead).to_le_bytes());
        bytes
    }
}

/// Puts `value` into byte `index` of `register`.
fn set_byte(register: &mut u16, index: u64, value: u8) {
    let shift = 8 * (index as u32 & 1);
    *register = *register & !(0xff << shift) | u16::from(value) << shift;
}

impl BusDevice for PmRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| bytes.get(at)).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        for (at, value) in (offset..).zip(data) {
            match at {
                0 | 1 => state.status &= !(u16::from(*value) << (8 * at)),
                2 | 3 => set_byte(&mut state.enable, at, *value),
                4 | 5 => set_byte(&mut state.control, at, *value),
                _ => {}
            }
        }
        self.settle(&state);
        // Reads as zero (§4.8.3.2.1).
        let sleeps = state.control & SLP_EN != 0;
        state.control &= !SLP_EN;
        let kind = state.control >> SLP_TYP_SHIFT & 7;
        drop(state);
        if sleeps && kind == u16::from(SLEEP_TYPE_S5) {
            (self.on_power)(PowerRequest::Off);
        }
    }
}

/// A sleep control register (ACPI 6.4 §4.8.3.7) with its status register after it: another way to soft off, for firmware that knows
/// no other.
pub struct SleepRegister(OnPower);

impl SleepRegister {
    /// I/O ports that it takes.
    pub const PORTS: u64 = 2;

    /// A register that reports to `on_power`.
    pub fn new(on_power: OnPower) -> Self {
        Self(on_power)
    }
}

impl BusDevice for SleepRegister {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const ENABLE: u8 = 1 << 5;
        if let (0, [value]) = (offset, data)
            && value & ENABLE != 0
            && value >> 2 & 7 == SLEEP_TYPE_S5
        {
            (self.0)(PowerRequest::Off);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[derive(Default)]
    struct Wire(AtomicBool);
    impl Level for Wire {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::Relaxed);
        }
    }

    fn rig() -> (Arc<PmRegisters>, Arc<Wire>, Arc<AtomicUsize>, OnPower) {
        let (wire, offs) = (Arc::new(Wire::default()), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&offs);
        let on_power: OnPower = Arc::new(move |request| {
            assert_eq!(request, PowerRequest::Off);
            count.fetch_add(1, Ordering::Relaxed);
        });
        (PmRegisters::new(Arc::clone(&on_power), Arc::clone(&wire) as _), wire, offs, on_power)
    }

    fn get(pm: &PmRegisters, offset: u64) -> u16 {
        let mut data = [0; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_button_interrupts_until_it_is_cleared() {
        let (pm, wire, _, _) = rig();
        let up = || wire.0.load(Ordering::Relaxed);
        pm.press_button();
        assert!(!up());
        pm.write(2, &[0, 1]);
        assert!(up());
        assert_eq!((get(&pm, 0), get(&pm, 2), get(&pm, 4)), (0x100, 0x100, 1));
        pm.write(0, &[0xff, 0]);
        assert!(up(), "another bit");
        pm.write(1, &[1]);
        assert!(!up());
        pm.press_button();
        pm.reset();
        assert_eq!((get(&pm, 0), get(&pm, 2), up()), (0, 0, false));
    }

    #[test]
    fn only_soft_off_ends_the_machine() {
        let (pm, _, offs, on_power) = rig();
        for kind in 0..8u16 {
            pm.write(4, &(kind << 10).to_le_bytes());
            pm.write(4, &(kind << 10 | 1 << 13).to_le_bytes());
            assert_eq!(get(&pm, 4), kind << 10 | 1);
        }
        assert_eq!(offs.load(Ordering::Relaxed), 1);
        pm.write(5, &[5 << 2 | 1 << 5]);
        assert_eq!(offs.load(Ordering::Relaxed), 2, "by its upper byte alone");
        let sleep = SleepRegister::new(on_power);
        for value in 0..=u8::MAX {
            sleep.write(0, &[value]);
            sleep.write(1, &[value]);
        }
        // Whatever the four bits around say.
        assert_eq!(offs.load(Ordering::Relaxed), 2 + 16);
    }

    #[test]
    fn the_timer_runs_and_every_width_is_harmless() {
        let (pm, _, _, _) = rig();
        for offset in 0..PmRegisters::PORTS + 2 {
            for width in 0..9 {
                let mut data = [0xaa; 8];
                pm.read(offset, &mut data[..width]);
                pm.write(offset, &[0; 8][..width]);
            }
        }
        let first = pm.timer(0);
        while pm.timer(0) == first {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn another_goes_on_from_where_the_timer_stood() {
        let (pm, _, _, _) = rig();
        pm.write(2, &[0, 1]);
        pm.press_button();
        let saved = SavedPm { timer: 0xffff_0000, ..pm.saved() };
        let (other, wire, _, _) = rig();
        other.restore(&saved);
        assert!(wire.0.load(Ordering::Relaxed), "the button is still pressed");
        let again = other.saved();
        assert!(again.timer.wrapping_sub(saved.timer) < 0x8000_0000);
        assert_eq!(SavedPm { timer: saved.timer, ..again }, saved);
    }
}
