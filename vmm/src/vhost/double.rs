//! Stands for the kernel in tests: owns rings as `/dev/vhost-*` does, from the same addresses and descriptors, and serves them when
//! the test says so. Strict where the kernel is: a ring that runs cannot be set up again, one that was not set up cannot run.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::{Kind, Ring, Vhost, VhostError};
use crate::memory::GuestMemory;

/// What the kernel does with one request: sees what the driver has sent, says what to give back.
pub(crate) type Work = Box<dyn FnMut(&[u8]) -> Vec<u8> + Send>;

/// The kernel's side of one vhost device.
#[derive(Default)]
pub(crate) struct Double {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    features: u64,
    /// Guest address, length, address in this process.
    regions: Vec<(u64, u64, u64)>,
    rings: BTreeMap<u32, Served>,
    last_act: Option<(u32, Work)>,
    failing: Option<Fails>,
    cid: Option<u64>,
}

/// What the kernel does not do, of one ring.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fails {
    SetUp(u32),
    Run(u32),
}

struct Served {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    base: u16,
    kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
    running: bool,
}

impl std::fmt::Debug for Double {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Double")
    }
}

fn get<T: Copy>(at: u64) -> T {
    // SAFETY: within a ring that the device has handed over, whose memory it keeps while the ring runs.
    unsafe { std::ptr::read_volatile(at as *const T) }
}

fn put<T: Copy>(at: u64, value: T) {
    // SAFETY: as in `get`.
    unsafe { std::ptr::write_volatile(at as *mut T, value) }
}

fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

impl Served {
    /// Serves at most `most` requests; what came of them. Always signals: the kernel may, too.
    fn serve(
        &mut self,
        regions: &[(u64, u64, u64)],
        most: usize,
        work: &mut dyn FnMut(&[u8]) -> Vec<u8>,
    ) -> usize {
        let host = |guest: u64| {
            let (start, _, host) =
                regions.iter().find(|(start, len, _)| (*start..start + len).contains(&guest)).unwrap();
            host + (guest - start)
        };
        let mut done = 0;
        while done < most && get::<u16>(self.avail + 2) != self.base {
            let head = get::<u16>(self.avail + 4 + 2 * u64::from(self.base % self.size));
            let (mut sent, mut room) = (Vec::new(), Vec::new());
            let mut next = Some(head);
            while let Some(at) = next {
                let at = self.desc + 16 * u64::from(at);
                let (addr, len, flags) = (host(get(at)), get::<u32>(at + 8), get::<u16>(at + 12));
                if flags & 2 == 0 {
                    sent.extend((0..u64::from(len)).map(|i| get::<u8>(addr + i)));
                } else {
                    room.extend((0..u64::from(len)).map(|i| addr + i));
                }
                next = (flags & 1 != 0).then(|| get(at + 14));
            }
            let back = work(&sent);
            room.iter().zip(&back).for_each(|(at, byte)| put(*at, *byte));
            let position = get::<u16>(self.used + 2);
            let entry = self.used + 4 + 8 * u64::from(position % self.size);
            put(entry, u32::from(head));
            put(entry + 4, room.len().min(back.len()) as u32);
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            put(self.used + 2, position.wrapping_add(1));
            self.base = self.base.wrapping_add(1);
            done += 1;
        }
        if done > 0 {
            signal(&self.call);
        }
        done
    }
}

