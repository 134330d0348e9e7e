//! The first disk of a VM that is made from an image: owns what is read of the image, and how a disk comes of it.
//!
//! ```text
//! the image is    the file system shares blocks, or a copy is asked for     neither
//! raw             it, in the VM's directory, grown                           an empty qcow2 over the image where it is
//! qcow2           it, in the VM's directory; to grow, an empty qcow2 over it the same
//! ```
//!
//! An image that a disk lies over must stay as it is for as long as the VM is there; the VM's definition names it as `backing`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use dbus_api::spec::{Disk, Format, Size};

use super::{copy, overlay, qcow2, record};
use crate::fleet::FleetError;
use crate::fleet::spec::{check_path, plain};

/// Far above any disk there is, far below what sums of sizes overflow at.
const SIZE_MAX: u64 = 64 << 40;
/// Where a qcow2 header says that it lies over another image.
const BACKING_AT: std::ops::Range<usize> = 8..16;

/// An image that was looked at.
#[derive(Debug)]
pub(super) struct Image {
    path: PathBuf,
    file: File,
    format: Format,
    /// Bytes of the disk in it.
    own: u64,
    /// Bytes of the disk to be.
    size: u64,
}

/// Looks at an image. Without `format`, what it is is read from its first bytes: the VMM opens no file that a header names, so one that lies
/// is only a disk that cannot be read.
pub(super) fn look(path: &Path, format: Option<Format>, size: Option<u64>) -> Result<Image, FleetError> {
    let wrong = |text: String| FleetError::InvalidSpec(format!("image: {}: {text}", path.display()));
    check_path("image", path)?;
    let (_, file) = crate::fleet::prepare::open("image", path, false, false)?;
    let file = File::from(file);
    let kind = file.metadata().map_err(|error| wrong(plain(&error)))?.file_type();
    if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
        return Err(wrong("it is not a regular file or block device".to_owned()));
    }
    let mut head = [0; 32];
    let got = file.read_at(&mut head, 0).map_err(|error| wrong(plain(&error)))?;
    let inner = qcow2::size_of(&head[..got]);
    let (format, own) = match (format, inner) {
        (Some(Format::Qcow2), None) => return Err(wrong("it is no qcow2 image".to_owned())),
        (Some(Format::Qcow2) | None, Some(own)) => {
            if head[BACKING_AT] != [0; 8] {
                return Err(wrong(
                    "it lies over another image: make one of both (qemu-img convert)".to_owned(),
                ));
            }
            (Format::Qcow2, own)
        }
        (Some(Format::Raw), _) | (None, None) => {
            (Format::Raw, copy::length(&file).map_err(|error| wrong(plain(&error)))?)
        }
    };
    if !(512..=SIZE_MAX).contains(&own) {
        return Err(wrong(format!("a disk of {own} bytes")));
    }
    let size = size.unwrap_or(own);
    if !(own..=SIZE_MAX).contains(&size) {
        return Err(FleetError::InvalidSpec(format!(
            "size: {} is outside {} (what is in the image) to {}",
            Size(size),
            Size(own),
            Size(SIZE_MAX)
        )));
    }
    Ok(Image { path: path.to_owned(), file, format, own, size })
}

