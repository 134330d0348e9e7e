//! Configuration spaces: reads and writes of any width anywhere, to each device that nobody drives.
#![no_main]

use fuzz::Input;
use libfuzzer_sys::fuzz_target;
use vmm::virtio::balloon::{Balloon, BalloonOptions};
use vmm::virtio::blk::{Blk, BlkOptions};
use vmm::virtio::net::{Net, NetOptions};
use vmm::virtio::{VirtioDevice, Worker};

const MEMORY: u64 = 256 << 20;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let worker = || Worker::new("fuzz");
    let balloon = Balloon::new(BalloonOptions {
        memory: MEMORY,
        deflate_on_oom: true,
        free_page_reporting: true,
        auto: None,
        worker: worker(),
    });
    let port = balloon.port();
    let net = NetOptions {
        backend: None,
        mac: [2, 0, 0, 0, 0, 1],
        multi_queue: true,
        queue_size: 256,
        worker: worker(),
    };
    let blk = BlkOptions {
        backend: None,
        serial: None,
        read_only: false,
        queue_size: 256,
        queues: 1,
        worker: worker(),
    };
    let mut devices: [Box<dyn VirtioDevice>; 3] =
        [Box::new(balloon), Box::new(Net::new(net)), Box::new(Blk::new(blk))];
    while !input.is_empty() {
        let how = input.number::<1>();
        let width = [1, 2, 4, 8, 3, 0, 64, 16][(how >> 3 & 7) as usize];
        let offset = if how & 0x80 != 0 { input.number::<8>() } else { input.number::<1>() };
        let mut bytes = vec![0x55; width];
        match devices.get_mut((how & 3) as usize) {
            Some(device) if how & 0x40 != 0 => {
                bytes.fill(input.number::<1>() as u8);
                device.write_config(offset, &bytes);
            }
            Some(device) => {
                device.read_config(offset, &mut bytes);
                let beyond = offset.saturating_add(width as u64) > 0x100 && offset >= 0x100;
                assert!(!beyond || bytes.iter().all(|b| *b == 0), "something behind the end");
            }
            None => {
                vmm::virtio::vsock::fuzz::read_config(0x0102_0304, offset, &mut bytes);
                let whole = [4, 3, 2, 1, 0, 0, 0, 0];
                for (at, byte) in (0..).zip(&bytes) {
                    let want = usize::try_from(offset.saturating_add(at)).ok().and_then(|at| whole.get(at));
                    assert_eq!(byte, want.unwrap_or(&0));
                }
            }
        }
        assert!(port.actual() <= MEMORY);
    }
});
