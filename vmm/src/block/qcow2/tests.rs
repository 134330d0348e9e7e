//! Our images against a flat model, and against `qemu-img` (package qemu-utils): it makes them, checks them, and reads them back.

use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::block::tests::reopen;
use crate::block::{Disk, Op};
use crate::config::{Aio, BackingImage, Drive, ImageFormat};
use crate::inherit::Inherited;

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    text
}

/// Nothing wrong; leaked clusters too only with `strict`.
fn check(path: &Path, strict: bool) {
    let output = Command::new("qemu-img").args(["check", "-U", "-f", "qcow2"]).arg(path).output().unwrap();
    let code = output.status.code().unwrap();
    let fine = code == 0 || (code == 3 && !strict);
    assert!(
        fine,
        "{code}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

struct Lab {
    dir: TempDir,
    drive: Drive,
}

impl Lab {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let drive = Drive {
            format: ImageFormat::Qcow2,
            direct: false,
            discard: true,
            aio: Some(Aio::Off),
            ..Drive::new("d", path)
        };
        Self { dir, drive }
    }

    fn create(options: &str, size: u64) -> Self {
        let lab = Self::new();
        let path = lab.drive.file.to_str().unwrap().to_owned();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &path, &size.to_string()]);
        lab
    }

    fn open(&self) -> Disk {
        Disk::open(&self.drive, &Inherited::default()).unwrap()
    }

    fn refused(&self) -> String {
        Disk::open(&self.drive, &Inherited::default()).unwrap_err().to_string()
    }

    /// What qemu reads.
    fn content(&self) -> Vec<u8> {
        let raw = self.path("raw");
        let (from, to) = (self.drive.file.to_str().unwrap(), raw.to_str().unwrap());
        qemu_img(&["convert", "-q", "-U", "-f", "qcow2", "-O", "raw", from, to]);
        std::fs::read(raw).unwrap()
    }
}

/// A driver of one request at a time.
struct Runner {
    // Dropped first.
    engine: Box<dyn crate::block::Engine>,
    disk: Disk,
}

impl Runner {
    fn new(disk: Disk) -> Self {
        Self { engine: disk.engine(16), disk }
    }

    /// Carries one request through, in as many pieces as the engine likes.
    fn run(
        &mut self,
        offset: u64,
        buffer: &mut [u8],
        op: impl Fn(&[libc::iovec]) -> Op<'_>,
    ) -> io::Result<()> {
        let mut done = 0;
        loop {
            // Odd parts, so that runs end inside them; not more than the kernel takes.
            let part = 700.max(buffer.len() / 500);
            let parts: Vec<libc::iovec> = buffer[done..]
                .chunks_mut(part)
                .map(|c| libc::iovec { iov_base: c.as_mut_ptr().cast(), iov_len: c.len() })
                .collect();
            // SAFETY: the buffers outlive the request, which is waited for.
            let at_once = unsafe { self.engine.push(3, op(&parts), offset + done as u64) }.unwrap();
            self.engine.submit().unwrap();
            let n = loop {
                if let Some(n) = at_once {
                    break n as usize;
                }
                if let Some((3, result)) = self.engine.reap() {
                    break result? as usize;
                }
                if let Some(fd) = self.engine.ready() {
                    let _ = rustix::event::poll(
                        &mut [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)],
                        None,
                    );
                }
            };
            done += n;
            if done >= buffer.len() {
                return Ok(());
            }
            assert!(n > 0);
        }
    }

    /// As the device does with buffers that the kernel would refuse.
    fn needs_around(&self, offset: u64, bytes: &[u8]) -> bool {
        let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: 700.min(bytes.len()) };
        self.disk.needs_bounce(&[part], offset)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.needs_around(offset, bytes) {
            let mut at = 0;
            let give = |piece: &mut [u8]| {
                piece.copy_from_slice(&bytes[at..at + piece.len()]);
                at += piece.len();
            };
            return self.disk.around()?.write(self.disk.file(), offset, bytes.len() as u64, give);
        }
        self.run(offset, &mut bytes.to_vec(), |parts| Op::Write { parts, durable: false })
    }

    fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0xee; len];
        if self.needs_around(offset, &buffer) {
            let mut at = 0;
            self.disk.around()?.read(self.disk.file(), offset, len as u64, |piece| {
                buffer[at..at + piece.len()].copy_from_slice(piece);
                at += piece.len();
            })?;
            return Ok(buffer);
        }
        self.run(offset, &mut buffer, |parts| Op::Read(parts))?;
        Ok(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.run(0, &mut [], |_| Op::Flush)
    }

    fn zero(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.run(offset, &mut [], |_| Op::Zero { len, unmap })
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.run(offset, &mut [], |_| Op::Discard { len })
    }

    fn close(self) {
        drop(self.engine);
        self.disk.flush().unwrap();
    }
}

