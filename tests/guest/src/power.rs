//! Ways to end the VM.

use core::ptr::{from_ref, null_mut};
use core::sync::atomic::{AtomicPtr, Ordering};

use crate::acpi::{self, PowerOff};
use crate::boot::BootInfo;
use crate::{clock, console, cpu};

static BOOT: AtomicPtr<BootInfo> = AtomicPtr::new(null_mut());

/// Remembers what the VMM told us; the tables are only read when they are needed.
pub fn init(boot: &'static BootInfo) {
    BOOT.store(from_ref(boot).cast_mut(), Ordering::Relaxed);
}

/// Powers off: as ACPI says, else by ports that VMMs without ACPI have, else by a reset.
pub fn off() -> ! {
    // SAFETY: null, or a reference that lives for ever.
    let boot = unsafe { BOOT.load(Ordering::Relaxed).as_ref() };
    match boot.and_then(acpi::power_off) {
        Some(PowerOff::SleepControl { address, port: true, value }) => cpu::outb(address as u16, value),
        // SAFETY: a register that ACPI describes; mapped if below 4 GiB.
        Some(PowerOff::SleepControl { address, port: false, value }) => unsafe {
            cpu::write8(address, value)
        },
        Some(PowerOff::Pm1Control { port, value }) => cpu::outw(port, value),
        None => {}
    }
    let end = clock::deadline(100_000);
    while cpu::tsc() < end {
        cpu::pause();
    }
    console::print(format_args!("this machine cannot power off; resetting it\n"));
    reset()
}

/// Resets by the keyboard controller, and when that does nothing by a triple fault.
pub fn reset() -> ! {
    cpu::outb(0x64, 0xfe);
    let end = clock::deadline(100_000);
    while cpu::tsc() < end {
        cpu::pause();
    }
    cpu::triple_fault()
}
