//! The registers through which processors come and go while the guest runs: methods in the DSDT read and write them.
//!
//! ```text
//! +0 select   the processor that the other two are about
//! +1 status   bit 0: is there · bit 1: has come · bit 2: is to leave; ones written to the last two clear them
//! +2 eject    1: the guest has let it go
//! ```
//!
//! The life of one that can be plugged:
//!
//! ```text
//!            plug: bit 1                          ask: bit 2
//! (absent) ──────────────▶ present ◀──────────────────────────▶ asked, any number of times
//!     ▲                       │                                   │
//!     └──── guest ejects ─────┴────── guest ejects, or reset ─────┘
//! ```
//!
//! As with a device in a slot, a reset takes out what was asked to leave: the guest that was to let it go is no more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::BusDevice;

const PRESENT: u8 = 1 << 0;
const CAME: u8 = 1 << 1;
const LEAVES: u8 = 1 << 2;
const EJECT: u8 = 1;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cpu {
    /// As the guest reads it.
    status: u8,
    /// It was asked to leave, whether the guest has read that or not.
    asked: bool,
    /// There from the start, and for good.
    fixed: bool,
}

impl Cpu {
    fn is_there(self) -> bool {
        self.status & PRESENT != 0
    }

    /// The guest, or a reset, lets it go.
    fn take(&mut self) -> bool {
        let leaves = self.is_there() && !self.fixed;
        if leaves {
            *self = Self::default();
        }
        leaves
    }
}

struct State {
    selected: u8,
    cpus: Vec<Cpu>,
}

/// Told the number of a processor that has left.
pub type OnEject = Box<dyn Fn(u8) + Send + Sync>;

/// The registers.
pub struct CpuController {
    state: Mutex<State>,
    on_eject: OnEject,
}

impl CpuController {
    /// Bytes.
    pub const SIZE: u64 = 3;

    /// Registers for `most` processors, of which the first `boot` are there and stay. `on_eject` is called from vCPUs' threads, and from the
    /// one that resets the machine.
    pub fn new(boot: u8, most: u8, on_eject: OnEject) -> Arc<Self> {
        let cpu = |index| {
            let fixed = index < boot;
            Cpu { status: if fixed { PRESENT } else { 0 }, fixed, asked: false }
        };
        let state = State { selected: 0, cpus: (0..most).map(cpu).collect() };
        Arc::new(Self { state: Mutex::new(state), on_eject })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// By number, whether each is there.
    pub fn present(&self) -> Vec<bool> {
        self.lock().cpus.iter().map(|cpu| cpu.is_there()).collect()
    }

    /// A processor has come. The guest looks when it is told to.
    pub fn plug(&self, index: u8) {
        if let Some(cpu) = self.lock().cpus.get_mut(usize::from(index)).filter(|cpu| !cpu.is_there()) {
            cpu.status = PRESENT | CAME;
        }
    }

    /// A processor is to leave. Returns false where the guest has not read the last request yet, or there is nothing that could leave.
    pub fn ask_removal(&self, index: u8) -> bool {
        let mut state = self.lock();
        let Some(cpu) = state.cpus.get_mut(usize::from(index)) else { return false };
        let can = cpu.is_there() && !cpu.fixed && cpu.status & LEAVES == 0;
        if can {
            cpu.status |= LEAVES;
            cpu.asked = true;
        }
        can
    }

    /// As at power-on, but for the processors that have come and were not asked to leave.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.selected = 0;
        let mut left = Vec::new();
        for (index, cpu) in (0u8..).zip(&mut state.cpus) {
            if cpu.asked && cpu.take() {
                left.push(index);
            }
            cpu.status &= PRESENT;
        }
        drop(state);
        left.into_iter().for_each(&self.on_eject);
    }
}

