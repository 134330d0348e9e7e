//! Configuration space of one function as plain bytes: what a driver reads, what it may write, and typed builders for both header types
//! (PCI Local Bus 3.0 §6.1, PCI-to-PCI Bridge 1.2 §3.2). Pure.
//!
//! Every byte has a mask of the bits that a driver may change; all else in a write is dropped, so no write needs to be checked. Bytes
//! beyond the conventional 256 read as zero: there are no extended capabilities.

/// Bytes that are kept.
const SIZE: usize = 256;

/// Command register.
pub const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const HEADER_TYPE: u16 = 0x0e;
const BAR0: u16 = 0x10;
const SUBSYSTEM: u16 = 0x2c;
const CAPABILITIES: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;
/// Where the first capability lies, in both header types.
const FIRST_CAPABILITY: u16 = 0x40;

/// Command: the function answers memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may master the bus: read and write memory, and send messages, which are writes too.
const COMMAND_MASTER: u16 = 1 << 2;
/// Command: the function must not assert its interrupt pin.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// I/O space, memory, bus master, parity response, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = 1 | COMMAND_MEMORY | COMMAND_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE;
const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const MULTIFUNCTION: u8 = 0x80;
const BRIDGE: u8 = 1;

/// A bridge's registers.
pub mod bridge {
    /// Number of the bus behind the bridge.
    pub const SECONDARY: u16 = 0x19;
    /// Largest number of a bus behind the bridge.
    pub const SUBORDINATE: u16 = 0x1a;
    /// Memory base and limit.
    pub const MEMORY: u16 = 0x20;
    /// Prefetchable base and limit.
    pub const PREFETCHABLE: u16 = 0x24;
    /// Upper 32 bits of the prefetchable base; those of the limit follow.
    pub const PREFETCHABLE_UPPER: u16 = 0x28;
    /// Bridge control.
    pub const CONTROL: u16 = 0x3e;
    /// Bridge control: the secondary bus is held in reset.
    pub const CONTROL_RESET: u16 = 1 << 6;
}

/// PCI Express capability (PCIe 5.0 §7.5.3).
pub const CAP_EXPRESS: u8 = 0x10;
/// MSI-X capability (PCI 3.0 §6.8.2).
pub const CAP_MSIX: u8 = 0x11;
/// Vendor-specific capability.
pub const CAP_VENDOR: u8 = 0x09;

/// What a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, from high to low.
    pub class: u32,
    /// Subsystem vendor and subsystem; not in a bridge.
    pub subsystem: (u16, u16),
    /// The device has more functions than this.
    pub multifunction: bool,
}

/// Kinds of memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// 32 bits, not prefetchable.
    Memory32,
    /// 64 bits and prefetchable: takes two registers.
    Memory64,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    index: u8,
    size: u64,
    kind: BarKind,
}

/// Configuration space.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Bits that a driver clears by writing one.
    clearable: [u8; SIZE],
    at_reset: [u8; SIZE],
    bars: Vec<Bar>,
    /// Where the pointer to the next capability goes, and where that capability itself goes.
    link: u16,
    free: u16,
}

impl ConfigSpace {
    fn new(identity: &Identity, header: u8) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            clearable: [0; SIZE],
            at_reset: [0; SIZE],
            bars: Vec::new(),
            link: CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        space.preset(0, &identity.vendor.to_le_bytes());
        space.preset(2, &identity.device.to_le_bytes());
        // The revision is the lowest byte of the same word.
        space.preset(8, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.preset(HEADER_TYPE, &[header | if identity.multifunction { MULTIFUNCTION } else { 0 }]);
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        // Cache line size: no effect, but drivers expect to find what they wrote.
        space.allow(0x0c, &[0xff]);
        space
    }

    /// A device (header type 0).
    pub fn endpoint(identity: &Identity) -> Self {
        let mut space = Self::new(identity, 0);
        space.preset(SUBSYSTEM, &identity.subsystem.0.to_le_bytes());
        space.preset(SUBSYSTEM + 2, &identity.subsystem.1.to_le_bytes());
        space
    }

