//! The other side, for tests: a driver that does what it is told, right or wrong.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::mmio::MmioTransport;
use super::state::TransportState;
use super::{Doorbell, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice};
use crate::bus::BusDevice;
use crate::irq::Line;
use crate::memory::GuestMemory;
use crate::virtio::state::Suspend as _;

/// RAM: 4 MiB at 0 and 1 MiB at 16 MiB.
pub(crate) const RAM: u64 = 4 << 20;
pub(crate) const HIGH: u64 = 16 << 20;
pub(crate) const HIGH_END: u64 = 17 << 20;
/// Free for buffers from here on.
pub(crate) const DATA: u64 = 1 << 20;
/// Nothing in a test takes this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) fn memory() -> Arc<GuestMemory> {
    let ranges = [(GuestAddress(0), RAM as usize), (GuestAddress(HIGH), (HIGH_END - HIGH) as usize)];
    Arc::new(GuestMemory::from_ranges(&ranges).unwrap())
}

/// The same, in a file: another process could map it.
pub(crate) fn shared_memory() -> Arc<GuestMemory> {
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(RAM + HIGH_END - HIGH).unwrap();
    let range = |base, size: u64, offset| {
        let offset = vm_memory::FileOffset::from_arc(Arc::clone(&file), offset);
        (GuestAddress(base), size as usize, Some(offset))
    };
    let ranges = [range(0, RAM, 0), range(HIGH, HIGH_END - HIGH, RAM)];
    Arc::new(GuestMemory::from_ranges_with_files(ranges).unwrap())
}

/// Counts edges.
#[derive(Default)]
pub(crate) struct TestLine {
    edges: Mutex<u64>,
    more: Condvar,
}

impl Line for TestLine {
    fn trigger(&self) {
        *self.edges.lock().unwrap() += 1;
        self.more.notify_all();
    }
}

impl TestLine {
    pub(crate) fn edges(&self) -> u64 {
        *self.edges.lock().unwrap()
    }
}

/// Remembers what is attached.
#[derive(Default)]
pub(crate) struct TestDoorbell {
    pub(crate) attached: Mutex<Vec<(u64, u16)>>,
    pub(crate) refuse: bool,
}

impl Doorbell for TestDoorbell {
    fn attach(&self, addr: u64, queue: u16, _: &EventFd) -> io::Result<()> {
        if self.refuse {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.attached.lock().unwrap().push((addr, queue));
        Ok(())
    }

    fn detach(&self, addr: u64, queue: u16, _: &EventFd) -> io::Result<()> {
        self.attached.lock().unwrap().retain(|a| *a != (addr, queue));
        Ok(())
    }
}

pub(crate) const W1: u64 = 0xf010_0000;
pub(crate) const W2: u64 = 0xf020_0000;

/// A device behind its transport.
pub(crate) struct Rig {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) transport: Arc<MmioTransport>,
    pub(crate) line: Arc<TestLine>,
    pub(crate) doorbell: Arc<TestDoorbell>,
    pub(crate) w1: Arc<dyn BusDevice>,
    pub(crate) w2: Arc<dyn BusDevice>,
}

