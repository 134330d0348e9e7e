//! The file under an image, as its metadata and slow paths use it: synchronous, whatever the file's alignment asks for.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::block::Bounce;
use crate::block::align::Alignment;

pub(in crate::block) struct Store {
    file: File,
    /// Bytes in the file, as far as we have made it.
    len: u64,
    /// For direct I/O.
    bounce: Option<Bounce>,
}

impl Store {
    pub(in crate::block) fn new(file: File, len: u64, alignment: &Alignment) -> io::Result<Self> {
        let bounce = if alignment.direct() { Some(Bounce::new(alignment)?) } else { None };
        Ok(Self { file, len, bounce })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Makes the file longer; the new part reads as zeroes.
    pub(super) fn extend(&mut self, len: u64) -> io::Result<()> {
        if len > self.len {
            self.file.set_len(len)?;
            self.len = len;
        }
        Ok(())
    }

    /// What lies beyond the end reads as zeroes.
    pub(super) fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let there = self.len.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (there, beyond) = buffer.split_at_mut(there);
        beyond.fill(0);
        if there.is_empty() {
            return Ok(());
        }
        let Some(bounce) = &mut self.bounce else { return self.file.read_exact_at(there, offset) };
        let mut done = 0;
        bounce.read(&self.file, offset, there.len() as u64, |piece| {
            there[done..done + piece.len()].copy_from_slice(piece);
            done += piece.len();
        })
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        match &mut self.bounce {
            None => self.file.write_all_at(bytes, offset)?,
            Some(bounce) => {
                let mut done = 0;
                bounce.write(&self.file, offset, bytes.len() as u64, |piece| {
                    piece.copy_from_slice(&bytes[done..done + piece.len()]);
                    done += piece.len();
                })?;
            }
        }
        self.len = self.len.max(end);
        Ok(())
    }

    /// Waits until all that was written is on the medium.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
