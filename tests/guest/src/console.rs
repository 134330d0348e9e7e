//! COM1, a 16550: output by string writes, input by interrupt. Owns the port's registers.

use core::fmt::{Arguments, Write};
use core::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use crate::cpu;

const DATA: u16 = 0x3f8;
const FIFO: usize = 16;

/// Collects formatted pieces, so that a line costs few exits.
struct Buffer {
    bytes: [u8; 128],
    length: usize,
}

impl Write for Buffer {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            if self.length + 1 >= self.bytes.len() {
                self.flush();
            }
            if byte == b'\n' {
                self.bytes[self.length] = b'\r';
                self.length += 1;
            }
            self.bytes[self.length] = byte;
            self.length += 1;
        }
        Ok(())
    }
}

impl Buffer {
    fn flush(&mut self) {
        write(&self.bytes[..self.length]);
        self.length = 0;
    }
}

fn write(bytes: &[u8]) {
    for chunk in bytes.chunks(FIFO) {
        // A full FIFO's worth may follow each "transmitter empty"; a port that never gets there loses bytes rather than hang us.
        for _ in 0..10_000 {
            if cpu::inb(DATA + 5) & 0x20 != 0 {
                break;
            }
        }
        cpu::outsb(DATA, chunk);
    }
}

/// Prints; a line feed is sent with its carriage return.
pub fn print(text: Arguments) {
    let mut buffer = Buffer { bytes: [0; 128], length: 0 };
    // Neither this writer nor our Display impls fail.
    let _ = buffer.write_fmt(text);
    buffer.flush();
}

/// Like `println!`.
#[macro_export]
macro_rules! say {
    ($($piece:tt)*) => { $crate::console::print(format_args!("{}\n", format_args!($($piece)*))) };
}

/// Like `print!`.
#[macro_export]
macro_rules! put {
    ($($piece:tt)*) => { $crate::console::print(format_args!($($piece)*)) };
}

/// Sets the port up for input by interrupt: 8n1, FIFOs on, receive interrupt, and OUT2, which gates it on a PC.
pub fn open() {
    for (register, value) in [(3, 0x03), (2, 0x07), (4, 0x0b), (1, 0x01)] {
        cpu::outb(DATA + register, value);
    }
    crate::irq::open(4);
}

/// What was typed while a command ran and only asked whether to stop.
struct Ahead {
    bytes: [AtomicU8; 256],
    first: AtomicUsize,
    count: AtomicUsize,
}

static AHEAD: Ahead = Ahead {
    bytes: [const { AtomicU8::new(0) }; 256],
    first: AtomicUsize::new(0),
    count: AtomicUsize::new(0),
};

fn received() -> Option<u8> {
    let status = cpu::inb(DATA + 5);
    // All ones: there is no port.
    (status & 1 != 0 && status != 0xff).then(|| cpu::inb(DATA))
}

/// The next byte typed, if there is one.
pub fn key() -> Option<u8> {
    let count = AHEAD.count.load(Ordering::Relaxed);
    if count == 0 {
        return received();
    }
    let first = AHEAD.first.load(Ordering::Relaxed);
    AHEAD.first.store((first + 1) % AHEAD.bytes.len(), Ordering::Relaxed);
    AHEAD.count.store(count - 1, Ordering::Relaxed);
    Some(AHEAD.bytes[first].load(Ordering::Relaxed))
}

/// Whether Ctrl-C was typed; other bytes are kept for [`key`], the newest dropped when there are too many.
pub fn interrupted() -> bool {
    while let Some(byte) = received() {
        if byte == 3 {
            return true;
        }
        let (first, count) = (AHEAD.first.load(Ordering::Relaxed), AHEAD.count.load(Ordering::Relaxed));
        if count < AHEAD.bytes.len() {
            AHEAD.bytes[(first + count) % AHEAD.bytes.len()].store(byte, Ordering::Relaxed);
            AHEAD.count.store(count + 1, Ordering::Relaxed);
        }
    }
    false
}
