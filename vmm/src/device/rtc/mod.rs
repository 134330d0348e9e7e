//! The CMOS clock of a PC: ports 0x70 and 0x71, GSI 8. Its registers are in `clock`; here is what connects them with the guest, with the host's
//! clock, and with a timer.
//!
//! The timer is made when a guest first asks to be interrupted, which few do: until then the clock costs a VM nothing.

mod calendar;
mod clock;

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::event::epoll::EventFlags;
use vmm_sys_util::timerfd::TimerFd;

use clock::Clock;
pub use clock::SavedRtc;

use crate::bus::BusDevice;
use crate::event::{Handler, LoopHandle, Ops};
use crate::irq::Level;

/// Longest that the timer waits: the host's clock may be set meanwhile.
const WAIT_MAX: Duration = Duration::from_secs(60);

struct State {
    clock: Clock,
    timer: Option<TimerFd>,
    /// The timer runs, or has expired.
    armed: bool,
    /// It cannot be had, which has been said.
    failed: bool,
}

impl State {
    fn fail(&mut self, error: vmm_sys_util::errno::Error) {
        if !std::mem::replace(&mut self.failed, true) {
            tracing::error!("the clock cannot interrupt: {error}");
        }
    }
}

/// The clock.
pub struct Rtc {
    line: Arc<dyn Level>,
    main_loop: LoopHandle,
    state: Mutex<State>,
}

/// Nanoseconds since 1970.
fn now() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i128::try_from(since.as_nanos()).unwrap_or_default()
}

impl Rtc {
    /// First of its I/O ports.
    pub const PORT: u64 = 0x70;
    /// I/O ports that it takes.
    pub const PORTS: u64 = 2;
    /// GSI of its interrupt.
    pub const GSI: u32 = 8;

    /// A clock that shows the host's time, with `memory` in these bytes of its memory; its timer is on `main_loop`.
    pub fn new(line: Arc<dyn Level>, main_loop: LoopHandle, memory: &[(u8, u8)]) -> Arc<Self> {
        let state =
            Mutex::new(State { clock: Clock::new(now(), memory), timer: None, armed: false, failed: false });
        Arc::new(Self { line, main_loop, state })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine is reset.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.clock.reset(now());
        self.line.set(false);
    }

    /// The registers.
    pub fn saved(&self) -> SavedRtc {
        self.lock().clock.saved()
    }
}

/// The clock as the guest has it: what comes after an access needs the clock itself.
pub struct RtcPorts(Arc<Rtc>);

impl RtcPorts {
    /// The ports of `rtc`.
    pub fn new(rtc: &Arc<Rtc>) -> Self {
        Self(Arc::clone(rtc))
    }
}

impl Rtc {
    /// Goes on from them, in a clock that nobody has used. `None`: they make no sense.
    pub fn restore(self: &Arc<Self>, saved: &SavedRtc) -> Option<()> {
        let mut state = self.lock();
        state.clock.restore(saved, now())?;
        self.settle(&mut state);
        Some(())
    }

    /// The line, and the timer, follow the registers.
    fn settle(self: &Arc<Self>, state: &mut State) {
        self.line.set(state.clock.interrupts());
        let wait = state.clock.next(now());
        if state.timer.is_none() && wait.is_some() {
            match self.make_timer() {
                Ok(timer) => state.timer = Some(timer),
                Err(error) => state.fail(error),
            }
        }
        let Some(timer) = &mut state.timer else { return };
        // Setting a timer also takes back that it has expired, so nobody reads it.
        let set = match wait {
            Some(wait) => {
                timer.reset(Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX)).min(WAIT_MAX), None)
            }
            None if state.armed => timer.clear(),
            None => Ok(()),
        };
        state.armed = wait.is_some();
        if let Err(error) = set {
            state.fail(error);
        }
    }

    fn make_timer(self: &Arc<Self>) -> Result<TimerFd, vmm_sys_util::errno::Error> {
        let timer = TimerFd::new()?;
        let rtc = Arc::downgrade(self);
        self.main_loop.post(move |ops| {
            let Some(clock) = rtc.upgrade() else { return };
            let state = clock.lock();
            let Some(timer) = &state.timer else { return };
            // SAFETY: the timer is open for as long as the lock is held, and the loop makes a duplicate.
            let fd = unsafe { BorrowedFd::borrow_raw(timer.as_raw_fd()) };
            if let Err(error) = ops.add(fd, EventFlags::IN, Expired(rtc)) {
                tracing::error!("the clock cannot interrupt: {error}");
            }
        });
        Ok(timer)
    }
}

/// The timer has expired.
struct Expired(Weak<Rtc>);

impl Handler for Expired {
    fn ready(&mut self, _: EventFlags, _: &mut Ops<'_>) {
        if let Some(rtc) = self.0.upgrade() {
            let mut state = rtc.lock();
            state.clock.look(now());
            rtc.settle(&mut state);
        }
    }
}

/// Byte registers; a wider access is no way to reach them.
impl BusDevice for RtcPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, [byte]) = (offset, data) {
            let mut state = self.0.lock();
            *byte = state.clock.read(now());
            self.0.settle(&mut state);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let mut state = self.0.lock();
        if offset == 0 {
            state.clock.select(value);
        } else {
            state.clock.write(value, now());
            self.0.settle(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventLoop;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[derive(Default)]
    struct Wire(AtomicBool);
    impl Level for Wire {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::Release);
        }
    }

    #[test]
    fn a_guest_that_asks_is_interrupted_until_it_has_looked() {
        let mut main = EventLoop::new().unwrap();
        let wire = Arc::new(Wire::default());
        let rtc = Rtc::new(Arc::clone(&wire) as _, main.handle(), &[(0x34, 0x56)]);
        let ports = RtcPorts::new(&rtc);
        let get = |at: u8| {
            ports.write(0, &[at]);
            let mut byte = [0];
            ports.read(1, &mut byte);
            byte[0]
        };
        assert_eq!(get(0x34), 0x56);
        assert!(rtc.lock().timer.is_none());
        // Periodic, 8192 a second.
        for (at, value) in [(0xa, 0x23), (0xb, 0x42)] {
            ports.write(0, &[at]);
            ports.write(1, &[value]);
        }
        for _ in 0..2 {
            while !wire.0.load(Ordering::Acquire) {
                main.turn(Some(Duration::from_secs(10))).unwrap();
            }
            assert_eq!(get(0xc) & 0xc0, 0xc0);
            // Not before: on a slow machine the first one is there at once.
            assert!(rtc.lock().timer.is_some());
        }
        rtc.reset();
        assert!(!wire.0.load(Ordering::Acquire));
        let mut wide = [0; 4];
        ports.read(0, &mut wide);
        ports.write(0, &wide);
        assert_eq!(wide, [0xff; 4]);
    }
}
