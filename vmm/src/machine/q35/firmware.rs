//! Firmware: the flash that it lies in and keeps its variables in, and what it is told about the machine.
//!
//! ```text
//! 4 GiB ┌──────────────┐
//!       │ unit 0: code │ the first instruction is sixteen bytes below the end
//!       ├──────────────┤
//!       │ unit 1: vars │ what firmware writes goes to the image at once
//!       └──────────────┘ no lower than 0xff00_0000
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::{Wiring, map};
use crate::block;
use crate::boot::{self, FirmwareFiles};
use crate::bus::Bus;
use crate::config::{DeviceDriver, Drive, PciPlace, VmConfig};
use crate::cpu::Buses;
use crate::cpu::x86_64::BootState;
use crate::device::{Flash, FlashMemory, FwCfg, SavedFlash, SavedFwCfg};
use crate::inherit::Inherited;
use crate::machine::MachineError;
use crate::memory::layout::GAP_END;
use crate::memory::{GuestMemory, Rom};
use crate::pci::HostBridge;

/// All flash together: what there is between the interrupt controllers and 4 GiB.
const SIZE_MAX: u64 = 16 << 20;

/// One flash with its image.
struct Unit {
    id: String,
    rom: Arc<Rom>,
    size: u64,
    /// The image keeps its lock for as long as this is open.
    image: File,
    writable: bool,
}

/// Firmware before there is a machine.
pub(super) struct Images {
    units: Vec<Unit>,
    files: FirmwareFiles,
    boot_order: String,
    layout: Vec<String>,
}

/// Why an image cannot be firmware.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// Not whole sectors, or empty.
    #[error("drive \"{id}\": the image has {size} bytes: flash has whole sectors of {} bytes", Flash::SECTOR)]
    Size {
        /// Which drive.
        id: String,
        /// Bytes.
        size: u64,
    },
    /// More than there is room for.
    #[error(
        "drive \"{id}\": with {size} bytes the images of pflash are too large: together they can have {SIZE_MAX}"
    )]
    TooLarge {
        /// The drive that does not fit.
        id: String,
        /// Bytes of all so far.
        size: u64,
    },
    /// The image cannot be read.
    #[error("drive \"{id}\": cannot read the image: {source}")]
    Read {
        /// Which drive.
        id: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// KVM does not take the memory.
    #[error("drive \"{id}\": KVM cannot map flash memory: {source}")]
    Map {
        /// Which drive.
        id: String,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
}

/// What a snapshot holds of it. What lies in flash is in the images, as what lies on disks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedFirmware {
    flash: Vec<SavedFlash>,
    fw_cfg: SavedFwCfg,
}

/// Opens the images and reads them; none where the VM has no firmware.
pub(super) fn open(config: &VmConfig, inherited: &Inherited) -> Result<Option<Images>, MachineError> {
    if config.flash.is_empty() {
        return Ok(None);
    }
    let mut drives: Vec<&Drive> = config.flash.iter().collect();
    drives.sort_by_key(|drive| drive.pflash_unit);
    let (mut units, mut layout, mut total) = (Vec::new(), Vec::new(), 0u64);
    for (number, drive) in (0u8..).zip(drives) {
        let (image, size) = block::open_plain(drive, inherited)?;
        let id = drive.id.clone();
        if size == 0 || !size.is_multiple_of(Flash::SECTOR) {
            return Err(FirmwareError::Size { id, size }.into());
        }
        total = total.saturating_add(size);
        if total > SIZE_MAX {
            return Err(FirmwareError::TooLarge { id, size: total }.into());
        }
        let mut bytes = vec![0; size as usize];
        let read = image.read_exact_at(&mut bytes, 0);
        read.map_err(|source| FirmwareError::Read { id: id.clone(), source })?;
        let rom = Rom::new(number, GAP_END - total, bytes.len())?;
        rom.write(0, &bytes);
        layout.push(format!("flash of {size} bytes"));
        units.push(Unit { id, rom: Arc::new(rom), size, image, writable: !drive.readonly });
    }
    let files = FirmwareFiles::open(&config.boot, inherited)?;
    Ok(Some(Images { units, files, boot_order: boot_order(config)?, layout }))
}

