//! Pausing, saving, restoring.

use std::time::Duration;

use cloudlet_snapshot::{Reader, Writer};
use cloudlet_vmm::config::BootProtocol::Linux64;
use cloudlet_vmm::config::MachineConfig;
use cloudlet_vmm::cpu::cpuid::CpuidError;
use cloudlet_vmm::cpu::state::VcpuState;
use cloudlet_vmm::machine::{Machine, MachineError};
use cloudlet_vmm::memory::{Ram, RamLayout};

use crate::common::*;

/// A counter that has run for a while and is paused: the machine, its state, what it has said.
fn paused_counter(sink: &Sink) -> (Machine, Vec<u8>) {
    let mut machine = booted(&config(Linux64), &counter(), sink).unwrap();
    turn_until(&mut machine, |_| sink.bytes().len() >= 300);
    machine.pause().unwrap();
    let state = machine.save().unwrap();
    (machine, state)
}

/// Memory that has the contents of a paused machine's.
fn copy_of_ram(machine: &Machine) -> Ram {
    let file = tempfile::tempfile().unwrap();
    machine.ram().write_image(&file).unwrap();
    let layout = RamLayout::new(machine.config().memory_bytes).unwrap();
    Ram::from_image(&layout, &file).unwrap()
}

/// What a counter says from its first byte on.
fn is_counting(said: &[u8], first: usize) -> bool {
    said.iter()
        .enumerate()
        .all(|(at, byte)| usize::from(*byte) == (first + at) % 256)
}

#[test]
fn a_pause_holds_and_a_resume_goes_on() {
    let sink = Sink::default();
    let mut machine = booted(&config(Linux64), &counter(), &sink).unwrap();
    for round in 1..20 {
        turn_until(&mut machine, |_| sink.bytes().len() > round * 20);
        machine.pause().unwrap();
        machine.pause().unwrap();
        let said = sink.bytes().len();
        assert_eq!(machine.turn(Some(Duration::from_millis(3))).unwrap(), None);
        assert_eq!(sink.bytes().len(), said);
        machine.resume().unwrap();
    }
    assert!(is_counting(&sink.bytes(), 1));
}

#[test]
fn two_askers_hold_apart() {
    let sink = Sink::default();
    let mut machine = booted(&config(Linux64), &counter(), &sink).unwrap();
    let handle = machine.handle();
    handle.pause();
    turn_until(&mut machine, |machine| !machine.is_running());
    machine.resume().unwrap();
    assert!(!machine.is_running(), "the other one still holds it");
    machine.pause().unwrap();
    handle.resume();
    machine.turn(Some(Duration::from_millis(1))).unwrap();
    assert!(!machine.is_running(), "its owner still holds it");
    machine.resume().unwrap();
    assert!(machine.is_running());
    let said = sink.bytes().len();
    turn_until(&mut machine, |_| sink.bytes().len() > said + 10);
}

#[test]
fn only_a_paused_machine_is_saved() {
    let sink = Sink::default();
    let mut machine = booted(&config(Linux64), &counter(), &sink).unwrap();
    assert!(matches!(machine.save(), Err(MachineError::Phase { .. })));
    machine.pause().unwrap();
    machine.save().unwrap();
}

#[test]
fn a_restored_machine_counts_on() {
    let sink = Sink::default();
    let (machine, state) = paused_counter(&sink);
    let said = sink.bytes();
    for _clone in 0..2 {
        let more = Sink::default();
        let mut restored =
            Machine::restore(&state, copy_of_ram(&machine), backends(&more)).unwrap();
        assert_eq!(restored.config(), machine.config());
        restored.start(&filters()).unwrap();
        restored.resume().unwrap();
        turn_until(&mut restored, |_| more.bytes().len() >= 300);
        assert!(
            is_counting(&more.bytes(), said.len() + 1),
            "{:?}",
            &more.bytes()[..4]
        );
    }
    drop(machine);
}