impl Double {
    /// A vhost device, and the kernel behind it.
    pub(crate) fn make(kind: Kind, features: u64) -> (Vhost, Arc<Self>) {
        let double = Arc::new(Self::default());
        let fd = std::fs::File::open("/dev/null").unwrap().into();
        (Vhost { fd, kind, features, double: Some(Arc::clone(&double)) }, double)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Serves at most `most` requests of a ring that runs; returns how many there were.
    pub(crate) fn serve(&self, index: u32, most: usize, mut work: impl FnMut(&[u8]) -> Vec<u8>) -> usize {
        let state = &mut *self.lock();
        let ring = state.rings.get_mut(&index).filter(|r| r.running);
        ring.map_or(0, |ring| ring.serve(&state.regions, most, &mut work))
    }

    /// Serves one more request of a ring when it is told to stop, as a kernel that is just at it does.
    pub(crate) fn before_stop(&self, index: u32, work: Work) {
        self.lock().last_act = Some((index, work));
    }

    /// From now on this fails.
    pub(crate) fn fail(&self, what: Fails) {
        self.lock().failing = Some(what);
    }

    /// The kernel finds that a ring makes no sense.
    pub(crate) fn complain(&self, index: u32) {
        signal(&self.lock().rings[&index].error);
    }

    /// The kernel signals a ring for which it has done nothing.
    pub(crate) fn call(&self, index: u32) {
        signal(&self.lock().rings[&index].call);
    }

    /// Rings that run.
    pub(crate) fn running(&self) -> Vec<u32> {
        self.lock().rings.iter().filter(|(_, ring)| ring.running).map(|(index, _)| *index).collect()
    }

    /// What the driver has accepted, the guest's address.
    pub(crate) fn told(&self) -> (u64, Option<u64>) {
        let state = self.lock();
        (state.features, state.cid)
    }

    /// Whether the driver has notified a ring, or the device on its behalf, since the last look.
    pub(crate) fn kicked(&self, index: u32) -> bool {
        rustix::io::read(&self.lock().rings[&index].kick, &mut [0; 8]).is_ok()
    }

    /// What the driver has accepted, as a back end hears of it.
    pub(super) fn set_features(&self, features: u64) {
        self.lock().features = features;
    }

    /// Guest address, length, address in this process.
    pub(super) fn set_memory(&self, regions: Vec<(u64, u64, u64)>) {
        self.lock().regions = regions;
    }

    pub(super) fn prepare(&self, features: u64, memory: &GuestMemory) -> io::Result<()> {
        let state = &mut *self.lock();
        assert!(state.rings.values().all(|ring| !ring.running), "set up while it runs");
        state.features = features;
        state.regions = memory.iter().map(|r| (r.start_addr().0, r.len(), r.as_ptr() as u64)).collect();
        Ok(())
    }

    pub(super) fn start_ring(&self, ring: &Ring<'_>) -> io::Result<()> {
        let Ring { index, size, desc, avail, used, base, kick, call, error } = *ring;
        if self.lock().failing == Some(Fails::SetUp(index)) {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
        let (kick, call, error) = (copy(kick)?, copy(call)?, copy(error)?);
        let new = Served { size, desc, avail, used, base, kick, call, error, running: false };
        let old = self.lock().rings.insert(index, new);
        assert!(old.is_none_or(|ring| !ring.running), "ring {index} is set up while it runs");
        Ok(())
    }

    pub(super) fn base(&self, index: u32) -> io::Result<u16> {
        let state = self.lock();
        let ring = state.rings.get(&index).ok_or(io::ErrorKind::InvalidInput)?;
        assert!(!ring.running, "asked for the place in a ring that runs");
        Ok(ring.base)
    }

    pub(super) fn run(&self, index: u32, on: bool) -> io::Result<()> {
        let state = &mut *self.lock();
        if on && state.failing == Some(Fails::Run(index)) {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        let Some(ring) = state.rings.get_mut(&index) else {
            assert!(!on, "ring {index} is not set up");
            return Ok(());
        };
        if !on
            && ring.running
            && state.last_act.as_ref().is_some_and(|(at, _)| *at == index)
            && let Some((_, mut work)) = state.last_act.take()
        {
            ring.serve(&state.regions, 1, &mut *work);
        }
        ring.running = on;
        Ok(())
    }

    pub(super) fn run_all(&self, on: bool) -> io::Result<()> {
        let rings: Vec<u32> = self.lock().rings.keys().copied().collect();
        rings.into_iter().try_for_each(|index| self.run(index, on))
    }

    pub(super) fn set_cid(&self, cid: u64) -> Result<(), VhostError> {
        self.lock().cid = Some(cid);
        Ok(())
    }
}
