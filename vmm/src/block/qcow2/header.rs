//! The qcow2 header: owns its parsing and every refusal that can be made from it alone. Pure; the file is hostile.

/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header.
const V2_BYTES: usize = 72;
/// Least bytes of a version 3 header.
const V3_BYTES: u32 = 104;
/// What is read of a file to parse its header and extensions.
pub(super) const HEADER_READ: usize = 64 << 10;
/// Most bytes of an L1 table: as much as QEMU takes.
const MAX_L1_BYTES: u64 = 32 << 20;
/// Most bytes of a refcount table: as much as QEMU takes.
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Larger disks cannot be described with 56-bit offsets.
const MAX_SIZE: u64 = 1 << 56;
/// Extension that is not one of the optional ones: a LUKS header.
const EXT_ENCRYPTION: u32 = 0x0537_be77;

/// Bits of `incompatible_features`.
mod incompatible {
    pub(super) const DIRTY: u64 = 1;
    pub(super) const CORRUPT: u64 = 2;
    pub(super) const EXTERNAL_DATA: u64 = 4;
    pub(super) const COMPRESSION: u64 = 8;
    pub(super) const EXTENDED_L2: u64 = 16;
}

/// Why a qcow2 image cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FormatError {
    /// Another format.
    #[error("is not a qcow2 image; say format=raw if it is a raw one")]
    Magic,
    /// The header ends early.
    #[error("its qcow2 header is cut off")]
    Short,
    /// A version that does not exist yet.
    #[error("qcow2 version {0} is not known; versions 2 and 3 are")]
    Version(u32),
    /// A number in the header that makes no sense.
    #[error("its qcow2 header is damaged: {0}")]
    Header(&'static str),
    /// Something that we do not do.
    #[error("{0} is not supported; convert the image with `qemu-img convert -O qcow2`")]
    Unsupported(&'static str),
    /// Feature bits that nobody knows here.
    #[error("the image uses features that are not known here (incompatible feature bits {0:#x})")]
    Unknown(u64),
    /// The writer before us did not close it.
    #[error("the image was not closed properly; repair it with `qemu-img check -r all`, or use readonly=on")]
    Dirty,
    /// Somebody has found it damaged.
    #[error("the image is marked as damaged; repair it with `qemu-img check -r all`, or use readonly=on")]
    Corrupt,
    /// A backing file is named in the header and not in the configuration.
    #[error(
        "the image has a backing file ({0:?}), which is only opened when the drive says so: add backing=FILE"
    )]
    Backing(String),
}

/// What the header says, checked.
#[derive(Debug, Clone)]
pub(super) struct Header {
    /// 3, or 2: no zero clusters, no feature bits.
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Bytes that the guest sees.
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    /// Entries of the L1 table that are used.
    pub(super) l1_size: usize,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u64,
    /// Logarithm of the bits of one refcount: 0 to 6.
    pub(super) refcount_order: u32,
    /// The name of the backing file, for messages only.
    pub(super) backing: Option<String>,
    /// Bits that a writer who does not know them must clear.
    pub(super) autoclear: u64,
}

fn be32(bytes: &[u8], at: usize) -> Result<u32, FormatError> {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes).ok_or(FormatError::Short)
}

fn be64(bytes: &[u8], at: usize) -> Result<u64, FormatError> {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes).ok_or(FormatError::Short)
}

