//! The file `state`: a header and sections. Pure; `directory` reads and writes the bytes.
//!
//! ```text
//! header     0 magic "FLOTILLA"   8 format version   12 sections   16 bytes of the file   24 CRC of all that follows the header
//!           28 CRC of the 28 bytes before
//! section    0 name, zero-padded  24 instance   28 version   30 flags   32 bytes   36 CRC of the bytes   40 the bytes, zero-padded to 8
//! ```
//!
//! All numbers are little-endian; CRCs are CRC-32C. Room to grow: a reader skips a section that it does not know unless bit 0 of its flags
//! (*required*) is set, and refuses a version of a section above its own. The format version changes only when this layout does.

use std::collections::BTreeMap;

use super::checksum::Crc32c;

const MAGIC: [u8; 8] = *b"FLOTILLA";
const VERSION: u32 = 1;
pub(super) const HEADER: usize = 32;
#[cfg(fuzzing)]
pub(super) const SECTION_HEADER: usize = 40;
const NAME: usize = 24;
const ALIGNMENT: usize = 8;
const REQUIRED: u16 = 1;

/// Most bytes of the file: 254 vCPUs take some 6 MiB.
pub(super) const FILE_MAX: usize = 32 << 20;
/// Most bytes of one section.
const SECTION_MAX: usize = 1 << 20;
/// Most sections: 254 vCPUs have some 20 each.
const SECTIONS_MAX: u32 = 16 << 10;

/// What is wrong with a file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Format {
    /// Not what it should be at all.
    #[error("this is no snapshot of a VM")]
    NotASnapshot,
    /// Made by a later release.
    #[error("format version {0} is newer than this program: use the release that made it, or a later one")]
    Version(u32),
    /// Not as long as it says.
    #[error("is {got} bytes long and should be {want}: truncated, or not copied whole")]
    Length {
        /// As it should be.
        want: u64,
        /// As it is.
        got: u64,
    },
    /// Too long for any VM.
    #[error("is {0} bytes long: too large")]
    TooLarge(u64),
    /// The bytes are not those that were written.
    #[error("{0}: the checksum does not match: the file is damaged")]
    Checksum(String),
    /// The layout makes no sense.
    #[error("{0}")]
    Malformed(String),
    /// A section that must not be skipped.
    #[error("section {0} is unknown to this program: use the release that made the snapshot, or a later one")]
    Unknown(String),
    /// A section of a later release.
    #[error(
        "section {name}: version {version} is newer than this program: use the release that made the snapshot, or a later one"
    )]
    SectionVersion {
        /// Which.
        name: String,
        /// Its version.
        version: u16,
    },
    /// A section that should be there.
    #[error("section {0} is missing")]
    Missing(String),
}

/// A name with its instance, for people.
fn full_name(name: &str, instance: u32) -> String {
    format!("{name}.{instance}")
}

/// Makes the bytes of `state`.
pub struct StateWriter {
    bytes: Vec<u8>,
    count: u32,
}

impl Default for StateWriter {
    fn default() -> Self {
        Self { bytes: vec![0; HEADER], count: 0 }
    }
}

impl StateWriter {
    /// Adds a section that a reader must know.
    pub fn add(
        &mut self,
        name: &'static str,
        instance: u32,
        version: u16,
        bytes: &[u8],
    ) -> Result<(), Format> {
        self.add_with(name, instance, version, REQUIRED, bytes)
    }

