//! The two functions that make a q35: the host bridge and the LPC bridge (Intel 3 Series and ICH9 datasheets). Their registers say where
//! things are; what a guest can move is ECAM, for firmware has an address of its own for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{ConfigSpace, Identity, touches};
use super::{Function, Mapping};
use crate::bus::BusDevice;

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
    let identity = identity(device, revision, class);
    let space = registers
        .iter()
        .fold(ConfigSpace::endpoint(&identity), |space, (at, data)| space.with_bytes(*at, data, &[]));
    Arc::new(Fixed(Mutex::new(space)))
}

const PCIEXBAR: u16 = 0x60;
const PCIEXBAR_ENABLE: u64 = 1;
/// Bits of PCIEXBAR that a driver may change: whether there is ECAM, and where, below 64 GiB. Its length stays 256 MiB.
const PCIEXBAR_WRITABLE: u64 = 0xf_f000_0001;
const ECAM_SIZE: u64 = 256 << 20;

/// The host bridge, 8086:29c0: PCIEXBAR says where ECAM for 256 buses is.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
    ecam: Arc<dyn BusDevice>,
}

impl HostBridge {
    /// A bridge that has put `ecam` at this address, and does so at each reset.
    pub fn new(base: u64, ecam: Arc<dyn BusDevice>) -> Arc<Self> {
        let identity = identity(0x29c0, 0, 0x06_00_00);
        let register = (base & PCIEXBAR_WRITABLE | PCIEXBAR_ENABLE).to_le_bytes();
        let config = ConfigSpace::endpoint(&identity);
        let config = config.with_bytes(PCIEXBAR, &register, &PCIEXBAR_WRITABLE.to_le_bytes());
        Arc::new(Self { config: Mutex::new(config), ecam })
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where ECAM is, if it is anywhere.
    pub fn ecam(&self) -> Option<u64> {
        let config = self.lock();
        let register = u64::from(config.u32(PCIEXBAR)) | u64::from(config.u32(PCIEXBAR + 4)) << 32;
        (register & PCIEXBAR_ENABLE != 0).then_some(register & !(ECAM_SIZE - 1))
    }

    /// The registers.
    pub fn saved(&self) -> Vec<u8> {
        self.lock().saved()
    }

    /// Takes them. `None`: not those of a function.
    pub fn restore(&self, saved: &[u8]) -> Option<()> {
        self.lock().restore(saved)
    }
}

impl Function for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        self.lock().write(offset, data);
        touches(offset, data.len(), PCIEXBAR, 8)
    }

    /// ECAM, as if it were a BAR: it takes part in the rule that nothing comes to lie over anything else, and comes first.
    fn mappings(&self) -> Vec<Mapping> {
        let mapping = |base| Mapping { bar: 0, base, size: ECAM_SIZE, device: Arc::clone(&self.ecam) };
        self.ecam().map(mapping).into_iter().collect()
    }

    fn mapped(&self, _: u8, _: Option<u64>) {}

    fn reset(&self) {
        self.lock().reset();
    }
}

fn identity(device: u16, revision: u8, class: u32) -> Identity {
    Identity { vendor: INTEL, device, revision, class, subsystem: SUBSYSTEM, multifunction: false }
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

    struct Nothing;
    impl BusDevice for Nothing {
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn word(f: &dyn Function, at: u16) -> u32 {
        let mut word = [0; 4];
        f.read_config(at, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn the_lpc_bridge_says_where_things_are_and_cannot_be_moved() {
        let lpc = lpc(0x600);
        for at in (0..256).step_by(4) {
            assert!(!lpc.write_config(at, &[0xff; 4]));
        }
        assert!(lpc.mappings().is_empty());
        assert_eq!((word(&*lpc, 0x40), word(&*lpc, 0x44), word(&*lpc, 0)), (0x601, 0x80, 0x2918_8086));
    }

    #[test]
    fn ecam_is_where_pciexbar_says() {
        let bridge = HostBridge::new(0xb000_0000, Arc::new(Nothing));
        assert_eq!((word(&*bridge, 0), word(&*bridge, 8)), (0x29c0_8086, 0x0600_0000));
        assert_eq!((word(&*bridge, 0x60), word(&*bridge, 0x64)), (0xb000_0001, 0));
        let at = || bridge.mappings().first().map(|m| (m.base, m.size));
        assert_eq!(at(), Some((0xb000_0000, 256 << 20)));
        // As EDK2 moves it: off, upper half, lower half.
        for (register, value, expected) in [
            (0x60, 0, None),
            (0x64, 0, None),
            (0x60, 0xe000_0001, Some((0xe000_0000, 256 << 20))),
            (0x64, u32::MAX, Some((0xf_e000_0000, 256 << 20))),
            (0x60, u32::MAX, Some((0xf_f000_0000, 256 << 20))),
        ] {
            assert!(bridge.write_config(register, &value.to_le_bytes()));
            assert_eq!(at(), expected);
        }
        let other = HostBridge::new(0xb000_0000, Arc::new(Nothing));
        other.restore(&bridge.saved()).unwrap();
        assert_eq!(other.ecam(), bridge.ecam());
        bridge.reset();
        assert_eq!(bridge.ecam(), Some(0xb000_0000));
        assert!(!bridge.write_config(0, &[0xff; 4]));
    }
}
