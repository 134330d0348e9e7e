//! Which names, tags, MTUs and addresses are acceptable, and how taps are named. Pure: no system call.

use std::net::IpAddr;

use ipnet::IpNet;
use uuid::Uuid;

use crate::error::NetError;

/// What every tag begins with.
pub const TAG_PREFIX: &str = "flotilla:";

/// The tag of bridges that were made here. They belong to the host, not to one VM.
pub const BRIDGE_TAG: &str = "flotilla:bridge";

/// Longest link name: the kernel's IFNAMSIZ (16) less the closing zero.
const NAME_MAX: usize = 15;
/// Longest alias the kernel stores: IFALIASZ (256) less the closing zero.
const TAG_MAX: usize = 255;
/// Smallest MTU of an Ethernet device (ETH_MIN_MTU).
const MTU_MIN: u32 = 68;
/// Largest MTU of a tap: 65535 less the Ethernet header.
pub(crate) const MTU_MAX: u32 = 65521;

/// Namespace of the hashed tap names. Any constant will do; changing it renames every hashed tap.
const TAP_NAMESPACE: Uuid = Uuid::from_u128(0x6b1f_0f5e_8f0c_4f5b_9f2e_3d0c_51a7_a4d2);

/// Checks that `name` can be the name of a link.
///
/// Stricter than the kernel in three points: '%' would make TUNSETIFF pick a free number (`tap%d`), ':' is refused by
/// newer kernels only, and bytes outside printable ASCII cannot be told apart in a log.
///
/// # Errors
/// [`NetError::Name`] with what is wrong.
pub fn check_name(name: &str) -> Result<(), NetError> {
    let why = if name.is_empty() {
        "is empty"
    } else if name.len() > NAME_MAX {
        "is longer than 15 bytes"
    } else if name == "." || name == ".." {
        "is a directory's name"
    } else if name.bytes().any(|byte| byte.is_ascii_whitespace()) {
        "contains white space"
    } else if name.bytes().any(|byte| matches!(byte, b'/' | b':' | b'%')) {
        "contains '/', ':' or '%'"
    } else if !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        "contains a byte that is not printable ASCII"
    } else {
        return Ok(());
    };
    Err(NetError::Name { name: name.to_owned(), why })
}

/// Checks that `name` can be the name of a link, and that it means nothing but itself in the files of other programs: wildcards, quotes and
/// the like.
///
/// # Errors
/// [`NetError::Name`] with what is wrong.
pub fn check_plain(name: &str) -> Result<(), NetError> {
    check_name(name)?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.starts_with('-') || !name.bytes().all(plain) {
        let why = "cannot be used with NAT or DHCP, as other programs read more into it";
        return Err(NetError::Name { name: name.to_owned(), why });
    }
    Ok(())
}

/// Checks that `tag` can be an alias and is recognisably ours.
pub(crate) fn check_tag(tag: &str) -> Result<(), NetError> {
    let why = if !tag.starts_with(TAG_PREFIX) || tag.len() == TAG_PREFIX.len() {
        "must be \"flotilla:\" and something that names the owner"
    } else if tag.len() > TAG_MAX {
        "is longer than 255 bytes"
    } else if !tag.bytes().all(|byte| byte.is_ascii_graphic()) {
        "contains white space or a byte that is not printable ASCII"
    } else {
        return Ok(());
    };
    Err(NetError::Tag { tag: tag.to_owned(), why })
}

/// Checks an MTU.
pub(crate) fn check_mtu(name: &str, mtu: Option<u32>) -> Result<(), NetError> {
    match mtu {
        Some(mtu) if !(MTU_MIN..=MTU_MAX).contains(&mtu) => Err(NetError::Mtu { name: name.to_owned(), mtu }),
        _ => Ok(()),
    }
}

/// Checks that `address` is one a host can have on a bridge.
pub(crate) fn check_address(bridge: &str, address: IpNet) -> Result<(), NetError> {
    // A /31 and a /127 have two hosts (RFC 3021, RFC 6164), a /32 and a /128 one: no network address to avoid.
    let roomy = address.max_prefix_len() - address.prefix_len() >= 2;
    let why = if address.addr().is_unspecified() {
        "is the unspecified address"
    } else if address.addr().is_multicast() {
        "is a multicast address"
    } else if address.addr().is_loopback() {
        "is a loopback address"
    } else if roomy && address.addr() == address.network() {
        "is the network's own address: give a host's, such as .1"
    } else if roomy && matches!(address.addr(), IpAddr::V4(_)) && address.addr() == address.broadcast() {
        "is the network's broadcast address: give a host's, such as .1"
    } else {
        return Ok(());
    };
    Err(NetError::Address { name: bridge.to_owned(), address, why })
}

/// The name of a VM's tap number `index`: at most 15 bytes, always the same for the same arguments.
///
/// `fl-VM-INDEX` when that fits and the VM's name is plain (letters, digits, '-', '_'); otherwise `fl` and 13 characters
/// of a hash (64 bits). The two forms cannot meet, because no hash begins with '-'; and the readable form is unambiguous,
/// because the index holds no '-'. A dot is not "plain": `sysctl net.ipv4.conf.NAME` would read it as a separator.
#[must_use]
pub fn tap_name(vm: &str, index: usize) -> String {
    let plain =
        !vm.is_empty() && vm.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    let readable = format!("fl-{vm}-{index}");
    if plain && readable.len() <= NAME_MAX {
        return readable;
    }
    // The index goes first: digits and a slash, so that no (VM, index) pair spells like another.
    hashed("fl", format!("{index}/{vm}").as_bytes())
}

