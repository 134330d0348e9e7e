//! `flotilla define`: from a JSON or TOML file, or from options, to a stored definition. `run` uses its parts.
//!
//! The schema is `dbus_api::spec`; ranges and existence of files are checked by the daemon. Here: reading, naming what is wrong where, and
//! making paths absolute, because the daemon's folder is not the user's.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};

use dbus_api::error::Error;
use dbus_api::spec::{HostShutdown, Limits, Restart, VmSpec};
use zbus::Variant;

use crate::args::DefineArgs;
use crate::args::spec::SpecArgs;
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::output;

/// Definitions are short; whatever is longer is another file.
const LIMIT: u64 = 1 << 20;

/// A definition that has been read and waits to be sent.
pub(crate) struct Prepared {
    name: String,
    spec: VmSpec,
    replace: bool,
}

/// Reads what the command line asks for; needs no daemon.
pub(crate) fn prepare(args: DefineArgs) -> Result<Prepared, Failure> {
    let (name, spec) = read(args.source, args.name, args.spec)?;
    Ok(Prepared { name, spec, replace: args.replace })
}

/// `flotilla define`, second half.
pub(crate) async fn define(client: &Client, prepared: Prepared) -> Result<(), Failure> {
    let Prepared { name, spec, replace } = prepared;
    let generation = store(client, &name, &spec, replace).await?;
    let verb = if generation > 1 { "defined again" } else { "defined" };
    output::print(&format!("{name} {verb}\n"))
}

/// Sends a definition; gives its generation.
pub(crate) async fn store(client: &Client, name: &str, spec: &VmSpec, replace: bool) -> Result<u64, Failure> {
    let text = serde_json::to_string(spec)
        .map_err(|error| Failure::new(Exit::Definition, format!("a path is not UTF-8: {error}")))?;
    let options = HashMap::from([("replace", Variant::from(replace))]);
    let sent = client.manager.define_vm(name, &text, options).await;
    let (_, generation) = sent.map_err(|error| match error {
        Error::VmExists(_) if !replace => Failure::new(
            Exit::State,
            format!("VM \"{name}\" is defined already: --replace changes its definition"),
        ),
        error => client.failed(error),
    })?;
    Ok(generation)
}

/// Name and definition from a file or from options.
pub(crate) fn read(
    source: String,
    name: Option<String>,
    options: SpecArgs,
) -> Result<(String, VmSpec), Failure> {
    if options.kernel.is_some() {
        return Ok((source, from_options(options, None)?));
    }
    if let Some(option) = options.first_extra() {
        let text = format!("{option} goes with --kernel: with a definition file, write it into the file");
        return Err(Failure::new(Exit::Usage, text));
    }
    let (text, folder) = if source == "-" {
        (read_limited(std::io::stdin().lock(), "standard input")?, PathBuf::from("."))
    } else {
        let path = Path::new(&source);
        if path.is_dir() {
            return Err(Failure::new(Exit::Definition, format!("{source}: is a folder, not a definition")));
        }
        let file = std::fs::File::open(path).map_err(|error| {
            let hint = match error.kind() {
                std::io::ErrorKind::NotFound => "; to define a VM without a file, give --kernel",
                _ => "",
            };
            Failure::new(Exit::Failed, format!("{source}: {error}{hint}"))
        })?;
        (read_limited(file, &source)?, path.parent().unwrap_or(Path::new("")).to_owned())
    };
    let name = match name {
        Some(name) => name,
        None if source == "-" => {
            return Err(Failure::new(Exit::Usage, "a definition from the standard input needs --name"));
        }
        None => name_of(Path::new(&source)),
    };
    let label = if source == "-" { "standard input" } else { &source };
    let spec = parse(&text, Format::of(Path::new(&source), &text), label)?;
    Ok((name, absolute(spec, &folder)?))
}

/// A definition from a JSON file, with nothing added.
pub(crate) fn of_file(path: &Path) -> Result<VmSpec, Failure> {
    let label = path.display().to_string();
    let file =
        std::fs::File::open(path).map_err(|error| Failure::new(Exit::Failed, format!("{label}: {error}")))?;
    parse(&read_limited(file, &label)?, Format::Json, &label)
}

/// The file's name without `.json` or `.toml`; other endings belong to the name.
fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(".json").or_else(|| name.strip_suffix(".toml"));
    stem.unwrap_or(&name).to_owned()
}

