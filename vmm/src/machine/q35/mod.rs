//! q35 on x86_64: PCI Express, ACPI with its fixed hardware, direct kernel boot or firmware.
//!
//! ```text
//! I/O ports                                     memory
//! 0x61        KVM (PIT)                         0            RAM, to 2 GiB at most
//! 0x64        reset line of the 8042            0xb000_0000  ECAM, 256 MiB
//! 0x70, 0x71  clock, GSI 8                      0xc000_0000  BARs, 768 MiB
//! 0x3f8..400  serial, GSI 4                     0xfec0_0000  IOAPIC · 0xfee0_0000 LAPIC · 0xfef0_c000 KVM's own pages
//! 0x600..60c  ACPI registers, GSI 9             4 GiB        the rest of RAM
//! 0xce9, 0xcea  sleep                           behind it    what devices bring, then 64-bit BARs, 32 GiB
//!                                               0xf000_0000  with maxcpus: events, processors; GSI 10
//! 0xcf8..d00  configuration space, reset        to 4 GiB     flash, with firmware
//! 0x510..51c  fw_cfg, with firmware
//!
//! pcie.0: 00.0 host bridge · 1f.0 LPC · devices and root ports where bus= and addr= put them · INTx on GSI 16 to 19
//! ```
//!
//! [`Q35::build`] is in the order that KVM makes cheap, as on a microvm.

mod bus;
mod cpus;
mod firmware;
mod map;
mod plug;
mod saved;
mod served;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::VmFd;

use super::others::Others;
use super::plugging::{BlockDevice, NetDevice};
use super::snapshot::{Identity, Source, Stand, wake};
use super::workers::Workers;
use super::{CpuInfo, Departure, Environment, GuestEvent, MachineError, guest};
use crate::boot::{self, Board, BootFiles, Hardware, NumaNode, Pcie, Platform, SerialPort, Standard};
use crate::bus::{Bus, BusDevice};
use crate::config::{self, DeviceDriver, VmConfig};
use crate::cpu::x86_64::VcpuMaker;
use crate::cpu::{self, Buses, Topology, Vcpus, x86_64};
use crate::device::{
    GENERATION_IRQ, GenerationId, I8042Reset, PmRegisters, PowerRequest, Rtc, RtcPorts, SerialDevice,
    SleepRegister,
};
use crate::inherit::Inherited;
use crate::irq::{self, KvmLine, Line as _, SharedLine};
use crate::memory::{self, DeviceMemory, GuestMemory, layout};
use crate::pci::{HostBridge, Root};
use crate::snapshot::SnapshotError;
use crate::virtio::{balloon, mem};
use bus::{Fixtures, Seat, Slot};
use cpus::HotCpus;
use firmware::Firmware;
pub use firmware::FirmwareError;
use plug::Shelves;

const SERIAL: SerialPort = SerialPort { port: 0x3f8, irq: 4 };

/// What a guest is told about the machine each time it starts.
#[derive(Clone)]
struct Wiring {
    cpus: u8,
    max_cpus: u8,
    /// Whether each vCPU is there, by its number, when the guest starts.
    processors: Vec<bool>,
    topology: Topology,
    standard: Standard,
    pcie: Pcie,
    has_serial: bool,
    append: String,
    generation: GenerationId,
    /// Memory that was filled beforehand stays where it is.
    clears_memory: bool,
}

impl Wiring {
    fn platform(&self, dirty_memory: bool) -> Platform<'_> {
        self.platform_with(self.pcie, dirty_memory)
    }

    /// The same with another map.
    fn platform_with(&self, pcie: Pcie, dirty_memory: bool) -> Platform<'_> {
        Platform {
            boot_cpus: self.cpus,
            processors: &self.processors,
            topology: &self.topology,
            hardware: Hardware::Pcie(pcie),
            standard: Some(&self.standard),
            serial: self.has_serial.then_some(SERIAL),
            generation: self.generation,
            dirty_memory,
        }
    }
}

/// What a guest starts with.
enum Start {
    /// A kernel that is loaded, and entered.
    Kernel(BootFiles),
    Firmware(Firmware),
}

impl Start {
    fn firmware(&self) -> Option<&Firmware> {
        match self {
            Self::Kernel(_) => None,
            Self::Firmware(firmware) => Some(firmware),
        }
    }

    fn load(
        &mut self,
        memory: &GuestMemory,
        wiring: &Wiring,
        dirty: bool,
    ) -> Result<x86_64::BootState, MachineError> {
        match self {
            Self::Kernel(files) => Ok(boot::load(memory, files, &wiring.append, &wiring.platform(dirty))?),
            Self::Firmware(firmware) => firmware.load(memory, wiring),
        }
    }
}

