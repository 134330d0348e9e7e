//! What is on a q35's buses: opens the host ends of the devices, and puts everything where the command line says.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;

use super::map;
use crate::config::{Device, DeviceDriver, HostAddress, PciAddr, PciPlace, Smp, VmConfig};
use crate::inherit::Inherited;
use crate::irq::{KvmMessages, Level, Messages, Routes, SharedLine};
use crate::machine::doorbell::KvmPciDoorbell;
use crate::machine::others::{Others, served_mac};
use crate::machine::workers::{Workers, no_such};
use crate::machine::{Departure, MachineError, OnLeft, devices};
use crate::memory::GuestMemory;
use crate::pci::{Address, Function, HostBridge, PortEvents, PortOptions, Root, RootPort, lpc};
use crate::vfio::{self, Container, HostFunction, VfioError};
use crate::virtio::pci::{PciTransport, Place, Wires};
use crate::virtio::{Doorbell, VirtioDevice, blk, net};

/// Driver of a device of the host.
pub(super) const HOST_DEVICE: &str = "vfio-pci";

/// The host end of a device, by its name.
pub(super) enum End {
    /// A block node.
    Disk(String, Arc<blk::Port>),
    /// A network back end.
    Nic(String, Arc<net::Port>),
    /// A chardev: another process serves the device.
    Served(String),
    /// A network back end that another process serves, and the NIC's address.
    ServedNic(String, [u8; 6]),
    /// What has no name, or cannot be unplugged.
    Other,
}

/// A device with its host end open, not connected to a machine yet.
struct Model {
    driver: &'static str,
    device: Box<dyn VirtioDevice>,
    end: End,
}

/// What comes into a place.
enum Part {
    Model(Model),
    Host(HostAddress),
}

/// What will be on the buses, in command-line order.
pub(super) struct Plan {
    ports: Vec<(String, PciAddr, PortOptions)>,
    devices: Vec<(String, PciPlace, bool, Part)>,
}

/// A device as the bus has it.
pub(super) enum Body {
    Virtio(Arc<PciTransport>),
    /// One of the host's.
    Host(Arc<HostFunction>),
}

impl Body {
    pub(super) fn function(&self) -> Arc<dyn Function> {
        match self {
            Self::Virtio(transport) => Arc::clone(transport) as _,
            Self::Host(function) => Arc::clone(function) as _,
        }
    }

    /// Ends the device, whoever may still hold it for a moment.
    pub(super) fn shut_down(&self) -> std::io::Result<()> {
        match self {
            Self::Virtio(transport) => transport.shut_down(),
            Self::Host(function) => {
                function.shut_down();
                Ok(())
            }
        }
    }
}

/// A device in its place.
pub(super) struct Seat {
    pub(super) id: String,
    pub(super) driver: &'static str,
    pub(super) body: Body,
    pub(super) end: End,
    /// On the root bus; that of the root port for what is behind one.
    pub(super) addr: PciAddr,
    /// The root port whose slot it is in.
    pub(super) port: Option<String>,
}

/// A root port.
pub(super) struct Slot {
    pub(super) id: String,
    pub(super) port: Arc<RootPort>,
    pub(super) addr: PciAddr,
}

/// What everything on the bus is connected to.
pub(super) struct Fixtures {
    memory: Arc<GuestMemory>,
    doorbell: Arc<dyn Doorbell>,
    messages: Arc<dyn Messages>,
    pins: [Arc<SharedLine>; map::PINS],
    on_left: OnLeft,
    vm: Arc<VmFd>,
    /// Ways of the messages of devices of the host.
    routes: Arc<Routes>,
    /// The memory that devices of the host reach; there is none before the first of them.
    container: Mutex<Option<Arc<Container>>>,
}

