//! Numbers, sizes and addresses in text, both ways.

use core::fmt;

/// A number: decimal, or hexadecimal after `0x`.
pub fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Bytes, in the largest unit that shows them exactly.
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

/// An IPv4 address with the length of its network's prefix, and its gateway: the address itself when there is none.
#[derive(Clone, Copy)]
pub struct Interface {
    /// Ours.
    pub address: Ipv4,
    /// Bits of the network.
    pub prefix: u32,
    /// Next hop for other networks.
    pub gateway: Option<Ipv4>,
}

/// An IPv4 address in host order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ipv4(pub u32);

impl fmt::Display for Ipv4 {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [a, b, c, d] = self.0.to_be_bytes();
        write!(f, "{a}.{b}.{c}.{d}")
    }
}

impl Ipv4 {
    /// From dotted decimal.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let mut value = [0; 4];
        for byte in &mut value {
            *byte = parts.next()?.parse().ok()?;
        }
        parts.next().is_none().then_some(Self(u32::from_be_bytes(value)))
    }
}

impl Interface {
    /// From `ADDR`, `ADDR/LEN`, or Linux's `ADDR:SERVER:GATEWAY:NETMASK:...`; 24 bits if it says nothing.
    pub fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split(':');
        let first = fields.next()?;
        let (address, length) = first.split_once('/').map_or((first, None), |(a, l)| (a, Some(l)));
        let gateway = fields.nth(1).filter(|g| !g.is_empty());
        let mask = fields.next().filter(|m| !m.is_empty());
        let prefix = match (length, mask) {
            (Some(length), _) => length.parse().ok().filter(|l| *l <= 32)?,
            (None, Some(mask)) => Ipv4::parse(mask)?.0.leading_ones(),
            (None, None) => 24,
        };
        Some(Self {
            address: Ipv4::parse(address)?,
            prefix,
            gateway: match gateway {
                Some(g) => Some(Ipv4::parse(g)?),
                None => None,
            },
        })
    }

    /// Who to send to for `to`.
    pub fn next_hop(&self, to: Ipv4) -> Ipv4 {
        let mask = u32::MAX.checked_shl(32 - self.prefix).unwrap_or(0);
        if (to.0 ^ self.address.0) & mask == 0 { to } else { self.gateway.unwrap_or(to) }
    }
}