/// A q35. Fields drop in this order: vCPUs stop before anything that they use goes.
pub(in crate::machine) struct Q35 {
    pub(in crate::machine) vcpus: Vcpus,
    workers: Workers,
    hot_cpus: Option<HotCpus>,
    root: Arc<Root>,
    slots: Vec<Slot>,
    seats: Vec<Seat>,
    shelves: Shelves,
    fixtures: Fixtures,
    inherited: Arc<Inherited>,
    wiring: Wiring,
    start: Start,
    serial: Option<Arc<SerialDevice>>,
    bridge: Arc<HostBridge>,
    pm: Arc<PmRegisters>,
    rtc: Arc<Rtc>,
    /// The guest has asked for a reset that has not come yet.
    resetting: Arc<AtomicBool>,
    pub(in crate::machine) balloon: Option<Arc<balloon::Port>>,
    /// Devices that hand memory out, by id.
    pub(in crate::machine) mems: Vec<(String, Arc<mem::Port>)>,
    /// What a snapshot says of the machine, but for its devices.
    identity: Identity,
    /// And of its flash.
    layout: Vec<String>,
    /// What it has that no snapshot can hold.
    excluded: Option<String>,
    /// It comes from a snapshot: until it is started its devices stand still.
    asleep: bool,
    /// What lies under guest memory is a snapshot; whether core dumps shall hold guest memory.
    from_snapshot: bool,
    dump_guest_core: bool,
    /// The VM file goes before guest memory, so that no slot outlives its mapping.
    vm: Arc<VmFd>,
    /// Kept for the same reason too.
    device_memory: DeviceMemory,
    pub(super) memory: Arc<GuestMemory>,
}

impl Q35 {
    pub(in crate::machine) fn build(
        config: &VmConfig,
        environment: Environment,
    ) -> Result<Self, MachineError> {
        let Environment { inherited, main_loop, guest_events, device_left, serial, chardevs } = environment;
        let topology = Topology::new(&config.smp)?;
        // What a user is most likely to have got wrong comes first, while failing is cheap.
        let source = match &config.incoming {
            Some(incoming) => Some(Source::open(incoming, config, &inherited)?),
            None => None,
        };
        let workers = Workers::new(config);
        let clock_loop = main_loop.clone();
        let memory = DeviceMemory::open(config, &inherited)?;
        let mut others =
            Others { chardevs, main_loop: main_loop.clone(), balloon: None, memory, mems: Vec::new() };
        let images = firmware::open(config, &inherited)?;
        let plan = bus::open(config, &inherited, &workers, &mut others)?;

        let (kvm, vm) = cpu::open(&inherited)?;
        x86_64::prepare_vm(&kvm, &vm)?;
        let memory = Arc::new(match &source {
            Some(source) => source.memory(config)?,
            None => memory::build(&config.memory, &config.machine)?,
        });
        memory::register(&vm, &memory)?;
        let Others { balloon, memory: device_memory, mems, .. } = others;
        device_memory.register(&vm)?;
        if let Some(images) = &images {
            images.register(&vm)?;
        }
        irq::create_controllers(&vm)?;
        let mut maker = VcpuMaker::new(&kvm, &topology)?;
        let vcpus = maker.make_first(&kvm, &vm, &topology, config.smp.cpus)?;
        let vm = Arc::new(vm);
        device_memory.attach(&vm);

        let buses = Buses { ports: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) };
        let (windows, pcie) = map::windows(config.memory.size, device_memory.end(), images.is_some());
        let root = Root::new(Arc::clone(&buses.mmio), windows);
        let bridge = HostBridge::new(map::ECAM, root.ecam());
        let can_grow = config.smp.max_cpus > config.smp.cpus;
        let hot_cpus = can_grow
            .then(|| HotCpus::new(&config.smp, maker, &vm, Arc::clone(&device_left), &buses.mmio))
            .transpose()?;
        let fixtures = Fixtures::new(&vm, &device_memory.with(&memory)?, device_left);
        let (slots, seats) = bus::populate(&root, &bridge, plan, &fixtures)?;

