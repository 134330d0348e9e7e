//! `host`: drives test hosts by hand, the same ones that the scenarios use; and, under the name `host-agent`, the agent
//! inside them.

use std::io::{self, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use tests::host::wire::Kind;
use tests::host::{Host, HostError, Start, cache, images, server};

/// Emulated Debian machines with systemd, D-Bus, polkit and KVM inside, for trying Flotilla on.
///
/// The first start on a machine builds the images (minutes, as root, from the machine's own apt sources) and freezes a
/// booted host; later starts take seconds. Inside, /srv/guest has a Debian guest: vmlinuz (the unmodified cloud kernel),
/// initrd.gz and root.img (copy it before use; kernel command line: console=ttyS0 guest.name=NAME guest.ip=ADDRESS/PREFIX).
///
/// Everything is kept in FLOTILLA_TEST_CACHE, by default ~/.cache/flotilla-tests.
#[derive(Parser)]
#[command(name = "host", max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the images and the frozen host if need be, and print where they are
    Images,
    /// Start a host that stays until `stop`
    Start {
        /// Its name, yours alone
        name: String,
        /// Boot it instead of thawing the frozen one
        #[arg(long)]
        cold: bool,
    },
    /// Run a line for bash; input, output and exit code pass through
    Run {
        /// The host
        name: String,
        /// Kill the command after this many seconds
        #[arg(long, default_value_t = 600)]
        timeout: u64,
        /// The line
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Copy files in
    Push {
        /// The host
        name: String,
        /// Files here, then the folder there
        #[arg(required = true, num_args = 2..)]
        paths: Vec<PathBuf>,
    },
    /// Copy files out
    Pull {
        /// The host
        name: String,
        /// Files there, then the folder here
        #[arg(required = true, num_args = 2..)]
        paths: Vec<PathBuf>,
    },
    /// Show the host's console as it comes, and type on it (end of input leaves)
    Console {
        /// The host
        name: String,
    },
    /// Switch a host off and throw it away
    Stop {
        /// The host
        name: String,
    },
    /// List the hosts that run
    List,
}

fn main() -> ExitCode {
    let called = std::env::args().next().unwrap_or_default();
    if Path::new(&called).file_name().is_some_and(|name| name == "host-agent") {
        return match server::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("host-agent: {error}");
                ExitCode::FAILURE
            }
        };
    }
    match run(Arguments::parse().verb) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("host: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<u8, HostError> {
    match verb {
        Verb::Images => {
            let images = images()?;
            for path in [images.kernel, images.initrd, images.disk, images.guest] {
                println!("{}", path.display());
            }
            drop(Host::start("images")?);
            println!("frozen host: ready in {}", cache::folder().display());
        }
        Verb::Start { name, cold } => {
            let began = Instant::now();
            let host = Host::start_as(&name, &Start { cold, detached: true, ..Start::default() })?;
            println!(
                "{name}: up after {:.1} s; logs in {}",
                began.elapsed().as_secs_f64(),
                host.folder().display()
            );
            host.detach();
        }
        Verb::Run { name, timeout, command } => {
            let host = Host::attach(&name)?;
            let limit = Duration::from_secs(timeout);
            let code = if io::stdin().is_terminal() {
                host.stream(limit, &command.join(" "), io::empty(), print)?
            } else {
                host.stream(limit, &command.join(" "), io::stdin(), print)?
            };
            return Ok(u8::try_from(code).unwrap_or(255));
        }
        Verb::Push { name, paths } => {
            let host = Host::attach(&name)?;
            let (files, folder) = split(&paths)?;
            for file in files {
                host.push(file, &folder.join(base(file)?).display().to_string())?;
            }
        }
        Verb::Pull { name, paths } => {
            let host = Host::attach(&name)?;
            let (files, folder) = split(&paths)?;
            for file in files {
                let content = host.pull(&file.display().to_string())?;
                let path = folder.join(base(file)?);
                std::fs::write(&path, content)
                    .map_err(|source| HostError::Io { what: format!("write {}", path.display()), source })?;
            }
        }
        Verb::Console { name } => console(&Host::attach(&name)?)?,
        Verb::Stop { name } => Host::attach(&name)?.stop()?,
        Verb::List => Host::list().iter().for_each(|name| println!("{name}")),
    }
    Ok(0)
}

fn print(kind: Kind, data: &[u8]) -> io::Result<()> {
    if kind == Kind::Error {
        return io::stderr().write_all(data);
    }
    let mut out = io::stdout();
    out.write_all(data)?;
    out.flush()
}

fn split(paths: &[PathBuf]) -> Result<(&[PathBuf], &Path), HostError> {
    let (folder, files) =
        paths.split_last().ok_or_else(|| HostError::Usage("name files, then a folder".into()))?;
    Ok((files, folder))
}

fn base(path: &Path) -> Result<&std::ffi::OsStr, HostError> {
    path.file_name().ok_or_else(|| HostError::Usage(format!("{} is no file", path.display())))
}

fn console(host: &Host) -> Result<(), HostError> {
    let path = host.folder().join("console.sock");
    let broken = |source| HostError::Io { what: format!("console {}", path.display()), source };
    let mut out = UnixStream::connect(&path).map_err(broken)?;
    let mut back = out.try_clone().map_err(broken)?;
    thread::spawn(move || io::copy(&mut back, &mut io::stdout()));
    io::copy(&mut io::stdin(), &mut out).map(drop).map_err(broken)
}
