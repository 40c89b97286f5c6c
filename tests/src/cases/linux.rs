//! Kernels that Debian ships, with nothing changed in them.

use super::{Case, Needs};
use crate::failure::Outcome;
use crate::host::Host;
use crate::linux::LinuxGuest;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[Case {
    name: "linux_boots_a_bzimage_with_all_its_cpus",
    run: boots,
    needs: Needs::linux(&["6.1"]),
}];

/// The modules of every device that a VM has without options.
const MODULES: &[&str] = &["virtio_mmio", "virtio_blk", "virtio_rng", "virtio_balloon"];

/// Says how many CPUs there are, what the kernel complains of (but for the PCI that there is not),
/// and that this was all.
const LOOK: &str = "
    echo \"cpus: $(nproc)\"
    echo \"devices: $(ls /sys/bus/virtio/devices | wc -l)\"
    dmesg -r | grep '^<[0-3]>' | grep -v 'PCI: Fatal: No config space' | sed 's/^/error: /'
    echo done
    sleep 1000
";

fn boots(host: &Host) -> Outcome {
    let guest = LinuxGuest::new(host, "6.1", MODULES, LOOK)?;
    guest.boot(host, "vm", &["--cpus", "2", "--memory", "256"])?;
    let console = guest.wait_for(host, "vm", "done")?;
    ensure!(console.contains("cpus: 2\r\n"), "{console}");
    ensure!(console.contains("devices: 3\r\n"), "{console}");
    ensure!(!console.contains("error: "), "{console}");
    let status = host.status("vm")?;
    ensure_eq!(status["boot"], "linux64", "boot protocol");
    ensure_eq!(status["discovery"], "acpi", "discovery");
    Ok(())
}
