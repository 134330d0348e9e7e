//! Flash memory that firmware lies in: the guest reads it as memory, and writes commands to it (`commands` says which).
//!
//! While reads give what is in memory, the guest's accesses do not come here: the machine keeps a read-only memory slot there, and only writes
//! leave the guest. A command whose answer is not memory takes the slot away until the next one brings it back.
//!
//! What is programmed goes to the image first, and is true only then.

mod commands;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bus::BusDevice;
pub use commands::Commands as SavedFlash;
use commands::{Answer, Effect};

/// The memory of a flash, as the guest reads it.
pub trait FlashMemory: Send + Sync {
    /// Reads at `offset`; the range lies inside.
    fn read(&self, offset: usize, data: &mut [u8]);
    /// Writes at `offset`; the range lies inside.
    fn write(&self, offset: usize, data: &[u8]);
    /// The guest reads it by itself, or asks for each byte.
    fn show(&self, shown: bool) -> io::Result<()>;
}

struct State {
    commands: SavedFlash,
    shown: bool,
    /// The host's error has been logged; a guest can cause it without end.
    complained: bool,
}

/// One flash device.
pub struct Flash {
    /// Bytes: whole sectors.
    size: u32,
    memory: Box<dyn FlashMemory>,
    /// None: what is written is dropped.
    image: Option<File>,
    state: Mutex<State>,
}

impl Flash {
    /// Bytes that are erased at once.
    pub const SECTOR: u64 = commands::SECTOR as u64;

    /// `size` bytes of `memory`, which is shown and holds what is in `image`; read-only without an image. A size that is not of whole
    /// sectors, or not below 4 GiB, is cut off.
    pub fn new(size: u64, memory: Box<dyn FlashMemory>, image: Option<File>) -> Self {
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let size = size - size % commands::SECTOR;
        let state = Mutex::new(State { commands: SavedFlash::default(), shown: true, complained: false });
        Self { size, memory, image, state }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As at power-on; what has been written stays.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.commands = SavedFlash::default();
        self.show(&mut state);
    }

    /// The state, without what is in memory: that is in the image.
    pub fn saved(&self) -> SavedFlash {
        self.lock().commands.clone()
    }

    /// Goes on from it. `None`: no flash of this size has been so.
    pub fn restore(&self, saved: &SavedFlash) -> Option<()> {
        let mut state = self.lock();
        if !saved.makes_sense(self.size) || self.image.is_none() && *saved != SavedFlash::default() {
            return None;
        }
        state.commands = saved.clone();
        self.show(&mut state);
        Some(())
    }

    fn show(&self, state: &mut State) {
        let shown = state.commands.shows_memory();
        if shown == state.shown {
            return;
        }
        match self.memory.show(shown) {
            Ok(()) => state.shown = shown,
            // Taken away: the guest sees memory where it wants the status. Not brought back: each read comes here, and is answered.
            Err(error) => tracing::error!("flash memory cannot be mapped: {error}"),
        }
    }

    fn byte(&self, state: &State, offset: u32) -> u8 {
        match state.commands.read(offset, self.size) {
            Answer::Register(value) => value,
            Answer::Memory => {
                let mut byte = [0];
                self.memory.read(offset as usize, &mut byte);
                byte[0]
            }
        }
    }

    /// Carries out what a command asks for.
    fn apply(&self, image: &File, effect: &Effect) -> io::Result<()> {
        match effect {
            Effect::Nothing => {}
            Effect::Program(at, bytes) => {
                image.write_all_at(bytes, u64::from(*at))?;
                self.memory.write(*at as usize, bytes);
            }
            Effect::Erase(at) => {
                let erased = [0xff; commands::SECTOR as usize];
                image.write_all_at(&erased, u64::from(*at))?;
                self.memory.write(*at as usize, &erased);
            }
        }
        Ok(())
    }
}