        let resetting = Arc::new(AtomicBool::new(false));
        let events = once_until_done(guest_events, &resetting);
        let on_power = guest::on_power(&events);
        let (power, reset) = (Arc::clone(&on_power), PowerRequest::Reset);
        let ports = &buses.ports;
        ports.insert(map::CONFIG_PORTS, 8, root.ports(Box::new(move || power(reset))))?;
        ports.insert(I8042Reset::PORT, 1, Arc::new(I8042Reset::new(Arc::clone(&on_power))))?;
        let line = SharedLine::new(Arc::clone(&vm), Rtc::GSI).share();
        let rtc = Rtc::new(line, clock_loop, &memory_sizes(config.memory.size));
        ports.insert(Rtc::PORT, Rtc::PORTS, Arc::new(RtcPorts::new(&rtc)))?;
        let sleep = SleepRegister::new(Arc::clone(&on_power));
        ports.insert(map::SLEEP.into(), SleepRegister::PORTS, Arc::new(sleep))?;
        let pm = PmRegisters::new(on_power, SharedLine::new(Arc::clone(&vm), map::SCI).share());
        ports.insert(map::PM_BASE.into(), PmRegisters::PORTS, Arc::clone(&pm) as _)?;
        let serial = serial
            .map(|backend| SerialDevice::new(Arc::new(KvmLine::new(Arc::clone(&vm), SERIAL.irq)), backend));
        if let Some(port) = &serial {
            let port = Arc::clone(port) as Arc<dyn BusDevice>;
            ports.insert(SERIAL.port.into(), SerialDevice::PORTS, port)?;
        }

        let wiring = Wiring {
            cpus: config.smp.cpus,
            max_cpus: config.smp.max_cpus,
            processors: hot_cpus
                .as_ref()
                .map_or_else(|| vec![true; config.smp.cpus.into()], HotCpus::present),
            topology,
            standard: standard(config, &device_memory),
            pcie,
            has_serial: serial.is_some(),
            append: config.boot.append.clone(),
            generation: GenerationId::new(),
            clears_memory: !config.memory.prealloc,
        };
        let layout = images.as_ref().map(|images| images.layout().to_vec()).unwrap_or_default();
        let mut start = match images {
            Some(images) => Start::Firmware(images.connect(&vm, &memory, &bridge, &buses)?),
            None => Start::Kernel(BootFiles::open(&config.boot, &inherited)?),
        };
        let identity = Identity::new(config, serial.is_some());
        let from_snapshot = source.is_some();
        match source {
            Some(mut source) => {
                source.apply_core(&vm, &vcpus, serial.as_deref())?;
                if let Some(firmware) = start.firmware() {
                    firmware.tell(&wiring)?;
                }
                let (root, firmware) = (&root, start.firmware());
                let chipset =
                    saved::Board { root, bridge: &bridge, pm: &pm, rtc: &rtc, firmware, layout: &layout };
                saved::restore(source, &identity, (&slots, &seats), &chipset)?;
                // Another VM than the one that was saved, and than all that go on from the same.
                wiring.generation.write(&memory).map_err(SnapshotError::Memory)?;
            }
            None => {
                let dirty = memory::may_be_dirty(&config.memory);
                let state = start.load(&memory, &wiring, dirty)?;
                if let Some(first) = vcpus.first() {
                    state.apply(first.fd())?;
                }
            }
        }
        let vcpus = Vcpus::new(vcpus, buses, guest::on_end(events));
        let shelves = Shelves::new(config, &seats, main_loop);
        Ok(Self {
            vcpus,
            workers,
            hot_cpus,
            root,
            slots,
            seats,
            shelves,
            fixtures,
            inherited,
            wiring,
            start,
            serial,
            bridge,
            pm,
            rtc,
            resetting,
            balloon,
            mems,
            identity,
            layout,
            excluded: config.snapshot_exclusion(),
            asleep: from_snapshot,
            from_snapshot,
            dump_guest_core: config.machine.dump_guest_core,
            vm,
            device_memory,
            memory,
        })
    }

    /// Starts the vCPUs, once.
    pub(in crate::machine) fn start(&mut self, paused: bool) -> Result<(), MachineError> {
        if !std::mem::take(&mut self.asleep) {
            return Ok(self.vcpus.start(paused)?);
        }
        self.vcpus.start(true)?;
        wake(&self.vcpus, self.stands())?;
        KvmLine::new(Arc::clone(&self.vm), GENERATION_IRQ).trigger();
        if !paused {
            self.vcpus.resume();
        }
        Ok(())
    }

    /// The devices by place.
    pub(in crate::machine) fn stands(&self) -> Vec<Stand> {
        saved::stands(&self.seats)
    }

    /// Presses the power button. A guest that has not enabled it does not notice.
    pub(in crate::machine) fn press_power_button(&self) {
        self.pm.press_button();
    }

    /// Everything as at power-on, and the kernel loaded again. The vCPUs must be paused, and stay so.
    pub(in crate::machine) fn reset(&mut self) -> Result<(), MachineError> {
        self.root.reset();
        self.mems.iter().for_each(|(_, device)| device.unplug_all());
        self.pm.reset();
        self.rtc.reset();
        if let Some(serial) = &self.serial {
            serial.reset();
        }
        if let Some(cpus) = &self.hot_cpus {
            cpus.reset();
            self.wiring.processors = cpus.present();
        }
        irq::reset_controllers(&self.vm)?;
        let renews = std::mem::take(&mut self.from_snapshot);
        if renews || self.wiring.clears_memory {
            let replace = || -> Result<(), MachineError> {
                if renews {
                    return Ok(memory::renew(&self.memory, self.dump_guest_core)?);
                }
                guest::clear(&self.memory);
                Ok(())
            };
            match &*self.fixtures.container() {
                Some(container) => container.while_unmapped(replace)?,
                None => replace(),
            }?;
        }
        let state = self.start.load(&self.memory, &self.wiring, true)?;
        guest::reset_vcpus(&self.vcpus, &self.wiring.topology, self.wiring.max_cpus, state)?;
        self.resetting.store(false, Ordering::Release);
        Ok(())
    }

    /// Block nodes: those that devices use first.
    pub(in crate::machine) fn block_devices(&self) -> Vec<BlockDevice> {
        self.shelves.block_devices(&self.seats)
    }

    /// Network back ends: those that devices use first.
    pub(in crate::machine) fn net_devices(&self) -> Vec<NetDevice> {
        self.shelves.net_devices(&self.seats)
    }

    pub(in crate::machine) fn iothreads(&self) -> Vec<(String, i32)> {
        self.workers.named().map(|(id, worker)| (id.to_owned(), worker.tid().unwrap_or(0))).collect()
    }

    pub(in crate::machine) fn cpus(&self) -> Vec<CpuInfo> {
        guest::cpus(&self.vcpus, &self.wiring.topology)
    }

    /// Goes through all devices even if one fails, and returns the first failure.
    pub(in crate::machine) fn shut_down(mut self) -> Result<(), MachineError> {
        let mut result = self.vcpus.stop().map_err(MachineError::from);
        for Seat { id, body, .. } in &self.seats {
            if let Err(source) = body.shut_down() {
                let error = MachineError::Flush { device: id.clone(), source };
                if result.is_ok() {
                    result = Err(error);
                } else {
                    tracing::error!("{error}");
                }
            }
        }
        result
    }
}

