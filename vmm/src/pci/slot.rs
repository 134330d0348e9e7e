//! The hot-plug slot of a root port (PCIe 5.0 §6.7, §7.5.3.10-11) as a pure state machine: `(state, input) -> (state, effects)`.
//!
//! ```text
//!                    Plug: presence, presence changed, button, link up
//!        ┌────────────────────────────────────────────────────────────────┐
//!        │                                                                ▼
//!      empty                                                          occupied ◀──┐
//!        ▲                                                            │   │       │ guest clears the button and
//!        │  guest writes "power off, indicator off":                  │   │       │ does nothing: may be asked again
//!        │  Detach, presence and link cleared, presence changed       │   ▼       │
//!        └────────────────────────────────────────────────────────────┴── asked ──┘
//!                                                  AskRemoval: button, link down
//! ```
//!
//! The guest answers a button by letting the power indicator blink for five seconds; a second press then would take the first back. So nothing is
//! asked ([`Slot::pending`]) while the button is unread, the indicator blinks, or the power is off though a device is there. A reset
//! takes a device out that was asked to leave: the guest that was to let it go is no more.
//!
//! The link goes down when a device is asked to leave, and comes up again when the guest switches the slot on: it keeps the device.
//!
//! Event bits stay until the driver writes ones to them, and a write clears exactly the ones written, so an event that comes between
//! the driver's read and its write of *other* bits survives.

use serde::{Deserialize, Serialize};

/// Slot control and slot status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Slot {
    occupied: bool,
    asked: bool,
    link: bool,
    control: u16,
    status: u16,
}

/// What can happen to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// A device has come. Only into an empty slot.
    Plug,
    /// The device is to leave. Only from an occupied slot.
    AskRemoval {
        /// Its presence changes, too: the guest lets it go at once.
        fast: bool,
    },
    /// The driver writes slot control.
    Control(u16),
    /// The driver writes slot status.
    Status(u16),
    /// The machine is reset.
    Reset,
}

/// What the port has to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Effects {
    /// The device leaves.
    pub(super) detach: bool,
    /// An event has come that the driver wants to hear of: one message.
    pub(super) message: bool,
}

/// Why a device cannot come or go now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Guest is still on the fly of another (un)plugging")]
pub struct Pending;

pub(super) const ATTENTION_BUTTON: u16 = 1 << 0;
const PRESENCE_CHANGED: u16 = 1 << 3;
const COMMAND_COMPLETED: u16 = 1 << 4;
const PRESENCE: u16 = 1 << 6;
/// Button, power fault, latch, presence, command completed, link state.
const EVENTS: u16 = 0x11f;

/// Enable bits of the events that there are lie at the same place in slot control.
const EVENT_ENABLES: u16 = ATTENTION_BUTTON | PRESENCE_CHANGED | COMMAND_COMPLETED;
const INTERRUPT_ENABLE: u16 = 1 << 5;
const ATTENTION_OFF: u16 = 3 << 6;
const POWER_INDICATOR: u16 = 3 << 8;
const POWER_INDICATOR_ON: u16 = 1 << 8;
const POWER_INDICATOR_BLINK: u16 = 2 << 8;
const POWER_INDICATOR_OFF: u16 = 3 << 8;
const POWER_OFF: u16 = 1 << 10;
/// All but the lock, which there is none of.
const CONTROL_WRITABLE: u16 = 0x17ff;

impl Slot {
    pub(super) fn new(occupied: bool) -> Self {
        let control = if occupied { POWER_INDICATOR_ON } else { POWER_INDICATOR_OFF | POWER_OFF };
        let status = if occupied { PRESENCE } else { 0 };
        Self { occupied, asked: false, link: occupied, control: control | ATTENTION_OFF, status }
    }

    pub(super) fn occupied(&self) -> bool {
        self.occupied
    }

    /// One whose bits a driver and a guest can have set.
    pub(super) fn makes_sense(&self) -> bool {
        self.control & !CONTROL_WRITABLE == 0
            && self.status & !(EVENTS | PRESENCE) == 0
            && (self.status & PRESENCE != 0) == self.occupied
            // The link of one that was asked to leave is down, or up again.
            && (self.link == self.occupied || self.asked)
            && (self.occupied || !(self.asked || self.link))
    }

    pub(super) fn link(&self) -> bool {
        self.link
    }

    pub(super) fn control(&self) -> u16 {
        self.control
    }

    pub(super) fn status(&self) -> u16 {
        self.status
    }

    /// The guest is busy with this slot, or has not looked yet.
    pub(super) fn pending(&self) -> bool {
        self.status & ATTENTION_BUTTON != 0
            || self.control & POWER_INDICATOR == POWER_INDICATOR_BLINK
            || (self.occupied && self.control & POWER_OFF != 0)
    }

