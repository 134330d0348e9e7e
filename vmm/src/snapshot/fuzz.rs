//! For the fuzz target: a file `state` of any bytes, with and without checksums that are right.

use super::checksum::Crc32c;
use super::sections::{HEADER, SECTION_HEADER, Sections};

/// Reads `data` as a file, then as what follows the header of one; returns the bytes of its sections if that is one.
pub fn state(data: &[u8]) -> Vec<Vec<u8>> {
    let raw = Sections::parse(data);
    let Some((count, body)) = data.split_first() else { return Vec::new() };
    let mut body = body.to_vec();
    let mut at = 0;
    while let Some(header) = body.get(at..at + SECTION_HEADER) {
        let length = u32::from_le_bytes([header[32], header[33], header[34], header[35]]) as usize;
        let from = at + SECTION_HEADER;
        let Some(bytes) = from.checked_add(length).and_then(|to| body.get(from..to)) else { break };
        let crc = Crc32c::of(bytes).to_le_bytes();
        body[at + 36..from].copy_from_slice(&crc);
        at = (from + length).next_multiple_of(8);
    }
    let mut file = b"FLOTILLA".to_vec();
    file.extend(1u32.to_le_bytes());
    file.extend(u32::from(*count).to_le_bytes());
    file.extend(((HEADER + body.len()) as u64).to_le_bytes());
    file.extend(Crc32c::of(&body).to_le_bytes());
    file.extend(Crc32c::of(&file).to_le_bytes());
    file.extend(body);
    let sections = Sections::parse(&file).or(raw).unwrap_or_default();
    sections.into_bytes()
}