/// Where firmware has looked for the size of RAM since there were PCs: bytes of the clock's memory, in units of 64 KiB, low byte first.
fn memory_sizes(ram: u64) -> [(u8, u8); 5] {
    // From 16 MiB up to the hole, and behind it.
    let low = ram.min(layout::Q35_GAP_START).saturating_sub(16 << 20) >> 16;
    let high = ram.saturating_sub(layout::Q35_GAP_START) >> 16;
    let byte = |number: u64, at: usize| number.to_le_bytes().get(at).copied().unwrap_or(0);
    [
        (0x34, byte(low, 0)),
        (0x35, byte(low, 1)),
        (0x5b, byte(high, 0)),
        (0x5c, byte(high, 1)),
        (0x5d, byte(high, 2)),
    ]
}

/// What the tables say beyond the devices.
fn standard(config: &VmConfig, device_memory: &DeviceMemory) -> Standard {
    let mut free = layout::ram(config.memory.size, layout::Q35_GAP_START);
    let memory = free.iter().map(|range| (range.base, range.size)).collect();
    let texts = config.smbios.iter().map(|t| (t.table, t.key, t.value.clone())).collect();
    let board = Board { texts, uuid: config.uuid.unwrap_or_default(), memory };
    let numa = &config.numa;
    let size = |memdev: &str| config.memory.backends.iter().find(|b| b.id == memdev).map_or(0, |b| b.size);
    // A file that the guest sees as memory says no node: it is of none.
    let handed_out = |wanted: u8| {
        let of_node = config.devices.iter().filter(move |device| match &device.driver {
            DeviceDriver::VirtioMem { node, .. } => *node == u16::from(wanted),
            _ => false,
        });
        of_node.filter_map(|device| device_memory.get(&device.id)).map(|r| (r.base(), r.size())).collect()
    };
    let node = |node: &config::NumaNode| NumaNode {
        cpus: node.cpus.clone(),
        memory: layout::take(&mut free, size(&node.memdev)).iter().map(|r| (r.base, r.size)).collect(),
        device_memory: handed_out(node.id),
        distances: numa.nodes.iter().map(|to| numa.distance(node.id, to.id)).collect(),
    };
    let numa = numa.nodes.iter().map(node).collect();
    Standard { numa, board }
}

/// Passes a request for a reset on once until it has been carried out: a guest that asks runs on for a moment, and asks again by another way.
fn once_until_done(events: guest::OnGuest, resetting: &Arc<AtomicBool>) -> guest::OnGuest {
    let resetting = Arc::clone(resetting);
    Arc::new(move |event| {
        if event != GuestEvent::Reset || !resetting.swap(true, Ordering::AcqRel) {
            events(event);
        }
    })
}
