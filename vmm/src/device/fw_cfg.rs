//! The configuration device that firmware asks what it cannot find out by looking (QEMU's "fw_cfg", docs/specs/fw_cfg): numbered items of bytes,
//! some of which have names.
//!
//! ```text
//! 0x510  select (16 bits) · 0x511  the next byte of the item
//! 0x514  address of a request in guest memory, upper half, then lower half, big-endian; the second write carries it out
//!        request: control (item << 16 | 16 write | 8 select | 4 skip | 2 read | 1 error), length, address: 4, 4, 8 bytes, big-endian
//! ```
//!
//! Everything that a request says is the guest's: its addresses must be RAM, and what is copied comes in pieces of bounded size. Beyond its end an
//! item reads as zeroes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes as _, GuestAddress};

use crate::bus::BusDevice;
use crate::memory::GuestMemory;

const DATA: u64 = 1;
const DMA_HIGH: u64 = 4;
const DMA_LOW: u64 = 8;

const ITEM_SIGNATURE: u16 = 0;
const ITEM_ID: u16 = 1;
const ITEM_DIRECTORY: u16 = 0x19;
/// Of the first item with a name.
const FIRST_FILE: u16 = 0x20;
/// Bytes of a name, the zero at its end among them.
const NAME: usize = 56;

/// Both ways to ask are there.
const FEATURES: u32 = 1 | 2;
const SIGNATURE: &[u8; 4] = b"QEMU";
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

const CONTROL_ERROR: u32 = 1;
const CONTROL_READ: u32 = 2;
const CONTROL_SKIP: u32 = 4;
const CONTROL_SELECT: u32 = 8;
const CONTROL_WRITE: u32 = 16;

/// Bytes that are copied at a time.
const PIECE: usize = 64 << 10;

/// Reads bytes at an offset; all or an error.
pub type Reader = Box<dyn Fn(u64, &mut [u8]) -> Result<(), ()> + Send + Sync>;

/// What an item consists of.
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// Bytes that are made when the guest selects the item, always so many.
    Made(usize, Box<dyn Fn() -> Vec<u8> + Send + Sync>),
    /// So many bytes, which are read when they are wanted: at an offset, as many as fit. What cannot be read is an error to the guest.
    Read(u64, Reader),
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Made(len, _) => *len as u64,
            Self::Read(len, _) => *len,
        }
    }
}

/// All items.
#[derive(Default)]
pub struct Items(Vec<(u16, Content)>, Vec<(String, u16, u32)>);

impl Items {
    /// Adds the item of this number.
    pub fn number(&mut self, number: u16, content: Content) {
        self.0.push((number, content));
    }

    /// Adds one with a name, of at most 55 bytes and of a number of its own.
    pub fn file(&mut self, name: &str, content: Content) {
        let number = FIRST_FILE.saturating_add(self.1.len() as u16);
        let len = u32::try_from(content.len()).unwrap_or(u32::MAX);
        self.1.push((name.to_owned(), number, len));
        self.number(number, content);
    }

    /// The directory, which is an item itself.
    fn directory(&self) -> Vec<u8> {
        let mut bytes = (self.1.len() as u32).to_be_bytes().to_vec();
        for (name, number, len) in &self.1 {
            bytes.extend(len.to_be_bytes());
            bytes.extend(number.to_be_bytes());
            bytes.extend([0; 2]);
            let name = name.as_bytes();
            let mut field = [0; NAME];
            field.iter_mut().take(NAME - 1).zip(name).for_each(|(to, from)| *to = *from);
            bytes.extend(field);
        }
        bytes
    }
}

/// What the guest has selected, to be saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFwCfg {
    item: u16,
    offset: u64,
    dma_high: u32,
}

#[derive(Default)]
struct State {
    at: SavedFwCfg,
    items: Items,
    /// Bytes of the selected item, if they were made for it.
    made: Option<Vec<u8>>,
}

/// The device.
pub struct FwCfg {
    memory: Arc<GuestMemory>,
    state: Mutex<State>,
}

impl FwCfg {
    /// First of its I/O ports.
    pub const PORT: u64 = 0x510;
    /// I/O ports that it takes.
    pub const PORTS: u64 = 12;

