//! Days of the Gregorian calendar, and the clock's way to write a time down. Pure.

/// A point in time as the clock's registers hold it: ordinary numbers, whatever format the guest has chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Civil {
    pub(super) year: u32,
    /// 1 to 12.
    pub(super) month: u32,
    /// 1 to 31.
    pub(super) day: u32,
    /// 1 is Sunday.
    pub(super) weekday: u32,
    pub(super) hour: u32,
    pub(super) minute: u32,
    pub(super) second: u32,
}

pub(super) const DAY: i64 = 86_400;
/// Days of 400 years, after which the calendar repeats itself.
const ERA: i64 = 146_097;
/// From 1 March of year 0 to 1 January 1970.
const EPOCH: i64 = 719_468;

impl Civil {
    /// `seconds` since 1970, UTC. Years beyond 9999 begin at 0 again: the registers have four digits.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY) as u32);
        let since_march = days.saturating_add(EPOCH);
        let (era, day) = (since_march.div_euclid(ERA), since_march.rem_euclid(ERA));
        // Leap days come each 4 years (1460 days), not each 100 (36,524), and each 400.
        let year = (day - day / 1460 + day / 36_524 - day / (ERA - 1)) / 365;
        let day_of_year = day - (365 * year + year / 4 - year / 100);
        // Months from March on are 153 days for each five.
        let month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        Self {
            year: (era * 400 + year + next).rem_euclid(10_000) as u32,
            month: month as u32,
            day: day as u32,
            // 1 January 1970 was a Thursday.
            weekday: (days + 4).rem_euclid(7) as u32 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    /// Seconds since 1970. Fields that are no time or date are taken for the nearest that is.
    pub(super) fn to_seconds(self) -> i64 {
        let (month, day) = (i64::from(self.month.clamp(1, 12)), i64::from(self.day.clamp(1, 31)));
        let year = i64::from(self.year.min(9999)) - i64::from(month <= 2);
        let month = if month > 2 { month - 3 } else { month + 9 };
        let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
        let day = (153 * month + 2) / 5 + day - 1 + 365 * year + year / 4 - year / 100;
        let time = self.hour.min(23) * 3600 + self.minute.min(59) * 60 + self.second.min(59);
        (era * ERA + day - EPOCH) * DAY + i64::from(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_days() {
        let cases = [
            (0, (1970, 1, 1, 5)),
            (951_782_400, (2000, 2, 29, 3)),
            (951_868_800, (2000, 3, 1, 4)),
            (4_107_456_000, (2100, 2, 28, 1)),
            (4_107_542_400, (2100, 3, 1, 2)),
            (-DAY, (1969, 12, 31, 4)),
            (1_798_761_599, (2026, 12, 31, 5)),
        ];
        for (seconds, expected) in cases {
            let civil = Civil::from_seconds(seconds);
            assert_eq!((civil.year, civil.month, civil.day, civil.weekday), expected, "{seconds}");
        }
    }

    proptest! {
        #[test]
        fn there_and_back(seconds in -62_000_000_000i64..253_000_000_000) {
            let civil = Civil::from_seconds(seconds);
            prop_assert_eq!(civil.to_seconds(), seconds);
            prop_assert!((1..=12).contains(&civil.month) && (1..=31).contains(&civil.day) && (1..=7).contains(&civil.weekday));
        }

        #[test]
        fn no_fields_are_too_odd(fields in any::<[u32; 7]>(), seconds in any::<i64>()) {
            let [year, month, day, weekday, hour, minute, second] = fields;
            let odd = Civil { year, month, day, weekday, hour, minute, second };
            let seconds_of_odd = odd.to_seconds();
            let again = Civil::from_seconds(seconds_of_odd);
            prop_assert_eq!(again.to_seconds(), seconds_of_odd);
            Civil::from_seconds(seconds / 1_000_000);
        }
    }
}
