//! The images hosts boot from: owns how they are built (scripts in `tests/images`) and what they are keyed by.
//!
//! Needs root (mmdebstrap makes device nodes) and the machine's own apt sources; the suite is the machine's own, so that
//! programs built here run there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::cache::{self, Key};
use super::error::{HostError, io};

/// Files a host boots from.
#[derive(Debug, Clone)]
pub struct Images {
    /// Debian's stock kernel.
    pub kernel: PathBuf,
    /// The initramfs that finds the disk; the agent's archive is appended to it at start.
    pub initrd: PathBuf,
    /// The host's root disk, qcow2; never written.
    pub disk: PathBuf,
    /// The read-only disk with the Debian guest (kernel, initrd, root disk), a Debian that firmware boots, and firmware, mounted on `/srv/guest`.
    pub guest: PathBuf,
    /// Stands for the content of all of them.
    pub key: Key,
}

/// The images, built when they are not in the cache.
///
/// # Errors
/// When a script fails: its log's last lines are in the error.
pub fn images() -> Result<Images, HostError> {
    let host = built("host-image", &["fetch-kernel"])?;
    let guest = built("guest-image", &["fetch-kernel", "fetch-ovmf", "debian-disk"])?;
    let key = Key::default().with(name_of(&host)).with(name_of(&guest));
    Ok(Images {
        kernel: host.join("vmlinuz"),
        initrd: host.join("initrd.gz"),
        disk: host.join("disk.qcow2"),
        guest: guest.join("guest.img"),
        key,
    })
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What a script makes, with others that it runs.
fn built(script: &str, others: &[&str]) -> Result<PathBuf, HostError> {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("images");
    let suite = suite()?;
    let sources = sources(&suite)?;
    let mut key = Key::default().with_file(&scripts.join(script))?;
    for other in others {
        key = key.with_file(&scripts.join(other))?;
    }
    key = key.with(&suite);
    for (_, text) in &sources {
        key = key.with(text);
    }
    cache::entry(script, &key, |dir| {
        let mut arguments = vec![dir.display().to_string(), suite.clone()];
        for (name, text) in &sources {
            let path = dir.join(name);
            fs::write(&path, text).map_err(io(format!("write {}", path.display())))?;
            arguments.push(path.display().to_string());
        }
        // Beside the entry: it must outlive a failed build.
        let log = dir.with_extension("log");
        let file = File::create(&log).map_err(io(format!("create {}", log.display())))?;
        let also = file.try_clone().map_err(io("copy a descriptor"))?;
        let status = Command::new("timeout")
            .args(["--kill-after=10", "1200"])
            .arg(scripts.join(script))
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(also)
            .status()
            .map_err(io(format!("run {script}")))?;
        if status.success() {
            return Ok(());
        }
        let tail = super::tail(&log, 15);
        Err(HostError::Build { script: script.to_owned(), status: status.to_string(), log, tail })
    })
}

/// This machine's Debian release (`bookworm`).
fn suite() -> Result<String, HostError> {
    let text = fs::read_to_string("/etc/os-release").map_err(io("read /etc/os-release"))?;
    let value = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim_matches('"').to_owned())
    };
    match (value("ID="), value("VERSION_CODENAME=")) {
        (Some(id), Some(suite)) if id == "debian" => Ok(suite),
        _ => Err(HostError::Usage(
            "test hosts are built on a Debian machine: /etc/os-release says otherwise".into(),
        )),
    }
}

/// The machine's own apt sources as (file name, text), Debian's entries only.
fn sources(suite: &str) -> Result<Vec<(String, String)>, HostError> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(dir.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let (mut lines, mut stanzas) = (String::new(), String::new());
    for path in files.iter().filter(|path| path.is_file()) {
        let text = fs::read_to_string(path).map_err(io(format!("read {}", path.display())))?;
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => lines.push_str(&debian_lines(&text, suite)),
            Some("sources") => stanzas.push_str(&debian_stanzas(&text, suite)),
            _ => {}
        }
    }
    if lines.is_empty() && stanzas.is_empty() {
        lines = format!("deb http://deb.debian.org/debian {suite} main\n");
    }
    let both = [("debian.list".to_owned(), lines), ("debian.sources".to_owned(), stanzas)];
    Ok(both.into_iter().filter(|(_, text)| !text.is_empty()).collect())
}

/// Whether a suite is Debian's own of this release: other vendors put their name into it.
fn of_debian(word: &str, suite: &str) -> bool {
    word.strip_prefix(suite).is_some_and(|rest| {
        ["", "-updates", "-security", "/updates", "-proposed-updates"].contains(&rest.trim_end_matches('/'))
    })
}

fn debian_lines(text: &str, suite: &str) -> String {
    let ours = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.first() == Some(&"deb")
            && words.contains(&"main")
            && words.iter().any(|word| of_debian(word, suite))
    };
    text.lines().filter(ours).map(|line| format!("{line}\n")).collect()
}

fn debian_stanzas(text: &str, suite: &str) -> String {
    let ours = |stanza: &&str| {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        field("Types:").split_whitespace().any(|word| word == "deb")
            && field("Components:").split_whitespace().any(|word| word == "main")
            && field("Suites:").split_whitespace().any(|word| of_debian(word, suite))
    };
    text.split("\n\n").filter(ours).map(|stanza| format!("{}\n\n", stanza.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_entries_of_this_release_are_kept() {
        let text = "# deb http://deb.debian.org/debian bookworm main\n\
                    deb http://deb.debian.org/debian bookworm main contrib\n\
                    deb [signed-by=/k] http://security.debian.org bookworm-security main\n\
                    deb https://packages.cloud.google.com/apt cloud-sdk-bookworm main\n\
                    deb https://download.docker.com/linux/debian bookworm stable\n\
                    deb https://apt.postgresql.org/pub/repos/apt bookworm-pgdg main\n\
                    deb http://deb.debian.org/debian bookworm-backports main\n\
                    deb-src http://deb.debian.org/debian bookworm main\n";
        let kept = debian_lines(text, "bookworm");
        assert_eq!(kept.lines().count(), 2, "{kept}");
        assert!(kept.contains("bookworm main contrib") && kept.contains("bookworm-security"));
    }

    #[test]
    fn stanzas_are_kept_whole() {
        let text = "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\
                    Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
                    Types: deb\nURIs: https://deb.nodesource.com/node_20.x\nSuites: nodistro\nComponents: main\n";
        let kept = debian_stanzas(text, "bookworm");
        assert!(kept.contains("Signed-By") && !kept.contains("nodesource"), "{kept}");
        assert_eq!(debian_stanzas(text, "trixie"), "");
    }
}
