//! The root complex: owns the functions of the root bus, the way from an address in configuration space to a function, and what of their BARs is
//! mapped into the machine.
//!
//! ```text
//! ECAM       base + (bus << 20 | device << 15 | function << 12 | register)          PCIe 5.0 §7.2.2
//! 0xcf8      enable << 31 | bus << 16 | device << 11 | function << 8 | register     PCI 3.0 §3.2.2.3.2
//! 0xcfc-cff  the four bytes of that register
//! 0xcf9      reset, a byte in the middle of the address register: bits 1 and 2 together (ICH9 §13.7.5)
//! ```
//!
//! After each write that may matter the whole map is worked out again from the registers (`bar` says how) and the difference is applied: there are
//! few BARs, and a driver moves them at boot only.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::bar::{Window, grant};
use super::{Function, Mapping, RootPort};
use crate::bus::{Bus, BusDevice};

/// Device and function on a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
}

/// Why a function cannot be put on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("slot {:#x} function {} of pcie.0 is taken", .0.device, .0.function)]
pub struct RootError(pub Address);

struct Node {
    function: Arc<dyn Function>,
    /// The same, if it leads to another bus.
    port: Option<Arc<RootPort>>,
}

struct Mapped {
    owner: Arc<dyn Function>,
    mapping: Mapping,
}

impl Mapped {
    fn same(&self, other: &Self) -> bool {
        let (a, b) = (&self.mapping, &other.mapping);
        Arc::ptr_eq(&self.owner, &other.owner) && (a.bar, a.base, a.size) == (b.bar, b.base, b.size)
    }
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<Address, Node>,
    mapped: Vec<Mapped>,
}

/// The root complex.
pub struct Root {
    mmio: Arc<Bus>,
    windows: Vec<Window>,
    state: Mutex<State>,
    /// What was last written to port 0xcf8.
    selected: AtomicU32,
}

impl Root {
    /// A root bus without functions. BARs come to lie inside `windows`, on `mmio`.
    pub fn new(mmio: Arc<Bus>, windows: Vec<Window>) -> Arc<Self> {
        Arc::new(Self { mmio, windows, state: Mutex::default(), selected: AtomicU32::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a function on the root bus.
    pub fn add(&self, at: Address, function: Arc<dyn Function>) -> Result<(), RootError> {
        self.insert(at, Node { function, port: None })
    }

    /// Puts a root port on the root bus.
    pub fn add_port(&self, at: Address, port: &Arc<RootPort>) -> Result<(), RootError> {
        self.insert(at, Node { function: Arc::clone(port) as _, port: Some(Arc::clone(port)) })
    }

    fn insert(&self, at: Address, node: Node) -> Result<(), RootError> {
        match self.lock().nodes.entry(at) {
            std::collections::btree_map::Entry::Occupied(_) => Err(RootError(at)),
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(node);
                Ok(())
            }
        }
    }

    /// As at power-on: every function is reset, and no BAR is mapped.
    pub fn reset(&self) {
        self.selected.store(0, Ordering::Relaxed);
        let functions: Vec<_> = self.lock().nodes.values().map(|n| Arc::clone(&n.function)).collect();
        for function in functions {
            function.reset();
        }
        self.sync();
    }

    /// What port 0xcf8 holds.
    pub fn selected(&self) -> u32 {
        self.selected.load(Ordering::Relaxed)
    }

    /// Puts it there, as the guest would.
    pub fn select(&self, value: u32) {
        self.selected.store(value, Ordering::Relaxed);
    }

    /// The function that answers, if any. Behind a port there is one device with one function, while it has power.
    fn find(&self, bus: u8, at: Address) -> Option<Arc<dyn Function>> {
        let state = self.lock();
        if bus == 0 {
            return state.nodes.get(&at).map(|n| Arc::clone(&n.function));
        }
        let first = Address { device: 0, function: 0 };
        let port = state.nodes.values().filter_map(|n| n.port.as_ref()).find(|p| p.secondary() == bus)?;
        if at == first { port.powered() } else { None }
    }

    fn read(&self, bus: u8, at: Address, register: u16, data: &mut [u8]) {
        match self.find(bus, at) {
            Some(function) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, bus: u8, at: Address, register: u16, data: &[u8]) {
        let Some(function) = self.find(bus, at) else { return };
        if function.write_config(register, data) {
            self.sync();
        }
    }

    /// Maps what the registers say.
    pub fn sync(&self) {
        let mut state = self.lock();
        let mut wanted: Vec<Mapped> = Vec::new();
        for node in state.nodes.values() {
            let own = node.function.mappings().into_iter();
            wanted.extend(own.map(|mapping| Mapped { owner: Arc::clone(&node.function), mapping }));
            let Some(port) = &node.port else { continue };
            let Some(device) = port.powered() else { continue };
            let windows = port.windows();
            let through = |m: &Mapping| {
                let last = m.base.saturating_add(m.size.saturating_sub(1));
                windows.iter().flatten().any(|(a, b)| *a <= m.base && last <= *b)
            };
            let behind = device.mappings().into_iter().filter(through);
            wanted.extend(behind.map(|mapping| Mapped { owner: Arc::clone(&device), mapping }));
        }
        let ranges: Vec<(u64, u64)> = wanted.iter().map(|w| (w.mapping.base, w.mapping.size)).collect();
        let granted = grant(&self.windows, &ranges);
        let mut granted = granted.into_iter();
        wanted.retain(|_| granted.next() == Some(true));

        let (kept, gone): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.mapped).into_iter().partition(|old| wanted.iter().any(|w| w.same(old)));
        for old in gone {
            self.mmio.remove(old.mapping.base);
            old.owner.mapped(old.mapping.bar, None);
        }
        wanted.retain(|w| !kept.iter().any(|old| old.same(w)));
        state.mapped = kept;
        for new in wanted {
            let Mapping { bar, base, size, ref device } = new.mapping;
            match self.mmio.insert(base, size, Arc::clone(device)) {
                Ok(()) => {
                    new.owner.mapped(bar, Some(base));
                    state.mapped.push(new);
                }
                // The windows are the bus's alone.
                Err(error) => tracing::error!("a BAR cannot be mapped: {error}"),
            }
        }
    }

    /// All of configuration space in memory, 256 MiB.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(Arc::downgrade(self)))
    }

    /// I/O ports 0xcf8 to 0xcff. `on_reset` is told of the guest's wish for a reset.
    pub fn ports(self: &Arc<Self>, on_reset: Box<dyn Fn() + Send + Sync>) -> Arc<dyn BusDevice> {
        Arc::new(Ports { root: Arc::clone(self), on_reset })
    }
}

/// The root has it, by way of the host bridge: it must not keep the root.
struct Ecam(Weak<Root>);

impl Ecam {
    /// Bytes of one function.
    const FUNCTION: u64 = 0x1000;