fn read_limited(from: impl Read, label: &str) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    from.take(LIMIT + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::new(Exit::Failed, format!("{label}: {error}")))?;
    if bytes.len() as u64 > LIMIT {
        let text =
            format!("{label}: longer than 1 MiB, this is no definition (to define a kernel, use --kernel)");
        return Err(Failure::new(Exit::Definition, text));
    }
    String::from_utf8(bytes).map_err(|_| {
        let text = format!("{label}: not text, this is no definition (to define a kernel, use --kernel)");
        Failure::new(Exit::Definition, text)
    })
}

/// How a definition is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    Toml,
}

impl Format {
    /// By the file's ending, else by its first character: no TOML begins with a brace.
    fn of(path: &Path, text: &str) -> Self {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("json") => Self::Json,
            Some("toml") => Self::Toml,
            _ if text.trim_start().starts_with('{') => Self::Json,
            _ => Self::Toml,
        }
    }
}

/// Reads a definition; an error names the file, the line and the key.
fn parse(text: &str, format: Format, label: &str) -> Result<VmSpec, Failure> {
    let fail = |line: Option<usize>, key: Option<String>, message: &str| {
        let line = line.filter(|line| *line > 0).map(|line| format!(":{line}")).unwrap_or_default();
        let key = key
            .filter(|key| key != "." && !key.is_empty() && !message.contains(&format!("`{key}`")))
            .map(|key| format!("{key}: "))
            .unwrap_or_default();
        let message = message
            .replace("unknown field", "unknown key")
            .replace("missing field", "missing key")
            .replace("duplicate field", "key given twice:");
        Failure::new(Exit::Definition, format!("{label}{line}: {key}{message}"))
    };
    let spec: VmSpec = match format {
        Format::Json => {
            let mut reader = serde_json::Deserializer::from_str(text);
            let of_json = |error: &serde_json::Error, key| {
                let message = error.to_string();
                let message = message.split(" at line ").next().unwrap_or_default();
                fail(Some(error.line()), key, message)
            };
            let spec = serde_path_to_error::deserialize(&mut reader)
                .map_err(|error| of_json(error.inner(), Some(error.path().to_string())))?;
            reader.end().map_err(|error| of_json(&error, None))?;
            spec
        }
        Format::Toml => {
            let line_of = |error: &toml::de::Error| {
                let start = error.span()?.start;
                Some(text.get(..start)?.matches('\n').count() + 1)
            };
            let reader = toml::de::Deserializer::parse(text)
                .map_err(|error| fail(line_of(&error), None, error.message()))?;
            serde_path_to_error::deserialize(reader).map_err(|error| {
                fail(line_of(error.inner()), Some(error.path().to_string()), error.inner().message())
            })?
        }
    };
    if spec.kernel.is_none() && spec.firmware.is_none() {
        return Err(fail(Some(1), None, "missing field `kernel` (a q35 can have `firmware` instead)"));
    }
    Ok(spec)
}

/// A definition from options; `kernel` stands in when `--kernel` is absent. Without either it has none.
pub(crate) fn from_options(options: SpecArgs, kernel: Option<PathBuf>) -> Result<VmSpec, Failure> {
    let spec = VmSpec {
        uuid: None,
        description: String::new(),
        labels: BTreeMap::new(),
        machine: options.machine.unwrap_or_default(),
        cpus: options.cpus.unwrap_or(1),
        memory: options.memory.unwrap_or_default(),
        kernel: options.kernel.or(kernel),
        firmware: None,
        initrd: options.initrd,
        append: options.append,
        balloon: false,
        rng: false,
        restart: Restart::default(),
        autostart: false,
        autostart_order: 0,
        autostart_delay: 0,
        host_shutdown: HostShutdown::default(),
        host_shutdown_timeout: 30,
        limits: Limits::default(),
        disks: options.disks,
        nics: options.nics.into_iter().chain(options.network_nics).collect(),
    };
    absolute(spec, Path::new("."))
}