impl Rig {
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_memory(device, memory())
    }

    pub(crate) fn with_memory(device: impl VirtioDevice + 'static, memory: Arc<GuestMemory>) -> Self {
        let (line, doorbell) = (Arc::new(TestLine::default()), Arc::new(TestDoorbell::default()));
        let transport = MmioTransport::new(
            Box::new(device),
            Arc::clone(&memory),
            Arc::clone(&line) as Arc<dyn Line>,
            Arc::clone(&doorbell) as Arc<dyn Doorbell>,
        );
        let (w1, w2) = (transport.command_line_window(W1), transport.acpi_window(W2));
        Self { memory, transport, line, doorbell, w1, w2 }
    }

    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.w1.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn set(&self, offset: u64, value: u32) {
        self.w1.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn offered(&self) -> u64 {
        self.set(0x14, 1);
        let high = u64::from(self.get(0x10));
        self.set(0x14, 0);
        high << 32 | u64::from(self.get(0x10))
    }

    /// From reset to FEATURES_OK with those of `wanted` that are offered. Returns them.
    pub(crate) fn negotiate(&self, wanted: u64) -> u64 {
        self.set(0x70, 0);
        self.set(0x70, 1);
        self.set(0x70, 3);
        let features = (self.offered() & wanted) | F_VERSION_1;
        self.set(0x24, 0);
        self.set(0x20, features as u32);
        self.set(0x24, 1);
        self.set(0x20, (features >> 32) as u32);
        self.set(0x70, 0xb);
        assert_eq!(self.get(0x70), 0xb, "features refused");
        features
    }

    /// Sets up queue `index` with areas at the usual place for it.
    pub(crate) fn queue(&self, index: u16, size: u16) -> Ring {
        let ring = Ring::new(&self.memory, index, size);
        self.place(&ring);
        ring
    }

    pub(crate) fn place(&self, ring: &Ring) {
        self.set(0x30, u32::from(ring.index));
        self.set(0x38, u32::from(ring.size));
        for (register, value) in [(0x80, ring.desc), (0x90, ring.avail), (0xa0, ring.used)] {
            self.set(register, value as u32);
            self.set(register + 4, (value >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    pub(crate) fn driver_ok(&self) {
        self.set(0x70, 0xf);
    }

    /// The usual start with all of INDIRECT, EVENT_IDX and `features` that is offered.
    pub(crate) fn start(&self, features: u64, queues: u16, size: u16) -> Vec<Ring> {
        self.negotiate(features | F_INDIRECT_DESC);
        let rings = (0..queues).map(|i| self.queue(i, size)).collect();
        self.driver_ok();
        rings
    }

    /// The device comes to a stand and goes on: in this transport as it is, or in one that has been reset and is given what was saved. Returns
    /// what was.
    pub(crate) fn stand_and_go_on(&self, elsewhere: bool) -> TransportState {
        self.transport.suspend().unwrap();
        let saved = self.transport.save().unwrap();
        if elsewhere {
            let text = serde_json::to_string(&saved).unwrap();
            self.transport.reset();
            self.transport.restore(&serde_json::from_str(&text).unwrap()).unwrap();
            assert_eq!(self.transport.save().unwrap(), saved);
        }
        self.transport.resume().unwrap();
        saved
    }

    pub(crate) fn kick(&self, ring: &Ring) {
        self.set(0x50, u32::from(ring.index));
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.get(0x70) & 0x40 != 0
    }

    /// Waits until `done` gives something; looks again at each interrupt.
    pub(crate) fn wait<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            let edges = self.line.edges.lock().unwrap();
            let before = *edges;
            drop(edges);
            if let Some(value) = done() {
                return value;
            }
            let edges = self.line.edges.lock().unwrap();
            if *edges == before {
                // Wakes up in between too: not everything that is waited for comes with an interrupt.
                let _ = self.line.more.wait_timeout(edges, Duration::from_millis(5)).unwrap();
            }
            assert!(Instant::now() < end, "waited too long");
        }
    }

    /// Waits for the next used element of `ring`.
    pub(crate) fn used(&self, ring: &mut Ring) -> (u32, u32) {
        self.wait(|| ring.next_used())
    }

    /// Sends a command to a NIC; `None` when the device answered nothing.
    pub(crate) fn command(&self, ring: &mut Ring, bytes: &[u8]) -> Option<u8> {
        let answer = GuestAddress(DATA + 0x8000);
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        self.memory.write_obj(0xffu8, answer).unwrap();
        let head = ring.add(&[(DATA, bytes.len() as u32, false), (answer.0, 1, true)]);
        self.kick(ring);
        let (id, len) = self.used(ring);
        assert_eq!(id, u32::from(head));
        (len == 1).then(|| self.memory.read_obj(answer).unwrap())
    }

    pub(crate) fn wait_needs_reset(&self) {
        self.wait(|| self.needs_reset().then_some(()));
    }
}

/// The driver's side of a split ring.
pub(crate) struct Ring {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) avail_index: u16,
    pub(crate) used_index: u16,
    next_desc: u16,
}

impl Ring {
    pub(crate) fn new(memory: &Arc<GuestMemory>, index: u16, size: u16) -> Self {
        let base = 0x1000 + 0x1_0000 * u64::from(index);
        let (desc, avail, used) = (base, base + 0x4000, base + 0x8000);
        let memory = Arc::clone(memory);
        memory.write_slice(&[0; 0xc000], GuestAddress(base)).unwrap();
        Self { memory, index, size, desc, avail, used, avail_index: 0, used_index: 0, next_desc: 0 }
    }

    fn put16(&self, addr: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(addr)).unwrap();
    }

    fn get16(&self, addr: u64) -> u16 {
        self.memory.read_obj(GuestAddress(addr)).unwrap()
    }

    /// Writes descriptor `at` of the table at `table`.
    pub(crate) fn put(&self, table: u64, at: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(table + 16 * u64::from(at));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Makes `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.put16(self.avail + 4 + 2 * u64::from(self.avail_index % self.size), head);
        self.avail_index = self.avail_index.wrapping_add(1);
        self.set_avail_index(self.avail_index);
    }

    pub(crate) fn set_avail_index(&self, value: u16) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.put16(self.avail + 2, value);
    }

    pub(crate) fn set_avail_flags(&self, value: u16) {
        self.put16(self.avail, value);
    }

    pub(crate) fn set_used_event(&self, value: u16) {
        self.put16(self.avail + 4 + 2 * u64::from(self.size), value);
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.get16(self.used + 4 + 8 * u64::from(self.size))
    }

    pub(crate) fn used_flags(&self) -> u16 {
        self.get16(self.used)
    }

    /// Writes a chain of (address, length, device writes) and makes it available. Returns its head.
    pub(crate) fn add(&mut self, parts: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_desc % self.size;
        for (i, (addr, len, write)) in parts.iter().enumerate() {
            let at = self.next_desc % self.size;
            let last = i + 1 == parts.len();
            let flags = if last { 0 } else { NEXT } | if *write { WRITE } else { 0 };
            self.put(self.desc, at, *addr, *len, flags, (at + 1) % self.size);
            self.next_desc = self.next_desc.wrapping_add(1);
        }
        self.offer(head);
        head
    }

    pub(crate) fn next_used(&mut self) -> Option<(u32, u32)> {
        if self.get16(self.used + 2) == self.used_index {
            return None;
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let at = self.used + 4 + 8 * u64::from(self.used_index % self.size);
        self.used_index = self.used_index.wrapping_add(1);
        Some((
            self.memory.read_obj(GuestAddress(at)).unwrap(),
            self.memory.read_obj(GuestAddress(at + 4)).unwrap(),
        ))
    }
}

/// Every feature but EVENT_IDX.
pub(crate) const PLAIN: u64 = !F_EVENT_IDX;