    fn add_with(
        &mut self,
        name: &str,
        instance: u32,
        version: u16,
        flags: u16,
        bytes: &[u8],
    ) -> Result<(), Format> {
        let too_large = || Format::Malformed(format!("section {}: too large", full_name(name, instance)));
        if name.len() > NAME || bytes.len() > SECTION_MAX || self.count == SECTIONS_MAX {
            return Err(too_large());
        }
        let mut padded = [0; NAME];
        padded.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
        let length = u32::try_from(bytes.len()).map_err(|_| too_large())?;
        self.bytes.extend(padded);
        self.bytes.extend(instance.to_le_bytes());
        self.bytes.extend(version.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend(Crc32c::of(bytes).to_le_bytes());
        self.bytes.extend(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        self.count += 1;
        if self.bytes.len() > FILE_MAX { Err(too_large()) } else { Ok(()) }
    }

    /// The file.
    pub fn finish(mut self) -> Vec<u8> {
        let length = self.bytes.len() as u64;
        let body = Crc32c::of(self.bytes.get(HEADER..).unwrap_or_default());
        let mut header = Vec::with_capacity(HEADER);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend(self.count.to_le_bytes());
        header.extend(length.to_le_bytes());
        header.extend(body.to_le_bytes());
        header.extend(Crc32c::of(&header).to_le_bytes());
        self.bytes.splice(..HEADER, header);
        self.bytes
    }
}

/// One section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    version: u16,
    required: bool,
    /// What was saved.
    pub bytes: Vec<u8>,
}

/// The sections of a file, to be taken one by one.
#[derive(Debug, Default)]
pub struct Sections(BTreeMap<(String, u32), Section>);

/// Takes numbers and bytes off the front.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

impl Sections {
    /// Reads a whole file.
    pub fn parse(file: &[u8]) -> Result<Self, Format> {
        let got = file.len() as u64;
        if file.len() > FILE_MAX {
            return Err(Format::TooLarge(got));
        }
        let Some((header, body)) = file.split_at_checked(HEADER) else {
            return Err(if file.starts_with(&MAGIC) {
                Format::Length { want: HEADER as u64, got }
            } else {
                Format::NotASnapshot
            });
        };
        let mut cursor = Cursor(header);
        let short = || Format::Length { want: HEADER as u64, got };
        if cursor.array() != Some(MAGIC) {
            return Err(Format::NotASnapshot);
        }
        let version = cursor.u32().ok_or_else(short)?;
        let (count, length) = (cursor.u32().ok_or_else(short)?, cursor.u64().ok_or_else(short)?);
        let (crc, header_crc) = (cursor.u32().ok_or_else(short)?, cursor.u32().ok_or_else(short)?);
        if Crc32c::of(header.get(..HEADER - 4).unwrap_or_default()) != header_crc {
            return Err(Format::Checksum("header".into()));
        }
        // After the checksum: what is not a number that somebody wrote must not be taken for a version.
        if version != VERSION {
            return Err(Format::Version(version));
        }
        if length != got {
            return Err(Format::Length { want: length, got });
        }
        if count > SECTIONS_MAX {
            return Err(Format::Malformed(format!("{count} sections are too many")));
        }
        let sections = Self::parse_body(body, count)?;
        // The sections first: their own checksums say where the damage is.
        if Crc32c::of(body) != crc {
            return Err(Format::Checksum("sections".into()));
        }
        Ok(sections)
    }

    fn parse_body(body: &[u8], count: u32) -> Result<Self, Format> {
        let mut cursor = Cursor(body);
        let mut sections = Self::default();
        for number in 0..count {
            let cut = || Format::Malformed(format!("section number {number} does not fit into the file"));
            let name = cursor.array::<NAME>().ok_or_else(cut)?;
            let name = name.split(|b| *b == 0).next().unwrap_or_default();
            let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
            let name = match std::str::from_utf8(name) {
                Ok(name) if !name.is_empty() && name.bytes().all(|b| plain(&b)) => name.to_owned(),
                _ => return Err(Format::Malformed(format!("section number {number} has no name"))),
            };
            let instance = cursor.u32().ok_or_else(cut)?;
            let (version, flags) = (cursor.u16().ok_or_else(cut)?, cursor.u16().ok_or_else(cut)?);
            let (length, crc) = (cursor.u32().ok_or_else(cut)?, cursor.u32().ok_or_else(cut)?);
            let full = full_name(&name, instance);
            let length = usize::try_from(length).ok().filter(|l| *l <= SECTION_MAX).ok_or_else(cut)?;
            let bytes = cursor.take(length).ok_or_else(cut)?.to_vec();
            if cursor
                .take(length.next_multiple_of(ALIGNMENT) - length)
                .ok_or_else(cut)?
                .iter()
                .any(|b| *b != 0)
            {
                return Err(Format::Malformed(format!("section {full} is not padded with zeroes")));
            }
            if Crc32c::of(&bytes) != crc {
                return Err(Format::Checksum(format!("section {full}")));
            }
            if flags & !REQUIRED != 0 {
                return Err(Format::Unknown(full));
            }
            let section = Section { version, required: flags & REQUIRED != 0, bytes };
            if sections.0.insert((name, instance), section).is_some() {
                return Err(Format::Malformed(format!("section {full} is there twice")));
            }
        }
        if !cursor.0.is_empty() {
            return Err(Format::Malformed(format!("{} bytes follow the last section", cursor.0.len())));
        }
        Ok(sections)
    }

    /// Takes a section out, of a version up to `newest`; `None` if it is not there.
    pub fn take(&mut self, name: &str, instance: u32, newest: u16) -> Result<Option<Section>, Format> {
        let Some(section) = self.0.remove(&(name.to_owned(), instance)) else { return Ok(None) };
        if section.version > newest {
            return Err(Format::SectionVersion { name: full_name(name, instance), version: section.version });
        }
        Ok(Some(section))
    }

    /// Takes out a section that must be there.
    pub fn need(&mut self, name: &str, instance: u32, newest: u16) -> Result<Section, Format> {
        self.take(name, instance, newest)?.ok_or_else(|| Format::Missing(full_name(name, instance)))
    }

