//! The directory of a snapshot: owns that it is there as a whole or not at all.
//!
//! ```text
//!   Draft::create ─▶ DIR.partial-XXXXXXXX ─▶ write_memory ─▶ finish: state, sync, rename ─▶ DIR
//!                            └─ dropped, or killed: removed by the drop, or by the next save to DIR
//! ```
//!
//! A kill leaves the directory of a draft. Its file `memory` was locked by the one who wrote it, so the next one can tell. Two that begin
//! at the same time may take each other's drafts for such ones while they are being made: whoever finds that its own has gone makes another.
//!
//! A client that may reach places that this process may not gives two open files instead of a directory: then it is the client that gives them
//! their names when both are complete, and removes them when they are not.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags};

use super::sections::{FILE_MAX, Format, Sections, StateWriter};
use super::{Pages, SnapshotError, pages};
use crate::inherit::Inherited;
use crate::memory::GuestMemory;

const STATE: &str = "state";
const MEMORY: &str = "memory";
const PARTIAL: &str = ".partial-";
/// Hexadecimal digits that follow.
const UNIQUE: usize = 8;
/// How often a draft may be lost while it is being made.
const ATTEMPTS: usize = 100;

fn host<'a>(path: &'a Path, what: &'static str) -> impl Fn(io::Error) -> SnapshotError + use<'a> {
    move |source| SnapshotError::Host { path: path.into(), what, source }
}

fn place(path: &Path, problem: &'static str) -> SnapshotError {
    SnapshotError::Place { path: path.into(), problem }
}

/// Where a snapshot is to be.
#[derive(Debug)]
pub enum Target {
    /// In this directory.
    Directory(PathBuf),
    /// In two files that are open for writing, and empty.
    Files {
        /// What will be the file `state`.
        state: File,
        /// What will be the file `memory`.
        memory: File,
    },
}

/// A snapshot in the making.
pub struct Draft {
    target: PathBuf,
    home: Home,
    memory: File,
    placed: bool,
}

/// Where a snapshot is made.
enum Home {
    /// In a directory beside its place.
    Beside(PathBuf),
    /// In files that were given: this is that of the state.
    Given(File),
}

impl Draft {
    /// Begins a snapshot that is to be `target`: a path that does not exist, an empty directory, or a snapshot, which stays as it is
    /// until the new one is complete.
    pub fn create(target: &Target) -> Result<Self, SnapshotError> {
        match target {
            Target::Directory(path) => Self::beside(path),
            Target::Files { state, memory } => Self::given(state, memory),
        }
    }

    /// In files whose names are somebody else's business.
    fn given(state: &File, memory: &File) -> Result<Self, SnapshotError> {
        // For messages only.
        let target = PathBuf::from("fd");
        let take = |file: &File, name: &str| {
            let path = target.join(name);
            let data = file.metadata().map_err(host(&path, "look at it"))?;
            let flags = rustix::fs::fcntl_getfl(file).map_err(|e| host(&path, "look at it")(e.into()))?;
            if !data.is_file() || data.len() != 0 || flags & OFlags::RWMODE == OFlags::RDONLY {
                return Err(place(&path, "is no empty plain file that is open for writing"));
            }
            file.try_clone().map_err(host(&path, "duplicate its descriptor"))
        };
        let (state, memory) = (take(state, STATE)?, take(memory, MEMORY)?);
        Ok(Self { target, home: Home::Given(state), memory, placed: false })
    }

    fn beside(target: &Path) -> Result<Self, SnapshotError> {
        let target = match std::fs::symlink_metadata(target) {
            // The directory itself is what will be replaced.
            Ok(data) if data.is_symlink() => {
                std::fs::canonicalize(target).map_err(host(target, "follow the link"))?
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(host(target, "look at it")(e)),
            _ => target.to_owned(),
        };
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(place(&target, "is no name for a directory"));
        };
        check_target(&target)?;
        let name = name.to_string_lossy();
        remove_stale(parent, &format!("{name}{PARTIAL}"));
        for _ in 0..ATTEMPTS {
            if let Some(draft) = Self::begin(&target, parent, &name)? {
                return Ok(draft);
            }
        }
        Err(place(&target, "what is made beside it is removed again and again"))
    }

