//! Copies of images: owns how one comes to share its blocks with the other where the file system can (`FICLONE`, ioctl_ficlonerange(2)), and to
//! have the same holes where it cannot. Blocks: for threads that may.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Bytes that are copied between two looks at what has been done.
const PIECE: u64 = 8 << 20;
/// A block of zeroes of this size is a hole.
const GRAIN: usize = 64 << 10;

/// Bytes of an image, also when it is a block device.
pub(super) fn length(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// Tries to make `to` share the blocks of `from`. Says whether the file system can do that.
pub(super) fn reflink(from: &File, to: &File) -> io::Result<bool> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        // Not this file system, not between these two, not from a device.
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS | Errno::PERM) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// Makes `to`, which is empty, a copy of `from` that shares nothing with it or everything, and syncs it. `told` hears how many bytes of
/// the image are behind it.
pub(super) fn copy(from: &File, to: &File, mut told: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
    let length = length(from)?;
    if !reflink(from, to)? {
        to.set_len(length)?;
        let mut at = 0;
        while let Some((start, end)) = extent(from, at, length)? {
            let mut next = start;
            while next < end {
                let piece = PIECE.min(end - next);
                move_piece(from, to, next, piece)?;
                next += piece;
                told(next)?;
            }
            at = end;
        }
    }
    told(length)?;
    to.sync_all()
}

/// The next part of `file` from `at` on that is no hole.
pub(super) fn extent(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= length {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A block device, or a file system that knows no holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, length))),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok((start < length).then_some((start, end.min(length))))
}

/// What is all zero stays a hole: an image that was written as a whole is mostly that.
fn move_piece(from: &File, to: &File, at: u64, length: u64) -> io::Result<()> {
    let mut buffer = vec![0; length as usize];
    from.read_exact_at(&mut buffer, at)?;
    let mut place = at;
    for block in buffer.chunks(GRAIN) {
        if block.iter().any(|byte| *byte != 0) {
            to.write_all_at(block, place)?;
        }
        place += block.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn a_copy_has_the_same_holes() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(64 << 20).unwrap();
        from.write_all_at(b"one", 3).unwrap();
        from.write_all_at(&[7; 100_000], 40 << 20).unwrap();
        from.write_all_at(&vec![0; 4 << 20], 50 << 20).unwrap();
        let mut last = 0;
        copy(&from, &to, |done| {
            assert!(done >= last);
            last = done;
            Ok(())
        })
        .unwrap();
        assert_eq!((last, length(&to).unwrap()), (64 << 20, 64 << 20));
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20);
        let mut back = vec![0; 100_000];
        to.read_exact_at(&mut back, 40 << 20).unwrap();
        assert!(back.iter().all(|byte| *byte == 7));
        let empty = tempfile::tempfile().unwrap();
        copy(&tempfile::tempfile().unwrap(), &empty, |_| Ok(())).unwrap();
        assert_eq!(length(&empty).unwrap(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn every_byte_is_there(writes in prop::collection::vec((0_u64..1 << 20, 1_usize..70_000, any::<u8>()), 0..6), length in 0_u64..1 << 20) {
            let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            for (at, count, byte) in writes {
                from.write_all_at(&vec![byte; count], at).unwrap();
            }
            from.set_len(length).unwrap();
            copy(&from, &to, |_| Ok(())).unwrap();
            let all = |file: &File| {
                let mut bytes = vec![0; super::length(file).unwrap() as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                bytes
            };
            prop_assert!(all(&from) == all(&to));
        }
    }
}
