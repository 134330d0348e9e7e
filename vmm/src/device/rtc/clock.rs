//! The registers of an MC146818 (and their century, as PCs have it) as a pure machine: every call is told what time it is on the host.
//!
//! ```text
//! 0 2 4     seconds, minutes, hours            A   update in progress, divider, periodic rate
//! 1 3 5     the alarm's; 0xc0 and up: any      B   SET, interrupt enables, binary, 24 hours
//! 6 7 8 9   weekday, day, month, year          C   what has happened; a read clears it
//! 0x32      century                            D   the time is valid
//! ```
//!
//! The guest's time is the host's with a distance that a guest which sets the clock changes. While B.SET is on the time registers
//! stand still and hold what is written. Nothing ticks: what has happened since somebody last looked is worked out from the two times, and
//! [`Clock::next`] says when something that interrupts will have happened.

use serde::{Deserialize, Serialize};

use super::calendar::{Civil, DAY};

/// Bytes of memory behind the index register, whose bit 7 is the NMI mask.
pub(super) const SIZE: usize = 128;

const SECONDS: u8 = 0;
const SECONDS_ALARM: u8 = 1;
const MINUTES: u8 = 2;
const MINUTES_ALARM: u8 = 3;
const HOURS: u8 = 4;
const HOURS_ALARM: u8 = 5;
const WEEKDAY: u8 = 6;
const DAY_OF_MONTH: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const A: u8 = 0xa;
const B: u8 = 0xb;
const C: u8 = 0xc;
const D: u8 = 0xd;
/// Where the FADT says that it is.
const CENTURY: u8 = 0x32;
/// Kept in step by the clock.
const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY_OF_MONTH, MONTH, YEAR, CENTURY];

const A_UPDATING: u8 = 0x80;
/// 32.768 kHz, periodic rate 1024 Hz: what PCs start with.
const A_RESET: u8 = 0x26;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 4;
const B_24_HOURS: u8 = 2;
const D_VALID: u8 = 0x80;
/// In the hour of the 12-hour format.
const PM: u8 = 0x80;
/// An alarm register from here on fits any time.
const ANY: u8 = 0xc0;

/// Register C; the enables in B are the same bits.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATED: u8 = 0x10;
const INTERRUPT: u8 = 0x80;

/// Nanoseconds, of all the years that the registers can hold.
type Nanos = i128;

const SECOND: Nanos = 1_000_000_000;
/// The time registers are about to change for so long before they do.
const UPDATE: Nanos = 244_000;
/// More seconds than there are years for.
const AHEAD_MAX: i64 = 1_000_000_000_000;

/// Whole seconds.
fn seconds(time: Nanos) -> i64 {
    time.div_euclid(SECOND) as i64
}

/// The clock and its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Clock {
    bytes: [u8; SIZE],
    index: u8,
    /// Seconds that the guest's clock is ahead of the host's.
    ahead: i64,
    /// Guest's time up to which register C is true.
    seen: Nanos,
}

/// The clock, to be saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRtc {
    bytes: Vec<u8>,
    index: u8,
    ahead: i64,
}

impl Clock {
    /// One that shows the host's time, with `memory` at these places.
    pub(super) fn new(now: Nanos, memory: &[(u8, u8)]) -> Self {
        let mut bytes = [0; SIZE];
        for (at, value) in [(A, A_RESET), (B, B_24_HOURS), (D, D_VALID)].iter().chain(memory) {
            if let Some(byte) = bytes.get_mut(usize::from(*at)) {
                *byte = *value;
            }
        }
        Self { bytes, index: 0, ahead: 0, seen: now }
    }

    /// The reset line: interrupts are off, the time goes on.
    pub(super) fn reset(&mut self, now: Nanos) {
        self.look(now);
        self.index = 0;
        let b = self.byte(B) & !(PERIODIC | ALARM | UPDATED);
        self.put(B, b);
        self.put(C, 0);
    }

    pub(super) fn saved(&self) -> SavedRtc {
        SavedRtc { bytes: self.bytes.to_vec(), index: self.index, ahead: self.ahead }
    }

