//! Everything a start needs: owns the step from a definition to a command line with open descriptors. Used by the actor only.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dbus_api::spec::VmSpec;
use uuid::Uuid;

use super::command::{self, Place};
use super::spec::{check_files, plain};
use super::{Context, FleetError};
use crate::launch::{Handed, Prepared};

/// What is started.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) name: Arc<str>,
    pub(super) uuid: Uuid,
    pub(super) spec: Arc<VmSpec>,
    pub(super) generation: u64,
    pub(super) paused: bool,
    /// Where the process is to run.
    pub(super) instance: Arc<str>,
    /// The snapshot that it goes on from.
    pub(super) incoming: Option<Arc<Path>>,
}

/// Looks at the files, makes the taps, opens all of them. On an error nothing stays open.
pub(super) async fn prepare(context: &Context, plan: &Plan) -> Result<Prepared, FleetError> {
    let spec = Arc::clone(&plan.spec);
    let incoming = plan.incoming.clone();
    let opened = tokio::task::spawn_blocking(move || -> Result<_, FleetError> {
        check_files(&spec)?;
        let mut descriptors = open_files(&spec)?;
        for file in incoming.iter().flat_map(|dir| SNAPSHOT.map(|name| dir.join(name))) {
            descriptors.push(open("template", &file, false, false)?);
        }
        Ok(descriptors)
    });
    let mut descriptors =
        opened.await.map_err(|error| FleetError::LaunchFailed(format!("opening files: {error}")))??;
    let limited = context.launcher.limit(&plan.instance, &plan.spec.limits).await;
    limited.map_err(|error| FleetError::LaunchFailed(format!("limits: {error}")))?;
    let taps = context.network.ensure(&plan.name, plan.uuid, &plan.spec).await?;
    for tap in &taps {
        descriptors.push((Handed::Tap(tap.clone()), context.network.open(tap).await?));
    }
    let listeners = context.launcher.listeners(&plan.instance);
    descriptors.extend(listeners.map_err(|error| FleetError::LaunchFailed(error.to_string()))?);
    let place = Place {
        vmm: &context.vmm,
        name: &plan.name,
        uuid: plan.uuid,
        sockets: &context.launcher.sockets(&plan.instance),
        taps: &taps,
        incoming: plan.incoming.as_deref(),
        paused: plan.paused,
    };
    Ok(Prepared { command_line: command::build(&plan.spec, &place), descriptors })
}

fn open_files(spec: &VmSpec) -> Result<Vec<(Handed, OwnedFd)>, FleetError> {
    let mut descriptors = Vec::new();
    if let Some(kernel) = &spec.kernel {
        descriptors.push(open("kernel", kernel, false, false)?);
    }
    if let Some(firmware) = &spec.firmware {
        descriptors.push(open("firmware.code", &firmware.code, false, false)?);
        descriptors.push(open("firmware.vars", &firmware.vars, true, false)?);
    }
    if let Some(initrd) = &spec.initrd {
        // The same file twice (a kernel that is its own initrd) is opened twice: each descriptor is taken once.
        descriptors.push(open("initrd", initrd, false, false)?);
    }
    for (at, disk) in spec.disks.iter().enumerate() {
        descriptors.push(open(&format!("disks[{at}].path"), &disk.path, !disk.readonly, disk.direct)?);
        if let Some(backing) = &disk.backing {
            descriptors.push(open(&format!("disks[{at}].backing"), backing, false, false)?);
        }
    }
    Ok(descriptors)
}

/// Files of a snapshot.
pub(crate) const SNAPSHOT: [&str; 2] = ["state", "memory"];

/// Opens a file that a VM is to have; the error names the field.
pub(crate) fn open(
    field: &str,
    path: &Path,
    write: bool,
    direct: bool,
) -> Result<(Handed, OwnedFd), FleetError> {
    // O_NONBLOCK: a path that became a FIFO since it was looked at must not make the daemon wait; it changes nothing for files.
    let flags = libc::O_NONBLOCK | if direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    let refuse = |error: std::io::Error| {
        let why = match error.raw_os_error() {
            Some(libc::EINVAL) if direct => "its file system does not support O_DIRECT".to_owned(),
            Some(libc::EROFS) => "its file system is read-only: use readonly".to_owned(),
            _ => plain(&error),
        };
        FleetError::InvalidSpec(format!("{field}: {}: {why}", path.display()))
    };
    Ok((Handed::Path(PathBuf::from(path)), file.map_err(refuse)?.into()))
}