impl BusDevice for CpuController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.lock();
        if let ([byte], 1) = (data, offset) {
            *byte = state.cpus.get(usize::from(state.selected)).map_or(0, |cpu| cpu.status);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        let mut state = self.lock();
        let selected = state.selected;
        let cpu = state.cpus.get_mut(usize::from(selected));
        match (offset, cpu) {
            (0, _) => state.selected = value,
            (1, Some(cpu)) => cpu.status &= !(value & (CAME | LEAVES)),
            (2, Some(cpu)) if value & EJECT != 0 => {
                let leaves = cpu.take();
                drop(state);
                if leaves {
                    (self.on_eject)(selected);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rig(boot: u8, most: u8) -> (Arc<CpuController>, Arc<Mutex<Vec<u8>>>) {
        let left = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&left);
        (CpuController::new(boot, most, Box::new(move |index| told.lock().unwrap().push(index))), left)
    }

    fn status(cpus: &CpuController, index: u8) -> u8 {
        cpus.write(0, &[index]);
        let mut byte = [0xaa];
        cpus.read(1, &mut byte);
        byte[0]
    }

    #[test]
    fn one_comes_is_asked_to_leave_and_leaves() {
        let (cpus, left) = rig(1, 3);
        assert_eq!([0, 1, 2, 3].map(|i| status(&cpus, i)), [PRESENT, 0, 0, 0]);
        cpus.plug(2);
        assert_eq!((status(&cpus, 2), cpus.present()), (PRESENT | CAME, vec![true, false, true]));
        cpus.write(1, &[CAME]);
        assert_eq!(status(&cpus, 2), PRESENT);
        assert!(cpus.ask_removal(2));
        assert!(!cpus.ask_removal(2), "not read yet");
        assert_eq!(status(&cpus, 2), PRESENT | LEAVES);
        cpus.write(1, &[LEAVES | PRESENT]);
        assert!(cpus.ask_removal(2), "the guest did not do it: asked again");
        cpus.write(2, &[EJECT]);
        assert_eq!((status(&cpus, 2), left.lock().unwrap().clone()), (0, vec![2]));
        cpus.write(2, &[EJECT]);
        assert_eq!(left.lock().unwrap().len(), 1, "once");
    }

    #[test]
    fn those_of_the_start_stay_and_a_reset_takes_who_was_asked() {
        let (cpus, left) = rig(2, 4);
        assert!(!cpus.ask_removal(0) && !cpus.ask_removal(2) && !cpus.ask_removal(200));
        cpus.write(0, &[1]);
        cpus.write(2, &[EJECT]);
        cpus.plug(2);
        cpus.plug(3);
        assert!(cpus.ask_removal(3));
        cpus.write(1, &[LEAVES]);
        cpus.reset();
        assert_eq!((cpus.present(), left.lock().unwrap().clone()), (vec![true, true, true, false], vec![3]));
        assert_eq!(status(&cpus, 2), PRESENT, "found at the start, not plugged");
    }

    proptest! {
        /// Any order of requests and guest accesses: who is there is what came and has not left, and nobody leaves twice or without being there.
        #[test]
        fn presence_is_true(steps in prop::collection::vec((0u8..4, 0u64..5, any::<u8>(), 0usize..4), 0..80)) {
            let (cpus, left) = rig(2, 6);
            let mut there = [true, true, false, false, false, false];
            for (what, offset, value, width) in steps {
                match what {
                    0 if usize::from(value % 8) < there.len() => {
                        cpus.plug(value % 8);
                        there[usize::from(value % 8)] = true;
                    }
                    1 => _ = cpus.ask_removal(value % 8),
                    2 if value > 250 => cpus.reset(),
                    _ => {
                        // Mostly bytes, and a processor that there is.
                        let value = if offset == 0 { value % 8 } else { value };
                        let mut data = vec![value; if width == 0 { 2 } else { 1 }];
                        cpus.write(offset, &data);
                        cpus.read(offset, &mut data);
                    }
                }
                for index in left.lock().unwrap().drain(..) {
                    prop_assert!(index >= 2 && std::mem::replace(&mut there[usize::from(index)], false));
                }
                prop_assert_eq!(&cpus.present()[..], &there[..]);
            }
        }
    }
}