/// The name of a network's bridge when nobody chose one: at most 15 bytes, always the same for the same network.
///
/// `flbr-NAME` when that fits and the network's name is plain; otherwise `fn` and 13 characters of a hash. No tap is called so: those begin
/// with `fl-`, or with `fl` and hold no '-'.
#[must_use]
pub fn bridge_name(network: &str) -> String {
    let plain = network.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    let readable = format!("flbr-{network}");
    if plain && !network.is_empty() && readable.len() <= NAME_MAX {
        return readable;
    }
    hashed("fn", format!("network/{network}").as_bytes())
}

/// `prefix` (two bytes) and 13 characters of a hash of `text`.
fn hashed(prefix: &str, text: &[u8]) -> String {
    let hash = Uuid::new_v5(&TAP_NAMESPACE, text).into_bytes();
    // Bytes 6 and 8 hold the UUID's version and variant: fixed bits, no use here.
    let bits = [0, 1, 2, 3, 4, 5, 9, 10].into_iter().fold(0u64, |bits, at| bits << 8 | u64::from(hash[at]));
    let mut name = String::from(prefix);
    for group in (0..13).rev() {
        const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        name.push(char::from(DIGITS[(bits >> (5 * group) & 31) as usize]));
    }
    name
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn names() {
        for good in ["a", "br0", "fl-web-0", "abcdefghijklmno", "eth0.5", "_", "-", "..."] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "a\tb",
            "a\n",
            "tap%d",
            "eth0:1",
            "abcdefghijklmnop",
            "ü",
            "a\0b",
            "a\x7f",
        ] {
            let error = check_name(bad).unwrap_err().to_string();
            assert!(error.contains("link name"), "{bad:?}: {error}");
        }
    }

    #[test]
    fn tags() {
        for good in [BRIDGE_TAG, "flotilla:x", "flotilla:2f1c7f3e-0000-4000-8000-000000000001"] {
            assert!(check_tag(good).is_ok(), "{good:?}");
        }
        let long = format!("flotilla:{}", "x".repeat(250));
        for bad in ["", "flotilla:", "other:x", "flotilla:a b", "flotilla:\n", &long] {
            assert!(check_tag(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn mtus_and_addresses() {
        assert!(check_mtu("x", None).is_ok());
        for (mtu, good) in
            [(0, false), (67, false), (68, true), (1500, true), (9000, true), (65521, true), (65522, false)]
        {
            assert_eq!(check_mtu("x", Some(mtu)).is_ok(), good, "{mtu}");
        }
        for (address, good) in [
            ("10.0.0.1/24", true),
            ("10.0.0.0/24", false),
            ("10.0.0.255/24", false),
            ("10.0.0.0/31", true),
            ("10.0.0.7/32", true),
            ("0.0.0.0/0", false),
            ("127.0.0.1/8", false),
            ("224.0.0.1/24", false),
            ("fd00::1/64", true),
            ("fd00::/64", false),
            ("fd00::/127", true),
            ("ff02::1/64", false),
            ("::/0", false),
        ] {
            assert_eq!(check_address("x", address.parse().unwrap()).is_ok(), good, "{address}");
        }
    }

    #[test]
    fn tap_names_fit_and_read_well() {
        assert_eq!(tap_name("web", 0), "fl-web-0");
        assert_eq!(tap_name("a23456789b", 1), "fl-a23456789b-1");
        for (vm, index) in [
            ("a23456789bc", 1),
            ("a23456789b", 10),
            ("", 0),
            ("a.b", 0),
            ("a/b", 0),
            ("ü", 0),
            ("web", usize::MAX),
            ("a very long name with blanks", 3),
        ] {
            let name = tap_name(vm, index);
            assert_eq!(name.len(), 15, "{name}");
            assert!(check_name(&name).is_ok(), "{name}");
            assert!(!name.starts_with("fl-"), "{name}");
            assert_eq!(name, tap_name(vm, index));
        }
        // A name that was given out once must stay: links outlive the daemon's upgrade.
        assert_eq!(tap_name("a-rather-long-name", 0), "flijtegtjwahvvl");
    }

    #[test]
    fn bridges_of_networks_are_no_taps() {
        assert_eq!(bridge_name("lan"), "flbr-lan");
        assert_eq!(bridge_name("abcdefghij"), "flbr-abcdefghij");
        for network in ["abcdefghijk", "a.b", "", "ü"] {
            let name = bridge_name(network);
            assert!(name.len() == 15 && name.starts_with("fn") && check_name(&name).is_ok(), "{name}");
            assert_eq!(name, bridge_name(network));
        }
    }

    #[test]
    fn tap_names_do_not_meet() {
        let mut seen = HashMap::new();
        let mut check = |vm: String, index: usize| {
            let name = tap_name(&vm, index);
            assert!(name.len() <= NAME_MAX);
            if let Some(other) = seen.insert(name.clone(), (vm.clone(), index)) {
                assert_eq!(other, (vm, index), "{name}");
            }
        };
        for n in 0..20_000 {
            check(format!("vm-{n}"), 0);
            check(format!("production-web-server-{n}"), n % 4);
        }
        // Pairs whose parts run into each other.
        for (vm, index) in
            [("a-1", 0), ("a", 10), ("a-10", 0), ("a", 1), ("0/a.b", 1), ("a.b", 1), ("1/0/a.b", 0)]
        {
            check(vm.to_owned(), index);
        }
        // A VM that is called as another one's hashed tap.
        check(tap_name("a-rather-long-name", 0)[2..].to_owned(), 0);
    }
}
