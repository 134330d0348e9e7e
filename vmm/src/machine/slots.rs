//! The virtio slots of a microvm: which device of the command line comes to lie in which slot, and where each slot is.
//!
//! There are always six block slots and two network slots, in this order, used or not: a guest sees `vda` to `vdf`, `eth0` and `eth1` from boot
//! on, and a slot that is filled later needs no new device in the guest. Other devices follow in command-line order, one slot each.

use std::sync::Arc;

use super::others::Others;
use super::replaceable::Ports;
use super::seating::Seating;
use super::workers::Workers;
use super::{MachineError, devices};
use crate::boot::MmioSlot;
use crate::bus::Bus;
use crate::config::{Device, DeviceDriver, MICROVM_BLOCK_SLOTS, MICROVM_NET_SLOTS, VmConfig};
use crate::inherit::Inherited;
use crate::irq::{IOAPIC_PINS, Line};
use crate::memory::GuestMemory;
use crate::net;
use crate::virtio::blk::{Blk, BlkOptions};
use crate::virtio::mmio::{MmioTransport, WINDOW_SIZE};
use crate::virtio::net::{Net, NetOptions};
use crate::virtio::{Doorbell, VirtioDevice};

const CMDLINE_WINDOWS: u64 = 0xf010_0000;
const ACPI_WINDOWS: u64 = 0xf020_0000;
/// GSIs 0 to 4 belong to the PIT and the serial ports.
const FIRST_IRQ: u32 = 5;
/// Slots for other devices: each has a pin of the IOAPIC of its own.
const OTHER_SLOTS: usize =
    IOAPIC_PINS as usize - FIRST_IRQ as usize - MICROVM_BLOCK_SLOTS - MICROVM_NET_SLOTS;
/// Those that are always there.
const SLOTS: usize = MICROVM_BLOCK_SLOTS + MICROVM_NET_SLOTS;
/// Of a queue in an empty slot.
const QUEUE_SIZE: u16 = 256;

/// A device in its slot, not connected to a machine yet.
pub(super) struct Occupant {
    /// Of the `-device` option; for errors.
    id: Option<String>,
    device: Box<dyn VirtioDevice>,
}

/// A device in its slot.
pub(super) struct Slot {
    pub(super) id: Option<String>,
    pub(super) transport: Arc<MmioTransport>,
}

impl Slot {
    /// Of the device in this slot, which is the one with this number; for errors.
    pub(super) fn name(&self, number: usize) -> String {
        match &self.id {
            Some(id) => format!("device \"{id}\""),
            None if number < MICROVM_BLOCK_SLOTS => format!("block slot {number}"),
            None => format!("network slot {}", number.saturating_sub(MICROVM_BLOCK_SLOTS)),
        }
    }
}

/// Opens the host ends of all devices and puts each device into its slot.
pub(super) fn fill(
    config: &VmConfig,
    seating: &Seating,
    inherited: &Inherited,
    workers: &Workers,
    others_made: &mut Others,
) -> Result<(Vec<Occupant>, Ports), MachineError> {
    let mut blocks: [Option<(Blk, String)>; MICROVM_BLOCK_SLOTS] = [const { None }; _];
    let mut nets: [Option<(Net, String)>; MICROVM_NET_SLOTS] = [const { None }; _];
    let (mut disks, mut nics, mut others) = (0, 0, Vec::new());
    for Device { id, driver, .. } in &config.devices {
        match driver {
            DeviceDriver::VirtioBlk { .. } => {
                check_room(id, "disks", disks, MICROVM_BLOCK_SLOTS)?;
                if let Some(device) = devices::disk(id, driver, 1, config, inherited, workers)?
                    && let Some(place) = blocks.get_mut(seating.block(disks))
                {
                    *place = Some((device, id.clone()));
                }
                disks += 1;
            }
            DeviceDriver::VirtioNet { .. } if config.vhost_user_chardev(driver).is_none() => {
                check_room(id, "network devices", nics, MICROVM_NET_SLOTS)?;
                let slot = seating.net(nics);
                if let Some(device) = devices::nic(id, driver, slot, config, inherited, workers)?
                    && let Some(place) = nets.get_mut(slot)
                {
                    *place = Some((device, id.clone()));
                }
                nics += 1;
            }
            // Ports of the virtio-serial device have no slot of their own.
            DeviceDriver::VirtConsole { .. } | DeviceDriver::VirtSerialPort { .. } => {}
            driver => {
                check_room(id, "devices besides disks and NICs", others.len(), OTHER_SLOTS)?;
                let device = others_made.make(id, driver, config, inherited, workers.default())?;
                others.push(Occupant { id: Some(id.clone()), device });
            }
        }
    }
    let (mut ports, mut occupants) = (Ports::default(), Vec::with_capacity(SLOTS + others.len()));
    for place in blocks {
        let worker = workers.default().clone();
        let (device, id) = named(place, || {
            Blk::new(BlkOptions {
                backend: None,
                serial: None,
                read_only: false,
                queue_size: QUEUE_SIZE,
                queues: 1,
                worker,
            })
        });
        ports.blocks.push(device.port());
        occupants.push(Occupant { id, device: Box::new(device) });
    }
    for (place, number) in nets.into_iter().zip(0..) {
        let (worker, mac) = (workers.default().clone(), net::default_mac(number));
        let (device, id) = named(place, || {
            Net::new(NetOptions { backend: None, mac, multi_queue: false, queue_size: QUEUE_SIZE, worker })
        });
        ports.nets.push(device.port());
        occupants.push(Occupant { id, device: Box::new(device) });
    }
    occupants.append(&mut others);
    Ok((occupants, ports))
}

