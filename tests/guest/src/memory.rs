//! RAM: a page allocator that only gives, and the rest of RAM as an arena for the commands that touch and dirty memory.

use core::ptr::addr_of;
use core::slice;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::boot::{BootInfo, Region};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Page tables for 512 GiB and all rings and buffers fit below.
const ARENA: u64 = 32 << 20;

unsafe extern "C" {
    static image_end: [u8; 0];
}

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Starts the allocator behind our image. (RAM of fewer than 32 MiB is not supported: no VMM here gives less.)
pub fn init() {
    NEXT.store(addr_of!(image_end) as u64, Ordering::Relaxed);
}

/// `count` fresh pages, zero: nobody used them before. `None` when the space is full.
pub fn pages(count: u64) -> Option<&'static mut [u8]> {
    let start = NEXT.load(Ordering::Relaxed);
    let end = start.checked_add(count.checked_mul(PAGE)?)?;
    if end > ARENA {
        return None;
    }
    NEXT.store(end, Ordering::Relaxed);
    // SAFETY: RAM that nothing else uses, given out once; identity-mapped.
    Some(unsafe { slice::from_raw_parts_mut(start as *mut u8, (end - start) as usize) })
}

/// Keeps a value of up to a page for ever.
pub fn keep<T>(value: T) -> Option<&'static T> {
    const { assert!(size_of::<T>() <= PAGE as usize) };
    let place = pages(1)?.as_mut_ptr().cast::<T>();
    // SAFETY: a page of our own, aligned and large enough.
    unsafe {
        place.write(value);
        Some(&*place)
    }
}

/// RAM that nothing uses, in order of address.
pub fn arena(boot: &BootInfo) -> impl Iterator<Item = Region> {
    boot.ram().filter_map(|r| {
        let start = r.start.max(ARENA);
        let end = r.start.saturating_add(r.size) & !(PAGE - 1);
        (start < end).then(|| Region { start, size: end - start, kind: 1 })
    })
}

/// Bytes in the arena.
pub fn arena_size(boot: &BootInfo) -> u64 {
    arena(boot).map(|r| r.size).sum()
}

/// Address of the arena's page `index`; `None` beyond its end.
pub fn arena_page(boot: &BootInfo, index: u64) -> Option<u64> {
    let mut offset = index * PAGE;
    for region in arena(boot) {
        if offset < region.size {
            return Some(region.start + offset);
        }
        offset -= region.size;
    }
    None
}
