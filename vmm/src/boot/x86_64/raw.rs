//! A raw kernel: `objcopy -O binary vmlinux`, which StratoVirt's documents call the PE format. It is copied to 16 MiB and entered there by
//! the 64-bit protocol.
//!
//! Such a file has no header: its first bytes are `startup_64`. So a file that is no kernel cannot be told for sure. What is
//! refused is what a user gives by mistake: files too small for a kernel, text, known archives, images and executables,
//! and files that begin with bytes that are no code.

use super::{CMDLINE_LIMIT, Entry, Kernel};
use crate::boot::BootError;
use crate::boot::file::BootFile;
use crate::memory::GuestMemory;

const LOAD: u64 = 0x100_0000;
/// The smallest kernels are a hundred times larger.
const MIN_SIZE: u64 = 4096;
const INITRD_LIMIT: u64 = 0x3800_0000;
/// An unpacked kernel also needs its BSS and page tables right behind it, which the file does not tell.
const SLACK: u64 = 16 << 20;

/// What files of other kinds begin with.
const OTHERS: [(&[u8], &str); 14] = [
    (b"\x1f\x8b", "gzip data: unpack it first"),
    (b"\xfd7zXZ\0", "xz data: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd data: unpack it first"),
    (b"\x02\x21\x4c\x18", "lz4 data: unpack it first"),
    (b"\x04\x22\x4d\x18", "lz4 data: unpack it first"),
    (b"BZh", "bzip2 data: unpack it first"),
    (b"\x5d\0\0", "lzma data: unpack it first"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"KDMV", "a vmdk disk image"),
    (b"PK\x03\x04", "a zip archive"),
    (b"!<arch>\n", "an archive or a Debian package"),
    (b"\xed\xab\xee\xdb", "an RPM package"),
    (b"0707", "a cpio archive: is it the initrd?"),
    (b"MZ", "an EFI or Windows program"),
];

pub(super) fn load(
    file: &mut BootFile,
    head: &[u8],
    memory: &GuestMemory,
    low_end: u64,
) -> Result<Kernel, BootError> {
    if let Some(what) = not_code(head, file.len()) {
        return Err(
            file.not_a_kernel(format!("is {what}; a bzImage, an ELF vmlinux or a raw vmlinux.bin is needed"))
        );
    }
    let end = LOAD.saturating_add(file.len());
    file.check_fits(end.saturating_add(SLACK), low_end)?;
    file.copy(0, memory, LOAD, file.len())?;
    Ok(Kernel {
        entry: Entry::Linux64(LOAD),
        header: None,
        end: end.saturating_add(SLACK),
        initrd_limit: INITRD_LIMIT,
        cmdline_limit: CMDLINE_LIMIT,
    })
}

/// Says what the file is if it is certainly no raw kernel.
fn not_code(head: &[u8], len: u64) -> Option<&'static str> {
    if len == 0 {
        return Some("empty");
    }
    if let Some((_, what)) = OTHERS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some(what);
    }
    let text = |b: &u8| matches!(b, b' '..=b'~' | b'\n' | b'\r' | b'\t') || *b >= 0x80;
    let start = &head[..head.len().min(256)];
    if std::str::from_utf8(start).is_ok() && start.iter().all(text) {
        return Some("text");
    }
    if len < MIN_SIZE {
        return Some("too small for a kernel");
    }
    // Code does not begin with a run of one byte: zeroes are an empty or sparse image, ones are erased flash.
    if start.first_chunk::<16>().is_none_or(|first| first.iter().all(|b| *b == first[0])) {
        return Some("no kernel: it begins with filler");
    }
    // A boot sector (and a bzImage without its magic) ends its first 512 bytes with this mark.
    if head.get(510..512) == Some(&[0x55, 0xaa]) {
        return Some("a disk image or a boot sector");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_users_give_by_mistake() {
        let mut disk = vec![0x33; 4096];
        (disk[0], disk[510], disk[511]) = (0xeb, 0x55, 0xaa);
        let mut gzip = vec![7; 8192];
        (gzip[0], gzip[1]) = (0x1f, 0x8b);
        for (data, expected) in [
            (&b""[..], "empty"),
            (b"#!/bin/sh\nexit 0\n", "text"),
            (&[b'a'; 8192], "text"),
            (&[0x90; 100], "too small for a kernel"),
            (&[0; 8192], "no kernel: it begins with filler"),
            (&disk, "a disk image or a boot sector"),
            (&gzip, "gzip data: unpack it first"),
        ] {
            assert_eq!(not_code(data, data.len() as u64), Some(expected));
        }
    }

    #[test]
    fn takes_the_first_bytes_of_linux() {
        // startup_64 of Linux 5.10 and 6.6: lea to the stack, call.
        for code in [
            [0x48, 0x8d, 0x25, 0x51, 0x3f, 0x60, 0x01, 0x48, 0x8d, 0x3d, 0xf2, 0xff, 0xff, 0xff, 0x56, 0xe8],
            [0x49, 0x89, 0xf7, 0x48, 0x8d, 0x25, 0x7e, 0x3f, 0x40, 0x02, 0xb9, 0x01, 0x01, 0x00, 0xc0, 0x48],
        ] {
            let mut data = code.repeat(300);
            data[16] = 0;
            assert_eq!(not_code(&data, data.len() as u64), None);
        }
    }
}
