//! The kernel's VFIO interface (`linux/vfio.h`): owns its numbers and structures. The same on x86_64 and aarch64.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

const GET_API_VERSION: libc::c_ulong = 0x3b64;
const CHECK_EXTENSION: libc::c_ulong = 0x3b65;
const SET_IOMMU: libc::c_ulong = 0x3b66;
const GROUP_GET_STATUS: libc::c_ulong = 0x3b67;
const GROUP_SET_CONTAINER: libc::c_ulong = 0x3b68;
const GROUP_GET_DEVICE_FD: libc::c_ulong = 0x3b6a;
const DEVICE_GET_INFO: libc::c_ulong = 0x3b6b;
const DEVICE_GET_REGION_INFO: libc::c_ulong = 0x3b6c;
const DEVICE_GET_IRQ_INFO: libc::c_ulong = 0x3b6d;
const DEVICE_SET_IRQS: libc::c_ulong = 0x3b6e;
const DEVICE_RESET: libc::c_ulong = 0x3b6f;
const IOMMU_MAP_DMA: libc::c_ulong = 0x3b71;
const IOMMU_UNMAP_DMA: libc::c_ulong = 0x3b72;

const API_VERSION: i32 = 0;
const TYPE1V2_IOMMU: libc::c_ulong = 3;
const GROUP_VIABLE: u32 = 1;
const DEVICE_RESETS: u32 = 1;
const DEVICE_IS_PCI: u32 = 2;
const REGION_MMAP: u32 = 4;
const REGION_CAPS: u32 = 8;
/// Not to be mapped as a whole: the parts that may be.
const CAP_SPARSE_MMAP: u16 = 1;
const DMA_READ_WRITE: u32 = 3;

const IRQ_NONE: u32 = 1;
const IRQ_EVENTFD: u32 = 4;
const IRQ_UNMASK: u32 = 16;
const IRQ_TRIGGER: u32 = 32;

/// Region of configuration space; BARs are 0 to 5.
pub(super) const REGION_CONFIG: u32 = 7;

/// Kinds of interrupt, by their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Irq {
    Intx = 0,
    Msi = 1,
    Msix = 2,
}

#[repr(C)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct DeviceInfo {
    argsz: u32,
    flags: u32,
    regions: u32,
    irqs: u32,
}

#[repr(C)]
#[derive(Default)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
#[derive(Default)]
struct IrqInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    count: u32,
}

#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

