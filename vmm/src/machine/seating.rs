//! Which replaceable slot each disk and each NIC of the command line comes to lie in. Pure.
//!
//! The first of a kind comes into the first slot, and so on. A VM that is restored may have had devices elsewhere: plugged above an empty slot, or
//! left over when the ones before them went. Its devices find their slots by their names; those whose names the snapshot does not know take the
//! slots that were in use, in order.

use crate::config::{Device, DeviceDriver, MICROVM_BLOCK_SLOTS, MICROVM_NET_SLOTS, VmConfig};

/// Slot numbers by position on the command line, of each kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seating {
    blocks: Vec<usize>,
    nets: Vec<usize>,
}

impl Seating {
    /// `before`: who was in each slot, disks first, when the VM was saved; empty for a VM that is not restored.
    pub(super) fn new(config: &VmConfig, before: &[Option<String>]) -> Self {
        let names = |wanted: fn(&DeviceDriver) -> bool| -> Vec<&str> {
            let replaceable =
                |d: &&Device| wanted(&d.driver) && config.vhost_user_chardev(&d.driver).is_none();
            config.devices.iter().filter(replaceable).map(|d| d.id.as_str()).collect()
        };
        let (block_slots, net_slots) = before.split_at_checked(MICROVM_BLOCK_SLOTS).unwrap_or_default();
        Self {
            blocks: seats(
                &names(|d| matches!(d, DeviceDriver::VirtioBlk { .. })),
                block_slots,
                MICROVM_BLOCK_SLOTS,
            ),
            nets: seats(
                &names(|d| matches!(d, DeviceDriver::VirtioNet { .. })),
                net_slots,
                MICROVM_NET_SLOTS,
            ),
        }
    }

    /// Of the disk that is number `nth` among disks. More disks than slots lie behind the last.
    pub(super) fn block(&self, nth: usize) -> usize {
        self.blocks.get(nth).copied().unwrap_or(nth)
    }

    /// Of the NIC that is number `nth` among NICs.
    pub(super) fn net(&self, nth: usize) -> usize {
        self.nets.get(nth).copied().unwrap_or(nth)
    }
}

fn seats(names: &[&str], before: &[Option<String>], slots: usize) -> Vec<usize> {
    // A snapshot that names more slots than there are is refused later, by the number of its devices.
    let before = before.get(..slots).unwrap_or(before);
    let was_in = |name: &&str| before.iter().position(|device| device.as_deref() == Some(name));
    let mut seats: Vec<Option<usize>> = names.iter().map(was_in).collect();
    let used = (0..).zip(before).filter(|(_, device)| device.is_some()).map(|(slot, _)| slot);
    for slot in used.chain(0..slots.max(names.len())) {
        if !seats.contains(&Some(slot))
            && let Some(place) = seats.iter_mut().find(|seat| seat.is_none())
        {
            *place = Some(slot);
        }
    }
    seats.into_iter().zip(0..).map(|(seat, nth)| seat.unwrap_or(nth)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[&str], before: &[&str]) -> Vec<usize> {
        let before: Vec<_> = before.iter().map(|b| (!b.is_empty()).then(|| (*b).to_owned())).collect();
        seats(names, &before, MICROVM_BLOCK_SLOTS)
    }

    #[test]
    fn devices_find_the_slots_that_they_had() {
        for (names, before, slots) in [
            (&["a", "b"][..], &[][..], vec![0, 1]),
            (&["a", "b"], &["a", "b", "", "", "", ""], vec![0, 1]),
            // Plugged above an empty slot, and out of order.
            (&["a", "b", "c"], &["a", "", "c", "b", "", ""], vec![0, 3, 2]),
            // The first has gone.
            (&["b"], &["", "b", "", "", "", ""], vec![1]),
            // Other names: as many as were there, in order; then the first that is free.
            (&["x", "y"], &["", "b", "", "d", "", ""], vec![1, 3]),
            (&["x", "b", "z"], &["", "b", "", "d", "", ""], vec![3, 1, 0]),
            // More than there is room for.
            (&["a", "b", "c", "d", "e", "f", "g"], &["g", "", "", "", "", ""], vec![1, 2, 3, 4, 5, 6, 0]),
        ] {
            assert_eq!(of(names, before), slots, "{names:?} {before:?}");
        }
    }

    #[test]
    fn what_a_snapshot_says_cannot_lead_outside() {
        let many: Vec<String> = (0..40).map(|n| format!("d{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(of(&["d39", "d3"], &many), [0, 3]);
    }
}