impl Fixtures {
    pub(super) fn new(vm: &Arc<VmFd>, memory: &Arc<GuestMemory>, on_left: OnLeft) -> Self {
        let mut gsi = map::FIRST_PIN..;
        Self {
            memory: Arc::clone(memory),
            doorbell: Arc::new(KvmPciDoorbell(Arc::clone(vm))),
            messages: Arc::new(KvmMessages::new(Arc::clone(vm))),
            pins: std::array::from_fn(|_| {
                SharedLine::new(Arc::clone(vm), gsi.next().unwrap_or(map::FIRST_PIN))
            }),
            on_left,
            vm: Arc::clone(vm),
            routes: Arc::new(Routes::new(Arc::clone(vm))),
            container: Mutex::new(None),
        }
    }

    /// The memory that devices of the host reach, if there has been one.
    pub(super) fn container(&self) -> MutexGuard<'_, Option<Arc<Container>>> {
        self.container.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a device of the host, which comes to lie at `addr` of the root bus, or behind the port there.
    pub(super) fn take(
        &self,
        host: &HostAddress,
        addr: PciAddr,
        Place { behind_port, multifunction }: Place,
    ) -> Result<Body, VfioError> {
        let mut container = self.container();
        let opened = match &*container {
            Some(container) => Arc::clone(container),
            None => Container::open(&self.vm, &self.memory)?,
        };
        let wires = vfio::Wires {
            vm: Arc::clone(&self.vm),
            routes: Arc::clone(&self.routes),
            gsi: map::FIRST_PIN + u32::from(addr.slot) % map::PINS as u32,
        };
        let function = HostFunction::open(&opened, host, behind_port, multifunction, wires)?;
        *container = Some(opened);
        Ok(Body::Host(function))
    }

    /// The line of pin A of a device in `slot` of the root bus; a bridge passes on pin A of device 0 behind it as its own.
    fn line(&self, slot: u8) -> Arc<dyn Level> {
        self.pins[usize::from(slot) % map::PINS].share()
    }

    /// Connects a device that comes to lie at `addr` of the root bus, or behind the port there.
    pub(super) fn connect(
        &self,
        device: Box<dyn VirtioDevice>,
        addr: PciAddr,
        place: Place,
    ) -> Arc<PciTransport> {
        let wires = Wires {
            memory: Arc::clone(&self.memory),
            doorbell: Arc::clone(&self.doorbell),
            messages: Arc::clone(&self.messages),
            line: self.line(addr.slot),
        };
        PciTransport::new(device, place, wires)
    }
}

/// Tells the machine which port's device has left.
struct Left {
    port: String,
    tell: OnLeft,
}

impl PortEvents for Left {
    fn left(&self, device: Arc<dyn Function>) {
        // The machine has it too, and ends it.
        drop(device);
        (self.tell)(Departure::Port(self.port.clone()));
    }
}

/// Queues of a disk that does not say how many: each vCPU has one, and its interrupt.
pub(super) fn disk_queues(smp: &Smp) -> u16 {
    const MOST: u8 = 32;
    smp.cpus.min(MOST).into()
}

