//! What a guest sees of a device's configuration space, as a pure rule: which bits are the device's, and which are ours.
//!
//! | register                        | whose                                                                                |
//! |---------------------------------|--------------------------------------------------------------------------------------|
//! | BARs                            | ours: where they lie in the guest; I/O ports and the ROM are not there               |
//! | command                         | both: ours says what is mapped, and the device is told                               |
//! | header type, interrupt line     | ours                                                                                 |
//! | interrupt pin                   | ours: A, whichever it is on the host, as that is the line it is connected to         |
//! | power state                     | the device's; in D3 its BARs do not answer (PCI PM 1.2 §5.4.1), and we must know     |
//! | MSI, MSI-X                      | ours: interrupts come to us, and go on to where the guest wants them                 |
//! | PCI Express: kind of function   | ours on the root bus, where an endpoint of a link would be none (PCIe 5.0 §1.3.2.3)   |
//! | all other bytes below 256       | the device's                                                                         |
//! | extended capabilities           | not there: what they say is of the host's links and addresses                        |
//!
//! VFIO itself holds back what could hurt the host. Capabilities come from a device, which may be broken: lists are bounded, and what lies outside
//! is not there.

use crate::pci::config::touches;

/// Bytes of configuration space that there are.
pub(super) const SIZE: usize = 256;
const BARS: usize = 6;

const COMMAND: u16 = 0x04;
const HEADER_TYPE: usize = 0x0e;
const BAR0: usize = 0x10;
const BARS_SIZE: u16 = 24;
const ROM: usize = 0x30;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Memory, bus master, parity response, SERR#, INTx disable; not I/O.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | COMMAND_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE;

const CAP_POWER: u8 = 0x01;
const CAP_MSI: u8 = 0x05;
const CAP_EXPRESS: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;
/// There is no room for more.
const CAPABILITIES_MAX: usize = 48;

const MSI_ENABLE: u16 = 1;
const MSI_WIDE: u16 = 1 << 7;
/// Each message has a mask: not offered, Linux does without.
const MSI_MASKS: u16 = 1 << 8;
/// Power state in the power management control register.
const POWER_STATE: u8 = 3;
const D3: u8 = 3;
/// An integrated endpoint of a root complex.
const INTEGRATED: u8 = 9;

/// Where MSI-X keeps what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsixPlace {
    pub(super) vectors: u16,
    /// BAR and offset of the table.
    pub(super) table: (u8, u64),
    /// Of the pending bits.
    pub(super) pending: (u8, u64),
}

/// What a write may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Changed {
    /// Where BARs lie, or whether they answer.
    pub(super) bars: bool,
    /// How the guest wants interrupts.
    pub(super) interrupts: bool,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    index: u8,
    size: u64,
    wide: bool,
}

/// Configuration space as the guest sees it.
#[derive(Debug, Clone)]
pub(super) struct View {
    bytes: [u8; SIZE],
    /// Bits that are ours.
    ours: [u8; SIZE],
    /// Bits of ours that the guest may change.
    writable: [u8; SIZE],
    at_reset: [u8; SIZE],
    bars: Vec<Bar>,
    msi: Option<u16>,
    msix: Option<(u16, MsixPlace)>,
    /// Where the power state is.
    power_at: Option<u16>,
    /// The last that the guest has asked for.
    power: u8,
}

impl View {
    /// The view of a device that has these registers after a reset, and BARs of these sizes. `behind_port`: it is in the slot of a root port.
    pub(super) fn new(
        device: &[u8; SIZE],
        sizes: &[u64; BARS],
        behind_port: bool,
        multifunction: bool,
    ) -> Self {
        let mut view = Self {
            bytes: *device,
            ours: [0; SIZE],
            writable: [0; SIZE],
            at_reset: [0; SIZE],
            bars: Vec::new(),
            msi: None,
            msix: None,
            power_at: None,
            power: 0,
        };
        view.own(HEADER_TYPE, &[if multifunction { 0x80 } else { 0 }], &[0]);
        view.own(INTERRUPT_LINE, &[0], &[0xff]);
        view.own(INTERRUPT_PIN.into(), &[u8::from(view.u8(INTERRUPT_PIN.into()) != 0)], &[0]);
        view.own(ROM, &[0; 4], &[0; 4]);
        view.own(COMMAND.into(), &[0; 2], &COMMAND_WRITABLE.to_le_bytes());
        view.add_bars(sizes);
        view.add_capabilities(behind_port);
        view.at_reset = view.bytes;
        view
    }

