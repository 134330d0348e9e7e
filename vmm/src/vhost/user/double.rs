//! Stands for a back end in tests: answers on a socket as one would, and has the rings that it gets served by the other double.

use std::io::{IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use crate::vhost::Ring;
use crate::vhost::double::Double;

/// What a back end says it can do.
#[derive(Clone)]
pub(crate) struct Skills {
    pub(crate) features: u64,
    pub(crate) protocol: u64,
    pub(crate) queues: u64,
    pub(crate) config: Vec<u8>,
}

/// A wrong word: (request, what is done to its reply).
pub(crate) type Wrong = Arc<dyn Fn(u32, &mut Vec<u8>) + Send + Sync>;

/// A back end that listens on a socket of its own.
pub(crate) struct BackEnd {
    pub(crate) path: PathBuf,
    pub(crate) rings: Arc<Double>,
    /// Connections so far.
    pub(crate) clients: Arc<AtomicUsize>,
    live: Arc<Mutex<Option<UnixStream>>>,
    gone: Arc<AtomicBool>,
    _dir: tempfile::TempDir,
}

impl BackEnd {
    pub(crate) fn start(skills: Skills) -> Self {
        Self::start_wrong(skills, Arc::new(|_, _| {}))
    }

    pub(crate) fn start_wrong(skills: Skills, wrong: Wrong) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (rings, clients) = (Arc::new(Double::default()), Arc::new(AtomicUsize::new(0)));
        let (live, gone) = (Arc::new(Mutex::new(None)), Arc::new(AtomicBool::new(false)));
        let back = Self {
            path,
            rings: Arc::clone(&rings),
            clients: Arc::clone(&clients),
            live: Arc::clone(&live),
            gone: Arc::clone(&gone),
            _dir: dir,
        };
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if gone.load(Ordering::SeqCst) {
                    return;
                }
                *live.lock().unwrap() = Some(stream.try_clone().unwrap());
                clients.fetch_add(1, Ordering::SeqCst);
                serve(stream, &skills, &rings, &wrong);
                // As when a process ends: nothing of it touches the rings any more.
                rings.run_all(false).unwrap();
            }
        });
        back
    }

    /// Says what nobody has asked for; as much as goes without waiting.
    pub(crate) fn say(&self, words: &[u8]) {
        let live = self.live.lock().unwrap();
        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
        let _ = rustix::net::send(live.as_ref().unwrap(), words, flags);
    }

    /// Ends the connection; the next one is taken.
    pub(crate) fn hang_up(&self) {
        if let Some(stream) = self.live.lock().unwrap().take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
        self.hang_up();
        let _ = UnixStream::connect(&self.path);
    }
}

/// Reads a header with its descriptors.
fn header(stream: &UnixStream) -> Option<([u8; 12], Vec<OwnedFd>)> {
    let mut bytes = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let got = rustix::net::recvmsg(stream, &mut parts, &mut control, RecvFlags::WAITALL).ok()?;
    assert!(!got.flags.contains(ReturnFlags::CTRUNC));
    let fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let fds = fds.collect();
    (got.bytes == 12).then_some((bytes, fds))
}

fn serve(mut stream: UnixStream, skills: &Skills, rings: &Double, wrong: &Wrong) {
    let number = |bytes: &[u8], at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    let long = |bytes: &[u8], at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
    let mut setup: Vec<Setup> = (0..32).map(|_| Setup::default()).collect();
    while let Some((head, mut fds)) = header(&stream) {
        let (request, flags, length) = (number(&head, 0), number(&head, 4), number(&head, 8));
        let mut payload = vec![0; length as usize];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        assert_eq!(flags & 3, 1);
        let mut reply = None;
        let ring = |payload: &[u8]| number(payload, 0) as usize & 0xff;
        match request {
            1 => reply = Some(skills.features.to_ne_bytes().to_vec()),
            2 => rings.set_features(long(&payload, 0)),
            3 => {}
            5 => {
                let count = number(&payload, 0) as usize;
                assert_eq!((fds.len(), payload.len()), (count, 8 + 32 * count));
                let table = payload[8..].chunks(32).map(|r| (long(r, 0), long(r, 8), long(r, 16)));
                rings.set_memory(table.collect());
            }
            8 => setup[ring(&payload)].size = number(&payload, 4) as u16,
            9 => {
                setup[ring(&payload)].places = [long(&payload, 8), long(&payload, 24), long(&payload, 16)];
            }
            10 => setup[ring(&payload)].base = number(&payload, 4) as u16,
            11 => {
                let index = number(&payload, 0);
                rings.run(index, false).unwrap();
                let base = rings.base(index).unwrap_or(0);
                reply = Some([index.to_ne_bytes(), u32::from(base).to_ne_bytes()].concat());
            }
            12..=14 => {
                let index = ring(&payload);
                setup[index].fds[request as usize - 12] = fds.pop();
                // The kick starts it; it is served once it is enabled.
                if request == 12 {
                    setup[index].start(index as u32, rings);
                }
            }
            15 => reply = Some(skills.protocol.to_ne_bytes().to_vec()),
            16 => assert_eq!(long(&payload, 0) & !skills.protocol, 0),
            17 => reply = Some(skills.queues.to_ne_bytes().to_vec()),
            18 => {
                rings.run(number(&payload, 0), number(&payload, 4) == 1).unwrap();
            }
            24 => {
                let wanted = number(&payload, 4) as usize;
                payload[12..].copy_from_slice(&skills.config[..wanted]);
                reply = Some(payload);
            }
            other => panic!("request {other}"),
        }
        if reply.is_none() && flags & 8 != 0 {
            reply = Some(vec![0; 8]);
        }
        let Some(reply) = reply else { continue };
        let mut bytes = [request, 5, reply.len() as u32].map(u32::to_ne_bytes).concat();
        bytes.extend(reply);
        wrong(request, &mut bytes);
        if stream.write_all(&bytes).is_err() {
            return;
        }
    }
}

#[derive(Default)]
struct Setup {
    size: u16,
    base: u16,
    places: [u64; 3],
    fds: [Option<OwnedFd>; 3],
}

impl Setup {
    fn start(&self, index: u32, rings: &Double) {
        use std::os::fd::AsFd as _;
        let [kick, call, error] = &self.fds;
        let [desc, avail, used] = self.places;
        let fd = |fd: &Option<OwnedFd>| fd.as_ref().unwrap().try_clone().unwrap();
        let (kick, call, error) = (fd(kick), fd(call), fd(error));
        let ring = Ring {
            index,
            size: self.size,
            desc,
            avail,
            used,
            base: self.base,
            kick: kick.as_fd(),
            call: call.as_fd(),
            error: error.as_fd(),
        };
        rings.start_ring(&ring).unwrap();
    }
}
