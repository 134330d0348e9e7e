//! Where a file has data, and what of its holes guest memory must not be mapped from.
//!
//! A page of a hole that is only read takes room all the same: on tmpfs it is allocated there and then, and on a full one the reader is ended with
//! SIGBUS; elsewhere it is a page of zeroes in the page cache. Anonymous memory has neither trouble, and its pages cost the guest half as much to
//! touch. But each hole that is mapped apart costs the start a microsecond or two, and a process may have some 65,000 mappings.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;

/// `f_type` of a tmpfs (linux/magic.h).
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// Holes of other file systems that are smaller than this stay as they are.
const WORTHWHILE: u64 = 1 << 20;
/// Most stretches of data that are looked for, a tmpfs apart.
const STRETCHES_MAX: usize = 4096;
/// The same on a tmpfs. What lies behind them stays as it is.
const STRETCHES_MAX_TMPFS: usize = 16 << 10;
/// Mappings begin and end here.
const PAGE: u64 = 4096;

/// Where `file` has data inside `range`, as offsets from its start.
pub fn data_in(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    data_up_to(file, range, usize::MAX).map(|(found, _)| found)
}

/// The same, of at most so many stretches; and where the search ended.
fn data_up_to(file: &File, range: Range<u64>, most: usize) -> io::Result<(Vec<Range<u64>>, u64)> {
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        if found.len() == most {
            return Ok((found, at));
        }
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No more data.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        if start >= range.end {
            break;
        }
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(range.end);
        // A file that somebody cuts meanwhile must not keep us.
        if end <= start {
            break;
        }
        found.push(start - range.start..end - range.start);
        at = end;
    }
    Ok((found, range.end))
}

/// Holes of a file that anonymous memory is to take the place of, ascending.
pub(super) struct Holes(Vec<Range<u64>>);

impl Holes {
    /// In the first `size` bytes of `file`, whole pages.
    pub(super) fn of(file: &File, size: u64) -> io::Result<Self> {
        let tmpfs = rustix::fs::fstatfs(file)?.f_type as u64 == TMPFS_MAGIC;
        let (least, most) = if tmpfs { (PAGE, STRETCHES_MAX_TMPFS) } else { (WORTHWHILE, STRETCHES_MAX) };
        let (data, end) = data_up_to(file, 0..size, most)?;
        Ok(Self(between(&data, end, least)))
    }

    /// Those parts of them that lie within `range`, as offsets from its start.
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let parts = self.0.iter().map(move |hole| hole.start.max(range.start)..hole.end.min(range.end));
        parts
            .filter(|part| part.start < part.end)
            .map(move |part| part.start - range.start..part.end - range.start)
    }
}

/// The whole pages between stretches of data and up to `end`, where they are at least `least` bytes together.
fn between(data: &[Range<u64>], end: u64, least: u64) -> Vec<Range<u64>> {
    let starts = std::iter::once(0).chain(data.iter().map(|d| d.end.next_multiple_of(PAGE)));
    let ends = data.iter().map(|d| d.start).chain([end]).map(|at| at - at % PAGE);
    let holes = starts.zip(ends).map(|(start, end)| start..end);
    holes.filter(|hole| hole.start < hole.end && hole.end - hole.start >= least).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn holes_are_what_lies_between() {
        let page = |n: u64| n * PAGE;
        let data = [page(1)..page(2) + 1, page(4)..page(5), page(9)..page(12)];
        assert_eq!(
            between(&data, page(16), PAGE),
            [0..page(1), page(3)..page(4), page(5)..page(9), page(12)..page(16)]
        );
        assert_eq!(between(&data, page(16), page(4)), [page(5)..page(9), page(12)..page(16)]);
        // Less than a page between two is no hole, and nothing follows data at the very end.
        assert_eq!(between(&[0..page(1) + 1, page(1) + 9..page(2)], page(2), 1), []);
        assert_eq!(between(&[], page(3), PAGE), vec![0..page(3); 1]);
        let holes = Holes(vec![0..page(1), page(3)..page(8)]);
        assert_eq!(holes.within(page(4)..page(6)).collect::<Vec<_>>(), vec![0..page(2); 1]);
        assert_eq!(holes.within(0..page(4)).collect::<Vec<_>>(), [0..page(1), page(3)..page(4)]);
    }

    #[test]
    fn the_search_ends_after_so_many() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        for at in [0u64, 16, 32] {
            file.write_all_at(&[1; 4096], at << 20).unwrap();
        }
        let (found, end) = data_up_to(&file, 0..64 << 20, 2).unwrap();
        assert_eq!((found.len(), end), (2, found[1].end));
        assert_eq!(data_in(&file, 0..64 << 20).unwrap().len(), 3);
        let holes = Holes::of(&file, 64 << 20).unwrap();
        let bytes: u64 = holes.0.iter().map(|hole| hole.end - hole.start).sum();
        assert!(bytes >= 60 << 20, "{bytes}");
    }
}