fn call<T>(fd: &OwnedFd, request: libc::c_ulong, argument: *mut T) -> io::Result<i32> {
    // SAFETY: an open descriptor; each caller passes what its request takes and says how long it is, and the kernel keeps no pointer to it.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        n if n < 0 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}

fn value(fd: &OwnedFd, request: libc::c_ulong, value: libc::c_ulong) -> io::Result<i32> {
    call(fd, request, value as *mut u8)
}

const fn size_of_val32<T>() -> u32 {
    size_of::<T>() as u32
}

/// Whether the kernel speaks the version that is used here, with an IOMMU that keeps devices apart.
pub(super) fn is_usable(container: &OwnedFd) -> io::Result<bool> {
    let version = value(container, GET_API_VERSION, 0)?;
    Ok(version == API_VERSION && value(container, CHECK_EXTENSION, TYPE1V2_IOMMU)? == 1)
}

pub(super) fn set_iommu(container: &OwnedFd) -> io::Result<()> {
    value(container, SET_IOMMU, TYPE1V2_IOMMU).map(drop)
}

/// Whether all devices of the group are VFIO's.
pub(super) fn is_viable(group: &OwnedFd) -> io::Result<bool> {
    let mut status = GroupStatus { argsz: size_of_val32::<GroupStatus>(), flags: 0 };
    call(group, GROUP_GET_STATUS, &raw mut status)?;
    Ok(status.flags & GROUP_VIABLE != 0)
}

pub(super) fn set_container(group: &OwnedFd, container: &OwnedFd) -> io::Result<()> {
    let mut fd: RawFd = container.as_raw_fd();
    call(group, GROUP_SET_CONTAINER, &raw mut fd).map(drop)
}

/// Opens the device of this name (`0000:1a:00.3`).
pub(super) fn device(group: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    let fd = call(group, GROUP_GET_DEVICE_FD, name.as_ptr().cast_mut())?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a device is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Info {
    pub(super) is_pci: bool,
    pub(super) resets: bool,
}

pub(super) fn info(device: &OwnedFd) -> io::Result<Info> {
    let mut info = DeviceInfo { argsz: size_of_val32::<DeviceInfo>(), ..DeviceInfo::default() };
    call(device, DEVICE_GET_INFO, &raw mut info)?;
    let has = |flag| info.flags & flag != 0;
    Ok(Info { is_pci: has(DEVICE_IS_PCI), resets: has(DEVICE_RESETS) })
}

/// A region of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Region {
    /// Bytes; 0 where there is none.
    pub(super) size: u64,
    /// Where it begins in the device's file.
    pub(super) offset: u64,
    /// The parts that can be mapped, as offset and size.
    pub(super) areas: Vec<(u64, u64)>,
}

pub(super) fn region(device: &OwnedFd, index: u32) -> io::Result<Region> {
    /// More than a kernel says of a region.
    const ROOM: usize = 4096;
    const FIXED: usize = size_of::<RegionInfo>();
    // In words, so that the structure is aligned.
    let mut room = [0u64; ROOM / 8];
    let info = RegionInfo { argsz: ROOM as u32, index, ..RegionInfo::default() };
    // SAFETY: the room is larger than the structure and as well aligned; every bit pattern is a value of both.
    let info = unsafe {
        let place = room.as_mut_ptr().cast::<RegionInfo>();
        place.write(info);
        call(device, DEVICE_GET_REGION_INFO, place)?;
        place.read()
    };
    let bytes: Vec<u8> = room.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let areas = if info.flags & REGION_MMAP == 0 {
        Vec::new()
    } else if info.flags & REGION_CAPS != 0 && info.cap_offset as usize >= FIXED {
        sparse(&bytes, info.cap_offset).unwrap_or_else(|| vec![(0, info.size)])
    } else {
        vec![(0, info.size)]
    };
    Ok(Region { size: info.size, offset: info.offset, areas })
}

/// The parts that may be mapped of a region with holes, as the list of capabilities says. `None`: it says nothing of holes.
fn sparse(bytes: &[u8], first: u32) -> Option<Vec<(u64, u64)>> {
    /// The list is the kernel's, and short.
    const MOST: usize = 16;
    let u32_at = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let u64_at = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_ne_bytes(bytes.try_into().ok()?))
    };
    let mut at = first as usize;
    for _ in 0..MOST {
        if at == 0 {
            return None;
        }
        // struct vfio_info_cap_header: id and version, 16 bits each, then where the next one is.
        let id = (u32_at(at)? & 0xffff) as u16;
        if id == CAP_SPARSE_MMAP {
            let count = u32_at(at + 8)? as usize;
            let area = |n: usize| Some((u64_at(at + 16 + 16 * n)?, u64_at(at + 24 + 16 * n)?));
            return Some((0..count).map_while(area).collect());
        }
        at = u32_at(at + 4)? as usize;
    }
    None
}

/// How many interrupts of a kind there are.
pub(super) fn irq_count(device: &OwnedFd, irq: Irq) -> io::Result<u32> {
    let mut info = IrqInfo { argsz: size_of_val32::<IrqInfo>(), index: irq as u32, ..IrqInfo::default() };
    call(device, DEVICE_GET_IRQ_INFO, &raw mut info)?;
    Ok(info.count)
}

