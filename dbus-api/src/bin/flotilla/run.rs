//! `flotilla run`: define, start, console in one, with the guest of the package when no kernel is given.
//!
//! The VM is started paused, its console opened, then resumed: so not one byte of its first output is lost. What fails half-way is undone.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use dbus_api::spec::VmSpec;

use crate::args::RunArgs;
use crate::args::spec::SpecArgs;
use crate::client::Client;
use crate::console::{self, Ended};
use crate::define;
use crate::failure::{Exit, Failure};
use crate::logs;
use crate::output::{self, note, plain};
use crate::power::{self, Verb};

/// Where packages put the guest.
const INSTALLED_GUEST: &str = "/usr/share/flotilla/guest.elf";

/// Runs a VM; gives the exit status.
pub(crate) async fn run(client: &Client, args: RunArgs) -> Result<i32, Failure> {
    let Vm { name, spec, guest } = what(client, args.name, args.spec).await?;
    if let Some(guest) = guest {
        note(&format!("No kernel given: booting the guest that comes with Flotilla, {}.", guest.display()));
    }
    define::store(client, &name, &spec, false).await.map_err(|failure| match failure.exit {
        Exit::State => Failure::new(
            failure.exit,
            format!(
                "a VM \"{name}\" exists: `flotilla start {name}` starts it, `flotilla rm {name}` removes it"
            ),
        ),
        _ => failure,
    })?;
    note(&format!("Defined {name}: {} of memory, {}.", spec.memory, vcpus(spec.cpus)));
    let outcome = if args.detach {
        power::drive(client, &name, Verb::Start { paused: false }).await.map(|()| None)
    } else {
        start_attached(client, &name).await.map(Some)
    };
    let stream = match outcome {
        Ok(stream) => stream,
        Err(failure) => {
            // It was made for this run, which has failed: leave nothing behind. The log goes with it, so what it says is shown now.
            for line in logs::excerpt(client, &name).await {
                note(&format!("  {}", plain(&line)));
            }
            match power::undefine(client, &name, true).await {
                Ok(()) => note(&format!("Removed {name} again.")),
                Err(second) => note(&format!("flotilla: {second}")),
            }
            let message = failure.message.replace(&format!(": see `flotilla logs {name}`"), "");
            return Err(Failure { message, ..failure });
        }
    };
    let Some(stream) = stream else {
        output::print(&format!("{name} started\n"))?;
        return Ok(0);
    };
    let ended = console::attach(stream, args.linger.linger).await;
    if args.rm {
        power::undefine(client, &name, true).await?;
        note(&format!("Removed {name}."));
    } else {
        tell_end(client, &name, &ended).await;
    }
    Ok(match ended? {
        Ended::Signal(number) => 128 + number,
        Ended::Detached | Ended::Closed | Ended::InputDone => 0,
    })
}

/// What to run.
struct Vm {
    name: String,
    spec: VmSpec,
    /// The default guest's image, when that is what boots.
    guest: Option<PathBuf>,
}

/// Makes name and definition of the new VM from the command line.
async fn what(client: &Client, name: Option<String>, options: SpecArgs) -> Result<Vm, Failure> {
    if let Some(file) = name.as_ref().filter(|name| is_file(name))
        && options.kernel.is_none()
    {
        let (name, spec) = define::read(file.clone(), None, options)?;
        return Ok(Vm { name, spec, guest: None });
    }
    let guest = match options.kernel {
        Some(_) => None,
        None => Some(default_guest()?),
    };
    let spec = define::from_options(options, guest.clone())?;
    let name = match name {
        Some(name) => name,
        None => free_name(client).await?,
    };
    Ok(Vm { name, spec, guest })
}

/// Names of VMs have no slash, and nobody names a VM `web.toml`.
fn is_file(text: &str) -> bool {
    text.contains('/') || text.ends_with(".toml") || text.ends_with(".json")
}

/// Starts a VM with its console open before its first instruction.
async fn start_attached(client: &Client, name: &str) -> Result<tokio::net::UnixStream, Failure> {
    power::drive(client, name, Verb::Start { paused: true }).await?;
    let vm = client.vm(name).await?;
    let stream = console::open(client, &vm, name).await?;
    let keys = if std::io::stdin().is_terminal() { " Ctrl-] leaves it; the VM runs on." } else { "" };
    note(&format!("Started. This is its console.{keys}"));
    power::drive(client, name, Verb::Resume).await?;
    Ok(stream)
}

