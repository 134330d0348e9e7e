//! Devices that come to running guests and go, as scenarios see them: what a guest has, when a device has left, and the host's spare disk, which is
//! handed to guests whole. For `tests/tests`.

use std::time::Duration;

use crate::console::Console;
use crate::host::Host;
use crate::qmp::Qmp;
use crate::scenario::{Outcome, SOON, check};

/// The guest lets its indicator blink for five seconds before it lets a device go.
pub const UNPLUG: Duration = Duration::from_secs(60);

/// Waits until `command` prints `wanted` in the guest.
///
/// # Errors
/// When it does not within [`UNPLUG`].
pub fn until(console: &mut Console, command: &str, wanted: &str) -> Outcome {
    let line = format!(
        "i=0; while [ $((i=i+1)) -lt 150 ]; do r=$({command}); [ \"$r\" = '{wanted}' ] && break; busybox sleep 0.2; done; echo \"$r\""
    );
    let got = console.shell(&line, UNPLUG)?;
    check(got == wanted, || format!("{command}: {got:?} and not {wanted:?}"))
}

/// Waits until the VMM tells that the guest has let a device go.
///
/// # Errors
/// When it does not tell within [`UNPLUG`].
pub fn gone(qmp: &mut Qmp, device: &str) -> Outcome {
    let event = qmp.wait(UNPLUG, |name, data| name == "DEVICE_DELETED" && data["device"] == device)?;
    check(event["data"]["path"] == format!("/machine/peripheral/{device}"), || event.to_string())
}

/// A disk of the emulated host's, behind its IOMMU.
pub const SPARE: &str = "0000:01:00.0";

/// Has a driver of the host's take the spare disk.
///
/// # Errors
/// When it does not.
pub fn bind(host: &Host, driver: &str) -> Outcome {
    let bound = host.ok(&format!(
        "modprobe {driver}; cd /sys/bus/pci/devices/{SPARE} && echo {driver} > driver_override && \
         {{ [ ! -e driver ] || echo {SPARE} > driver/unbind; }} && echo {SPARE} > /sys/bus/pci/drivers_probe && basename $(readlink driver)"
    ))?;
    check(bound.trim() == driver, || format!("{SPARE} is {bound}'s and not {driver}'s"))
}

/// Sum of what is on the spare disk, which the host must have. With `fill` it writes something new there first.
///
/// # Errors
/// When the host has no such disk.
pub fn on_host(host: &Host, fill: bool) -> Outcome<String> {
    let fill = if fill { "head -c 16M /dev/urandom > $d && sync $d && " } else { "" };
    let sum = format!("d=/dev/$(ls /sys/bus/pci/devices/{SPARE}/virtio*/block) && {fill}md5sum < $d");
    Ok(host.ok(&sum)?.trim().to_owned())
}

/// The spare disk in a guest: its driver finds there what has the sum `holds`, interrupted in this way, and writes something in the middle. Returns the
/// new sum.
///
/// # Errors
/// When something else is there, or it cannot be written.
pub fn in_guest(console: &mut Console, holds: &str, interrupts: &str) -> Outcome<String> {
    let find = "basename $(grep -l ^spare /sys/class/block/vd*/serial | cut -d / -f 1-5) 2>&1";
    until(console, find, "vdb")?;
    let read = console.shell("busybox md5sum < /dev/vdb", SOON)?;
    check(read.trim() == holds, || format!("the guest reads {read}, not {holds}"))?;
    let count = format!(
        "v=$(basename $(readlink -f /sys/class/block/vdb/device)); grep \"$v\" /proc/interrupts | grep -c '{interrupts}'"
    );
    let lines = console.shell(&count, SOON)?;
    check(lines.trim() != "0", || format!("no {interrupts} of the disk's"))?;
    let write = "head -c 1M /dev/urandom | dd of=/dev/vdb bs=1M seek=7 conv=notrunc,fsync iflag=fullblock 2>/dev/null; \
                 echo 3 > /proc/sys/vm/drop_caches; busybox md5sum < /dev/vdb";
    let wrote = console.shell(write, SOON)?.trim().to_owned();
    check(wrote != holds, || "what was written is not there".into())?;
    Ok(wrote)
}
