//! What a VM that was made here tells its guest: owns the image of a small read-only disk with the VM's identity, in the form that cloud-init calls NoCloud.
//! Pure.
//!
//! The image is a FAT file system with the label CIDATA and the files `meta-data`, `user-data` and `network-config`. What is in `meta-data`
//! stands as well, padded with zeroes, in its reserved sectors from the second on, so that a guest without that file system reads it too:
//! `dd if=/dev/disk/by-id/virtio-flotilla-identity skip=1 count=7 | tr -d '\0'`.
//!
//! ```text
//! sector 0   boot sector        sectors 1..8   meta-data, padded        8..10   two FATs        10..14   root directory        14..   files
//! ```
//!
//! When a VM goes on as a clone this disk comes into a slot that was empty, or has another size than the one before: the guest's kernel takes
//! note, and udev runs rules for it (`ACTION=="change"`, `ENV{RESIZE}=="1"`).

use std::fmt::Write as _;

use serde::Serialize;

use crate::fleet::FleetError;

/// Serial number by which a guest finds the disk.
pub(super) const SERIAL: &str = "flotilla-identity";
/// Bytes that a caller may give for `user-data` or `network-config`.
pub(super) const TEXT_MAX: usize = 64 << 10;

const SECTOR: usize = 512;
const RESERVED: usize = 8;
const ROOT_ENTRIES: usize = 64;
const ROOT_AT: usize = RESERVED + 2;
const DATA_AT: usize = ROOT_AT + ROOT_ENTRIES * 32 / SECTOR;
/// Sectors of a cluster: so few clusters that one sector holds a FAT12 of them.
const PER_CLUSTER: usize = 2;
/// Entries of 12 bits in one sector, less the two that stand for no cluster.
const CLUSTERS: usize = SECTOR * 2 / 3 - 2;

/// Who the VM is.
#[derive(Debug, Serialize)]
pub(super) struct Identity<'a> {
    /// For cloud-init: another one is another instance.
    #[serde(rename = "instance-id")]
    pub(super) instance: String,
    #[serde(rename = "local-hostname")]
    pub(super) hostname: &'a str,
    pub(super) uuid: String,
    /// The template that it comes from, if it is a clone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) template: Option<&'a str>,
    /// A clone's number within the call that made it, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) number: Option<u32>,
    /// Who may log in over ssh, as lines of `authorized_keys`.
    #[serde(rename = "public-keys", skip_serializing_if = "<[String]>::is_empty")]
    pub(super) keys: &'a [String],
    /// Hardware addresses of its cards, in order.
    pub(super) macs: &'a [String],
}

/// The image. With `other` it has another size than the seed of that size.
pub(super) fn image(
    identity: &Identity<'_>,
    user_data: &str,
    network_config: Option<&str>,
    other: Option<u64>,
) -> Result<Vec<u8>, FleetError> {
    for (what, text) in [("user_data", user_data), ("network_config", network_config.unwrap_or_default())] {
        if text.len() > TEXT_MAX {
            return Err(FleetError::InvalidSpec(format!("{what}: longer than {TEXT_MAX} bytes")));
        }
    }
    // JSON is YAML.
    let mut meta = serde_json::to_string_pretty(identity).unwrap_or_default();
    meta.push('\n');
    if meta.len() > (RESERVED - 1) * SECTOR {
        return Err(FleetError::InvalidSpec(format!(
            "identity: with names, addresses and keys it has {} bytes, at most {}: put keys into user_data",
            meta.len(),
            (RESERVED - 1) * SECTOR
        )));
    }
    let network = network_config.map_or_else(|| network_config_for(identity.macs), str::to_owned);
    let files = [
        ("meta-data", "META-D~1", &meta),
        ("user-data", "USER-D~1", &user_data.to_owned()),
        ("network-config", "NETWOR~1", &network),
    ];

    let cluster = PER_CLUSTER * SECTOR;
    let used: usize = files.iter().map(|(_, _, text)| text.len().div_ceil(cluster)).sum();
    let mut clusters = used.next_multiple_of(16).max(48);
    let size = |clusters: usize| (DATA_AT + clusters * PER_CLUSTER) * SECTOR;
    if other == Some(size(clusters) as u64) {
        clusters += 16;
    }
    if clusters > CLUSTERS {
        return Err(FleetError::InvalidSpec("user_data and network_config: together too long".to_owned()));
    }
    let mut image = vec![0; size(clusters)];
    image[..SECTOR].copy_from_slice(&boot_sector(DATA_AT + clusters * PER_CLUSTER));
    image[SECTOR..SECTOR + meta.len()].copy_from_slice(meta.as_bytes());

    let mut fat = vec![0_u16; clusters + 2];
    (fat[0], fat[1]) = (0xff8, 0xfff);
    let mut directory = label();
    let mut next = 2;
    for (long, short, text) in files {
        let first = if text.is_empty() { 0 } else { next };
        for at in 0..text.len().div_ceil(cluster) {
            let last = (at + 1) * cluster >= text.len();
            fat[next] = if last { 0xfff } else { next as u16 + 1 };
            next += 1;
        }
        if first != 0 {
            let at = (DATA_AT + (first - 2) * PER_CLUSTER) * SECTOR;
            image[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        directory.extend(entries(long, short, first as u16, text.len() as u32));
    }
    let packed = pack(&fat);
    for copy in 0..2 {
        let at = (RESERVED + copy) * SECTOR;
        image[at..at + packed.len()].copy_from_slice(&packed);
    }
    let at = ROOT_AT * SECTOR;
    image[at..at + directory.len()].copy_from_slice(&directory);
    Ok(image)
}

/// Every card asks for its address.
fn network_config_for(macs: &[String]) -> String {
    let mut text = "version: 2\nethernets:\n".to_owned();
    for (at, mac) in macs.iter().enumerate() {
        let _ = write!(text, "  nic{at}:\n    match:\n      macaddress: \"{mac}\"\n    dhcp4: true\n");
    }
    if macs.is_empty() { "version: 2\n".to_owned() } else { text }
}

/// As FAT: General Overview of On-Disk Format 1.03 has it.
fn boot_sector(sectors: usize) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"FLOTILLA");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[PER_CLUSTER as u8]);
    put(14, &(RESERVED as u16).to_le_bytes());
    put(16, &[2]);
    put(17, &(ROOT_ENTRIES as u16).to_le_bytes());
    put(19, &(sectors as u16).to_le_bytes());
    put(21, &[0xf8]);
    put(22, &1_u16.to_le_bytes());
    put(24, &32_u16.to_le_bytes());
    put(26, &2_u16.to_le_bytes());
    put(36, &[0x80, 0, 0x29]);
    put(39, &0x464c_4f54_u32.to_le_bytes());
    put(43, b"CIDATA     FAT12   ");
    put(510, &[0x55, 0xaa]);
    sector
}

