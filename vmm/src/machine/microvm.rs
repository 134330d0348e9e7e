//! microvm on x86_64: virtio-mmio devices, one serial port, ACPI without ACPI hardware; no PCI, no firmware.
//!
//! ```text
//! I/O ports                             memory
//! 0x61        KVM (PIT)                 0           RAM, to 3 GiB at most
//! 0x64        reset line of the 8042    0xf010_0000 virtio-mmio, windows for the kernel command line
//! 0x70, 0x71  no clock                  0xf020_0000 virtio-mmio, the same devices' windows for ACPI
//! 0x3f8..400  serial, GSI 4             0xfec0_0000 IOAPIC · 0xfee0_0000 LAPIC · 0xfef0_c000 KVM's own pages
//! 0x600..604  ACPI registers            4 GiB       the rest of RAM, then what devices bring · GSI 1 VM Generation ID
//! ```
//!
//! [`Microvm::build`] is in the order that KVM makes cheap; the reasons are there.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::doorbell::KvmDoorbell;
use super::guest;
use super::others::Others;
use super::replaceable::Replaceable;
use super::seating::Seating;
use super::slots::{self, Slot};
use super::snapshot::{Identity, Parts, Source, Stand, wake};
use super::workers::Workers;
use super::{CpuInfo, Environment, MachineError};
use crate::boot::{self, AcpiPorts, BootFiles, Hardware, MmioSlot, Platform, Reduced, SerialPort};
use crate::bus::{Bus, BusDevice};
use crate::config::{MAX_CPUS, VmConfig};
use crate::cpu::{self, Buses, Topology, Vcpus, x86_64};
use crate::device::{AcpiRegisters, GENERATION_IRQ, GenerationId, I8042Reset, NoClock, SerialDevice};
use crate::irq::{self, KvmLine, Line};
use crate::memory::{self, DeviceMemory, GuestMemory};
use crate::snapshot::SnapshotError;
use crate::virtio::{Doorbell, balloon, mem};

const SERIAL: SerialPort = SerialPort { port: 0x3f8, irq: 4 };
const ACPI_BASE: u16 = 0x600;
/// Of the power button. Below the slots' interrupts, and a line of which no PC has anything that Linux looks for on its own here.
const BUTTON_IRQ: u32 = 3;

/// What a guest is told about the machine each time it starts.
struct Wiring {
    cpus: u8,
    topology: Topology,
    places: Vec<MmioSlot>,
    has_serial: bool,
    append: String,
    generation: GenerationId,
    /// Memory that was filled beforehand stays where it is.
    clears_memory: bool,
}

/// No processor of a microvm comes or goes.
const ALL_THERE: [bool; MAX_CPUS as usize] = [true; MAX_CPUS as usize];

impl Wiring {
    fn platform(&self, dirty_memory: bool) -> Platform<'_> {
        Platform {
            boot_cpus: self.cpus,
            processors: ALL_THERE.get(..usize::from(self.cpus)).unwrap_or_default(),
            topology: &self.topology,
            hardware: Hardware::Reduced(Reduced {
                slots: &self.places,
                acpi: AcpiPorts {
                    sleep_control: ACPI_BASE + AcpiRegisters::SLEEP_CONTROL,
                    sleep_status: ACPI_BASE + AcpiRegisters::SLEEP_STATUS,
                    reset: ACPI_BASE + AcpiRegisters::RESET,
                    claim: ACPI_BASE + AcpiRegisters::CLAIM,
                },
                button_irq: BUTTON_IRQ,
            }),
            standard: None,
            serial: self.has_serial.then_some(SERIAL),
            generation: self.generation,
            dirty_memory,
        }
    }
}

/// A microvm. Fields drop in this order: vCPUs stop before anything that they use goes.
pub(super) struct Microvm {
    pub(super) vcpus: Vcpus,
    pub(super) replaceable: Replaceable,
    workers: Workers,
    slots: Arc<[Slot]>,
    wiring: Wiring,
    files: BootFiles,
    serial: Option<Arc<SerialDevice>>,
    button: Arc<dyn Line>,
    pub(super) balloon: Option<Arc<balloon::Port>>,
    /// Devices that hand memory out, by id.
    pub(super) mems: Vec<(String, Arc<mem::Port>)>,
    /// What a snapshot says of the machine.
    identity: Identity,
    /// What it has that no snapshot can hold.
    excluded: Option<String>,
    /// It comes from a snapshot: until it is started its devices stand still.
    asleep: bool,
    /// What lies under guest memory is a snapshot; whether core dumps shall hold guest memory.
    from_snapshot: bool,
    dump_guest_core: bool,
    /// The VM file goes before guest memory, so that no slot outlives its mapping.
    vm: Arc<VmFd>,
    /// Kept for the same reason.
    _device_memory: DeviceMemory,
    pub(super) memory: Arc<GuestMemory>,
}

