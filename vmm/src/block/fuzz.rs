//! For the fuzz targets, and a test that keeps this in order: a qcow2 image of any bytes, and requests to it.

use std::fs::File;

use super::align::Alignment;
use super::qcow2::{Layer, Stack, Store};

/// Bytes of one request: what to do, four of its sector, one of its length in sectors.
const REQUEST: usize = 6;

/// Opens `image`, to write or only to read, and carries `requests` out. Says how many of them succeeded; `None`: the image was refused.
pub fn qcow2(image: &[u8], write: bool, requests: &[u8]) -> Option<usize> {
    let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).ok().map(File::from)?;
    std::os::unix::fs::FileExt::write_all_at(&file, image, 0).ok()?;
    let alignment = Alignment::of(&file, false, &file.metadata().ok()?);
    let store = Store::new(file, image.len() as u64, &alignment).ok()?;
    // The smallest caches: tables come and go.
    let mut stack = Stack::new(vec![Layer::qcow2(store, write, (Some(0), Some(0))).ok()?]).ok()?;
    let (size, _) = stack.geometry();
    let mut good = 0;
    for request in requests.chunks_exact(REQUEST) {
        let sectors = size / super::SECTOR;
        let at =
            request[1..5].iter().fold(0, |n, b| n << 8 | u64::from(*b)).checked_rem(sectors).unwrap_or(0);
        let offset = at * super::SECTOR;
        let len = (u64::from(request[5]) * super::SECTOR).min(size - offset);
        let result = match request[0] % 6 {
            0 => stack.read(offset, &mut vec![0; len as usize]),
            1 | 2 if write => stack.write(offset, len, |bytes| bytes.fill(request[0])),
            3 if write => stack.zero(offset, len, request[0] > 127),
            4 if write => stack.discard(offset, len),
            _ if write => stack.flush(true),
            _ => Ok(()),
        };
        good += usize::from(result.is_ok());
    }
    Some(good)
}
