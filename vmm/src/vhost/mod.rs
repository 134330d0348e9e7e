//! Ends of virtio rings that somebody else serves: owns the kernel's, `/dev/vhost-net` and `/dev/vhost-vsock`; `user` those of other processes.
//!
//! `net` opens them for NICs, `virtio::vsock` for itself. The kernel reads the driver's kicks and moves the data; interrupts and
//! complaints about a ring come back through event descriptors, because a virtio-mmio interrupt has a status bit to set.
//!
//! ```text
//!   open ── owner set, features checked ──▶ idle ── prepare, start_ring, (tap | running) ──▶ serving
//!                                             ▲                                                 │
//!                                             └───────────── stopped: bases read back ──────────┘
//! ```

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::inherit::Inherited;
use crate::memory::GuestMemory;

#[cfg(test)]
pub(crate) mod double;
mod ioctl;
pub mod user;

/// Which device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `/dev/vhost-net`.
    Net,
    /// `/dev/vhost-vsock`.
    Vsock,
}

impl Kind {
    /// Where the kernel has it.
    pub fn path(self) -> &'static str {
        match self {
            Self::Net => "/dev/vhost-net",
            Self::Vsock => "/dev/vhost-vsock",
        }
    }

    fn module(self) -> &'static str {
        match self {
            Self::Net => "vhost_net",
            Self::Vsock => "vhost_vsock",
        }
    }
}

/// Why there is no vhost device.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The kernel has none.
    #[error("there is no {}; load the module with `modprobe {}`{}", .0.path(), .0.module(), or_leave_out(*.0))]
    Missing(Kind),
    /// Not ours to use.
    #[error("no permission to use {}; run as root or in the group that owns it, or pass its descriptor", .0.path())]
    Denied(Kind),
    /// A descriptor that is open on something else.
    #[error("descriptor {0} is not an open {path}", path = .1.path())]
    WrongDescriptor(RawFd, Kind),
    /// It serves somebody else.
    #[error("descriptor {0} of {path} is in use by another device or process; open it once more", path = .1.path())]
    Busy(RawFd, Kind),
    /// A kernel that is too old.
    #[error("{path} of this host lacks features {1:#x}", path = .0.path())]
    Features(Kind, u64),
    /// The address is somebody else's.
    #[error("guest-cid={0} is in use by another virtual machine; choose another number above 2")]
    CidInUse(u64),
    /// Anything else.
    #[error("cannot {1} {path}: {2}", path = .0.path())]
    Host(Kind, &'static str, #[source] io::Error),
}

fn or_leave_out(kind: Kind) -> &'static str {
    match kind {
        Kind::Net => ", or leave out vhost=on",
        Kind::Vsock => "",
    }
}

/// A ring as the kernel takes it over.
pub struct Ring<'a> {
    /// Its number within the vhost device.
    pub index: u32,
    /// Entries.
    pub size: u16,
    /// Address of the descriptor table in this process; the areas are aligned and wholly in guest RAM.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Position of the next request to take.
    pub base: u16,
    /// The driver signals it.
    pub kick: BorrowedFd<'a>,
    /// The kernel signals it when the driver wants an interrupt.
    pub call: BorrowedFd<'a>,
    /// The kernel signals it when the ring makes no sense.
    pub error: BorrowedFd<'a>,
}

/// An open vhost device that belongs to this process.
#[derive(Debug)]
pub struct Vhost {
    fd: OwnedFd,
    kind: Kind,
    features: u64,
    /// Stands for the kernel.
    #[cfg(test)]
    double: Option<std::sync::Arc<double::Double>>,
}

