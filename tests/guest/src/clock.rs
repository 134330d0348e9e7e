//! Time from the time stamp counter; its frequency is found on first use.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::{cpu, memory};

static HZ: AtomicU64 = AtomicU64::new(0);

/// Ticks of the time stamp counter per second.
pub fn hz() -> u64 {
    match HZ.load(Ordering::Relaxed) {
        0 => {
            let found = from_cpuid().or_else(from_kvmclock).unwrap_or_else(from_pit).max(1_000_000);
            HZ.store(found, Ordering::Relaxed);
            found
        }
        known => known,
    }
}

/// The time stamp `microseconds` from now.
pub fn deadline(microseconds: u64) -> u64 {
    cpu::tsc().saturating_add(
        (u128::from(hz()) * u128::from(microseconds) / 1_000_000).min(u128::from(u64::MAX)) as u64,
    )
}

/// What `ticks` are in microseconds.
pub fn to_microseconds(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(hz())) as u64
}

fn hypervisor(leaf: u32) -> bool {
    cpu::cpuid(1).ecx >> 31 != 0 && cpu::cpuid(0x4000_0000).eax >= leaf
}

/// The leaf in kHz that some VMMs give, then the processor's own.
fn from_cpuid() -> Option<u64> {
    if hypervisor(0x4000_0010) {
        let khz = cpu::cpuid(0x4000_0010).eax;
        if khz != 0 {
            return Some(u64::from(khz) * 1000);
        }
    }
    if cpu::cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = cpu::cpuid(0x15);
    (leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0)
        .then(|| u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax))
}

/// KVM's clock tells how it turns ticks into nanoseconds: ns = (ticks << shift) * multiplier >> 32.
fn from_kvmclock() -> Option<u64> {
    let kvm = hypervisor(0x4000_0001) && {
        let leaf = cpu::cpuid(0x4000_0000);
        (leaf.ebx, leaf.ecx, leaf.edx) == (0x4b4d_564b, 0x564b_4d56, 0x0000_004d)
    };
    if !kvm || cpu::cpuid(0x4000_0001).eax & 1 << 3 == 0 {
        return None;
    }
    let page = memory::pages(1)?;
    // MSR_KVM_SYSTEM_TIME_NEW; bit 0 switches it on.
    cpu::wrmsr(0x4b56_4d01, page.as_ptr() as u64 | 1);
    // SAFETY: inside our page, which the host writes: hence volatile.
    let (multiplier, shift) = unsafe {
        (
            page.as_ptr().add(24).cast::<u32>().read_volatile(),
            page.as_ptr().add(28).cast::<i8>().read_volatile(),
        )
    };
    cpu::wrmsr(0x4b56_4d01, 0);
    if multiplier == 0 {
        return None;
    }
    let base = (1_000_000_000u128 << 32) / u128::from(multiplier);
    let hz = if shift >= 0 { base >> shift.min(63) } else { base << shift.unsigned_abs().min(30) };
    u64::try_from(hz).ok()
}

/// Counts ticks during 10 ms of the 8254's channel 0, one-shot, so that it does not go on ticking. Without an 8254 the loop ends at its limit.
fn from_pit() -> u64 {
    const PIT_HZ: u64 = 1_193_182;
    let count = || {
        // Latch, then low byte, high byte.
        cpu::outb(0x43, 0);
        u64::from(cpu::inb(0x40)) | u64::from(cpu::inb(0x40)) << 8
    };
    cpu::outb(0x43, 0b0011_0000);
    cpu::outb(0x40, 0xff);
    cpu::outb(0x40, 0xff);
    let (first, start) = (count(), cpu::tsc());
    for _ in 0..100_000 {
        let (now, passed) = (cpu::tsc(), first.saturating_sub(count()));
        if passed >= PIT_HZ / 100 {
            return (now - start) * PIT_HZ / passed;
        }
    }
    1_000_000_000
}
