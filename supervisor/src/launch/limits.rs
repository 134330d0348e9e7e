//! Limits of a definition as properties of the VM's unit (org.freedesktop.systemd1(5), systemd.resource-control(5)): a pure function.

use dbus_api::spec::Limits;
use zbus::Variant;

use crate::fleet::spec::parse_set;

/// systemd's "not set" and "no limit".
const NONE: u64 = u64::MAX;

/// Every property that limits may set, with its value; what is not limited gets systemd's "no limit", so that a limit can also be taken back.
pub(super) fn properties(limits: &Limits) -> Vec<(&'static str, Variant<'static>)> {
    let number = |value: Option<u64>| Variant::from(value.unwrap_or(NONE));
    let weight = |value: Option<u16>| number(value.map(u64::from));
    let set = |text: &Option<String>| Variant::from(text.as_deref().and_then(parse_set).unwrap_or_default());
    vec![
        ("CPUWeight", weight(limits.cpu_weight)),
        // Microseconds of CPU time per second.
        ("CPUQuotaPerSecUSec", number(limits.cpu_quota.map(|percent| u64::from(percent) * 10_000))),
        ("AllowedCPUs", set(&limits.cpu_set)),
        ("AllowedMemoryNodes", set(&limits.memory_nodes)),
        ("MemoryMax", number(limits.memory_max.map(|size| size.0))),
        ("MemoryHigh", number(limits.memory_high.map(|size| size.0))),
        ("IOWeight", weight(limits.io_weight)),
        ("TasksMax", number(limits.tasks_max.map(u64::from))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_limited_and_what_is_not() {
        let limits: Limits =
            serde_json::from_str(r#"{"cpu_quota":150,"cpu_set":"0-1,9","memory_max":"1G","io_weight":50}"#)
                .unwrap();
        let properties = properties(&limits);
        let value = |name: &str| &properties.iter().find(|(known, _)| *known == name).unwrap().1;
        assert_eq!(*value("CPUQuotaPerSecUSec"), Variant::from(1_500_000_u64));
        assert_eq!(*value("AllowedCPUs"), Variant::from(vec![3_u8, 2]));
        assert_eq!(*value("MemoryMax"), Variant::from(1_u64 << 30));
        assert_eq!(*value("IOWeight"), Variant::from(50_u64));
        assert_eq!(*value("CPUWeight"), Variant::from(u64::MAX));
        assert_eq!(*value("AllowedMemoryNodes"), Variant::from(Vec::<u8>::new()));
    }
}