impl Microvm {
    pub(super) fn build(config: &VmConfig, environment: Environment) -> Result<Self, MachineError> {
        let Environment { inherited, main_loop, guest_events, serial, chardevs, .. } = environment;
        let topology = Topology::new(&config.smp)?;
        // What a user is most likely to have got wrong comes first, while failing is cheap.
        let source = match &config.incoming {
            Some(incoming) => Some(Source::open(incoming, config, &inherited)?),
            None => None,
        };
        let workers = Workers::new(config);
        let device_memory = DeviceMemory::open(config, &inherited)?;
        let mut others =
            Others { chardevs, main_loop, balloon: None, memory: device_memory, mems: Vec::new() };
        let seating = Seating::new(config, source.as_ref().map_or(&[], |source| source.occupants()));
        let (occupants, ports) = slots::fill(config, &seating, &inherited, &workers, &mut others)?;
        let replaceable = Replaceable::new(config, &seating, ports, Arc::clone(&inherited), workers.clone())?;

        // KVM waits out a grace period for each memory slot and each routing entry that it gets once interrupt controllers exist
        // (about 8 ms each), so: slots, controllers, vCPUs, in this order; and no ioeventfd or irqfd before a driver needs it.
        let (kvm, vm) = cpu::open(&inherited)?;
        x86_64::prepare_vm(&kvm, &vm)?;
        let memory = Arc::new(match &source {
            Some(source) => source.memory(config)?,
            None => memory::build(&config.memory, &config.machine)?,
        });
        memory::register(&vm, &memory)?;
        let Others { balloon, memory: device_memory, mems, .. } = others;
        device_memory.register(&vm)?;
        irq::create_controllers(&vm)?;
        let vcpus = x86_64::create_vcpus(&kvm, &vm, &topology, config.smp.cpus)?;
        let vm = Arc::new(vm);
        device_memory.attach(&vm);

        let buses = Buses { ports: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) };
        let doorbell: Arc<dyn Doorbell> = Arc::new(KvmDoorbell(Arc::clone(&vm)));
        let line = |gsi| -> Arc<dyn Line> { Arc::new(KvmLine::new(Arc::clone(&vm), gsi)) };
        let all_memory = device_memory.with(&memory)?;
        let slots: Arc<[Slot]> = slots::connect(occupants, &all_memory, &doorbell, line, &buses.mmio)?.into();
        let on_power = guest::on_power(&guest_events);
        buses.ports.insert(I8042Reset::PORT, 1, Arc::new(I8042Reset::new(Arc::clone(&on_power))))?;
        buses.ports.insert(NoClock::PORT, NoClock::PORTS, Arc::new(NoClock))?;
        let claimed = Arc::clone(&slots);
        let on_claim = move |number: u8| {
            if let Some(slot) = claimed.get(usize::from(number)) {
                slot.transport.claim_acpi();
            }
        };
        let registers = AcpiRegisters::new(on_power, Box::new(on_claim));
        buses.ports.insert(ACPI_BASE.into(), AcpiRegisters::PORTS, Arc::new(registers))?;
        let serial = serial.map(|backend| SerialDevice::new(line(SERIAL.irq), backend));
        if let Some(port) = &serial {
            let port = Arc::clone(port) as Arc<dyn BusDevice>;
            buses.ports.insert(SERIAL.port.into(), SerialDevice::PORTS, port)?;
        }