    /// The bytes of all that are left.
    #[cfg(fuzzing)]
    pub(super) fn into_bytes(self) -> Vec<Vec<u8>> {
        self.0.into_values().map(|section| section.bytes).collect()
    }

    /// All that is known has been taken: refuses what is left and must not be skipped.
    pub fn finish(self) -> Result<(), Format> {
        match self.0.iter().find(|(_, section)| section.required) {
            Some(((name, instance), _)) => Err(Format::Unknown(full_name(name, *instance))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file() -> Vec<u8> {
        let mut writer = StateWriter::default();
        writer.add("machine", 0, 1, b"{}").unwrap();
        writer.add("cpu-regs", 3, 2, &[7; 144]).unwrap();
        writer.add_with("hint", 0, 9, 0, &[1, 2, 3]).unwrap();
        writer.finish()
    }

    /// Makes the checksums of the header right again.
    fn seal(mut file: Vec<u8>) -> Vec<u8> {
        let crc = Crc32c::of(&file[HEADER..]).to_le_bytes();
        file[24..28].copy_from_slice(&crc);
        let crc = Crc32c::of(&file[..28]).to_le_bytes();
        file[28..32].copy_from_slice(&crc);
        file
    }

    #[test]
    fn what_is_written_is_read_and_what_is_optional_may_stay() {
        let mut sections = Sections::parse(&file()).unwrap();
        assert_eq!(sections.need("cpu-regs", 3, 2).unwrap().bytes, [7; 144]);
        assert_eq!(sections.need("machine", 0, 5).unwrap().bytes, b"{}");
        assert_eq!(sections.take("machine", 0, 5), Ok(None));
        assert_eq!(sections.need("cpu-regs", 0, 2), Err(Format::Missing("cpu-regs.0".into())));
        assert_eq!(sections.finish(), Ok(()));
        let mut sections = Sections::parse(&file()).unwrap();
        assert_eq!(
            sections.take("cpu-regs", 3, 1),
            Err(Format::SectionVersion { name: "cpu-regs.3".into(), version: 2 })
        );
        assert_eq!(sections.finish(), Err(Format::Unknown("machine.0".into())));
        assert_eq!(Sections::parse(&StateWriter::default().finish()).unwrap().finish(), Ok(()));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_seen() {
        let good = file();
        for length in 0..good.len() {
            assert!(Sections::parse(&good[..length]).is_err(), "{length}");
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Sections::parse(&bad).is_err(), "bit {bit}");
        }
        let mut longer = good.clone();
        longer.push(0);
        assert_eq!(
            Sections::parse(&longer).unwrap_err(),
            Format::Length { want: good.len() as u64, got: good.len() as u64 + 1 }
        );
    }

    #[test]
    fn says_what_is_wrong_though_the_checksums_are_right() {
        let length_of_first = HEADER + 32;
        type Change = fn(&mut Vec<u8>);
        let cases: [(Change, &str); 8] = [
            (|f| f[0] = b'X', "this is no snapshot"),
            (|f| f[8] = 2, "format version 2 is newer"),
            (|f| f[12..16].fill(0xff), "4294967295 sections are too many"),
            (|f| f[12] = 4, "section number 3 does not fit"),
            (|f| f[12] = 2, "48 bytes follow the last section"),
            (|f| f[HEADER] = 0, "section number 0 has no name"),
            (|f| f[HEADER + 30] = 2, "section machine.0 is unknown"),
            (|f| f[HEADER + 42] = 1, "section machine.0 is not padded"),
        ];
        for (change, text) in cases {
            let mut bad = file();
            change(&mut bad);
            let error = Sections::parse(&seal(bad)).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
        let mut huge = file();
        huge[length_of_first..length_of_first + 4].fill(0xff);
        assert!(matches!(Sections::parse(&seal(huge)), Err(Format::Malformed(_))));
        assert_eq!(
            Sections::parse(&vec![0; FILE_MAX + 1]).unwrap_err(),
            Format::TooLarge(FILE_MAX as u64 + 1)
        );
        let mut writer = StateWriter::default();
        writer.add("a", 1, 1, &[]).unwrap();
        writer.add("a", 1, 1, &[]).unwrap();
        assert_eq!(
            Sections::parse(&writer.finish()).unwrap_err(),
            Format::Malformed("section a.1 is there twice".into())
        );
        assert!(StateWriter::default().add("a", 0, 1, &vec![0; SECTION_MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_hurt(bytes in prop::collection::vec(any::<u8>(), 0..300), count in 0u8..8) {
            let mut file = file();
            file.truncate(HEADER);
            file.extend(bytes);
            let length = file.len() as u64;
            file[12] = count;
            file[16..24].copy_from_slice(&length.to_le_bytes());
            let _ = Sections::parse(&seal(file));
        }
    }
}