    /// A bridge (header type 1) with a memory and a 64-bit prefetchable window, and without I/O ports behind it.
    pub fn bridge(identity: &Identity) -> Self {
        let mut space = Self::new(identity, BRIDGE);
        // Primary, secondary and subordinate bus.
        space.allow(0x18, &[0xff; 3]);
        // Base and limit of each window: 1 MiB units in the upper twelve bits.
        space.allow(bridge::MEMORY, &[0xf0, 0xff, 0xf0, 0xff]);
        space.allow(bridge::PREFETCHABLE, &[0xf0, 0xff, 0xf0, 0xff]);
        space.preset(bridge::PREFETCHABLE, &[1, 0, 1, 0]);
        space.allow(bridge::PREFETCHABLE_UPPER, &[0xff; 8]);
        // I/O window: base and limit read as zero, which says that there is none.
        // Parity response, SERR#, secondary bus reset.
        space.allow(bridge::CONTROL, &(0x3 | bridge::CONTROL_RESET).to_le_bytes());
        space
    }

    /// Adds BAR `index` of `size` bytes, a power of two of at least 16 (4096 where pages matter).
    pub fn with_bar(mut self, index: u8, size: u64, kind: BarKind) -> Self {
        let (at, mask) = (bar_offset(index), !(size.max(16) - 1));
        match kind {
            BarKind::Memory32 => self.allow(at, &(mask as u32).to_le_bytes()),
            BarKind::Memory64 => {
                // Type 2 in bits 1 and 2: 64 bits. Bit 3: prefetchable.
                self.preset(at, &[0xc]);
                self.allow(at, &mask.to_le_bytes());
            }
        }
        self.bars.push(Bar { index, size, kind });
        self
    }

    /// The function uses interrupt pin `pin` (1 is INTA#).
    pub fn with_pin(mut self, pin: u8) -> Self {
        self.preset(INTERRUPT_PIN, &[pin]);
        self
    }

    /// Adds registers that are the function's own: fixed `data`, of which a driver may change the bits in `writable`.
    pub fn with_bytes(mut self, at: u16, data: &[u8], writable: &[u8]) -> Self {
        self.preset(at, data);
        self.allow(at, writable);
        self
    }