impl Vhost {
    /// Opens a device: `given`, else what the launcher has passed, else by name. All of `required` must be there.
    pub fn open(
        kind: Kind,
        given: Option<OwnedFd>,
        inherited: &Inherited,
        required: u64,
    ) -> Result<Self, VhostError> {
        let fd = match given.or_else(|| inherited.take_path(Path::new(kind.path()))) {
            Some(fd) => fd,
            None => {
                let flags = OFlags::RDWR | OFlags::CLOEXEC;
                rustix::fs::open(kind.path(), flags, Mode::empty()).map_err(|e| match e {
                    rustix::io::Errno::NOENT | rustix::io::Errno::NXIO | rustix::io::Errno::NODEV => {
                        VhostError::Missing(kind)
                    }
                    rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => VhostError::Denied(kind),
                    e => VhostError::Host(kind, "open", e.into()),
                })?
            }
        };
        let number = fd.as_raw_fd();
        let wrong = || VhostError::WrongDescriptor(number, kind);
        let features = ioctl::features(&fd).map_err(|_| wrong())?;
        ioctl::set_owner(&fd).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => VhostError::Busy(number, kind),
            _ => VhostError::Host(kind, "become the owner of", e),
        })?;
        // Stops what does not run yet: only the right kind of device knows the request at all.
        let probe = match kind {
            Kind::Net => ioctl::set_net_backend(&fd, 0, None),
            Kind::Vsock => ioctl::set_running(&fd, false),
        };
        if probe.is_err_and(|e| e.raw_os_error() == Some(libc::ENOTTY)) {
            return Err(wrong());
        }
        match required & !features {
            0 => Ok(Self {
                fd,
                kind,
                features,
                #[cfg(test)]
                double: None,
            }),
            missing => Err(VhostError::Features(kind, missing)),
        }
    }

    /// What the kernel's side can do, as virtio feature bits.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Says what the driver has accepted and where guest RAM is. Before the rings.
    pub fn prepare(&self, features: u64, memory: &GuestMemory) -> io::Result<()> {
        #[cfg(test)]
        if let Some(double) = &self.double {
            return double.prepare(features & self.features, memory);
        }
        ioctl::set_features(&self.fd, features & self.features)?;
        let regions = memory.iter().map(|region| ioctl::Region {
            guest: region.start_addr().0,
            size: region.len(),
            host: region.as_ptr() as u64,
            flags: 0,
        });
        ioctl::set_memory(&self.fd, regions)
    }

    /// Hands a ring over; the kernel works on it once the device has its tap, or runs.
    pub fn start_ring(&self, ring: &Ring<'_>) -> io::Result<()> {
        #[cfg(test)]
        if let Some(double) = &self.double {
            return double.start_ring(ring);
        }
        let Ring { index, size, desc, avail, used, base, kick, call, error } = *ring;
        ioctl::set_size(&self.fd, index, size)?;
        ioctl::set_base(&self.fd, index, base)?;
        let address = ioctl::RingAddress { index, desc, avail, used, ..Default::default() };
        ioctl::set_address(&self.fd, &address)?;
        ioctl::set_events(&self.fd, index, kick, call, error)
    }

    /// Position of the next request in a ring that the kernel has stopped working on.
    pub fn base(&self, index: u32) -> io::Result<u16> {
        #[cfg(test)]
        if let Some(double) = &self.double {
            return double.base(index);
        }
        ioctl::base(&self.fd, index)
    }

    /// Connects a ring of `/dev/vhost-net` to a tap; `None` stops it, and when that returns the kernel no longer touches
    /// the ring or guest memory for it.
    pub fn set_tap(&self, index: u32, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        #[cfg(test)]
        if let Some(double) = &self.double {
            return double.run(index, tap.is_some());
        }
        ioctl::set_net_backend(&self.fd, index, tap)
    }

    /// The guest's address, of `/dev/vhost-vsock`.
    pub fn set_cid(&self, cid: u64) -> Result<(), VhostError> {
        #[cfg(test)]
        if let Some(double) = &self.double {
            return double.set_cid(cid);
        }
        ioctl::set_cid(&self.fd, cid).map_err(|e| match e.raw_os_error() {
            Some(libc::EADDRINUSE) => VhostError::CidInUse(cid),
            _ => VhostError::Host(self.kind, "set the guest's address with", e),
        })
    }

    /// Starts or stops `/dev/vhost-vsock`. After a stop the kernel no longer touches the rings or guest memory.
    pub fn set_running(&self, running: bool) -> io::Result<()> {
        #[cfg(test)]
        if let Some(double) = &self.double {
            return double.run_all(running);
        }
        ioctl::set_running(&self.fd, running)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_vhost_device_is_refused_in_words() {
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        for kind in [Kind::Net, Kind::Vsock] {
            let error = Vhost::open(kind, Some(null()), &Inherited::default(), 0).unwrap_err().to_string();
            assert!(error.ends_with(&format!("is not an open {}", kind.path())), "{error}");
            if !Path::new(kind.path()).exists() {
                let error = Vhost::open(kind, None, &Inherited::default(), 0).unwrap_err().to_string();
                let module = kind.path().trim_start_matches("/dev/").replace('-', "_");
                assert!(error.contains(&format!("`modprobe {module}`")), "{error}");
            }
        }
    }
}
