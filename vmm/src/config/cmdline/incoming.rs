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

#[cfg(test)]
mod tests {
    use super::super::tests::{error, run};

    #[test]
    fn what_no_snapshot_holds_is_named_on_save_and_on_restore() {
        let tap =
            |more: &str| format!("-netdev tap,id=n,ifname=t{more} -device virtio-net-device,netdev=n,id=e");
        let ram = "-object memory-backend-ram,size=1G,id=m";
        let user =
            "-machine q35 -object memory-backend-memfd,size=256M,id=r -numa node,nodeid=0,cpus=0,memdev=r";
        for (line, named) in [
            ("-machine microvm,mem-share=on".to_owned(), "-machine mem-share=on"),
            ("-mem-path /srv/ram".to_owned(), "-mem-path"),
            // Huge pages come from there alone.
            ("-mem-path /dev/hugepages".to_owned(), "-mem-path"),
            (
                "-machine q35 -object memory-backend-file,size=256M,id=r,mem-path=/dev/hugepages -numa node,nodeid=0,cpus=0,memdev=r".to_owned(),
                "memory object \"r\"",
            ),
            (user.to_owned(), "memory object \"r\""),
            ("-device virtio-balloon-device,id=b".to_owned(), "device \"b\": virtio-balloon-device"),
            ("-machine q35 -device virtio-balloon-pci,id=b,bus=pcie.0,addr=2".to_owned(), "device \"b\": virtio-balloon"),
            (tap(",vhost=on"), "device \"e\": vhost=on"),
            (
                "-machine q35 -device vfio-pci,id=v,host=0000:00:05.0,bus=pcie.0,addr=3".to_owned(),
                "device \"v\": vfio-pci",
            ),
            (format!("{ram} -device virtio-mem-device,id=d,memdev=m"), "device \"d\": virtio-mem"),
            ("-device vhost-vsock-device,id=s,guest-cid=3".to_owned(), "device \"s\": vhost-vsock-device"),
        ] {
            let line = format!("-kernel /k -m 256M {line}");
            // That is what a save asks, of the VM as it was started.
            let save = run(&line).snapshot_exclusion();
            assert!(save.as_ref().is_some_and(|what| what.starts_with(named)), "{line}: {save:?}");
            let restore = error(&format!("{line} -incoming file:/x"));
            assert!(restore.starts_with(&format!("-incoming: {named}")), "{line}: {restore}");
            assert!(restore.ends_with(" cannot be used with snapshots: leave it out"), "{line}: {restore}");
        }
        for line in [tap(""), tap(",queues=2")] {
            assert_eq!(run(&format!("-kernel /k {line}")).snapshot_exclusion(), None, "{line}");
        }
    }
}
