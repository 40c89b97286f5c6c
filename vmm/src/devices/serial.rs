//! The 16550 serial port COM1, vm-superio's UART with a place for input around it.
//!
//! Output goes to a writer the caller brings, byte by byte as the guest writes it, on the vCPU's
//! thread: a writer that blocks stops that vCPU, so a caller hands in a file, a terminal, or
//! something that does not block; what it refuses is lost and counted. Input waits in a bounded
//! backlog and moves into the UART's 64-byte FIFO as the guest empties it.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::serial::{SerialEvents, SerialState as UartState};
use vmm_sys_util::eventfd::EventFd;

use super::EventLine;
use crate::bus::BusDevice;

/// First port of COM1.
pub const PORT: u64 = 0x3f8;
/// Ports it occupies.
pub const PORTS: u64 = 8;
/// The interrupt COM1 raises.
pub const GSI: u32 = 4;
/// Input bytes that may wait for the guest; more is refused.
pub const BACKLOG_BYTES_MAX: usize = 64 * 1024;

/// Where the guest's output goes.
pub type Output = Box<dyn Write + Send>;

/// Why a saved port was refused.
#[derive(Debug, Error)]
pub enum SerialError {
    /// More input than the port has room for.
    #[error("the saved serial port holds {0} bytes of input, more than it has room for")]
    TooMuchInput(usize),
    /// The UART did not take the state.
    #[error("the serial port could not be restored")]
    Restore(#[source] vm_superio::serial::Error<std::io::Error>),
}

/// The port's registers and the input that waits in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    backlog: Vec<u8>,
}

/// What the port counted.
#[derive(Debug, Default)]
pub struct SerialCounters {
    /// Bytes the guest wrote and the writer took.
    pub written: AtomicU64,
    /// Bytes the guest wrote and the writer refused.
    pub lost: AtomicU64,
}

impl SerialEvents for SerialCounters {
    fn buffer_read(&self) {}

    fn out_byte(&self) {
        self.written.fetch_add(1, Ordering::Relaxed);
    }

    fn tx_lost_byte(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    fn in_buffer_empty(&self) {}
}

/// The port.
pub struct Serial {
    uart: vm_superio::Serial<EventLine, Arc<SerialCounters>, Output>,
    backlog: VecDeque<u8>,
    counters: Arc<SerialCounters>,
}

impl Serial {
    /// A port as it is after power-on, raising `irq` and writing to `output`.
    pub fn new(irq: EventFd, output: Output) -> Self {
        let counters = Arc::new(SerialCounters::default());
        Self {
            uart: vm_superio::Serial::with_events(EventLine::new(irq), counters.clone(), output),
            backlog: VecDeque::new(),
            counters,
        }
    }

    /// The port of a saved VM, on this host's `irq` and `output`.
    ///
    /// # Errors
    /// A state with more input than the port can hold.
    pub fn restore(state: &SerialState, irq: EventFd, output: Output) -> Result<Self, SerialError> {
        if state.backlog.len() > BACKLOG_BYTES_MAX {
            return Err(SerialError::TooMuchInput(state.backlog.len()));
        }
        let uart = UartState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let counters = Arc::new(SerialCounters::default());
        let line = EventLine::new(irq);
        Ok(Self {
            uart: vm_superio::Serial::from_state(&uart, line, counters.clone(), output)
                .map_err(SerialError::Restore)?,
            backlog: VecDeque::from(state.backlog.clone()),
            counters,
        })
    }

    /// The state from which [`Serial::restore`] makes the same port.
    pub fn save(&self) -> SerialState {
        let uart = self.uart.state();
        SerialState {
            baud_divisor_low: uart.baud_divisor_low,
            baud_divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            backlog: self.backlog.iter().copied().collect(),
        }
    }

    /// Types `bytes` on the guest's console; returns how many there was room for.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes
            .len()
            .min(BACKLOG_BYTES_MAX.saturating_sub(self.backlog.len()));
        self.backlog.extend(bytes.iter().take(taken));
        self.feed();
        taken
    }

    /// What the port counted since it was made.
    pub fn counters(&self) -> Arc<SerialCounters> {
        self.counters.clone()
    }

    /// Moves input from the backlog into the FIFO while there is room.
    fn feed(&mut self) {
        let room = self.uart.fifo_capacity().min(self.backlog.len());
        if room == 0 {
            return;
        }
        let mut bytes = [0; 64];
        let Some(bytes) = bytes.get_mut(..room) else {
            return;
        };
        for (slot, byte) in bytes.iter_mut().zip(&self.backlog) {
            *slot = *byte;
        }
        // In loopback mode the UART takes nothing from outside; the input stays where it is.
        let taken = self.uart.enqueue_raw_bytes(bytes).unwrap_or(0);
        self.backlog.drain(..taken);
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(offset), [first, ..]) = (u8::try_from(offset), data) {
            *first = self.uart.read(offset);
            self.feed();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // A string instruction's bytes all go to the one port.
        if let Ok(offset) = u8::try_from(offset) {
            for value in data {
                // A byte the writer refused is counted; the guest is not told, as on a real line.
                let _ = self.uart.write(offset, *value);
            }
            self.feed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>, bool);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.1 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port(sink: &Sink) -> (Serial, EventFd) {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (
            Serial::new(irq.try_clone().unwrap(), Box::new(sink.clone())),
            irq,
        )
    }

    fn read(serial: &mut Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_reaches_the_writer_and_refused_bytes_are_counted() {
        let sink = Sink::default();
        let (mut serial, _irq) = port(&sink);
        serial.write(0, b"hi");
        assert_eq!(*sink.0.lock().unwrap(), b"hi");
        let (mut full, _irq) = port(&Sink(Arc::default(), true));
        full.write(0, b"abc");
        assert_eq!(full.counters().lost.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_is_bounded() {
        let (mut serial, irq) = port(&Sink::default());
        serial.write(1, &[1]);
        let text: Vec<u8> = (0..=255).cycle().take(1000).collect();
        assert_eq!(serial.input(&text), 1000);
        assert!(irq.read().is_ok());
        let got: Vec<u8> = (0..1000).map(|_| read(&mut serial, 0)).collect();
        assert_eq!(got, text);
        assert_eq!(read(&mut serial, 5) & 1, 0);
        let taken = serial.input(&vec![0; 2 * BACKLOG_BYTES_MAX]);
        assert!(taken <= BACKLOG_BYTES_MAX);
        assert_eq!(serial.input(&[1; 100]), 64);
    }

    #[test]
    fn a_restored_port_goes_on_where_the_saved_one_was() {
        let (mut serial, _irq) = port(&Sink::default());
        serial.write(7, &[0x5a]);
        serial.write(1, &[1]);
        serial.input(&[9; 200]);
        let state = serial.save();
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut restored =
            Serial::restore(&state, irq.try_clone().unwrap(), Box::new(Sink::default())).unwrap();
        assert_eq!(restored.save(), state);
        assert!(
            irq.read().is_ok(),
            "input that waits must be announced again"
        );
        assert_eq!(read(&mut restored, 7), 0x5a);
        assert!((0..200).all(|_| read(&mut restored, 0) == 9));

        let mut bad = state.clone();
        bad.fifo = vec![0; 65];
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        assert!(Serial::restore(&bad, irq, Box::new(Sink::default())).is_err());
        let mut bad = state;
        bad.backlog = vec![0; BACKLOG_BYTES_MAX + 1];
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        assert!(Serial::restore(&bad, irq, Box::new(Sink::default())).is_err());
    }
}
