//! Host side of block devices: owns disk images (opening, locking, alignment) and the engines that move data.
//!
//! `virtio::blk` is the only caller. Images are raw; the format is never guessed from content, because the guest writes it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::config::{Aio, DetectZeroes, Drive, ImageFormat};
use crate::inherit::Inherited;

mod align;
mod engine;
mod lock;
mod throttle;
mod uring;

pub(crate) use align::Bounce;
pub(crate) use engine::{Engine, Op};
pub(crate) use throttle::Throttle;

/// Bytes in the unit that virtio-blk counts in, whatever the disk's block size (virtio 1.2 §5.2.6).
pub const SECTOR: u64 = 512;

/// Why a drive could not be opened. Each text names the drive and says what to do.
#[derive(Debug, thiserror::Error)]
#[error("drive \"{drive}\": {path}: {problem}", path = path.display())]
pub struct BlockError {
    /// `id=` of the drive.
    pub drive: String,
    /// `file=` of the drive.
    pub path: PathBuf,
    /// What was wrong.
    #[source]
    pub problem: Problem,
}

/// What was wrong with a drive.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// Nothing is there.
    #[error("no such file")]
    Missing,
    /// Neither a regular file nor a block device.
    #[error("is {0}, not a regular file or block device")]
    NotADisk(&'static str),
    /// The file's mode, or the file system, does not let us.
    #[error("permission denied; the user of this process needs read{} access", if *.write { " and write" } else { "" })]
    Denied {
        /// Writing was wanted too.
        write: bool,
    },
    /// Somebody else has locked the image.
    #[error(
        "the image is in use by another process, or by another drive of this one; stop that process, or give both of them the image with readonly=on"
    )]
    InUse,
    /// The host itself uses the block device.
    #[error("the block device is mounted or in use by the host; unmount it first, or use readonly=on")]
    Mounted,
    /// `direct=on` where it does not work.
    #[error("its file system does not support direct I/O; add direct=off to the drive")]
    NoDirect,
    /// An inherited descriptor that cannot do what the drive wants.
    #[error("the inherited descriptor is not open for writing; open it read-write or use readonly=on")]
    DescriptorReadOnly,
    /// Too small to hold one sector.
    #[error("the image is empty; make it at least 512 bytes long")]
    Empty,
    /// Something that this version does not do.
    #[error("{0} is not supported in this version; {1}")]
    Unsupported(&'static str, &'static str),
    /// Anything else.
    #[error("cannot {0}: {1}")]
    Host(&'static str, #[source] io::Error),
}

/// An open disk image, locked against other processes for as long as it lives.
#[derive(Debug)]
pub struct Disk {
    file: File,
    id: String,
    /// Bytes that the guest sees: a multiple of [`SECTOR`].
    size: u64,
    read_only: bool,
    discard: bool,
    aio: Aio,
    alignment: align::Alignment,
    iops: u64,
    detect_zeroes: DetectZeroes,
    no_flush: bool,
}

impl Disk {
    /// Opens the image of `drive`, or takes its inherited descriptor, and locks it.
    ///
    /// `aio=native` and the default use io_uring, which does all that Linux native AIO does, and reads what the page cache has
    /// without waiting; `threads` has the kernel's pool of threads do each call; `off` uses plain synchronous calls on the I/O
    /// thread, as does a host without io_uring.
    pub fn open(drive: &Drive, inherited: &Inherited) -> Result<Self, BlockError> {
        Self::try_open(drive, inherited).map_err(|problem| BlockError {
            drive: drive.id.clone(),
            path: drive.file.clone(),
            problem,
        })
    }

    fn try_open(drive: &Drive, inherited: &Inherited) -> Result<Self, Problem> {
        refuse_unsupported(drive)?;
        let file = match inherited.take_path(&drive.file) {
            Some(fd) => adopt(fd, drive)?,
            None => open_path(&drive.file, drive)?,
        };
        let metadata = file.metadata().map_err(|e| Problem::Host("examine it", e))?;
        check_kind(&metadata)?;
        let bytes = if metadata.file_type().is_block_device() {
            rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
                .map_err(|e| Problem::Host("find its size", e.into()))?
        } else {
            metadata.size()
        };
        if bytes < SECTOR {
            return Err(Problem::Empty);
        }
        lock::lock(&file, !drive.readonly)?;
        let alignment = align::Alignment::of(&file, drive.direct, &metadata);
        let size = bytes - bytes % alignment.block_size().max(SECTOR);
        if size != bytes {
            tracing::warn!(
                drive = drive.id,
                "the last {} bytes of the image are not a whole block; the guest does not see them",
                bytes - size
            );
        }
        Ok(Self {
            file,
            id: drive.id.clone(),
            size,
            read_only: drive.readonly,
            discard: drive.discard && !drive.readonly,
            aio: drive.aio.unwrap_or(Aio::IoUring),
            alignment,
            iops: drive.iops_total.unwrap_or(0),
            detect_zeroes: drive.detect_zeroes,
            no_flush: drive.no_flush,
        })
    }

