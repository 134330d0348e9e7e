//! The serial port: a 16550A between the guest and a character device.
//!
//! Locks: `uart` is held while the guest's byte goes to the back end, which never blocks; it is not held when the back end is told that
//! there is room, because the back end may call back at once.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::bus::BusDevice;
use crate::chardev::{CharBackend, FrontEnd};
use crate::irq::Line;

/// Raises the port's interrupt.
struct Interrupt(Arc<dyn Line>);

impl Trigger for Interrupt {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

/// The guest's output.
struct Output(Arc<dyn CharBackend>);

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Remembers that the guest has read all input.
#[derive(Clone, Default)]
struct Drained(Arc<AtomicBool>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A serial port as its guest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

/// A serial port on the port bus.
pub struct SerialDevice {
    uart: Mutex<Serial<Interrupt, Drained, Output>>,
    drained: Drained,
    line: Arc<dyn Line>,
    backend: Arc<dyn CharBackend>,
}

impl SerialDevice {
    /// I/O ports that it takes.
    pub const PORTS: u64 = 8;

    /// A port that interrupts through `line`, connected to `backend`.
    pub fn new(line: Arc<dyn Line>, backend: Arc<dyn CharBackend>) -> Arc<Self> {
        let drained = Drained::default();
        let uart =
            Serial::with_events(Interrupt(Arc::clone(&line)), drained.clone(), Output(Arc::clone(&backend)));
        let device = Arc::new(Self { uart: Mutex::new(uart), drained, line, backend });
        device.backend.attach(Arc::clone(&device) as Arc<dyn FrontEnd>);
        device
    }

    /// The machine is reset: registers as new, what the guest has not read is lost.
    pub fn reset(&self) {
        let (line, output) = (Interrupt(Arc::clone(&self.line)), Output(Arc::clone(&self.backend)));
        *self.uart() = Serial::with_events(line, self.drained.clone(), output);
        self.drained.0.store(false, Ordering::Relaxed);
        self.backend.front_end_ready();
    }

    /// The registers and what the guest has not read.
    pub fn saved(&self) -> SavedSerial {
        let s = self.uart().state();
        SavedSerial {
            divisor: [s.baud_divisor_low, s.baud_divisor_high],
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            input: s.in_buffer,
        }
    }

    /// Takes what was saved. False: it makes no sense. May interrupt.
    pub fn restore(&self, saved: &SavedSerial) -> bool {
        let [baud_divisor_low, baud_divisor_high] = saved.divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.input.clone(),
        };
        let (line, output) = (Interrupt(Arc::clone(&self.line)), Output(Arc::clone(&self.backend)));
        match Serial::from_state(&state, line, self.drained.clone(), output) {
            Ok(uart) => {
                *self.uart() = uart;
                true
            }
            Err(_) => false,
        }
    }

    fn uart(&self) -> MutexGuard<'_, Serial<Interrupt, Drained, Output>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for SerialDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The registers are bytes; a wider access reads ones, as where no device is.
        let [byte] = data else { return data.fill(0xff) };
        *byte = self.uart().read(offset as u8);
        if self.drained.0.swap(false, Ordering::Relaxed) {
            self.backend.front_end_ready();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let &[byte] = data {
            // Cannot fail: neither the interrupt nor the output does.
            let _ = self.uart().write(offset as u8, byte);
        }
    }
}

impl FrontEnd for SerialDevice {
    fn can_receive(&self) -> usize {
        self.uart().fifo_capacity()
    }

    fn receive(&self, data: &[u8]) {
        // Fails only when the FIFO is full, and then the back end sent more than there was room for: lost, as on a wire.
        let _ = self.uart().enqueue_raw_bytes(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[derive(Default)]
    struct Wire(AtomicU32);
    impl Line for Wire {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[derive(Default)]
    struct Terminal {
        shown: Mutex<Vec<u8>>,
        front: Mutex<Option<Arc<dyn FrontEnd>>>,
        waiting: Mutex<Vec<u8>>,
    }
    impl CharBackend for Terminal {
        fn write(&self, data: &[u8]) {
            self.shown.lock().unwrap().extend(data);
        }
        fn attach(&self, front_end: Arc<dyn FrontEnd>) {
            *self.front.lock().unwrap() = Some(front_end);
        }
        fn front_end_ready(&self) {
            // Like a real back end: asks at once, and sends what has waited.
            let front = self.front.lock().unwrap().clone().unwrap();
            let mut waiting = self.waiting.lock().unwrap();
            let n = front.can_receive().min(waiting.len());
            front.receive(&waiting.drain(..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn bytes_go_both_ways() {
        let (wire, terminal) = (Arc::new(Wire::default()), Arc::new(Terminal::default()));
        let serial = SerialDevice::new(
            Arc::clone(&wire) as Arc<dyn Line>,
            Arc::clone(&terminal) as Arc<dyn CharBackend>,
        );
        for byte in b"hello" {
            serial.write(0, &[*byte]);
        }
        assert_eq!(*terminal.shown.lock().unwrap(), b"hello");

        serial.write(1, &[1]); // interrupt on received data
        let input: Vec<u8> = (0..200).collect();
        *terminal.waiting.lock().unwrap() = input.clone();
        terminal.front_end_ready();
        assert_eq!(wire.0.load(Ordering::Relaxed), 1);
        assert_eq!(serial.can_receive(), 0);
        let mut read = vec![];
        let mut byte = [0];
        loop {
            serial.read(5, &mut byte);
            if byte[0] & 1 == 0 {
                break;
            }
            serial.read(0, &mut byte);
            read.push(byte[0]);
        }
        assert_eq!(read, input, "input beyond the FIFO comes when the guest has made room");
    }

    #[test]
    fn what_is_saved_goes_on_in_another_port() {
        let port = || SerialDevice::new(Arc::new(Wire::default()), Arc::new(Terminal::default()));
        let (first, second) = (port(), port());
        first.write(1, &[1]);
        first.write(7, &[0x5a]);
        first.receive(b"input");
        let saved = first.saved();
        assert!(second.restore(&saved));
        assert_eq!(second.saved(), saved);
        let mut byte = [0];
        second.read(0, &mut byte);
        assert_eq!(byte, *b"i");
        assert!(!second.restore(&SavedSerial { input: vec![0; 1000], ..saved }));
    }

    #[test]
    fn every_width_and_offset_is_harmless() {
        let serial = SerialDevice::new(Arc::new(Wire::default()), Arc::new(Terminal::default()));
        for width in 0..9 {
            for offset in 0..8 {
                let mut data = vec![0x5a; width];
                serial.write(offset, &data);
                serial.read(offset, &mut data);
            }
        }
        serial.receive(&[0; 1000]);
    }
}
