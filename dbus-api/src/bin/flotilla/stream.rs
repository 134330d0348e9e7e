//! The standard input and output coupled with a stream from the daemon, byte for byte: for programs that speak the stream's protocol
//! themselves. (A console is another matter: see `console`.)

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use crate::failure::{Exit, Failure};
use crate::output;

/// Until the other side has nothing more to say. The end of the input is passed on, and does not end the session by itself.
pub(crate) fn join(descriptor: OwnedFd) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::new(Exit::Failed, format!("stream: {error}"));
    let mut from = UnixStream::from(descriptor);
    let mut to = from.try_clone().map_err(failed)?;
    // A thread of its own: an input that never ends must not keep the command when the other side is done. It ends with the process.
    std::thread::spawn(move || {
        // What cannot be sent, the other side does not want any more; then it ends the stream.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => output::bytes(&buffer[..count])?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
    }
}
