use proptest::prelude::*;

use super::*;

/// 2026-03-14 15:09:26.5 UTC, a Saturday.
const NOW: Nanos = 1_773_500_966 * SECOND + SECOND / 2;

fn get(clock: &mut Clock, at: u8, now: Nanos) -> u8 {
    clock.select(at);
    clock.read(now)
}

fn set(clock: &mut Clock, at: u8, value: u8, now: Nanos) {
    clock.select(at);
    clock.write(value, now);
}

fn time(clock: &mut Clock, now: Nanos) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY_OF_MONTH, WEEKDAY, HOURS, MINUTES, SECONDS].map(|at| get(clock, at, now))
}

#[test]
fn shows_the_time_in_each_format() {
    let mut clock = Clock::new(NOW, &[(0x34, 0x12)]);
    assert_eq!(time(&mut clock, NOW), [0x20, 0x26, 3, 0x14, 7, 0x15, 9, 0x26]);
    set(&mut clock, B, B_BINARY | B_24_HOURS, NOW);
    assert_eq!(time(&mut clock, NOW), [20, 26, 3, 14, 7, 15, 9, 26]);
    set(&mut clock, B, 0, NOW);
    assert_eq!(get(&mut clock, HOURS, NOW), PM | 3);
    // Noon and midnight.
    assert_eq!(get(&mut clock, HOURS, NOW - 3 * 3600 * SECOND), PM | 0x12);
    assert_eq!(get(&mut clock, HOURS, NOW + 9 * 3600 * SECOND), 0x12);
    assert_eq!((get(&mut clock, 0x34, NOW), get(&mut clock, D, NOW)), (0x12, D_VALID));
}

#[test]
fn can_be_set_all_at_once_and_bit_by_bit() {
    let mut clock = Clock::new(NOW, &[]);
    set(&mut clock, B, B_SET | B_24_HOURS, NOW);
    let wanted = [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY_OF_MONTH, 0x31), (HOURS, 0x23)];
    for (at, value) in wanted.into_iter().chain([(MINUTES, 0x59), (SECONDS, 0x58)]) {
        set(&mut clock, at, value, NOW);
    }
    // Stands still.
    assert_eq!(get(&mut clock, SECONDS, NOW + 5 * SECOND), 0x58);
    set(&mut clock, B, B_24_HOURS, NOW);
    assert_eq!(time(&mut clock, NOW + SECOND), [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]);
    assert_eq!(time(&mut clock, NOW + 2 * SECOND), [0x20, 0, 1, 1, 7, 0, 0, 0]);
    set(&mut clock, YEAR, 0x30, NOW);
    assert_eq!(time(&mut clock, NOW)[..2], [0x19, 0x30]);
}

#[test]
fn says_that_it_is_about_to_change() {
    let mut clock = Clock::new(NOW, &[]);
    let end = NOW + SECOND / 2;
    for (at, updating) in
        [(NOW, false), (end - UPDATE - 1, false), (end - UPDATE, true), (end - 1, true), (end, false)]
    {
        assert_eq!(get(&mut clock, A, at) & A_UPDATING != 0, updating);
    }
}

#[test]
fn an_alarm_interrupts_once() {
    let mut clock = Clock::new(NOW, &[]);
    for (at, value) in [(SECONDS_ALARM, 0x30), (MINUTES_ALARM, 9), (HOURS_ALARM, 0x15)] {
        set(&mut clock, at, value, NOW);
    }
    assert_eq!(clock.next(NOW), None, "not enabled");
    set(&mut clock, B, ALARM | B_24_HOURS, NOW);
    assert_eq!(clock.next(NOW), Some(3 * SECOND + SECOND / 2));
    clock.look(NOW + 3 * SECOND);
    assert!(!clock.interrupts());
    clock.look(NOW + 4 * SECOND);
    assert!(clock.interrupts() && clock.next(NOW + 4 * SECOND).is_none());
    assert_eq!(get(&mut clock, C, NOW + 4 * SECOND), INTERRUPT | PERIODIC | ALARM | UPDATED);
    assert!(!clock.interrupts());
    // Tomorrow.
    assert_eq!(clock.next(NOW + 4 * SECOND), Some(Nanos::from(DAY) * SECOND - SECOND / 2));
    set(&mut clock, MINUTES_ALARM, 0xff, NOW + 4 * SECOND);
    assert_eq!(clock.next(NOW + 4 * SECOND), Some(59 * SECOND + SECOND / 2));
}

#[test]
fn ticks_at_the_rates_of_a_pc() {
    let mut clock = Clock::new(NOW, &[]);
    set(&mut clock, B, PERIODIC | B_24_HOURS, NOW);
    assert_eq!(clock.next(NOW), Some((SECOND + 1023) / 1024));
    for (rate, per_second) in [(1, 256), (2, 128), (3, 8192), (15, 2)] {
        set(&mut clock, A, 0x20 | rate, NOW);
        get(&mut clock, C, NOW);
        let next = clock.next(NOW).unwrap();
        assert!((next - SECOND / per_second).abs() <= 1, "rate {rate}: {next}");
    }
    set(&mut clock, A, 0x20, NOW);
    assert_eq!(clock.next(NOW), None);
}

#[test]
fn a_reset_keeps_the_time_and_takes_interrupts_away() {
    let mut clock = Clock::new(NOW, &[(0x5b, 7)]);
    set(&mut clock, YEAR, 0x30, NOW);
    set(&mut clock, B, UPDATED | B_24_HOURS, NOW);
    clock.look(NOW + SECOND);
    clock.reset(NOW + SECOND);
    assert!(!clock.interrupts() && clock.next(NOW + SECOND).is_none());
    assert_eq!((get(&mut clock, YEAR, NOW), get(&mut clock, 0x5b, NOW)), (0x30, 7));
}

#[test]
fn goes_on_from_what_was_saved() {
    let mut first = Clock::new(NOW, &[]);
    set(&mut first, YEAR, 0x30, NOW);
    let mut second = Clock::new(NOW, &[]);
    second.restore(&first.saved(), NOW).unwrap();
    assert_eq!(time(&mut second, NOW), time(&mut first, NOW));
    let mut odd = first.saved();
    odd.index = 128;
    assert!(second.restore(&odd, NOW).is_none());
    let mut odd = first.saved();
    odd.bytes.pop();
    assert!(second.restore(&odd, NOW).is_none());
    let mut odd = first.saved();
    odd.ahead = -AHEAD_MAX - 1;
    assert!(second.restore(&odd, NOW).is_none());
}

proptest! {
    /// Whatever is written, and whatever the host's clock does, the clock answers, and what it waits for comes.
    #[test]
    fn no_order_of_writes_confuses_it(
        steps in prop::collection::vec((any::<u8>(), any::<u8>(), any::<bool>(), -3i64..90), 1..60),
    ) {
        let (mut clock, mut now) = (Clock::new(NOW, &[]), NOW);
        for (at, value, write, passed) in steps {
            now += Nanos::from(passed) * SECOND / 3;
            clock.select(at);
            if write { clock.write(value, now) } else { clock.read(now); }
            prop_assert!(usize::from(clock.index) < SIZE);
            if let Some(wait) = clock.next(now) {
                prop_assert!(wait > 0);
                let mut later = clock.clone();
                later.look(now + wait);
                prop_assert!(later.interrupts());
            }
        }
        let mut again = Clock::new(now, &[]);
        prop_assert!(again.restore(&clock.saved(), now).is_some());
    }
}
