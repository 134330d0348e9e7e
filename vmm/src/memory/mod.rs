//! Guest RAM: owns its mapping in this process and its registration with KVM.

/// Guest RAM as every device sees it. Built once, before the vCPUs start.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
