//! The default guest: what `flotilla run` starts when nobody has an image at hand, and the guest of fast tests and benchmarks.
//!
//! A kernel of a few tens of KiB with no dependencies. It prints one byte on COM1 before anything else, goes to ring 3 and stays
//! there (see `entry`), tells what machine it found, and answers commands on COM1. Kernel command line:
//!
//! ```text
//! hold          as the first word: halt for good after the first byte
//! quiet         no banner, no prompt before the commands of cmd= have run
//! cmd=A;B;C     run these commands first; quote it if it has spaces, or write commas for them: cmd=touch,64;poweroff
//! ip=ADDR/LEN   address of the first network card with a link; ip=ADDR::GATEWAY:NETMASK as Linux writes it works too
//! pci           look for devices on PCI, too
//! virtio_mmio.device=SIZE@ADDRESS:IRQ   a device; VMMs append these
//! ```
#![no_std]
#![no_main]

mod acpi;
mod blk;
mod boot;
mod clock;
mod console;
mod cpu;
mod entry;
mod hostile;
mod irq;
mod load;
mod memory;
mod more;
mod net;
mod paging;
mod pci;
mod power;
mod runtime;
mod shell;
mod text;
mod vcpu;
mod virtio;
mod work;

use boot::BootInfo;

/// First code in ring 3. `argument` is the zero page, or the PVH start info when `pvh` is not 0.
///
/// # Safety
/// Called once, by `entry`, with what the VMM passed in.
#[unsafe(no_mangle)]
unsafe extern "C" fn guest_main(argument: u64, pvh: u64) -> ! {
    let start = cpu::tsc();
    // SAFETY: `entry` passes the boot structure that the VMM left in the first 2 MiB, which is mapped.
    let boot = unsafe { BootInfo::read(argument, pvh != 0) };
    memory::init();
    let Some(boot) = memory::keep(boot) else { cpu::hold() };
    power::init(boot);
    irq::init_vectors();
    paging::map_all(boot);
    irq::init_controllers();
    let mut shell = shell::Shell::new(boot, start);
    shell.run()
}
