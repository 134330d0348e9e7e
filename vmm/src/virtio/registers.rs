//! What the registers of every transport come to: features, queues, the status field, and the device that runs once all is agreed.
//!
//! Owned by one transport (`mmio`, `pci`), which maps its own register layout onto this and keeps its lock: nothing here locks. The lock is
//! held over `activate` and `reset` of the device, so a device's threads must never wait for it.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{Layout, Position, Queue};
use super::state::StateError;
use super::status::{DRIVER_OK, Effect, Status};
use super::{
    ActivateError, Activation, ActiveQueue, Doorbell, F_VERSION_1, Interrupt, VirtioDevice, complain,
};
use crate::memory::GuestMemory;
use crate::process::trace;

mod saved;

/// What a transport lends for the time of one register access.
pub(super) struct Link<'a> {
    pub(super) memory: &'a Arc<GuestMemory>,
    pub(super) doorbell: &'a dyn Doorbell,
    pub(super) interrupt: Arc<dyn Interrupt>,
    /// Guest physical address at which the driver notifies a queue; none while the registers are mapped nowhere.
    pub(super) bell: &'a dyn Fn(u16) -> Option<u64>,
}

/// What the driver says about one queue.
#[derive(Default, Clone, Copy)]
pub(super) struct QueueSetup {
    pub(super) layout: Layout,
    pub(super) ready: bool,
}

#[derive(Default)]
struct Running {
    /// By queue number; `None` where the driver has not enabled the queue.
    notify: Vec<Option<Arc<EventFd>>>,
    /// Where doorbells are attached, by queue number.
    bells: Vec<(u64, u16, Arc<EventFd>)>,
    /// Doorbells have been asked for: not a second time, also where that failed.
    has_bells: bool,
}

impl Running {
    /// Attaches a doorbell to every enabled queue.
    fn attach(&mut self, link: &Link<'_>) {
        self.has_bells = true;
        for (queue, fd) in (0u16..).zip(&self.notify) {
            let (Some(fd), Some(addr)) = (fd, (link.bell)(queue)) else { continue };
            match link.doorbell.attach(addr, queue, fd) {
                Ok(()) => self.bells.push((addr, queue, Arc::clone(fd))),
                // Slower, but it works: the driver's writes come to the transport.
                Err(error) => tracing::warn!("no virtio doorbell at {addr:#x}/{queue}: {error}"),
            }
        }
    }

    fn detach(&mut self, doorbell: &dyn Doorbell) {
        for (addr, queue, fd) in self.bells.drain(..) {
            if let Err(error) = doorbell.detach(addr, queue, &fd) {
                tracing::warn!("virtio doorbell {addr:#x}/{queue} stays: {error}");
            }
        }
    }
}

/// The registers behind a transport's layout.
pub(super) struct Registers {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) status: Status,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) queue_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queues: Vec<QueueSetup>,
    /// A queue has its largest size until the driver says otherwise (virtio 1.2 §4.1.4.3); over MMIO it has none.
    sized: bool,
    /// The device may read and write guest memory. On PCI the driver says so.
    pub(super) master: bool,
    running: Option<Running>,
    /// The device has been stopped to be saved, or not been started after it was restored: where its queues stand.
    pub(super) suspended: Option<Vec<(u16, Position)>>,
}

impl Registers {
    pub(super) fn new(device: Box<dyn VirtioDevice>, sized: bool) -> Self {
        let mut registers = Self {
            device,
            status: Status::default(),
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            driver_features: 0,
            queues: Vec::new(),
            sized,
            master: !sized,
            running: None,
            suspended: None,
        };
        registers.clear();
        registers
    }

    fn clear(&mut self) {
        self.status = Status::default();
        (self.device_features_sel, self.driver_features_sel, self.queue_sel) = (0, 0, 0);
        self.driver_features = 0;
        self.suspended = None;
        let size = |max: &u16| if self.sized { *max } else { 0 };
        let at_reset =
            |max| QueueSetup { layout: Layout { size: size(max), ..Layout::default() }, ready: false };
        self.queues = self.device.queue_sizes().iter().map(at_reset).collect();
    }