    /// `id=` of the drive.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Bytes that the guest sees.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the guest may give blocks back (`discard=unmap`).
    pub fn discard(&self) -> bool {
        self.discard
    }

    /// Limit on requests, if there is one.
    pub(crate) fn throttle(&self) -> Option<Throttle> {
        Throttle::new(self.iops)
    }

    /// What becomes of writes of zeroes: `None`, they are written; else whether they may give their blocks back.
    pub(crate) fn detect_zeroes(&self) -> Option<bool> {
        match self.detect_zeroes {
            DetectZeroes::Off => None,
            DetectZeroes::On => Some(false),
            DetectZeroes::Unmap => Some(self.discard),
        }
    }

    /// Whether the guest's flushes are not to be carried out.
    pub(crate) fn no_flush(&self) -> bool {
        self.no_flush
    }

    /// Smallest unit, in bytes, that a guest should read or write.
    pub fn block_size(&self) -> u32 {
        // At most 64 KiB: `Alignment` sees to it.
        self.alignment.block_size() as u32
    }

    /// Makes everything written durable. Blocks.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// A new engine for at most `depth` requests in flight. Costs a few system calls: call it when the disk is really used.
    pub(crate) fn engine(&self, depth: u16) -> Box<dyn Engine> {
        if self.aio != Aio::Off {
            match uring::Uring::new(&self.file, depth, self.aio == Aio::Threads) {
                Ok(uring) => return Box::new(uring),
                Err(error) => {
                    tracing::info!(drive = self.id, "no io_uring ({error}): using synchronous I/O");
                }
            }
        }
        Box::new(engine::Sync::new(&self.file))
    }

    /// The open image.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Whether the kernel would refuse these buffers, so that [`Bounce`] must be used.
    pub(crate) fn needs_bounce(&self, parts: &[libc::iovec], offset: u64) -> bool {
        self.alignment.refuses(parts, offset)
    }

    /// A new way around misaligned buffers.
    pub(crate) fn bounce(&self) -> io::Result<Bounce> {
        Bounce::new(&self.alignment)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        lock::unlock(&self.file);
    }
}

fn refuse_unsupported(drive: &Drive) -> Result<(), Problem> {
    if drive.format == ImageFormat::Qcow2 {
        return Err(Problem::Unsupported("format=qcow2", "convert the image with `qemu-img convert -O raw`"));
    }
    Ok(())
}

fn check_kind(metadata: &std::fs::Metadata) -> Result<(), Problem> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    Err(Problem::NotADisk(if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "something else"
    }))
}

fn open_path(path: &Path, drive: &Drive) -> Result<File, Problem> {
    let explain = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Problem::Missing,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Problem::Denied { write: !drive.readonly }
        }
        io::ErrorKind::ResourceBusy => Problem::Mounted,
        io::ErrorKind::InvalidInput if drive.direct => Problem::NoDirect,
        _ => Problem::Host("open it", error),
    };
    // Look before opening: to open a pipe would wait for its other end, and some devices act when they are opened.
    let metadata = std::fs::metadata(path).map_err(explain)?;
    check_kind(&metadata)?;
    let mut flags = if drive.direct { libc::O_DIRECT } else { 0 };
    if metadata.file_type().is_block_device() && !drive.readonly {
        // For a block device this claims it: fails while it is mounted, and keeps it from being mounted.
        flags |= libc::O_EXCL;
    }
    File::options().read(true).write(!drive.readonly).custom_flags(flags).open(path).map_err(explain)
}

/// Makes an inherited descriptor what the drive says. Its flags belong to the launcher's copy too, which has no use for them.
fn adopt(fd: OwnedFd, drive: &Drive) -> Result<File, Problem> {
    let host = |e: rustix::io::Errno| Problem::Host("use the inherited descriptor", e.into());
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(host)?;
    let writable = flags & OFlags::RWMODE == OFlags::RDWR;
    if !drive.readonly && !writable {
        return Err(Problem::DescriptorReadOnly);
    }
    // O_NONBLOCK would make io_uring fail requests that have to wait.
    let mut wanted = flags - OFlags::NONBLOCK;
    wanted.set(OFlags::DIRECT, drive.direct);
    if wanted != flags {
        rustix::fs::fcntl_setfl(&fd, wanted).map_err(|e| match e {
            rustix::io::Errno::INVAL if drive.direct => Problem::NoDirect,
            e => host(e),
        })?;
    }
    Ok(File::from(fd))
}

/// Number of the descriptor, for kernel interfaces that take one by number while `file` is alive.
fn raw(file: &File) -> i32 {
    file.as_raw_fd()
}

#[cfg(test)]
mod tests;
