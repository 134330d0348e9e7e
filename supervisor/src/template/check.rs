//! Checksums of a template's files: owns what they are made of, and the job that compares them. What is zero does not count, so a file has the
//! same checksum with its holes and without.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use super::{Templates, blocking, copy};
use crate::fleet::FleetError;

/// Files are looked at in blocks of this size.
const BLOCK: u64 = 64 << 10;
/// CRC-64/XZ (ECMA-182, reflected).
const POLYNOMIAL: u64 = 0xc96c_5795_d787_0f42;

/// Eight bytes at a time: table `n` is a byte's part when `n` bytes follow it.
static TABLES: [[u64; 256]; 8] = tables();

const fn tables() -> [[u64; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let crc = tables[table - 1][byte];
            tables[table][byte] = crc >> 8 ^ tables[0][(crc & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// The CRC of what came before, and `bytes`.
fn crc64(before: u64, bytes: &[u8]) -> u64 {
    let mut crc = !before;
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        let word = (crc ^ u64::from_le_bytes(*word)).to_le_bytes();
        crc = (0..8).fold(0, |sum, at| sum ^ TABLES[7 - at][usize::from(word[at])]);
    }
    for byte in rest {
        crc = crc >> 8 ^ TABLES[0][usize::from(crc as u8 ^ byte)];
    }
    !crc
}

/// The checksum of a file. `told` hears how many bytes are behind it, and may end it.
pub(super) fn checksum(file: &File, mut told: impl FnMut(u64) -> io::Result<()>) -> io::Result<String> {
    let length = copy::length(file)?;
    let mut crc = crc64(0, &length.to_le_bytes());
    let mut block = vec![0; BLOCK as usize];
    let mut next = 0;
    while let Some((start, end)) = copy::extent(file, next, length)? {
        // Whole blocks, wherever the file system lets a hole end.
        let mut at = start - start % BLOCK;
        while at < end {
            let bytes = &mut block[..BLOCK.min(length - at) as usize];
            file.read_exact_at(bytes, at)?;
            if bytes.iter().any(|byte| *byte != 0) {
                crc = crc64(crc64(crc, &at.to_le_bytes()), bytes);
            }
            at += BLOCK;
            told(at.min(length))?;
        }
        next = at;
    }
    told(length)?;
    Ok(format!("{crc:016x}"))
}

impl Templates {
    /// Compares all files with their checksums, as a job of the VM that the template was made of.
    pub fn verify(self: &Arc<Self>, name: &str) -> Result<u32, FleetError> {
        let reader = self.read(name)?;
        let job = self.fleet.open_job("verify-template", &reader.record.vm);
        let templates = Arc::clone(self);
        tokio::spawn(async move {
            let all = reader.record.size();
            let mut before = 0;
            let mut result = Ok(());
            for part in &reader.record.parts {
                let (path, fleet) = (reader.place().join(&part.name), Arc::clone(&templates.fleet));
                let found = blocking(move || {
                    checksum(&File::open(&path)?, |done| {
                        fleet.note_job(job, "verifying", (before + done, all)).map_err(io::Error::other)
                    })
                });
                result = compare(&reader.place().join(&part.name), &part.checksum, found.await);
                if result.is_err() {
                    break;
                }
                before += part.size;
            }
            drop(reader);
            templates.fleet.close_job(job, result);
        });
        Ok(job)
    }
}

fn compare(path: &Path, wanted: &str, found: io::Result<String>) -> Result<(), FleetError> {
    let wrong = |why: String| Err(FleetError::StoreFailed(format!("{}: {why}", path.display())));
    match found {
        Ok(found) if found == wanted => Ok(()),
        Ok(_) => wrong("is not what was written: its checksum differs; make the template anew".to_owned()),
        Err(error) => wrong(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crc_is_that_of_the_standard() {
        assert_eq!(crc64(0, b"123456789"), 0x995d_c9bb_df19_39fa);
        assert_eq!(
            crc64(crc64(0, b"1234567890"), b"1234567890123456"),
            crc64(0, b"12345678901234567890123456")
        );
    }

    #[test]
    fn holes_do_not_count_and_every_byte_does() {
        let file = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(10 << 20).unwrap();
            file.write_all_at(b"data", 5 << 20).unwrap();
            file
        };
        let sum = |file: &File| checksum(file, |_| Ok(())).unwrap();
        let (sparse, full) = (file(), file());
        full.write_all_at(&vec![0; 1 << 20], 1 << 20).unwrap();
        full.write_all_at(&[0; 5], 7 << 20).unwrap();
        assert_eq!(sum(&sparse), sum(&full));
        let wanted = sum(&sparse);
        for (at, byte) in [(5 << 20, b'D'), ((5 << 20) + 1, 0), (0, 1), ((10 << 20) - 1, 1)] {
            let other = file();
            other.write_all_at(&[byte], at).unwrap();
            assert_ne!(sum(&other), wanted, "{at}");
        }
        let moved = tempfile::tempfile().unwrap();
        moved.set_len(10 << 20).unwrap();
        moved.write_all_at(b"data", 6 << 20).unwrap();
        assert_ne!(sum(&moved), wanted);
        sparse.set_len((10 << 20) + 1).unwrap();
        assert_ne!(sum(&sparse), wanted);
    }
}
