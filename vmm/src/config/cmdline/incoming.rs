//! `-incoming`: where a VM comes from that does not boot.

use std::path::PathBuf;

use super::props::Props;
use super::{CmdlineError, Given};
use crate::config::Incoming;

const OPTION: &str = "-incoming";

pub(super) fn read(given: &mut Given) -> Result<Option<Incoming>, CmdlineError> {
    let Some(text) = given.one(OPTION) else { return Ok(None) };
    let mut props = Props::parse(OPTION, &text, Some("uri"))?;
    let bad = |message: String| CmdlineError::BadValue { option: OPTION, message };
    let uri = props.word("uri")?.unwrap_or_default();
    let Some(path) = uri.strip_prefix("file:") else {
        let (scheme, _) = uri.split_once(':').unwrap_or((&uri, ""));
        return Err(match scheme {
            "tcp" | "unix" | "defer" => props.unsupported(scheme.to_owned()),
            _ => bad(format!("invalid uri '{uri}': write file:/absolute/path/of/a/snapshot")),
        });
    };
    let dir = PathBuf::from(path);
    if !dir.is_absolute() {
        return Err(bad(format!("'{path}' is no absolute path: write file:/absolute/path/of/a/snapshot")));
    }
    let mapped = props.boolean("mapped")?.unwrap_or(true);
    let verify = props.boolean("verify")?.unwrap_or(false);
    let fresh = match props.text("identity")?.as_deref() {
        None | Some("same") => false,
        Some("new") => true,
        Some(other) => return Err(props.bad(format!("identity={other}: write new or same"))),
    };
    props.finish()?;
    Ok(Some(Incoming { dir, mapped, verify, fresh }))
}
