//! PCI by the ports 0xcf8 and 0xcfc: owns where the BARs of virtio functions on the root bus lie, as nobody has placed them for us, and where in
//! them which part of a device is (virtio 1.2 §4.1.4).

use crate::cpu;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

/// BARs come to lie from here on, in the window of the device that has them.
const FIRST: u64 = 0xc100_0000;
const WINDOW: u64 = 0x10_0000;

/// Command: memory, and bus master.
const COMMAND: u8 = 0x04;
const MEMORY: u32 = 1 << 1;
const MASTER: u32 = 1 << 2;
const BAR0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const VENDOR: u8 = 0x09;
/// Device id of device type 0, and Red Hat's vendor id.
const VIRTIO: u32 = 0x1040_1af4;

/// A function on the root bus.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Function {
    device: u8,
    function: u8,
}

/// Where the parts of a virtio device are.
#[derive(Clone, Copy)]
pub struct Parts {
    /// Whose they are.
    pub function: Function,
    /// Device type.
    pub kind: u32,
    /// Common configuration.
    pub common: u64,
    /// ISR status.
    pub isr: u64,
    /// The device's own configuration.
    pub device: u64,
    /// Notifications.
    pub notify: u64,
    /// Bytes from one notification to the next.
    pub step: u64,
}

/// All functions that there are on the root bus.
pub fn functions() -> impl Iterator<Item = Function> {
    let all = (0..32).flat_map(|device| (0..8).map(move |function| Function { device, function }));
    all.filter(|f| f.read(0) & 0xffff != 0xffff)
}

/// All virtio functions, placed and switched on.
pub fn virtio() -> impl Iterator<Item = Parts> {
    functions().filter_map(Function::open)
}

impl Function {
    /// Selects a register, whose bytes are at the data port then.
    pub fn select(self, register: u8) {
        let at = u32::from(self.device) << 11 | u32::from(self.function) << 8 | u32::from(register & 0xfc);
        cpu::outl(ADDRESS, ENABLE | at);
    }

    /// Reads a register of four bytes.
    pub fn read(self, register: u8) -> u32 {
        self.select(register);
        cpu::inl(DATA)
    }

    /// Writes one.
    pub fn write(self, register: u8, value: u32) {
        self.select(register);
        cpu::outl(DATA, value);
    }

    /// Line of the IOAPIC that pin A is connected to.
    pub fn line(self) -> u32 {
        16 + u32::from(self.device) % 4
    }

    /// Where the capability of this number is, the first or one of the next: there are no more than fit.
    pub fn capabilities(self, wanted: u8) -> impl Iterator<Item = u8> {
        let mut at = self.read(CAPABILITIES) as u8 & 0xfc;
        let next = move || {
            let here = (at != 0).then_some(at)?;
            let head = self.read(here);
            at = (head >> 8) as u8 & 0xfc;
            Some((here, head as u8))
        };
        core::iter::from_fn(next).take(48).filter(move |(_, id)| *id == wanted).map(|(at, _)| at)
    }

    /// Address of a BAR.
    pub fn bar(self, index: u8) -> u64 {
        let low = self.read(BAR0 + 4 * index);
        let high = if low & 7 == 4 { self.read(BAR0 + 4 * index + 4) } else { 0 };
        u64::from(low & !0xf) | u64::from(high) << 32
    }

    /// Gives each BAR a place.
    fn place(self) {
        let mut at = FIRST + u64::from(self.device) * WINDOW;
        let mut index = 0;
        while index < 6 {
            let register = BAR0 + 4 * index;
            self.write(register, u32::MAX);
            let mask = self.read(register);
            let wide = mask & 7 == 4;
            if mask & 1 == 0 && mask & !0xf != 0 {
                let size = u64::from(!(mask & !0xf)) + 1;
                at = at.next_multiple_of(size);
                self.write(register, at as u32);
                if wide {
                    self.write(register + 4, (at >> 32) as u32);
                }
                at += size;
            }
            index += if wide { 2 } else { 1 };
        }
        self.write(COMMAND, MEMORY | MASTER);
    }

    fn open(self) -> Option<Parts> {
        let id = self.read(0);
        let kind = id.checked_sub(VIRTIO).filter(|rest| rest & 0xffff == 0 && *rest >> 16 < 0x40)? >> 16;
        if self.read(COMMAND) & (MEMORY | MASTER) != MEMORY | MASTER {
            self.place();
        }
        let mut parts = Parts { function: self, kind, common: 0, isr: 0, device: 0, notify: 0, step: 0 };
        for at in self.capabilities(VENDOR) {
            let what = self.read(at) >> 24;
            let place = self.bar((self.read(at + 4) & 7) as u8) + u64::from(self.read(at + 8));
            match what {
                1 => parts.common = place,
                2 => (parts.notify, parts.step) = (place, self.read(at + 16).into()),
                3 => parts.isr = place,
                4 => parts.device = place,
                _ => {}
            }
        }
        (parts.common != 0 && parts.notify != 0 && parts.isr != 0).then_some(parts)
    }
}