    /// An access that leaves its function is none.
    fn split(offset: u64, len: usize) -> Option<(u8, Address, u16)> {
        let register = offset % Self::FUNCTION;
        let inside = register.checked_add(len as u64)? <= Self::FUNCTION;
        let at = Address { device: (offset >> 15 & 0x1f) as u8, function: (offset >> 12 & 7) as u8 };
        inside.then_some(((offset >> 20) as u8, at, register as u16))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (Self::split(offset, data.len()), self.0.upgrade()) {
            (Some((bus, at, register)), Some(root)) => root.read(bus, at, register, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Some((bus, at, register)), Some(root)) = (Self::split(offset, data.len()), self.0.upgrade()) {
            root.write(bus, at, register, data);
        }
    }
}

struct Ports {
    root: Arc<Root>,
    on_reset: Box<dyn Fn() + Send + Sync>,
}

impl Ports {
    const RESET: u64 = 1;
    /// System reset, and the bit that carries it out.
    const RESET_BITS: u8 = 6;
    const DATA: u64 = 4;
    const ENABLE: u32 = 1 << 31;

    /// Where an access to the data port goes.
    fn target(&self, offset: u64, len: usize) -> Option<(u8, Address, u16)> {
        let selected = self.root.selected.load(Ordering::Relaxed);
        let byte = offset.checked_sub(Self::DATA)?;
        if selected & Self::ENABLE == 0 || byte + len as u64 > 4 {
            return None;
        }
        let at = Address { device: (selected >> 11 & 0x1f) as u8, function: (selected >> 8 & 7) as u8 };
        Some(((selected >> 16) as u8, at, (selected & 0xfc) as u16 + byte as u16))
    }
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, Ok(word)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *word = self.root.selected.load(Ordering::Relaxed).to_le_bytes();
            return;
        }
        if let (Self::RESET, [byte]) = (offset, &mut *data) {
            *byte = 0;
            return;
        }
        match self.target(offset, data.len()) {
            Some((bus, at, register)) => self.root.read(bus, at, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            self.root.selected.store(u32::from_le_bytes(word), Ordering::Relaxed);
        } else if let (Self::RESET, [value]) = (offset, data) {
            if value & Self::RESET_BITS == Self::RESET_BITS {
                (self.on_reset)();
            }
        } else if let Some((bus, at, register)) = self.target(offset, data.len()) {
            self.root.write(bus, at, register, data);
        }
    }
}

#[cfg(test)]
mod tests;
