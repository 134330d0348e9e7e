//! A VM's definition, as JSON or TOML: refused in words, or a VM whose command line the VMM takes and understands.
#![no_main]

use std::path::Path;

use fuzz::fleet::command::{Place, build};
use fuzz::fleet::spec;
use fuzz::spec::VmSpec;
use libfuzzer_sys::fuzz_target;
use vmm::config::cmdline::{self, Request};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let spec = match text.trim_start().starts_with('{') {
        true => spec::parse(text).map_err(|error| error.to_string()),
        false => toml::from_str::<VmSpec>(text)
            .map_err(|error| error.to_string())
            .and_then(|spec| spec::check(&spec).map(|()| spec).map_err(|error| error.to_string())),
    };
    let spec = match spec {
        Ok(spec) => spec,
        Err(error) => return assert!(!error.is_empty()),
    };
    // As it is stored, it is the same.
    let stored = serde_json::to_string(&spec).expect("a definition can be stored");
    assert_eq!(spec::parse(&stored).expect("and read"), spec);
    let taps: Vec<String> = (0..spec.nics.len()).map(|at| format!("fl-{at}")).collect();
    let place = Place {
        vmm: Path::new("/usr/bin/flotilla-vmm"),
        name: "web",
        uuid: spec.uuid.unwrap_or_default(),
        sockets: Path::new("/run/flotilla-vm/web"),
        taps: &taps,
        incoming: None,
        paused: false,
    };
    let line = build(&spec, &place);
    match cmdline::parse(line.iter().skip(1).map(Into::into)) {
        Ok(Request::Run(config)) => {
            assert_eq!((config.memory.size, config.smp.cpus), (spec.memory.0, spec.cpus));
            assert_eq!(config.boot.kernel.as_deref(), spec.kernel.as_deref());
            assert_eq!(config.boot.initrd, spec.initrd);
            assert!(spec.append.is_none_or(|append| config.boot.append == append));
            assert_eq!((config.drives.len(), config.netdevs.len()), (spec.disks.len(), spec.nics.len()));
            for (drive, disk) in config.drives.iter().zip(&spec.disks) {
                assert_eq!((drive.file.as_path(), drive.readonly), (disk.path.as_path(), disk.readonly));
            }
        }
        Ok(_) => panic!("{line:?} is no VM"),
        Err(error) => panic!("{line:?}: {error}"),
    }
});
