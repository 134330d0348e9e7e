//! Against a double of a back end on a real socket.

use std::sync::atomic::Ordering;

use super::*;
use crate::event::EventLoop;
use crate::vhost::double::Double;
use crate::vhost::user::double::{BackEnd, Skills, Wrong};
use crate::virtio::testing::{DATA, HIGH_END, PATIENCE as LONG, RAM, Rig, Ring as DriverRing, shared_memory};

mod pairs;

const PROTOCOL: u64 = 1 << 30;
/// MQ, REPLY_ACK, CONFIG, and some that nobody here knows.
const ALL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 5 | 1 << 12;

fn skills() -> Skills {
    let config = (0..60).collect();
    Skills { features: RINGS | PROTOCOL | 1 << 34 | 1 << 9, protocol: ALL, queues: 2, config }
}

/// A main thread.
struct Main(LoopHandle, Option<std::thread::JoinHandle<()>>);

impl Main {
    fn start() -> Self {
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut event_loop = EventLoop::new().unwrap();
            tell.send(event_loop.handle()).unwrap();
            event_loop.run().unwrap();
        });
        Self(told.recv().unwrap(), Some(thread))
    }
}

impl Drop for Main {
    fn drop(&mut self) {
        self.0.post(|ops: &mut Ops<'_>| ops.stop());
        self.1.take().unwrap().join().unwrap();
    }
}

fn open(back: &BackEnd, main: &Main, model: Model) -> Result<VhostUser, VhostUserError> {
    VhostUser::open(VhostUserOptions {
        device: "d".into(),
        chardev: "c".into(),
        socket: back.path.clone(),
        model,
        queue_size: 128,
        main_loop: main.0.clone(),
    })
}

fn fs() -> Model {
    Model::Fs { tag: "share".into() }
}

fn wait(mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "waited too long");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn rig(back: &BackEnd, main: &Main) -> Rig {
    Rig::with_memory(open(back, main, fs()).unwrap(), shared_memory())
}

/// Starts the driver and waits until the back end has the rings.
fn start(rig: &Rig, rings: &Double) -> Vec<DriverRing> {
    let driver = rig.start(!0, 2, 128);
    wait(|| rings.running() == [0, 1]);
    driver
}

/// A request and its answer, on the second ring.
fn works(rig: &Rig, kernel: &Double, rings: &mut [DriverRing]) {
    rings[1].add(&[(DATA, 44, false), (HIGH_END - 100, 100, true)]);
    rig.kick(&rings[1]);
    assert_eq!(kernel.serve(1, 1, |sent| vec![sent.len() as u8; 100]), 1);
    assert_eq!(rig.used(&mut rings[1]).1, 100);
    assert!(!rig.needs_reset());
}

#[test]
fn rings_go_to_the_back_end_and_come_back_with_each_reset() {
    for protocol in [ALL, ALL & !(1 << 3), 0] {
        let (back, main) = (BackEnd::start(Skills { protocol, ..skills() }), Main::start());
        let rig = rig(&back, &main);
        assert_eq!((rig.get(8), rig.get(0x100), rig.get(0x124)), (26, u32::from_le_bytes(*b"shar"), 1));
        // Only what is known here: no packed rings, no feature of another device.
        assert_eq!(rig.offered(), RINGS);
        for _ in 0..3 {
            let mut driver = start(&rig, &back.rings);
            // What a quick driver has queued is seen: it is told once it has the ring.
            [0, 1].into_iter().for_each(|ring| wait(|| back.rings.kicked(ring)));
            works(&rig, &back.rings, &mut driver);
            rig.set(0x70, 0);
            assert!(back.rings.running().is_empty());
        }
        start(&rig, &back.rings);
        drop(rig);
        assert!(back.rings.running().is_empty(), "comes back when the device goes");
        assert_eq!(back.clients.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn a_device_whose_back_end_goes_needs_a_reset_and_connects_again_with_its_driver() {
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let rig = rig(&back, &main);
    for clients in 1..4 {
        let mut driver = start(&rig, &back.rings);
        works(&rig, &back.rings, &mut driver);
        assert_eq!(back.clients.load(Ordering::SeqCst), clients);
        back.hang_up();
        rig.wait_needs_reset();
        wait(|| back.rings.running().is_empty());
        // Between two drivers it may go as well.
        rig.set(0x70, 0);
    }
}

#[test]
fn a_back_end_that_stays_away_leaves_the_device_dead_and_all_else_alive() {
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let rig = rig(&back, &main);
    start(&rig, &back.rings);
    std::fs::remove_file(&back.path).unwrap();
    back.hang_up();
    rig.wait_needs_reset();
    for _ in 0..2 {
        rig.start(!0, 2, 128);
        rig.wait_needs_reset();
    }
    rig.set(0x70, 0);
    assert!(!rig.needs_reset());
}

#[test]
fn a_ring_that_makes_no_sense_to_the_back_end_needs_a_reset() {
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let rig = rig(&back, &main);
    start(&rig, &back.rings);
    back.rings.complain(1);
    rig.wait_needs_reset();
    let mut driver = start(&rig, &back.rings);
    works(&rig, &back.rings, &mut driver);
}

#[test]
fn a_device_stands_still_and_goes_on() {
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let rig = rig(&back, &main);
    let mut driver = start(&rig, &back.rings);
    works(&rig, &back.rings, &mut driver);
    use crate::virtio::state::Suspend as _;
    for _ in 0..2 {
        rig.transport.suspend().unwrap();
        assert!(back.rings.running().is_empty());
        rig.transport.resume().unwrap();
        wait(|| back.rings.running() == [0, 1]);
        works(&rig, &back.rings, &mut driver);
    }
    // Nothing of it can be saved.
    rig.transport.suspend().unwrap();
    assert!(rig.transport.save().is_err());
}

#[test]
fn a_paused_vm_is_not_written_to() {
    use crate::virtio::state::Suspend as _;
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let rig = rig(&back, &main);
    // No driver yet: nothing to hold.
    rig.transport.hold().unwrap();
    rig.transport.resume().unwrap();
    let mut driver = start(&rig, &back.rings);
    for request in 0..3u16 {
        driver[1].add(&[(DATA, 44, false), (HIGH_END - 100, 100, true)]);
        rig.kick(&driver[1]);
        let edges = rig.line.edges();
        // It serves one more, just as it is told to stop: the driver hears of it all the same.
        back.rings.before_stop(1, Box::new(|_| vec![7; 100]));
        rig.transport.hold().unwrap();
        assert!(back.rings.running().is_empty());
        assert!(rig.line.edges() > edges, "request {request}");
        assert_eq!(rig.used(&mut driver[1]).1, 100);
        // Nothing reaches it now, and to hold it twice is to hold it.
        rig.transport.hold().unwrap();
        driver[1].add(&[(DATA, 44, false), (HIGH_END - 100, 100, true)]);
        assert_eq!(back.rings.serve(1, 1, |_| vec![1; 100]), 0);
        assert_eq!(driver[1].next_used(), None);
        rig.transport.resume().unwrap();
        wait(|| back.rings.running() == [0, 1]);
        // What was queued meanwhile is seen.
        wait(|| back.rings.kicked(1));
        assert_eq!(back.rings.serve(1, 2, |_| vec![1; 100]), 1);
        assert_eq!(rig.used(&mut driver[1]).1, 100);
    }
    // A guest that is reset while it is paused has no driver to go on with.
    rig.transport.hold().unwrap();
    rig.set(0x70, 0);
    rig.transport.resume().unwrap();
    assert!(back.rings.running().is_empty());
    let mut driver = start(&rig, &back.rings);
    works(&rig, &back.rings, &mut driver);
}

#[test]
fn a_back_end_that_goes_or_lies_while_the_vm_is_paused_costs_its_device_only() {
    use crate::virtio::state::Suspend as _;
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let goes = rig(&back, &main);
    start(&goes, &back.rings);
    goes.transport.hold().unwrap();
    back.hang_up();
    wait(|| back.rings.running().is_empty());
    goes.transport.resume().unwrap();
    // It is there again at once, as a process that a supervisor starts anew; the rings stand where they stood.
    let mut driver: Vec<_> = (0..2).map(|index| DriverRing::new(&goes.memory, index, 128)).collect();
    wait(|| back.rings.running() == [0, 1]);
    works(&goes, &back.rings, &mut driver);
    goes.transport.hold().unwrap();
    std::fs::remove_file(&back.path).unwrap();
    back.hang_up();
    goes.transport.resume().unwrap();
    goes.wait_needs_reset();

    let lies: [fn(&mut Vec<u8>); 4] =
        [|r| r[12] = 7, |r| r[18] = 1, |r| r[0] = 1, |r| r[8..12].copy_from_slice(&u32::MAX.to_ne_bytes())];
    for lie in lies {
        let wrong: Wrong = Arc::new(move |asked, reply| {
            if asked == 11 {
                lie(reply);
            }
        });
        let back = BackEnd::start_wrong(skills(), wrong);
        let rig = rig(&back, &main);
        start(&rig, &back.rings);
        rig.transport.hold().unwrap();
        assert!(rig.needs_reset());
        wait(|| back.rings.running().is_empty());
        rig.transport.resume().unwrap();
        rig.set(0x70, 0);
        start(&rig, &back.rings);
    }
}

#[test]
fn one_that_speaks_unasked_is_not_listened_to() {
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let rig = rig(&back, &main);
    for words in [&[0; 1][..], &[0xff; 12], &[1; 100_000]] {
        let mut driver = start(&rig, &back.rings);
        works(&rig, &back.rings, &mut driver);
        back.say(words);
        rig.wait_needs_reset();
        // The end of the connection is the end of its work, which comes as soon as it sees it.
        wait(|| back.rings.running().is_empty());
        rig.set(0x70, 0);
    }
    // Signals without end, of rings that have nothing: interrupts, and complaints that end.
    let mut driver = start(&rig, &back.rings);
    for _ in 0..1000 {
        back.rings.call(0);
        back.rings.call(1);
    }
    works(&rig, &back.rings, &mut driver);
    for _ in 0..1000 {
        back.rings.complain(0);
    }
    rig.wait_needs_reset();
}

#[test]
fn memory_of_its_own_is_not_given_away() {
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let rig = Rig::new(open(&back, &main, fs()).unwrap());
    rig.start(!0, 2, 128);
    rig.wait_needs_reset();
    assert!(back.rings.running().is_empty());
}

#[test]
fn disks_and_nics_show_what_they_are() {
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let disk = Rig::with_memory(open(&back, &main, Model::Blk { queues: 2 }).unwrap(), shared_memory());
    // FLUSH is the back end's, MQ is told by us.
    assert_eq!(disk.offered(), RINGS | 1 << 9 | 1 << 12);
    assert_eq!((disk.get(8), disk.get(0x100), disk.get(0x120)), (2, 0x0302_0100, 0x0002_2120));
    // A driver with fewer processors leaves queues out.
    disk.start(!0, 1, 128);
    wait(|| back.rings.running() == [0]);
    drop(disk);
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    let nic = Rig::with_memory(open(&back, &main, Model::Net { mac, pairs: 1 }).unwrap(), shared_memory());
    assert_eq!((nic.get(8), nic.get(0x100), nic.get(0x104)), (1, 0x0100_5452, 0x0001_0302));
    assert_eq!(nic.offered(), RINGS | 1 << 5 | 1 << 16 | 1 << 9);
    nic.start(!0, 1, 128);
    nic.wait_needs_reset();
}

#[test]
fn says_what_is_wrong_with_a_back_end() {
    let main = Main::start();
    let text =
        |skills: Skills, model: Model| open(&BackEnd::start(skills), &main, model).err().unwrap().to_string();
    let start = "device \"d\": chardev \"c\": ";
    for (skills, model, want) in [
        (Skills { features: PROTOCOL, ..skills() }, fs(), "the back end lacks features 0x100000000"),
        (Skills { queues: 1, ..skills() }, fs(), "the back end has 1 queues, and 2 are wanted"),
        (Skills { protocol: 1, ..skills() }, Model::Blk { queues: 1 }, "the back end refuses request 24"),
    ] {
        let said = text(skills, model);
        assert!(said.starts_with(&format!("{start}{want}")), "{said}");
    }
    let back = BackEnd::start(skills());
    std::fs::remove_file(&back.path).unwrap();
    let said = open(&back, &main, fs()).err().unwrap().to_string();
    assert!(
        said.contains("cannot connect to") && said.contains("start the vhost-user back end first"),
        "{said}"
    );
}

#[test]
fn wrong_words_end_the_connection_and_never_the_process() {
    let main = Main::start();
    let edits: [fn(&mut Vec<u8>); 7] = [
        |reply| reply[0] ^= 0xff,
        |reply| reply[4] = 1,
        |reply| reply[4] = 6,
        |reply| reply[8..12].copy_from_slice(&u32::MAX.to_ne_bytes()),
        |reply| reply[8] ^= 1,
        |reply| reply.truncate(11),
        Vec::clear,
    ];
    // What is asked at the start.
    for request in [1, 15, 3, 17, 24] {
        for edit in edits {
            let wrong: Wrong = Arc::new(move |asked, reply| {
                if asked == request {
                    edit(reply);
                }
            });
            let back = BackEnd::start_wrong(skills(), wrong);
            // A reply that is cut short is followed by silence: the end comes with the connection's.
            let short = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let done = Arc::clone(&short);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(20));
                        back.hang_up();
                    }
                });
                let opened = open(&back, &main, Model::Blk { queues: 1 });
                short.store(true, Ordering::SeqCst);
                assert!(opened.is_err(), "{request}");
            });
        }
    }
    // What is asked when a driver starts, and a refusal.
    for request in [2, 5, 8, 9, 10, 12, 13, 14, 18] {
        let wrong: Wrong = Arc::new(move |asked, reply| {
            if asked == request {
                reply[12] = 1;
            }
        });
        let back = BackEnd::start_wrong(skills(), wrong);
        let rig = rig(&back, &main);
        rig.start(!0, 2, 128);
        rig.wait_needs_reset();
        rig.set(0x70, 0);
    }
    // What is asked at the end.
    let places: [fn(&mut Vec<u8>); 3] = [|r| r[12] = 7, |r| r[18] = 1, |r| r[0] = 1];
    for edit in places {
        let wrong: Wrong = Arc::new(move |asked, reply| {
            if asked == 11 {
                edit(reply);
            }
        });
        let back = BackEnd::start_wrong(skills(), wrong);
        let rig = rig(&back, &main);
        start(&rig, &back.rings);
        rig.set(0x70, 0);
        // The connection is not used again, and a new one serves as well.
        let driver = start(&rig, &back.rings);
        assert_eq!((driver.len(), back.clients.load(Ordering::SeqCst)), (2, 2));
    }
}