    /// `None`: no clock has been so.
    pub(super) fn restore(&mut self, saved: &SavedRtc, now: Nanos) -> Option<()> {
        let bytes: [u8; SIZE] = saved.bytes.as_slice().try_into().ok()?;
        let sane = (-AHEAD_MAX..=AHEAD_MAX).contains(&saved.ahead);
        if usize::from(saved.index) >= SIZE || !sane {
            return None;
        }
        (self.bytes, self.index, self.ahead) = (bytes, saved.index, saved.ahead);
        self.seen = self.guest(now);
        Some(())
    }

    fn byte(&self, at: u8) -> u8 {
        self.bytes.get(usize::from(at)).copied().unwrap_or(0)
    }

    fn put(&mut self, at: u8, value: u8) {
        if let Some(byte) = self.bytes.get_mut(usize::from(at)) {
            *byte = value;
        }
    }

    fn guest(&self, now: Nanos) -> Nanos {
        now.saturating_add(Nanos::from(self.ahead) * SECOND)
    }

    fn is_set(&self) -> bool {
        self.byte(B) & B_SET != 0
    }

    fn encode(&self, number: u32) -> u8 {
        let number = (number % 100) as u8;
        if self.byte(B) & B_BINARY != 0 { number } else { (number / 10) * 16 + number % 10 }
    }