#[derive(Debug, Clone)]
enum Act {
    Write(u64, u64),
    Read(u64, u64),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Reopen,
    /// Through `qemu-img snapshot`.
    Snapshot,
}

const SIZE: u64 = 3 << 20;

fn range() -> impl Strategy<Value = (u64, u64)> {
    let sectors = SIZE / 512;
    (0..sectors, prop_oneof![3 => 1u64..16, 2 => 1u64..300, 1 => 1u64..3000])
        .prop_map(move |(at, n)| (at * 512, n.min(sectors - at) * 512))
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        8 => range().prop_map(|(at, n)| Act::Write(at, n)),
        4 => range().prop_map(|(at, n)| Act::Read(at, n)),
        2 => (range(), any::<bool>()).prop_map(|((at, n), u)| Act::Zero(at, n, u)),
        2 => range().prop_map(|(at, n)| Act::Discard(at, n)),
        1 => Just(Act::Flush),
        1 => Just(Act::Reopen),
        1 => Just(Act::Snapshot),
    ];
    prop::collection::vec(act, 1..60)
}

fn play(lab: &Lab, acts: &[Act], mut model: Vec<u8>, has_backing: bool) {
    let path = lab.drive.file.to_str().unwrap();
    let mut runner = Runner::new(lab.open());
    let mut snapshots = Vec::new();
    let mut stamp = 0u8;
    for act in acts {
        let place = |at: &u64, n: &u64| *at as usize..(*at + *n) as usize;
        match act {
            Act::Write(at, n) => {
                stamp = stamp.wrapping_add(1);
                let bytes: Vec<u8> = (0..*n).map(|i| stamp ^ (i / 512) as u8).collect();
                runner.write(*at, &bytes).unwrap();
                model[place(at, n)].copy_from_slice(&bytes);
            }
            Act::Read(at, n) => assert!(runner.read(*at, *n as usize).unwrap() == model[place(at, n)]),
            Act::Zero(at, n, unmap) => {
                runner.zero(*at, *n, *unmap).unwrap();
                model[place(at, n)].fill(0);
            }
            Act::Discard(at, n) => {
                runner.discard(*at, *n).unwrap();
                let now = runner.read(*at, *n as usize).unwrap();
                // Zeroes or as before, sector by sector.
                for (sector, bytes) in now.chunks(512).enumerate() {
                    let from = *at as usize + sector * 512;
                    assert!(bytes == &model[from..from + 512] || bytes.iter().all(|b| *b == 0));
                }
                model[place(at, n)].copy_from_slice(&now);
            }
            Act::Flush => {
                runner.flush().unwrap();
                // As a crash right now would leave it.
                let copy = lab.path("crashed");
                std::fs::copy(&lab.drive.file, &copy).unwrap();
                if !has_backing {
                    check(&copy, false);
                }
            }
            Act::Reopen => {
                runner.close();
                check(&lab.drive.file, true);
                runner = Runner::new(lab.open());
            }
            Act::Snapshot => {
                runner.close();
                qemu_img(&["snapshot", "-c", &format!("s{}", snapshots.len()), path]);
                snapshots.push(model.clone());
                runner = Runner::new(lab.open());
            }
        }
    }
    assert!(runner.read(0, SIZE as usize).unwrap() == model);
    runner.close();
    check(&lab.drive.file, true);
    assert!(lab.content() == model);
    for (number, model) in snapshots.iter().enumerate() {
        qemu_img(&["snapshot", "-a", &format!("s{number}"), path]);
        assert!(&lab.content() == model, "snapshot {number}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: std::env::var("QCOW2_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(12), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_requests_leave_what_a_flat_disk_would(
        acts in acts(),
        cluster_bits in prop_oneof![Just(9u32), Just(12), Just(16), Just(21)],
        compat in 0usize..2,
        order in 0u32..7,
        uring: bool,
        tiny_caches: bool,
        direct: bool,
    ) {
        let bits = if compat == 0 { 16 } else { 1 << order };
        // A snapshot needs to count to two and more.
        let acts: Vec<Act> = acts.into_iter().filter(|a| bits >= 8 || !matches!(a, Act::Snapshot)).collect();
        let compat = ["0.10", "1.1"][compat];
        let options = format!("compat={compat},cluster_size={},refcount_bits={bits}", 1 << cluster_bits);
        let mut lab = Lab::create(&options, SIZE);
        lab.drive.aio = Some(if uring { Aio::IoUring } else { Aio::Off });
        // Where the file system has it, and blocks are not larger than clusters.
        let with_direct = Drive { direct, aio: Some(Aio::IoUring), ..lab.drive.clone() };
        if direct && Disk::open(&with_direct, &Inherited::default()).is_ok() {
            lab.drive = with_direct;
        }
        if tiny_caches {
            (lab.drive.l2_cache_size, lab.drive.refcount_cache_size) = (Some(0), Some(0));
        }
        play(&lab, &acts, vec![0; SIZE as usize], false);
    }

    #[test]
    fn and_over_a_backing_file(acts in acts(), raw: bool, compressed: bool, old: bool) {
        let mut lab = Lab::new();
        let base = lab.path("base");
        // Shorter than the disk, and not a whole cluster.
        let bytes: Vec<u8> = (0..SIZE / 2 + 512).map(|i| (i / 512 % 251) as u8 | 1).collect();
        std::fs::write(&base, &bytes).unwrap();
        let mut format = ImageFormat::Raw;
        let mut under = base.clone();
        if !raw {
            format = ImageFormat::Qcow2;
            under = lab.path("base.qcow2");
            let flags = if compressed { "-cq" } else { "-q" };
            let (from, to) = (base.to_str().unwrap(), under.to_str().unwrap());
            qemu_img(&["convert", flags, "-f", "raw", "-O", "qcow2", from, to]);
        }
        let name = if raw { "raw" } else { "qcow2" };
        let compat = if old { "compat=0.10" } else { "compat=1.1" };
        let (file, under_name) = (lab.drive.file.to_str().unwrap(), under.to_str().unwrap());
        let size = SIZE.to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", compat, "-b", under_name, "-F", name, file, &size]);
        lab.drive.backing = vec![BackingImage { file: under.clone(), format }];
        let before = std::fs::read(&under).unwrap();
        let mut model = bytes;
        model.resize(SIZE as usize, 0);
        play(&lab, &acts, model, true);
        prop_assert!(std::fs::read(&under).unwrap() == before);
    }

    #[test]
    fn damaged_images_are_refused_or_fail_and_never_more(
        damage in prop::collection::vec((0usize..0x60000, any::<u8>()), 1..12),
        header in prop::collection::vec((0usize..120, any::<u8>()), 0..3),
        acts in acts(),
    ) {
        let lab = Lab::create("cluster_size=4096", SIZE);
        let mut runner = Runner::new(lab.open());
        runner.write(4096, &[7; 40960]).unwrap();
        runner.close();
        let mut bytes = std::fs::read(&lab.drive.file).unwrap();
        for (at, value) in damage.into_iter().chain(header) {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        std::fs::write(&lab.drive.file, bytes).unwrap();
        let Ok(disk) = Disk::open(&lab.drive, &Inherited::default()) else { return Ok(()) };
        let size = disk.size();
        let mut runner = Runner::new(disk);
        for act in acts {
            let fits = |at: u64, n: u64| at + n <= size;
            let _ = match act {
                Act::Write(at, n) if fits(at, n) => runner.write(at, &vec![9; n as usize]),
                Act::Read(at, n) if fits(at, n) => runner.read(at, n as usize).map(drop),
                Act::Zero(at, n, unmap) if fits(at, n) => runner.zero(at, n, unmap),
                Act::Discard(at, n) if fits(at, n) => runner.discard(at, n),
                Act::Flush => runner.flush(),
                _ => Ok(()),
            };
        }
    }

    #[test]
    fn any_bytes_can_be_unpacked_or_not(input in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = inflate::inflate(&input, &mut [0; 4096]);
    }
}

#[test]
fn compressed_images_read_as_what_was_compressed() {
    let lab = Lab::new();
    let raw = lab.path("source");
    // Text, noise (stored blocks) and runs.
    let mut state = 1u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let mut bytes = include_str!("stack.rs").repeat(12).into_bytes();
    bytes.extend((0..200_000).map(|_| noise()));
    bytes.extend((0..200_000u32).map(|i| (i / 1000) as u8));
    bytes.extend((0..200_000).map(|_| noise() & 3));
    bytes.resize(1 << 20, 0);
    std::fs::write(&raw, &bytes).unwrap();
    let (from, to) = (raw.to_str().unwrap(), lab.drive.file.to_str().unwrap());
    for cluster in ["512", "65536", "2097152"] {
        let options = format!("cluster_size={cluster}");
        qemu_img(&["convert", "-cq", "-f", "raw", "-O", "qcow2", "-o", &options, from, to]);
        let mut runner = Runner::new(lab.open());
        assert!(runner.read(0, bytes.len()).unwrap() == bytes, "{cluster}");
        // Written over, in part.
        runner.write(512, &[1; 1024]).unwrap();
        runner.close();
        check(&lab.drive.file, true);
        let mut want = bytes.clone();
        want[512..1536].fill(1);
        assert!(lab.content()[..want.len()] == want);
    }
}

#[test]
fn what_cannot_be_used_is_refused_in_words() {
    type Spoil = fn(&mut Vec<u8>);
    let cases: [(Spoil, bool, &str); 13] = [
        (|b| b[0] = 0, false, "is not a qcow2 image"),
        (|b| b.truncate(60), false, "cut off"),
        (|b| b[7] = 4, false, "version 4"),
        (|b| b[23] = 30, false, "cluster size"),
        (|b| b[35] = 1, false, "encryption is not supported"),
        (|b| b[79] = 1, true, "was not closed properly"),
        (|b| b[79] = 2, true, "marked as damaged"),
        (|b| b[79] = 4, false, "external data file is not supported"),
        (|b| b[79] = 16, false, "extended L2"),
        (|b| b[79] = 0x40, false, "feature bits 0x40"),
        (|b| b[99] = 7, false, "refcount width"),
        (|b| b[47] = 1, false, "L1 table offset"),
        (|b| b[39] = 0, false, "L1 table size"),
    ];
    let lab = Lab::create("compat=1.1", 1 << 30);
    let good = std::fs::read(&lab.drive.file).unwrap();
    for (spoil, reader_may, problem) in cases {
        let mut bytes = good.clone();
        spoil(&mut bytes);
        std::fs::write(&lab.drive.file, bytes).unwrap();
        let text = lab.refused();
        assert!(text.contains(problem), "{text}");
        let reader = Drive { readonly: true, ..lab.drive.clone() };
        assert_eq!(Disk::open(&reader, &Inherited::default()).is_ok(), reader_may, "{problem}");
    }
    std::fs::write(&lab.drive.file, good).unwrap();
    // Backing files: not by the header's word, not missing, not behind our back.
    let base = lab.path("base");
    std::fs::write(&base, [1; 4096]).unwrap();
    let (file, under) = (lab.drive.file.to_str().unwrap(), base.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", under, "-F", "raw", file]);
    assert!(lab.refused().contains("has a backing file"));
    let mut lab = lab;
    lab.drive.backing = vec![BackingImage { file: lab.path("nowhere"), format: ImageFormat::Raw }];
    assert!(lab.refused().contains("nowhere: no such file"));
    lab.drive.backing = vec![BackingImage { file: base.clone(), format: ImageFormat::Qcow2 }];
    assert!(lab.refused().contains("is not a qcow2 image"));
    lab.drive.backing = vec![BackingImage { file: lab.drive.file.clone(), format: ImageFormat::Qcow2 }];
    assert!(lab.refused().contains("in use"), "no loops: the top is locked");
    lab.drive.backing = vec![BackingImage { file: base.clone(), format: ImageFormat::Raw }];
    let disk = lab.open();
    let writer = Drive { direct: false, ..Drive::new("w", &base) };
    assert!(Disk::open(&writer, &Inherited::default()).unwrap_err().to_string().contains("in use"));
    drop(disk);
    reopen(&writer);
}

#[test]
fn the_way_of_the_fuzz_target_works() {
    let lab = Lab::create("cluster_size=512", 65536);
    let image = std::fs::read(&lab.drive.file).unwrap();
    let requests =
        [[1, 0, 0, 0, 3, 9], [3, 0, 0, 0, 4, 2], [4, 0, 0, 0, 5, 3], [5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 20]];
    assert_eq!(crate::block::fuzz::qcow2(&image, true, requests.as_flattened()), Some(5));
    assert_eq!(crate::block::fuzz::qcow2(&image, false, requests.as_flattened()), Some(5));
    for len in (0..image.len()).step_by(97) {
        let _ = crate::block::fuzz::qcow2(&image[..len], true, requests.as_flattened());
    }
}
