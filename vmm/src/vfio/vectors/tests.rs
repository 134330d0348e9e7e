//! Messages against a host that does as VFIO and KVM are documented to.

use super::*;
use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

/// VFIO and KVM as they are documented.
#[derive(Default)]
struct Host {
    room: Option<u32>,
    on: Option<Irq>,
    led: BTreeMap<u32, EventFd>,
    gsis: Vec<u32>,
    routes: BTreeMap<u32, Message>,
    opened: BTreeMap<u32, EventFd>,
    sent: Vec<Message>,
}

impl Host {
    /// The device sends a message.
    fn interrupt(&mut self, vector: u32) {
        if let Some(event) = self.led.get(&vector) {
            event.write(1).unwrap();
        }
        self.poll();
    }

    /// KVM hears of it.
    fn poll(&mut self) {
        for (gsi, event) in &self.opened {
            if event.read().is_ok() {
                self.sent.push(self.routes[gsi]);
            }
        }
    }
}

#[derive(Default, Clone)]
struct Shared(Arc<Mutex<Host>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Host> {
        self.0.lock().unwrap()
    }

    fn interrupt(&self, vector: u32) {
        self.lock().interrupt(vector);
    }

    fn sent(&self) -> Vec<Message> {
        self.lock().sent.clone()
    }

    /// Vectors that lead somewhere, that are open, and GSIs that are taken.
    fn in_use(&self) -> (usize, usize, usize) {
        let host = self.lock();
        (host.led.len(), host.opened.len(), host.gsis.len())
    }
}

impl Plant for Shared {
    fn start(&self, irq: Irq, count: u32) -> io::Result<u32> {
        let mut host = self.lock();
        let room = host.room.unwrap_or(count);
        if room == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        assert_eq!(host.on.replace(irq), None, "one kind at a time");
        Ok(room)
    }

    fn stop(&self, irq: Irq) -> io::Result<()> {
        let mut host = self.lock();
        let on = host.on.take();
        assert!(on == Some(irq) || host.room == Some(0));
        host.led.clear();
        Ok(())
    }

    fn lead(&self, irq: Irq, vector: u32, event: &EventFd) -> io::Result<()> {
        let mut host = self.lock();
        assert_eq!(host.on, Some(irq));
        assert!(host.led.insert(vector, event.try_clone()?).is_none());
        Ok(())
    }

    fn take_gsi(&self) -> Option<u32> {
        let mut host = self.lock();
        let gsi = (24..).find(|gsi| !host.gsis.contains(gsi))?;
        host.gsis.push(gsi);
        Some(gsi)
    }

    fn give_gsi(&self, gsi: u32) {
        let mut host = self.lock();
        assert!(host.gsis.contains(&gsi) && !host.opened.contains_key(&gsi));
        host.gsis.retain(|taken| *taken != gsi);
    }

    fn route(&self, gsi: u32, message: Message) -> io::Result<()> {
        self.lock().routes.insert(gsi, message);
        Ok(())
    }

    fn open(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        let mut host = self.lock();
        assert!(host.routes.contains_key(&gsi));
        assert!(host.opened.insert(gsi, event.try_clone()?).is_none());
        host.poll();
        Ok(())
    }

    fn close(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        let mut host = self.lock();
        assert!(host.opened.remove(&gsi).is_some());
        // Everything until now has been told.
        assert!(event.read().is_err());
        Ok(())
    }
}

fn with(vectors: u16) -> (Vectors, Shared) {
    let host = Shared::default();
    (Vectors::new(vectors, Box::new(host.clone())), host)
}

fn put(vectors: &Vectors, vector: u64, word: u64, value: u32) {
    vectors.write(ENTRY * vector + 4 * word, &value.to_le_bytes());
}

fn get(vectors: &Vectors, offset: u64) -> u32 {
    let mut word = [0; 4];
    vectors.read(offset, &mut word);
    u32::from_le_bytes(word)
}

fn program(vectors: &Vectors, vector: u64) -> Message {
    put(vectors, vector, 0, 0xfee0_0000);
    put(vectors, vector, 2, 0x40 + vector as u32);
    put(vectors, vector, 3, 0);
    Message { address: 0xfee0_0000, data: 0x40 + vector as u32 }
}

const ON: Wanted = Wanted::Msix { masked: false };

#[test]
fn a_way_is_made_when_it_is_used() {
    let (vectors, host) = with(600);
    program(&vectors, 3);
    assert_eq!((get(&vectors, 3 * ENTRY + 8), get(&vectors, 12), host.in_use()), (0x43, 1, (0, 0, 0)));
    vectors.set(ON);
    assert_eq!(host.in_use(), (1, 1, 1));
    host.interrupt(3);
    host.interrupt(4);
    assert_eq!(host.sent(), [Message { address: 0xfee0_0000, data: 0x43 }]);
    let message = program(&vectors, 599);
    host.interrupt(599);
    assert_eq!(host.sent().last(), Some(&message));
    vectors.reset();
    assert_eq!(
        (host.in_use(), get(&vectors, 3 * ENTRY + 8), get(&vectors, 3 * ENTRY + 12)),
        ((0, 0, 0), 0, 1)
    );
    assert_eq!(host.lock().on, None);
}

