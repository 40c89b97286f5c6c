//! Pausing a machine whose vCPU does not answer: it waits for a page of memory.

use std::time::Duration;

use cloudlet_vmm::boot::Image;
use cloudlet_vmm::config::BootProtocol::Linux64;
use cloudlet_vmm::cpu::CpuError;
use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::machine::{Machine, MachineError};
use cloudlet_vmm::memory::{PAGE_BYTES, PageRun, Placer, Ram, RamLayout, RamPage};

use crate::common::*;

const MISSING_PAGE: u64 = 0x300;

/// A running machine whose guest says 'a', reads the missing page, says what it read, and powers off.
fn waiting(sink: &Sink) -> (Machine, Placer) {
    let config = config(Linux64);
    let layout = RamLayout::new(config.memory_bytes).unwrap();
    let missing = [PageRun::new(MISSING_PAGE, 1)];
    let (ram, placer) = Ram::with_delta(&layout, None, &missing, &[]).unwrap();
    let mut code = say(b'a');
    // mov al, [0x300000]; out dx, al
    code.extend([0x8a, 0x04, 0x25, 0, 0, 0x30, 0, 0xee]);
    code.extend(power_off());
    let image = kernel(&code, false);
    let image = Image::Bytes(&image);
    let mut machine = Machine::boot(config, ram, &image, None, backends(sink)).unwrap();
    machine.start(&filters()).unwrap();
    machine.resume().unwrap();
    turn_until(&mut machine, |_| sink.bytes() == b"a");
    (machine, placer)
}

fn place(placer: &Placer) {
    let bytes = vec![b'b'; usize::try_from(PAGE_BYTES).unwrap()];
    placer.place(RamPage(MISSING_PAGE), &bytes).unwrap();
}

#[test]
fn a_pause_that_fails_leaves_the_vm_running() {
    let sink = Sink::default();
    let (mut machine, placer) = waiting(&sink);
    // By now the guest waits in the kernel, or is about to.
    std::thread::sleep(Duration::from_millis(100));
    let error = machine.pause_within(Duration::from_millis(100));
    assert!(
        matches!(
            error,
            Err(MachineError::Cpu(CpuError::Unresponsive { cpu: 0, .. }))
        ),
        "{error:?}"
    );
    assert!(machine.is_running(), "{}", machine.phase_name());
    place(&placer);
    assert_eq!(run_to_end(&mut machine), ExitReason::Shutdown);
    assert_eq!(sink.bytes(), b"ab");
}

#[test]
fn a_pause_after_one_that_failed_holds() {
    let sink = Sink::default();
    let (mut machine, placer) = waiting(&sink);
    std::thread::sleep(Duration::from_millis(100));
    machine.pause_within(Duration::from_millis(50)).unwrap_err();
    let placing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        place(&placer);
    });
    machine.pause().unwrap();
    placing.join().unwrap();
    assert!(!machine.is_running());
    machine.resume().unwrap();
    assert_eq!(run_to_end(&mut machine), ExitReason::Shutdown);
    assert_eq!(sink.bytes(), b"ab");
}