    fn decode(&self, value: u8) -> u32 {
        let number = if self.byte(B) & B_BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0xf) };
        u32::from(number)
    }

    fn encode_hour(&self, hour: u32) -> u8 {
        if self.byte(B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u32 {
        if self.byte(B) & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    /// Brings the time registers up to date.
    fn show(&mut self, now: Nanos) {
        if self.is_set() {
            return;
        }
        let civil = Civil::from_seconds(seconds(self.guest(now)));
        let hour = self.encode_hour(civil.hour);
        let shown = [
            self.encode(civil.second),
            self.encode(civil.minute),
            hour,
            self.encode(civil.weekday),
            self.encode(civil.day),
            self.encode(civil.month),
            self.encode(civil.year),
            self.encode(civil.year / 100),
        ];
        for (at, value) in TIME.into_iter().zip(shown) {
            self.put(at, value);
        }
    }

    /// What the time registers say is the time from now on.
    fn take(&mut self, now: Nanos) {
        let get = |at| self.decode(self.byte(at));
        let civil = Civil {
            year: get(CENTURY) * 100 + get(YEAR),
            month: get(MONTH),
            day: get(DAY_OF_MONTH),
            weekday: get(WEEKDAY),
            hour: self.decode_hour(self.byte(HOURS)),
            minute: get(MINUTES),
            second: get(SECONDS),
        };
        self.ahead = civil.to_seconds().saturating_sub(seconds(now));
        self.seen = self.guest(now);
    }

    /// The guest writes the index register.
    pub(super) fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// The guest reads the selected register.
    pub(super) fn read(&mut self, now: Nanos) -> u8 {
        match self.index {
            A => {
                let left = SECOND - self.guest(now).rem_euclid(SECOND);
                let updating = !self.is_set() && left <= UPDATE;
                self.byte(A) & !A_UPDATING | if updating { A_UPDATING } else { 0 }
            }
            C => {
                self.look(now);
                let value = self.byte(C);
                self.put(C, 0);
                value
            }
            at => {
                if TIME.contains(&at) {
                    self.show(now);
                }
                self.byte(at)
            }
        }
    }

    /// The guest writes the selected register.
    pub(super) fn write(&mut self, value: u8, now: Nanos) {
        self.look(now);
        match self.index {
            A => self.put(A, value & !A_UPDATING),
            B => {
                self.show(now);
                let before = self.is_set();
                self.put(B, value);
                if before && !self.is_set() {
                    self.take(now);
                }
                self.judge();
            }
            C | D => {}
            at if TIME.contains(&at) => {
                self.show(now);
                self.put(at, value);
                if !self.is_set() {
                    self.take(now);
                }
            }
            at => self.put(at, value),
        }
    }

    /// Whether the interrupt line is up.
    pub(super) fn interrupts(&self) -> bool {
        self.byte(C) & INTERRUPT != 0
    }

    /// Notes in register C what has happened since the last look.
    pub(super) fn look(&mut self, now: Nanos) {
        let (from, to) = (self.seen, self.guest(now));
        self.seen = to;
        // The host's clock may be set back.
        if to <= from {
            return;
        }
        let mut flags = 0;
        for flag in [PERIODIC, ALARM, UPDATED] {
            if self.next_of(flag, from).is_some_and(|at| at <= to) {
                flags |= flag;
            }
        }
        self.put(C, self.byte(C) | flags);
        self.judge();
    }

    fn judge(&mut self) {
        let c = self.byte(C) & !INTERRUPT;
        let wanted = c & self.byte(B) & (PERIODIC | ALARM | UPDATED) != 0;
        self.put(C, c | if wanted { INTERRUPT } else { 0 });
    }

    /// Nanoseconds from `now` to the next thing that interrupts; none while nothing will, or the line is up already.
    pub(super) fn next(&self, now: Nanos) -> Option<Nanos> {
        if self.interrupts() {
            return None;
        }
        let guest = self.guest(now).max(self.seen);
        let enabled = [PERIODIC, ALARM, UPDATED].into_iter().filter(|flag| self.byte(B) & flag != 0);
        let next = enabled.filter_map(|flag| self.next_of(flag, guest)).min()?;
        Some(next.saturating_sub(self.guest(now)).max(1))
    }

    /// When this happens next after `from`.
    fn next_of(&self, flag: u8, from: Nanos) -> Option<Nanos> {
        match flag {
            PERIODIC => {
                let rate = match self.byte(A) & 0xf {
                    0 => return None,
                    // 256 and 128 Hz, as the two after the slowest would be.
                    low @ (1 | 2) => u32::from(low) + 7,
                    rate => u32::from(rate),
                };
                // Ticks of 32,768 Hz: exact in nanoseconds for a whole second only, so count periods from its beginning.
                let per_second: Nanos = 32_768 >> (rate - 1);
                let second = from.div_euclid(SECOND);
                let done = from.rem_euclid(SECOND) * per_second / SECOND;
                Some(second * SECOND + ((done + 1) * SECOND + per_second - 1) / per_second)
            }
            _ if self.is_set() => None,
            UPDATED => Some((from.div_euclid(SECOND) + 1) * SECOND),
            _ => Some(Nanos::from(self.next_alarm(seconds(from))?) * SECOND),
        }
    }

    /// The first second after `from` that the alarm fits.
    fn next_alarm(&self, from: i64) -> Option<i64> {
        let second = self.byte(SECONDS_ALARM);
        let minute = self.byte(MINUTES_ALARM);
        let hour = self.byte(HOURS_ALARM);
        let fits = |alarm: u8, number: u32, is: u32| alarm >= ANY || number == is;
        let (s, m) = (self.decode(second), self.decode(minute));
        // In the 12-hour format a "don't care" has both of its upper bits set as well.
        let h = self.decode_hour(hour);
        let start = from.checked_add(1)?;
        let midnight = start.div_euclid(DAY).checked_mul(DAY)?;
        let first = start.rem_euclid(DAY) as u32;
        // From there to midnight, and from midnight on.
        [(midnight, first), (midnight.checked_add(DAY)?, 0)].into_iter().find_map(|(midnight, first)| {
            let hours = (first / 3600..24).filter(|n| fits(hour, h, *n));
            let mut minutes = hours.flat_map(|hour| (0..60).map(move |n| (hour, n)));
            minutes.find_map(|(hour, n)| {
                let begin = hour * 3600 + n * 60;
                if !fits(minute, m, n) || begin + 59 < first {
                    return None;
                }
                let mut seconds = (0..60).filter(|n| fits(second, s, *n) && begin + n >= first);
                seconds.next().map(|n| midnight + i64::from(begin + n))
            })
        })
    }
}

#[cfg(test)]
mod tests;
