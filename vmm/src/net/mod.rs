//! Host side of network devices: owns taps, and the ways to move packets in and out of them.
//!
//! `virtio::net` is the only caller. A tap is never made here: whoever starts the VM makes it, because only they know its bridge,
//! its owner and when it goes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::config::{NetBackend, Netdev, TapSource};
use crate::inherit::Inherited;
use crate::vhost::{Kind, Vhost, VhostError};

mod burst;
mod ioctl;

#[cfg(test)]
pub(crate) mod tests;

pub(crate) use burst::{Burst, is_unknown};
pub use ioctl::Offloads;

/// Bytes of `struct virtio_net_hdr_v1` before each packet (virtio 1.2 §5.1.6), on the tap as in the ring.
pub const HEADER_BYTES: usize = 12;

/// Where taps are opened.
const TUN: &str = "/dev/net/tun";

/// What a driver may accept and the rings need the kernel to know: indirect descriptors, event indices, VERSION_1, and
/// mergeable buffers, which decide the header's length.
const VHOST_FEATURES: u64 = 1 << 28 | 1 << 29 | 1 << 32 | 1 << 15;

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
    /// An interface that is not a tap, or one with one queue, where several were asked for.
    #[error(
        "interface {0} is not a tap with several queues; make one with `ip tuntap add dev NAME mode tap multi_queue`"
    )]
    NotMultiQueue(String),
    /// The kernel allows no more queues on it.
    #[error("tap {0} has no room for more queues; ask for fewer with queues=")]
    TooManyQueues(String),
    /// Descriptors that do not make one NIC.
    #[error(
        "descriptors {0} and {1} are not queues of one tap: open one interface several times with IFF_MULTI_QUEUE"
    )]
    NotOneTap(RawFd, RawFd),
    /// Another process has it.
    #[error("tap {0} is in use; stop what uses it, or use another tap")]
    Busy(String),
    /// Not ours to use.
    #[error(
        "no permission to use tap {0}; run as its owner or as root, or make it with `ip tuntap add … user NAME`"
    )]
    Denied(String),
    /// The kernel has no taps, or not where it was told to look.
    #[error("cannot open {}: {source}; load the module with `modprobe tun`, or leave out path=", path.display())]
    NoTun {
        /// Where it looked.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A descriptor number that is not open, or is used twice.
    #[error("descriptor {0} is not open, or is a standard stream")]
    BadDescriptor(RawFd),
    /// A descriptor that is open on something else.
    #[error("descriptor {0} is not a tap opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    NotATapDescriptor(RawFd),
    /// The kernel's side of vhost=on.
    #[error(transparent)]
    Vhost(#[from] VhostError),
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
    /// One of several queues, which can be told apart from the interface for a while.
    several: bool,
    enabled: AtomicBool,
}

/// The host end of one NIC: what a netdev becomes when it is opened. One tap descriptor for each pair of queues.
#[derive(Debug)]
pub struct Backend {
    id: String,
    taps: Vec<Arc<Tap>>,
    vhosts: Vec<Vhost>,
}

impl Backend {
    /// Opens what `netdev` describes: at start and at hot-plug alike. Descriptors that it names are ours from here on, also
    /// when this fails.
    pub fn open(netdev: &Netdev, inherited: &Inherited) -> Result<Self, NetError> {
        let failed = |problem| NetError { netdev: netdev.id.clone(), problem };
        let NetBackend::Tap { source, queues, vhost, vhost_fds, path } = &netdev.backend else {
            return Err(failed(Problem::Unsupported("vhost-user")));
        };
        // All descriptors are taken before anything can fail.
        let vhost_fds: Vec<_> = vhost_fds.iter().map(|n| take_descriptor(*n)).collect();
        let device = path.as_deref().unwrap_or(Path::new(TUN));
        let taps = open_taps(&netdev.id, source, device, usize::from(*queues), inherited).map_err(failed)?;
        let mut vhost_fds = vhost_fds.into_iter();
        let vhosts = taps
            .iter()
            .filter(|_| *vhost)
            .map(|_| {
                let given = vhost_fds.next().transpose()?;
                Ok(Vhost::open(Kind::Net, given, inherited, VHOST_FEATURES)?)
            })
            .collect::<Result<_, Problem>>()
            .map_err(failed)?;
        Ok(Self { id: netdev.id.clone(), taps: taps.into_iter().map(Arc::new).collect(), vhosts })
    }

    /// `id=` of the netdev.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// One for each pair of queues, at least one.
    pub fn taps(&self) -> &[Arc<Tap>] {
        &self.taps
    }

    /// The kernel's ends of the rings, one for each tap; none when this process moves the packets.
    pub fn vhosts(&self) -> &[Vhost] {
        &self.vhosts
    }

    /// See [`Tap::fake`].
    #[cfg(test)]
    pub(crate) fn fake() -> (Self, OwnedFd) {
        let (backend, mut peers) = Self::fakes(1);
        (backend, peers.remove(0))
    }

    /// The same with several queues.
    #[cfg(test)]
    pub(crate) fn fakes(queues: usize) -> (Self, Vec<OwnedFd>) {
        let (taps, peers) = (0..queues)
            .map(|_| {
                let (tap, peer) = Tap::fake();
                (Arc::new(tap), peer)
            })
            .unzip();
        (Self { id: "fake".into(), taps, vhosts: Vec::new() }, peers)
    }

    /// The same with vhost=on: nothing moves but what the doubles are told to.
    #[cfg(test)]
    pub(crate) fn fake_vhosts(queues: usize) -> (Self, Vec<OwnedFd>, Vec<Arc<crate::vhost::double::Double>>) {
        let (mut backend, peers) = Self::fakes(queues);
        let (vhosts, doubles) =
            (0..queues).map(|_| crate::vhost::double::Double::make(Kind::Net, VHOST_FEATURES)).unzip();
        backend.vhosts = vhosts;
        (backend, peers, doubles)
    }
}

impl Tap {
    fn new(fd: OwnedFd, id: &str, several: bool) -> Result<Self, Problem> {
        let host = |what| move |e: io::Error| Problem::Host(what, e);
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| Problem::Host("use the tap", e.into()))?;
        ioctl::set_header_size(&fd, HEADER_BYTES).map_err(host("set the tap's header size"))?;
        Ok(Self { fd, id: id.to_owned(), several, enabled: AtomicBool::new(true) })
    }

    /// One end of a pair of packet sockets instead of a tap; the other end sees headers and packets as the kernel would.
    #[cfg(test)]
    pub(crate) fn fake() -> (Self, OwnedFd) {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (fd, peer) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Self { fd, id: "fake".into(), several: false, enabled: AtomicBool::new(true) }, peer)
    }

    /// `id=` of the netdev.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Tells the kernel what the guest can take, so that it sends nothing else. Before that the tap has whatever its last user set.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        ioctl::set_offloads(&self.fd, offloads)
    }

    /// Lets the interface deliver packets to this queue, or not. A tap with one queue always does.
    pub fn set_enabled(&self, on: bool) -> io::Result<()> {
        if self.several && self.enabled.load(Ordering::Acquire) != on {
            ioctl::set_queue(&self.fd, on)?;
            self.enabled.store(on, Ordering::Release);
        }
        Ok(())
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

/// One tap for each pair of queues.
fn open_taps(
    id: &str,
    source: &TapSource,
    device: &Path,
    queues: usize,
    inherited: &Inherited,
) -> Result<Vec<Tap>, Problem> {
    let several = queues > 1;
    let fds: Vec<OwnedFd> = match source {
        TapSource::Name(name) => (0..queues.max(1))
            .map(|_| match inherited.take_tap(name) {
                Some(fd) => Ok(fd),
                None => open_name(name, device, several),
            })
            .collect::<Result<_, _>>()?,
        TapSource::Fds(numbers) => take_descriptors(numbers)?,
    };
    let mut first = None;
    for fd in &fds {
        let number = fd.as_raw_fd();
        let attached = ioctl::attached(fd).ok().filter(|a| a.usable);
        let attached = attached.ok_or(Problem::NotATapDescriptor(number))?;
        let (first_number, name) = *first.get_or_insert((number, attached.name));
        if several && !(attached.several && attached.name == name) {
            return Err(Problem::NotOneTap(first_number, number));
        }
    }
    fds.into_iter().map(|fd| Tap::new(fd, id, several)).collect()
}

fn open_name(name: &str, device: &Path, several: bool) -> Result<OwnedFd, Problem> {
    // TUNSETIFF would make a tap that does not exist, and it would be gone when we end: look first.
    if !ioctl::interface_exists(name).map_err(|e| Problem::Host("look for the interface", e))? {
        return Err(Problem::Missing(name.to_owned()));
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let opened = rustix::fs::open(device, flags, Mode::empty());
    let fd = opened.map_err(|e| Problem::NoTun { path: device.into(), source: e.into() })?;
    ioctl::attach(&fd, name, several).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => Problem::Busy(name.to_owned()),
        Some(libc::EPERM) => Problem::Denied(name.to_owned()),
        Some(libc::EINVAL) if several => Problem::NotMultiQueue(name.to_owned()),
        Some(libc::EINVAL) => Problem::NotATap(name.to_owned()),
        Some(libc::E2BIG) => Problem::TooManyQueues(name.to_owned()),
        _ => Problem::Host("attach to the tap", e),
    })?;
    Ok(fd)
}

/// All of them, before any is looked at: what is refused is closed, too.
fn take_descriptors(numbers: &[RawFd]) -> Result<Vec<OwnedFd>, Problem> {
    let taken: Vec<_> = numbers.iter().map(|n| take_descriptor(*n)).collect();
    if taken.is_empty() {
        return Err(Problem::BadDescriptor(-1));
    }
    taken.into_iter().collect()
}

/// Takes the descriptor that an option names by number. Each number is given once: validation sees to that.
pub(crate) fn take_descriptor(number: RawFd) -> Result<OwnedFd, Problem> {
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