    /// Makes the directory and the file of memory, and holds it; `None` if another has found it while nobody held it.
    fn begin(target: &Path, parent: &Path, name: &str) -> Result<Option<Self>, SnapshotError> {
        let id = uuid::Uuid::new_v4().simple().to_string();
        let partial = parent.join(format!("{name}{PARTIAL}{}", id.get(..UNIQUE).unwrap_or(&id)));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&partial)
            .map_err(host(target, "make a directory beside it"))?;
        let path = partial.join(MEMORY);
        let memory = match create(&path) {
            Ok(memory) => memory,
            Err(e) => {
                remove(&partial);
                let lost = e.kind() == io::ErrorKind::NotFound;
                return if lost { Ok(None) } else { Err(host(&path, "make it")(e)) };
            }
        };
        let draft = Self { target: target.to_owned(), home: Home::Beside(partial), memory, placed: false };
        match rustix::fs::flock(&draft.memory, FlockOperation::NonBlockingLockExclusive) {
            // Whoever holds it is about to remove it.
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            held => held.map_err(|e| host(&path, "lock it")(e.into()))?,
        }
        let removed = draft.memory.metadata().map_err(host(&path, "look at it"))?.nlink() == 0;
        Ok((!removed).then_some(draft))
    }

    /// Where it is to be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Writes guest RAM, once. Nothing may write to RAM meanwhile.
    pub fn write_memory(&self, memory: &GuestMemory) -> Result<Pages, SnapshotError> {
        let path = self.target.join(MEMORY);
        let pages = pages::write(memory, &self.memory).map_err(host(&path, "write it"))?;
        self.memory.sync_data().map_err(host(&path, "write it"))?;
        Ok(pages)
    }

    /// Writes the state, and puts the snapshot in its place.
    pub fn finish(mut self, state: StateWriter) -> Result<(), SnapshotError> {
        let path = self.target.join(STATE);
        let write = |mut file: &File| {
            file.write_all(&state.finish()).and_then(|()| file.sync_data()).map_err(host(&path, "write it"))
        };
        let partial = match &self.home {
            Home::Given(file) => {
                write(file)?;
                self.placed = true;
                return Ok(());
            }
            Home::Beside(partial) => partial.clone(),
        };
        write(&create(&partial.join(STATE)).map_err(host(&path, "make it"))?)?;
        let sync =
            |path: &Path| File::open(path).and_then(|dir| dir.sync_all()).map_err(host(path, "sync it"));
        sync(&partial)?;
        let parent = || self.target.parent().map_or(Ok(()), sync);
        loop {
            // Again: it may have been filled meanwhile, and may be at any time.
            if check_target(&self.target)? {
                match rustix::fs::renameat_with(CWD, &partial, CWD, &self.target, RenameFlags::EXCHANGE) {
                    Err(rustix::io::Errno::NOENT) if !self.target.exists() => continue,
                    done => done.map_err(|e| host(&self.target, "exchange it for the new one")(e.into()))?,
                }
                self.placed = true;
                let synced = parent();
                // Now the name of the old one.
                remove(&partial);
                return synced;
            }
            match std::fs::rename(&partial, &self.target) {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                done => {
                    done.map_err(host(&self.target, "give it its name"))?;
                    self.placed = true;
                    return parent();
                }
            }
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let (false, Home::Beside(partial)) = (self.placed, &self.home) {
            remove(partial);
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Whether `target` is a snapshot; an error if it is something else that must not be lost.
fn check_target(target: &Path) -> Result<bool, SnapshotError> {
    let entries = match std::fs::read_dir(target) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(place(target, "is a file: name a directory, or one that does not exist yet"));
        }
        Err(e) => return Err(host(target, "look into it")(e)),
    };
    let mut used = false;
    for entry in entries {
        let entry = entry.map_err(host(target, "look into it"))?;
        used = true;
        if ![STATE, MEMORY].iter().any(|name| entry.file_name() == *name) {
            return Err(place(target, "holds other files than a snapshot: choose another directory"));
        }
    }
    Ok(used)
}

/// Removes a directory of a snapshot, as far as it is one.
fn remove(dir: &Path) {
    for name in [STATE, MEMORY] {
        // A draft has not always both; what else is wrong shows when the directory does not go.
        let _ = std::fs::remove_file(dir.join(name));
    }
    if let Err(error) = std::fs::remove_dir(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("{}: cannot remove it: {error}", dir.display());
    }
}

/// Removes what earlier saves to the same place have left when they were killed. Best effort: what stays costs only space.
fn remove_stale(parent: &Path, prefix: &str) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let is_draft = |rest: &str| rest.len() == UNIQUE && rest.bytes().all(|b| b.is_ascii_hexdigit());
        if !name.to_str().and_then(|name| name.strip_prefix(prefix)).is_some_and(is_draft) {
            continue;
        }
        match File::open(entry.path().join(MEMORY)) {
            // Held until all is gone.
            Ok(memory) if rustix::fs::flock(&memory, FlockOperation::NonBlockingLockExclusive).is_ok() => {
                remove(&entry.path());
            }
            // Killed before it was made, or after it was removed; or being made. Nothing happens to one that is not empty.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let _ = std::fs::remove_dir(entry.path());
            }
            _ => {}
        }
    }
}