/// Opens the host ends of all devices.
pub(super) fn open(
    config: &VmConfig,
    inherited: &Inherited,
    workers: &Workers,
    others: &mut Others,
) -> Result<Plan, MachineError> {
    let mut plan = Plan { ports: Vec::new(), devices: Vec::new() };
    let mut nics = 0;
    for (device, place) in config.devices.iter().zip(config.pci_places()?) {
        let Device { id, driver, multifunction, .. } = device;
        let Some(place) = place else { continue };
        if let (DeviceDriver::PcieRootPort { port }, PciPlace::Root(addr)) = (driver, &place) {
            let (number, multifunction, fast_unplug) = (*port, *multifunction, config.fast_unplug);
            plan.ports.push((id.clone(), *addr, PortOptions { number, multifunction, fast_unplug }));
            continue;
        }
        if let DeviceDriver::VfioPci { host } = driver {
            plan.devices.push((id.clone(), place, *multifunction, Part::Host(host.clone())));
            continue;
        }
        let model = match driver {
            DeviceDriver::VirtioBlk { drive, .. } => {
                devices::disk(id, driver, disk_queues(&config.smp), config, inherited, workers)?.map(|disk| {
                    let end = End::Disk(drive.clone(), disk.port());
                    Model { driver: driver.pci_name(), device: Box::new(disk), end }
                })
            }
            DeviceDriver::VirtioNet { netdev, .. } if config.vhost_user_chardev(driver).is_none() => {
                nics += 1;
                devices::nic(id, driver, nics - 1, config, inherited, workers)?.map(|nic| {
                    let end = End::Nic(netdev.clone(), nic.port());
                    Model { driver: driver.pci_name(), device: Box::new(nic), end }
                })
            }
            _ => {
                let worker = workers.get(id, None)?;
                let device = others.make(id, driver, config, inherited, &worker)?;
                let end = match (driver, config.vhost_user_chardev(driver)) {
                    (DeviceDriver::VirtioNet { netdev, mac, .. }, _) => {
                        End::ServedNic(netdev.clone(), served_mac(config, id, *mac))
                    }
                    (_, Some(chardev)) => End::Served(chardev.to_owned()),
                    _ => End::Other,
                };
                Some(Model { driver: driver.pci_name(), device, end })
            }
        };
        let Some(model) = model else { continue };
        plan.devices.push((id.clone(), place, *multifunction, Part::Model(model)));
    }
    Ok(plan)
}

/// Puts the chipset, the root ports and the devices onto the root bus.
pub(super) fn populate(
    root: &Arc<Root>,
    bridge: &Arc<HostBridge>,
    plan: Plan,
    fixtures: &Fixtures,
) -> Result<(Vec<Slot>, Vec<Seat>), MachineError> {
    let is_host = |(.., part): &(_, _, _, Part)| matches!(part, Part::Host(_));
    if !plan.ports.is_empty() || plan.devices.iter().any(is_host) {
        vfio::allow_pinning();
    }
    root.add(Address { device: 0, function: 0 }, Arc::clone(bridge) as _)?;
    root.add(Address { device: 31, function: 0 }, lpc(map::PM_BASE))?;
    // The others have no address yet.
    root.sync();
    let mut slots = Vec::with_capacity(plan.ports.len());
    for (id, addr, options) in plan.ports {
        let events = Left { port: id.clone(), tell: Arc::clone(&fixtures.on_left) };
        let messages = Arc::clone(&fixtures.messages);
        let port = RootPort::new(options, messages, fixtures.line(addr.slot), Arc::new(events));
        root.add_port(address(addr), &port)?;
        slots.push(Slot { id, port, addr });
    }
    let mut seats = Vec::with_capacity(plan.devices.len());
    for (id, place, multifunction, part) in plan.devices {
        let (addr, slot) = match &place {
            PciPlace::Root(addr) => (*addr, None),
            PciPlace::Port(name) => {
                let slot = slots.iter().find(|slot| slot.id == *name);
                let slot = slot.ok_or_else(|| no_such(&id, "bus", name, "-device pcie-root-port"))?;
                (slot.addr, Some(slot))
            }
        };
        let at = Place { behind_port: slot.is_some(), multifunction };
        let (driver, body, end) = match part {
            Part::Model(Model { driver, device, end }) => {
                (driver, Body::Virtio(fixtures.connect(device, addr, at)), end)
            }
            Part::Host(host) => (HOST_DEVICE, fixtures.take(&host, addr, at)?, End::Other),
        };
        let port = match slot {
            None => {
                root.add(address(addr), body.function())?;
                None
            }
            // Places have been checked: the slot is empty.
            Some(slot) if slot.port.insert_cold(body.function()).is_err() => continue,
            Some(slot) => Some(slot.id.clone()),
        };
        seats.push(Seat { id, driver, body, end, addr, port });
    }
    Ok((slots, seats))
}

fn address(addr: PciAddr) -> Address {
    Address { device: addr.slot, function: addr.function }
}
