//! The host's side: one container for the VM with the memory that devices may reach, the groups in it, and devices as files.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use kvm_bindings::{
    KVM_DEV_VFIO_GROUP, KVM_DEV_VFIO_GROUP_ADD, KVM_DEV_VFIO_GROUP_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vm_memory::{Address as _, GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::ioctl::{self, Irq, REGION_CONFIG, Region};
use crate::config::HostAddress;
use crate::memory::GuestMemory;
use crate::memory::discard::Pin;

/// KVM's numbers of slots for BARs begin here, behind those of memory and flash. Old kernels have 509.
const FIRST_SLOT: u32 = 320;
/// BARs of a device.
pub(super) const BARS: u32 = 6;

/// Why a device of the host cannot be handed over.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// No such device, or no IOMMU.
    #[error("host device {0} is in no IOMMU group: check its address, and that the host's IOMMU is on")]
    NoGroup(HostAddress),
    /// Another driver has it, or one of its group.
    #[error(
        "host device {0}: its IOMMU group {1} is not free: bind each device in it to vfio-pci, and see that no other VM uses one"
    )]
    NotViable(HostAddress, u32),
    /// A file of VFIO's.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A kernel or an IOMMU that cannot keep devices apart.
    #[error("this host's VFIO has no type 1 IOMMU (version 2)")]
    NoIommu,
    /// Not a PCI device.
    #[error("host device {0} is no PCI device")]
    NotPci(HostAddress),
    /// Guest memory after a reset.
    #[error("cannot map guest memory for devices of the host again: {0}")]
    Map(#[source] io::Error),
    /// Anything else.
    #[error("host device {device}: cannot {what}: {source}")]
    Host {
        /// Which device.
        device: HostAddress,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// Lets this process keep guest memory in place, as far as it may say so itself: a device of the host that is plugged later needs it when the right to do
/// without (CAP_IPC_LOCK) has been given up. Call before that.
pub fn allow_pinning() {
    let all = Rlimit { current: None, maximum: None };
    if setrlimit(Resource::Memlock, all).is_err() {
        let maximum = getrlimit(Resource::Memlock).maximum;
        // What is still missing is an error when memory is mapped, which says so.
        let _ = setrlimit(Resource::Memlock, Rlimit { current: maximum, maximum });
    }
}

fn open(path: PathBuf) -> Result<OwnedFd, VfioError> {
    let file = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    file.map_err(|e| VfioError::Open { path, source: e.into() })
}

/// The memory that the VM's devices may reach.
pub struct Container {
    fd: OwnedFd,
    memory: Arc<GuestMemory>,
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    groups: Vec<Weak<Group>>,
    /// KVM is told of groups: it then knows whether DMA goes past caches.
    kvm: Option<DeviceFd>,
    /// Ranges of guest memory that are mapped; none until there is a group.
    mapped: Vec<(u64, u64)>,
    pin: Option<Pin>,
    /// Numbers of KVM's memory slots that show BARs.
    slots: BTreeSet<u32>,
}

/// A group of devices that the IOMMU cannot tell apart.
struct Group {
    number: u32,
    /// Until the end.
    fd: Option<OwnedFd>,
    container: Arc<Container>,
}

impl Container {
    /// Opens it; no device, and no memory, is in it yet.
    pub fn open(vm: &Arc<VmFd>, memory: &Arc<GuestMemory>) -> Result<Arc<Self>, VfioError> {
        let path = PathBuf::from("/dev/vfio/vfio");
        let fd = open(path.clone())?;
        if !ioctl::is_usable(&fd).map_err(|source| VfioError::Open { path, source })? {
            return Err(VfioError::NoIommu);
        }
        let (memory, vm) = (Arc::clone(memory), Arc::clone(vm));
        Ok(Arc::new(Self { fd, memory, vm, state: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the device of the host at this address.
    pub(super) fn device(self: &Arc<Self>, address: &HostAddress) -> Result<HostDevice, VfioError> {
        let link = Path::new("/sys/bus/pci/devices").join(address.as_str()).join("iommu_group");
        let target = rustix::fs::readlink(&link, Vec::new()).ok();
        let number = target.and_then(|target| {
            let name =
                Path::new(std::str::from_utf8(target.as_bytes()).ok()?).file_name()?.to_str()?.to_owned();
            name.parse().ok()
        });
        let number = number.ok_or_else(|| VfioError::NoGroup(address.clone()))?;
        let group = self.group(number, address)?;
        let failed = |what| {
            let device = address.clone();
            move |source| VfioError::Host { device, what, source }
        };
        let file = group.fd.as_ref().ok_or_else(|| VfioError::NoGroup(address.clone()))?;
        let fd = ioctl::device(file, address.as_str()).map_err(failed("open it"))?;
        let info = ioctl::info(&fd).map_err(failed("examine it"))?;
        if !info.is_pci {
            return Err(VfioError::NotPci(address.clone()));
        }
        let mut regions = Vec::new();
        for index in 0..=REGION_CONFIG {
            regions.push(ioctl::region(&fd, index).unwrap_or_default());
        }
        let open = RwLock::new(Some(Open { fd, _group: group }));
        Ok(HostDevice { open, address: address.clone(), resets: info.resets, regions })
    }

    fn group(self: &Arc<Self>, number: u32, address: &HostAddress) -> Result<Arc<Group>, VfioError> {
        // A group that goes takes the lock: those that are alive here are let go after it.
        let known: Vec<Arc<Group>>;
        let mut state = self.lock();
        known = state.groups.iter().filter_map(Weak::upgrade).collect();
        if let Some(group) = known.iter().find(|group| group.number == number) {
            return Ok(Arc::clone(group));
        }
        let failed = |what| {
            let device = address.clone();
            move |source| VfioError::Host { device, what, source }
        };
        let fd = match open(PathBuf::from(format!("/dev/vfio/{number}"))) {
            // None of its devices is vfio-pci's, or another process has it.
            Err(VfioError::Open { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy) =>
            {
                return Err(VfioError::NotViable(address.clone(), number));
            }
            opened => opened?,
        };
        if !ioctl::is_viable(&fd).map_err(failed("examine its IOMMU group"))? {
            return Err(VfioError::NotViable(address.clone(), number));
        }
        ioctl::set_container(&fd, &self.fd).map_err(failed("put its IOMMU group into a container"))?;
        if state.pin.is_none() {
            ioctl::set_iommu(&self.fd).map_err(failed("switch its IOMMU on"))?;
            if let Err(error) = self.map(&mut state) {
                self.unmap(&mut state);
                return Err(failed(
                    "map guest memory for it (its pages stay in place: see the limit of locked memory)",
                )(error));
            }
        }
        self.tell_kvm(&mut state, &fd, KVM_DEV_VFIO_GROUP_ADD);
        let group = Arc::new(Group { number, fd: Some(fd), container: Arc::clone(self) });
        state.groups.push(Arc::downgrade(&group));
        Ok(group)
    }

    /// A number for a memory slot.
    pub(super) fn take_slot(&self) -> u32 {
        let mut state = self.lock();
        let slot = (FIRST_SLOT..).find(|slot| !state.slots.contains(slot)).unwrap_or(FIRST_SLOT);
        state.slots.insert(slot);
        slot
    }

    /// One that shows nothing any more.
    pub(super) fn give_slot(&self, slot: u32) {
        self.lock().slots.remove(&slot);
    }

    /// Maps all of guest memory.
    fn map(&self, state: &mut State) -> io::Result<()> {
        state.pin = Some(Pin::new());
        for region in self.memory.iter() {
            let (base, size) = (region.start_addr().raw_value(), region.len());
            // SAFETY: one live mapping of guest memory, which this container keeps for as long as it has it mapped.
            unsafe { ioctl::map_dma(&self.fd, region.as_ptr() as u64, base, size)? };
            state.mapped.push((base, size));
        }
        Ok(())
    }

    fn unmap(&self, state: &mut State) {
        for (base, size) in state.mapped.drain(..) {
            if let Err(error) = ioctl::unmap_dma(&self.fd, base, size) {
                tracing::error!("guest memory stays mapped for devices of the host: {error}");
            }
        }
        state.pin = None;
    }

    /// Puts other pages under guest memory: devices, which must be at rest, reach the new ones afterwards.
    pub fn while_unmapped<T>(&self, replace: impl FnOnce() -> T) -> Result<T, VfioError> {
        let mut state = self.lock();
        let was_mapped = state.pin.is_some();
        self.unmap(&mut state);
        let replaced = replace();
        if was_mapped {
            self.map(&mut state).map_err(VfioError::Map)?;
        }
        Ok(replaced)
    }

    /// KVM asks no more of a group than that it is told; without it a device works but where DMA goes past caches.
    fn tell_kvm(&self, state: &mut State, group: &OwnedFd, what: u32) {
        if state.kvm.is_none() {
            let mut device =
                kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, ..Default::default() };
            state.kvm = self.vm.create_device(&mut device).ok();
        }
        let fd: RawFd = group.as_raw_fd();
        let (group, attr) = (KVM_DEV_VFIO_GROUP, u64::from(what));
        let attribute = kvm_device_attr { group, attr, addr: &raw const fd as u64, flags: 0 };
        if let Some(Err(error)) = state.kvm.as_ref().map(|kvm| kvm.set_device_attr(&attribute)) {
            tracing::warn!("KVM does not take an IOMMU group: {error}");
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let container = Arc::clone(&self.container);
        let mut state = container.lock();
        state.groups.retain(|group| group.strong_count() > 0);
        if state.groups.is_empty() {
            // The kernel takes the IOMMU away with the last group, and all that is mapped.
            container.unmap(&mut state);
        }
        // Its file goes before anybody asks for the same group, or switches the IOMMU on, again.
        if let Some(fd) = self.fd.take() {
            container.tell_kvm(&mut state, &fd, KVM_DEV_VFIO_GROUP_DEL);
        }
    }
}

/// Its files. The group goes after the device.
struct Open {
    fd: OwnedFd,
    _group: Arc<Group>,
}

/// A device of the host as a file.
pub(super) struct HostDevice {
    /// Until it goes back to the host.
    open: RwLock<Option<Open>>,
    address: HostAddress,
    resets: bool,
    regions: Vec<Region>,
}

impl HostDevice {
    pub(super) fn address(&self) -> &HostAddress {
        &self.address
    }

    /// Does something with its file.
    pub(super) fn with<T>(&self, act: impl FnOnce(&OwnedFd) -> io::Result<T>) -> io::Result<T> {
        match &*self.open.read().unwrap_or_else(PoisonError::into_inner) {
            Some(open) => act(&open.fd),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// It goes back to the host, whoever may still hold this. Nothing of it is mapped.
    pub(super) fn close(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn region(&self, index: u32) -> Option<&Region> {
        self.regions.get(index as usize).filter(|region| region.size > 0)
    }

    /// Reads a register; what cannot be read is all ones, as on a bus.
    pub(super) fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(at) = self.at(region, offset, data.len()) else { return };
        let _ = self.with(|fd| Ok(rustix::io::pread(fd, data, at)?));
    }

    /// Writes one; what cannot be written is dropped, as on a bus.
    pub(super) fn write(&self, region: u32, offset: u64, data: &[u8]) {
        let Some(at) = self.at(region, offset, data.len()) else { return };
        let _ = self.with(|fd| Ok(rustix::io::pwrite(fd, data, at)?));
    }

    fn at(&self, region: u32, offset: u64, len: usize) -> Option<u64> {
        let region = self.region(region)?;
        let end = offset.checked_add(len as u64)?;
        (end <= region.size).then(|| region.offset.checked_add(offset))?
    }

    /// How many interrupts of a kind it has.
    pub(super) fn irqs(&self, irq: Irq) -> u32 {
        self.with(|fd| ioctl::irq_count(fd, irq)).unwrap_or(0)
    }

    /// As after power-on, if it can.
    pub(super) fn reset(&self) {
        if self.resets
            && let Err(error) = self.with(ioctl::reset)
        {
            tracing::warn!(device = %self.address, "the device cannot be reset: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_it_says_so() {
        let Ok((_, vm)) = crate::cpu::open(&crate::inherit::Inherited::default()) else { return };
        let memory = Arc::new(GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]).unwrap());
        match Container::open(&Arc::new(vm), &memory) {
            Err(error) => assert!(error.to_string().contains("/dev/vfio/vfio"), "{error}"),
            Ok(container) => {
                let error = container.device(&"ffff:ff:1f.7".parse().unwrap()).err().unwrap();
                assert!(error.to_string().contains("is in no IOMMU group"), "{error}");
            }
        }
    }
}
