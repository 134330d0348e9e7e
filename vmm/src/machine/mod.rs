//! Machines: owns the wiring of one VM (memory map, interrupts, slots, vCPUs) and builds it from a [`VmConfig`](crate::config::VmConfig).

/// What the guest did that ends, or should end, its run. Sent from vCPU threads to the control room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// Power-off through ACPI S5.
    PowerOff,
    /// Reset request (ACPI reset register, i8042 0xFE).
    Reset,
    /// Triple fault: how a kernel with `reboot=t`, or a lost one, ends.
    TripleFault,
    /// KVM could not go on.
    InternalError(String),
}

/// One online vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuInfo {
    /// From 0.
    pub index: u8,
    /// Topology.
    pub socket_id: u8,
    /// Topology.
    pub die_id: u8,
    /// Topology.
    pub core_id: u8,
    /// Topology.
    pub thread_id: u8,
    /// The host's thread that runs it.
    pub host_tid: i32,
}