    /// A device without items, whose requests lie in `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Arc<Self> {
        Arc::new(Self { memory, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As at power-on, with these items.
    pub fn reset(&self, mut items: Items) {
        items.number(ITEM_SIGNATURE, Content::Bytes(SIGNATURE.to_vec()));
        items.number(ITEM_ID, Content::Bytes(FEATURES.to_le_bytes().to_vec()));
        let directory = items.directory();
        items.number(ITEM_DIRECTORY, Content::Bytes(directory));
        *self.lock() = State { items, ..State::default() };
    }

    /// What is selected.
    pub fn saved(&self) -> SavedFwCfg {
        self.lock().at
    }

    /// Goes on from it. Every value makes sense: the guest can select what is not there.
    pub fn restore(&self, saved: SavedFwCfg) {
        let mut state = self.lock();
        state.select(saved.item);
        state.at = saved;
    }

    /// Carries out the request at `address`. One that cannot be read cannot be answered either.
    fn request(&self, state: &mut State, address: u64) {
        let mut request = [0; 16];
        if self.memory.read_slice(&mut request, GuestAddress(address)).is_err() {
            return;
        }
        let word = |at: usize| {
            let bytes = request.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok());
            u32::from_be_bytes(bytes.unwrap_or_default())
        };
        let (control, len) = (word(0), word(4));
        let to = u64::from(word(8)) << 32 | u64::from(word(12));
        if control & CONTROL_SELECT != 0 {
            state.select((control >> 16) as u16);
        }
        let done = if control & CONTROL_READ != 0 {
            self.copy(state, to, len)
        } else if control & CONTROL_WRITE != 0 {
            // No item can be written.
            Err(())
        } else {
            if control & CONTROL_SKIP != 0 {
                state.at.offset = state.at.offset.saturating_add(len.into());
            }
            Ok(())
        };
        let answer = if done.is_ok() { 0 } else { CONTROL_ERROR };
        // It was readable a moment ago.
        let _ = self.memory.write_slice(&answer.to_be_bytes(), GuestAddress(address));
    }

    /// Copies the next `len` bytes of the selected item to guest memory.
    fn copy(&self, state: &mut State, to: u64, len: u32) -> Result<(), ()> {
        let mut piece = vec![0; PIECE.min(len as usize)];
        let (mut to, mut left) = (to, len as usize);
        while left > 0 {
            let part = left.min(piece.len());
            let Some(bytes) = piece.get_mut(..part) else { break };
            state.read(bytes)?;
            self.memory.write_slice(bytes, GuestAddress(to)).map_err(|_| ())?;
            // The range is in guest memory so far.
            to = to.checked_add(part as u64).ok_or(())?;
            left -= part;
        }
        Ok(())
    }
}

impl State {
    fn select(&mut self, item: u16) {
        (self.at.item, self.at.offset) = (item, 0);
        self.made = match self.content() {
            Some(Content::Made(_, make)) => Some(make()),
            _ => None,
        };
    }

    fn content(&self) -> Option<&Content> {
        let (_, content) = self.items.0.iter().find(|(number, _)| *number == self.at.item)?;
        Some(content)
    }