/// Says how it stands with the VM and what to do next.
async fn tell_end(client: &Client, name: &str, ended: &Result<Ended, Failure>) {
    match ended {
        Ok(Ended::Closed) => {
            if let Ok(vm) = client.vm(name).await {
                note(&console::ended_text(&vm, name).await);
            }
            note(&format!("Start it again: flotilla start {name}    Remove it: flotilla rm {name}"));
        }
        _ => note(&format!(
            "{name} runs on. Its console: flotilla console {name}    Stop it: flotilla stop {name}    Remove it: flotilla rm -f {name}"
        )),
    }
}

fn vcpus(count: u8) -> String {
    if count == 1 { "1 vCPU".to_owned() } else { format!("{count} vCPUs") }
}

/// The guest to boot when no kernel is given.
fn default_guest() -> Result<PathBuf, Failure> {
    if let Some(path) = std::env::var_os("FLOTILLA_GUEST").filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(Failure::new(Exit::Failed, format!("FLOTILLA_GUEST: {}: no such file", path.display())))
        };
    }
    let beside = std::env::current_exe().ok().and_then(|program| beside(&program));
    [Some(PathBuf::from(INSTALLED_GUEST)), beside]
        .into_iter()
        .flatten()
        .find(|path| path.is_file())
        .ok_or_else(|| {
            let text = format!(
                "no guest at {INSTALLED_GUEST}: give --kernel, or set FLOTILLA_GUEST to a guest image"
            );
            Failure::new(Exit::Failed, text)
        })
}

/// `../share/flotilla/guest.elf` beside a program in `bin`, for installations under another prefix.
fn beside(program: &Path) -> Option<PathBuf> {
    Some(program.parent()?.parent()?.join("share/flotilla/guest.elf"))
}

/// A name that no VM has, easy to say and to type.
async fn free_name(client: &Client) -> Result<String, Failure> {
    let rows = client.manager.list_vms().await.map_err(|error| client.failed(error))?;
    let taken: std::collections::HashSet<String> = rows.into_iter().map(|row| row.0).collect();
    Ok(made_up(*uuid::Uuid::new_v4().as_bytes(), |name| taken.contains(name)))
}

/// A name from random bytes; a number follows when the plain name is taken.
fn made_up(random: [u8; 16], taken: impl Fn(&str) -> bool) -> String {
    const HOW: [&str; 16] = [
        "brave", "bright", "calm", "clear", "crisp", "eager", "fair", "fresh", "keen", "light", "merry",
        "neat", "quick", "steady", "swift", "warm",
    ];
    const WHAT: [&str; 16] = [
        "barge", "brig", "canoe", "clipper", "cutter", "dinghy", "ferry", "galley", "junk", "kayak", "ketch",
        "lugger", "raft", "skiff", "sloop", "yawl",
    ];
    let [how, what, ..] = random;
    let name = format!("{}-{}", HOW[usize::from(how % 16)], WHAT[usize::from(what % 16)]);
    if !taken(&name) {
        return name;
    }
    // The set of taken names is finite, so this ends.
    (2_u64..).map(|number| format!("{name}-{number}")).find(|name| !taken(name)).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_names_are_free() {
        assert_eq!(made_up([0; 16], |_| false), "brave-barge");
        assert_eq!(made_up([255; 16], |_| false), "warm-yawl");
        assert_eq!(made_up([0; 16], |name| !name.ends_with('3')), "brave-barge-3");
    }

    #[test]
    fn a_definition_file_is_no_name() {
        for (text, file) in
            [("web", false), ("web.toml", true), ("./web", true), ("w.json", true), ("a.b", false)]
        {
            assert_eq!(is_file(text), file, "{text}");
        }
    }

    #[test]
    fn the_guest_lies_beside_the_program() {
        let path = beside(Path::new("/opt/flotilla/bin/flotilla"));
        assert_eq!(path.as_deref(), Some(Path::new("/opt/flotilla/share/flotilla/guest.elf")));
    }
}
