//! A VM's life with the control thread under its filter as well. The filter is for good, so this
//! happens in a process of its own: this test binary again.

use std::process::Command;

use cloudlet_snapshot::AtomicFile;
use cloudlet_vmm::boot::Image;
use cloudlet_vmm::config::BootProtocol::Linux64;
use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::machine::Machine;
use cloudlet_vmm::memory::DirtyLog;
use cloudlet_vmm::threads::ThreadKind;

use crate::common::*;

/// Set for the child process.
const CHILD: &str = "MACHINE_TEST_CONFINED";

#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let sink = Sink::default();
    let directory = tempfile::tempdir().unwrap();
    let config = config(Linux64);
    let image = kernel(&counter(), false);
    let ram = fresh_ram(&config);
    let image = Image::Bytes(&image);
    let mut machine = Machine::boot(config, ram, &image, None, backends(&sink)).unwrap();
    let hook = filters();
    machine.start(&hook).unwrap();
    hook(ThreadKind::Control).unwrap();

    machine.resume().unwrap();
    turn_until(&mut machine, |_| sink.bytes().len() >= 300);
    let log = DirtyLog::start(machine.vm_fd(), machine.ram()).unwrap();
    turn_until(&mut machine, |_| sink.bytes().len() >= 600);
    log.take(machine.vm_fd(), machine.ram()).unwrap();
    log.stop(machine.vm_fd(), machine.ram()).unwrap();
    machine.pause().unwrap();
    machine.save().unwrap();
    machine.ram().private_pages().unwrap();
    let file = AtomicFile::create(directory.path().join("memory")).unwrap();
    machine.ram().write_image(file.file()).unwrap();
    file.commit().unwrap();
    machine.resume().unwrap();
    turn_until(&mut machine, |_| sink.bytes().len() >= 900);
    machine.handle().end(ExitReason::Stopped);
    assert_eq!(run_to_end(&mut machine), ExitReason::Stopped);
    drop(machine);
    eprintln!("a whole life");
}

#[test]
fn a_whole_life_passes_the_filters() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "confined::child", "--nocapture"])
        .env(CHILD, "1")
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{:?}\n{text}", output.status);
    assert!(text.contains("a whole life"), "{text}");
}
