//! `flotilla create`: from a cloud image to a VM that runs, in one line.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use dbus_api::proxy::Options;
use dbus_api::spec::{Machine, Size, VmSpec};
use zbus::Variant;

use crate::args::create::{CreateArgs, ImageFormat};
use crate::client::Client;
use crate::define;
use crate::failure::{Exit, Failure};
use crate::jobs::Jobs;
use crate::output;

/// Images may be large, and disks slow: this only catches a daemon that says nothing any more.
const COPY: Duration = Duration::from_secs(3600);
/// What a distribution's image needs to come up; a kernel alone is content with less.
const MEMORY: Size = Size(1 << 30);

/// `flotilla create`.
pub(crate) async fn create(client: &Client, mut args: CreateArgs) -> Result<(), Failure> {
    let mut keys = Vec::new();
    for path in &args.ssh_keys {
        keys.extend(public_keys(path, &read(path)?)?);
    }
    let mut options: Options<'_> =
        HashMap::from([("start", Variant::from(!args.no_start)), ("whole", Variant::from(args.whole))]);
    if !keys.is_empty() {
        options.insert("ssh_keys", Variant::from(keys));
    }
    if let Some(size) = args.size {
        options.insert("size", Variant::from(size.0));
    }
    if let Some(format) = args.format {
        let word = match format {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        };
        options.insert("format", Variant::from(word));
    }
    for (key, path) in [("user_data", &args.user_data), ("network_config", &args.network_config)] {
        if let Some(path) = path {
            options.insert(key, Variant::from(read(path)?));
        }
    }
    let image = std::path::absolute(&args.image)
        .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", args.image.display())))?;
    let not_text =
        || Failure::new(Exit::Definition, format!("{}: the path is not UTF-8", args.image.display()));
    let image = image.to_str().ok_or_else(not_text)?;

    args.spec.memory.get_or_insert(MEMORY);
    let names_board = args.spec.machine.is_some();
    let spec = definition(&define::from_options(args.spec, None)?, names_board)?;
    let mut jobs = Jobs::watch(client).await?;
    let begun = client.manager.create_vm(&args.name, &spec, image, options).await;
    let (_, job) = begun.map_err(|error| client.failed(error).about(&args.name))?;
    let done = if args.no_start { "created" } else { "created and started" };
    if !args.wait.no_wait {
        let ended = jobs.wait(client, "creating", vec![(args.name.clone(), job)], COPY).await;
        ended.into_iter().try_for_each(|(_, outcome)| outcome)?;
        output::print(&format!("{} {done}\n", args.name))?;
    }
    Ok(())
}

/// The definition as it is sent. A board that nobody named is the daemon's to choose.
fn definition(spec: &VmSpec, names_board: bool) -> Result<String, Failure> {
    let failed = |error| Failure::new(Exit::Definition, format!("a path is not UTF-8: {error}"));
    let mut value = serde_json::to_value(spec).map_err(failed)?;
    if let Some(members) =
        value.as_object_mut().filter(|_| !names_board && spec.machine == Machine::default())
    {
        members.remove("machine");
    }
    Ok(value.to_string())
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path)
        .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", path.display())))
}

/// The keys in a file, one on each line, as in `authorized_keys`.
fn public_keys(path: &Path, text: &str) -> Result<Vec<String>, Failure> {
    let wrong = |what: &str| Err(Failure::new(Exit::Definition, format!("{}: {what}", path.display())));
    // Whoever names the wrong one of the two files must not have it copied about.
    if text.contains("PRIVATE KEY") {
        return wrong("a private key: name the public one (.pub)");
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    if keys.is_empty() { wrong("there is no key in it") } else { Ok(keys) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_one_on_a_line() {
        let path = Path::new("id.pub");
        let keys = public_keys(path, "# mine\nssh-ed25519 A me\n\n  ssh-rsa B you \n").unwrap();
        assert_eq!(keys, ["ssh-ed25519 A me", "ssh-rsa B you"]);
        for text in ["", "# none\n", "-----BEGIN OPENSSH PRIVATE KEY-----\nx y\n"] {
            assert_eq!(public_keys(path, text).unwrap_err().exit, Exit::Definition, "{text}");
        }
    }

    #[test]
    fn a_board_that_nobody_named_is_not_sent() {
        let spec: VmSpec = serde_json::from_str("{}").unwrap();
        assert!(!definition(&spec, false).unwrap().contains("machine"));
        assert!(definition(&spec, true).unwrap().contains("\"machine\":\"microvm\""));
    }
}
