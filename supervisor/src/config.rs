//! What the administrator sets: command line over `/etc/flotilla/flotillad.toml` over defaults. An unknown key is an error that names it.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use dbus_api::spec::{Firmware, Size};
use ipnet::IpNet;
use netsetup::BridgeSpec;
use serde::Deserialize;

use crate::fleet::gate::Admission;

/// The file that is read when none is named; it need not exist.
pub const DEFAULT_FILE: &str = "/etc/flotilla/flotillad.toml";

/// Why the configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is malformed.
    #[error("configuration {path}: {text}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        text: String,
    },
    /// Metrics would be told to other hosts.
    #[error(
        "metrics.listen: {0} is not a loopback address: use 127.0.0.1 or [::1], and a proxy for other hosts"
    )]
    NotLoopback(SocketAddr),
    /// A directory or program is not given as an absolute path.
    #[error("{what}: {path:?} is not an absolute path")]
    Relative {
        /// Which setting.
        what: &'static str,
        /// The value.
        path: PathBuf,
    },
}

/// How VMM processes are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LauncherKind {
    /// Each VM as flotilla-vm@NAME.service.
    Systemd,
    /// Plain processes, for hosts without systemd.
    Process,
}

/// Options of the command line.
#[derive(Debug, Default, Parser)]
#[command(
    name = "flotillad",
    version,
    about = "The daemon that owns this host's fleet of virtual machines",
    after_help = "Examples:
  flotillad                                   as flotillad.service runs it: system bus, VMs as systemd units
  flotillad --bus session --launcher process --state-dir ~/vms --runtime-dir $XDG_RUNTIME_DIR/flotilla
                                              a quick try without root and without systemd
  FLOTILLA_LOG=debug flotillad                with more messages (error, warn, info, debug, trace)

The VMs run on when flotillad ends; it finds them again when it starts."
)]
pub struct Options {
    /// Configuration file [default: /etc/flotilla/flotillad.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Bus to serve: system, session or a D-Bus address [default: system]
    #[arg(long, value_name = "BUS")]
    pub bus: Option<String>,
    /// How VMs are run [default: systemd]
    #[arg(long, value_enum)]
    pub launcher: Option<LauncherKind>,
    /// Definitions [default: /var/lib/flotilla]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Sockets, and records of running VMs [default: /run/flotilla]
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// Program that runs one VM [default: /usr/bin/flotilla-vmm]
    #[arg(long, value_name = "FILE")]
    pub vmm: Option<PathBuf>,
}

/// The file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    bus: Option<String>,
    launcher: Option<LauncherKind>,
    state_dir: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
    vmm: Option<PathBuf>,
    #[serde(default)]
    bridge: Vec<Bridge>,
    #[serde(default)]
    admission: Limits,
    #[serde(default)]
    metrics: Metrics,
    firmware: Option<Firmware>,
    #[serde(default)]
    pool: Pool,
}

/// Units that wait for a VM.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pool {
    #[serde(default)]
    size: u16,
}

/// Who else may read the metrics.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metrics {
    listen: Option<SocketAddr>,
}

/// What the VMs of the host may take together.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    max_vms: Option<u32>,
    max_memory: Option<Size>,
    max_cpus: Option<u32>,
}

/// A bridge that is made when the daemon starts and kept when no VM uses it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bridge {
    name: String,
    #[serde(default)]
    addresses: Vec<IpNet>,
    mtu: Option<u32>,
}

/// Everything settled.
#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    /// `system`, `session` or an address.
    pub bus: String,
    /// How processes are made.
    pub launcher: LauncherKind,
    /// Definitions.
    pub state_dir: PathBuf,
    /// Sockets and process records.
    pub runtime_dir: PathBuf,
    /// The VMM program.
    pub vmm: PathBuf,
    /// Bridges to make.
    pub bridges: Vec<BridgeSpec>,
    /// Limits of the host.
    pub admission: Admission,
    /// Loopback address where metrics are served besides their socket.
    pub metrics: Option<SocketAddr>,
    /// Firmware of VMs that are made from images; its variables are copied for each.
    pub firmware: Option<Firmware>,
    /// How many units wait for a VM under systemd, so that clones need none to be started.
    pub spares: u16,
}

