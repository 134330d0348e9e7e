//! Where this host has firmware for VMs that boot from their disks: what the administrator names, or else what distributions install.

use std::path::Path;

use dbus_api::spec::Firmware;

use crate::fleet::FleetError;

/// Code, and the variables that a new VM starts with. Firmware that insists on signed kernels is left out: which keys it should trust is
/// for the administrator to say.
const KNOWN: [(&str, &str); 5] = [
    // Debian, Ubuntu: ovmf
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    // Fedora, RHEL: edk2-ovmf
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    // Arch: edk2-ovmf
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    // openSUSE: qemu-ovmf-x86_64
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
];

/// The firmware to use; its variables are a pattern to copy.
pub(super) fn find(named: Option<&Firmware>) -> Result<Firmware, FleetError> {
    find_among(named, &KNOWN)
}

fn find_among(named: Option<&Firmware>, known: &[(&str, &str)]) -> Result<Firmware, FleetError> {
    if let Some(firmware) = named {
        return Ok(firmware.clone());
    }
    let there = known.iter().find(|(code, vars)| Path::new(code).is_file() && Path::new(vars).is_file());
    let missing = || {
        FleetError::NotSupported(
            "this host has no firmware for virtual machines: install the package ovmf (edk2-ovmf), name it in flotillad.toml, or \
             name a kernel"
                .to_owned(),
        )
    };
    let (code, vars) = there.ok_or_else(missing)?;
    Ok(Firmware { code: code.into(), vars: vars.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_whole_is_used_unless_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        for name in ["code1", "code2", "vars2"] {
            std::fs::write(path(name), name).unwrap();
        }
        let (first, second) = ((path("code1"), path("vars1")), (path("code2"), path("vars2")));
        let known = [(first.0.as_str(), first.1.as_str()), (second.0.as_str(), second.1.as_str())];
        assert_eq!(find_among(None, &known).unwrap().code, Path::new(known[1].0));
        assert!(matches!(find_among(None, &known[..1]), Err(FleetError::NotSupported(_))));
        let named = Firmware { code: "/c".into(), vars: "/v".into() };
        assert_eq!(find_among(Some(&named), &known).unwrap(), named);
    }
}
