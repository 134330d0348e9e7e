//! What a test and the agent in its host say to each other: one TCP connection is one command.
//!
//! The client sends a request (JSON in one frame), then the command's standard input in frames; the agent answers with
//! frames of output and one with the exit code. A frame is a kind byte, a length (u32, big endian) and that many bytes.
//! Used by `host::agent` and `host::server`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A stream that frames go over.
pub trait Wire: Read + Write + Send {
    /// Another handle of the same stream.
    ///
    /// # Errors
    /// When there are no descriptors left.
    fn twin(&self) -> io::Result<Box<dyn Wire>>;
    /// Longest wait of a read.
    ///
    /// # Errors
    /// For zero.
    fn limit_reads(&self, limit: Duration) -> io::Result<()>;
    /// Longest wait of a write.
    ///
    /// # Errors
    /// For zero.
    fn limit_writes(&self, limit: Duration) -> io::Result<()>;
    /// Ends both directions, for all handles.
    fn close(&self);
}

macro_rules! wire {
    ($stream:ty) => {
        impl Wire for $stream {
            fn twin(&self) -> io::Result<Box<dyn Wire>> {
                Ok(Box::new(self.try_clone()?))
            }
            fn limit_reads(&self, limit: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(limit))
            }
            fn limit_writes(&self, limit: Duration) -> io::Result<()> {
                self.set_write_timeout(Some(limit))
            }
            fn close(&self) {
                // Closed already is as good.
                let _ = self.shutdown(Shutdown::Both);
            }
        }
    };
}

wire!(TcpStream);
wire!(UnixStream);

/// TCP port the agent listens on, inside the host.
pub const PORT: u16 = 7777;

/// Longest frame either side sends or takes.
pub const FRAME_MAX: usize = 1 << 20;

/// What to run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// A line for `/bin/bash -c`.
    pub command: String,
    /// After this many seconds the command and what it started are killed, and the exit code is 124.
    pub seconds: u64,
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A [`Request`], first on the connection.
    Request,
    /// Standard input; an empty frame ends it.
    Input,
    /// Standard output.
    Output,
    /// Standard error.
    Error,
    /// The exit code in decimal, last on the connection: 128 + signal for a killed command.
    Exit,
}

const KINDS: [(Kind, u8); 5] = [
    (Kind::Request, b'r'),
    (Kind::Input, b'i'),
    (Kind::Output, b'o'),
    (Kind::Error, b'e'),
    (Kind::Exit, b'x'),
];

/// Writes one frame.
///
/// # Errors
/// Those of the stream; `InvalidInput` for more than [`FRAME_MAX`] bytes.
pub fn send(stream: &mut (impl Write + ?Sized), kind: Kind, data: &[u8]) -> io::Result<()> {
    if data.len() > FRAME_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "frame is too long"));
    }
    let code = KINDS.iter().find(|(k, _)| *k == kind).map_or(0, |(_, code)| *code);
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    // One write: with the header apart, Nagle and delayed acknowledgements cost 40 ms a frame.
    let mut frame = Vec::with_capacity(5 + data.len());
    frame.push(code);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(data);
    stream.write_all(&frame)
}

/// Reads one frame.
///
/// # Errors
/// Those of the stream; `UnexpectedEof` when it ends; `InvalidData` for an unknown kind or an overlong frame.
pub fn receive(stream: &mut (impl Read + ?Sized)) -> io::Result<(Kind, Vec<u8>)> {
    let mut header = [0; 5];
    stream.read_exact(&mut header)?;
    let [code, length @ ..] = header;
    let length = u32::from_be_bytes(length) as usize;
    let kind = KINDS.iter().find(|(_, c)| *c == code).map(|(kind, _)| *kind);
    match kind {
        Some(kind) if length <= FRAME_MAX => {
            let mut data = vec![0; length];
            stream.read_exact(&mut data)?;
            Ok((kind, data))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not a frame")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_went() {
        let mut wire = Vec::new();
        for (kind, _) in KINDS {
            send(&mut wire, kind, format!("{kind:?}").as_bytes()).unwrap();
        }
        let mut wire = wire.as_slice();
        for (kind, _) in KINDS {
            assert_eq!(receive(&mut wire).unwrap(), (kind, format!("{kind:?}").into_bytes()));
        }
        assert_eq!(receive(&mut wire).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn garbage_is_refused_before_it_is_allocated() {
        assert_eq!(
            receive(&mut [b'?', 0, 0, 0, 0].as_slice()).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert_eq!(
            receive(&mut [b'o', 255, 0, 0, 0].as_slice()).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert!(send(&mut Vec::new(), Kind::Input, &vec![0; FRAME_MAX + 1]).is_err());
    }
}
