//! vCPUs that come and go while the guest runs (`-smp N,maxcpus=M`): owns who has come by which name, and those that have left, for KVM cannot
//! take a vCPU out of a VM.
//!
//! A vCPU is made when it is first plugged and waits for the guest to start it; one that has left waits here, out of the guest, until its number
//! is plugged again. The guest is told through the registers of [`CpuController`], by an interrupt of [`EventRegister`].

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::map;
use crate::bus::{Bus, BusError};
use crate::config::Smp;
use crate::cpu::x86_64::{self, VcpuMaker};
use crate::cpu::{Topology, Vcpu, Vcpus};
use crate::device::{CpuController, EVENT_CPUS, EventRegister};
use crate::irq::KvmLine;
use crate::machine::hotplug::NewDevice;
use crate::machine::plugging::{HotplugError, PlugError};
use crate::machine::{Departure, OnLeft};
use crate::pci::Pending;

/// What `device_add` calls a vCPU.
pub(super) const DRIVER: &str = "generic-x86-cpu";

/// The vCPUs that can be plugged.
pub(super) struct HotCpus {
    controller: Arc<CpuController>,
    events: Arc<EventRegister>,
    maker: VcpuMaker,
    boot: u8,
    most: u8,
    /// By number, with the names of their devices.
    plugged: Vec<(u8, String)>,
    /// Have left, and may come again.
    spare: Vec<Vcpu>,
}

impl HotCpus {
    /// Puts the registers onto the bus. `on_left` is told the number of a vCPU that the guest has let go.
    pub(super) fn new(
        smp: &Smp,
        maker: VcpuMaker,
        vm: &Arc<VmFd>,
        on_left: OnLeft,
        mmio: &Bus,
    ) -> Result<Self, BusError> {
        let (boot, most) = (smp.cpus, smp.max_cpus);
        let left = Box::new(move |index| on_left(Departure::Cpu(index)));
        let controller = CpuController::new(boot, most, left);
        let events = EventRegister::new(Arc::new(KvmLine::new(Arc::clone(vm), map::EVENTS.gsi)));
        mmio.insert(map::EVENTS.events, EventRegister::SIZE, Arc::clone(&events) as _)?;
        mmio.insert(map::EVENTS.cpus, CpuController::SIZE, Arc::clone(&controller) as _)?;
        Ok(Self { controller, events, maker, boot, most, plugged: Vec::new(), spare: Vec::new() })
    }

    /// By number, whether each is there.
    pub(super) fn present(&self) -> Vec<bool> {
        self.controller.present()
    }

    /// The machine is reset: those that were asked to leave do.
    pub(super) fn reset(&self) {
        self.events.reset();
        self.controller.reset();
    }

    /// Names of the devices.
    pub(super) fn ids(&self) -> impl Iterator<Item = &str> {
        self.plugged.iter().map(|(_, id)| id.as_str())
    }

    /// Adds the vCPU that a client has asked for, and tells the guest.
    pub(super) fn plug(
        &mut self,
        new: &NewDevice,
        vm: &VmFd,
        topology: &Topology,
        vcpus: &mut Vcpus,
    ) -> Result<(), HotplugError> {
        let wanted = new.cpu_id.ok_or(PlugError::NoCpuId)?;
        let index = u8::try_from(wanted).ok().filter(|index| *index < self.most);
        let index = index.ok_or(PlugError::CpuIdMax(self.most - 1))?;
        if index < self.boot {
            return Err(PlugError::CpuIdExists(index).into());
        }
        if let Some((_, id)) = self.plugged.iter().find(|(known, _)| *known == index) {
            return Err(PlugError::CpuIdRuns(index, id.clone()).into());
        }
        let vcpu = match self.spare.iter().position(|vcpu| vcpu.index() == index) {
            Some(at) => self.spare.swap_remove(at),
            None => self.maker.make(vm, topology, index)?,
        };
        // A new one, too: KVM looks for the target of an interrupt among the vCPUs that there were when the state of a local APIC last changed, and
        // a guest that has been running for a while changes none. The topology has checked that every id fits.
        if let Err(error) = x86_64::reset(&vcpu, topology.apic_id(index) as u8, None) {
            self.spare.push(vcpu);
            return Err(error.into());
        }
        vcpus.add(vcpu)?;
        self.plugged.push((index, new.id.clone()));
        self.controller.plug(index);
        self.events.raise(EVENT_CPUS);
        Ok(())
    }

    /// Asks the guest to let the vCPU of this name go; false if there is none.
    pub(super) fn ask_removal(&self, id: &str) -> Result<bool, PlugError> {
        let Some((index, _)) = self.plugged.iter().find(|(_, known)| known == id) else { return Ok(false) };
        if !self.controller.ask_removal(*index) {
            return Err(Pending.into());
        }
        self.events.raise(EVENT_CPUS);
        Ok(true)
    }

    /// The guest has let a vCPU go: takes it out, and returns its name.
    pub(super) fn left(&mut self, index: u8, topology: &Topology, vcpus: &mut Vcpus) -> Option<String> {
        let at = self.plugged.iter().position(|(known, _)| *known == index)?;
        let (_, id) = self.plugged.remove(at);
        let spare = vcpus.remove(index).and_then(|vcpu| {
            // KVM still has it: with its local APIC as the guest has left it, it would take interrupts that are meant for others.
            vcpu.map(|vcpu| x86_64::reset(&vcpu, topology.apic_id(index) as u8, None).map(|()| vcpu))
                .transpose()
        });
        match spare {
            Ok(vcpu) => self.spare.extend(vcpu),
            Err(error) => tracing::error!(device = id, "this vCPU cannot be used again: {error}"),
        }
        Some(id)
    }
}
