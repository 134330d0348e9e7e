//! A qcow2 image that is empty but for what lies under it: owns the few clusters of a new overlay. Pure; the layout is that of version 3 in
//! QEMU's docs/interop/qcow2.txt. What lies under it is named in the header for people and tools; flotilla-vmm opens only what its command
//! line says.
//!
//! ```text
//! cluster 0        header, header extension (format of the backing file), name of the backing file
//! cluster 1        refcount table, of one entry
//! cluster 2        refcount block: the clusters from 0 on are in use once
//! cluster 3 …      L1 table, all zero: every cluster of the disk comes from below
//! ```

use std::path::Path;

use dbus_api::spec::Format;

use crate::fleet::FleetError;

/// log2 of a cluster: qemu-img's own choice.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// An L2 table is one cluster of 8-byte entries, so this much disk hangs on one entry of the L1 table.
const PER_L1_ENTRY: u64 = CLUSTER / 8 * CLUSTER;
/// One refcount block of 16-bit counts covers this many clusters: far more than a new overlay has.
const PER_BLOCK: u64 = CLUSTER / 2;
const HEADER: u32 = 112;
/// `BACKING_FORMAT` extension.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// QEMU takes names of at most so many bytes.
const NAME_MAX: usize = 1023;
/// 1 EiB: above it the L1 table would not fit under one refcount block.
const SIZE_MAX: u64 = PER_L1_ENTRY * (CLUSTER / 8) * 1024;

/// The bytes of an overlay of `size` bytes over `backing`.
pub(super) fn overlay(size: u64, backing: &Path, format: Format) -> Result<Vec<u8>, FleetError> {
    let wrong = |text: String| FleetError::InvalidSpec(format!("overlay over {}: {text}", backing.display()));
    let name = backing.to_str().filter(|name| !name.is_empty() && name.len() <= NAME_MAX);
    let name = name.ok_or_else(|| wrong(format!("its name has more than {NAME_MAX} bytes")))?;
    if size == 0 || !size.is_multiple_of(512) || size > SIZE_MAX {
        return Err(wrong(format!("{size} bytes are no size of a disk")));
    }
    let entries = size.div_ceil(PER_L1_ENTRY);
    let l1_clusters = (entries * 8).div_ceil(CLUSTER);
    let clusters = 3 + l1_clusters;
    if clusters > PER_BLOCK {
        return Err(wrong(format!("{size} bytes are too many")));
    }
    let format = format.word().as_bytes();
    let name_at = u64::from(HEADER) + 8 + 8 + 8;
    let mut header = Vec::new();
    let mut put = |bytes: &[u8]| header.extend_from_slice(bytes);
    put(b"QFI\xfb");
    put(&3_u32.to_be_bytes());
    put(&name_at.to_be_bytes());
    put(&(name.len() as u32).to_be_bytes());
    put(&CLUSTER_BITS.to_be_bytes());
    put(&size.to_be_bytes());
    put(&0_u32.to_be_bytes()); // no encryption
    put(&(entries as u32).to_be_bytes());
    put(&(3 * CLUSTER).to_be_bytes()); // L1 table
    put(&CLUSTER.to_be_bytes()); // refcount table
    put(&1_u32.to_be_bytes()); // its clusters
    put(&0_u32.to_be_bytes()); // no snapshots
    put(&0_u64.to_be_bytes());
    put(&[0; 24]); // no features of any kind
    put(&4_u32.to_be_bytes()); // counts of 1 << 4 bits
    put(&HEADER.to_be_bytes());
    put(&[0; 8]); // compression: none but zlib, and padding
    put(&BACKING_FORMAT.to_be_bytes());
    put(&(format.len() as u32).to_be_bytes());
    put(format);
    put(&vec![0; format.len().next_multiple_of(8) - format.len()]);
    put(&[0; 8]); // end of extensions
    put(name.as_bytes());
    let mut image = vec![0; (clusters * CLUSTER) as usize];
    image[..header.len()].copy_from_slice(&header);
    let at = CLUSTER as usize;
    image[at..at + 8].copy_from_slice(&(2 * CLUSTER).to_be_bytes());
    for cluster in 0..clusters as usize {
        let at = 2 * CLUSTER as usize + 2 * cluster;
        image[at..at + 2].copy_from_slice(&1_u16.to_be_bytes());
    }
    Ok(image)
}

/// Size in bytes of the disk in a qcow2 image, of which these are the first bytes.
pub(super) fn size_of(head: &[u8]) -> Option<u64> {
    let magic = head.get(..4)? == b"QFI\xfb";
    let size = u64::from_be_bytes(head.get(24..32)?.try_into().ok()?);
    magic.then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    fn qemu_img(arguments: &[&str]) -> String {
        let output = Command::new("qemu-img").args(arguments).output().expect("these tests need qemu-img");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[test]
    fn qemu_img_finds_no_fault_and_reads_what_lies_under_it() {
        let dir = tempfile::tempdir().unwrap();
        for (size, format) in
            [(512, Format::Raw), (3 << 20, Format::Raw), (5 << 30, Format::Qcow2), (2 << 40, Format::Raw)]
        {
            let base = dir.path().join("base");
            let _ = std::fs::remove_file(&base);
            qemu_img(&["create", "-q", "-f", format.word(), base.to_str().unwrap(), &size.to_string()]);
            let over = dir.path().join("over.qcow2");
            std::fs::write(&over, overlay(size, &base, format).unwrap()).unwrap();
            let path = over.to_str().unwrap();
            assert!(qemu_img(&["check", path]).contains("No errors"));
            let info: serde_json::Value =
                serde_json::from_str(&qemu_img(&["info", "--output=json", path])).unwrap();
            assert_eq!((info["virtual-size"].as_u64(), info["format"].as_str()), (Some(size), Some("qcow2")));
            assert_eq!(info["backing-filename"].as_str(), base.to_str());
            assert_eq!(info["backing-filename-format"].as_str(), Some(format.word()));
            assert_eq!(size_of(&std::fs::read(&over).unwrap()), Some(size));
            if size <= 3 << 20 && format == Format::Raw {
                std::fs::write(&base, vec![7; size as usize]).unwrap();
                let flat = dir.path().join("flat");
                qemu_img(&["convert", "-O", "raw", path, flat.to_str().unwrap()]);
                assert!(std::fs::read(&flat).unwrap() == vec![7; size as usize]);
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let base = Path::new("/base");
        for size in [0, 1, 513, u64::MAX, SIZE_MAX + 512] {
            assert!(overlay(size, base, Format::Raw).is_err(), "{size}");
        }
        assert!(overlay(512, Path::new(&format!("/{}", "x".repeat(NAME_MAX))), Format::Raw).is_err());
        assert_eq!((size_of(b""), size_of(&[0; 100])), (None, None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn every_size_has_its_clusters(size in 1_u64..1 << 38) {
            let size = size * 512;
            let image = overlay(size, Path::new("/b"), Format::Raw).unwrap();
            prop_assert_eq!(size_of(&image), Some(size));
            prop_assert!((image.len() as u64 - 3 * CLUSTER) / 8 * PER_L1_ENTRY >= size);
        }
    }
}