impl BusDevice for Flash {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let inside = u32::try_from(at).ok().filter(|at| *at < self.size);
            *byte = inside.map_or(0xff, |at| self.byte(&state, at));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(image) = &self.image else { return };
        let mut state = self.lock();
        // The chip is one byte wide: a wider access is that many.
        for (at, value) in (offset..).zip(data) {
            let Some(at) = u32::try_from(at).ok().filter(|at| *at < self.size) else { return };
            let effect = state.commands.write(at, *value, self.size);
            if let Err(error) = self.apply(image, &effect) {
                state.commands.fail(&effect);
                if !std::mem::replace(&mut state.complained, true) {
                    tracing::error!("what firmware wants to keep cannot be written: {error}");
                }
            }
        }
        self.show(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Default)]
    struct Ram(Mutex<(Vec<u8>, bool)>);

    impl FlashMemory for Arc<Ram> {
        fn read(&self, offset: usize, data: &mut [u8]) {
            data.copy_from_slice(&self.0.lock().unwrap().0[offset..offset + data.len()]);
        }
        fn write(&self, offset: usize, data: &[u8]) {
            self.0.lock().unwrap().0[offset..offset + data.len()].copy_from_slice(data);
        }
        fn show(&self, shown: bool) -> io::Result<()> {
            self.0.lock().unwrap().1 = shown;
            Ok(())
        }
    }

    fn rig(writable: bool) -> (Flash, Arc<Ram>, File) {
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&[0xff; 3 * 4096], 0).unwrap();
        let ram = Arc::new(Ram(Mutex::new((vec![0xff; 3 * 4096], true))));
        let file = writable.then(|| image.try_clone().unwrap());
        (Flash::new(3 * 4096, Box::new(Arc::clone(&ram)), file), ram, image)
    }

    fn shown(ram: &Ram) -> bool {
        ram.0.lock().unwrap().1
    }

    #[test]
    fn what_is_programmed_is_in_memory_and_in_the_image() {
        let (flash, ram, image) = rig(true);
        for (at, byte) in (0x1010u64..).zip(*b"variable") {
            flash.write(at, &[0x10]);
            assert!(!shown(&ram));
            flash.write(at, &[byte]);
        }
        flash.write(0x1010, &[0xff]);
        assert!(shown(&ram));
        let (mut read, mut kept) = ([0; 8], [0; 8]);
        flash.read(0x1010, &mut read);
        image.read_exact_at(&mut kept, 0x1010).unwrap();
        assert_eq!((&read, &kept), (b"variable", b"variable"));
        for value in [0x20, 0xd0, 0xff] {
            flash.write(0x1fff, &[value]);
        }
        flash.read(0x1010, &mut read);
        image.read_exact_at(&mut kept, 0x1010).unwrap();
        assert_eq!((read, kept), ([0xff; 8], [0xff; 8]));
    }

    #[test]
    fn an_image_that_cannot_be_written_is_an_error_of_the_chip() {
        let (mut flash, ram, _) = rig(true);
        flash.image = Some(File::open("/dev/null").unwrap());
        for value in [0x10, 0] {
            flash.write(0, &[value]);
        }
        let mut status = [0];
        flash.read(0, &mut status);
        assert_eq!(status, [0x90]);
        assert_eq!(ram.0.lock().unwrap().0[0], 0xff);
        flash.reset();
        assert!(shown(&ram));
    }

    #[test]
    fn what_is_read_only_cannot_be_written_nor_asked() {
        let (flash, ram, _) = rig(false);
        for value in [0x70, 0x10, 0, 0x20, 0xd0] {
            flash.write(0, &[value]);
            assert!(shown(&ram));
        }
        let mut outside = [0; 8];
        flash.read(3 * 4096 - 4, &mut outside);
        assert_eq!(outside, [0xff; 8]);
    }

    #[test]
    fn goes_on_in_the_middle_of_a_command() {
        let (first, _, _) = rig(true);
        first.write(7, &[0x40]);
        let (second, ram, _) = rig(true);
        second.restore(&first.saved()).unwrap();
        assert!(!shown(&ram));
        second.write(7, &[0x5a, 0xff]);
        assert!(shown(&ram) && ram.0.lock().unwrap().0[7] == 0x5a);
        let (third, _, _) = rig(false);
        assert!(third.restore(&first.saved()).is_none());
    }
}
