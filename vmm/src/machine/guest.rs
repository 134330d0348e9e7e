//! What every board does alike with its guest: what it asks for or ends with becomes a [`GuestEvent`], and its vCPUs are listed.

use std::sync::Arc;

use super::{CpuInfo, GuestEvent};
use crate::cpu::{Ended, OnEnd, Topology, Vcpus};
use crate::device::{OnPower, PowerRequest};

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
    (0u8..)
        .zip(tids)
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