    fn own(&mut self, at: usize, value: &[u8], writable: &[u8]) {
        for (i, (value, mask)) in value.iter().zip(writable).enumerate() {
            if let (Some(byte), Some(ours), Some(to)) =
                (self.bytes.get_mut(at + i), self.ours.get_mut(at + i), self.writable.get_mut(at + i))
            {
                (*byte, *ours, *to) = (*value, 0xff, *mask);
            }
        }
    }

    fn add_bars(&mut self, sizes: &[u64; BARS]) {
        let mut index = 0;
        while let Some(size) = sizes.get(index) {
            let at = BAR0 + 4 * index;
            let register = self.u32(at);
            // Bit 0: I/O. Bits 1 and 2: 64 bits wide, which takes two registers. Bit 3: prefetchable.
            let wide = register & 7 == 4 && index + 1 < BARS;
            let here = index as u8;
            index += if wide { 2 } else { 1 };
            // What a device says of a size that is no size of a BAR cannot be true.
            if register & 1 != 0 || !size.is_power_of_two() || *size < 16 || (!wide && *size > 1 << 31) {
                self.own(at, &[0; 8][..if wide { 8 } else { 4 }], &[0; 8]);
                continue;
            }
            let mask = !(size - 1);
            let flags = u64::from(register & 0xf);
            let len = if wide { 8 } else { 4 };
            self.own(at, &flags.to_le_bytes()[..len], &mask.to_le_bytes());
            self.bars.push(Bar { index: here, size: *size, wide });
        }
    }

    fn add_capabilities(&mut self, behind_port: bool) {
        // Status, bit 4: there is a list.
        if self.u16(6) & 0x10 == 0 {
            return;
        }
        let mut at = usize::from(self.u8(CAPABILITIES) & 0xfc);
        for _ in 0..CAPABILITIES_MAX {
            if at < 0x40 || at + 4 > SIZE {
                return;
            }
            let next = usize::from(self.u8(at + 1) & 0xfc);
            match self.u8(at) {
                CAP_MSI if self.msi.is_none() && at + 14 <= SIZE => {
                    let control = self.u16(at + 2) & !MSI_MASKS & (MSI_WIDE | 0xe);
                    let len = if control & MSI_WIDE != 0 { 14 } else { 10 };
                    self.own_capability(at, len);
                    // Enable, and how many messages are used; address, which is of whole words, and data.
                    self.own(at + 2, &control.to_le_bytes(), &(MSI_ENABLE | 0x70).to_le_bytes());
                    self.own(at + 4, &[0; 10][..len - 4], &[0xff; 10]);
                    self.own(at + 4, &[0], &[0xfc]);
                    self.msi = Some(at as u16);
                }
                CAP_MSIX if self.msix.is_none() && at + 12 <= SIZE => {
                    let vectors = (self.u16(at + 2) & 0x7ff) + 1;
                    let place = |word: u32| ((word & 7) as u8, u64::from(word & !7));
                    let (table, pending) = (place(self.u32(at + 4)), place(self.u32(at + 8)));
                    let place = MsixPlace { vectors, table, pending };
                    self.own_capability(at, 12);
                    self.own(at + 2, &(vectors - 1).to_le_bytes(), &0xc000u16.to_le_bytes());
                    if self.holds(&place) {
                        self.msix = Some((at as u16, place));
                    } else {
                        // A null capability (PCI Code and ID Assignment §2): its registers are in no BAR.
                        self.own(at, &[0], &[0]);
                        self.own(at + 2, &[0; 2], &[0; 2]);
                    }
                }
                CAP_POWER if self.power_at.is_none() && at + 8 <= SIZE => self.power_at = Some(at as u16 + 4),
                CAP_EXPRESS if !behind_port => {
                    let kind = self.u8(at + 2) & 0xf | INTEGRATED << 4;
                    self.own(at + 2, &[kind], &[0]);
                }
                _ => {}
            }
            at = next;
        }
    }

    /// All bytes of a capability are ours, and stay as they are.
    fn own_capability(&mut self, at: usize, len: usize) {
        let bytes: Vec<u8> = (at..at + len).map(|at| self.u8(at)).collect();
        self.own(at, &bytes, &vec![0; len]);
    }

    /// Whether table and pending bits lie in BARs.
    fn holds(&self, place: &MsixPlace) -> bool {
        let fits = |(bar, offset): (u8, u64), len: u64| {
            self.bars
                .iter()
                .any(|b| b.index == bar && offset.checked_add(len).is_some_and(|end| end <= b.size))
        };
        let vectors = u64::from(place.vectors);
        fits(place.table, 16 * vectors) && fits(place.pending, vectors.div_ceil(64) * 8)
    }

