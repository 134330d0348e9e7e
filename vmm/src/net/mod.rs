//! Host side of network devices: owns taps.
//!
//! `virtio::net` is the only caller. A tap is never made here: whoever starts the VM makes it, because only they know its bridge,
//! its owner and when it goes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use crate::config::{NetBackend, Netdev, TapSource};
use crate::inherit::Inherited;

mod ioctl;

#[cfg(test)]
pub(crate) mod tests;

pub use ioctl::Offloads;

/// Bytes of `struct virtio_net_hdr_v1` before each packet (virtio 1.2 §5.1.6), on the tap as in the ring.
pub const HEADER_BYTES: usize = 12;

/// Why a network back end could not be opened. Each text names the netdev and says what to do.
#[derive(Debug, thiserror::Error)]
#[error("netdev \"{netdev}\": {problem}")]
pub struct NetError {
    /// `id=` of the netdev.
    pub netdev: String,
    /// What was wrong.
    #[source]
    pub problem: Problem,
}

/// What was wrong with a netdev.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// No interface of that name.
    #[error("there is no interface {0}; make it with `ip tuntap add dev {0} mode tap`")]
    Missing(String),
    /// An interface that is not a tap, or one with several queues.
    #[error("interface {0} is not a tap with one queue; make one with `ip tuntap add dev NAME mode tap`")]
    NotATap(String),
    /// Another process has it.
    #[error("tap {0} is in use by another process; stop that process, or use another tap")]
    Busy(String),
    /// Not ours to use.
    #[error(
        "no permission to use tap {0}; run as its owner or as root, or make it with `ip tuntap add … user NAME`"
    )]
    Denied(String),
    /// The kernel has no taps.
    #[error("cannot open /dev/net/tun: {0}; load the module with `modprobe tun`")]
    NoTun(#[source] io::Error),
    /// A descriptor number that is not open, or is used twice.
    #[error("descriptor {0} is not open, or is a standard stream")]
    BadDescriptor(RawFd),
    /// A descriptor that is open on something else.
    #[error("descriptor {0} is not a tap opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    NotATapDescriptor(RawFd),
    /// Something that this version does not do.
    #[error("{0} is not supported in this version; remove it from the netdev")]
    Unsupported(&'static str),
    /// Anything else.
    #[error("cannot {0}: {1}")]
    Host(&'static str, #[source] io::Error),
}

/// An open tap that carries packets with a [`HEADER_BYTES`] header. Non-blocking.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    id: String,
}

/// The host end of one NIC: what a netdev becomes when it is opened. One tap descriptor for each pair of queues.
#[derive(Debug)]
pub struct Backend {
    id: String,
    taps: Vec<Arc<Tap>>,
}

impl Backend {
    /// Opens what `netdev` describes: at start and at hot-plug alike.
    pub fn open(netdev: &Netdev, inherited: &Inherited) -> Result<Self, NetError> {
        let tap = Tap::open(netdev, inherited)?;
        Ok(Self { id: netdev.id.clone(), taps: vec![Arc::new(tap)] })
    }

    /// `id=` of the netdev.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// One for each pair of queues, at least one.
    pub fn taps(&self) -> &[Arc<Tap>] {
        &self.taps
    }

    /// See [`Tap::fake`].
    #[cfg(test)]
    pub(crate) fn fake() -> (Self, OwnedFd) {
        let (tap, peer) = Tap::fake();
        (Self { id: "fake".into(), taps: vec![Arc::new(tap)] }, peer)
    }
}

impl Tap {
    /// Opens the tap of `netdev`: by its descriptor, its inherited descriptor, or its name.
    fn open(netdev: &Netdev, inherited: &Inherited) -> Result<Self, NetError> {
        Self::try_open(netdev, inherited).map_err(|problem| NetError { netdev: netdev.id.clone(), problem })
    }

    fn try_open(netdev: &Netdev, inherited: &Inherited) -> Result<Self, Problem> {
        let NetBackend::Tap { source, queues, vhost, vhost_fds } = &netdev.backend else {
            return Err(Problem::Unsupported("vhost-user"));
        };
        if *vhost || !vhost_fds.is_empty() {
            return Err(Problem::Unsupported("vhost"));
        }
        let fd = match source {
            TapSource::Name(name) if *queues <= 1 => match inherited.take_tap(name) {
                Some(fd) => adopt(fd)?,
                None => open_name(name)?,
            },
            TapSource::Fds(fds) if fds.len() <= 1 && *queues <= 1 => {
                adopt(take_descriptor(fds.first().copied().unwrap_or(-1))?)?
            }
            _ => return Err(Problem::Unsupported("queues above 1")),
        };
        let host = |what| move |e: io::Error| Problem::Host(what, e);
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| Problem::Host("use the tap", e.into()))?;
        ioctl::set_header_size(&fd, HEADER_BYTES).map_err(host("set the tap's header size"))?;
        Ok(Self { fd, id: netdev.id.clone() })
    }

    /// One end of a pair of packet sockets instead of a tap; the other end sees headers and packets as the kernel would.
    #[cfg(test)]
    pub(crate) fn fake() -> (Self, OwnedFd) {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (fd, peer) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Self { fd, id: "fake".into() }, peer)
    }

    /// `id=` of the netdev.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Tells the kernel what the guest can take, so that it sends nothing else. Before that the tap has whatever its last user set.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        ioctl::set_offloads(&self.fd, offloads)
    }

    /// Reads one packet, header first. `WouldBlock`: there is none.
    ///
    /// # Safety
    /// Each part must be good for writing.
    pub(crate) unsafe fn read(&self, parts: &[libc::iovec]) -> io::Result<usize> {
        let count = parts.len().min(IOV_MAX) as i32;
        // SAFETY: the caller vouches for the parts.
        let n = unsafe { libc::readv(self.fd.as_raw_fd(), parts.as_ptr(), count) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one packet, header first.
    ///
    /// # Safety
    /// Each part must be good for reading.
    pub(crate) unsafe fn write(&self, parts: &[libc::iovec]) -> io::Result<usize> {
        if parts.len() > IOV_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the caller vouches for the parts.
        let n = unsafe { libc::writev(self.fd.as_raw_fd(), parts.as_ptr(), parts.len() as i32) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

/// Parts that one call takes.
const IOV_MAX: usize = 1024;

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The address that QEMU and StratoVirt give the `index`th NIC of a VM when the user gives none.
pub fn default_mac(index: u8) -> [u8; 6] {
    [0x52, 0x54, 0x00, 0x12, 0x34, 0x56u8.wrapping_add(index)]
}

fn open_name(name: &str) -> Result<OwnedFd, Problem> {
    // TUNSETIFF would make a tap that does not exist, and it would be gone when we end: look first.
    if !ioctl::interface_exists(name).map_err(|e| Problem::Host("look for the interface", e))? {
        return Err(Problem::Missing(name.to_owned()));
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(|e| Problem::NoTun(e.into()))?;
    ioctl::attach(&fd, name).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => Problem::Busy(name.to_owned()),
        Some(libc::EPERM) => Problem::Denied(name.to_owned()),
        Some(libc::EINVAL) => Problem::NotATap(name.to_owned()),
        _ => Problem::Host("attach to the tap", e),
    })?;
    Ok(fd)
}

fn take_descriptor(number: RawFd) -> Result<OwnedFd, Problem> {
    let bad = || Problem::BadDescriptor(number);
    if number <= 2 {
        return Err(bad());
    }
    // SAFETY: only asks the kernel whether the number is open; fails with EBADF otherwise.
    let open =
        rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(number) }, rustix::io::FdFlags::CLOEXEC);
    open.map_err(|_| bad())?;
    // SAFETY: open, and passed to us on the command line for this netdev alone: validation refuses a number given twice.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn adopt(fd: OwnedFd) -> Result<OwnedFd, Problem> {
    if ioctl::is_usable_tap(&fd) { Ok(fd) } else { Err(Problem::NotATapDescriptor(fd.as_raw_fd())) }
}
