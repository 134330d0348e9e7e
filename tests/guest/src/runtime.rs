//! What the compiler expects of a world without an operating system: the memory routines, panics, exception reports.

use core::arch::{asm, naked_asm};
use core::panic::PanicInfo;
use core::ptr::addr_of;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{console, cpu, power};

/// Copies forward.
///
/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges. A string instruction, so that the compiler cannot turn the body into a call of itself.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags))
    };
    to
}

/// Copies overlapping ranges.
///
/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: the start of `to` is not inside `from`, so copying forward is right.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller vouches for both ranges; backwards, because `to` starts inside `from`. The flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _, inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// Fills.
///
/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8, options(nostack, preserves_flags))
    };
    to
}

/// Compares.
///
/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for i in 0..count {
        // SAFETY: the caller vouches for both ranges. Volatile, so that the loop is not recognised as a memcmp.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// Compares for equality only.
///
/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: passed on.
    unsafe { memcmp(a, b, count) }
}

/// The symbol that `core`, built to unwind, refers to. Never called: this program aborts on panic.
#[unsafe(no_mangle)]
#[unsafe(naked)]
extern "C" fn rust_eh_personality() {
    naked_asm!("ud2")
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    console::print(format_args!("\nguest panic: {}\n", info.message()));
    if let Some(place) = info.location() {
        console::print(format_args!("at {}:{}\n", place.file(), place.line()));
    }
    power::off()
}

unsafe extern "C" {
    static fault_facts: [u64; 4];
}

/// Where the exception handler goes back to ring 3: says what happened and ends the VM.
#[unsafe(no_mangle)]
extern "C" fn report_fault() -> ! {
    // A fault on the way out must not bring us here again.
    static REPORTED: AtomicBool = AtomicBool::new(false);
    if REPORTED.swap(true, Ordering::Relaxed) {
        cpu::triple_fault();
    }
    // SAFETY: written by the exception handler just before; nothing else writes it.
    let [vector, code, rip, address] = unsafe { addr_of!(fault_facts).read() };
    console::print(format_args!(
        "\nguest fault: exception {vector}, error code {code:#x}, at {rip:#x}, address {address:#x}\n"
    ));
    power::off()
}