    fn u8(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0)
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.u8(at), self.u8(at + 1)])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// Whether an access has a byte that is not wholly ours: then the device is asked first.
    pub(super) fn needs_device(&self, offset: u16, len: usize) -> bool {
        (usize::from(offset)..).take(len).any(|at| self.ours.get(at).is_some_and(|ours| *ours != 0xff))
    }

    /// Puts what is ours over what the device has said.
    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            let ours = self.ours.get(at).copied().unwrap_or(0xff);
            *byte = *byte & !ours | self.u8(at) & ours;
        }
    }

    /// The guest writes.
    pub(super) fn write(&mut self, offset: u16, data: &[u8]) -> Changed {
        for (at, value) in (usize::from(offset)..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        }
        let power = self.power_at.and_then(|at| data.get(usize::from(at.checked_sub(offset)?)));
        if let Some(power) = power {
            self.power = power & POWER_STATE;
        }
        let command = touches(offset, data.len(), COMMAND, 2);
        let msi = self.msi.is_some_and(|at| touches(offset, data.len(), at, 14));
        let msix = self.msix.is_some_and(|(at, _)| touches(offset, data.len(), at + 2, 2));
        Changed {
            bars: command || power.is_some() || touches(offset, data.len(), BAR0 as u16, BARS_SIZE),
            interrupts: command || msi || msix,
        }
    }

    /// What the device is to be told of a write, which is in the view already, as runs of bytes: what is the device's, and its command register as it
    /// is to the guest.
    pub(super) fn passed(&self, offset: u16, data: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut runs: Vec<(u16, Vec<u8>)> = Vec::new();
        for (at, value) in (offset..).zip(data) {
            let value = match (self.ours.get(usize::from(at)).copied(), at.checked_sub(COMMAND)) {
                (_, Some(0 | 1)) => self.u8(at.into()),
                (Some(0), _) => *value,
                _ => continue,
            };
            match runs.last_mut() {
                Some((first, run)) if usize::from(*first) + run.len() == usize::from(at) => run.push(value),
                _ => runs.push((at, vec![value])),
            }
        }
        runs
    }

    /// As after power-on.
    pub(super) fn reset(&mut self) {
        self.bytes = self.at_reset;
        self.power = 0;
    }

    fn command(&self) -> u16 {
        self.u16(COMMAND.into())
    }

    /// Whether it has an interrupt pin, and may use it.
    pub(super) fn uses_pin(&self) -> bool {
        self.u8(INTERRUPT_PIN.into()) != 0 && self.command() & COMMAND_INTX_DISABLE == 0
    }

    /// The BARs that the guest has placed, as number, address and size.
    pub(super) fn placed(&self) -> Vec<(u8, u64, u64)> {
        if self.command() & COMMAND_MEMORY == 0 || self.power == D3 {
            return Vec::new();
        }
        let base = |bar: &Bar| {
            let at = BAR0 + 4 * usize::from(bar.index);
            let low = u64::from(self.u32(at) & !0xf);
            if bar.wide { low | u64::from(self.u32(at + 4)) << 32 } else { low }
        };
        self.bars
            .iter()
            .map(|bar| (bar.index, base(bar), bar.size))
            .filter(|(_, base, _)| *base != 0)
            .collect()
    }

    /// BARs that there are, with their sizes.
    pub(super) fn bars(&self) -> impl Iterator<Item = (u8, u64)> + '_ {
        self.bars.iter().map(|bar| (bar.index, bar.size))
    }

    pub(super) fn msix(&self) -> Option<MsixPlace> {
        self.msix.map(|(_, place)| place)
    }

    /// Message control of MSI-X; 0 without it.
    pub(super) fn msix_control(&self) -> u16 {
        self.msix.map_or(0, |(at, _)| self.u16(usize::from(at) + 2))
    }

    /// Where MSI goes, if the guest uses it: address, data, and how many messages.
    pub(super) fn msi(&self) -> Option<(u64, u16, u16)> {
        let at = usize::from(self.msi?);
        let control = self.u16(at + 2);
        if control & MSI_ENABLE == 0 {
            return None;
        }
        let wide = control & MSI_WIDE != 0;
        let high = if wide { u64::from(self.u32(at + 8)) << 32 } else { 0 };
        let data = self.u16(at + if wide { 12 } else { 8 });
        // No more than the device has; it says so in the same way.
        let count = 1 << (control >> 4 & 7).min(control >> 1 & 7).min(5);
        Some((high | u64::from(self.u32(at + 4)), data, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZES: [u64; 6] = [0x1_0000, 0, 0x20, 0x4000, 0, 0];

    /// A NIC: BARs 0 (32 bits), 2 (I/O) and 3 (64 bits); MSI, Express, MSI-X in BAR 3.
    fn device() -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
        put(0, &[0x86, 0x80, 0xd3, 0x10, 0, 0, 0x10, 0]);
        put(HEADER_TYPE, &[0]);
        put(0x18, &[1]);
        put(0x1c, &[0xc]);
        put(ROM, &[1, 0, 0xfc, 0xff]);
        put(CAPABILITIES, &[0x50]);
        put(0x3d, &[1]);
        put(0x50, &[CAP_MSI, 0x70, 0x86, 1]);
        put(0x70, &[CAP_EXPRESS, 0xa0, 0x02, 0]);
        put(0xa0, &[CAP_MSIX, 0, 4, 0, 3, 0, 0, 0, 3, 0x20, 0, 0]);
        bytes
    }

    fn view() -> View {
        View::new(&device(), &SIZES, true, false)
    }

    fn get(view: &View, at: u16) -> u32 {
        let mut word = device()[at.into()..usize::from(at) + 4].to_vec();
        view.read(at, &mut word);
        u32::from_le_bytes(word.try_into().unwrap())
    }

    fn put(view: &mut View, at: u16, value: u32) -> Changed {
        view.write(at, &value.to_le_bytes())
    }

    #[test]
    fn bars_are_ours() {
        let mut view = view();
        for at in (0x10..0x28).step_by(4) {
            assert_eq!(put(&mut view, at, u32::MAX), Changed { bars: true, interrupts: false });
        }
        assert_eq!(
            [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30].map(|at| get(&view, at)),
            [0xffff_0000, 0, 0, 0xffff_c00c, u32::MAX, 0, 0]
        );
        put(&mut view, 0x10, 0xc000_0000);
        put(&mut view, 0x1c, 0);
        put(&mut view, 0x20, 0x12);
        assert_eq!(view.placed(), []);
        let changed = view.write(4, &[7, 4]);
        assert_eq!(changed, Changed { bars: true, interrupts: true });
        // No I/O on the host either.
        assert_eq!(view.passed(4, &[7, 4, 0x55, 0x66]), [(4, vec![6, 4, 0x55, 0x66])]);
        assert_eq!(view.placed(), [(0, 0xc000_0000, 0x1_0000), (3, 0x12_0000_0000, 0x4000)]);
        assert!(view.command() & COMMAND_MASTER != 0 && !view.uses_pin());
        assert_eq!(get(&view, 4) & 0xffff, 0x406, "no I/O");
        view.reset();
        assert!(view.placed().is_empty() && view.uses_pin());
    }

    #[test]
    fn the_rest_is_the_devices() {
        let mut view = view();
        assert_eq!(get(&view, 0), 0x10d3_8086);
        assert!(view.needs_device(0, 2) && !view.needs_device(0x10, 4) && !view.needs_device(0x100, 4));
        assert_eq!(view.passed(0x78, &[1]), [(0x78, vec![1])]);
        // Across MSI, which ends at 0x5e, and from a BAR; nothing beyond.
        assert_eq!(view.passed(0x5c, &[1, 2, 3, 4]), [(0x5e, vec![3, 4])]);
        assert_eq!(
            (view.passed(0x24, &[1; 8]), view.passed(0xff, &[7, 8])),
            (vec![(0x28, vec![1; 4])], vec![(0xff, vec![7])])
        );
        assert!(view.passed(0x100, &[1; 8]).is_empty());
        let mut beyond = [0xff; 4];
        view.read(0x100, &mut beyond);
        assert_eq!(beyond, [0; 4]);
        view.read(0xfffe, &mut beyond);
        put(&mut view, 0x3c, 0xffff_ffff);
        assert_eq!(get(&view, 0x3c), 0x0000_01ff);
    }

    #[test]
    fn interrupts_are_ours() {
        let mut view = view();
        let place = MsixPlace { vectors: 5, table: (3, 0), pending: (3, 0x2000) };
        assert_eq!((view.msix(), view.msix_control(), view.msi()), (Some(place), 4, None));
        let changed = view.write(0xa2, &[0xff, 0xff]);
        assert_eq!((changed, view.msix_control()), (Changed { bars: false, interrupts: true }, 0xc004));
        // MSI: 64 bits, eight messages at most, of which four are wanted; no masks.
        assert_eq!(get(&view, 0x50) >> 16, 0x86);
        view.write(0x54, &0xfee0_1003u32.to_le_bytes());
        view.write(0x58, &[1, 0, 0, 0, 0x41, 0x40]);
        let changed = view.write(0x52, &[0x21, 0]);
        assert!(changed.interrupts && view.passed(0x52, &[0x21, 0]).is_empty());
        assert_eq!(view.msi(), Some((0x1_fee0_1000, 0x4041, 4)));
        view.write(0x52, &[0x71, 0]);
        assert_eq!(view.msi().map(|(_, _, count)| count), Some(8));
    }

    #[test]
    fn a_device_that_sleeps_answers_nothing() {
        let mut bytes = device();
        bytes[0x70..0x74].copy_from_slice(&[CAP_EXPRESS, 0x90, 2, 0]);
        bytes[0x90..0x98].copy_from_slice(&[CAP_POWER, 0xa0, 3, 0, 8, 0, 0, 0]);
        // Pin C of the host's.
        bytes[0x3d] = 3;
        let mut view = View::new(&bytes, &SIZES, true, false);
        assert_eq!((view.u8(0x3d), view.uses_pin()), (1, true));
        put(&mut view, 0x10, 0xc000_0000);
        view.write(4, &[6, 0]);
        for (write, placed) in [(0x103, 0), (0x108, 1), (3, 0)] {
            assert!(put(&mut view, 0x94, write).bars);
            assert_eq!((view.placed().len(), view.passed(0x94, &[3])), (placed, vec![(0x94, vec![3])]));
        }
        // Its upper byte alone says nothing of that.
        assert!(!view.write(0x95, &[0]).bars && view.placed().is_empty());
        view.reset();
        view.write(4, &[2]);
        assert_eq!(view.power, 0);
    }

    #[test]
    fn on_the_root_bus_there_are_no_links() {
        assert_eq!(get(&view(), 0x70) >> 16 & 0xff, 0x02);
        let view = View::new(&device(), &SIZES, false, true);
        assert_eq!((get(&view, 0x70) >> 16 & 0xff, get(&view, 0xc) >> 16 & 0xff), (0x92, 0x80));
    }

    #[test]
    fn tables_outside_a_bar_are_not_there() {
        for (at, value) in [(0xa4, 1), (0xa4, 6), (0xa5, 0x40), (0xa8, 0), (0xa3, 7), (0xa9, 0x40)] {
            let mut bytes = device();
            // The pending bits of BAR 0 would be at 0x2000, which it has.
            bytes[at] = if at == 0xa8 { 7 } else { value };
            let view = View::new(&bytes, &SIZES, true, false);
            assert_eq!((view.msix(), get(&view, 0xa0) & 0xff), (None, 0), "{at:#x}");
        }
    }

    proptest! {
        /// Any device and any guest: BARs are aligned, nothing that is not the guest's changes, and a reset brings everything back.
        #[test]
        fn nothing_is_too_odd(
            noise in prop::collection::vec((0usize..SIZE, any::<u8>()), 0..60),
            sizes in prop::array::uniform6(prop_oneof![Just(0u64), Just(u64::MAX), (0u32..64).prop_map(|n| 1 << n), any::<u64>()]),
            flags: (bool, bool),
            writes in prop::collection::vec((0u16..4096, prop::collection::vec(any::<u8>(), 0..9)), 0..40),
        ) {
            let mut bytes = device();
            noise.into_iter().for_each(|(at, value)| bytes[at] = value);
            let fresh = View::new(&bytes, &sizes, flags.0, flags.1);
            let mut view = fresh.clone();
            for (offset, data) in writes {
                view.write(offset, &data);
                for (_, base, size) in view.placed() {
                    prop_assert!(base.is_multiple_of(size));
                }
                for at in 0..SIZE {
                    prop_assert_eq!((view.bytes[at] ^ fresh.bytes[at]) & !view.writable[at], 0);
                }
                let mut read = data.clone();
                view.read(offset, &mut read);
                prop_assert!(view.msi().is_none_or(|(_, _, count)| count <= 32));
                view.msix_control();
            }
            view.reset();
            prop_assert_eq!(view.bytes, fresh.bytes);
        }
    }
}