/// A snapshot that is being restored: its state, and the file of its memory.
#[derive(Debug)]
pub struct Opened {
    dir: PathBuf,
    /// What was saved.
    pub sections: Sections,
    memory: File,
    length: u64,
}

impl Opened {
    /// Opens the snapshot `dir`, or takes the descriptors that were inherited for its files, and reads its state.
    pub fn open(dir: &Path, inherited: &Inherited) -> Result<Self, SnapshotError> {
        let path = dir.join(STATE);
        let given = inherited.take_path(&path);
        if given.is_none() && !dir.is_dir() {
            return Err(place(dir, "no such directory, or none that this process may read"));
        }
        let (file, length) = open_plain(&path, given)?;
        let damaged = |path: PathBuf, format| SnapshotError::Damaged { path, format };
        if length > FILE_MAX as u64 {
            return Err(damaged(path, Format::TooLarge(length)));
        }
        let mut bytes = Vec::with_capacity(length as usize);
        // Not more than it was long, if it grows meanwhile.
        file.take(FILE_MAX as u64 + 1).read_to_end(&mut bytes).map_err(host(&path, "read it"))?;
        let sections = Sections::parse(&bytes).map_err(|format| damaged(path, format))?;
        let path = dir.join(MEMORY);
        let given = inherited.take_path(&path);
        let (memory, length) = open_plain(&path, given)?;
        Ok(Self { dir: dir.into(), sections, memory, length })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// An error about the file `state`.
    pub fn damaged(&self, format: Format) -> SnapshotError {
        SnapshotError::Damaged { path: self.dir.join(STATE), format }
    }

    fn damaged_memory(&self, format: Format) -> SnapshotError {
        SnapshotError::Damaged { path: self.dir.join(MEMORY), format }
    }

    /// The file `memory`, to be mapped privately, if it is as long as it was written.
    pub fn memory(&self, saved: &Pages) -> Result<&File, SnapshotError> {
        if self.length != saved.size {
            return Err(self.damaged_memory(Format::Length { want: saved.size, got: self.length }));
        }
        Ok(&self.memory)
    }

    /// Reads all of the file `memory` and compares it with what was written.
    pub fn verify(&self, saved: &Pages) -> Result<(), SnapshotError> {
        let path = self.dir.join(MEMORY);
        let found = pages::examine(self.memory(saved)?, saved.size).map_err(host(&path, "read it"))?;
        if found == *saved {
            Ok(())
        } else {
            Err(self.damaged_memory(Format::Checksum("guest memory".into())))
        }
    }

    /// Copies the file `memory` into guest RAM, which is all zero.
    pub fn read_into(&self, memory: &GuestMemory, saved: &Pages) -> Result<(), SnapshotError> {
        let path = self.dir.join(MEMORY);
        let found = pages::read(self.memory(saved)?, memory).map_err(host(&path, "read it"))?;
        if found == *saved {
            Ok(())
        } else {
            Err(self.damaged_memory(Format::Checksum("guest memory".into())))
        }
    }
}

/// Opens a plain file for reading, unless it is `given`; returns its length.
fn open_plain(path: &Path, given: Option<OwnedFd>) -> Result<(File, u64), SnapshotError> {
    // A pipe without a writer would block here.
    let flags = OFlags::NONBLOCK.bits() as i32;
    let open = || OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = given.map_or_else(open, |fd| Ok(fd.into())).map_err(host(path, "open it"))?;
    let data = file.metadata().map_err(host(path, "look at it"))?;
    if data.is_file() { Ok((file, data.len())) } else { Err(place(path, "is no plain file")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;
    use vm_memory::{Bytes as _, GuestAddress};

    fn ram(byte: u8) -> GuestMemory {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        memory.write_obj(byte, GuestAddress(4096)).unwrap();
        memory
    }

    fn save(dir: &Path, byte: u8) -> Result<Pages, SnapshotError> {
        let draft = Draft::create(&Target::Directory(dir.into()))?;
        let pages = draft.write_memory(&ram(byte))?;
        let mut state = StateWriter::default();
        state.add("byte", 0, 1, &[byte]).unwrap();
        draft.finish(state)?;
        Ok(pages)
    }

    fn names(dir: &Path) -> Vec<String> {
        let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    fn saved(dir: &Path) -> u8 {
        Opened::open(dir, &Inherited::default()).unwrap().sections.need("byte", 0, 1).unwrap().bytes[0]
    }

    #[test]
    fn a_snapshot_is_new_or_takes_the_place_of_the_old_one() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("template");
        for byte in [1, 2] {
            let pages = save(&dir, byte).unwrap();
            assert_eq!(
                (names(home.path()), names(&dir)),
                (vec!["template".into()], vec![MEMORY.into(), STATE.into()])
            );
            assert_eq!(saved(&dir), byte);
            let opened = Opened::open(&dir, &Inherited::default()).unwrap();
            opened.verify(&pages).unwrap();
            let copy = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            opened.read_into(&copy, &pages).unwrap();
            assert_eq!(copy.read_obj::<u8>(GuestAddress(4096)).unwrap(), byte);
        }
        // An empty directory, and a link to a snapshot.
        let empty = home.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        save(&empty, 3).unwrap();
        let link = home.path().join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        save(&link, 4).unwrap();
        assert_eq!((saved(&empty), saved(&dir)), (3, 4));
        assert!(link.is_symlink());
    }

    #[test]
    fn what_is_not_finished_leaves_no_trace_and_the_old_one_in_place() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("template");
        save(&dir, 1).unwrap();
        let draft = Draft::create(&Target::Directory(dir.clone())).unwrap();
        draft.write_memory(&ram(2)).unwrap();
        assert_eq!(names(home.path()).len(), 2);
        drop(draft);
        assert_eq!((names(home.path()), saved(&dir)), (vec!["template".into()], 1));
    }

    #[test]
    fn drafts_of_the_dead_go_and_those_of_the_living_stay() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("template");
        let draft = |name: &str| {
            std::fs::create_dir(home.path().join(name)).unwrap();
            File::create(home.path().join(name).join(MEMORY)).unwrap()
        };
        let living = draft("template.partial-11111111");
        rustix::fs::flock(&living, FlockOperation::LockExclusive).unwrap();
        draft("template.partial-22222222");
        draft("other.partial-33333333");
        draft("template.partial-of-mine");
        std::fs::create_dir(home.path().join("template.partial-44444444")).unwrap();
        save(&dir, 1).unwrap();
        let left =
            ["other.partial-33333333", "template", "template.partial-11111111", "template.partial-of-mine"];
        assert_eq!(names(home.path()), left);
    }

    #[test]
    fn many_at_once_do_not_lose_their_drafts() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("template");
        std::thread::scope(|scope| {
            for byte in 1..9 {
                let dir = &dir;
                scope.spawn(move || {
                    for _ in 0..20 {
                        save(dir, byte).unwrap();
                    }
                });
            }
        });
        Opened::open(&dir, &Inherited::default()).unwrap();
        assert_eq!(names(home.path()), ["template"]);
    }