#[test]
fn the_original_counts_on_after_a_save() {
    let sink = Sink::default();
    let (mut machine, _) = paused_counter(&sink);
    machine.resume().unwrap();
    turn_until(&mut machine, |_| sink.bytes().len() >= 600);
    machine.pause().unwrap();
    assert!(is_counting(&sink.bytes(), 1));
}

/// Check that two states say the same, but for what runs on while a VM stands still: the TSC, the
/// LAPIC's current count (its register 0x390), and the clocks in section `vm`.
fn assert_same(one: &[u8], other: &[u8]) {
    let mut one = Reader::parse(one).unwrap();
    let mut other = Reader::parse(other).unwrap();
    let names: Vec<String> = one.names().map(str::to_owned).collect();
    assert_eq!(names, other.names().collect::<Vec<_>>());
    for name in names {
        let (one, other) = (one.take(&name).unwrap().1, other.take(&name).unwrap().1);
        if name.starts_with("vcpu") {
            let (one, other) = (timeless(one), timeless(other));
            assert_eq!(one.msrs, other.msrs, "{name}");
            assert!(one.lapic.regs == other.lapic.regs, "LAPIC of {name}");
            let rest = |vcpu| postcard::to_stdvec(&vcpu).unwrap();
            assert!(rest(one) == rest(other), "{name}");
        } else if name != "vm" {
            assert!(one == other, "{name}");
        }
    }
}

fn timeless(section: &[u8]) -> VcpuState {
    let mut vcpu: VcpuState = postcard::from_bytes(section).unwrap();
    vcpu.msrs.retain(|msr| msr.index != 0x10);
    vcpu.tsc_offset = None;
    vcpu.lapic.regs[0x390..0x394].fill(0);
    vcpu
}

#[test]
fn saving_twice_and_saving_a_restored_one_give_the_same() {
    let sink = Sink::default();
    let (machine, state) = paused_counter(&sink);
    assert_same(&machine.save().unwrap(), &state);
    let mut restored =
        Machine::restore(&state, copy_of_ram(&machine), backends(&Sink::default())).unwrap();
    restored.start(&filters()).unwrap();
    assert_same(&restored.save().unwrap(), &state);
}

#[test]
fn eight_vcpus_are_saved_and_restored() {
    let sink = Sink::default();
    let config = MachineConfig {
        cpus: 8,
        ..config(Linux64)
    };
    let mut machine = booted(&config, &counter(), &sink).unwrap();
    turn_until(&mut machine, |_| sink.bytes().len() >= 20);
    machine.pause().unwrap();
    let state = machine.save().unwrap();
    let mut restored =
        Machine::restore(&state, copy_of_ram(&machine), backends(&Sink::default())).unwrap();
    restored.start(&filters()).unwrap();
    assert_same(&restored.save().unwrap(), &state);
}

fn ram_for(state: &[u8]) -> Ram {
    fresh_ram(&Machine::saved_config(state).unwrap())
}

#[test]
fn damaged_states_are_refused() {
    let sink = Sink::default();
    let (_machine, state) = paused_counter(&sink);
    let refused = |state: &[u8]| {
        let ram = fresh_ram(&config(Linux64));
        Machine::restore(state, ram, backends(&Sink::default()))
            .err()
            .expect("it was taken")
    };
    for len in (0..state.len()).step_by(97) {
        refused(&state[..len]);
    }
    for at in (0..state.len()).step_by(61) {
        let mut bad = state.clone();
        bad[at] ^= 0x40;
        refused(&bad);
    }
}

/// A state with one section changed by `change` (its hash being right again), or left out.
fn with_section(state: &[u8], name: &str, change: impl Fn(&[u8]) -> Option<Vec<u8>>) -> Vec<u8> {
    let names: Vec<String> = Reader::parse(state)
        .unwrap()
        .names()
        .map(str::to_owned)
        .collect();
    let mut reader = Reader::parse(state).unwrap();
    let mut writer = Writer::new();
    for section in names {
        let (version, content) = reader.take(&section).unwrap();
        let content = if section == name {
            change(content)
        } else {
            Some(content.to_vec())
        };
        if let Some(content) = content {
            writer.section(&section, version, content).unwrap();
        }
    }
    writer.finish()
}

