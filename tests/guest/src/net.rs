//! virtio-net (virtio 1.2 §5.1) with just enough Ethernet, ARP, IPv4 and ICMP to ping and be pinged.

use crate::clock;
use crate::cpu;
use crate::irq;
use crate::memory;
use crate::text::{Interface, Ipv4, Mac};
use crate::virtio::{Piece, Problem, Queue, Window};

/// Device type.
pub const KIND: u32 = 1;

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
/// virtio_net_hdr with num_buffers, always there in version 1.
const HEADER: usize = 12;
const BUFFER: usize = 2048;
const BUFFERS: u16 = 16;
const ETHERNET: usize = HEADER + 14;
const BROADCAST: Mac = Mac([0xff; 6]);
const TYPE_IPV4: u16 = 0x0800;
const TYPE_ARP: u16 = 0x0806;
const ECHO_ID: u16 = 0xf107;

/// MAC address and link of the card in `window`. Allowed before it is driven.
pub fn describe(window: Window) -> (Mac, bool) {
    let features = window.features();
    let mut mac = [0; 6];
    if features & F_MAC != 0 {
        for (i, byte) in mac.iter_mut().enumerate() {
            *byte = window.config8(i as u64);
        }
    }
    (Mac(mac), features & F_STATUS == 0 || window.config8(6) & 1 != 0)
}

/// A card that is driven.
pub struct Card {
    window: Window,
    receive: Queue,
    transmit: Queue,
    received: &'static mut [u8],
    sent: &'static mut [u8],
    /// Transmit buffers on their way, one bit each.
    busy: u16,
    /// Its MAC address.
    pub mac: Mac,
    /// Our address, if we have one.
    pub interface: Option<Interface>,
    neighbour: Option<(Ipv4, Mac)>,
    /// The last echo reply: who, its sequence number.
    echo: Option<(Ipv4, u16)>,
    /// Frames received and sent.
    pub frames: [u64; 2],
    /// Echo requests answered.
    pub answered: u64,
}

impl Card {
    /// Takes the device over.
    pub fn open(window: Window, interface: Option<Interface>) -> Result<Self, Problem> {
        let (mac, _) = describe(window);
        window.negotiate(F_MAC | F_STATUS)?;
        let (mut receive, transmit) = (window.queue(0)?, window.queue(1)?);
        let space = (BUFFER * usize::from(BUFFERS)) as u64 / memory::PAGE;
        let received = memory::pages(space).ok_or("out of memory")?;
        let sent = memory::pages(space).ok_or("out of memory")?;
        transmit.interrupts(false);
        for buffer in 0..BUFFERS.min(receive.size()) {
            receive.offer(buffer, &[piece(received, buffer, BUFFER, true)]);
        }
        window.start();
        receive.notify();
        let mut card = Self {
            window,
            receive,
            transmit,
            received,
            sent,
            busy: 0,
            mac,
            interface,
            neighbour: None,
            echo: None,
            frames: [0; 2],
            answered: 0,
        };
        // Tell the bridge and the neighbours where we are.
        if let Some(own) = card.interface {
            card.send_arp(1, BROADCAST, own.address);
        }
        Ok(card)
    }

    /// Whether the link is up now.
    pub fn link(&self) -> bool {
        describe(self.window).1
    }

    /// Whether a frame waits.
    pub fn pending(&self) -> bool {
        self.receive.ready()
    }

    /// Handles all frames that wait.
    pub fn serve(&mut self) {
        let mut any = false;
        while let Some((buffer, length)) = self.receive.take() {
            let buffer = buffer % BUFFERS;
            let start = usize::from(buffer) * BUFFER;
            let mut frame = [0; BUFFER];
            let length = (length as usize).min(BUFFER);
            frame[..length].copy_from_slice(&self.received[start..start + length]);
            self.receive.offer(buffer, &[piece(self.received, buffer, BUFFER, true)]);
            self.frames[0] += 1;
            any = true;
            // A frame that is too short or malformed is dropped.
            let _ = self.handle(&frame[..length]);
        }
        if any {
            self.receive.notify();
            self.window.acknowledge();
        }
    }