    /// The half of the features offered that the selector names.
    pub(super) fn device_features(&self) -> u32 {
        half(self.device.features(), self.device_features_sel)
    }

    /// The half of the features accepted that the selector names.
    pub(super) fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_features_sel)
    }

    /// Dropped unless the driver may choose now.
    pub(super) fn set_driver_features(&mut self, value: u32) {
        if !self.status.features_open() {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            // Bits 64 and up: we offer none. A driver that sets one anyway must not get FEATURES_OK.
            _ if value != 0 => self.driver_features &= !F_VERSION_1,
            _ => {}
        }
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_sel).ok()
    }

    /// Largest size of the selected queue; 0 where there is none.
    pub(super) fn queue_max(&self) -> u16 {
        self.selected().and_then(|q| self.device.queue_sizes().get(q)).copied().unwrap_or(0)
    }

    /// The selected queue.
    pub(super) fn queue(&self) -> Option<&QueueSetup> {
        self.selected().and_then(|q| self.queues.get(q))
    }

    /// The selected queue, while the driver may set it up.
    pub(super) fn open_queue(&mut self) -> Option<&mut QueueSetup> {
        if !self.status.queues_open() {
            return None;
        }
        self.selected().and_then(|q| self.queues.get_mut(q))
    }

    /// The driver writes the status. On [`Effect::Reset`] the transport puts what is its own back too.
    pub(super) fn write_status(&mut self, value: u8, link: &Link<'_>) -> Effect {
        let offered = self.device.features();
        let fine = self.driver_features & !offered == 0 && self.driver_features & F_VERSION_1 != 0;
        let (next, effect) = self.status.write(value, fine);
        tracing::trace!(target: trace::VIRTIO_STATUS, "type {}: {value:#x} -> {:#x}, {effect:?}", self.device.device_type(), next.bits());
        self.status = next;
        match effect {
            Effect::None => {}
            Effect::Reset => self.reset(link.doorbell),
            // A device that may not master the bus starts when it may.
            Effect::Activate if self.master => self.activate_or_complain(link),
            Effect::Activate => {}
        }
        effect
    }

    fn activate_or_complain(&mut self, link: &Link<'_>) {
        if let Err(error) = self.activate(link) {
            complain(|| tracing::warn!("virtio device {}: {error}", self.device.device_type()));
            link.interrupt.needs_reset();
        }
    }

    /// The driver lets the device master the bus, or not any more. One that runs stops, and needs a reset: what it has in flight is lost.
    /// `broken` is one that needs a reset already.
    pub(super) fn set_master(&mut self, allowed: bool, broken: bool, link: &Link<'_>) {
        let before = std::mem::replace(&mut self.master, allowed);
        if !allowed && let Some(mut running) = self.running.take() {
            running.detach(link.doorbell);
            self.device.reset();
            link.interrupt.needs_reset();
        } else if allowed && !before && !broken && self.status.has(DRIVER_OK) {
            self.activate_or_complain(link);
        }
    }

    /// The device stops, and every register is as new.
    pub(super) fn reset(&mut self, doorbell: &dyn Doorbell) {
        if let Some(mut running) = self.running.take() {
            // First no new notification, then no more work.
            running.detach(doorbell);
            self.device.reset();
        }
        self.clear();
    }

    /// The machine goes down.
    pub(super) fn shut_down(&mut self, doorbell: &dyn Doorbell) -> io::Result<()> {
        self.reset(doorbell);
        self.device.shut_down()
    }

    /// Builds the queues, which begin at zero or where `positions` say, and starts the device. Returns what notifies it; what did so
    /// `before`, if it ran, does so again.
    fn start(
        &mut self,
        before: &Running,
        positions: &[(u16, Position)],
        link: &Link<'_>,
    ) -> Result<Vec<Option<Arc<EventFd>>>, ActivateError> {
        let features = self.driver_features;
        let (mut queues, mut notifies) = (Vec::new(), Vec::new());
        let sizes = self.device.queue_sizes();
        for (index, (setup, max)) in (0u16..).zip(self.queues.iter().zip(sizes)) {
            if !setup.ready {
                notifies.push(None);
                continue;
            }
            let mut queue = Queue::new(link.memory, setup.layout, *max, features)
                .map_err(|e| ActivateError::BadQueue(index, e))?;
            if let Some((_, position)) = positions.iter().find(|(i, _)| *i == index) {
                queue.go_on_at(*position);
            }
            let notify = match before.notify.get(usize::from(index)) {
                Some(Some(notify)) => Arc::clone(notify),
                _ => Arc::new(EventFd::new(EFD_NONBLOCK).map_err(ActivateError::Host)?),
            };
            notifies.push(Some(Arc::clone(&notify)));
            queues.push(ActiveQueue { index, queue, notify });
        }
        let (memory, interrupt) = (Arc::clone(link.memory), Arc::clone(&link.interrupt));
        self.device.activate(Activation { memory, features, queues, interrupt })?;
        Ok(notifies)
    }

    fn activate(&mut self, link: &Link<'_>) -> Result<(), ActivateError> {
        let notify = self.start(&Running::default(), &[], link)?;
        let mut running = Running { notify, ..Running::default() };
        if self.device.wants_doorbell() {
            running.attach(link);
        }
        self.running = Some(running);
        Ok(())
    }

    /// Stops the device where it stands; the driver must not run. After an error it goes on.
    pub(super) fn suspend(&mut self) -> Result<(), StateError> {
        // One that was held when the VM was paused stands still already.
        if self.running.is_some() && self.suspended.is_none() {
            self.suspended = Some(self.device.suspend()?);
        }
        Ok(())
    }

    /// As [`suspend`](Self::suspend), of a device that another process serves.
    pub(super) fn hold(&mut self) -> Result<(), StateError> {
        if self.device.is_served_elsewhere() { self.suspend() } else { Ok(()) }
    }

    /// Lets a suspended device go on, with the queues where they stood, unless it is broken: such a one stands still until its driver
    /// resets it.
    pub(super) fn resume(&mut self, broken: bool, link: &Link<'_>) -> Result<(), StateError> {
        let Some(positions) = self.suspended.take() else { return Ok(()) };
        let mut before = self.running.take().unwrap_or_default();
        // One that may not master the bus has not begun yet, and does when it may.
        if broken || !self.master {
            before.detach(link.doorbell);
            return Ok(());
        }
        match self.start(&before, &positions, link) {
            Ok(notify) => {
                self.running = Some(Running { notify, ..before });
                Ok(())
            }
            Err(error) => {
                before.detach(link.doorbell);
                link.interrupt.needs_reset();
                Err(error.into())
            }
        }
    }

    /// The descriptor to signal for a notification that came to the transport.
    pub(super) fn notified(&mut self, queue: u32, link: &Link<'_>) -> Option<Arc<EventFd>> {
        let running = self.running.as_mut()?;
        // A slot that was empty at DRIVER_OK has been filled since.
        if !running.has_bells && self.device.wants_doorbell() {
            running.attach(link);
        }
        usize::try_from(queue).ok().and_then(|q| running.notify.get(q)?.clone())
    }

    /// The registers have moved in guest memory, and the doorbells with them.
    pub(super) fn moved(&mut self, link: &Link<'_>) {
        if let Some(running) = &mut self.running
            && running.has_bells
        {
            running.detach(link.doorbell);
            running.attach(link);
        }
    }
}

fn half(features: u64, selector: u32) -> u32 {
    match selector {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

pub(super) fn set_low(to: &mut u64, value: u32) {
    *to = *to & !0xffff_ffff | u64::from(value);
}

pub(super) fn set_high(to: &mut u64, value: u32) {
    *to = *to & 0xffff_ffff | u64::from(value) << 32;
}
