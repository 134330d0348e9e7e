//! The command set of a parallel NOR flash (Intel's, JESD68 command set 1) on an 8-bit bus, as a pure machine: `(state, access) -> (state, effect)`.
//!
//! ```text
//!            ff                        40 or 10 ──▶ value ──────────▶ Program ─┐
//!   array ◀──────── any ──────────▶    20 ──▶ d0 ───────────────────▶ Erase ───┤
//!     │             state              e8 ──▶ count ──▶ bytes ──▶ d0 ▶ Program ─┤
//!     │ read: memory                   70 · 50 (clears it) ─────────────────────┼──▶ status
//!     ▼                                90 ──▶ identity    98 ──▶ query          │    read: status
//!                                      60 ──▶ 01, d0 (locks: there are none) ───┘
//! ```
//!
//! Programming clears bits and erasing a sector sets them all. EDK2 writes ones over zeroes, and expects them to be there: it takes erased
//! flash and memory for the same. So a program command stores what it is given.

use serde::{Deserialize, Serialize};

/// Bytes that are erased at once.
pub(super) const SECTOR: u32 = 4096;
/// Bytes of one buffered write, all in one block of this size.
pub(super) const BUFFER: usize = 1024;

const READY: u8 = 0x80;
const ERASE_ERROR: u8 = 0x20;
const PROGRAM_ERROR: u8 = 0x10;

/// What the next write means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum Expect {
    #[default]
    Command,
    Program,
    EraseConfirm,
    Lock,
    /// How many bytes, less one.
    Count,
    Bytes(u16),
    BufferConfirm,
}

/// What a read gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum View {
    #[default]
    Array,
    Status,
    Identity,
    Query,
}

/// The state.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Commands {
    expect: Expect,
    view: View,
    status: u8,
    /// Where the buffer goes: its first address, once a byte of it is there.
    start: Option<u32>,
    buffer: Vec<u8>,
}

/// What a write does to the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    /// These bytes are at this address now.
    Program(u32, Vec<u8>),
    /// The sector that begins here is erased.
    Erase(u32),
}

/// What a read gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// What is in memory.
    Memory,
    Register(u8),
}

impl Commands {
    /// Whether reads give what is in memory.
    pub(super) fn shows_memory(&self) -> bool {
        self.view == View::Array
    }

    /// One that a guest can have brought about, of a flash of `size` bytes.
    pub(super) fn makes_sense(&self, size: u32) -> bool {
        let buffered = match self.expect {
            Expect::Bytes(left) => left > 0 && self.buffer.len() + usize::from(left) <= BUFFER,
            Expect::BufferConfirm => self.buffer.len() <= BUFFER,
            _ => self.buffer.is_empty(),
        };
        let inside = self.start.is_none_or(|start| {
            u32::try_from(self.buffer.len())
                .is_ok_and(|len| start.checked_add(len).is_some_and(|end| end <= size))
        });
        buffered && inside && (self.expect == Expect::Command || self.view == View::Status)
    }

    pub(super) fn read(&self, offset: u32, size: u32) -> Answer {
        Answer::Register(match self.view {
            View::Array => return Answer::Memory,
            View::Status => self.status,
            // Maker and device; no sector is locked.
            View::Identity => match offset & 0xff {
                0 => 0x89,
                1 => 0x18,
                _ => 0,
            },
            View::Query => query(offset & 0xff, size),
        })
    }

    /// The guest writes; `offset` lies in the flash, which has `size` bytes.
    pub(super) fn write(&mut self, offset: u32, value: u8, size: u32) -> Effect {
        match std::mem::take(&mut self.expect) {
            Expect::Command => self.command(value),
            Expect::Program => {
                self.status |= READY;
                return Effect::Program(offset, vec![value]);
            }
            Expect::EraseConfirm if value == 0xd0 => {
                self.status |= READY;
                return Effect::Erase(offset - offset % SECTOR);
            }
            // A sequence that was begun and is not this one's (JESD68, "command sequence error").
            Expect::EraseConfirm => self.status |= READY | ERASE_ERROR | PROGRAM_ERROR,
            Expect::Lock if matches!(value, 1 | 0xd0) => self.status |= READY,
            Expect::Lock => self.status |= READY | ERASE_ERROR | PROGRAM_ERROR,
            Expect::Count => {
                self.expect = Expect::Bytes(u16::from(value) + 1);
                (self.start, self.buffer) = (None, Vec::new());
            }
            Expect::Bytes(left) => self.take(offset, value, left, size),
            Expect::BufferConfirm => {
                let (start, buffer) = (self.start.take(), std::mem::take(&mut self.buffer));
                self.status |= READY;
                match start {
                    Some(start) if value == 0xd0 => return Effect::Program(start, buffer),
                    _ => self.status |= ERASE_ERROR | PROGRAM_ERROR,
                }
            }
        }
        Effect::Nothing
    }