    /// The next bytes of the selected item.
    fn read(&mut self, data: &mut [u8]) -> Result<(), ()> {
        data.fill(0);
        let offset = self.at.offset;
        self.at.offset = offset.saturating_add(data.len() as u64);
        let bytes = match (self.content(), &self.made) {
            (Some(Content::Read(len, read)), _) => {
                let there = len.saturating_sub(offset).min(data.len() as u64) as usize;
                return data
                    .get_mut(..there)
                    .filter(|d| !d.is_empty())
                    .map_or(Ok(()), |data| read(offset, data));
            }
            (Some(Content::Bytes(bytes)), _) | (Some(Content::Made(..)), Some(bytes)) => bytes,
            _ => return Ok(()),
        };
        let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        Ok(())
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            DATA => {
                if let [_] = data {
                    // The host's file cannot be read: zeroes, as there is no way to say so.
                    let _ = self.lock().read(data);
                }
            }
            DMA_HIGH.. => {
                let at = usize::try_from(offset - DMA_HIGH).unwrap_or(usize::MAX);
                let signature = DMA_SIGNATURE.get(at..).unwrap_or_default();
                data.iter_mut().zip(signature).for_each(|(to, from)| *to = *from);
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            (0, &[low, high]) => state.select(u16::from_le_bytes([low, high])),
            (DMA_HIGH, &[a, b, c, d]) => state.at.dma_high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let high = std::mem::take(&mut state.at.dma_high);
                let address = u64::from(high) << 32 | u64::from(u32::from_be_bytes([a, b, c, d]));
                self.request(&mut state, address);
            }
            (DMA_HIGH, data) => {
                if let Ok(word) = <[u8; 8]>::try_from(data) {
                    self.request(&mut state, u64::from_be_bytes(word));
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: u16 = FIRST_FILE;
    const REQUEST: u64 = 0x1000;
    const RAM: usize = 1 << 20;

    fn rig() -> (Arc<FwCfg>, Arc<GuestMemory>) {
        let ranges = [(GuestAddress(0), RAM)];
        let memory: Arc<GuestMemory> = Arc::new(GuestMemory::from_ranges(&ranges).unwrap());
        let device = FwCfg::new(Arc::clone(&memory));
        let mut items = Items::default();
        items.number(5, Content::Bytes(vec![2, 0]));
        items.file("etc/first", Content::Bytes(b"first".to_vec()));
        items.file("etc/made", Content::Made(4, Box::new(|| b"made".to_vec())));
        let read = |offset: u64, data: &mut [u8]| {
            data.iter_mut().zip(offset..).for_each(|(to, at)| *to = at as u8);
            if offset > 200_000 { Err(()) } else { Ok(()) }
        };
        items.file("etc/read", Content::Read(300_000, Box::new(read)));
        device.reset(items);
        (device, memory)
    }

    fn bytes<const N: usize>(device: &FwCfg, item: u16) -> [u8; N] {
        device.write(0, &item.to_le_bytes());
        let mut out = [0; N];
        out.iter_mut().for_each(|byte| device.read(DATA, std::slice::from_mut(byte)));
        out
    }

    fn dma(device: &FwCfg, memory: &GuestMemory, control: u32, len: u32, to: u64) -> u32 {
        let request = [&control.to_be_bytes()[..], &len.to_be_bytes(), &to.to_be_bytes()].concat();
        memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
        device.write(DMA_HIGH, &[0; 4]);
        device.write(DMA_LOW, &(REQUEST as u32).to_be_bytes());
        let mut answer = [0; 4];
        memory.read_slice(&mut answer, GuestAddress(REQUEST)).unwrap();
        u32::from_be_bytes(answer)
    }

    #[test]
    fn tells_what_there_is_byte_by_byte() {
        let (device, _) = rig();
        assert_eq!((&bytes::<4>(&device, 0), bytes::<4>(&device, 1)), (b"QEMU", [3, 0, 0, 0]));
        assert_eq!(bytes::<3>(&device, 5), [2, 0, 0]);
        assert_eq!(&bytes::<6>(&device, FILE), b"first\0");
        assert_eq!(&bytes::<5>(&device, FILE + 1), b"made\0");
        assert_eq!(bytes::<3>(&device, 0x4000), [0; 3]);
        let directory = bytes::<132>(&device, ITEM_DIRECTORY);
        assert_eq!(directory[..8], [0, 0, 0, 3, 0, 0, 0, 5]);
        assert_eq!(&directory[8..22], b"\0\x20\0\0etc/first\0");
        let mut signature = [0; 8];
        device.read(DMA_HIGH, &mut signature);
        assert_eq!(&signature, b"QEMU CFG");
    }

    #[test]
    fn copies_into_guest_memory() {
        let (device, memory) = rig();
        let select = |item: u16| u32::from(item) << 16 | CONTROL_SELECT;
        assert_eq!(dma(&device, &memory, select(FILE) | CONTROL_READ, 8, 0x2000), 0);
        let mut read = [0xaa; 9];
        memory.write_slice(&[0xaa; 9], GuestAddress(0x2000 + 8)).unwrap();
        memory.read_slice(&mut read, GuestAddress(0x2000)).unwrap();
        assert_eq!(&read, b"first\0\0\0\xaa");
        // Skipped, then read on, in more pieces than one.
        assert_eq!(dma(&device, &memory, select(FILE + 2) | CONTROL_SKIP, 3, 0), 0);
        assert_eq!(dma(&device, &memory, CONTROL_READ, 150_000, 0x4000), 0);
        let mut read = [0; 2];
        memory.read_slice(&mut read, GuestAddress(0x4000 + 149_998)).unwrap();
        assert_eq!(read, [(150_001u32) as u8, (150_002u32) as u8]);
        // What the host cannot read, what nobody may write, and what is not RAM.
        assert_eq!(dma(&device, &memory, CONTROL_READ, 100_000, 0x4000), CONTROL_ERROR);
        assert_eq!(dma(&device, &memory, select(FILE) | CONTROL_WRITE, 1, 0x4000), CONTROL_ERROR);
        for to in [RAM as u64 - 1, RAM as u64, u64::MAX, u64::MAX - 3] {
            assert_eq!(dma(&device, &memory, select(FILE) | CONTROL_READ, 4, to), CONTROL_ERROR);
        }
        assert_eq!(dma(&device, &memory, select(FILE) | CONTROL_READ, u32::MAX, 0x2000), CONTROL_ERROR);
        // The request itself is nowhere.
        device.write(DMA_HIGH, &u64::MAX.to_be_bytes());
    }

    #[test]
    fn goes_on_where_it_was() {
        let (first, _) = rig();
        bytes::<2>(&first, FILE + 1);
        let (second, _) = rig();
        second.restore(first.saved());
        let mut byte = [0];
        second.read(DATA, &mut byte);
        assert_eq!(&byte, b"d");
    }

    proptest! {
        /// Requests and accesses of any kind: nothing outside RAM is touched, and the device still answers.
        #[test]
        fn no_request_is_too_odd(
            steps in prop::collection::vec(
                (0u64..12, prop::collection::vec(any::<u8>(), 0..9), any::<u32>(), 0u32..0x20_0000, 0u64..0x20_0000), 1..12),
        ) {
            let (device, memory) = rig();
            for (offset, data, control, len, to) in steps {
                device.write(offset, &data);
                dma(&device, &memory, control & 0x3f_001f, len, to);
                device.read(offset, &mut vec![0; data.len()]);
            }
            prop_assert_eq!(&bytes::<4>(&device, 0), b"QEMU");
        }
    }
}
