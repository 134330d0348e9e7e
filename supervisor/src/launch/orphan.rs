//! A VM's process that belongs to no definition: its record is corrupt, or was taken away by hand. It is shown and left alone, for it
//! may be somebody's work; only a person can tell. The fleet finds those of its own records, `systemd` those of units without one.

use uuid::Uuid;

use super::watch;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// The VM's name, or its unit's instance.
    pub name: String,
    /// Its unit; empty without systemd.
    pub unit: String,
    /// Its process.
    pub pid: u32,
    /// The VM's identity as its command line says: its taps are kept by it.
    pub uuid: Option<Uuid>,
    /// What tells the process from a later one of the same number.
    start_time: u64,
}

impl Orphan {
    /// The process `pid`, if it is alive.
    pub fn look(name: &str, unit: String, pid: u32) -> Option<Self> {
        let start_time = watch::start_time(pid).ok()?;
        Some(Self { name: name.to_owned(), unit, pid, uuid: uuid_of(pid), start_time })
    }

    /// Whether it is still there.
    pub fn alive(&self) -> bool {
        watch::start_time(self.pid).is_ok_and(|start| start == self.start_time)
    }
}

/// The identity that a process has on its command line.
pub(super) fn uuid_of(pid: u32) -> Option<Uuid> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut arguments = line.split(|byte| *byte == 0);
    arguments.find(|argument| *argument == b"-uuid")?;
    Uuid::try_parse_ascii(arguments.next()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_by_its_number_its_start_and_its_command_line() {
        let uuid = Uuid::from_u128(7);
        // A second command, so that no shell replaces itself by the first.
        let mut child = std::process::Command::new("sh")
            .args(["-c", "sleep 60; :", "flotilla-vmm", "-uuid", &uuid.to_string()])
            .spawn()
            .unwrap();
        let orphan = Orphan::look("web", "u".into(), child.id()).unwrap();
        // Until it has executed, it has the command line of this process.
        while uuid_of(child.id()).is_none() {
            std::thread::yield_now();
        }
        assert!(orphan.alive());
        assert_eq!(Orphan::look("web", "u".into(), child.id()).unwrap().uuid, Some(uuid));
        assert!(!Orphan { start_time: orphan.start_time + 1, ..orphan.clone() }.alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!orphan.alive() && Orphan::look("web", "u".into(), orphan.pid).is_none());
    }
}
