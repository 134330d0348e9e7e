//! Locks on images: owns the byte-range protocol that keeps two virtual machines from writing one image.
//!
//! The protocol is QEMU's, so that its tools see us and we see them: byte 100 + N is locked (shared) by whoever *uses* right N,
//! byte 200 + N by whoever *does not let others* use it. After taking our own we look for others' in conflict; because each
//! side locks first and looks second, two who race may both fail but never both succeed. Locks belong to the open file
//! description (OFD): they go when it is closed, and they work between two drives of one process too.

use std::fs::File;
use std::io;

use super::{Problem, raw};

const USES: i64 = 100;
const DENIES: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Locks `file` for reading, or for reading and writing, until it is closed.
pub(super) fn lock(file: &File, write: bool) -> Result<(), Problem> {
    let used: &[i64] = if write { &[READ, WRITE, RESIZE] } else { &[READ] };
    // Nobody else may write or resize, whether we write or only read.
    let denied = &[WRITE, RESIZE];
    for byte in used.iter().map(|n| USES + n).chain(denied.iter().map(|n| DENIES + n)) {
        control(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte)?;
    }
    for byte in used.iter().map(|n| DENIES + n).chain(denied.iter().map(|n| USES + n)) {
        // Asks: could we lock this alone? No, if any other description holds it in any way.
        if control(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)? != libc::F_UNLCK {
            return Err(Problem::InUse);
        }
    }
    Ok(())
}

/// Gives up all locks now: the kernel may close the description a little later than we do (io_uring), or never (a launcher that
/// has kept its copy of an inherited descriptor).
pub(super) fn unlock(file: &File) {
    // From the first of our bytes to the last. Closing would do the same, so a failure changes nothing.
    let _ = control_range(file, libc::F_OFD_SETLK, libc::F_UNLCK, USES, DENIES + RESIZE + 1 - USES);
}

fn control(file: &File, command: libc::c_int, kind: libc::c_int, byte: i64) -> Result<libc::c_int, Problem> {
    control_range(file, command, kind, byte, 1)
}

/// Returns the kind of lock that the kernel answers with.
fn control_range(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    byte: i64,
    len: i64,
) -> Result<libc::c_int, Problem> {
    // SAFETY: all zeroes is a valid `flock`.
    let mut flock: libc::flock = unsafe { std::mem::zeroed() };
    flock.l_type = kind as libc::c_short;
    flock.l_whence = libc::SEEK_SET as libc::c_short;
    flock.l_start = byte;
    flock.l_len = len;
    // SAFETY: the descriptor is open and `flock` is a valid argument of these commands.
    if unsafe { libc::fcntl(raw(file), command, &raw mut flock) } == 0 {
        return Ok(libc::c_int::from(flock.l_type));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(Problem::InUse),
        _ => Err(Problem::Host("lock it", error)),
    }
}
