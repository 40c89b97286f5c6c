//! What the tests with KVM share: tiny guests assembled by hand, and machines to run them in.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use cloudlet_vmm::boot::Image;
use cloudlet_vmm::config::{BootProtocol, MachineConfig};
use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::machine::{Backends, Machine, MachineError};
use cloudlet_vmm::memory::{Ram, RamLayout};
use cloudlet_vmm::seccomp;
use cloudlet_vmm::threads::ThreadHook;

/// Where the tiny kernels lie.
pub(crate) const LOAD_ADDRESS: u64 = 0x10_0000;

/// `hlt` for ever.
pub(crate) const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];

/// Everything that a guest has written to its serial port.
#[derive(Clone, Default)]
pub(crate) struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    /// A copy of what there is so far.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An ELF kernel of one segment, with a PVH note whose entry is its first byte if `pvh`.
pub(crate) fn kernel(code: &[u8], pvh: bool) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    let note_at = HEADERS;
    let code_at = HEADERS + 20;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let put16 = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let put32 = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let put64 = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    put16(&mut elf, 2); // executable
    put16(&mut elf, 62); // x86-64
    put32(&mut elf, 1);
    put64(&mut elf, LOAD_ADDRESS);
    put64(&mut elf, 64); // program headers
    put64(&mut elf, 0);
    put32(&mut elf, 0);
    for value in [64, 56, if pvh { 2 } else { 1 }, 0, 0, 0] {
        put16(&mut elf, value);
    }
    let len = u64::try_from(code.len()).unwrap();
    put32(&mut elf, 1); // load
    put32(&mut elf, 7);
    for value in [code_at, LOAD_ADDRESS, LOAD_ADDRESS, len, len + 4096, 4096] {
        put64(&mut elf, value);
    }
    put32(&mut elf, 4); // note
    put32(&mut elf, 4);
    for value in [note_at, 0, 0, 20, 20, 4] {
        put64(&mut elf, value);
    }
    for value in [4, 4, 18] {
        put32(&mut elf, value);
    }
    elf.extend(b"Xen\0");
    put32(&mut elf, u32::try_from(LOAD_ADDRESS).unwrap());
    elf.extend(code);
    elf
}

/// Code that writes a byte to the serial port; the same bytes in 32 and 64 bit mode.
pub(crate) fn say(byte: u8) -> Vec<u8> {
    // mov edx, 0x3f8; mov al, byte; out dx, al
    vec![0xba, 0xf8, 0x03, 0, 0, 0xb0, byte, 0xee]
}

/// Code that powers the VM off; the same bytes in 32 and 64 bit mode.
pub(crate) fn power_off() -> Vec<u8> {
    // mov edx, 0x604; mov eax, 0x2000; out dx, ax; hlt for ever
    let mut code = vec![0xba, 0x04, 0x06, 0, 0, 0xb8, 0, 0x20, 0, 0, 0x66, 0xef];
    code.extend(HALT);
    code
}

/// Code that writes 1, 2, 3... (as bytes, wrapping) to the serial port for ever.
pub(crate) fn counter() -> Vec<u8> {
    vec![
        0x31, 0xdb, // xor ebx, ebx
        0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
        0x83, 0xc3, 0x01, // next: add ebx, 1
        0x89, 0xd8, // mov eax, ebx
        0xee, // out dx, al
        0xb9, 0x40, 0, 0, 0, // mov ecx, 64
        0x83, 0xe9, 0x01, // wait: sub ecx, 1
        0x75, 0xfb, // jnz wait
        0xeb, 0xee, // jmp next
    ]
}

/// A configuration for tests: little memory.
pub(crate) fn config(protocol: BootProtocol) -> MachineConfig {
    MachineConfig {
        memory_bytes: 16 << 20,
        boot_protocol: protocol,
        ..MachineConfig::default()
    }
}

/// Fresh memory for a configuration.
pub(crate) fn fresh_ram(config: &MachineConfig) -> Ram {
    Ram::anonymous(&RamLayout::new(config.memory_bytes).unwrap()).unwrap()
}

/// Backends whose serial output goes to `sink`.
pub(crate) fn backends(sink: &Sink) -> Backends {
    Backends {
        disk_limits: Vec::new(),
        serial_out: Box::new(sink.clone()),
        vsock: None,
        disks: Vec::new(),
        nets: Vec::new(),
    }
}

/// Boot `code` by the configuration's protocol, up to the point where the guest runs.
pub(crate) fn booted(
    config: &MachineConfig,
    code: &[u8],
    sink: &Sink,
) -> Result<Machine, MachineError> {
    let image = kernel(code, config.boot_protocol != BootProtocol::Linux64);
    let mut machine = Machine::boot(
        config.clone(),
        fresh_ram(config),
        &Image::Bytes(&image),
        None,
        backends(sink),
    )?;
    machine.start(&filters())?;
    machine.resume()?;
    Ok(machine)
}

/// The hook of a VMM process: each thread gets its filter. A violation is told on standard error
/// and ends the whole test program.
pub(crate) fn filters() -> ThreadHook {
    static PREPARED: Once = Once::new();
    PREPARED.call_once(|| {
        let report = io::stderr().as_fd().try_clone_to_owned().unwrap();
        seccomp::prepare(report).unwrap();
    });
    Arc::new(|kind| Ok(seccomp::install(kind)?))
}

/// Run a machine to its end.
pub(crate) fn run_to_end(machine: &mut Machine) -> ExitReason {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(20) {
        if let Some(reason) = machine.turn(Some(Duration::from_millis(50))).unwrap() {
            return reason;
        }
    }
    panic!("the guest did not end; it is {}", machine.phase_name());
}

/// Turn until `done` says so.
pub(crate) fn turn_until(machine: &mut Machine, mut done: impl FnMut(&mut Machine) -> bool) {
    let started = Instant::now();
    while !done(machine) {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "it did not happen"
        );
        let end = machine.turn(Some(Duration::from_millis(2))).unwrap();
        assert_eq!(end, None);
    }
}
