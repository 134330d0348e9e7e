//! Host side of block devices: owns disk images (opening, locking, alignment) and the engines that move data.
//!
//! `virtio::blk` is the only caller. Images are raw or qcow2, as the configuration says; the format is never guessed from content,
//! because the guest writes it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::OFlags;

use crate::config::{Aio, DetectZeroes, Drive, ImageFormat};
use crate::inherit::Inherited;
use crate::sandbox;

mod align;
mod cached;
mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod lock;
mod qcow2;
mod throttle;
mod uring;

use align::Bounce;
use cached::Cached;
use engine::Mover;
pub(crate) use engine::{Engine, Op};
pub use qcow2::FormatError;
use qcow2::{Layer, QcowEngine, Stack, Store};
pub(crate) use throttle::Throttle;

/// Most backing files under one image.
const BACKING_MAX: usize = 64;
/// Bytes read at a time on the slow way.
const PIECE: usize = 64 << 10;

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

/// What root has to hear about files of others.
const GIVEN_UP: &str = "; root gave up its right to other users' files when the VM was started: let root open it (chown root, or \
                        setfacl -m u:root:rw), or use it from the start";

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
    #[error("permission denied; the user of this process needs read{} access{}", if *.write { " and write" } else { "" }, if *.root { GIVEN_UP } else { "" })]
    Denied {
        /// Writing was wanted too.
        write: bool,
        /// The user is root, which had the right to open it before the VM was started.
        root: bool,
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
    /// A qcow2 image that cannot be used.
    #[error(transparent)]
    Qcow2(#[from] FormatError),
    /// A backing file that cannot be used.
    #[error("backing file {}: {problem}", path.display())]
    Backing {
        /// Which.
        path: PathBuf,
        /// What was wrong with it.
        #[source]
        problem: Box<Problem>,
    },
    /// Something that this version does not do.
    #[error("{0} is not supported in this version; {1}")]
    Unsupported(&'static str, &'static str),
    /// Anything else.
    #[error("cannot {0}: {1}")]
    Host(&'static str, #[source] io::Error),
}

/// An open disk image, locked against other processes for as long as it lives.
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
    /// A qcow2 image's content; used by the I/O thread, and by the machine's when no driver runs.
    stack: Option<Arc<Mutex<Stack>>>,
    /// Keeps the files under it open and locked.
    under: Vec<File>,
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
        let file = open_locked(drive, inherited)?;
        let metadata = file.metadata().map_err(|e| Problem::Host("examine it", e))?;
        let mut bytes = length(&file, &metadata)?;
        let alignment = align::Alignment::of(&file, drive.direct, &metadata);
        let (mut stack, mut under) = (None, Vec::new());
        if drive.format == ImageFormat::Qcow2 {
            let (opened, files) = open_stack(drive, inherited, &file, bytes, &alignment)?;
            let (size, cluster) = opened.geometry();
            if cluster < alignment.block_size() {
                return Err(Problem::Unsupported(
                    "direct=on with clusters smaller than the file's blocks",
                    "add direct=off to the drive",
                ));
            }
            bytes = size;
            (stack, under) = (Some(Arc::new(Mutex::new(opened))), files);
        } else if !drive.backing.is_empty() {
            return Err(Problem::Unsupported(
                "a backing file under a raw image",
                "say format=qcow2, or take it away",
            ));
        }
        if bytes < SECTOR {
            return Err(Problem::Empty);
        }
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
            stack,
            under,
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

    /// Makes everything written durable. Blocks. Not while a driver runs.
    pub fn flush(&self) -> io::Result<()> {
        match &self.stack {
            Some(stack) if !self.read_only => {
                let mut stack = qcow2::lock(stack);
                stack.flush(true)?;
                // The counts that fell with the first.
                stack.flush(true)
            }
            _ => self.file.sync_data(),
        }
    }

    /// Writes what this process alone knows of the image, so that a copy of its file is a whole image. Blocks. Nothing may be in flight.
    pub(crate) fn settle(&self) -> io::Result<()> {
        // What was written to a raw image, the kernel shows to everybody.
        if self.stack.is_some() { self.flush() } else { Ok(()) }
    }

    /// A new engine for at most `depth` requests in flight. Costs a few system calls: call it when the disk is really used.
    pub(crate) fn engine(&self, depth: u16) -> Box<dyn Engine> {
        let mover = self.mover(depth);
        match &self.stack {
            Some(stack) => Box::new(QcowEngine::new(mover, Arc::clone(stack), raw(&self.file))),
            None => Box::new(engine::Raw::new(mover, &self.file)),
        }
    }

    fn mover(&self, depth: u16) -> Box<dyn Mover> {
        if self.aio != Aio::Off {
            match uring::Uring::new(depth, self.aio == Aio::Threads) {
                // Not where every call is asked to go to a thread, and not around the page cache.
                Ok(uring) if self.aio != Aio::Threads && !self.alignment.direct() => {
                    return Box::new(Cached::new(uring));
                }
                Ok(uring) => return Box::new(uring),
                Err(error) => {
                    tracing::info!(drive = self.id, "no io_uring ({error}): using synchronous I/O");
                }
            }
        }
        Box::new(engine::Sync::default())
    }

    /// The open image.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Whether the kernel would refuse these buffers, so that [`Bounce`] must be used.
    pub(crate) fn needs_bounce(&self, parts: &[libc::iovec], offset: u64) -> bool {
        self.alignment.refuses(parts, offset)
    }

    /// A new way around buffers that the kernel would refuse.
    pub(crate) fn around(&self) -> io::Result<Around> {
        Ok(match &self.stack {
            Some(stack) => Around::Qcow2(Arc::clone(stack)),
            None => Around::Raw(Bounce::new(&self.alignment)?),
        })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.under.iter().chain([&self.file]).for_each(lock::unlock);
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("id", &self.id).field("file", &self.file).finish_non_exhaustive()
    }
}

/// The slow way to a disk's content, through host memory. Waits for the host.
pub(crate) enum Around {
    /// A raw image.
    Raw(Bounce),
    /// A qcow2 image.
    Qcow2(Arc<Mutex<Stack>>),
}

impl Around {
    /// Whether a request here must be the only one in flight.
    pub(crate) fn needs_quiet(&self, offset: u64, len: u64) -> bool {
        match self {
            Self::Raw(bounce) => bounce.needs_quiet(offset, len),
            Self::Qcow2(_) => true,
        }
    }

    /// Reads `len` bytes at `offset` of the disk, `file`, piece by piece, and gives the pieces to `take` in order.
    pub(crate) fn read(
        &mut self,
        file: &File,
        offset: u64,
        len: u64,
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let stack = match self {
            Self::Raw(bounce) => return bounce.read(file, offset, len, take),
            Self::Qcow2(stack) => stack,
        };
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let mut buffer = vec![0; PIECE.min(len as usize)];
        let mut at = offset;
        while at < end {
            let n = buffer.len().min((end - at) as usize);
            let piece = &mut buffer[..n];
            qcow2::lock(stack).read(at, piece)?;
            take(piece);
            at += n as u64;
        }
        Ok(())
    }

    /// Writes `len` bytes at `offset` of the disk, `file`, piece by piece, from pieces that `give` fills in order.
    pub(crate) fn write(
        &mut self,
        file: &File,
        offset: u64,
        len: u64,
        give: impl FnMut(&mut [u8]),
    ) -> io::Result<()> {
        match self {
            Self::Raw(bounce) => bounce.write(file, offset, len, give),
            Self::Qcow2(stack) => qcow2::lock(stack).write(offset, len, give),
        }
    }
}

/// Opens a plain file or block device whose bytes are wanted as they are, and locks it until it is closed; with its size. Its descriptor is good for
/// unaligned reads and writes.
pub fn open_plain(drive: &Drive, inherited: &Inherited) -> Result<(File, u64), BlockError> {
    let open = || {
        let file = open_locked(drive, inherited)?;
        let metadata = file.metadata().map_err(|e| Problem::Host("examine it", e))?;
        let size = length(&file, &metadata)?;
        Ok((file, size))
    };
    open().map_err(|problem| BlockError { drive: drive.id.clone(), path: drive.file.clone(), problem })
}

/// Opens, examines and locks the file of `drive`.
fn open_locked(drive: &Drive, inherited: &Inherited) -> Result<File, Problem> {
    let file = match inherited.take_path(&drive.file) {
        Some(fd) => adopt(fd, drive)?,
        None => open_path(&drive.file, drive)?,
    };
    check_kind(&file.metadata().map_err(|e| Problem::Host("examine it", e))?)?;
    lock::lock(&file, !drive.readonly)?;
    Ok(file)
}

fn length(file: &File, metadata: &std::fs::Metadata) -> Result<u64, Problem> {
    if metadata.file_type().is_block_device() {
        return rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))
            .map_err(|e| Problem::Host("find its size", e.into()));
    }
    Ok(metadata.size())
}