/// 12 bits each.
fn pack(fat: &[u16]) -> Vec<u8> {
    let pair = |pair: &[u16]| {
        let (one, two) = (pair[0], pair.get(1).copied().unwrap_or(0));
        [one as u8, (one >> 8) as u8 | (two << 4) as u8, (two >> 4) as u8]
    };
    fat.chunks(2).flat_map(pair).collect()
}

fn label() -> Vec<u8> {
    let mut entry = vec![0; 32];
    entry[..11].copy_from_slice(b"CIDATA     ");
    entry[11] = 8;
    entry
}

/// The entries of a file: its long name backwards in pieces of 13, then the short one.
fn entries(long: &str, short: &str, first: u16, length: u32) -> Vec<u8> {
    let mut name = [b' '; 11];
    name[..short.len()].copy_from_slice(short.as_bytes());
    let checksum = name.iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let mut units: Vec<u16> = long.encode_utf16().collect();
    units.push(0);
    units.resize(units.len().next_multiple_of(13), 0xffff);
    let pieces = units.len() / 13;
    let mut out = Vec::new();
    for at in (0..pieces).rev() {
        let piece: Vec<u8> =
            units[at * 13..(at + 1) * 13].iter().flat_map(|unit| unit.to_le_bytes()).collect();
        let mut entry = [0; 32];
        entry[0] = (at as u8 + 1) | if at + 1 == pieces { 0x40 } else { 0 };
        entry[1..11].copy_from_slice(&piece[..10]);
        entry[11] = 0x0f;
        entry[13] = checksum;
        entry[14..26].copy_from_slice(&piece[10..22]);
        entry[28..32].copy_from_slice(&piece[22..]);
        out.extend(entry);
    }
    let mut entry = [0; 32];
    entry[..11].copy_from_slice(&name);
    entry[11] = 1;
    // 1980-01-01, the first day there is.
    entry[16..18].copy_from_slice(&0x21_u16.to_le_bytes());
    entry[24..26].copy_from_slice(&0x21_u16.to_le_bytes());
    entry[26..28].copy_from_slice(&first.to_le_bytes());
    entry[28..32].copy_from_slice(&length.to_le_bytes());
    out.extend(entry);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity(macs: &[String]) -> Identity<'_> {
        Identity {
            instance: "i-1".into(),
            hostname: "web-1",
            uuid: "u".into(),
            template: Some("web"),
            number: Some(1),
            keys: &[],
            macs,
        }
    }

    /// Reads a file as a kernel does: directory, chain of clusters, length.
    fn read(image: &[u8], wanted: &str) -> Option<Vec<u8>> {
        let root = &image[ROOT_AT * SECTOR..DATA_AT * SECTOR];
        let mut long = Vec::new();
        for entry in root.chunks(32).take_while(|entry| entry[0] != 0) {
            if entry[11] == 0x0f {
                let units = [&entry[1..11], &entry[14..26], &entry[28..32]].concat();
                let units: Vec<u16> = units.chunks(2).map(|u| u16::from_le_bytes([u[0], u[1]])).collect();
                long.splice(0..0, units);
                continue;
            }
            let end = long.iter().position(|unit| *unit == 0).unwrap_or(long.len());
            if String::from_utf16(&long[..end]).unwrap() == wanted {
                let length = u32::from_le_bytes(entry[28..32].try_into().unwrap()) as usize;
                let mut cluster = usize::from(u16::from_le_bytes([entry[26], entry[27]]));
                let mut data = Vec::new();
                while (2..0xff0).contains(&cluster) {
                    let at = (DATA_AT + (cluster - 2) * PER_CLUSTER) * SECTOR;
                    data.extend(&image[at..at + PER_CLUSTER * SECTOR]);
                    let fat = RESERVED * SECTOR + cluster * 3 / 2;
                    let pair = u16::from_le_bytes([image[fat], image[fat + 1]]);
                    cluster = usize::from(if cluster % 2 == 0 { pair & 0xfff } else { pair >> 4 });
                }
                assert!(data.len() >= length);
                data.truncate(length);
                return Some(data);
            }
            long.clear();
        }
        None
    }

    #[test]
    fn a_guest_reads_who_it_is_with_and_without_the_file_system() {
        let macs = ["52:54:00:00:00:01".to_owned()];
        let image = image(&identity(&macs), "#cloud-config\n", None, None).unwrap();
        let meta = read(&image, "meta-data").unwrap();
        let value: serde_json::Value = serde_json::from_slice(&meta).unwrap();
        assert_eq!(
            (value["instance-id"].as_str(), value["local-hostname"].as_str()),
            (Some("i-1"), Some("web-1"))
        );
        assert_eq!(value["macs"][0], macs[0]);
        let plain = &image[SECTOR..RESERVED * SECTOR];
        assert_eq!(plain.iter().copied().filter(|byte| *byte != 0).collect::<Vec<_>>(), meta);
        assert_eq!(read(&image, "user-data").unwrap(), b"#cloud-config\n");
        assert!(String::from_utf8(read(&image, "network-config").unwrap()).unwrap().contains(&macs[0]));
    }

    #[test]
    fn keys_are_where_cloud_init_looks_for_them() {
        let keys = ["ssh-ed25519 AAAA me@here".to_owned()];
        let who = Identity { template: None, number: None, keys: &keys, ..identity(&[]) };
        let meta = read(&image(&who, "", None, None).unwrap(), "meta-data").unwrap();
        let value: serde_json::Value = serde_json::from_slice(&meta).unwrap();
        assert_eq!(value["public-keys"][0], keys[0]);
        assert!(value.get("template").is_none() && value.get("number").is_none());
        let long = ["x".repeat(4096)];
        let error = image(&Identity { keys: &long, ..who }, "", None, None).unwrap_err().to_string();
        assert!(error.contains("put keys into user_data"), "{error}");
    }

    #[test]
    fn another_one_has_another_size() {
        let one = image(&identity(&[]), "", None, None).unwrap().len() as u64;
        let two = image(&identity(&[]), "", None, Some(one)).unwrap().len() as u64;
        assert_ne!(one, two);
        assert_eq!(image(&identity(&[]), "", None, Some(two)).unwrap().len() as u64, one);
        assert!(image(&identity(&[]), &"x".repeat(TEXT_MAX + 1), None, None).is_err());
    }

    /// blkid is what udev asks.
    #[test]
    fn blkid_knows_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), image(&identity(&[]), "", None, None).unwrap()).unwrap();
        let output =
            std::process::Command::new("blkid").args(["-p", "-o", "export"]).arg(file.path()).output();
        let text = String::from_utf8(output.expect("this test needs blkid").stdout).unwrap();
        assert!(text.contains("LABEL=CIDATA") && text.contains("TYPE=vfat"), "{text}");
    }

    proptest! {
        #[test]
        fn what_is_put_in_comes_out(user in "\\PC{0,3000}", network in "\\PC{0,3000}", other in any::<bool>()) {
            let first = image(&identity(&[]), &user, Some(&network), None).unwrap();
            let image = image(&identity(&[]), &user, Some(&network), other.then_some(first.len() as u64)).unwrap();
            prop_assert_eq!(read(&image, "user-data").unwrap(), user.as_bytes());
            prop_assert_eq!(read(&image, "network-config").unwrap(), network.as_bytes());
            prop_assert_eq!(first.len() == image.len(), !other);
        }
    }
}
