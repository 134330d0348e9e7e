//! Slots as drivers and attackers use them.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

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
    assert_eq!(effects, [Effects { message: true, ..Effects::default() }]);
    assert_eq!(slot.status(), PRESENCE | PRESENCE_CHANGED | ATTENTION_BUTTON);
    assert!(slot.link() && slot.waits() && !slot.powered());
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
    let (slot, effects) = run(slot, &[Input::Status(0x10), Input::Control(power_off), Input::Control(off)]);
    assert_eq!(effects.iter().map(|e| e.detach).collect::<Vec<_>>(), [false, false, true]);
    assert_eq!(effects.iter().map(|e| e.cut).collect::<Vec<_>>(), [false, true, false]);
    assert!(!slot.occupied && !slot.link());
    assert_eq!(slot.status() & (PRESENCE | PRESENCE_CHANGED), PRESENCE_CHANGED);
    let (slot, _) = run(slot, &[Input::Status(EVENTS)]);
    assert!(!slot.pending(), "ready for the next one");
}

#[test]
fn a_request_that_the_guest_missed_can_be_made_again() {
    let (slot, _) = run(Slot::new(true), &[Input::Control(ON), ASK]);
    assert!(slot.pending());
    // It clears what it finds, and does nothing.
    let (slot, _) = run(slot, &[Input::Status(0x17)]);
    assert!(!slot.pending() && !slot.link());
    let (slot, _) = run(slot, &[Input::Control(ON), Input::Status(0x10)]);
    assert!(slot.link(), "the guest keeps it");
    let (slot, effects) = run(slot, &[ASK]);
    assert!(effects[0].message && slot.pending());
}

#[test]
fn what_the_guest_has_not_taken_leaves_at_once_and_the_slot_can_be_used_again() {
    let off = ENABLED | ATTENTION_OFF | POWER_INDICATOR_OFF | POWER_OFF;
    let mut slot = Slot::new(false);
    // Before any driver, and with one that has been told and has not answered.
    for _ in 0..2 {
        let (next, effects) = run(slot, &[Input::Plug, ASK]);
        assert!(!effects[0].detach && effects[1].detach);
        assert!(!next.occupied && !next.link() && !next.pending() || next.status() & ATTENTION_BUTTON != 0);
        assert_eq!(next.status() & (PRESENCE | PRESENCE_CHANGED), PRESENCE_CHANGED);
        (slot, _) = run(next, &[Input::Status(EVENTS), Input::Control(off), Input::Status(EVENTS)]);
    }
    // A driver that has begun with it is asked like any other.
    let begun = off & !POWER_INDICATOR | POWER_INDICATOR_BLINK;
    let (slot, _) = run(slot, &[Input::Plug, Input::Status(EVENTS), Input::Control(begun)]);
    assert!(slot.pending() && slot.occupied && !slot.powered());
    let (slot, _) = run(slot, &[Input::Control(BLINK), Input::Control(ON), Input::Status(EVENTS)]);
    assert!(!slot.pending() && slot.powered());
    let (slot, effects) = run(slot, &[ASK]);
    assert!(!effects[0].detach && slot.occupied && slot.pending());
}

