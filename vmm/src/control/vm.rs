//! What the owner of a VM's life needs of a machine: the seam between the two, which tests put a machine of their own behind.

use std::sync::Arc;

use crate::machine::{BlockDevice, CpuInfo, Departure, Hotplug, HotplugError, Machine, NetDevice, Plugged};
use crate::snapshot::Target;
use crate::virtio::mem;

/// An error of the machine.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What the owner needs of a machine: the seam between a VM's life and its parts.
pub trait Vm: Send {
    /// Returns when every vCPU is out of the guest; on failure they all run.
    fn pause(&mut self) -> Result<(), BoxError>;
    /// Lets the vCPUs run.
    fn resume(&mut self) -> Result<(), BoxError>;
    /// The online vCPUs.
    fn cpus(&self) -> Vec<CpuInfo>;
    /// Memory that the guest has, in bytes, if it has a balloon.
    fn balloon(&self) -> Option<u64>;
    /// Asks the guest to keep so many bytes. Without effect where there is no balloon.
    fn set_balloon(&mut self, bytes: u64);
    /// The virtio-mem device of this name.
    fn memory_device(&self, id: &str) -> Option<Arc<mem::Port>>;
    /// The four bytes of guest RAM at an address, as a number.
    fn peek(&self, address: u64) -> Option<u32>;
    /// Puts a paused machine back to its start; after an error it cannot go on.
    fn reset(&mut self) -> Result<(), BoxError>;
    /// Asks the guest to power down.
    fn press_power_button(&mut self);
    /// Adds, removes, plugs or unplugs a back end or device; after an error everything is as before.
    fn hotplug(&mut self, request: Hotplug) -> Result<Plugged, HotplugError>;
    /// The guest has let this go: ends it, and returns its name.
    fn device_left(&mut self, departure: &Departure) -> Option<String>;
    /// Block nodes, those that devices use first.
    fn block_devices(&self) -> Vec<BlockDevice>;
    /// Network back ends, those that devices use first.
    fn net_devices(&self) -> Vec<NetDevice>;
    /// Devices by id, with their drivers.
    fn devices(&self) -> Vec<(String, &'static str)>;
    /// Named I/O threads with the host's thread, 0 while there is none.
    fn iothreads(&self) -> Vec<(String, i32)>;
    /// Saves a paused machine, and leaves it as it was.
    fn save(&mut self, target: &Target) -> Result<(), BoxError>;
    /// Ends it: no thread of it runs afterwards, and what the guest has written is durable.
    fn shut_down(self: Box<Self>) -> Result<(), BoxError>;
}

impl Vm for Machine {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(Self::pause(self)?)
    }
    fn resume(&mut self) -> Result<(), BoxError> {
        Self::resume(self);
        Ok(())
    }
    fn cpus(&self) -> Vec<CpuInfo> {
        Self::cpus(self)
    }
    fn balloon(&self) -> Option<u64> {
        Self::balloon(self).map(|port| port.actual())
    }
    fn set_balloon(&mut self, bytes: u64) {
        if let Some(port) = Self::balloon(self) {
            port.set_target(bytes);
        }
    }
    fn memory_device(&self, id: &str) -> Option<Arc<mem::Port>> {
        Self::memory_device(self, id)
    }
    fn peek(&self, address: u64) -> Option<u32> {
        Self::peek(self, address)
    }
    fn reset(&mut self) -> Result<(), BoxError> {
        Ok(Self::reset(self)?)
    }
    fn press_power_button(&mut self) {
        Self::press_power_button(self);
    }
    fn hotplug(&mut self, request: Hotplug) -> Result<Plugged, HotplugError> {
        Self::hotplug(self, request)
    }
    fn device_left(&mut self, departure: &Departure) -> Option<String> {
        Self::device_left(self, departure)
    }
    fn block_devices(&self) -> Vec<BlockDevice> {
        Self::block_devices(self)
    }
    fn net_devices(&self) -> Vec<NetDevice> {
        Self::net_devices(self)
    }
    fn devices(&self) -> Vec<(String, &'static str)> {
        Self::devices(self)
    }
    fn iothreads(&self) -> Vec<(String, i32)> {
        Self::iothreads(self)
    }
    fn save(&mut self, target: &Target) -> Result<(), BoxError> {
        Ok(Self::save(self, target)?)
    }
    fn shut_down(self: Box<Self>) -> Result<(), BoxError> {
        Ok(Self::shut_down(*self)?)
    }
}
