//! What a VM's process has logged, as a stream for a caller who has no right to the journal or the file: one child per stream reads it.
//!
//! A stream ends with the log, or, when it follows the log, with the caller: that it closes the stream is seen at once, whether or not anything
//! is ever logged again.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::process::Stdio;
use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tracing::debug;

use super::FleetError;
use super::registry::Fleet;

/// Streams at a time, of all VMs together: each is a process.
pub(super) const STREAMS: usize = 64;
/// Lines that a caller can ask for.
const MOST: u64 = 100_000;
/// Lines when the caller does not say.
const LINES: u64 = 1000;

impl Fleet {
    /// A stream with the newest `lines` lines, oldest first; with `follow` those that come, too.
    pub async fn open_log(
        &self,
        name: &str,
        lines: Option<u64>,
        follow: bool,
    ) -> Result<OwnedFd, FleetError> {
        self.get(name)?;
        let Ok(place) = Arc::clone(&self.context.logs).try_acquire_owned() else {
            return Err(FleetError::ResourceExhausted(format!(
                "{STREAMS} logs are being read already: close one"
            )));
        };
        let failed = |error: io::Error| {
            FleetError::ResourceExhausted(format!("VM \"{name}\": its log cannot be read: {error}"))
        };
        let (ours, theirs) = StdStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let ours = UnixStream::from_std(ours).map_err(failed)?;
        let mut command =
            Command::from(self.context.launcher.log(name, lines.unwrap_or(LINES).min(MOST), follow));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let child = command.spawn().map_err(failed)?;
        tokio::spawn(async move {
            if let Err(error) = pour(child, ours).await {
                debug!("somebody who reads a log: {error}");
            }
            drop(place);
        });
        Ok(theirs.into())
    }
}

async fn pour(mut child: Child, stream: UnixStream) -> io::Result<()> {
    let Some(mut log) = child.stdout.take() else { return Ok(()) };
    let (mut read, mut write) = stream.into_split();
    let mut said = [0];
    let poured = tokio::select! {
        poured = tokio::io::copy(&mut log, &mut write) => poured.map(drop),
        // The caller has nothing to say: whatever comes from there is its end.
        ended = read.read(&mut said) => ended.map(drop),
    };
    let killed = child.kill().await;
    poured.and(killed)
}
