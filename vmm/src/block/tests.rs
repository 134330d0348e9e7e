//! Opening, locking and refusing, on real files.

use std::os::fd::IntoRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;

fn drive(path: &Path) -> Drive {
    Drive { direct: false, ..Drive::new("rootfs", path) }
}

fn open(drive: &Drive) -> Result<Disk, BlockError> {
    Disk::open(drive, &Inherited::default())
}

/// How long an image that was let go may stay locked: a child that another test makes at that moment has the lock too, until it runs
/// its program.
const LET_GO: Duration = Duration::from_secs(20);

/// Opens an image that was let go a moment ago.
pub(crate) fn reopen(drive: &Drive) -> Disk {
    let end = Instant::now() + LET_GO;
    loop {
        match open(drive) {
            Err(error) if matches!(error.problem, Problem::InUse) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result.unwrap(),
        }
    }
}

fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

#[test]
fn what_cannot_be_a_disk_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let empty = image(511);
    let cases = [
        (dir.path().join("none"), "no such file"),
        (dir.path().to_owned(), "is a directory"),
        (fifo, "is a pipe"),
        ("/dev/null".into(), "is a character device"),
        (empty.path().to_owned(), "is empty"),
        (empty.path().join("x"), "cannot open it"),
    ];
    for (path, problem) in cases {
        let text = open(&drive(&path)).unwrap_err().to_string();
        assert!(text.starts_with(&format!("drive \"rootfs\": {}: ", path.display())), "{text}");
        assert!(text.contains(problem), "{text}");
    }
    let file = image(512);
    let qcow2 = Drive { format: ImageFormat::Qcow2, ..drive(file.path()) };
    assert!(open(&qcow2).unwrap_err().to_string().contains("is not a qcow2 image"));
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let file = image(4096);
    let (writer, reader) = (drive(file.path()), Drive { readonly: true, ..drive(file.path()) });
    let first = open(&writer).unwrap();
    for second in [&writer, &reader] {
        let text = open(second).unwrap_err().to_string();
        assert!(text.contains("in use by another process"), "{text}");
    }
    drop(first);
    let readers = [reopen(&reader), open(&reader).unwrap()];
    assert!(matches!(open(&writer).unwrap_err().problem, Problem::InUse));
    drop(readers);
    reopen(&writer);
}

#[test]
fn the_guest_sees_whole_blocks() {
    let file = image(4096 + 700);
    let disk = open(&drive(file.path())).unwrap();
    assert_eq!((disk.size(), disk.block_size(), disk.read_only()), (4096 + 512, 512, false));
    disk.flush().unwrap();
}

#[test]
fn an_inherited_descriptor_stands_for_the_path() {
    let file = image(4096);
    let hidden = Path::new("/nowhere/to/be/found.img");
    let inherit = |writable: bool| {
        let mut options = File::options();
        options.read(true).write(writable).custom_flags(libc::O_NONBLOCK);
        let fd = options.open(file.path()).unwrap().into_raw_fd();
        let table = format!(r#"[{{"fd":{fd},"path":"{}"}}]"#, hidden.display());
        Inherited::parse(&table).unwrap()
    };
    let disk = Disk::open(&drive(hidden), &inherit(true)).unwrap();
    let flags = rustix::fs::fcntl_getfl(disk.file()).unwrap();
    assert!(!flags.intersects(OFlags::NONBLOCK | OFlags::DIRECT));
    drop(disk);
    let error = Disk::open(&drive(hidden), &inherit(false)).unwrap_err();
    assert!(matches!(error.problem, Problem::DescriptorReadOnly));
    let reader = Drive { readonly: true, ..drive(hidden) };
    Disk::open(&reader, &inherit(false)).unwrap();
}

#[test]
fn permissions_are_explained() {
    let file = image(512);
    if rustix::process::geteuid().is_root() {
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(file.path(), Some(65534), Some(65534)).unwrap();
        open(&drive(file.path())).unwrap();
        // Capabilities are a thread's own: this is what root can do once the VM runs.
        let text = std::thread::scope(|scope| {
            let confined = scope.spawn(|| {
                sandbox::confine(sandbox::Needs::default()).unwrap();
                open(&drive(file.path())).unwrap_err().to_string()
            });
            confined.join().unwrap()
        });
        return assert!(text.contains("root gave up its right") && text.contains("chown root"), "{text}");
    }
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o400)).unwrap();
    assert!(matches!(
        open(&drive(file.path())).unwrap_err().problem,
        Problem::Denied { write: true, root: false }
    ));
}

/// Its tools must see our locks: the bytes are part of the interface.
#[test]
fn qemu_respects_our_locks() {
    let file = image(1 << 20);
    // A raw image that it only reads it lets others write, so what it writes is what counts.
    let writes = || {
        let mut command = std::process::Command::new("qemu-img");
        let command = command.args(["bench", "-w", "-c", "1", "-f", "raw"]).arg(file.path());
        command.output().unwrap().status.success()
    };
    let writer = open(&drive(file.path())).unwrap();
    assert!(!writes(), "one writer");
    drop(writer);
    let reader = reopen(&Drive { readonly: true, ..drive(file.path()) });
    assert!(!writes(), "nobody writes what is being read");
    drop(reader);
    let end = Instant::now() + LET_GO;
    while !writes() {
        assert!(Instant::now() < end, "nobody holds it");
    }
}