    #[test]
    fn a_place_that_holds_something_else_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let full = home.path().join("full");
        std::fs::create_dir(&full).unwrap();
        std::fs::write(full.join("notes"), "x").unwrap();
        for (path, text) in [
            (file.clone(), "is a file"),
            (full.clone(), "holds other files"),
            (home.path().join("none/dir"), "cannot make a directory"),
            ("/".into(), "is no name"),
        ] {
            let error = save(&path, 1).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        assert_eq!(names(home.path()), ["file", "full"]);
    }

    #[test]
    fn damaged_snapshots_are_named() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("s");
        let text = |dir: &Path| Opened::open(dir, &Inherited::default()).unwrap_err().to_string();
        assert!(text(&dir).contains("no such directory"), "{}", text(&dir));
        let pages = save(&dir, 1).unwrap();
        let memory = OpenOptions::new().write(true).open(dir.join(MEMORY)).unwrap();
        memory.write_all_at(&[9], 4096).unwrap();
        let error =
            Opened::open(&dir, &Inherited::default()).unwrap().verify(&pages).unwrap_err().to_string();
        assert!(error.contains("memory: guest memory: the checksum does not match"), "{error}");
        memory.set_len(4096).unwrap();
        let error =
            Opened::open(&dir, &Inherited::default()).unwrap().memory(&pages).unwrap_err().to_string();
        assert!(error.contains("is 4096 bytes long and should be 1048576"), "{error}");
        std::fs::remove_file(dir.join(MEMORY)).unwrap();
        assert!(text(&dir).contains("memory: cannot open it"), "{}", text(&dir));
        std::fs::write(dir.join(STATE), "FLOTILLA").unwrap();
        assert!(text(&dir).contains("state: is 8 bytes long"), "{}", text(&dir));
        File::create(dir.join(STATE)).unwrap().set_len(FILE_MAX as u64 + 1).unwrap();
        assert!(text(&dir).contains("too large"), "{}", text(&dir));
        std::fs::remove_file(dir.join(STATE)).unwrap();
        rustix::fs::mknodat(CWD, dir.join(STATE), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(text(&dir).contains("no plain file"), "{}", text(&dir));
    }

