//! Legacy devices: owns the serial port, the ACPI registers of both boards with those for processors that come and go, the VM Generation ID,
//! the reset line of the keyboard controller, the clock of a PC, and what firmware lies in and asks.
//!
//! The machine puts them on the port bus. None of them knows the machine: what the guest asks for goes out through a callback.

mod acpi;
mod cmos;
mod cpus;
mod flash;
mod fw_cfg;
mod ged;
mod generation;
mod i8042;
mod pm;
mod rtc;
mod serial;

use std::sync::Arc;

pub use acpi::{AcpiRegisters, OnClaim, RESET_VALUE, SLEEP_TYPE_S5};
pub use cmos::NoClock;
pub use cpus::{CpuController, OnEject};
pub use flash::{Flash, FlashMemory, SavedFlash};
pub use fw_cfg::{Content, FwCfg, Items, Reader, SavedFwCfg};
pub use ged::{EVENT_CPUS, EventRegister};
pub use generation::{GENERATION_ADDRESS, GENERATION_IRQ, GenerationId};
pub use i8042::I8042Reset;
pub use pm::{PmRegisters, SavedPm, SleepRegister};
pub use rtc::{Rtc, RtcPorts, SavedRtc};
pub use serial::{SavedSerial, SerialDevice};

/// What the guest asked of the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Soft off.
    Off,
    /// Reset.
    Reset,
}

/// Told about a [`PowerRequest`], from a vCPU's thread. A guest may ask more than once.
pub type OnPower = Arc<dyn Fn(PowerRequest) + Send + Sync>;
