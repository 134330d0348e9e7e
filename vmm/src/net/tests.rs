//! Taps in a network namespace that each test makes for itself.

use std::os::fd::IntoRawFd;
use std::process::Command;

use super::*;

fn netdev(source: TapSource) -> Netdev {
    let queues = if let TapSource::Fds(fds) = &source { fds.len().max(1) as u16 } else { 1 };
    with_queues(source, queues)
}

fn with_queues(source: TapSource, queues: u16) -> Netdev {
    Netdev {
        id: "nic0".into(),
        backend: NetBackend::Tap { source, queues, vhost: false, vhost_fds: vec![], path: None },
    }
}

pub(crate) fn named(name: &str) -> Netdev {
    netdev(TapSource::Name(name.into()))
}

fn open(netdev: &Netdev) -> Result<Tap, NetError> {
    let mut taps = Backend::open(netdev, &Inherited::default())?.taps;
    assert_eq!(taps.len(), 1);
    Ok(Arc::try_unwrap(taps.remove(0)).unwrap())
}

pub(crate) fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|s| s.success())
}

/// Runs `test` on a thread with a network of its own. Says so when it cannot.
pub(crate) fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(|| {
        // SAFETY: only this thread is moved, and it ends with the test.
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
        if !unshared || !Path::new("/dev/net/tun").exists() || !ip("link show") {
            return eprintln!("SKIPPED: needs root, /dev/net/tun and `ip`");
        }
        test();
    })
    .join()
    .unwrap();
}

#[test]
fn what_is_no_tap_is_refused_in_words() {
    in_a_namespace(|| {
        assert!(ip("tuntap add dev mq0 mode tap multi_queue"));
        assert!(ip("tuntap add dev t1 mode tap"));
        let cases = [
            (named("none0"), "there is no interface none0"),
            (named("lo"), "lo is not a tap"),
            (named("mq0"), "mq0 is not a tap with one queue"),
            (netdev(TapSource::Fds(vec![1])), "descriptor 1 is not open, or is a standard stream"),
            (netdev(TapSource::Fds(vec![9999])), "descriptor 9999 is not open"),
            (netdev(TapSource::Fds(vec![9998, 9999])), "is not open"),
            (with_queues(TapSource::Name("t1".into()), 2), "t1 is not a tap with several queues"),
            (netdev(TapSource::Fds(vec![])), "is not open"),
        ];
        for (netdev, problem) in cases {
            let text = open(&netdev).unwrap_err().to_string();
            assert!(text.starts_with("netdev \"nic0\": ") && text.contains(problem), "{text}");
        }
        let mut elsewhere = named("t1");
        if let NetBackend::Tap { path, .. } = &mut elsewhere.backend {
            *path = Some("/dev/no-such-tun".into());
        }
        let text = open(&elsewhere).unwrap_err().to_string();
        assert!(text.contains("cannot open /dev/no-such-tun: No such file"), "{text}");
        assert!(!ip("link show none0"), "made nothing");
        let null = || std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let text = open(&netdev(TapSource::Fds(vec![null()]))).unwrap_err().to_string();
        assert!(text.contains("is not a tap opened with"), "{text}");
        let vhost = NetBackend::Tap {
            source: TapSource::Name("t1".into()),
            queues: 1,
            vhost: true,
            vhost_fds: vec![null()],
            path: None,
        };
        let text = open(&Netdev { id: "nic0".into(), backend: vhost }).unwrap_err().to_string();
        assert!(text.ends_with("is not an open /dev/vhost-net"), "{text}");
    });
}

#[test]
fn a_tap_is_opened_by_name_or_descriptor_and_by_one_only() {
    in_a_namespace(|| {
        assert!(ip("tuntap add dev t0 mode tap"));
        let tap = open(&named("t0")).unwrap();
        let text = open(&named("t0")).unwrap_err().to_string();
        assert!(text.contains("t0 is in use"), "{text}");
        tap.set_offloads(Offloads { checksum: true, tso4: true, tso6: true }).unwrap();
        let Tap { fd, .. } = tap;
        let number = fd.into_raw_fd();
        let tap = open(&netdev(TapSource::Fds(vec![number]))).unwrap();
        let Tap { fd, .. } = tap;
        let table = format!(r#"[{{"fd":{},"tap":"other"}}]"#, fd.into_raw_fd());
        let inherited = Inherited::parse(&table).unwrap();
        Backend::open(&named("other"), &inherited).unwrap();
    });
}

#[test]
fn packets_cross_and_a_deleted_tap_is_noticed() {
    in_a_namespace(|| {
        assert!(ip("tuntap add dev t0 mode tap"));
        let tap = open(&named("t0")).unwrap();
        let mut buffer = [0u8; 2048];
        let mut part = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: 74 }];
        // SAFETY: the part is the buffer.
        let result = unsafe { tap.write(&part) };
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EIO), "the interface is down");
        assert!(ip("link set t0 up"));
        // SAFETY: as above.
        assert_eq!(unsafe { tap.write(&part) }.unwrap(), 74);
        part[0].iov_len = buffer.len();
        // SAFETY: as above. The kernel greets new links with packets of its own; read them all.
        while unsafe { tap.read(&part) }.is_ok() {}
        assert!(ip("link del t0"));
        // SAFETY: as above.
        let error = unsafe { tap.read(&part) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
    });
}

#[test]
fn default_addresses_count_up() {
    assert_eq!(default_mac(0), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    assert_eq!(default_mac(2)[5], 0x58);
}

#[test]
fn a_tap_has_several_queues_by_name_or_by_descriptors() {
    in_a_namespace(|| {
        for name in ["mq0", "mq1"] {
            assert!(ip(&format!("tuntap add dev {name} mode tap multi_queue")));
        }
        let by_name = |name: &str| with_queues(TapSource::Name(name.into()), 3);
        let numbers = |name| -> Vec<RawFd> {
            let backend = Backend::open(&by_name(name), &Inherited::default()).unwrap();
            backend.taps.into_iter().map(|tap| Arc::try_unwrap(tap).unwrap().fd.into_raw_fd()).collect()
        };
        let (zero, one) = (numbers("mq0"), numbers("mq1"));
        let mixed = netdev(TapSource::Fds(vec![zero[2], one[2]]));
        let text = Backend::open(&mixed, &Inherited::default()).unwrap_err().to_string();
        assert!(text.contains("are not queues of one tap"), "{text}");
        // What is refused is closed. A pipe tells: the numbers themselves may be another test's by now, which must not lose them.
        let (mut reader, writer) = io::pipe().unwrap();
        let no_tap = netdev(TapSource::Fds(vec![OwnedFd::from(writer).into_raw_fd()]));
        let text = Backend::open(&no_tap, &Inherited::default()).unwrap_err().to_string();
        assert!(text.contains("is not a tap opened with"), "{text}");
        // A child of another test has it for a moment, perhaps.
        assert_eq!(io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
        let backend =
            Backend::open(&netdev(TapSource::Fds(zero[..2].to_vec())), &Inherited::default()).unwrap();
        for on in [false, false, true, true] {
            backend.taps()[1].set_enabled(on).unwrap();
        }
        let table = format!(r#"[{{"fd":{},"tap":"x"}},{{"fd":{},"tap":"x"}}]"#, one[0], one[1]);
        let inherited = Inherited::parse(&table).unwrap();
        let two = with_queues(TapSource::Name("x".into()), 2);
        assert_eq!(Backend::open(&two, &inherited).unwrap().taps().len(), 2);
    });
}