    fn command(&mut self, value: u8) {
        let (view, expect) = match value {
            0x10 | 0x40 => (View::Status, Expect::Program),
            0x20 => (View::Status, Expect::EraseConfirm),
            0x60 => (View::Status, Expect::Lock),
            0x70 => (View::Status, Expect::Command),
            0xe8 => {
                self.status |= READY;
                (View::Status, Expect::Count)
            }
            0x50 => {
                // EDK2 takes a status that is clear for the sign of flash.
                self.status = 0;
                (self.view, Expect::Command)
            }
            0x90 => (View::Identity, Expect::Command),
            0x98 => (View::Query, Expect::Command),
            // Among them 0xff.
            _ => (View::Array, Expect::Command),
        };
        (self.view, self.expect) = (view, expect);
    }

    /// A byte of a buffered write. They come in order; one from elsewhere spoils the whole.
    fn take(&mut self, offset: u32, value: u8, left: u16, size: u32) {
        let start = *self.start.get_or_insert(offset);
        let len = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
        let block = |at: u32| at / BUFFER as u32;
        if start.checked_add(len) != Some(offset) || block(start) != block(offset) || offset >= size {
            self.status |= READY | PROGRAM_ERROR;
            (self.start, self.buffer) = (None, Vec::new());
            return;
        }
        self.buffer.push(value);
        self.expect = if left > 1 { Expect::Bytes(left - 1) } else { Expect::BufferConfirm };
    }

    /// The host could not keep what was written.
    pub(super) fn fail(&mut self, effect: &Effect) {
        self.status |= match effect {
            Effect::Nothing => 0,
            Effect::Program(..) => PROGRAM_ERROR,
            Effect::Erase(_) => ERASE_ERROR,
        };
    }
}

