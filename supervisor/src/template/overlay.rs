//! A clone's disks: owns which image each of them is, and makes it.
//!
//! ```text
//! the template's disk is     the file system shares blocks       it does not
//! read-only                  itself                              itself
//! raw, qcow2                 a reflink                           an empty qcow2 over it
//! qcow2 over something       a reflink                           a copy (a chain has two images)
//! ```

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;

use dbus_api::spec::{Disk, Format};

use super::{copy, qcow2, record};

/// Makes the image of disk `at` of a clone in `home`, from that of the template in `base`; not durable yet. `disk` is the template's.
pub(super) fn make(disk: &Disk, at: usize, base: &Path, home: &Path) -> io::Result<Disk> {
    let under = base.join(record::disk(at));
    if disk.readonly {
        return Ok(Disk { path: under, ..disk.clone() });
    }
    let from = File::open(&under)?;
    let path = home.join(format!("{}.{}", record::disk(at), disk.format.word()));
    let to = record::create(&path)?;
    let shared = copy::reflink(&from, &to)?;
    if !shared && disk.backing.is_some() {
        copy::copy(&from, &to, |_| Ok(()))?;
    }
    if shared || disk.backing.is_some() {
        return Ok(Disk { path, ..disk.clone() });
    }
    drop(to);
    std::fs::remove_file(&path)?;
    let size = match disk.format {
        Format::Raw => copy::length(&from)?,
        Format::Qcow2 => {
            let mut head = [0; 32];
            (&from).read_exact(&mut head)?;
            let none = || io::Error::new(io::ErrorKind::InvalidData, "is no qcow2 image");
            qcow2::size_of(&head).ok_or_else(none)?
        }
    };
    let path = home.join(format!("{}.qcow2", record::disk(at)));
    over(&path, size, &under, disk.format)?;
    Ok(Disk {
        path,
        format: Format::Qcow2,
        backing: Some(under),
        backing_format: disk.format,
        ..disk.clone()
    })
}

/// Makes an empty qcow2 image of a disk of `size` bytes over another image; not durable yet.
pub(super) fn over(path: &Path, size: u64, under: &Path, format: Format) -> io::Result<()> {
    // A disk ends with its last whole sector.
    let image = qcow2::overlay(size - size % 512, under, format).map_err(io::Error::other)?;
    record::create(path)?.write_all(&image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_disk() {
        let home = tempfile::tempdir().unwrap();
        let (base, own) = (home.path().join("base"), home.path().join("own"));
        for place in [&base, &own] {
            std::fs::create_dir(place).unwrap();
        }
        std::fs::write(base.join("disk0"), [1; 1024]).unwrap();
        std::fs::write(base.join("disk1"), [2; 1024]).unwrap();
        let over = qcow2::overlay(4096, Path::new("/b"), Format::Raw).unwrap();
        std::fs::write(base.join("disk2"), &over).unwrap();
        let disk =
            |format, readonly| Disk { format, readonly, serial: Some("s".into()), ..Disk::new("/old") };

        let whole = make(&disk(Format::Raw, true), 0, &base, &own).unwrap();
        assert_eq!((whole.path, whole.readonly), (base.join("disk0"), true));
        let made = make(&disk(Format::Raw, false), 1, &base, &own).unwrap();
        assert_eq!((made.serial.as_deref(), made.path.starts_with(&own)), (Some("s"), true));
        if made.backing.is_some() {
            // No reflinks here.
            assert_eq!(
                (made.format, made.backing, made.backing_format),
                (Format::Qcow2, Some(base.join("disk1")), Format::Raw)
            );
            let head = std::fs::read(&made.path).unwrap();
            assert_eq!(qcow2::size_of(&head), Some(1024));
        } else {
            assert_eq!(std::fs::read(&made.path).unwrap(), [2; 1024]);
        }
        let chained = Disk { backing: Some("/b".into()), ..disk(Format::Qcow2, false) };
        let made = make(&chained, 2, &base, &own).unwrap();
        assert_eq!((made.format, made.backing), (Format::Qcow2, Some("/b".into())));
        assert!(std::fs::read(&made.path).unwrap() == over);
        assert!(make(&disk(Format::Raw, false), 7, &base, &own).is_err());
        assert!(make(&disk(Format::Raw, false), 1, &base, &own).is_err(), "what is there is not overwritten");
    }
}
