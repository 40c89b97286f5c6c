//! Numbers of vCPUs, sizes of memory, CPU models.

use cloudlet_vmm::config::BootProtocol::{Auto, Linux64, Pvh};
use cloudlet_vmm::config::{CpuModel, MachineConfig};
use cloudlet_vmm::cpu::cpuid::CpuidError;
use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::machine::MachineError;

use crate::common::*;

/// 32-bit code: the boot processor copies a real-mode program to 0x8000, starts all others there
/// by INIT and start-up IPIs, and halts. Each of them says `P`.
fn start_all_others() -> Vec<u8> {
    // mov dx, 0x3f8; mov al, 'P'; out dx, al; hlt for ever (16-bit)
    let program = [
        0xba, 0xf8, 0x03, 0xb0, b'P', 0xee, 0xf4, 0xeb, 0xfd, 0x90, 0x90, 0x90,
    ];
    let mut code = Vec::new();
    // mov dword [address], value
    let mut store = |address: u32, value: u32| {
        code.extend([0xc7, 0x05]);
        code.extend(address.to_le_bytes());
        code.extend(value.to_le_bytes());
    };
    for (address, word) in (0x8000..).step_by(4).zip(program.chunks_exact(4)) {
        store(address, u32::from_le_bytes(word.try_into().unwrap()));
    }
    // LAPIC: spurious vector register with the enable bit; then the interrupt command register,
    // INIT and start-up at page 8, to all but self.
    store(0xfee0_00f0, 0x1ff);
    store(0xfee0_0300, 0x000c_4500);
    store(0xfee0_0300, 0x000c_4608);
    code.extend(HALT);
    code
}

#[test]
fn one_to_eight_vcpus_start() {
    for cpus in 1..=8u8 {
        let sink = Sink::default();
        let config = MachineConfig {
            cpus,
            ..config(Pvh)
        };
        let mut machine = booted(&config, &start_all_others(), &sink).unwrap();
        turn_until(&mut machine, |_| {
            sink.bytes().len() == usize::from(cpus) - 1
        });
        machine.pause().unwrap();
        assert_eq!(sink.bytes(), vec![b'P'; usize::from(cpus) - 1]);
    }
}

#[test]
fn memory_above_the_hole_is_there() {
    // mov eax, 1; shl rax, 32; mov byte [rax+0x3fffffff], 'm'; mov al, [rax+0x3fffffff]; say al.
    // The boot page tables end at 4 GiB, so one entry is added for the fifth: PDPT[4] = 4 GiB as
    // a page of 1 GiB would need a feature; a directory at 0x10000 with its last entry does not.
    let mut code = Vec::new();
    // mov qword [0xa020], 0x10003 (as two dwords); mov qword [0x10ff8], 0x13fe00083
    for (address, value) in [
        (0xa020u32, 0x1_0003u32),
        (0xa024, 0),
        (0x1_0ff8, 0x3fe0_0083),
        (0x1_0ffc, 1),
    ] {
        code.extend([0xc7, 0x04, 0x25]);
        code.extend(address.to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    // mov rax, 0x13fffffff; mov byte [rax], 'm'; movzx ebx, byte [rax]
    code.extend([0x48, 0xb8]);
    code.extend(0x1_3fff_ffffu64.to_le_bytes());
    code.extend([0xc6, 0x00, b'm', 0x0f, 0xb6, 0x18]);
    // mov edx, 0x3f8; mov eax, ebx; out dx, al
    code.extend([0xba, 0xf8, 0x03, 0, 0, 0x89, 0xd8, 0xee]);
    code.extend(power_off());
    let sink = Sink::default();
    let config = MachineConfig {
        memory_bytes: 5 << 30,
        ..config(Linux64)
    };
    let mut machine = booted(&config, &code, &sink).unwrap();
    assert_eq!(run_to_end(&mut machine), ExitReason::Shutdown);
    assert_eq!(sink.bytes(), b"m");
}

#[test]
fn odd_sizes_are_refused_and_small_ones_run() {
    for memory_bytes in [16 << 20, (16 << 20) + 4096, 3 << 30] {
        let sink = Sink::default();
        let config = MachineConfig {
            memory_bytes,
            ..config(Auto)
        };
        let mut machine = booted(&config, &power_off(), &sink).unwrap();
        assert_eq!(run_to_end(&mut machine), ExitReason::Shutdown);
    }
    let config = config(Auto);
    let other = MachineConfig {
        memory_bytes: 32 << 20,
        ..config.clone()
    };
    let image = kernel(HALT, true);
    let result = cloudlet_vmm::machine::Machine::boot(
        config,
        fresh_ram(&other),
        &cloudlet_vmm::boot::Image::Bytes(&image),
        None,
        backends(&Sink::default()),
    );
    assert!(matches!(result, Err(MachineError::RamSize { .. })));
}

#[test]
fn a_baseline_is_given_or_refused_by_name() {
    for model in [CpuModel::V2, CpuModel::V3] {
        let sink = Sink::default();
        let config = MachineConfig {
            cpu_model: model,
            ..config(Linux64)
        };
        match booted(&config, &power_off(), &sink) {
            Ok(mut machine) => assert_eq!(run_to_end(&mut machine), ExitReason::Shutdown),
            Err(MachineError::Cpuid(CpuidError::BaselineMissing {
                model: named,
                missing,
            })) => {
                assert_eq!(named, model);
                assert!(!missing.is_empty());
            }
            Err(other) => panic!("{other}"),
        }
    }
}
