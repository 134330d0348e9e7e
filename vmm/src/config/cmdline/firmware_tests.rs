//! `-drive if=pflash`: what is firmware, and what each line that is none is told.

use super::tests::{error, run};
use std::path::Path;

#[test]
fn firmware_and_its_variables() {
    let config = run(
        "-machine q35 -drive file=/usr/share/OVMF/CODE.fd,if=pflash,unit=0,readonly=true,format=raw \
         -drive file=/vars,if=pflash,unit=1,direct=on,id=vars -drive file=/d,id=d -device virtio-blk-pci,drive=d,id=d,addr=2,bus=pcie.0",
    );
    assert!(config.boot.kernel.is_none());
    assert_eq!(config.drives.len(), 1);
    let [code, vars] = &config.flash[..] else { panic!("{:?}", config.flash) };
    assert_eq!((code.id.as_str(), code.readonly, code.pflash_unit), ("pflash0", true, Some(0)));
    assert_eq!((vars.id.as_str(), vars.readonly, vars.pflash_unit), ("vars", false, Some(1)));
    assert_eq!((&*vars.file, vars.direct), (Path::new("/vars"), false));
}

#[test]
fn each_bad_line_of_firmware_gets_one_clear_line() {
    let code = "-drive if=pflash,unit=0,file=/c";
    for (line, want) in [
        ("-machine q35".to_owned(), "a kernel is needed: add -kernel FILE"),
        (
            "-machine q35 -drive if=pflash,file=/c".to_owned(),
            "-drive: 'unit' is missing for 'pflash' device: add unit=0 for code, or unit=1 for variables",
        ),
        (
            "-machine q35 -drive if=pflash,unit=0,file=/c,format=qcow2".to_owned(),
            "-drive: format=qcow2: flash is raw",
        ),
        ("-machine q35 -drive if=ide,id=d,file=/c".to_owned(), "-drive: if=ide: use none or pflash"),
        (
            "-machine q35 -drive if=pflash,unit=1,file=/c".to_owned(),
            "drive \"pflash1\": the firmware itself is missing: add -drive if=pflash,unit=0,readonly=on,file=FIRMWARE",
        ),
        (
            format!("-machine q35 {code} -drive if=pflash,unit=0,file=/d,id=other"),
            "drive \"other\": there is a pflash with unit=0 already: leave one of them out",
        ),
        (
            format!("-machine microvm -kernel /k {code}"),
            "drive \"pflash0\": if=pflash is for -machine q35: leave it out",
        ),
    ] {
        assert_eq!(error(&line), want, "{line}");
    }
    for line in [
        "-machine q35 -drive if=pflash,unit=2,file=/c",
        "-machine q35 -drive if=pflash,unit=0",
        "-machine q35 -drive if=pflash,unit=0,file=/c,iops=3",
        "-machine q35 -drive if=pflash,unit=0,file=/c,id=d -drive file=/x,id=d -device virtio-blk-pci,drive=d,id=d,addr=2,bus=pcie.0",
    ] {
        assert!(!error(line).is_empty());
    }
}