/// Makes every path absolute, counted from `folder`.
fn absolute(mut spec: VmSpec, folder: &Path) -> Result<VmSpec, Failure> {
    let firmware = spec.firmware.iter_mut().flat_map(|firmware| [&mut firmware.code, &mut firmware.vars]);
    let images =
        spec.disks.iter_mut().flat_map(|disk| std::iter::once(&mut disk.path).chain(&mut disk.backing));
    let paths = spec.kernel.iter_mut().chain(spec.initrd.as_mut()).chain(firmware).chain(images);
    for path in paths {
        if path.as_os_str().is_empty() {
            return Err(Failure::new(Exit::Definition, "a path is empty"));
        }
        *path = std::path::absolute(folder.join(&*path))
            .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", path.display())))?;
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str, format: Format) -> String {
        let failure = parse(text, format, "web").unwrap_err();
        assert_eq!(failure.exit, Exit::Definition);
        failure.to_string()
    }

    #[test]
    fn json_and_toml_say_the_same() {
        let json = parse(
            r#"{"kernel":"k","memory":"1G","disks":[{"path":"d","readonly":true}],"nics":[{"bridge":"br0"}]}"#,
            Format::Json,
            "x",
        );
        let toml = parse(
            "kernel = \"k\"\nmemory = 1024\n[[disks]]\npath = \"d\"\nreadonly = true\n[[nics]]\nbridge = \"br0\"\n",
            Format::Toml,
            "x",
        );
        assert_eq!(json.unwrap(), toml.unwrap());
    }

    #[test]
    fn errors_name_line_and_key() {
        for (text, format, parts) in [
            ("{\n\"kernel\":\"k\",\n\"memroy\":1}", Format::Json, &["web:3: ", "unknown key `memroy`"][..]),
            ("kernel = \"k\"\nmemroy = 1\n", Format::Toml, &["web:2: ", "unknown key `memroy`"]),
            ("{\"kernel\":\"k\",\n\"cpus\":\"two\"}", Format::Json, &["web:2: ", "cpus: invalid type"]),
            ("kernel = \"k\"\n\ncpus = 256\n", Format::Toml, &["web:3: ", "cpus: ", "256"]),
            (
                "kernel = \"k\"\n[[disks]]\npath = \"a\"\n[[disks]]\npath = \"b\"\nro = true\n",
                Format::Toml,
                &["web:6: ", "unknown key `ro`"],
            ),
            ("{\"kernel\":\"k\",\"memory\":\"5X\"}", Format::Json, &["web:1: ", "memory: ", "unknown unit"]),
            ("{}", Format::Json, &["web:1: ", "missing key `kernel`"]),
            ("", Format::Toml, &["missing key `kernel`"]),
            ("{\"kernel\":\"k\"} x", Format::Json, &["web:1: ", "trailing"]),
            ("kernel = \n", Format::Toml, &["web:1: "]),
            ("[1]", Format::Json, &["web:1: "]),
        ] {
            let message = message(text, format);
            for part in parts {
                assert!(message.contains(part), "{text:?}: {message}");
            }
            assert!(!message.contains('\n'));
        }
    }

    #[test]
    fn paths_count_from_the_folder() {
        let spec = parse(
            r#"{"kernel":"k","initrd":"/i","firmware":{"code":"c","vars":"/v"},
                "disks":[{"path":"../d"},{"path":"./e","backing":"f"}]}"#,
            Format::Json,
            "x",
        );
        let spec = absolute(spec.unwrap(), Path::new("/vm/web")).unwrap();
        let paths: Vec<_> = spec.disks.iter().map(|disk| disk.path.to_str().unwrap()).collect();
        assert_eq!(spec.kernel.as_deref(), Some(Path::new("/vm/web/k")));
        let firmware = spec.firmware.unwrap();
        assert_eq!((firmware.code.to_str(), firmware.vars.to_str()), (Some("/vm/web/c"), Some("/v")));
        assert_eq!(spec.disks[1].backing.as_deref(), Some(Path::new("/vm/web/f")));
        assert_eq!(spec.initrd.as_deref(), Some(Path::new("/i")));
        assert_eq!(paths, ["/vm/web/../d", "/vm/web/e"]);
        let empty = parse(r#"{"kernel":""}"#, Format::Json, "x").unwrap();
        assert_eq!(absolute(empty, Path::new("/vm")).unwrap_err().exit, Exit::Definition);
    }

    #[test]
    fn names_and_formats_come_from_the_file() {
        for (path, name) in
            [("a/web.toml", "web"), ("web-1.2.json", "web-1.2"), ("web", "web"), ("w.x", "w.x")]
        {
            assert_eq!(name_of(Path::new(path)), name);
        }
        assert_eq!(Format::of(Path::new("-"), " \n{"), Format::Json);
        assert_eq!(Format::of(Path::new("web"), "kernel = \"{\""), Format::Toml);
        assert_eq!(Format::of(Path::new("web.toml"), "{"), Format::Toml);
    }

    #[test]
    fn a_file_that_is_no_definition_is_refused_soon() {
        assert_eq!(read_limited(std::io::repeat(b'x'), "x").unwrap_err().exit, Exit::Definition);
        assert_eq!(read_limited(&b"\xff\xfe"[..], "x").unwrap_err().exit, Exit::Definition);
        let options = SpecArgs { cpus: Some(2), ..SpecArgs::default() };
        let failure = read("web.toml".into(), None, options).unwrap_err();
        assert_eq!((failure.exit, failure.message.starts_with("--cpus")), (Exit::Usage, true));
    }
}