    #[test]
    fn a_snapshot_in_files_that_were_given() {
        let home = tempfile::tempdir().unwrap();
        let make = |name: &str| create(&home.path().join(name)).unwrap();
        let target = Target::Files { state: make(STATE), memory: make(MEMORY) };
        let draft = Draft::create(&target).unwrap();
        let pages = draft.write_memory(&ram(7)).unwrap();
        let mut state = StateWriter::default();
        state.add("byte", 0, 1, &[7]).unwrap();
        draft.finish(state).unwrap();
        assert_eq!((names(home.path()), saved(home.path())), (vec![MEMORY.into(), STATE.into()], 7));
        // As they are now, they are not empty; and one that is open for reading alone is none.
        let refused = Draft::create(&target).err().unwrap().to_string();
        assert!(refused.contains("fd/state: is no empty plain file"), "{refused}");
        drop(make("empty"));
        let reading = || File::open(home.path().join("empty")).unwrap();
        assert!(Draft::create(&Target::Files { state: reading(), memory: reading() }).is_err());
        // The one who reads may have them as descriptors only, under names that lead nowhere.
        let nowhere = Path::new("/nowhere");
        let open =
            |name: &str| std::os::fd::IntoRawFd::into_raw_fd(File::open(home.path().join(name)).unwrap());
        let table = format!(
            r#"[{{"fd":{},"path":"/nowhere/state"}},{{"fd":{},"path":"/nowhere/memory"}}]"#,
            open(STATE),
            open(MEMORY)
        );
        let inherited = Inherited::parse(&table).unwrap();
        Opened::open(nowhere, &inherited).unwrap().verify(&pages).unwrap();
    }
}
