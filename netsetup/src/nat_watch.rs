//! Hears of what is taken from our table of NAT, from the kernel: one multicast group of nfnetlink (linux/netfilter/nfnetlink.h,
//! nf_tables.h). Who took it, and whether it is as it should be, is the caller's to find out.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::unix::AsyncFd;

use crate::nat::TABLE;

/// `NFNLGRP_NFTABLES`, as a bit of the address.
const GROUP: u32 = 1 << (7 - 1);
/// `NFNL_SUBSYS_NFTABLES`: the upper half of a message's type.
const SUBSYSTEM: u16 = 10;
/// `NFT_MSG_DELTABLE`, `_DELCHAIN`, `_DELRULE`: the lower half.
const TAKEN: [u16; 3] = [2, 5, 8];
/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADER: usize = 16;
const GENERAL: usize = 4;
/// The attribute that names the table has this number in each of those messages.
const NAME: u16 = 1;
/// Larger than any message of the kernel's.
const BUFFER: usize = 64 << 10;

/// The socket.
#[derive(Debug)]
pub struct NatWatch(AsyncFd<OwnedFd>);

impl NatWatch {
    /// Joins the group. Needs `CAP_NET_ADMIN`, and a tokio runtime.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUP))?;
        // SAFETY: the descriptor is owned by what is registered, which is dropped with the registration and never replaced.
        let registered = unsafe { AsyncFd::register(socket) };
        Ok(Self(registered?))
    }

    /// Returns when something was taken from the table, by anybody, the daemon included; or when so much happened that it may have been.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn taken(&self) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let mut ready = self.0.readable().await?;
            let read =
                ready.try_io(|socket| Ok(recv(socket.get_ref(), &mut buffer[..], RecvFlags::empty())?));
            match read {
                Ok(Ok((count, _))) if takes(buffer.get(..count).unwrap_or_default()) => return Ok(()),
                Ok(Ok(_)) | Err(_) => {}
                // Messages were lost.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(()),
                Ok(Err(error)) => return Err(error),
            }
        }
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Whether one of these messages tells that something of the table went.
fn takes(mut messages: &[u8]) -> bool {
    loop {
        let length = messages.get(..4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
        let length = length.and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
        let Some(message) = messages.get(..length).filter(|message| message.len() >= HEADER + GENERAL) else {
            return false;
        };
        let kind = number(message, 4).unwrap_or(0);
        if kind >> 8 == SUBSYSTEM
            && TAKEN.contains(&(kind & 0xff))
            && table(&message[HEADER + GENERAL..]) == Some(TABLE.as_bytes())
        {
            return true;
        }
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

/// The table that these attributes name.
fn table(mut attributes: &[u8]) -> Option<&[u8]> {
    loop {
        let length = usize::from(number(attributes, 0)?);
        let value = attributes.get(4..length)?;
        if number(attributes, 2)? == NAME {
            return Some(value.strip_suffix(b"\0").unwrap_or(value));
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, name: &str) -> Vec<u8> {
        let name = [name.as_bytes(), b"\0"].concat();
        let mut attribute = (name.len() as u16 + 4).to_ne_bytes().to_vec();
        attribute.extend([NAME.to_ne_bytes().as_slice(), &name].concat());
        attribute.resize(attribute.len().next_multiple_of(4), 0);
        let length = (HEADER + GENERAL + attribute.len()) as u32;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.resize(HEADER + GENERAL, 0);
        message.extend(attribute);
        message
    }

    #[test]
    fn only_what_is_taken_from_our_table_counts() {
        let delete_table = SUBSYSTEM << 8 | 2;
        assert!(takes(&message(delete_table, "flotilla")));
        assert!(takes(
            &[message(SUBSYSTEM << 8, "flotilla"), message(SUBSYSTEM << 8 | 8, "flotilla")].concat()
        ));
        for other in [
            message(delete_table, "theirs"),
            message(SUBSYSTEM << 8, "flotilla"),
            message(2, "flotilla"),
            message(delete_table, "flotilla")[..20].to_vec(),
            vec![0; 64],
            vec![0xff; 64],
            Vec::new(),
        ] {
            assert!(!takes(&other), "{other:?}");
        }
    }
}
