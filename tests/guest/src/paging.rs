//! Page tables: maps RAM and the device window to their own addresses, for ring 3, in 2 MiB pages.
//!
//! Tables are filled before they are linked in: a host that shadows our tables traps each write to one that is in use.

use core::ptr::addr_of_mut;

use crate::boot::BootInfo;
use crate::{cpu, memory};

const GIB: u64 = 1 << 30;
const LARGE: u64 = 2 << 20;
/// Present, writable, user.
const TABLE: u64 = 0b111;
/// The same, and a 2 MiB page.
const LEAF: u64 = 0b1000_0111;
/// The same, not cached: where devices are.
const DEVICE: u64 = LEAF | 0b1_1000;

unsafe extern "C" {
    static mut boot_pdpt: [u64; 512];
}

/// Maps all RAM below 512 GiB, and 3 to 4 GiB, where virtio-mmio windows and APICs are.
pub fn map_all(boot: &BootInfo) {
    let top = boot.ram().map(|r| r.start.saturating_add(r.size)).max().unwrap_or(0).clamp(GIB, 512 * GIB);
    for gib in 0..top.div_ceil(GIB).max(4) {
        let start = gib * GIB;
        let leaf = if gib == 3 { DEVICE } else { LEAF };
        // Reserved memory that is not RAM holds tables of firmware at most below 1 GiB.
        let wanted =
            gib == 3 || boot.ram().any(|r| r.start < start + GIB && start < r.start.saturating_add(r.size));
        if !wanted {
            continue;
        }
        let Some(table) = memory::pages(1) else { return };
        let table = table.as_mut_ptr().cast::<u64>();
        for i in 0..512 {
            // SAFETY: our page, as a table of 512 entries.
            unsafe { table.add(i).write((start + i as u64 * LARGE) | leaf) };
        }
        // SAFETY: the table in use; ours alone. The entry for the first GiB is replaced by one that maps the same and more.
        unsafe {
            addr_of_mut!(boot_pdpt).cast::<u64>().add(gib as usize).write_volatile(table as u64 | TABLE)
        };
        if gib == 0 {
            // The processor may remember that the rest of this GiB was not there.
            cpu::flush_tlb();
        }
    }
}

/// Maps what a device brings: whole GiB, of which none held RAM when [`map_all`] ran. False: there is no room, or it is beyond 512 GiB.
pub fn map_more(start: u64, size: u64) -> bool {
    let Some(end) = start.checked_add(size).filter(|end| *end <= 512 * GIB && size > 0) else { return false };
    for gib in start / GIB..end.div_ceil(GIB) {
        // SAFETY: an entry of the table in use; ours alone.
        let entry = unsafe { addr_of_mut!(boot_pdpt).cast::<u64>().add(gib as usize) };
        // SAFETY: as above.
        if unsafe { entry.read_volatile() } != 0 {
            continue;
        }
        let Some(table) = memory::pages(1) else { return false };
        let table = table.as_mut_ptr().cast::<u64>();
        for i in 0..512 {
            // SAFETY: our page, as a table of 512 entries.
            unsafe { table.add(i).write((gib * GIB + i as u64 * LARGE) | LEAF) };
        }
        // SAFETY: as above; a processor does not remember what was not there.
        unsafe { entry.write_volatile(table as u64 | TABLE) };
    }
    true
}