#[test]
fn a_button_that_a_driver_cleared_before_it_could_hear_is_pressed_again() {
    let deaf = ATTENTION_OFF | POWER_INDICATOR_ON;
    for first in [Input::Status(EVENTS), Input::Control(deaf)] {
        let (slot, effects) = run(Slot::new(true), &[ASK, first, Input::Status(EVENTS), Input::Control(ON)]);
        assert!(effects[3].message && slot.pending() && slot.status() & ATTENTION_BUTTON != 0);
        assert!(!slot.link());
    }
    // Not one that was answered, and not where nobody has asked.
    let answered = [Input::Control(ON), ASK, Input::Status(EVENTS), Input::Control(BLINK)];
    let (slot, _) = run(Slot::new(true), &answered);
    let (slot, _) = run(slot, &[Input::Control(BLINK & !ENABLED), Input::Control(BLINK)]);
    assert_eq!(slot.status() & ATTENTION_BUTTON, 0, "a second press would take it back");
    let (slot, _) = run(Slot::new(true), &[Input::Control(ON)]);
    assert_eq!(slot.status() & ATTENTION_BUTTON, 0);
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
    let (slot, effects) =
        run(Slot::new(true), &[Input::Control(ON), Input::Status(EVENTS), Input::AskRemoval { fast: true }]);
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
            let asked = matches!(input, Input::AskRemoval { .. });
            if effects.detach {
                prop_assert!(device, "left twice");
                prop_assert!(asked && slot.waits() || matches!(input, Input::Control(_) | Input::Reset));
                device = false;
            }
            prop_assert!(!asked || !slot.waits() || !device, "nobody else would let it go");
            prop_assert_eq!(effects.cut, device && slot.powered() && !next.powered());
            prop_assert!(!effects.cut || matches!(input, Input::Control(_)));
            prop_assert_eq!(next.occupied, device);
            prop_assert_eq!(next.status() & PRESENCE != 0, device);
            prop_assert!(device || !next.link());
            match input {
                Input::Plug if !slot.occupied => prop_assert!(next.link()),
                Input::AskRemoval { .. } => prop_assert!(!next.link()),
                Input::Control(value) if device && Slot::is_on(value) => {
                    let again = next.status() & !slot.status() & ATTENTION_BUTTON != 0;
                    prop_assert_eq!(next.link(), !again);
                }
                Input::Control(_) if device => prop_assert!(slot.link() || !next.link()),
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

/// What a system does with a port: as Linux's pciehp does it, a step at a time, so that anything can happen between two steps.
#[derive(Debug, Default)]
struct Driver {
    step: usize,
    /// What it believes: there is a device that it drives.
    on: bool,
    blinks: bool,
}

impl Driver {
    /// Steps of its start.
    const START: usize = 5;

    /// The next step of its start, or its answer to an interrupt. Returns what it writes.
    fn next(&mut self, slot: Slot) -> Vec<Input> {
        let control = |clear: u16, set: u16| Input::Control(slot.control() & !clear | set);
        let events = slot.status() & EVENTS;
        let power = |on: bool| {
            let indicator = if on { POWER_INDICATOR_ON } else { POWER_INDICATOR_OFF };
            let blink = if on { POWER_INDICATOR_BLINK } else { POWER_INDICATOR_ON };
            let other = if on { 0 } else { POWER_OFF };
            let with = |indicator| control(POWER_INDICATOR | POWER_OFF, indicator | other);
            vec![with(blink), Input::Status(COMMAND_COMPLETED), with(indicator)]
        };
        if slot.interrupt() {
            let mut writes = vec![Input::Status(events)];
            let (button, present) = (events & ATTENTION_BUTTON != 0, slot.status() & PRESENCE != 0);
            if events & PRESENCE_CHANGED != 0 {
                // Gone, or another: the old one is given up, and what is there is taken.
                if std::mem::take(&mut self.on) {
                    writes.extend(power(false));
                }
                self.blinks = false;
                if present && !writes.iter().any(|w| matches!(w, Input::Control(_))) {
                    self.on = true;
                    writes.extend(power(true));
                }
            } else if button && self.on {
                self.blinks = true;
                writes.push(control(POWER_INDICATOR, POWER_INDICATOR_BLINK));
            }
            return writes;
        }
        if self.step < Self::START {
            self.step += 1;
            return match self.step {
                // The bus is looked at: what has power is driven from now on.
                1 => {
                    self.on = slot.occupied && slot.powered();
                    Vec::new()
                }
                2 => vec![control(ENABLED, 0)],
                3 => vec![Input::Status(events)],
                4 => vec![control(0, ENABLED)],
                _ if slot.occupied && !self.on => {
                    self.on = true;
                    power(true)
                }
                _ => Vec::new(),
            };
        }
        if std::mem::take(&mut self.blinks) {
            self.on = false;
            return power(false);
        }
        Vec::new()
    }

    fn is_idle(&self, slot: Slot) -> bool {
        self.step == Self::START && !slot.interrupt() && !self.blinks
    }
}

#[derive(Debug, Clone, Copy)]
enum Host {
    Plug,
    Ask,
    Reset,
    /// The guest goes on by so many writes.
    Guest(usize),
}

fn any_host() -> impl Strategy<Value = Host> {
    prop_oneof![
        3 => Just(Host::Plug),
        3 => Just(Host::Ask),
        1 => Just(Host::Reset),
        6 => (1usize..6).prop_map(Host::Guest),
    ]
}

proptest! {
    /// A system that starts, and starts again, while devices come and are asked to leave at any moment: each that was plugged is taken, each that
    /// was asked to leave and not refused leaves, once, and the slot can be used again.
    #[test]
    fn no_request_is_lost_on_a_system_that_starts(
        cold: bool, fast: bool, steps in prop::collection::vec(any_host(), 0..40)
    ) {
        let (mut slot, mut driver, mut queue) = (Slot::new(cold), Driver::default(), VecDeque::new());
        // What the last accepted request wants.
        let mut wanted = cold;
        // One left while the driver was about to take it: what comes in its place then may be taken for it, and thrown out.
        let mut mistaken = false;
        let go = |slot: &mut Slot, driver: &mut Driver, queue: &mut VecDeque<Input>| {
            if queue.is_empty() {
                queue.extend(driver.next(*slot));
            }
            if let Some(input) = queue.pop_front() {
                *slot = slot.step(input).0;
            }
        };
        for step in steps {
            match step {
                Host::Plug if !slot.occupied => {
                    slot = slot.step(Input::Plug).0;
                    wanted = true;
                }
                Host::Ask if slot.occupied && !slot.pending() => {
                    mistaken |= slot.waits() && !queue.is_empty();
                    slot = slot.step(Input::AskRemoval { fast }).0;
                    wanted = false;
                }
                Host::Plug | Host::Ask => {}
                Host::Reset => {
                    slot = slot.step(Input::Reset).0;
                    (driver, queue) = (Driver::default(), VecDeque::new());
                    prop_assert!(slot.occupied == wanted || mistaken && wanted);
                    (wanted, mistaken) = (slot.occupied, false);
                }
                Host::Guest(writes) => (0..writes).for_each(|_| go(&mut slot, &mut driver, &mut queue)),
            }
        }
        for _ in 0..200 {
            go(&mut slot, &mut driver, &mut queue);
        }
        prop_assert!(driver.is_idle(slot) && queue.is_empty());
        prop_assert!(slot.occupied == wanted || mistaken && wanted, "{:?} {:?}", slot, driver);
        prop_assert_eq!(slot.occupied && slot.powered(), driver.on);
        prop_assert!(!slot.pending(), "{:?}", slot);
    }
}