#[test]
fn sections_that_lie_are_refused() {
    let sink = Sink::default();
    let (_machine, state) = paused_counter(&sink);
    let refused = |state: &[u8]| {
        let ram = fresh_ram(&config(Linux64));
        Machine::restore(state, ram, backends(&Sink::default()))
            .err()
            .expect("it was taken")
    };
    for name in ["config", "vcpu0", "vm", "serial", "virtio0"] {
        let missing = with_section(&state, name, |_| None);
        assert!(
            matches!(refused(&missing), MachineError::Container(_)),
            "{name}"
        );
        let longer = with_section(&state, name, |content| Some([content, &[0]].concat()));
        assert!(
            matches!(refused(&longer), MachineError::State { .. }),
            "{name}"
        );
        let shorter = with_section(&state, name, |content| {
            Some(content[..content.len() - 1].to_vec())
        });
        assert!(
            matches!(
                refused(&shorter),
                MachineError::Decode { .. } | MachineError::State { .. }
            ),
            "{name}"
        );
    }
    let mut more = Writer::new();
    let mut reader = Reader::parse(&state).unwrap();
    let names: Vec<String> = reader.names().map(str::to_owned).collect();
    for name in names {
        let (version, content) = reader.take(&name).unwrap();
        more.section(&name, version, content).unwrap();
    }
    more.section("net0", 1, *b"x").unwrap();
    let error = refused(&more.finish());
    assert!(format!("{error:?}").contains("net0"), "{error:?}");
}

/// Fields of vCPUs are allegations: whatever is in them, restoring takes them or refuses them.
#[test]
fn vcpu_fields_out_of_range_are_refused_or_harmless() {
    let sink = Sink::default();
    let (_machine, state) = paused_counter(&sink);
    let changed = |change: &dyn Fn(&mut VcpuState)| {
        let state = with_section(&state, "vcpu0", |content| {
            let mut vcpu: VcpuState = postcard::from_bytes(content).unwrap();
            change(&mut vcpu);
            Some(postcard::to_stdvec(&vcpu).unwrap())
        });
        Machine::restore(&state, ram_for(&state), backends(&Sink::default()))
    };
    assert!(changed(&|_| {}).is_ok());
    assert!(changed(&|vcpu| vcpu.xsave.truncate(100)).is_err());
    assert!(changed(&|vcpu| vcpu.xsave.resize(1 << 20, 0)).is_err());
    assert!(changed(&|vcpu| vcpu.xsave.resize(8192, 1)).is_err());
    assert!(changed(&|vcpu| vcpu.tsc_khz /= 2).is_err());
    assert!(changed(&|vcpu| vcpu.mp_state.mp_state = 99).is_err());
    assert!(changed(&|vcpu| vcpu.msrs[0].index = 0xdead_beef).is_err());
    assert!(changed(&|vcpu| vcpu.sregs.cr0 = u64::MAX).is_err());
    assert!(changed(&|vcpu| vcpu.cpuid = vcpu.cpuid.repeat(30)).is_err());
}

#[test]
fn a_host_that_lacks_a_feature_says_which() {
    let sink = Sink::default();
    let (_machine, state) = paused_counter(&sink);
    // VMX and SVM together are on no host.
    let state = with_section(&state, "vcpu0", |content| {
        let mut vcpu: VcpuState = postcard::from_bytes(content).unwrap();
        for leaf in &mut vcpu.cpuid {
            match leaf.function {
                1 => leaf.ecx |= 1 << 5,
                0x8000_0001 => leaf.ecx |= 1 << 2,
                _ => {}
            }
        }
        Some(postcard::to_stdvec(&vcpu).unwrap())
    });
    let result = Machine::restore(&state, ram_for(&state), backends(&Sink::default()));
    let Err(MachineError::Cpuid(CpuidError::RestoreMissing { missing })) = result else {
        panic!("it was taken");
    };
    assert!(
        missing.contains("vmx") || missing.contains("svm"),
        "{missing}"
    );
}