#[test]
fn what_comes_while_it_is_masked_comes_afterwards() {
    let (vectors, host) = with(40);
    vectors.set(ON);
    let message = program(&vectors, 33);
    put(&vectors, 33, 3, 1);
    host.interrupt(33);
    host.interrupt(33);
    assert_eq!((get(&vectors, PENDING), get(&vectors, PENDING + 4)), (0, 2));
    assert_eq!((get(&vectors, PENDING + 4), host.sent()), (2, vec![]), "to look is not to take");
    put(&vectors, 33, 3, 0);
    assert_eq!((get(&vectors, PENDING + 4), host.sent()), (0, vec![message]));
    vectors.set(Wanted::Msix { masked: true });
    host.interrupt(33);
    assert_eq!((get(&vectors, PENDING + 4), host.sent().len()), (2, 1));
    // It goes where the vector leads when it is let go.
    put(&vectors, 33, 2, 0x77);
    vectors.set(ON);
    assert_eq!(host.sent().last().map(|m| m.data), Some(0x77));
    put(&vectors, 33, 2, 0x78);
    host.interrupt(33);
    assert_eq!(host.sent().last().map(|m| m.data), Some(0x78));
}

#[test]
fn msi_has_a_run_of_numbers() {
    let (vectors, host) = with(0);
    let message = Message { address: 0xfee0_1000, data: 0x4042 };
    vectors.set(Wanted::Msi { message, count: 4 });
    (0..5).for_each(|vector| host.interrupt(vector));
    let data: Vec<_> = host.sent().iter().map(|m| m.data).collect();
    assert_eq!(data, [0x4040, 0x4041, 0x4042, 0x4043]);
    // Another processor: the device is left alone.
    let moved = Message { address: 0xfee0_2000, ..message };
    vectors.set(Wanted::Msi { message: moved, count: 4 });
    host.interrupt(1);
    assert_eq!(host.sent().last(), Some(&Message { address: 0xfee0_2000, data: 0x4041 }));
    vectors.set(Wanted::Msi { message, count: 1 });
    assert_eq!(host.in_use(), (1, 1, 1));
}

#[test]
fn a_host_with_little_room_gives_what_it_has() {
    let (vectors, host) = with(8);
    for vector in 0..8 {
        program(&vectors, vector);
    }
    for (room, used) in [(2, 2), (0, 0), (8, 8)] {
        host.lock().room = Some(room);
        vectors.set(ON);
        assert_eq!(host.in_use(), (used, used, used));
        vectors.set(Wanted::Off);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u32),
    Interrupt(u32),
    Set(u8, u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let word = prop_oneof![0u32..4, any::<u32>()];
    let step = prop_oneof![
        (0u64..6 * ENTRY, word).prop_map(|(at, value)| Step::Write(at & !3, value)),
        (0u32..6).prop_map(Step::Interrupt),
        (0u8..4, 0u16..4).prop_map(|(kind, count)| Step::Set(kind, count)),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Any order of the guest's writes and the device's messages: none is lost or comes to another vector, and at the end nothing is left over.
    #[test]
    fn each_message_arrives_once(steps in steps()) {
        let (vectors, host) = with(5);
        // Vectors that have something to say, of those that have a way.
        let mut waiting = [false; 5];
        for step in steps {
            let before = host.lock().sent.len();
            match step {
                Step::Write(at, value) => vectors.write(at, &value.to_le_bytes()),
                Step::Interrupt(vector) => {
                    if let Some(waits) = waiting.get_mut(vector as usize) {
                        *waits |= host.lock().led.contains_key(&vector);
                    }
                    host.lock().interrupt(vector);
                }
                Step::Set(kind, count) => {
                    let message = Message { address: 0xfee0_0000, data: 0x40 };
                    let old = vectors.lock().wanted.kind(5);
                    let wanted = match kind {
                        0 => Wanted::Off,
                        1 => Wanted::Msi { message, count: 1 << count },
                        kind => Wanted::Msix { masked: kind == 2 },
                    };
                    if old != wanted.kind(5) {
                        waiting = [false; 5];
                    }
                    vectors.set(wanted);
                }
            }
            let open: Vec<Option<Message>> = (0..5).map(|vector| vectors.lock().message(vector)).collect();
            let mut due: Vec<Message> = Vec::new();
            for (waits, message) in waiting.iter_mut().zip(&open) {
                if let (true, Some(message)) = (*waits, message) {
                    *waits = false;
                    due.push(*message);
                }
            }
            let mut new = host.lock().sent[before..].to_vec();
            // MSI has more numbers than the table.
            new.retain(|m| open.contains(&Some(*m)));
            let key = |m: &Message| (m.address, m.data);
            new.sort_unstable_by_key(key);
            due.sort_unstable_by_key(key);
            prop_assert_eq!(new, due);
            let bits = get(&vectors, PENDING);
            for (vector, waits) in waiting.iter().enumerate() {
                prop_assert_eq!(bits >> vector & 1 == 1, *waits);
            }
        }
        drop(vectors);
        let host = host.lock();
        prop_assert_eq!((host.on, host.gsis.len(), host.opened.len(), host.led.len()), (None, 0, 0, 0));
    }
}
