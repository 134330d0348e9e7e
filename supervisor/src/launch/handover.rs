//! Wire format of the launch socket, both ends. Std and libc only, because `flotilla-exec` runs it before every VM.
//!
//! The client sends one line, `launch NAME`, `spare INSTANCE` or `shutdown NAME`. The answer to `spare` comes when there is a VM for it; `ok` alone
//! says that there will be none. The answer is a 32-bit little-endian length and that many bytes of
//! fields that each end with NUL: `ok`, the value of `FLOTILLA_FDS`, and the command line, with the descriptors attached to its first
//! byte; or `error` and a text. The client moves descriptor *i* to number 3 + *i* before it becomes the VMM, which is what the value
//! of `FLOTILLA_FDS` says.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Number of the first descriptor in the VMM.
pub const FIRST: RawFd = 3;
/// Kernel, initrd, six disks, two taps, /dev/kvm: far below the kernel's 253 per message.
pub const MAX_DESCRIPTORS: usize = 32;
/// A command line with its table; Linux allows 2 MiB.
pub const MAX_ANSWER: usize = 1 << 20;
/// `shutdown ` and a name.
pub const MAX_REQUEST: usize = 128;

/// An answer as the client gets it.
#[derive(Debug)]
pub enum Answer {
    /// Become this.
    Launch {
        /// Value of `FLOTILLA_FDS`.
        table: String,
        /// Command line, program first.
        command_line: Vec<String>,
        /// In the order of the table.
        descriptors: Vec<OwnedFd>,
    },
    /// Done (the answer to `shutdown`).
    Done,
    /// No, for this reason.
    Refused(String),
}

/// Bytes of an answer with these fields; an embedded NUL would forge a field and is refused.
pub fn encode<'a>(fields: impl IntoIterator<Item = &'a str>) -> io::Result<Vec<u8>> {
    let mut body = vec![0; 4];
    for field in fields {
        if field.contains('\0') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "NUL in a field of the answer"));
        }
        body.extend_from_slice(field.as_bytes());
        body.push(0);
    }
    let length = body.len() - 4;
    if length > MAX_ANSWER {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the command line is too long"));
    }
    body[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(body)
}

/// Sends the first part of an answer with its descriptors; returns how many bytes went.
pub fn send_with(socket: &impl AsRawFd, bytes: &[u8], descriptors: &[RawFd]) -> io::Result<usize> {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control: &[_] = if descriptors.is_empty() { &[] } else { &rights };
    // MSG_NOSIGNAL: a client that went away is an error, not our end.
    Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// Reads an answer. The socket's read timeout is the deadline of each step.
pub fn receive(socket: &mut UnixStream) -> io::Result<Answer> {
    let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let mut length = [0u8; 4];
    let mut descriptors = Vec::new();
    let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let got = {
        let mut parts = [IoSliceMut::new(&mut length)];
        let message =
            recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: the kernel made these descriptors for this message, and nobody else knows their numbers.
                descriptors.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        message.bytes
    };
    socket.read_exact(&mut length[got..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length == 0 || length > MAX_ANSWER {
        return Err(bad("the answer has an impossible length"));
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body)?;
    let text = String::from_utf8(body).map_err(|_| bad("the answer is not text"))?;
    let text = text.strip_suffix('\0').ok_or_else(|| bad("the answer is cut"))?;
    let mut fields = text.split('\0').map(str::to_owned);
    match fields.next().as_deref() {
        Some("ok") => match fields.next() {
            None => Ok(Answer::Done),
            Some(table) => {
                let command_line: Vec<_> = fields.collect();
                if command_line.is_empty() {
                    return Err(bad("the answer has no command line"));
                }
                Ok(Answer::Launch { table, command_line, descriptors })
            }
        },
        Some("error") => Ok(Answer::Refused(fields.next().unwrap_or_default())),
        _ => Err(bad("the answer is of an unknown kind")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn round(fields: &[&str], descriptors: &[RawFd]) -> io::Result<Answer> {
        let (one, mut two) = UnixStream::pair().unwrap();
        let bytes = encode(fields.iter().copied()).unwrap();
        assert_eq!(send_with(&one, &bytes, descriptors).unwrap(), bytes.len());
        drop(one);
        receive(&mut two)
    }

    #[test]
    fn a_command_line_with_descriptors_arrives() {
        let file = std::fs::File::open("/dev/null").unwrap();
        match round(&["ok", "[]", "/bin/vmm", "-append", ""], &[file.as_raw_fd(), 0]) {
            Ok(Answer::Launch { table, command_line, descriptors }) => {
                assert_eq!((table.as_str(), descriptors.len()), ("[]", 2));
                assert_eq!(command_line, ["/bin/vmm", "-append", ""]);
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(round(&["ok"], &[]), Ok(Answer::Done)));
        assert!(matches!(round(&["error", "no"], &[]), Ok(Answer::Refused(text)) if text == "no"));
    }

    #[test]
    fn bad_answers_are_errors() {
        for bytes in [&b""[..], b"\0\0", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x02\0\0\0o", b"\x02\0\0\0ok"] {
            let (mut one, mut two) = UnixStream::pair().unwrap();
            one.write_all(bytes).unwrap();
            drop(one);
            assert!(receive(&mut two).is_err(), "{bytes:?}");
        }
        assert!(round(&["what"], &[]).is_err());
        assert!(round(&["ok", "[]"], &[]).is_err());
        assert!(encode(["a\0b"]).is_err());
    }
}
