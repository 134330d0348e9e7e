//! Names of clones from a pattern: `web-%` is web-1, web-2, …; `web-%%%` web-001, web-002, …. Pure.

use crate::fleet::FleetError;
use crate::fleet::spec::check_name;

/// Clones of one call at most.
pub(super) const MOST: u32 = 1000;
/// What stands for the digits of a number.
const DIGIT: char = '%';

/// The first `count` names of the pattern for which `taken` says no. A pattern without a place for the number has it after a dash.
pub(super) fn names(
    pattern: &str,
    count: u32,
    taken: impl Fn(&str) -> bool,
) -> Result<Vec<String>, FleetError> {
    let wrong = |text: String| Err(FleetError::InvalidSpec(text));
    if !(1..=MOST).contains(&count) {
        return wrong(format!("count: {count} is outside 1 to {MOST}"));
    }
    let (before, rest) = match pattern.find(DIGIT) {
        Some(at) => pattern.split_at(at),
        None if pattern.is_empty() => return wrong("pattern: it is empty".to_owned()),
        None => (pattern, ""),
    };
    let after = rest.trim_start_matches(DIGIT);
    if after.contains(DIGIT) {
        return wrong(format!("pattern {pattern:?}: the number has one place: write web-% or web-%%%"));
    }
    let (width, dash) = match rest.len() - after.len() {
        0 => (0, "-"),
        width => (width, ""),
    };
    let mut names = Vec::new();
    // Among so many numbers there are enough that are free: a host has no more VMs than that.
    for number in 1..=count.saturating_add(1_000_000) {
        let name = format!("{before}{dash}{number:0width$}{after}");
        check_name(&name)?;
        if !taken(&name) {
            names.push(name);
        }
        if names.len() == count as usize {
            return Ok(names);
        }
    }
    wrong(format!("pattern {pattern:?}: all its names are taken"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_take_their_place() {
        for (pattern, wanted) in [
            ("web-%", ["web-1", "web-2"]),
            ("web", ["web-1", "web-2"]),
            ("%", ["1", "2"]),
            ("w%%%x", ["w001x", "w002x"]),
        ] {
            assert_eq!(names(pattern, 2, |_| false).unwrap(), wanted);
        }
        assert_eq!(names("a%", 2, |name| name == "a2").unwrap(), ["a1", "a3"]);
        for (pattern, count) in [
            ("", 1),
            ("a%b%", 1),
            ("A%", 1),
            ("a%", 0),
            ("a%", MOST + 1),
            ("-%", 1),
            ("a/%", 1),
            (&"x".repeat(28), 1),
        ] {
            assert!(names(pattern, count, |_| false).is_err(), "{pattern} {count}");
        }
    }

    proptest! {
        #[test]
        fn names_are_distinct_free_and_fit_to_be_names(pattern in "[a-z%-]{0,12}", count in 0_u32..40, every in 1_usize..4) {
            let taken = |name: &str| name.len() % every == 1;
            if let Ok(names) = names(&pattern, count, |name| every < 3 && taken(name)) {
                prop_assert_eq!(names.len(), count as usize);
                let distinct: std::collections::BTreeSet<_> = names.iter().collect();
                prop_assert_eq!(distinct.len(), names.len());
                prop_assert!(names.iter().all(|name| check_name(name).is_ok()));
            }
        }
    }
}