/// The devices that have a place in the order, as Open Firmware names them: what firmware compares with what it has found.
fn boot_order(config: &VmConfig) -> Result<String, MachineError> {
    let places = config.pci_places()?;
    let slot_of = |name: &str| {
        let mut all = config.devices.iter().zip(&places);
        all.find_map(|(device, place)| match place {
            Some(PciPlace::Root(addr)) if device.id == name => Some(*addr),
            _ => None,
        })
    };
    let mut wanted = Vec::new();
    for (device, place) in config.devices.iter().zip(&places) {
        let DeviceDriver::VirtioBlk { boot_index: Some(index), .. } = &device.driver else { continue };
        let node = |name: &str, slot: u8, function: u8| match function {
            0 => format!("/{name}@{slot:x}"),
            _ => format!("/{name}@{slot:x},{function:x}"),
        };
        let path = match place {
            Some(PciPlace::Root(addr)) => node("scsi", addr.slot, addr.function),
            Some(PciPlace::Port(name)) => match slot_of(name) {
                Some(port) => node("pci-bridge", port.slot, port.function) + "/scsi@0",
                None => continue,
            },
            None => continue,
        };
        wanted.push((*index, format!("/pci@i0cf8{path}/disk@0,0")));
    }
    // Of two with the same number the one that comes first on the command line.
    wanted.sort_by_key(|(index, _)| *index);
    let lines: Vec<String> = wanted.into_iter().map(|(_, path)| path).collect();
    Ok(lines.join("\n"))
}

/// A flash's memory, and KVM's slot for it.
struct Slot {
    rom: Arc<Rom>,
    vm: Arc<VmFd>,
}

impl FlashMemory for Slot {
    fn read(&self, offset: usize, data: &mut [u8]) {
        self.rom.read(offset, data);
    }

    fn write(&self, offset: usize, data: &[u8]) {
        self.rom.write(offset, data);
    }

    fn show(&self, shown: bool) -> io::Result<()> {
        self.rom.map(&self.vm, shown)
    }
}

impl Images {
    /// For the identity of a snapshot.
    pub(super) fn layout(&self) -> &[String] {
        &self.layout
    }

    /// Gives the memory to KVM: while that costs nothing, before there are interrupt controllers.
    pub(super) fn register(&self, vm: &VmFd) -> Result<(), MachineError> {
        for Unit { id, rom, .. } in &self.units {
            rom.map(vm, true).map_err(|source| FirmwareError::Map { id: id.clone(), source })?;
        }
        Ok(())
    }

    /// Puts the devices onto the buses.
    pub(super) fn connect(
        self,
        vm: &Arc<VmFd>,
        memory: &Arc<GuestMemory>,
        bridge: &Arc<HostBridge>,
        buses: &Buses,
    ) -> Result<Firmware, MachineError> {
        let Self { units, files, boot_order, .. } = self;
        let code = units.first().map(|unit| (Arc::clone(&unit.rom), unit.size as usize));
        let flash = units.into_iter().map(|unit| unit.connect(vm, &buses.mmio));
        let flash = flash.collect::<Result<_, MachineError>>()?;
        let fw_cfg = FwCfg::new(Arc::clone(memory));
        buses.ports.insert(FwCfg::PORT, FwCfg::PORTS, Arc::clone(&fw_cfg) as _)?;
        Ok(Firmware { flash, code, fw_cfg, bridge: Arc::clone(bridge), files, boot_order })
    }
}

impl Unit {
    fn connect(self, vm: &Arc<VmFd>, mmio: &Bus) -> Result<(Arc<Flash>, File), MachineError> {
        let Self { id, rom, size, image, writable } = self;
        let twin = image.try_clone().map_err(|source| FirmwareError::Read { id, source })?;
        let base = rom.base();
        let slot = Slot { rom, vm: Arc::clone(vm) };
        let flash = Arc::new(Flash::new(size, Box::new(slot), writable.then_some(twin)));
        mmio.insert(base, size, Arc::clone(&flash) as _)?;
        Ok((flash, image))
    }
}

/// The firmware of a machine.
pub(super) struct Firmware {
    /// Each with its image, which is locked until it is closed.
    flash: Vec<(Arc<Flash>, File)>,
    code: Option<(Arc<Rom>, usize)>,
    fw_cfg: Arc<FwCfg>,
    bridge: Arc<HostBridge>,
    files: FirmwareFiles,
    boot_order: String,
}

impl Firmware {
    /// Tells it about the machine. ACPI's tables are made when it asks, as it may have moved ECAM by then.
    pub(super) fn tell(&self, wiring: &Wiring) -> Result<(), MachineError> {
        let (own, bridge) = (wiring.clone(), Arc::clone(&self.bridge));
        let tables = move || {
            let pcie = map::with_ecam(own.pcie, bridge.ecam());
            boot::acpi_files(&own.platform_with(pcie, true))
        };
        let platform = wiring.platform(true);
        let items = boot::items(&self.files, &wiring.append, &platform, &self.boot_order, Arc::new(tables))?;
        self.fw_cfg.reset(items);
        Ok(())
    }

    /// Everything as at power-on, for a vCPU that starts in it.
    pub(super) fn load(&self, memory: &GuestMemory, wiring: &Wiring) -> Result<BootState, MachineError> {
        self.flash.iter().for_each(|(flash, _)| flash.reset());
        self.tell(wiring)?;
        let mut code = Vec::new();
        if let Some((rom, size)) = &self.code {
            code.resize(*size, 0);
            rom.read(0, &mut code);
        }
        boot::shadow(memory, &code, &wiring.platform(true))?;
        Ok(BootState::Reset)
    }

