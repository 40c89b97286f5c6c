//! Booting by both protocols, and every way in which a guest ends.

use std::sync::Arc;
use std::time::Duration;

use cloudlet_vmm::boot::Image;
use cloudlet_vmm::config::BootProtocol::{self, Linux64, Pvh};
use cloudlet_vmm::cpu::CpuError;
use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::machine::{Machine, MachineError};
use cloudlet_vmm::threads::ThreadHook;

use crate::common::*;

const PROTOCOLS: [BootProtocol; 2] = [Linux64, Pvh];

fn end_of(protocol: BootProtocol, code: &[u8]) -> (ExitReason, Vec<u8>) {
    let sink = Sink::default();
    let mut machine = booted(&config(protocol), code, &sink).unwrap();
    (run_to_end(&mut machine), sink.bytes())
}

#[test]
fn a_guest_speaks_and_powers_itself_off() {
    for protocol in PROTOCOLS {
        let code = [say(b'h'), say(b'i'), power_off()].concat();
        assert_eq!(
            end_of(protocol, &code),
            (ExitReason::Shutdown, b"hi".to_vec())
        );
    }
}

#[test]
fn a_guests_exit_code_is_told_from_the_vms_own_ends() {
    // 12 is also what a KVM internal error ends with.
    for exit in [0, 12, 255] {
        // mov edx, 0x608; mov al, exit; out dx, al
        let report = vec![0xba, 0x08, 0x06, 0, 0, 0xb0, exit, 0xee];
        let (reason, _) = end_of(Linux64, &[report, power_off()].concat());
        assert_eq!(reason, ExitReason::Exited { code: exit });
        assert_eq!((reason.code(), reason.name()), (exit, "exited"));
    }
}

#[test]
fn a_reset_ends_the_vm() {
    // mov al, 0xfe; out 0x64, al
    let code = [&[0xb0, 0xfe, 0xe6, 0x64][..], HALT].concat();
    let (reason, _) = end_of(Linux64, &code);
    assert_eq!((reason.code(), reason), (10, ExitReason::Reset));
}

#[test]
fn a_triple_fault_is_told_apart() {
    for protocol in PROTOCOLS {
        let (reason, said) = end_of(protocol, &[say(b'x'), vec![0x0f, 0x0b]].concat());
        assert_eq!(reason, ExitReason::TripleFault { cpu: 0 });
        assert_eq!((reason.code(), said), (11, b"x".to_vec()));
    }
}

#[test]
fn code_where_no_memory_is_is_an_internal_error() {
    // mov eax, 0xe0000000; jmp rax
    let (reason, _) = end_of(Linux64, &[0xb8, 0, 0, 0, 0xe0, 0xff, 0xe0]);
    let ExitReason::InternalError {
        cpu: 0,
        suberror: 1,
        rip,
        ..
    } = &reason
    else {
        panic!("{reason}");
    };
    assert_eq!((reason.code(), *rip), (12, 0xe000_0000));
}

#[test]
fn an_instruction_that_is_not_emulated_is_shown() {
    // lock cmpxchg16b [rsp]: KVM without hardware support emulates ring 0 and does not know it;
    // with hardware support it simply runs.
    let instruction = [0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x24];
    let stack = [0xbc, 0x00, 0x80, 0x00, 0x00]; // mov esp, 0x8000
    let code = [&stack[..], &instruction, &power_off()].concat();
    match end_of(Linux64, &code).0 {
        ExitReason::Shutdown => {}
        ExitReason::InternalError {
            cpu: 0,
            suberror: 1,
            rip,
            instruction: shown,
        } => {
            assert_eq!(rip, LOAD_ADDRESS + 5);
            assert!(shown.starts_with(&instruction), "{shown:02x?}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_handle_ends_the_vm_from_another_thread() {
    let sink = Sink::default();
    let mut machine = booted(&config(Linux64), HALT, &sink).unwrap();
    let handle = machine.handle();
    let thread = std::thread::spawn(move || {
        handle.fail(&std::io::Error::other("the delta is broken"));
    });
    let reason = run_to_end(&mut machine);
    thread.join().unwrap();
    assert_eq!(reason.to_string(), "the delta is broken");
    assert_eq!(reason.code(), 15);
    assert!(matches!(machine.resume(), Err(MachineError::Phase { .. })));
    // It stays at its end.
    assert_eq!(machine.turn(None).unwrap(), Some(reason));
}

#[test]
fn a_kernel_without_the_note_has_no_pvh_entry() {
    let config = config(Pvh);
    let image = kernel(HALT, false);
    let sink = Sink::default();
    let ram = fresh_ram(&config);
    let result = Machine::boot(config, ram, &Image::Bytes(&image), None, backends(&sink));
    assert!(matches!(result, Err(MachineError::Boot(_))));
}

#[test]
fn the_protocol_follows_the_note() {
    // In long mode 0x48 is a prefix (REX.W) and the next instruction loads all of rax; in
    // 32-bit mode it is `dec eax`, and the add that follows sees another value.
    // xor eax, eax; rex.w/dec eax; test eax, eax; jz 6; say 3; jmp end; 6: say 6; end:
    let mut code = vec![0x31, 0xc0, 0x48, 0x85, 0xc0, 0x74, 0x0d];
    code.extend([say(b'3'), vec![0xeb, 0x0b, 0x90, 0x90, 0x90], say(b'6')].concat());
    code.extend(power_off());
    for (pvh, expected) in [(true, b"3"), (false, b"6")] {
        let sink = Sink::default();
        let config = config(BootProtocol::Auto);
        let image = kernel(&code, pvh);
        let ram = fresh_ram(&config);
        let mut machine =
            Machine::boot(config, ram, &Image::Bytes(&image), None, backends(&sink)).unwrap();
        machine.start(&filters()).unwrap();
        machine.resume().unwrap();
        assert_eq!(run_to_end(&mut machine), ExitReason::Shutdown);
        assert_eq!(sink.bytes(), expected);
    }
}

#[test]
fn a_hook_that_fails_keeps_the_guest_from_starting() {
    let config = config(Linux64);
    let image = kernel(&say(b'!'), false);
    let sink = Sink::default();
    let ram = fresh_ram(&config);
    let mut machine =
        Machine::boot(config, ram, &Image::Bytes(&image), None, backends(&sink)).unwrap();
    let hook: ThreadHook = Arc::new(|_| Err("no filter".into()));
    let error = machine.start(&hook).unwrap_err();
    assert!(
        matches!(error, MachineError::Cpu(CpuError::Hook { cpu: 0, .. })),
        "{error}"
    );
    assert!(matches!(machine.resume(), Err(MachineError::Phase { .. })));
    assert_eq!(machine.turn(Some(Duration::from_millis(20))).unwrap(), None);
    assert_eq!(sink.bytes(), b"");
}