/// Makes the disk in `home`, and syncs it. `whole`: it is to need the image no more, whatever that takes. `told` hears of bytes done and all, and
/// may end it.
pub(super) fn make(
    image: &Image,
    whole: bool,
    home: &Path,
    mut told: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<Disk> {
    let own = home.join(format!("image.{}", image.format.word()));
    let to = record::create(&own)?;
    let shared = copy::reflink(&image.file, &to)?;
    if !shared && !whole {
        drop(to);
        fs::remove_file(&own)?;
        return over(image, image.path.clone(), home);
    }
    if !shared {
        let length = copy::length(&image.file)?;
        copy::copy(&image.file, &to, |done| told(done, length))?;
    }
    if image.format == Format::Raw && image.size > image.own {
        to.set_len(image.size)?;
    }
    to.sync_all()?;
    if image.format == Format::Qcow2 && image.size > image.own {
        return over(image, own, home);
    }
    Ok(Disk { format: image.format, ..Disk::new(own) })
}

/// A disk that is empty but for the image under it. What lies beyond that one's end is zero.
fn over(image: &Image, under: PathBuf, home: &Path) -> io::Result<Disk> {
    let path = home.join("disk0.qcow2");
    overlay::over(&path, image.size, &under, image.format)?;
    Ok(Disk { format: Format::Qcow2, backing: Some(under), backing_format: image.format, ..Disk::new(path) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with a raw image of 1 MiB, and a qcow2 one of a disk of that size.
    fn images() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (raw, layered) = (dir.path().join("raw"), dir.path().join("layered.qcow2"));
        fs::write(&raw, vec![7; 1 << 20]).unwrap();
        overlay::over(&layered, 1 << 20, &raw, Format::Raw).unwrap();
        // The same without what it lies over.
        let mut bytes = fs::read(&layered).unwrap();
        bytes[BACKING_AT].fill(0);
        let qcow2 = dir.path().join("own.qcow2");
        fs::write(&qcow2, bytes).unwrap();
        (dir, raw, qcow2)
    }

    #[test]
    fn what_an_image_is_can_be_read_or_said() {
        let (dir, raw, qcow2) = images();
        for (path, said, size, want) in [
            (&raw, None, None, Ok((Format::Raw, 1 << 20))),
            (&raw, Some(Format::Raw), Some(2 << 20), Ok((Format::Raw, 2 << 20))),
            (&raw, Some(Format::Qcow2), None, Err("no qcow2 image")),
            (&qcow2, None, Some(1 << 30), Ok((Format::Qcow2, 1 << 30))),
            (&qcow2, Some(Format::Raw), None, Ok((Format::Raw, 4 << 16))),
            (&qcow2, None, Some(512 << 10), Err("size: 512K is outside 1M")),
            (&raw, None, Some(u64::MAX), Err("size:")),
            (&dir.path().join("layered.qcow2"), None, None, Err("lies over another image")),
            (&dir.path().join("none"), None, None, Err("none: no such file")),
            (&dir.path().to_owned(), None, None, Err("not a regular file")),
            (&PathBuf::from("raw"), None, None, Err("not an absolute path")),
        ] {
            match (look(path, said, size), want) {
                (Ok(image), Ok(want)) => assert_eq!((image.format, image.size), want),
                (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{error}"),
                (found, want) => panic!("{}: {found:?}, not {want:?}", path.display()),
            }
        }
        fs::write(dir.path().join("empty"), "").unwrap();
        assert!(look(&dir.path().join("empty"), None, None).is_err());
    }

    #[test]
    fn a_disk_is_as_large_as_asked_for_and_needs_the_image_or_not() {
        let (dir, raw, qcow2) = images();
        for (at, (path, size, whole)) in [
            (&raw, None, true),
            (&raw, Some(3 << 20), true),
            (&qcow2, None, true),
            (&qcow2, Some(3 << 20), true),
            (&raw, Some(3 << 20), false),
            (&qcow2, None, false),
        ]
        .into_iter()
        .enumerate()
        {
            let home = dir.path().join(format!("vm{at}"));
            fs::create_dir(&home).unwrap();
            let image = look(path, None, size).unwrap();
            let disk = make(&image, whole, &home, |_, _| Ok(())).unwrap();
            assert!(disk.path.starts_with(&home));
            // A file system that shares blocks makes every one of them whole.
            let leans = disk.backing.as_ref().is_some_and(|under| !under.starts_with(&home));
            assert!(!(whole && leans), "{disk:?}");
            if !whole && leans {
                assert_eq!((disk.backing.as_ref(), disk.backing_format), (Some(path), image.format));
            }
            let bytes = fs::read(&disk.path).unwrap();
            match disk.format {
                Format::Raw => {
                    assert_eq!(bytes.len() as u64, size.unwrap_or(1 << 20));
                    assert_eq!((bytes[0], bytes[(1 << 20) - 1]), (7, 7));
                }
                Format::Qcow2 => assert_eq!(qcow2::size_of(&bytes), Some(size.unwrap_or(1 << 20))),
            }
        }
    }
}