/// What is in a slot, or what makes it an empty one.
fn named<D>(place: Option<(D, String)>, empty: impl FnOnce() -> D) -> (D, Option<String>) {
    match place {
        Some((device, id)) => (device, Some(id)),
        None => (empty(), None),
    }
}

fn check_room(device: &str, what: &'static str, used: usize, slots: usize) -> Result<(), MachineError> {
    if used < slots {
        return Ok(());
    }
    Err(MachineError::TooMany { device: device.into(), what, slots })
}

/// Where slot `number` is.
pub(super) fn place(number: usize) -> MmioSlot {
    let offset = WINDOW_SIZE * number as u64;
    MmioSlot {
        cmdline_base: CMDLINE_WINDOWS + offset,
        acpi_base: ACPI_WINDOWS + offset,
        size: WINDOW_SIZE as u32,
        irq: FIRST_IRQ + number as u32,
    }
}

/// Connects every device to memory, interrupts and the bus.
pub(super) fn connect(
    occupants: Vec<Occupant>,
    memory: &Arc<GuestMemory>,
    doorbell: &Arc<dyn Doorbell>,
    line: impl Fn(u32) -> Arc<dyn Line>,
    mmio: &Bus,
) -> Result<Vec<Slot>, MachineError> {
    let mut slots = Vec::with_capacity(occupants.len());
    for (number, Occupant { id, device }) in occupants.into_iter().enumerate() {
        let MmioSlot { cmdline_base, acpi_base, irq, .. } = place(number);
        let transport = MmioTransport::new(device, Arc::clone(memory), line(irq), Arc::clone(doorbell));
        mmio.insert(cmdline_base, WINDOW_SIZE, transport.command_line_window(cmdline_base))?;
        mmio.insert(acpi_base, WINDOW_SIZE, transport.acpi_window(acpi_base))?;
        slots.push(Slot { id, transport });
    }
    Ok(slots)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Aio, Drive};
    use crate::irq::IOAPIC_PINS;

    fn others() -> Others {
        let main_loop = crate::event::EventLoop::new().unwrap().handle();
        Others {
            chardevs: std::collections::HashMap::new(),
            main_loop,
            balloon: None,
            memory: crate::memory::DeviceMemory::default(),
            mems: Vec::new(),
        }
    }

    fn in_order(config: &VmConfig) -> Seating {
        Seating::new(config, &[])
    }

    fn with_disks(count: usize) -> (VmConfig, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let mut config = VmConfig::default();
        for i in 0..count {
            let file = dir.path().join(i.to_string());
            std::fs::File::create(&file).unwrap().set_len(512 * (i as u64 + 1)).unwrap();
            let drive = Drive::new(format!("d{i}"), file);
            config.drives.push(Drive { direct: false, aio: Some(Aio::Off), ..drive });
            config.devices.push(Device {
                id: format!("blk{i}"),
                bus: None,
                addr: None,
                multifunction: false,
                driver: DeviceDriver::VirtioBlk {
                    drive: format!("d{i}"),
                    serial: None,
                    iothread: None,
                    num_queues: None,
                    queue_size: 256,
                    boot_index: None,
                },
            });
        }
        (config, dir)
    }

    #[test]
    fn disks_fill_slots_in_order_and_the_rest_is_empty() {
        let (config, _dir) = with_disks(2);
        let (slots, ports) =
            fill(&config, &in_order(&config), &Inherited::default(), &Workers::new(&config), &mut others())
                .unwrap();
        assert_eq!((ports.blocks.len(), ports.nets.len()), (6, 2));
        let types: Vec<u32> = slots.iter().map(|s| s.device.device_type()).collect();
        assert_eq!(types, [2, 2, 2, 2, 2, 2, 1, 1]);
        let sectors: Vec<u64> = slots[..6]
            .iter()
            .map(|s| {
                let mut capacity = [0; 8];
                s.device.read_config(0, &mut capacity);
                u64::from_le_bytes(capacity)
            })
            .collect();
        assert_eq!(sectors, [1, 2, 0, 0, 0, 0]);
        assert_eq!(slots[1].id.as_deref(), Some("blk1"));
        assert!(place(slots.len() - 1).irq < IOAPIC_PINS);
    }

    #[test]
    fn a_restored_vm_has_its_disks_where_they_were() {
        let (config, _dir) = with_disks(2);
        let mut before = vec![None; 8];
        (before[1], before[4]) = (Some("blk1".to_owned()), Some("blk0".to_owned()));
        let seating = Seating::new(&config, &before);
        let (slots, ports) =
            fill(&config, &seating, &Inherited::default(), &Workers::new(&config), &mut others()).unwrap();
        let ids: Vec<_> = slots.iter().map(|s| s.id.as_deref()).collect();
        assert_eq!(ids, [None, Some("blk1"), None, None, Some("blk0"), None, None, None]);
        let disks: Vec<_> = ports.blocks.iter().map(|p| p.disk_id()).collect();
        assert_eq!(
            (disks[1].as_deref(), disks[4].as_deref(), disks[0].as_deref()),
            (Some("d1"), Some("d0"), None)
        );
    }

    #[test]
    fn other_devices_follow_disks_and_nics() {
        let mut config = VmConfig::default();
        config.rngs.push(crate::config::RngSource { id: "r".into(), filename: "/dev/urandom".into() });
        let driver = DeviceDriver::VirtioRng { rng: "r".into(), limit: None };
        for i in 0..=OTHER_SLOTS {
            let (id, driver) = (format!("rng{i}"), driver.clone());
            config.devices.push(Device { id, bus: None, addr: None, multifunction: false, driver });
        }
        let text = |config: &VmConfig| {
            fill(config, &in_order(config), &Inherited::default(), &Workers::new(config), &mut others())
                .err()
                .unwrap()
                .to_string()
        };
        assert!(text(&config).starts_with("device \"rng11\": too many devices besides disks and NICs"));
        config.devices.truncate(2);
        let (slots, _) =
            fill(&config, &in_order(&config), &Inherited::default(), &Workers::new(&config), &mut others())
                .unwrap();
        let ids: Vec<_> = slots[8..].iter().map(|s| s.id.as_deref().unwrap()).collect();
        assert_eq!((ids, slots[8].device.device_type()), (vec!["rng0", "rng1"], 4));
    }

    #[test]
    fn the_last_slot_has_the_last_pin() {
        assert_eq!(OTHER_SLOTS, 11);
        let last = MICROVM_BLOCK_SLOTS + MICROVM_NET_SLOTS + OTHER_SLOTS - 1;
        assert_eq!(place(last).irq, IOAPIC_PINS - 1);
        assert!(place(last).cmdline_base + WINDOW_SIZE <= ACPI_WINDOWS);
    }

    #[test]
    fn says_which_device_is_one_too_many_or_refers_to_nothing() {
        let (config, _dir) = with_disks(7);
        let text = |config: &VmConfig| {
            fill(config, &in_order(config), &Inherited::default(), &Workers::new(config), &mut others())
                .err()
                .unwrap()
                .to_string()
        };
        assert!(text(&config).starts_with("device \"blk6\": too many disks: a microvm has 6 slots"));
        let (mut config, _dir) = with_disks(1);
        config.drives.clear();
        assert!(text(&config).starts_with("device \"blk0\": drive \"d0\" not found"));
        let (mut config, _dir) = with_disks(1);
        if let DeviceDriver::VirtioBlk { iothread, .. } = &mut config.devices[0].driver {
            *iothread = Some("x".into());
        }
        assert!(text(&config).starts_with("device \"blk0\": iothread \"x\" not found"));
    }
}
