//! `flotilla edit`: a VM's definition in the user's editor, and back if nobody else changed it meanwhile.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use dbus_api::error::Error;
use dbus_api::spec::VmSpec;
use zbus::Variant;

use crate::args::EditArgs;
use crate::client::Client;
use crate::define;
use crate::failure::{Exit, Failure};
use crate::output;

/// A file of the user's alone, gone afterwards unless it holds work that the daemon did not take.
struct Draft {
    path: PathBuf,
    keep: bool,
}

impl Draft {
    fn new(name: &str, text: &str) -> Result<Draft, Failure> {
        let path = std::env::temp_dir().join(format!("flotilla-{name}-{}.json", std::process::id()));
        let failed =
            |error: std::io::Error| Failure::new(Exit::Failed, format!("{}: {error}", path.display()));
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let draft = Draft { path: path.clone(), keep: false };
        file.write_all(text.as_bytes()).map_err(failed)?;
        Ok(draft)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.keep {
            // A file that the editor took away is away.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// `flotilla edit`.
pub(crate) async fn edit(client: &Client, args: EditArgs) -> Result<(), Failure> {
    let name = &args.name;
    let vm = client.vm(name).await?;
    let failed = |error| client.bus_failed(error).about(name);
    let (generation, spec) = (vm.generation().await.map_err(failed)?, vm.spec().await.map_err(failed)?);
    let broken =
        |error: serde_json::Error| Failure::new(Exit::Failed, format!("{name}: its definition: {error}"));
    // Through the schema: its order is the one that people know.
    let before: VmSpec = serde_json::from_str(&spec).map_err(broken)?;
    let text = serde_json::to_string_pretty(&before).map_err(broken)?;
    let mut draft = Draft::new(name, &(text + "\n"))?;
    run_editor(&draft.path)?;
    // What the user wrote is not lost, whatever becomes of it.
    draft.keep = true;
    let kept = |failure: Failure| Failure {
        message: format!("{}; what you wrote is in {}", failure.message, draft.path.display()),
        ..failure
    };
    let after = define::of_file(&draft.path).map_err(kept)?;
    if after == before {
        draft.keep = false;
        return output::print(&format!("{name} unchanged\n"));
    }
    let options =
        HashMap::from([("replace", Variant::from(true)), ("if_generation", Variant::from(generation))]);
    let text = serde_json::to_string(&after).map_err(broken)?;
    let sent = client.manager.define_vm(name, &text, options).await;
    let now = sent.map_err(|error| match error {
        Error::GenerationMismatch(_) => {
            kept(Failure::new(Exit::State, format!("{name}: somebody else changed it meanwhile")))
        }
        error => kept(client.failed(error).about(name)),
    });
    now?;
    draft.keep = false;
    let running = vm.inner().get_property::<u64>("AppliedGeneration").await.unwrap_or_default();
    let held = if running == generation { "; it holds from the next start on" } else { "" };
    output::print(&format!("{name} defined again{held}\n"))
}

/// `$VISUAL`, `$EDITOR`, or vi. Through the shell, as others do: the variable may hold options.
fn run_editor(path: &Path) -> Result<(), Failure> {
    let of = |variable: &str| std::env::var(variable).ok().filter(|value| !value.trim().is_empty());
    let editor = of("VISUAL").or_else(|| of("EDITOR")).unwrap_or_else(|| "vi".to_owned());
    let ran =
        std::process::Command::new("sh").args(["-c", &format!("{editor} \"$1\""), "sh"]).arg(path).status();
    match ran {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::new(Exit::Failed, format!("{editor}: {status}; nothing was changed"))),
        Err(error) => Err(Failure::new(Exit::Failed, format!("{editor}: {error}"))),
    }
}