    pub(super) fn saved(&self) -> SavedFirmware {
        let flash = self.flash.iter().map(|(flash, _)| flash.saved()).collect();
        SavedFirmware { flash, fw_cfg: self.fw_cfg.saved() }
    }

    /// Goes on from it, in a machine that has been told what it is. `None`: it makes no sense.
    pub(super) fn restore(&self, saved: &SavedFirmware) -> Option<()> {
        if saved.flash.len() != self.flash.len() {
            return None;
        }
        for ((flash, _), saved) in self.flash.iter().zip(&saved.flash) {
            flash.restore(saved)?;
        }
        self.fw_cfg.restore(saved.fw_cfg);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn config(line: &str) -> VmConfig {
        use crate::config::cmdline::{Request, parse};
        match parse(line.split_whitespace().map(Into::into)) {
            Ok(Request::Run(config)) => *config,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_order_of_devices_is_that_of_their_numbers() {
        let common = "-machine q35 -drive if=pflash,unit=0,file=/c -device pcie-root-port,id=o,bus=pcie.0,addr=0x5,multifunction=on -device pcie-root-port,id=p,bus=pcie.0,addr=0x5.0x1 \
             -drive file=/a,id=a -drive file=/b,id=b -drive file=/d,id=d -drive file=/e,id=e";
        let line = |rest: &str| boot_order(&config(&format!("{common} {rest}"))).unwrap();
        assert_eq!(line("-device virtio-blk-pci,drive=a,id=a,bus=pcie.0,addr=2"), "");
        let list = line(
            "-device virtio-blk-pci,drive=a,id=a,bus=pcie.0,addr=0x1c,bootindex=7 -device virtio-blk-pci,drive=b,id=b,bus=p,addr=0,bootindex=1 \
             -device virtio-blk-pci,drive=d,id=d,bus=pcie.0,addr=0x3.0x2,bootindex=7 -device virtio-blk-pci,drive=e,id=e,bus=pcie.0,addr=0x3,multifunction=on",
        );
        let want = [
            "/pci@i0cf8/pci-bridge@5,1/scsi@0/disk@0,0",
            "/pci@i0cf8/scsi@1c/disk@0,0",
            "/pci@i0cf8/scsi@3,2/disk@0,0",
        ];
        assert_eq!(list, want.join("\n"));
    }

    #[test]
    fn images_are_whole_sectors_and_fit() {
        let image = |size: u64| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(b"first").unwrap();
            file.as_file().set_len(size).unwrap();
            file
        };
        let none = open(&config("-machine q35 -kernel /k"), &Inherited::default()).unwrap();
        assert!(none.is_none());
        for (code, vars, want) in [
            (0, 4096, "drive \"pflash0\": the image has 0 bytes: flash has whole sectors of 4096 bytes"),
            (
                4096,
                4097,
                "drive \"pflash1\": the image has 4097 bytes: flash has whole sectors of 4096 bytes",
            ),
            (
                16 << 20,
                4096,
                "drive \"pflash1\": with 16781312 bytes the images of pflash are too large: together they can have 16777216",
            ),
            (15 << 20, 1 << 20, ""),
            (4096, 4096, ""),
        ] {
            let (code, vars) = (image(code), image(vars));
            // Not in their order.
            let line = format!(
                "-machine q35 -drive if=pflash,unit=1,file={} -drive if=pflash,unit=0,readonly=on,file={}",
                vars.path().display(),
                code.path().display()
            );
            match open(&config(&line), &Inherited::default()) {
                Err(error) => assert_eq!(error.to_string(), want),
                Ok(images) => {
                    assert_eq!(want, "");
                    let images = images.unwrap();
                    let at: Vec<u64> = images.units.iter().map(|unit| unit.rom.base()).collect();
                    let sizes: Vec<u64> = images.units.iter().map(|unit| unit.size).collect();
                    assert_eq!(at[0] + sizes[0], GAP_END);
                    assert_eq!(at[1] + sizes[1], at[0]);
                    assert_eq!(images.units.iter().map(|u| u.writable).collect::<Vec<_>>(), [false, true]);
                    let mut start = [0; 6];
                    images.units[1].rom.read(0, &mut start);
                    assert_eq!(&start, b"first\0");
                }
            }
        }
        let missing = config("-machine q35 -drive if=pflash,unit=0,file=/nowhere/code.fd");
        let error = open(&missing, &Inherited::default()).err().unwrap().to_string();
        assert!(error.contains("/nowhere/code.fd: no such file"), "{error}");
    }
}