/// The query table (JESD68): what flash this is.
fn query(at: u32, size: u32) -> u8 {
    let sectors = (size / SECTOR).saturating_sub(1).to_le_bytes();
    let units = (SECTOR / 256).to_le_bytes();
    match at {
        0x10 => b'Q',
        0x11 => b'R',
        0x12 => b'Y',
        // Command set 1, whose own table follows.
        0x13 => 1,
        0x15 => 0x31,
        // 4.5 to 5.5 volts.
        0x1b => 0x45,
        0x1c => 0x55,
        // Typical and longest times, as powers of two.
        0x1f | 0x20 => 7,
        0x21 => 0xa,
        0x23 | 0x24 => 4,
        0x25 => 4,
        0x27 => size.checked_ilog2().unwrap_or(0) as u8,
        0x2a => (BUFFER as u32).ilog2() as u8,
        // One region of sectors that are all alike.
        0x2c => 1,
        0x2d => sectors[0],
        0x2e => sectors[1],
        0x2f => units[0],
        0x30 => units[1],
        0x31 => b'P',
        0x32 => b'R',
        0x33 => b'I',
        0x34 => b'1',
        0x35 => b'0',
        0x3f => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u32 = 64 * SECTOR;

    fn run(commands: &mut Commands, writes: &[(u32, u8)]) -> Vec<Effect> {
        writes
            .iter()
            .map(|(at, value)| commands.write(*at, *value, SIZE))
            .filter(|e| *e != Effect::Nothing)
            .collect()
    }

    #[test]
    fn edk2_finds_flash() {
        let mut flash = Commands::default();
        assert_eq!(flash.read(0, SIZE), Answer::Memory);
        run(&mut flash, &[(0, 0x50)]);
        assert_eq!(flash.read(0, SIZE), Answer::Memory);
        run(&mut flash, &[(0, 0x70)]);
        assert_eq!(flash.read(0, SIZE), Answer::Register(0));
        run(&mut flash, &[(0, 0xff)]);
        assert!(flash.shows_memory());
    }

    #[test]
    fn programs_and_erases() {
        let mut flash = Commands::default();
        let effects =
            run(&mut flash, &[(5, 0x10), (5, 0xab), (6, 0x40), (6, 0xff), (0x1fff, 0x20), (0x1fff, 0xd0)]);
        assert_eq!(
            effects,
            [Effect::Program(5, vec![0xab]), Effect::Program(6, vec![0xff]), Effect::Erase(0x1000)]
        );
        assert_eq!(flash.read(0, SIZE), Answer::Register(READY));
        // Confirmed with something else.
        assert!(run(&mut flash, &[(0, 0x20), (0, 0x10)]).is_empty());
        assert_eq!(flash.read(0, SIZE), Answer::Register(READY | ERASE_ERROR | PROGRAM_ERROR));
        run(&mut flash, &[(0, 0x50)]);
        assert_eq!(flash.read(0, SIZE), Answer::Register(0));
        let failed = Effect::Erase(0);
        flash.fail(&failed);
        assert_eq!(flash.read(0, SIZE), Answer::Register(ERASE_ERROR));
    }

    #[test]
    fn writes_by_the_buffer() {
        let mut flash = Commands::default();
        let writes = [(64, 0xe8), (64, 2), (64, 1), (65, 2), (66, 3), (64, 0xd0), (0, 0xff)];
        assert_eq!(run(&mut flash, &writes), [Effect::Program(64, vec![1, 2, 3])]);
        // Out of order, over the end of a block, and not confirmed.
        for writes in [
            [(64, 0xe8), (64, 1), (64, 1), (66, 2), (64, 0xff)],
            [(1023, 0xe8), (1023, 1), (1023, 1), (1024, 2), (0, 0xff)],
            [(64, 0xe8), (64, 0), (64, 1), (64, 0x20), (0, 0xff)],
        ] {
            assert!(run(&mut flash, &writes).is_empty());
            assert!(flash.shows_memory());
            run(&mut flash, &[(0, 0x70)]);
            assert_ne!(flash.read(0, SIZE), Answer::Register(READY));
            run(&mut flash, &[(0, 0x50), (0, 0xff)]);
        }
    }

    #[test]
    fn says_what_it_is() {
        let mut flash = Commands::default();
        run(&mut flash, &[(0, 0x98)]);
        let text: Vec<_> = (0x10..0x13).map(|at| flash.read(at, SIZE)).collect();
        assert_eq!(text, b"QRY".map(Answer::Register));
        assert_eq!(flash.read(0x2d, SIZE), Answer::Register(63));
        run(&mut flash, &[(0, 0x90)]);
        assert_eq!(flash.read(0, SIZE), Answer::Register(0x89));
    }

    proptest! {
        /// Whatever is written in whatever order: effects stay inside the flash and 0xff twice leads back to memory.
        #[test]
        fn no_order_of_writes_leaves_the_flash(
            writes in prop::collection::vec((0u32..4 * SECTOR, prop::sample::select(vec![
                0x10u8, 0x20, 0x40, 0x50, 0x60, 0x70, 0x90, 0x98, 0xd0, 0xe8, 0xff, 0, 1, 7,
            ])), 0..300),
        ) {
            let size = 3 * SECTOR;
            let mut flash = Commands::default();
            for (offset, value) in writes {
                let offset = offset % size;
                match flash.write(offset, value, size) {
                    Effect::Nothing => {}
                    Effect::Program(at, bytes) => {
                        prop_assert!(!bytes.is_empty() && bytes.len() <= BUFFER);
                        prop_assert!(at as usize + bytes.len() <= size as usize);
                    }
                    Effect::Erase(at) => prop_assert!(at % SECTOR == 0 && at < size),
                }
                flash.read(offset, size);
                prop_assert!(flash.makes_sense(size), "{flash:?}");
            }
            for _ in 0..300 {
                if flash.shows_memory() && flash.expect == Expect::Command {
                    break;
                }
                flash.write(0, 0xff, size);
            }
            prop_assert!(flash.shows_memory());
        }
    }
}
