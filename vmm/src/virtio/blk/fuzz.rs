//! For the fuzz targets only: a request's way from its chain to a range of the disk.

use super::request::{Kind, Request, Rules};
use crate::virtio::queue::Chain;

/// Parses a request to a disk of `size` bytes. What it would touch: offset and length, both in bytes; `None` when it is refused or
/// touches nothing.
pub fn parse(chain: Chain, size: u64, read_only: bool) -> Option<(u64, u64)> {
    let mut request = Request { chain, ..Request::default() };
    let kind = request.parse(Rules { size, read_only, unmap: true, zero: true }).ok()?;
    let len = match kind {
        Kind::Read | Kind::Write => request.buffers(kind).len(),
        Kind::Discard { len } | Kind::WriteZeroes { len, .. } => len,
        Kind::Flush | Kind::GetId => return None,
    };
    assert!(!read_only || kind == Kind::Read, "{kind:?} on a read-only disk");
    if let Some(status) = &request.status {
        status.write(0);
    }
    Some((request.offset, len))
}
