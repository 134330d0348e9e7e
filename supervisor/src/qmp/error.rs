//! What can go wrong with QMP.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// An error of this room.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The VMM's socket cannot be connected to.
    #[error("cannot connect to the VMM at {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The other side connected and then did not behave like a VMM.
    #[error("what listens at {} does not speak QMP: {why}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What it did.
        why: String,
    },
    /// No answer in time. The command may still take effect, unless `sent` is false.
    #[error("the VMM did not {} {command:?} within {} ms", if *.sent { "answer" } else { "take" }, after.as_millis())]
    Deadline {
        /// The command.
        command: String,
        /// How long was waited.
        after: Duration,
        /// The command reached the VMM's socket.
        sent: bool,
    },
    /// The connection ended before the answer came.
    #[error("the VMM is gone: {reason}")]
    Closed {
        /// How it ended.
        reason: Arc<str>,
    },
    /// The VMM answered with an error.
    #[error("{class}: {desc}")]
    Refused {
        /// QMP error class.
        class: String,
        /// The VMM's own words.
        desc: String,
    },
    /// The request is no QMP command.
    #[error("not a QMP command: {why}")]
    BadRequest {
        /// What is wrong with it.
        why: String,
    },
    /// There is no VMM to ask.
    #[error("VM {vm:?} is not running")]
    NotRunning {
        /// The VM.
        vm: String,
    },
}

impl QmpError {
    /// The QMP error class with which a client is told.
    pub(crate) fn class(&self) -> &str {
        match self {
            QmpError::Refused { class, .. } => class,
            _ => "GenericError",
        }
    }
}