    fn handle(&mut self, frame: &[u8]) -> Option<()> {
        let own = self.interface?.address;
        let source = Mac(array(frame, HEADER + 6)?);
        let packet = frame.get(ETHERNET..)?;
        match u16::from_be_bytes(array(frame, HEADER + 12)?) {
            TYPE_ARP if packet.get(..6)? == [0, 1, 8, 0, 6, 4] => {
                let (mac, from) = (Mac(array(packet, 8)?), Ipv4(u32::from_be_bytes(array(packet, 14)?)));
                if Ipv4(u32::from_be_bytes(array(packet, 24)?)) == own {
                    self.neighbour = Some((from, mac));
                    if packet.get(7)? == &1 {
                        self.send_arp(2, mac, from);
                    }
                }
            }
            TYPE_IPV4 => {
                let header = usize::from(packet.first()? & 15) * 4;
                let total = usize::from(u16::from_be_bytes(array(packet, 2)?)).min(packet.len());
                let from = Ipv4(u32::from_be_bytes(array(packet, 12)?));
                let fragment = u16::from_be_bytes(array(packet, 6)?) & 0x3fff;
                if packet[0] >> 4 != 4
                    || header < 20
                    || fragment != 0
                    || packet.get(9)? != &1
                    || Ipv4(u32::from_be_bytes(array(packet, 16)?)) != own
                {
                    return None;
                }
                let message = packet.get(header..total)?;
                match message.get(..2)? {
                    [8, 0] => {
                        self.answered += 1;
                        self.send_icmp(source, from, 0, message.get(4..)?);
                    }
                    [0, 0] if array(message, 4)? == ECHO_ID.to_be_bytes() => {
                        self.echo = Some((from, u16::from_be_bytes(array(message, 6)?)));
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        Some(())
    }

    /// Pings once; the answer's round trip in microseconds, `None` without one within a second.
    pub fn ping(&mut self, to: Ipv4, sequence: u16) -> Result<Option<u64>, Problem> {
        let own = self
            .interface
            .ok_or("it has no address: give ip=ADDR/LEN on the command line, or use `net up`")?;
        let hop = own.next_hop(to);
        if self.neighbour.is_none_or(|(who, _)| who != hop) {
            self.send_arp(1, BROADCAST, hop);
            self.serve_until(1_000_000, |card| card.neighbour.is_some_and(|(who, _)| who == hop));
        }
        let Some((_, mac)) = self.neighbour.filter(|(who, _)| *who == hop) else { return Ok(None) };
        let mut body = [0; 60];
        body[..2].copy_from_slice(&ECHO_ID.to_be_bytes());
        body[2..4].copy_from_slice(&sequence.to_be_bytes());
        let start = cpu::tsc();
        self.send_icmp(mac, to, 8, &body);
        let came = self.serve_until(1_000_000, |card| card.echo == Some((to, sequence)));
        Ok(came.then(|| clock::to_microseconds(cpu::tsc() - start)))
    }

    fn serve_until(&mut self, microseconds: u64, done: impl Fn(&Self) -> bool) -> bool {
        let end = clock::deadline(microseconds);
        loop {
            self.serve();
            if done(self) {
                return true;
            }
            let now = cpu::tsc();
            if now >= end {
                return false;
            }
            irq::wait(clock::to_microseconds(end - now).max(1), || (), || self.pending());
        }
    }

    fn send_arp(&mut self, operation: u16, to: Mac, target: Ipv4) {
        let Some(own) = self.interface else { return };
        let mut packet = [0; 28];
        packet[..6].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
        packet[6..8].copy_from_slice(&operation.to_be_bytes());
        packet[8..14].copy_from_slice(&self.mac.0);
        packet[14..18].copy_from_slice(&own.address.0.to_be_bytes());
        packet[18..24].copy_from_slice(if operation == 1 { &[0; 6] } else { &to.0 });
        packet[24..28].copy_from_slice(&target.0.to_be_bytes());
        self.send(to, TYPE_ARP, &packet, &[], &[]);
    }

    /// `rest` is the message after type, code and checksum.
    fn send_icmp(&mut self, mac: Mac, to: Ipv4, kind: u8, rest: &[u8]) {
        let Some(own) = self.interface else { return };
        let mut icmp = [kind, 0, 0, 0];
        let sum = checksum(checksum_part(0, &icmp), rest);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut ip = [0; 20];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&((24 + rest.len()) as u16).to_be_bytes());
        ip[8] = 64;
        ip[9] = 1;
        ip[12..16].copy_from_slice(&own.address.0.to_be_bytes());
        ip[16..20].copy_from_slice(&to.0.to_be_bytes());
        let sum = checksum(0, &ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        self.send(mac, TYPE_IPV4, &ip, &icmp, rest);
    }

    fn send(&mut self, to: Mac, kind: u16, a: &[u8], b: &[u8], c: &[u8]) {
        while let Some((buffer, _)) = self.transmit.take() {
            self.busy &= !(1 << (buffer % BUFFERS));
        }
        let buffer = self.busy.trailing_ones() as u16;
        let length = ETHERNET + a.len() + b.len() + c.len();
        // The device is behind, or the frame too long: dropped, as a network may.
        if buffer >= BUFFERS.min(self.transmit.size()) || length > BUFFER {
            return;
        }
        let frame = &mut self.sent[usize::from(buffer) * BUFFER..][..length];
        frame[..HEADER].fill(0);
        frame[HEADER..HEADER + 6].copy_from_slice(&to.0);
        frame[HEADER + 6..HEADER + 12].copy_from_slice(&self.mac.0);
        frame[HEADER + 12..ETHERNET].copy_from_slice(&kind.to_be_bytes());
        let mut at = ETHERNET;
        for part in [a, b, c] {
            frame[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        self.busy |= 1 << buffer;
        self.frames[1] += 1;
        self.transmit.offer(buffer, &[piece(self.sent, buffer, length, false)]);
        self.transmit.notify();
    }
}

fn piece(space: &[u8], buffer: u16, length: usize, for_device: bool) -> Piece {
    let address = space.as_ptr() as u64 + u64::from(buffer) * BUFFER as u64;
    Piece { address, length: length as u32, for_device }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn checksum_part(sum: u32, bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(sum, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
    })
}

/// The internet checksum (RFC 1071) of `bytes` after a part with sum `sum`.
fn checksum(sum: u32, bytes: &[u8]) -> u16 {
    let mut sum = checksum_part(sum, bytes);
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
