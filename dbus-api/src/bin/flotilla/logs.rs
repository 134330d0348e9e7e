//! `flotilla logs`: hands over to `journalctl` for VMs that are systemd units, and to `tail` for VMs of the process launcher. `run` shows an
//! excerpt when a start fails.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::args::LogsArgs;
use crate::client::Client;
use crate::failure::{Exit, Failure};

/// How long the other program may take for an excerpt.
const EXCERPT: Duration = Duration::from_secs(5);

/// Shows the log; on success this process becomes the other program.
pub(crate) async fn logs(client: &Client, args: LogsArgs) -> Result<(), Failure> {
    let vm = client.vm(&args.name).await?;
    let file = vm.log_file().await.map_err(|error| client.bus_failed(error).about(&args.name))?;
    let mut command = if file.is_empty() { journalctl(&args) } else { tail(&file, &args)? };
    let error = command.exec();
    let program = command.get_program().to_string_lossy().into_owned();
    Err(Failure::new(Exit::Failed, format!("{program}: {error}")))
}

/// The newest lines of a VM's log, for a start that failed. What cannot be read is left out: there is a failure to tell already.
pub(crate) async fn excerpt(client: &Client, name: &str) -> Vec<String> {
    let args = LogsArgs { name: name.to_owned(), follow: false, lines: Some(5) };
    let Ok(vm) = client.vm(name).await else { return Vec::new() };
    let Ok(file) = vm.log_file().await else { return Vec::new() };
    let command = if file.is_empty() {
        let mut command = journalctl(&args);
        command.args(["--output=cat", "--quiet", "--no-pager", "--since=-1min"]);
        command
    } else {
        let Ok(command) = tail(&file, &args) else { return Vec::new() };
        command
    };
    let mut command = tokio::process::Command::from(command);
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    match tokio::time::timeout(EXCERPT, output).await {
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

fn journalctl(args: &LogsArgs) -> Command {
    let mut command = Command::new("journalctl");
    command.args(dbus_api::journal::matches(&args.name));
    if let Some(lines) = args.lines {
        command.arg("--lines").arg(lines.to_string());
    }
    if args.follow {
        command.arg("--follow");
    }
    command
}

fn tail(file: &str, args: &LogsArgs) -> Result<Command, Failure> {
    if !std::path::Path::new(file).exists() {
        return Err(Failure::new(Exit::Failed, format!("{}: nothing logged yet ({file})", args.name)));
    }
    let mut command = Command::new("tail");
    match args.lines {
        Some(lines) => command.arg(format!("--lines={lines}")),
        None => command.arg("--lines=+1"),
    };
    if args.follow {
        // By name: a new start may begin a new file.
        command.arg("-F");
    }
    command.arg("--").arg(file);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn journalctl_gets_the_units_and_the_wishes() {
        let args = LogsArgs { name: "web".into(), follow: true, lines: Some(5) };
        let command = journalctl(&args);
        let words: Vec<_> = command.get_args().map(|word| word.to_str().unwrap()).collect();
        let own = "_SYSTEMD_UNIT=flotilla-vm@web.service + _PID=1 UNIT=flotilla-vm@web.service";
        let other = "+ SYSLOG_IDENTIFIER=flotilla-vm FLOTILLA_VM=web";
        assert_eq!(words.join(" "), format!("{own} {other} --lines 5 --follow"));
    }

    #[test]
    fn tail_shows_the_whole_file_unless_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let command = tail(path, &LogsArgs { name: "web".into(), follow: false, lines: None }).unwrap();
        let words: Vec<_> = command.get_args().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(words, ["--lines=+1", "--", path]);
        assert!(
            tail("/nonexistent/log", &LogsArgs { name: "web".into(), follow: false, lines: None }).is_err()
        );
    }
}
