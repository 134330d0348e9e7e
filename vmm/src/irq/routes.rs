//! Ways from descriptors to vCPUs: owns KVM's table of GSIs from the moment that the first device of the host sends messages.
//!
//! ```text
//! 0 to 15   pins of the PICs and of the IOAPIC        as KVM itself sets them up (x86: kvm_setup_default_irq_routing)
//! 16 to 23  pins of the IOAPIC
//! 24 on     one for each message that comes by an irqfd
//! ```
//!
//! KVM takes the table as a whole, and waits out a grace period for each. So nothing is told before there is something to tell, a GSI that is given
//! back leaves the table with the next change, and virtio devices of this process, which have the message at hand, send it themselves
//! ([`KvmMessages`](super::KvmMessages)): that is one system call as well.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};
use kvm_ioctls::VmFd;

use super::IOAPIC_PINS;

/// Pins of the two PICs.
const PIC_PINS: u32 = 16;
/// Entries that KVM takes, and one more than its highest GSI (KVM_MAX_IRQ_ROUTES).
const MOST: u32 = 4096;
/// Messages that there is room for beside the pins.
const MESSAGES_MAX: usize = (MOST - IOAPIC_PINS - PIC_PINS) as usize;

/// A message-signalled interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Where it is written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// KVM's table.
pub struct Routes {
    vm: Arc<VmFd>,
    /// GSIs of messages that are taken, and where they lead.
    messages: Mutex<BTreeMap<u32, Option<Message>>>,
}

impl Routes {
    /// The table of `vm`, as KVM has set it up.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, messages: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Option<Message>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A GSI that leads nowhere yet. `None`: all are taken.
    pub fn take(&self) -> Option<u32> {
        let mut messages = self.lock();
        let gsi = free(&messages)?;
        messages.insert(gsi, None);
        Some(gsi)
    }

    /// Gives one back that no irqfd has any more.
    pub fn give(&self, gsi: u32) {
        self.lock().remove(&gsi);
    }

    /// A taken GSI leads to this message from now on. After an error it leads where it did.
    pub fn set(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut messages = self.lock();
        let place = messages.get_mut(&gsi).ok_or(io::ErrorKind::NotFound)?;
        let before = place.replace(message);
        let told = table(&messages).and_then(|table| Ok(self.vm.set_gsi_routing(&table)?));
        if told.is_err() {
            messages.insert(gsi, before);
        }
        told
    }
}

fn free(messages: &BTreeMap<u32, Option<Message>>) -> Option<u32> {
    if messages.len() >= MESSAGES_MAX {
        return None;
    }
    (IOAPIC_PINS..MOST).find(|gsi| !messages.contains_key(gsi))
}

fn table(messages: &BTreeMap<u32, Option<Message>>) -> io::Result<KvmIrqRouting> {
    let mut entries = pins();
    entries.extend(
        messages.iter().filter_map(|(gsi, message)| message.map(|message| of_message(*gsi, message))),
    );
    KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

/// What KVM begins with.
fn pins() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::new();
    for gsi in 0..IOAPIC_PINS {
        entries.push(of_pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        if gsi < PIC_PINS {
            let chip = if gsi < PIC_PINS / 2 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
            entries.push(of_pin(gsi, chip, gsi % (PIC_PINS / 2)));
        }
    }
    entries
}

fn of_pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    // The kernel reads the whole union.
    let mut u = kvm_irq_routing_entry__bindgen_ty_1 { pad: [0; 8] };
    u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, flags: 0, pad: 0, u }
}

fn of_message(gsi: u32, Message { address, data }: Message) -> kvm_irq_routing_entry {
    let mut u = kvm_irq_routing_entry__bindgen_ty_1 { pad: [0; 8] };
    u.msi = kvm_irq_routing_msi {
        address_lo: address as u32,
        address_hi: (address >> 32) as u32,
        data,
        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
    };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, flags: 0, pad: 0, u }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu;
    use crate::inherit::Inherited;

    #[test]
    fn each_pin_keeps_its_place() {
        let entries = pins();
        assert_eq!(entries.len(), 40);
        for entry in &entries {
            assert_eq!(entry.type_, KVM_IRQ_ROUTING_IRQCHIP);
            // SAFETY: the member that was written.
            let kvm_irq_routing_irqchip { irqchip, pin } = unsafe { entry.u.irqchip };
            let gsi = match irqchip {
                KVM_IRQCHIP_PIC_SLAVE => pin + 8,
                _ => pin,
            };
            assert_eq!(gsi, entry.gsi, "chip {irqchip}");
        }
    }

    #[test]
    fn gsis_come_to_an_end_and_come_back() {
        let mut taken = BTreeMap::new();
        while let Some(gsi) = free(&taken) {
            assert!((IOAPIC_PINS..MOST).contains(&gsi));
            taken.insert(gsi, Some(Message { address: 0xfee0_0000, data: gsi }));
        }
        assert_eq!(taken.len(), MESSAGES_MAX);
        assert_eq!(table(&taken).unwrap().as_slice().len(), MOST as usize);
        taken.remove(&1000);
        assert_eq!(free(&taken), Some(1000));
    }

    #[test]
    fn kvm_takes_the_table() {
        if !std::path::Path::new(cpu::KVM_PATH).exists() {
            eprintln!("no /dev/kvm: skipped");
            return;
        }
        let (_, vm) = cpu::open(&Inherited::default()).unwrap();
        super::super::create_controllers(&vm).unwrap();
        let routes = Routes::new(Arc::new(vm));
        let message = Message { address: 0xfee0_0000, data: 0x41 };
        assert!(routes.set(24, message).is_err(), "not taken");
        let (first, second) = (routes.take().unwrap(), routes.take().unwrap());
        assert_eq!((first, second), (24, 25));
        routes.set(second, message).unwrap();
        routes.give(first);
        assert_eq!(routes.take(), Some(first));
    }
}
