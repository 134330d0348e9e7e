//! The common configuration structure (virtio 1.2 §4.1.4.3): its layout, field by field. A field is reached with its own width; the 64-bit
//! ones also by halves. Anything else reads as zero and does nothing.

use super::Shared;
use crate::virtio::registers::{set_high, set_low};

/// Bytes.
pub(super) const SIZE: u64 = 0x38;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DESC_HIGH: u64 = 0x24;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DRIVER_HIGH: u64 = 0x2c;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_DEVICE_HIGH: u64 = 0x34;

pub(super) fn read(shared: &Shared, offset: u64, data: &mut [u8]) {
    let value = value(shared, offset, data.len());
    for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
        *to = from;
    }
}

fn value(shared: &Shared, offset: u64, width: usize) -> u64 {
    match (offset, width) {
        (STATUS, 1) => return shared.status().into(),
        (GENERATION, 1) => return shared.signals.generation().into(),
        (CONFIG_VECTOR, 2) => return shared.signals.config_vector().into(),
        _ => {}
    }
    let r = shared.lock();
    let layout = r.queue().map(|q| q.layout);
    let area = |get: fn(&crate::virtio::queue::Layout) -> u64| layout.as_ref().map_or(0, get);
    let low = |value: u64| value & 0xffff_ffff;
    match (offset, width) {
        (DEVICE_FEATURE_SELECT, 4) => r.device_features_sel.into(),
        (DEVICE_FEATURE, 4) => r.device_features().into(),
        (DRIVER_FEATURE_SELECT, 4) => r.driver_features_sel.into(),
        (DRIVER_FEATURE, 4) => r.driver_features().into(),
        (NUM_QUEUES, 2) => r.device.queue_sizes().len() as u64,
        (QUEUE_SELECT, 2) => r.queue_sel.into(),
        (QUEUE_SIZE, 2) => layout.map_or(0, |l| l.size.into()),
        (QUEUE_VECTOR, 2) => shared.signals.queue_vector(r.queue_sel).into(),
        (QUEUE_ENABLE, 2) => r.queue().map_or(0, |q| q.ready.into()),
        // Each queue has a place of its own.
        (QUEUE_NOTIFY_OFF, 2) => r.queue().map_or(0, |_| r.queue_sel.into()),
        (QUEUE_DESC, 8) => area(|l| l.desc),
        (QUEUE_DESC, 4) => low(area(|l| l.desc)),
        (QUEUE_DESC_HIGH, 4) => area(|l| l.desc) >> 32,
        (QUEUE_DRIVER, 8) => area(|l| l.driver),
        (QUEUE_DRIVER, 4) => low(area(|l| l.driver)),
        (QUEUE_DRIVER_HIGH, 4) => area(|l| l.driver) >> 32,
        (QUEUE_DEVICE, 8) => area(|l| l.device),
        (QUEUE_DEVICE, 4) => low(area(|l| l.device)),
        (QUEUE_DEVICE_HIGH, 4) => area(|l| l.device) >> 32,
        _ => 0,
    }
}

pub(super) fn write(shared: &Shared, offset: u64, data: &[u8]) {
    match *data {
        [value] if offset == STATUS => shared.write_status(value),
        [a, b] => write16(shared, offset, u16::from_le_bytes([a, b])),
        [a, b, c, d] => write32(shared, offset, u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] if matches!(offset, QUEUE_DESC | QUEUE_DRIVER | QUEUE_DEVICE) => {
            write32(shared, offset, u32::from_le_bytes([a, b, c, d]));
            write32(shared, offset + 4, u32::from_le_bytes([e, f, g, h]));
        }
        _ => {}
    }
}

fn write16(shared: &Shared, offset: u64, value: u16) {
    match offset {
        CONFIG_VECTOR => return shared.signals.set_config_vector(value),
        QUEUE_VECTOR => {
            let queue = shared.lock().queue_sel;
            return shared.signals.set_queue_vector(queue, value);
        }
        _ => {}
    }
    let mut r = shared.lock();
    match offset {
        QUEUE_SELECT => r.queue_sel = value.into(),
        QUEUE_SIZE => {
            if let Some(queue) = r.open_queue() {
                queue.layout.size = value;
            }
        }
        // §4.1.4.3.2: a driver must not write 0; it gives a queue back with a reset.
        QUEUE_ENABLE if value == 1 => {
            if let Some(queue) = r.open_queue() {
                queue.ready = true;
            }
        }
        _ => {}
    }
}

fn write32(shared: &Shared, offset: u64, value: u32) {
    let mut r = shared.lock();
    match offset {
        DEVICE_FEATURE_SELECT => r.device_features_sel = value,
        DRIVER_FEATURE_SELECT => r.driver_features_sel = value,
        DRIVER_FEATURE => r.set_driver_features(value),
        _ => {
            let Some(queue) = r.open_queue() else { return };
            let l = &mut queue.layout;
            match offset {
                QUEUE_DESC => set_low(&mut l.desc, value),
                QUEUE_DESC_HIGH => set_high(&mut l.desc, value),
                QUEUE_DRIVER => set_low(&mut l.driver, value),
                QUEUE_DRIVER_HIGH => set_high(&mut l.driver, value),
                QUEUE_DEVICE => set_low(&mut l.device, value),
                QUEUE_DEVICE_HIGH => set_high(&mut l.device, value),
                _ => {}
            }
        }
    }
}
