//! What went wrong in devices while the guest ran on: in `status`, and once each in the VM's log. The
//! guest hears of an I/O error or finds a device stopped, and its owner would have to ask it.

use std::collections::HashSet;
use std::io::{self, Write};

use cloudlet_vmm::devices::disk::{Disk, DiskFaults};
use cloudlet_vmm::machine::Machine;
use serde_json::{Value, json};

use crate::synthesis::chain;

/// Most lines that a VM's log gets of this: a guest can stop its devices as often as it likes.
const LINES_MAX: usize = 100;

/// What has been told.
#[derive(Debug, Default)]
pub(super) struct Faults {
    lines: HashSet<String>,
    /// Failures of each disk and of the other devices, as of the last look.
    disks: Vec<u64>,
    devices: u64,
    /// The last device that stopped, and why.
    last_device: Option<String>,
}

impl Faults {
    /// Looks whether there is something new, and tells the log.
    pub(super) fn look(&mut self, machine: &Machine, disks: &[Disk]) {
        self.disks.resize(disks.len(), 0);
        for (number, disk) in disks.iter().enumerate() {
            let seen = disk.fault_count();
            if std::mem::replace(&mut self.disks[number], seen) != seen {
                self.tell(words(number, &disk.faults()));
            }
        }
        let seen = machine.device_failures();
        if std::mem::replace(&mut self.devices, seen) != seen {
            for (name, error) in machine.take_device_errors() {
                let line = format!(
                    "the {name} stopped until its driver resets it: {}",
                    chain(&error)
                );
                self.last_device = Some(line.clone());
                self.tell(line);
            }
        }
    }

    fn tell(&mut self, line: String) {
        if self.lines.len() < LINES_MAX && !self.lines.contains(&line) {
            // A log that cannot be written loses a line that `status` has too.
            let _ = writeln!(io::stderr(), "{line}");
            self.lines.insert(line);
        }
    }

    /// Adds to a VM's status: an object for each disk, and how often devices stopped.
    pub(super) fn add_to(&self, status: &mut Value, disks: &[Disk]) {
        for (number, disk) in disks.iter().enumerate() {
            let faults = disk.faults();
            let mut about = json!({
                "bytes": disk.bytes(),
                "sector_bytes": disk.sector_bytes(),
                "read_only": disk.is_read_only(),
                "failed_reads": faults.reads,
                "failed_writes": faults.writes,
                "failed_flushes": faults.flushes,
            });
            if let Some(last) = faults.last {
                about["last_failure"] = json!(last);
            }
            status[format!("disk{number}")] = about;
        }
        status["device_failures"] = json!(self.devices);
        if let Some(last) = &self.last_device {
            status["last_device_failure"] = json!(last);
        }
    }
}

/// One line of a disk's last failure: the same for the same cause.
fn words(number: usize, faults: &DiskFaults) -> String {
    let why = faults.last.as_deref().unwrap_or("unknown");
    format!("disk {number} failed its guest: {why}")
}
