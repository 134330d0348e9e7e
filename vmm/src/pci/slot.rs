//! The hot-plug slot of a root port (PCIe 5.0 §6.7, §7.5.3.10-11) as a pure state machine: `(state, input) -> (state, effects)`.
//!
//! ```text
//!             Plug: presence, presence changed, button, link up
//!        ┌───────────────────────────────────────────────────────┐
//!        │                                                       ▼
//!      empty ◀────── AskRemoval: Detach ────────────────────── waits: power off, indicator off
//!        ▲                                                       │ guest switches the slot on
//!        │  guest writes "power off, indicator off":             ▼
//!        │  Detach, presence and link cleared, presence      occupied ◀──┐
//!        │  changed                                          │   │       │ guest clears the button and
//!        │                                                   │   ▼       │ does nothing: may be asked again
//!        └───────────────────────────────────────────────────┴── asked ──┘
//!                                                  AskRemoval: button, link down
//! ```
//!
//! A device has power when its slot has: until then, and when the guest switches the slot off, nothing of it is to be seen but that it is there
//! (§6.7.1.8), and power comes back to a device as after a reset. So a guest that starts does not take, unasked, what has come while it did: it
//! finds the slot occupied and off. What still waits has no driver, and leaves without a word of the guest's.
//!
//! The guest answers a button by letting the power indicator blink for five seconds; a second press then would take the first back. So nothing is
//! asked ([`Slot::pending`]) while the button is unread, the indicator blinks, or a driver has switched the power off but not the indicator.
//! A driver that starts clears what it finds, a button too that was pressed before it could hear: when it lets itself be told of buttons and
//! the device was asked to leave, the button is pressed again. A reset takes a device out that was asked to leave: the guest that was to let
//! it go is no more.
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
    /// The device stays, and has lost its power.
    pub(super) cut: bool,
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

    /// The guest is busy with this slot, or has not read the button.
    pub(super) fn pending(&self) -> bool {
        let busy = self.status & ATTENTION_BUTTON != 0
            || self.control & POWER_INDICATOR == POWER_INDICATOR_BLINK
            || (self.occupied && !self.powered());
        busy && !self.waits()
    }

    /// What is in the slot can be reached.
    pub(super) fn powered(&self) -> bool {
        self.control & POWER_OFF == 0
    }

    /// There is a device that no driver has taken.
    fn waits(&self) -> bool {
        self.occupied && Self::is_off(self.control)
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

    /// The driver lets itself be told of buttons.
    fn listens(&self) -> bool {
        self.control & (INTERRUPT_ENABLE | ATTENTION_BUTTON) == INTERRUPT_ENABLE | ATTENTION_BUTTON
    }

    fn leave(&mut self) {
        (self.occupied, self.link, self.asked) = (false, false, false);
        self.status = self.status & !PRESENCE | PRESENCE_CHANGED;
    }

    pub(super) fn step(self, input: Input) -> (Self, Effects) {
        let (mut next, mut effects) = (self, Effects::default());
        match input {
            Input::Plug if !self.occupied => {
                (next.occupied, next.link, next.asked) = (true, true, false);
                next.status |= PRESENCE | PRESENCE_CHANGED | ATTENTION_BUTTON;
            }
            Input::AskRemoval { .. } if self.waits() => {
                effects.detach = true;
                next.leave();
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
                    next.leave();
                } else if self.occupied && Self::is_on(next.control) {
                    next.link = true;
                }
                effects.cut = next.occupied && self.powered() && !next.powered();
                if next.asked && next.listens() && !self.listens() && !next.pending() {
                    next.status |= ATTENTION_BUTTON;
                    next.link = false;
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
mod tests;
