//! Names of a VM's own sockets: owns the one place where whoever binds them, passes them on and dials them looks.
//! No imports: the fuzz targets of command lines take this file as it stands.

/// The VMM's QMP socket in the directory that a launcher makes.
pub const QMP_SOCKET: &str = "qmp.sock";
/// The guest's serial line there.
pub const CONSOLE_SOCKET: &str = "console.sock";