/// Opens a qcow2 image, and what the drive says lies under it. Returns the files under it too.
fn open_stack(
    drive: &Drive,
    inherited: &Inherited,
    file: &File,
    len: u64,
    alignment: &align::Alignment,
) -> Result<(Stack, Vec<File>), Problem> {
    let twin = |file: &File| file.try_clone().map_err(|e| Problem::Host("duplicate its descriptor", e));
    let host = |e| Problem::Host("read it", e);
    if drive.backing.len() > BACKING_MAX {
        return Err(Problem::Unsupported("so long a chain of backing files", "commit some of them"));
    }
    let caches = (drive.l2_cache_size, drive.refcount_cache_size);
    let top = Store::new(twin(file)?, len, alignment).map_err(host)?;
    let mut layers = vec![Layer::qcow2(top, !drive.readonly, caches)?];
    let mut files = Vec::new();
    for backing in &drive.backing {
        // Through the page cache: what lies under one disk often lies under others.
        let under = Drive { readonly: true, direct: false, ..Drive::new(&drive.id, &backing.file) };
        let mut open = || {
            let file = open_locked(&under, inherited)?;
            let metadata = file.metadata().map_err(host)?;
            let alignment = align::Alignment::of(&file, false, &metadata);
            let store = Store::new(twin(&file)?, length(&file, &metadata)?, &alignment).map_err(host)?;
            layers.push(match backing.format {
                ImageFormat::Raw => Layer::raw(store),
                ImageFormat::Qcow2 => Layer::qcow2(store, false, caches)?,
            });
            files.push(file);
            Ok(())
        };
        open()
            .map_err(|problem| Problem::Backing { path: backing.file.clone(), problem: Box::new(problem) })?;
    }
    Ok((Stack::new(layers)?, files))
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
            Problem::Denied { write: !drive.readonly, root: sandbox::gave_up_override() }
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
    let mut options = File::options();
    options.read(true).write(!drive.readonly);
    // Nobody asks when the guest last read something, and to note it costs a twentieth of each read. Only the file's owner may say so.
    options
        .custom_flags(flags | libc::O_NOATIME)
        .open(path)
        .or_else(|error| match error.raw_os_error() {
            Some(libc::EPERM) => options.custom_flags(flags).open(path),
            _ => Err(error),
        })
        .map_err(explain)
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
pub(crate) mod tests;