impl Config {
    /// Reads the file and puts the options over it.
    pub fn load(options: Options) -> Result<Self, ConfigError> {
        let path = options.config.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && options.config.is_none() => {
                String::new()
            }
            other => other.map_err(|source| ConfigError::Read { path: path.to_owned(), source })?,
        };
        let file: File = toml::from_str(&text)
            .map_err(|error| ConfigError::Syntax { path: path.to_owned(), text: error.to_string() })?;
        let bridge = |b: Bridge| BridgeSpec { name: b.name, addresses: b.addresses, mtu: b.mtu };
        let pick = |option: Option<PathBuf>, file: Option<PathBuf>, default: &str| {
            option.or(file).unwrap_or_else(|| default.into())
        };
        let config = Self {
            bus: options.bus.or(file.bus).unwrap_or_else(|| "system".to_owned()),
            launcher: options.launcher.or(file.launcher).unwrap_or(LauncherKind::Systemd),
            state_dir: pick(options.state_dir, file.state_dir, "/var/lib/flotilla"),
            runtime_dir: pick(options.runtime_dir, file.runtime_dir, "/run/flotilla"),
            vmm: pick(options.vmm, file.vmm, "/usr/bin/flotilla-vmm"),
            admission: Admission {
                max_vms: file.admission.max_vms,
                max_memory: file.admission.max_memory.map(|size| size.0),
                max_cpus: file.admission.max_cpus,
            },
            bridges: file.bridge.into_iter().map(bridge).collect(),
            metrics: file.metrics.listen,
            firmware: file.firmware,
            spares: file.pool.size,
        };
        if let Some(address) = config.metrics.filter(|address| !address.ip().is_loopback()) {
            return Err(ConfigError::NotLoopback(address));
        }
        let directories =
            [("state_dir", &config.state_dir), ("runtime_dir", &config.runtime_dir), ("vmm", &config.vmm)];
        let firmware = config.firmware.iter();
        let firmware = firmware.flat_map(|f| [("firmware.code", &f.code), ("firmware.vars", &f.vars)]);
        for (what, path) in directories.into_iter().chain(firmware) {
            // The VMM's command line must mean the same in every directory.
            if !path.is_absolute() {
                return Err(ConfigError::Relative { what, path: path.clone() });
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, arguments: &[&str]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flotillad.toml");
        std::fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap().to_owned();
        let arguments = ["flotillad", "--config", &path].into_iter().chain(arguments.iter().copied());
        Config::load(Options::try_parse_from(arguments).unwrap())
    }

    #[test]
    fn options_go_over_the_file_and_the_file_over_defaults() {
        let text = r#"
            launcher = "process"
            vmm = "/opt/vmm"
            [[bridge]]
            name = "br0"
            addresses = ["10.0.0.1/24", "fd00::1/64"]
            mtu = 9000
            [admission]
            max_memory = "2G"
            [metrics]
            listen = "[::1]:9775"
            [firmware]
            code = "/fw/code"
            vars = "/fw/vars"
            [pool]
            size = 8
        "#;
        let config = load(text, &["--vmm", "/x/vmm"]).unwrap();
        assert_eq!((config.launcher, config.vmm), (LauncherKind::Process, PathBuf::from("/x/vmm")));
        assert_eq!(config.admission, Admission { max_memory: Some(2 << 30), ..Admission::default() });
        assert_eq!(config.metrics, Some("[::1]:9775".parse().unwrap()));
        assert_eq!(config.firmware.map(|firmware| firmware.vars), Some(PathBuf::from("/fw/vars")));
        assert_eq!(config.spares, 8);
        assert_eq!(config.state_dir, Path::new("/var/lib/flotilla"));
        assert_eq!((config.bridges[0].addresses.len(), config.bridges[0].mtu), (2, Some(9000)));
    }

    #[test]
    fn mistakes_are_named() {
        let cases: [(&str, &[&str], &str); 11] = [
            ("lanucher = \"process\"", &[], "lanucher"),
            ("[[bridge]]\nname=\"b\"\nadresses=[]", &[], "adresses"),
            ("[admission]\nmax_memroy=1", &[], "max_memroy"),
            ("launcher = \"docker\"", &[], "docker"),
            ("[[bridge]]\nname=\"b\"\naddresses=[\"10.0.0.1/99\"]", &[], "10.0.0.1/99"),
            ("", &["--vmm", "vmm"], "not an absolute path"),
            ("[metrics]\nlisten = \"0.0.0.0:9775\"", &[], "not a loopback address"),
            ("[metrics]\nlisten = \"localhost\"", &[], "listen"),
            ("[pool]\nsize = -1", &[], "size"),
            ("[firmware]\ncode = \"/c\"", &[], "vars"),
            ("[firmware]\ncode = \"/c\"\nvars = \"v\"", &[], "firmware.vars"),
        ];
        for (text, arguments, word) in cases {
            let error = load(text, arguments).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        let missing = Options { config: Some("/nonexistent".into()), ..Options::default() };
        assert!(matches!(Config::load(missing), Err(ConfigError::Read { .. })));
    }
}
