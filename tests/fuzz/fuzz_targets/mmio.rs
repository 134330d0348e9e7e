//! The register window of virtio-mmio: any accesses in any order and width, around a device that takes all it can get from its queues.
#![no_main]

use std::io;
use std::sync::{Arc, LazyLock};

use fuzz::{EVENT_IDX, INDIRECT_DESC, Input, VERSION_1, clear, memory};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm::bus::BusDevice;
use vmm::irq::Line;
use vmm::memory::GuestMemory;
use vmm::virtio::mmio::MmioTransport;
use vmm::virtio::queue::Chain;
use vmm::virtio::{ActivateError, Activation, Doorbell, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(memory);

struct Silent;

impl Line for Silent {
    fn trigger(&self) {}
}

impl Doorbell for Silent {
    fn attach(&self, _: u64, _: u16, _: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, _: u64, _: u16, _: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

struct Greedy {
    running: bool,
}

impl VirtioDevice for Greedy {
    fn device_type(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        VERSION_1 | INDIRECT_DESC | EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 8, 1]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!self.running, "activated while running");
        assert!(activation.features & VERSION_1 != 0 && activation.features & !self.features() == 0);
        self.running = true;
        for mut active in activation.queues {
            assert!(active.queue.size() <= self.queue_sizes()[usize::from(active.index)]);
            let mut chain = Chain::default();
            loop {
                match active.queue.pop(&mut chain) {
                    Ok(true) => active.queue.complete(chain.head, chain.writable.fill(&[7; 32]) as u32),
                    Ok(false) => break,
                    Err(_) => {
                        activation.interrupt.needs_reset();
                        break;
                    }
                }
                if active.queue.publish() {
                    activation.interrupt.queue(active.index);
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        assert!(self.running, "reset without a session");
        self.running = false;
    }
}

/// Accesses per input.
const STEPS: u32 = 400;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let transport = MmioTransport::new(
        Box::new(Greedy { running: false }),
        Arc::clone(&MEMORY),
        Arc::new(Silent),
        Arc::new(Silent),
    );
    let windows: [Arc<dyn BusDevice>; 2] =
        [transport.command_line_window(0xf000_0000), transport.acpi_window(0xf100_0000)];
    // Descriptors and rings for queues laid over them.
    MEMORY.write_slice(input.bytes(64), GuestAddress(0x1000)).expect("inside RAM");
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let step = input.number::<1>();
        let (window, width) = (&windows[(step & 1) as usize], 1 << (step >> 1 & 3));
        match step >> 3 & 7 {
            0 => transport.reset(),
            1 => transport.claim_acpi(),
            2 => window.read(input.number::<2>() & 0x1ff, &mut [0; 8][..width]),
            // Registers as a driver writes them, with values that are often good.
            3..=5 => {
                let offset = (input.number::<1>() & 0x3f) * 4;
                let value = input.number::<2>() as u32;
                window.write(offset, &value.to_le_bytes());
            }
            // A driver by the book, up to the status in the next byte.
            6 => {
                let to = input.number::<1>() as u32;
                for (offset, value) in
                    [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, 0x3000_0000)]
                {
                    window.write(offset, &u32::to_le_bytes(value));
                }
                for (offset, value) in [
                    (0x70, 11),
                    (0x30, 0),
                    (0x38, 8),
                    (0x80, 0x1000),
                    (0x90, 0x1100),
                    (0xa0, 0x1200),
                    (0x44, 1),
                    (0x70, to),
                ] {
                    window.write(offset, &u32::to_le_bytes(value));
                }
            }
            _ => {
                let offset = input.number::<2>() & 0x1ff;
                let value = input.number::<8>().to_le_bytes();
                window.write(offset, &value[..width]);
            }
        }
        let mut status = [0; 4];
        windows[1].read(0x70, &mut status);
        assert_eq!(status[1..], [0; 3]);
    }
    transport.reset();
    let mut status = [0xff; 4];
    windows[1].read(0x70, &mut status);
    assert_eq!(status, [0; 4], "a reset leaves a status");
    clear(&MEMORY);
});