        let wiring = Wiring {
            cpus: config.smp.cpus,
            topology,
            places: (0..slots.len()).map(slots::place).collect(),
            has_serial: serial.is_some(),
            append: config.boot.append.clone(),
            generation: GenerationId::new(),
            clears_memory: !config.memory.prealloc,
        };
        let mut files = BootFiles::open(&config.boot, &inherited)?;
        let identity = Identity::new(config, serial.is_some()).with_devices(slots.len(), Vec::new());
        let from_snapshot = source.is_some();
        match source {
            Some(mut source) => {
                source.apply_core(&vm, &vcpus, serial.as_deref())?;
                source.apply_devices(&identity, &stands_of(&slots))?;
                // Another VM than the one that was saved, and than all that go on from the same.
                wiring.generation.write(&memory).map_err(SnapshotError::Memory)?;
            }
            None => {
                let dirty = memory::may_be_dirty(&config.memory);
                let state = boot::load(&memory, &mut files, &wiring.append, &wiring.platform(dirty))?;
                if let Some(first) = vcpus.first() {
                    state.apply(first.fd())?;
                }
            }
        }
        let vcpus = Vcpus::new(vcpus, buses, guest::on_end(guest_events));
        Ok(Self {
            vcpus,
            replaceable,
            workers,
            slots,
            wiring,
            files,
            serial,
            button: line(BUTTON_IRQ),
            balloon,
            mems,
            identity,
            excluded: config.snapshot_exclusion(),
            asleep: from_snapshot,
            from_snapshot,
            dump_guest_core: config.machine.dump_guest_core,
            vm,
            _device_memory: device_memory,
            memory,
        })
    }

    /// Starts the vCPUs, once.
    pub(super) fn start(&mut self, paused: bool) -> Result<(), MachineError> {
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

    /// The devices by slot.
    pub(super) fn stands(&self) -> Vec<Stand> {
        stands_of(&self.slots)
    }

    /// What a snapshot holds of it.
    pub(super) fn parts(&self) -> Parts<'_> {
        Parts {
            identity: self.identity.clone(),
            excluded: self.excluded.as_ref(),
            occupants: self.replaceable.occupants(),
            devices: self.stands(),
            vcpus: &self.vcpus,
            vm: &self.vm,
            memory: &self.memory,
            serial: self.serial.as_deref(),
            own: Vec::new(),
        }
    }

    /// Presses the power button. A guest that has not asked for its interrupt does not notice.
    pub(super) fn press_power_button(&self) {
        self.button.trigger();
    }

    /// Everything as at power-on, and the kernel loaded again. The vCPUs must be paused, and stay so.
    pub(super) fn reset(&mut self) -> Result<(), MachineError> {
        for slot in self.slots.iter() {
            slot.transport.reset();
        }
        self.mems.iter().for_each(|(_, device)| device.unplug_all());
        if let Some(serial) = &self.serial {
            serial.reset();
        }
        irq::reset_controllers(&self.vm)?;
        if std::mem::take(&mut self.from_snapshot) {
            memory::renew(&self.memory, self.dump_guest_core)?;
        } else if self.wiring.clears_memory {
            guest::clear(&self.memory);
        }
        let platform = self.wiring.platform(true);
        let state = boot::load(&self.memory, &mut self.files, &self.wiring.append, &platform)?;
        guest::reset_vcpus(&self.vcpus, &self.wiring.topology, self.wiring.cpus, state)?;
        Ok(())
    }

    pub(super) fn iothreads(&self) -> Vec<(String, i32)> {
        self.workers.named().map(|(id, worker)| (id.to_owned(), worker.tid().unwrap_or(0))).collect()
    }

    pub(super) fn cpus(&self) -> Vec<CpuInfo> {
        guest::cpus(&self.vcpus, &self.wiring.topology)
    }

    /// Goes through all devices even if one fails, and returns the first failure.
    pub(super) fn shut_down(mut self) -> Result<(), MachineError> {
        let mut result = self.vcpus.stop().map_err(MachineError::from);
        for (number, slot) in self.slots.iter().enumerate() {
            if let Err(source) = slot.transport.shut_down() {
                let device = slot.id.clone().unwrap_or_else(|| format!("slot {number}"));
                let error = MachineError::Flush { device, source };
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

fn stands_of(slots: &[Slot]) -> Vec<Stand> {
    let stand = |(slot, number): (&Slot, u32)| Stand {
        name: slot.name(number as usize),
        instance: number,
        transport: Arc::clone(&slot.transport) as _,
    };
    slots.iter().zip(0..).map(stand).collect()
}
