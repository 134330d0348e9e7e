//! The command line of `flotilla template` and `flotilla clone`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::WaitArgs;

/// `flotilla template`.
#[derive(Debug, Subcommand)]
pub(crate) enum TemplateVerb {
    /// Make a template of a VM that runs or is paused
    ///
    /// The VM is paused while its memory is saved and its disks are copied, which takes no time where the file system can share blocks. Clones
    /// of the template go on where the VM was. What the template holds is compared with checksums by `flotilla template verify`.
    #[command(after_help = "\
Examples:
  flotilla template create web base
  flotilla template create web base --after stop --description warm")]
    Create(CreateArgs),
    /// List the templates
    #[command(visible_alias = "ls", after_help = "Example:\n  flotilla template list --json")]
    List(ListArgs),
    /// Show all about a template
    #[command(after_help = "Example:\n  flotilla template show base --json")]
    Show(ShowArgs),
    /// Compare a template's files with their checksums
    #[command(after_help = "Example:\n  flotilla template verify base")]
    Verify(NameArgs),
    /// Remove templates that no VM needs
    #[command(visible_alias = "remove", after_help = "Example:\n  flotilla template rm base")]
    Rm(RmArgs),
}

/// What becomes of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum After {
    /// It runs on if it ran
    Resume,
    /// It stays paused
    Pause,
    /// It is powered off
    Stop,
}

/// `flotilla template create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// VM that it is made of
    pub(crate) vm: String,
    /// Name of the template
    #[arg(value_name = "TEMPLATE")]
    pub(crate) name: String,
    /// What becomes of the VM
    #[arg(long, value_enum, default_value = "resume")]
    pub(crate) after: After,
    /// Text for people
    #[arg(long, value_name = "TEXT")]
    pub(crate) description: Option<String>,
}

/// `flotilla template list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `flotilla template show`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Template
    #[arg(value_name = "TEMPLATE")]
    pub(crate) name: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `flotilla template verify`.
#[derive(Debug, Args)]
pub(crate) struct NameArgs {
    /// Template
    #[arg(value_name = "TEMPLATE")]
    pub(crate) name: String,
}

/// `flotilla template rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Templates
    #[arg(required = true, value_name = "TEMPLATE")]
    pub(crate) names: Vec<String>,
}

/// `flotilla clone`.
#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// Template
    pub(crate) template: String,
    /// How many
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) count: u32,
    /// Their name; % stands for the number, %% for one of two digits at least [default: TEMPLATE-%]
    #[arg(long, value_name = "PATTERN")]
    pub(crate) name: Option<String>,
    /// Leave their vCPUs standing; `flotilla resume` lets them go
    #[arg(long)]
    pub(crate) paused: bool,
    /// Label beside those of the template; may be given again
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    pub(crate) labels: Vec<(String, String)>,
    /// File for their guests, as cloud-init's user-data
    #[arg(long, value_name = "FILE")]
    pub(crate) user_data: Option<PathBuf>,
    /// File for their guests, as cloud-init's network-config
    #[arg(long, value_name = "FILE")]
    pub(crate) network_config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        assert_eq!(parse_label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(parse_label("a="), Ok(("a".into(), String::new())));
        assert!(parse_label("=b").is_err() && parse_label("a").is_err());
    }
}