    /// The level of the port's interrupt.
    pub(super) fn interrupt(&self) -> bool {
        self.control & INTERRUPT_ENABLE != 0 && self.control & self.status & EVENT_ENABLES != 0
    }

    fn is_on(control: u16) -> bool {
        control & POWER_OFF == 0 && control & POWER_INDICATOR == POWER_INDICATOR_ON
    }

    fn is_off(control: u16) -> bool {
        control & POWER_OFF != 0 && control & POWER_INDICATOR == POWER_INDICATOR_OFF
    }

    pub(super) fn step(self, input: Input) -> (Self, Effects) {
        let (mut next, mut effects) = (self, Effects::default());
        match input {
            Input::Plug if !self.occupied => {
                (next.occupied, next.link, next.asked) = (true, true, false);
                next.status |= PRESENCE | PRESENCE_CHANGED | ATTENTION_BUTTON;
            }
            Input::AskRemoval { fast } if self.occupied => {
                (next.asked, next.link) = (true, false);
                next.status |= ATTENTION_BUTTON | if fast { PRESENCE_CHANGED } else { 0 };
            }
            Input::Plug | Input::AskRemoval { .. } => {}
            Input::Control(value) => {
                next.control = value & CONTROL_WRITABLE;
                next.status |= COMMAND_COMPLETED;
                if self.occupied && Self::is_off(next.control) && !Self::is_off(self.control) {
                    effects.detach = true;
                    (next.occupied, next.link, next.asked) = (false, false, false);
                    next.status = next.status & !PRESENCE | PRESENCE_CHANGED;
                } else if self.occupied && Self::is_on(next.control) {
                    next.link = true;
                }
            }
            Input::Status(value) => next.status &= !(value & EVENTS),
            Input::Reset => {
                effects.detach = self.occupied && self.asked;
                next = Self::new(self.occupied && !self.asked);
            }
        }
        effects.message = next.interrupt() && !self.interrupt();
        (next, effects)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All that Linux enables: button, presence, command completed, interrupts.
    const ENABLED: u16 = EVENT_ENABLES | INTERRUPT_ENABLE;
    const ON: u16 = ENABLED | ATTENTION_OFF | POWER_INDICATOR_ON;
    const BLINK: u16 = ENABLED | ATTENTION_OFF | POWER_INDICATOR_BLINK;

    const ASK: Input = Input::AskRemoval { fast: false };

    fn run(slot: Slot, inputs: &[Input]) -> (Slot, Vec<Effects>) {
        let mut slot = slot;
        let effects = inputs.iter().map(|input| {
            let (next, effects) = slot.step(*input);
            slot = next;
            effects
        });
        let effects = effects.collect();
        (slot, effects)
    }

    #[test]
    fn a_device_comes_and_goes_as_linux_does_it() {
        let off = ENABLED | ATTENTION_OFF | POWER_INDICATOR_OFF | POWER_OFF;
        let (slot, _) = run(Slot::new(false), &[Input::Control(off), Input::Status(EVENTS)]);
        assert!(!slot.interrupt() && !slot.pending());
        let (slot, effects) = run(slot, &[Input::Plug]);
        assert_eq!(effects, [Effects { detach: false, message: true }]);
        assert_eq!(slot.status(), PRESENCE | PRESENCE_CHANGED | ATTENTION_BUTTON);
        assert!(slot.link() && slot.pending());
        // Read and cleared, power on, indicator on.
        let status = slot.status();
        let on = off & !POWER_OFF & !POWER_INDICATOR | POWER_INDICATOR_BLINK;
        let (slot, effects) = run(slot, &[Input::Status(status), Input::Control(on), Input::Status(0x10)]);
        assert_eq!(effects.iter().filter(|e| e.message).count(), 1, "command completed");
        let (slot, _) = run(slot, &[Input::Control(ON), Input::Status(0x10)]);
        assert!(!slot.pending() && slot.occupied);

        let (slot, effects) = run(slot, &[ASK, Input::Status(1), Input::Control(BLINK)]);
        assert!(effects[0].message && slot.pending() && slot.occupied && !slot.link());
        let power_off = BLINK | POWER_OFF;
        let (slot, effects) =
            run(slot, &[Input::Status(0x10), Input::Control(power_off), Input::Control(off)]);
        assert_eq!(effects.iter().map(|e| e.detach).collect::<Vec<_>>(), [false, false, true]);
        assert!(!slot.occupied && !slot.link());
        assert_eq!(slot.status() & (PRESENCE | PRESENCE_CHANGED), PRESENCE_CHANGED);
        let (slot, _) = run(slot, &[Input::Status(EVENTS)]);
        assert!(!slot.pending(), "ready for the next one");
    }

    #[test]
    fn a_request_that_the_guest_missed_can_be_made_again() {
        let (slot, _) = run(Slot::new(true), &[ASK]);
        assert!(slot.pending());
        // A driver that starts clears what it finds.
        let (slot, _) = run(slot, &[Input::Status(0x17)]);
        assert!(!slot.pending() && !slot.link());
        let (slot, _) = run(slot, &[Input::Control(ON), Input::Status(0x10)]);
        assert!(slot.link(), "the guest keeps it");
        let (slot, effects) = run(slot, &[ASK]);
        assert!(effects[0].message && slot.pending());
    }

    #[test]
    fn an_event_between_read_and_clear_of_others_survives() {
        let (slot, _) = run(Slot::new(false), &[Input::Control(ON), Input::Plug]);
        let seen = COMMAND_COMPLETED;
        let (slot, _) = run(slot, &[Input::Status(seen)]);
        assert_eq!(slot.status() & EVENTS, PRESENCE_CHANGED | ATTENTION_BUTTON);
        assert!(slot.interrupt());
    }

    #[test]
    fn a_reset_takes_out_what_was_asked_to_leave() {
        let (slot, effects) = run(Slot::new(true), &[ASK, Input::Reset]);
        assert!(effects[1].detach);
        assert_eq!(slot, Slot::new(false));
        let (slot, effects) = run(Slot::new(true), &[Input::Control(BLINK), Input::Reset]);
        assert!(!effects[1].detach);
        assert_eq!(slot, Slot::new(true));
    }

    #[test]
    fn a_fast_request_says_that_the_device_is_gone() {
        let (slot, effects) = run(
            Slot::new(true),
            &[Input::Control(ON), Input::Status(EVENTS), Input::AskRemoval { fast: true }],
        );
        assert!(effects[2].message && slot.pending());
        assert_eq!(slot.status(), PRESENCE | PRESENCE_CHANGED | ATTENTION_BUTTON);
    }

    fn any_input() -> impl Strategy<Value = Input> {
        prop_oneof![
            Just(Input::Plug),
            any::<bool>().prop_map(|fast| Input::AskRemoval { fast }),
            any::<u16>().prop_map(Input::Control),
            prop::sample::select(vec![ON, BLINK, BLINK | POWER_OFF, ON | POWER_OFF | POWER_INDICATOR_OFF])
                .prop_map(Input::Control),
            any::<u16>().prop_map(Input::Status),
            Just(Input::Status(EVENTS)),
            Just(Input::Reset),
        ]
    }

    #[test]
    fn a_slot_that_no_guest_can_have_made_is_told_apart() {
        let good = Slot::new(true);
        assert!(good.makes_sense() && Slot::new(false).makes_sense());
        for bad in [
            Slot { occupied: false, ..good },
            Slot { link: false, ..good },
            Slot { status: 0, ..good },
            Slot { status: PRESENCE | 0x200, ..good },
            Slot { control: 0x2000, ..good },
            Slot { asked: true, ..Slot::new(false) },
        ] {
            assert!(!bad.makes_sense(), "{bad:?}");
        }
    }

    proptest! {
        /// Any order of requests and guest writes: presence is true to the device, a device leaves at most once and only when the guest
        /// or a reset lets it, and the driver gets a message exactly when its interrupt rises.
        #[test]
        fn the_slot_is_true_to_its_device(cold: bool, inputs in prop::collection::vec(any_input(), 0..80)) {
            let mut slot = Slot::new(cold);
            let mut device = cold;
            for input in inputs {
                let (next, effects) = slot.step(input);
                if input == Input::Plug {
                    device = true;
                }
                if effects.detach {
                    prop_assert!(device, "left twice");
                    prop_assert!(matches!(input, Input::Control(_) | Input::Reset));
                    device = false;
                }
                prop_assert_eq!(next.occupied, device);
                prop_assert_eq!(next.status() & PRESENCE != 0, device);
                prop_assert!(device || !next.link());
                match input {
                    Input::Plug if !slot.occupied => prop_assert!(next.link()),
                    Input::AskRemoval { .. } => prop_assert!(!next.link()),
                    Input::Control(value) if device && Slot::is_on(value) => prop_assert!(next.link()),
                    Input::Reset => prop_assert_eq!(next.link(), device),
                    _ if device => prop_assert_eq!(next.link(), slot.link()),
                    _ => {}
                }
                prop_assert_eq!(effects.message, next.interrupt() && !slot.interrupt());
                if let Input::Status(value) = input {
                    prop_assert_eq!(next.status(), slot.status() & !(value & EVENTS));
                } else if input != Input::Reset {
                    prop_assert_eq!(slot.status() & EVENTS & !next.status(), 0, "events are not lost");
                }
                slot = next;
            }
            // Whatever has happened: a guest by the book can let any device go.
            let book = [Input::Control(ON), ASK, Input::Status(EVENTS), Input::Control(BLINK),
                Input::Control(BLINK | POWER_OFF), Input::Control(ON | POWER_OFF | POWER_INDICATOR_OFF)];
            let (end, _) = run(slot, &book);
            prop_assert!(!end.occupied);
        }
    }
}