    /// Adds a capability: `body` follows the two bytes of the header, `writable` are the bits of the body that a driver may change.
    /// Returns the offset of its header, or none where there is no room left.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let at = self.free;
        let end = usize::from(at).checked_add(2 + body.len()).filter(|end| *end <= SIZE)?;
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.preset(STATUS, &status.to_le_bytes());
        self.preset(self.link, &[at as u8]);
        self.preset(at, &[id, 0]);
        self.preset(at + 2, body);
        self.allow(at + 2, writable);
        self.link = at + 1;
        self.free = end.next_multiple_of(4) as u16;
        Some(at)
    }

    /// Bits from `at` on that a driver clears by writing one.
    pub fn allow_clear(&mut self, at: u16, bits: &[u8]) {
        for (to, bit) in self.clearable.iter_mut().skip(at.into()).zip(bits) {
            *to |= bit;
        }
    }

    fn preset(&mut self, at: u16, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            for bytes in [&mut self.bytes, &mut self.at_reset] {
                if let Some(to) = bytes.get_mut(usize::from(at) + i) {
                    *to = *value;
                }
            }
        }
    }

    fn allow(&mut self, at: u16, bits: &[u8]) {
        for (to, bit) in self.writable.iter_mut().skip(at.into()).zip(bits) {
            *to |= bit;
        }
    }

    /// Reads; bytes that are not there are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// A driver writes.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, value) in (usize::from(offset)..).zip(data) {
            let (Some(byte), Some(writable), Some(clearable)) =
                (self.bytes.get_mut(at), self.writable.get(at), self.clearable.get(at))
            else {
                continue;
            };
            *byte = (*byte & !writable | value & writable) & !(value & clearable);
        }
    }

    /// The function itself sets a register.
    pub fn set_u16(&mut self, at: u16, value: u16) {
        for (to, value) in self.bytes.iter_mut().skip(at.into()).zip(value.to_le_bytes()) {
            *to = value;
        }
    }

    /// One byte; 0 where there is none.
    pub fn u8(&self, at: u16) -> u8 {
        self.bytes.get(usize::from(at)).copied().unwrap_or(0)
    }

    /// Two bytes.
    pub fn u16(&self, at: u16) -> u16 {
        u16::from_le_bytes([self.u8(at), self.u8(at.saturating_add(1))])
    }

    /// Four bytes.
    pub fn u32(&self, at: u16) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at.saturating_add(2))) << 16
    }

    /// Everything that a driver has changed is as at the start.
    pub fn reset(&mut self) {
        self.bytes = self.at_reset;
    }

    /// All of it.
    pub fn saved(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes what a driver had written into a space like this one; what it cannot write stays as it is here. `None`: no such space.
    pub fn restore(&mut self, saved: &[u8]) -> Option<()> {
        let saved: &[u8; SIZE] = saved.try_into().ok()?;
        for ((byte, saved), writable) in self.bytes.iter_mut().zip(saved).zip(&self.writable) {
            *byte = *byte & !writable | saved & writable;
        }
        Some(())
    }

    /// The interrupt pin is asserted, or not.
    pub fn set_interrupt_status(&mut self, asserted: bool) {
        let status = self.u16(STATUS);
        let bit = if asserted { STATUS_INTERRUPT } else { 0 };
        self.set_u16(STATUS, status & !STATUS_INTERRUPT | bit);
    }

    /// Whether the function answers memory accesses.
    pub fn decodes_memory(&self) -> bool {
        self.u16(COMMAND) & COMMAND_MEMORY != 0
    }

    /// Whether the function may master the bus.
    pub fn is_master(&self) -> bool {
        self.u16(COMMAND) & COMMAND_MASTER != 0
    }

    /// Where the driver has put the BARs, with their sizes, if the function answers at all. An address of 0 means none: an operating
    /// system that sizes a BAR, or has not placed it, leaves it there.
    pub fn bars(&self) -> impl Iterator<Item = (u8, u64, u64)> + '_ {
        let bars = self.bars.iter().filter(|_| self.decodes_memory());
        bars.filter_map(|bar| {
            let at = bar_offset(bar.index);
            let low = u64::from(self.u32(at) & !0xf);
            let base = match bar.kind {
                BarKind::Memory32 => low,
                BarKind::Memory64 => low | u64::from(self.u32(at + 4)) << 32,
            };
            (base != 0).then_some((bar.index, base, bar.size))
        })
    }

    /// A bridge's windows as (first address, last address); a window whose limit lies below its base is closed.
    pub fn bridge_windows(&self) -> [Option<(u64, u64)>; 2] {
        if !self.decodes_memory() {
            return [None; 2];
        }
        let range = |at: u16, upper: [u32; 2]| {
            let part = |at| u64::from(self.u16(at) & 0xfff0) << 16;
            let base = part(at) | u64::from(upper[0]) << 32;
            let last = part(at + 2) | 0xf_ffff | u64::from(upper[1]) << 32;
            (base <= last).then_some((base, last))
        };
        let upper = [self.u32(bridge::PREFETCHABLE_UPPER), self.u32(bridge::PREFETCHABLE_UPPER + 4)];
        [range(bridge::MEMORY, [0; 2]), range(bridge::PREFETCHABLE, upper)]
    }
}

fn bar_offset(index: u8) -> u16 {
    BAR0 + 4 * u16::from(index)
}