#[test]
fn what_a_driver_must_not_do_never_reaches_the_back_end() {
    let (back, main) = (BackEnd::start(skills()), Main::start());
    let rig = rig(&back, &main);
    type Change = fn(&mut DriverRing);
    let usual: Change = |_| {};
    let cases: [(&str, &[u16], Change); 7] = [
        ("no queue", &[], usual),
        ("one of two", &[0], usual),
        ("the other", &[1], usual),
        ("a size that is none", &[0, 1], |ring| ring.size = 127),
        ("more than offered", &[0, 1], |ring| ring.size = 256),
        ("descriptors in a hole", &[0, 1], |ring| ring.desc = RAM),
        ("used ring over the end", &[1, 0], |ring| ring.used = HIGH_END - 8),
    ];
    for (name, queues, change) in cases {
        rig.negotiate(!0);
        for index in queues {
            let mut ring = DriverRing::new(&rig.memory, *index, 128);
            if Some(index) == queues.last() {
                change(&mut ring);
            }
            rig.place(&ring);
        }
        rig.driver_ok();
        assert!(rig.needs_reset(), "{name}");
        assert!(back.rings.running().is_empty(), "{name}");
        rig.set(0x70, 0);
    }
    let mut driver = start(&rig, &back.rings);
    works(&rig, &back.rings, &mut driver);
}
