//! The two functions that make a q35: the host bridge and the LPC bridge (Intel 3 Series and ICH9 datasheets). Their registers only say where
//! things are; nothing can be moved.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{ConfigSpace, Identity};
use super::{Function, Mapping};

const INTEL: u16 = 0x8086;
/// Red Hat's subsystem ids of virtual machines.
const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);

struct Fixed(Mutex<ConfigSpace>);

impl Fixed {
    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Function for Fixed {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        self.lock().write(offset, data);
        false
    }

    fn mappings(&self) -> Vec<Mapping> {
        Vec::new()
    }

    fn mapped(&self, _: u8, _: Option<u64>) {}

    fn reset(&self) {
        self.lock().reset();
    }
}

fn fixed(device: u16, revision: u8, class: u32, registers: &[(u16, &[u8])]) -> Arc<dyn Function> {
    let subsystem = SUBSYSTEM;
    let identity = Identity { vendor: INTEL, device, revision, class, subsystem, multifunction: false };
    let space = registers
        .iter()
        .fold(ConfigSpace::endpoint(&identity), |space, (at, data)| space.with_bytes(*at, data, &[]));
    Arc::new(Fixed(Mutex::new(space)))
}

/// The host bridge, 8086:29c0: PCIEXBAR says that ECAM for 256 buses is at `ecam`.
pub fn host_bridge(ecam: u64) -> Arc<dyn Function> {
    const PCIEXBAR: u16 = 0x60;
    const ENABLE: u64 = 1;
    fixed(0x29c0, 0, 0x06_00_00, &[(PCIEXBAR, &(ecam | ENABLE).to_le_bytes())])
}

/// The LPC bridge, 8086:2918: PMBASE says that the ACPI registers are at I/O port `pm_base`.
pub fn lpc(pm_base: u16) -> Arc<dyn Function> {
    const PMBASE: u16 = 0x40;
    const IO_SPACE: u32 = 1;
    const ACPI_CNTL: u16 = 0x44;
    const ACPI_ENABLE: u8 = 0x80;
    let base = (u32::from(pm_base) | IO_SPACE).to_le_bytes();
    fixed(0x2918, 2, 0x06_01_00, &[(PMBASE, &base), (ACPI_CNTL, &[ACPI_ENABLE])])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_say_where_things_are_and_cannot_be_moved() {
        let word = |f: &Arc<dyn Function>, at| {
            let mut word = [0; 4];
            f.read_config(at, &mut word);
            u32::from_le_bytes(word)
        };
        let (bridge, lpc) = (host_bridge(0xb000_0000), lpc(0x600));
        assert_eq!((word(&bridge, 0), word(&bridge, 8)), (0x29c0_8086, 0x0600_0000));
        for function in [&bridge, &lpc] {
            for at in (0..256).step_by(4) {
                assert!(!function.write_config(at, &[0xff; 4]));
            }
            assert!(function.mappings().is_empty());
        }
        assert_eq!((word(&bridge, 0x60), word(&bridge, 0x64)), (0xb000_0001, 0));
        assert_eq!((word(&lpc, 0x40), word(&lpc, 0x44), word(&lpc, 0)), (0x601, 0x80, 0x2918_8086));
    }
}
