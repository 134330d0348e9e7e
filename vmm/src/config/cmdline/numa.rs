//! `-numa` and `-smbios`: what the guest's tables say of the board.

use super::props::Props;
use super::{CmdlineError, Given};
use crate::config::{MAX_CPUS, NumaNode, SmbiosText, VmConfig};

/// Reads the options of this file out of `given` into `config`.
pub(super) fn read(given: &mut Given, config: &mut VmConfig) -> Result<(), CmdlineError> {
    for text in given.many("-numa") {
        let mut props = Props::parse("-numa", &text, Some("type"))?;
        match props.word("type")?.as_deref() {
            Some("node") => config.numa.nodes.push(node(&mut props)?),
            Some("dist") => {
                let mut number = |key, low, high| -> Result<u8, CmdlineError> {
                    let number = props.number(key, low..=high)?;
                    let number = number.and_then(|n| u8::try_from(n).ok());
                    number.ok_or_else(|| props.bad(format!("'{key}' is missing: add {key}=NUMBER")))
                };
                let distance = (number("src", 0, 7)?, number("dst", 0, 7)?, number("val", 10, 254)?);
                config.numa.distances.push(distance);
            }
            _ => return Err(props.bad("write node,nodeid=…,cpus=…,memdev=… or dist,src=…,dst=…,val=…")),
        }
        props.finish()?;
    }
    config.numa.nodes.sort_by_key(|node| node.id);
    for text in given.many("-smbios") {
        smbios(&text, &mut config.smbios)?;
    }
    Ok(())
}

fn node(props: &mut Props) -> Result<NumaNode, CmdlineError> {
    let id = props.number("nodeid", 0..=7)?.and_then(|n| u8::try_from(n).ok());
    let id = id.ok_or_else(|| props.bad("'nodeid' is missing: add nodeid=NUMBER"))?;
    let text = props.required("cpus")?;
    let wrong =
        || props.bad(format!("cpus={text}: write numbers and ranges such as 0-3:8, up to {}", MAX_CPUS - 1));
    let number = |text: &str| text.parse().ok().filter(|n: &u8| *n < MAX_CPUS);
    let mut cpus = Vec::new();
    for part in text.split(':') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Some(first), Some(last)) = (number(first), number(last)) else { return Err(wrong()) };
        if first > last {
            return Err(wrong());
        }
        cpus.extend(first..=last);
    }
    Ok(NumaNode { id, cpus, memdev: props.required("memdev")? })
}

/// The texts of each table that can be given (SMBIOS 3.0 §7).
const TEXTS: [(u64, &[&str]); 6] = [
    (0, &["vendor", "version", "date"]),
    (1, &["manufacturer", "product", "version", "serial", "uuid", "sku", "family"]),
    (2, &["manufacturer", "product", "version", "serial", "asset", "location"]),
    (3, &["manufacturer", "version", "serial", "asset", "sku"]),
    (4, &["sock-pfx", "manufacturer", "version", "serial", "asset", "part", "max-speed", "current-speed"]),
    (17, &["loc-pfx", "bank", "manufacturer", "serial", "asset", "part", "speed"]),
];

fn smbios(text: &str, texts: &mut Vec<SmbiosText>) -> Result<(), CmdlineError> {
    let mut props = Props::parse("-smbios", text, None)?;
    let table = props.number("type", 0..=127)?;
    let known = TEXTS.iter().find(|(number, _)| Some(*number) == table);
    let Some((table, keys)) = known else {
        return Err(props.bad("write type=N with N one of 0, 1, 2, 3, 4 and 17"));
    };
    for key in *keys {
        let value = match *key {
            "max-speed" | "current-speed" | "speed" => {
                props.number(key, 0..=65535)?.map(|mhz| mhz.to_string())
            }
            key => props.text(key)?,
        };
        let Some(value) = value else { continue };
        if value.contains(|c: char| !(' '..='~').contains(&c)) {
            return Err(props.bad(format!("{key}: write printable ASCII")));
        }
        if *key == "uuid" && uuid::Uuid::parse_str(&value).is_err() {
            return Err(props.bad(format!("uuid={value} is not a UUID")));
        }
        texts.retain(|t| (t.table, t.key) != (*table as u8, *key));
        texts.push(SmbiosText { table: *table as u8, key, value });
    }
    props.finish()
}
