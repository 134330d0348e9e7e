//! The command line: owns the single-dash grammar that StratoVirt established, and turns an argument vector into a [`VmConfig`].
//!
//! Two stages. The first (`Given`) knows only which options exist and how many values each takes. The second reads the values
//! of each option in a fixed order, by meaning: `board`, `backends`, `devices`. What spans several options is checked afterwards,
//! by [`VmConfig::validate`]. Nothing touches the host, and no argument vector makes it panic.

mod backends;
mod board;
mod devices;
mod incoming;
mod memory_devices;
mod numa;
mod options;
mod props;
mod small_devices;

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;

pub use options::help;
use options::{Arity, Class, Spec};
pub(super) use props::number;
pub use props::split as items;

use super::{Drive, InvalidConfig, VmConfig};

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// `-help`.
    Help,
    /// `-version`.
    Version,
    /// A VM, validated.
    Run(Box<VmConfig>),
}

/// Why a command line was refused. Each text is one line: which option, what is wrong, what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// An argument that is no option.
    #[error("unknown option '{0}'; see -help")]
    UnknownOption(String),
    /// A value where none is expected.
    #[error("unexpected argument '{0}'; see -help")]
    UnexpectedArgument(String),
    /// Bytes that are no text.
    #[error("argument {0} is not valid UTF-8")]
    NotText(usize),
    /// An option without its value.
    #[error("{0} needs a value; see -help")]
    MissingValue(&'static str),
    /// An option that can be given once.
    #[error("{0} was provided more than once, but cannot be used multiple times")]
    Repeated(&'static str),
    /// An option, or a part of one, that a later version will have.
    #[error("{option}: {what} is not supported in this version")]
    Unsupported {
        /// The option.
        option: &'static str,
        /// The part.
        what: String,
    },
    /// A whole option that a later version will have.
    #[error("{0} is not supported in this version")]
    UnsupportedOption(&'static str),
    /// A key that the option does not have.
    #[error("{option}: unknown key '{key}' (known: {known})")]
    UnknownKey {
        /// The option.
        option: &'static str,
        /// What was written.
        key: String,
        /// What could have been written.
        known: String,
    },
    /// A value that makes no sense.
    #[error("{option}: {message}")]
    BadValue {
        /// The option.
        option: &'static str,
        /// What is wrong and what to write instead.
        message: String,
    },
    /// Values that do not fit together.
    #[error(transparent)]
    Invalid(#[from] InvalidConfig),
}

/// Parses and validates the arguments that follow the program's name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Request, CmdlineError> {
    let mut given = Given::read(args)?;
    if given.flag("-help") {
        return Ok(Request::Help);
    }
    if given.flag("-version") {
        return Ok(Request::Version);
    }
    let mut config = VmConfig::default();
    board::read(&mut given, &mut config)?;
    given.refuse_unsupported()?;
    config.name = given.text("-name", 255)?;
    if let Some(text) = given.one("-uuid") {
        let uuid = uuid::Uuid::parse_str(&text).map_err(|_| CmdlineError::BadValue {
            option: "-uuid",
            message: format!("'{text}' is not a UUID such as 6f1c2b1e-7d1a-4a58-9f0e-5b7c1f6f9a10"),
        })?;
        config.uuid = Some(uuid);
    }
    config.boot.kernel = given.path("-kernel")?;
    config.boot.initrd = given.path("-initrd")?;
    config.boot.append = given.many("-append").join(" ");
    backends::read(&mut given, &mut config)?;
    numa::read(&mut given, &mut config)?;
    devices::read(&mut given, &mut config)?;
    config.claim_device_memory();
    config.incoming = incoming::read(&mut given)?;
    config.start_paused = given.flag("-S");
    config.process.daemonize = given.flag("-daemonize");
    config.process.pidfile = given.path("-pidfile")?;
    config.process.log_file = given.path("-D")?;
    config.process.disable_seccomp = given.flag("-disable-seccomp");
    config.process.trace = given.one("-trace").map(|text| backends::trace(&text)).transpose()?;
    config.validate()?;
    Ok(Request::Run(Box::new(config)))
}

/// What stands after `-drive`, checked as far as it can be without the rest of a command line.
pub fn drive(text: &str) -> Result<Drive, CmdlineError> {
    let drive = backends::drive(text)?;
    super::validate::drive(&drive)?;
    Ok(drive)
}

/// The options that were given, with their values still as text.
struct Given {
    values: HashMap<&'static str, Vec<String>>,
    /// The first option that a later version will have.
    unsupported: Option<&'static str>,
}

impl Given {
    fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, CmdlineError> {
        let mut given = Self { values: HashMap::new(), unsupported: None };
        let mut args = args
            .into_iter()
            .enumerate()
            .map(|(i, arg)| arg.into_string().map_err(|_| CmdlineError::NotText(i + 1)))
            .peekable();
        while let Some(arg) = args.next() {
            let arg = arg?;
            if arg == "--" {
                // Ends the options; nothing may follow, since there are no other arguments.
                return match args.next() {
                    None => Ok(given),
                    Some(rest) => Err(CmdlineError::UnexpectedArgument(rest?)),
                };
            }
            if !arg.starts_with('-') {
                return Err(CmdlineError::UnexpectedArgument(arg));
            }
            let spec = options::find(&arg).ok_or(CmdlineError::UnknownOption(arg))?;
            let most = match spec.arity {
                Arity::Flag => 0,
                Arity::One | Arity::Optional => 1,
                Arity::Many => usize::MAX,
            };
            let mut values = Vec::new();
            while values.len() < most
                && args.peek().is_some_and(|next| next.as_ref().map_or(true, |text| !is_option(text)))
            {
                match args.next() {
                    Some(value) => values.push(value?),
                    None => break,
                }
            }
            given.add(spec, values)?;
        }
        Ok(given)
    }

    fn add(&mut self, spec: &Spec, values: Vec<String>) -> Result<(), CmdlineError> {
        if values.is_empty() && matches!(spec.arity, Arity::One | Arity::Many) {
            return Err(CmdlineError::MissingValue(spec.name));
        }
        match spec.class {
            Class::Ignored => return Ok(()),
            Class::Unsupported => _ = self.unsupported.get_or_insert(spec.name),
            Class::Used => {}
        }
        if spec.arity != Arity::Many && self.values.contains_key(spec.name) {
            return Err(CmdlineError::Repeated(spec.name));
        }
        self.values.entry(spec.name).or_default().extend(values);
        Ok(())
    }

    fn refuse_unsupported(&self) -> Result<(), CmdlineError> {
        self.unsupported.map_or(Ok(()), |name| Err(CmdlineError::UnsupportedOption(name)))
    }

    fn flag(&mut self, name: &'static str) -> bool {
        self.values.remove(name).is_some()
    }

    fn one(&mut self, name: &'static str) -> Option<String> {
        self.values.remove(name)?.into_iter().next()
    }

    fn many(&mut self, name: &'static str) -> Vec<String> {
        self.values.remove(name).unwrap_or_default()
    }

    fn text(&mut self, name: &'static str, most: usize) -> Result<Option<String>, CmdlineError> {
        match self.one(name) {
            Some(text) if text.is_empty() || text.len() > most => {
                Err(CmdlineError::BadValue { option: name, message: format!("write 1 to {most} bytes") })
            }
            text => Ok(text),
        }
    }

    fn path(&mut self, name: &'static str) -> Result<Option<PathBuf>, CmdlineError> {
        self.one(name).map(|text| props::path_value(name, &text)).transpose()
    }
}

/// A lone dash is a value: the name that many programs give to standard input.
fn is_option(text: &str) -> bool {
    text.len() > 1 && text.starts_with('-')
}

#[cfg(test)]
mod firmware_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod whole_line_tests;
