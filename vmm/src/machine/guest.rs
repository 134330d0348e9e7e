//! What every board does alike with its guest: what it asks for or ends with becomes a [`GuestEvent`], and its vCPUs are listed and
//! reset, its RAM cleared.

use std::sync::Arc;

use super::{CpuInfo, GuestEvent};
use crate::cpu::{CpuError, Ended, OnEnd, Topology, Vcpus, x86_64};
use crate::device::{OnPower, PowerRequest};
use crate::memory::GuestMemory;
use crate::memory::discard::Discarder;

pub(super) type OnGuest = Arc<dyn Fn(GuestEvent) + Send + Sync>;

pub(super) fn on_power(events: &OnGuest) -> OnPower {
    let events = Arc::clone(events);
    Arc::new(move |request| {
        events(match request {
            PowerRequest::Off => GuestEvent::PowerOff,
            PowerRequest::Reset => GuestEvent::Reset,
        });
    })
}

pub(super) fn on_end(events: OnGuest) -> OnEnd {
    Arc::new(move |ended| {
        events(match ended {
            Ended::Shutdown => GuestEvent::TripleFault,
            Ended::PowerOff => GuestEvent::PowerOff,
            Ended::Reset => GuestEvent::Reset,
            Ended::Failed(text) => GuestEvent::InternalError(text),
        });
    })
}

pub(super) fn cpus(vcpus: &Vcpus, topology: &Topology) -> Vec<CpuInfo> {
    let tids = vcpus.tids();
    tids.into_iter()
        .map(|(index, host_tid)| {
            let place = topology.place(index);
            CpuInfo {
                index,
                socket_id: place.socket as u8,
                die_id: place.die as u8,
                core_id: topology.core_in_die(&place) as u8,
                thread_id: place.thread as u8,
                host_tid,
            }
        })
        .collect()
}

/// RAM as after power-on: what ran before is nobody's business, and its pages need not be kept.
pub(super) fn clear(memory: &Arc<GuestMemory>) {
    let ram = Discarder::new(Arc::clone(memory));
    if let Err(error) = ram.discard(0, u64::MAX) {
        tracing::warn!("guest memory keeps what it held before the reset: {error}");
    }
}

/// All vCPUs, which have numbers below `cpus`, as at power-on, the first about to enter what has been loaded. They must be paused, and stay so.
pub(super) fn reset_vcpus(
    vcpus: &Vcpus,
    topology: &Topology,
    cpus: u8,
    state: x86_64::BootState,
) -> Result<(), CpuError> {
    // The topology has checked that every id fits.
    let ids: Vec<u8> = (0..cpus).map(|index| topology.apic_id(index) as u8).collect();
    vcpus.reset(move |vcpu| {
        let id = ids.get(usize::from(vcpu.index())).copied().unwrap_or_default();
        x86_64::reset(vcpu, id, Some(&state))
    })
}