impl Header {
    /// Parses the first bytes of a file of `file_len` bytes.
    pub(super) fn parse(bytes: &[u8], file_len: u64, write: bool) -> Result<Self, FormatError> {
        let bad = FormatError::Header;
        if be32(bytes, 0)? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = be32(bytes, 4)?;
        if !(2..=3).contains(&version) {
            return Err(FormatError::Version(version));
        }
        if bytes.len() < V2_BYTES {
            return Err(FormatError::Short);
        }
        let cluster_bits = be32(bytes, 20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(bad("cluster size"));
        }
        let cluster = 1u64 << cluster_bits;
        let aligned = |n: u64| n.is_multiple_of(cluster);
        if be32(bytes, 32)? != 0 {
            return Err(FormatError::Unsupported("encryption"));
        }
        let (mut order, mut length, mut autoclear) = (4, V2_BYTES as u32, 0);
        if version == 3 {
            features(be64(bytes, 72)?, bytes, write)?;
            autoclear = be64(bytes, 88)?;
            order = be32(bytes, 96)?;
            length = be32(bytes, 100)?;
            if order > 6 {
                return Err(bad("refcount width"));
            }
            if length < V3_BYTES || !length.is_multiple_of(8) || u64::from(length) > cluster {
                return Err(bad("header length"));
            }
        }
        let size = be64(bytes, 24)?;
        if size > MAX_SIZE {
            return Err(bad("disk size"));
        }
        let (l1_size, l1_offset) = (u64::from(be32(bytes, 36)?), be64(bytes, 40)?);
        let needed = size.div_ceil(cluster * (cluster / 8));
        if l1_size < needed || l1_size * 8 > MAX_L1_BYTES {
            return Err(bad("L1 table size"));
        }
        let inside = |offset: u64, len: u64| {
            aligned(offset) && offset >= cluster && offset.checked_add(len).is_some_and(|end| end <= file_len)
        };
        if needed > 0 && !inside(l1_offset, needed * 8) {
            return Err(bad("L1 table offset"));
        }
        let (table, clusters) = (be64(bytes, 48)?, u64::from(be32(bytes, 56)?));
        if clusters == 0 || clusters * cluster > MAX_REFCOUNT_TABLE_BYTES.max(cluster) {
            return Err(bad("refcount table size"));
        }
        if !aligned(table) || table < cluster || table >= file_len {
            return Err(bad("refcount table offset"));
        }
        let snapshots = be64(bytes, 64)?;
        if be32(bytes, 60)? > 0 && (!aligned(snapshots) || snapshots < cluster || snapshots >= file_len) {
            return Err(bad("snapshot table offset"));
        }
        extensions(bytes, length as usize, cluster)?;
        let backing = backing_name(bytes, cluster)?;
        Ok(Self {
            version,
            cluster_bits,
            size,
            l1_offset,
            l1_size: needed as usize,
            refcount_table_offset: table,
            refcount_table_clusters: clusters,
            refcount_order: order,
            backing,
            autoclear,
        })
    }
}

fn features(bits: u64, bytes: &[u8], write: bool) -> Result<(), FormatError> {
    use incompatible::{COMPRESSION, CORRUPT, DIRTY, EXTENDED_L2, EXTERNAL_DATA};
    let unknown = bits & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2);
    if unknown != 0 {
        return Err(FormatError::Unknown(unknown));
    }
    let has = |bit| bits & bit != 0;
    if has(EXTERNAL_DATA) {
        return Err(FormatError::Unsupported("an external data file"));
    }
    if has(EXTENDED_L2) {
        return Err(FormatError::Unsupported("extended L2 entries"));
    }
    // 0 is deflate, which needs no bit; 1 is zstd.
    if has(COMPRESSION) && bytes.get(104) != Some(&0) {
        return Err(FormatError::Unsupported("compression other than zlib"));
    }
    if write && has(CORRUPT) {
        return Err(FormatError::Corrupt);
    }
    if write && has(DIRTY) {
        return Err(FormatError::Dirty);
    }
    Ok(())
}

/// Walks the header extensions: type be32, length be32, data padded to 8 bytes; type 0 ends them.
fn extensions(bytes: &[u8], mut at: usize, cluster: u64) -> Result<(), FormatError> {
    let end = bytes.len().min(usize::try_from(cluster).unwrap_or(usize::MAX));
    // Each is 8 bytes at least, so this ends.
    while at + 8 <= end {
        let (kind, len) = (be32(bytes, at)?, be32(bytes, at + 4)?);
        match kind {
            0 => return Ok(()),
            EXT_ENCRYPTION => return Err(FormatError::Unsupported("encryption")),
            _ => {}
        }
        at = at
            .checked_add(8)
            .and_then(|a| a.checked_add((len as usize).checked_next_multiple_of(8)?))
            .filter(|a| *a <= end)
            .ok_or(FormatError::Header("an extension ends beyond the first cluster"))?;
    }
    Ok(())
}

fn backing_name(bytes: &[u8], cluster: u64) -> Result<Option<String>, FormatError> {
    let (offset, len) = (be64(bytes, 8)?, u64::from(be32(bytes, 16)?));
    if offset == 0 {
        return Ok(None);
    }
    let end = offset.checked_add(len).filter(|e| len <= 1023 && *e <= cluster);
    let range = end.and_then(|e| Some(usize::try_from(offset).ok()?..usize::try_from(e).ok()?));
    let name = range.and_then(|r| bytes.get(r)).ok_or(FormatError::Header("backing file name"))?;
    Ok(Some(String::from_utf8_lossy(name).into_owned()))
}
