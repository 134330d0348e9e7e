//! Against the kernel's vhost-vsock, where this machine has it.

use super::*;
use crate::virtio::testing::{DATA, Rig};

fn open(guest_cid: u32, vhost_fd: Option<i32>) -> Result<Vsock, VsockError> {
    let inherited = &Inherited::default();
    Vsock::open(VsockOptions { device: "v", guest_cid, vhost_fd, inherited, worker: Worker::new("v") })
}

fn is_here() -> bool {
    let here = std::path::Path::new(Kind::Vsock.path()).exists();
    if !here {
        eprintln!("SKIPPED: no {}", Kind::Vsock.path());
    }
    here
}

#[test]
fn says_what_is_wrong_with_the_kernels_side() {
    use std::os::fd::IntoRawFd;
    let text = |cid, fd| open(cid, fd).err().unwrap().to_string();
    assert_eq!(text(3, Some(9999)), "device \"v\": descriptor 9999 is not open, or is a standard stream");
    let null = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
    assert!(text(3, Some(null)).ends_with("is not an open /dev/vhost-vsock"));
    if is_here() {
        let _first = open(0x7fff_0001, None).unwrap();
        assert!(text(0x7fff_0001, None).contains("guest-cid=2147418113 is in use"));
    } else {
        assert!(text(3, None).contains("`modprobe vhost_vsock`"));
    }
}

#[test]
fn shows_its_address_starts_stops_and_reports_a_bad_ring() {
    if !is_here() {
        return;
    }
    let rig = Rig::new(open(0x7fff_0002, None).unwrap());
    assert_eq!((rig.get(8), rig.get(0x100), rig.get(0x104)), (19, 0x7fff_0002, 0));
    for _ in 0..3 {
        let mut rings = rig.start(!0, 3, 256);
        rings[0].add(&[(DATA, 4096, true)]);
        rig.kick(&rings[0]);
        rig.kick(&rings[2]);
        assert!(!rig.needs_reset());
        rings[1].set_avail_index(300);
        rig.kick(&rings[1]);
        rig.wait_needs_reset();
        rig.set(0x70, 0);
    }
}