/// `struct vfio_irq_set`, its data behind it. What the kernel returns beside errors is how many messages there would be room for, if it is too little:
/// then nothing has been done.
fn set_irqs(device: &OwnedFd, irq: Irq, flags: u32, first: u32, fds: &[RawFd]) -> io::Result<u32> {
    const FIXED: u32 = 20;
    let count = fds.len() as u32;
    let mut words = vec![FIXED + 4 * count, flags, irq as u32, first, count];
    words.extend(fds.iter().map(|fd| fd.cast_unsigned()));
    call(device, DEVICE_SET_IRQS, words.as_mut_ptr()).map(i32::cast_unsigned)
}

/// The device sends so many messages of this kind, which go nowhere yet. Returns how many it can send, which may be fewer.
pub(super) fn start(device: &OwnedFd, irq: Irq, count: u32) -> io::Result<u32> {
    let nowhere = |count: u32| vec![-1; count as usize];
    let room = match set_irqs(device, irq, IRQ_EVENTFD | IRQ_TRIGGER, 0, &nowhere(count))? {
        0 => return Ok(count),
        room => room.min(count),
    };
    match set_irqs(device, irq, IRQ_EVENTFD | IRQ_TRIGGER, 0, &nowhere(room))? {
        0 => Ok(room),
        _ => Err(io::ErrorKind::StorageFull.into()),
    }
}

/// This interrupt of a kind that is in use, or the pin, writes to this descriptor from now on.
pub(super) fn lead(device: &OwnedFd, irq: Irq, vector: u32, fd: RawFd) -> io::Result<()> {
    set_irqs(device, irq, IRQ_EVENTFD | IRQ_TRIGGER, vector, &[fd]).map(drop)
}

/// A write to this descriptor unmasks the pin.
pub(super) fn unmask_by(device: &OwnedFd, fd: RawFd) -> io::Result<()> {
    set_irqs(device, Irq::Intx, IRQ_EVENTFD | IRQ_UNMASK, 0, &[fd]).map(drop)
}

/// No interrupt of this kind any more.
pub(super) fn disable(device: &OwnedFd, irq: Irq) -> io::Result<()> {
    set_irqs(device, irq, IRQ_NONE | IRQ_TRIGGER, 0, &[]).map(drop)
}

pub(super) fn reset(device: &OwnedFd) -> io::Result<()> {
    value(device, DEVICE_RESET, 0).map(drop)
}

/// Lets devices read and write `size` bytes at `iova`, which lie at `vaddr` in this process and stay there until [`unmap_dma`].
///
/// # Safety
/// The memory must be mapped, and be meant for devices to write to, until then.
pub(super) unsafe fn map_dma(container: &OwnedFd, vaddr: u64, iova: u64, size: u64) -> io::Result<()> {
    let mut map = DmaMap { argsz: size_of_val32::<DmaMap>(), flags: DMA_READ_WRITE, vaddr, iova, size };
    call(container, IOMMU_MAP_DMA, &raw mut map).map(drop)
}

pub(super) fn unmap_dma(container: &OwnedFd, iova: u64, size: u64) -> io::Result<()> {
    let mut unmap = DmaUnmap { argsz: size_of_val32::<DmaUnmap>(), flags: 0, iova, size };
    call(container, IOMMU_UNMAP_DMA, &raw mut unmap).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn holes_are_left_out() {
        // At 8 one of another kind (MSI-X may be mapped), at 16 the areas.
        let list =
            words(&[0, 0, 3 | 1 << 16, 16, 1 | 1 << 16, 0, 2, 0, 0x1000, 0, 0x2000, 0, 0x8000, 0, 0x1000, 0]);
        assert_eq!(sparse(&list, 8), Some(vec![(0x1000, 0x2000), (0x8000, 0x1000)]));
        assert_eq!(sparse(&list, 16), sparse(&list, 8));
        assert_eq!(sparse(&words(&[0, 0, 3, 0]), 8), None);
        // A list that leads round in a circle, or outside, ends.
        assert_eq!(sparse(&words(&[0, 0, 3, 8]), 8), None);
        assert_eq!(sparse(&words(&[0, 0, 3, u32::MAX]), 8), None);
    }
}