/// Whether an access of `len` bytes at `offset` touches one of the `size` bytes at `at`.
pub fn touches(offset: u16, len: usize, at: u16, size: u16) -> bool {
    let (offset, at) = (usize::from(offset), usize::from(at));
    offset < at + usize::from(size) && at < offset.saturating_add(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_what_a_driver_may_write_is_restored() {
        let space = || ConfigSpace::endpoint(&IDENTITY).with_bar(4, 0x4000, BarKind::Memory64);
        let mut first = space();
        first.write(COMMAND, &[6, 4]);
        first.write(0x20, &[0xff; 8]);
        let mut second = space();
        second.restore(&first.saved()).unwrap();
        assert_eq!(second.saved(), first.saved());
        second.restore(&[0xff; SIZE]).unwrap();
        let mut third = space();
        third.write(0, &[0xff; SIZE]);
        assert_eq!(second.saved(), third.saved());
        assert!(second.restore(&[0; SIZE - 1]).is_none() && second.restore(&[0; SIZE + 1]).is_none());
    }

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_00_00,
        subsystem: (0x1af4, 0x1100),
        multifunction: false,
    };

    fn endpoint() -> ConfigSpace {
        let mut space = ConfigSpace::endpoint(&IDENTITY)
            .with_bar(1, 0x1000, BarKind::Memory32)
            .with_bar(4, 0x4000, BarKind::Memory64)
            .with_pin(1);
        assert_eq!(space.add_capability(CAP_MSIX, &[1, 0, 1, 0, 0, 0, 1, 8, 0, 0], &[0, 0xc0]), Some(0x40));
        assert_eq!(space.add_capability(CAP_VENDOR, &[0; 7], &[]), Some(0x4c));
        assert_eq!(space.add_capability(CAP_VENDOR, &[0; 2], &[]), Some(0x58));
        space
    }

    fn write32(space: &mut ConfigSpace, at: u16, value: u32) {
        space.write(at, &value.to_le_bytes());
    }

    #[test]
    fn a_device_says_what_it_is() {
        let space = endpoint();
        assert_eq!((space.u32(0), space.u32(8), space.u8(0xe)), (0x1042_1af4, 0x0100_0001, 0));
        assert_eq!((space.u32(0x2c), space.u8(0x3d)), (0x1100_1af4, 1));
        // The list of capabilities, and the bit that says that there is one.
        assert_eq!((space.u16(6), space.u8(0x34)), (0x10, 0x40));
        assert_eq!((space.u16(0x40), space.u16(0x4c), space.u16(0x58)), (0x4c11, 0x5809, 0x0009));
    }

    #[test]
    fn bars_tell_their_size_and_are_placed_once_decoding_is_on() {
        let mut space = endpoint();
        for at in [0x10, 0x14, 0x20, 0x24] {
            write32(&mut space, at, u32::MAX);
        }
        assert_eq!((space.u32(0x10), space.u32(0x14)), (0, 0xffff_f000));
        assert_eq!((space.u32(0x20), space.u32(0x24)), (0xffff_c00c, u32::MAX));
        write32(&mut space, 0x14, 0xc000_0123);
        write32(&mut space, 0x20, 0);
        write32(&mut space, 0x24, 9);
        assert_eq!(space.bars().count(), 0);
        space.write(COMMAND, &[2]);
        let bars: Vec<_> = space.bars().collect();
        assert_eq!(bars, [(1, 0xc000_0000, 0x1000), (4, 9 << 32, 0x4000)]);
        write32(&mut space, 0x24, 0);
        assert_eq!(space.bars().count(), 1, "address 0 is none");
        space.reset();
        assert_eq!((space.u32(0x14), space.u32(0x20), space.bars().count()), (0, 0xc, 0));
    }

    #[test]
    fn a_bridge_has_windows() {
        let mut space = ConfigSpace::bridge(&IDENTITY);
        write32(&mut space, 0x20, 0xc0f0_c000);
        write32(&mut space, 0x24, 0x0001_fff1);
        write32(&mut space, 0x28, 1);
        write32(&mut space, 0x2c, 2);
        assert_eq!(space.bridge_windows(), [None; 2], "decoding is off");
        space.write(COMMAND, &[2]);
        assert_eq!(
            space.bridge_windows(),
            [Some((0xc000_0000, 0xc0ff_ffff)), Some((0x1_fff0_0000, 0x2_000f_ffff))]
        );
        write32(&mut space, 0x20, 0xc000_c0f0);
        assert_eq!(space.bridge_windows()[0], None);
    }

    #[test]
    fn a_capability_that_does_not_fit_is_not_there() {
        let mut space = endpoint();
        assert_eq!(space.add_capability(CAP_VENDOR, &[0; 164], &[]), None);
        assert!(space.add_capability(CAP_VENDOR, &[0; 150], &[]).is_some());
    }

    proptest! {
        /// Whatever is written, of any length and anywhere: only writable bits change, and a reset brings everything back.
        #[test]
        fn writes_stay_within_their_masks(writes in prop::collection::vec((0u16..4200, prop::collection::vec(any::<u8>(), 0..9)), 0..40)) {
            let fresh = endpoint();
            let mut space = endpoint();
            for (offset, data) in writes {
                space.write(offset, &data);
                for at in 0..SIZE {
                    prop_assert_eq!((space.bytes[at] ^ fresh.bytes[at]) & !fresh.writable[at], 0);
                }
                for (_, base, size) in space.bars() {
                    prop_assert!(base.is_multiple_of(size));
                }
                let mut read = vec![0xaa; data.len()];
                space.read(offset, &mut read);
            }
            space.reset();
            prop_assert_eq!(space.bytes, fresh.bytes);
        }
    }
}
