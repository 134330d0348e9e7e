//! The file `state` of a snapshot: whatever its bytes are, it is refused or its sections come out; and a transport that is given one of them as its
//! own state refuses it or runs.
#![no_main]

use std::io;
use std::sync::{Arc, LazyLock};

use fuzz::{EVENT_IDX, INDIRECT_DESC, VERSION_1, memory};
use libfuzzer_sys::fuzz_target;
use vmm::irq::Line;
use vmm::memory::GuestMemory;
use vmm::virtio::mmio::MmioTransport;
use vmm::virtio::queue::Chain;
use vmm::virtio::state::{DeviceState, StateError, Suspend as _, TransportState};
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

/// Takes all that it can get once.
struct Greedy;

impl VirtioDevice for Greedy {
    fn device_type(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        VERSION_1 | INDIRECT_DESC | EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 8]
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(activation.features & VERSION_1 != 0 && activation.features & !self.features() == 0);
        for mut active in activation.queues {
            assert!(active.queue.size() <= self.queue_sizes()[usize::from(active.index)]);
            let mut chain = Chain::default();
            while let Ok(true) = active.queue.pop(&mut chain) {
                active.queue.complete(chain.head, chain.writable.fill(&[7; 32]) as u32);
                let _ = active.queue.publish();
            }
        }
        Ok(())
    }

    fn restore(&mut self, _: &DeviceState) -> Result<(), StateError> {
        Ok(())
    }

    fn reset(&mut self) {}
}

fuzz_target!(|data: &[u8]| {
    for bytes in vmm::snapshot::fuzz::state(data).into_iter().chain([data.to_vec()]) {
        let Ok(state) = serde_json::from_slice::<TransportState>(&bytes) else { continue };
        let transport =
            MmioTransport::new(Box::new(Greedy), Arc::clone(&MEMORY), Arc::new(Silent), Arc::new(Silent));
        if transport.restore(&state).is_ok() {
            transport.resume().expect("what was restored can run");
        }
    }
});
