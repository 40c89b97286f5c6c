//! The end-to-end cases: what each is called, what it needs, and the function that it is. A case
//! gets an empty [`Host`] and fails by returning a [`Failure`](crate::failure::Failure).

use std::path::Path;
use std::time::Duration;

use crate::failure::Outcome;
use crate::host::{Host, Lane};
use crate::linux as guests;

mod agent;
mod apps;
mod balloon;
mod bases;
mod cli;
mod console;
mod debian;
mod dhcp;
mod disks;
mod entry;
mod host_faults;
mod images;
mod import;
mod isolation;
mod kernels;
mod lifecycle;
mod linux;
mod linux_cycles;
mod linux_disks;
mod media;
mod net;
mod overlays;
mod readme;
mod refusals;
mod renewal;
mod snapshots;
mod starting;
mod synthesis;

/// One end-to-end test.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name, unique, `area_what_holds`.
    pub name: &'static str,
    /// The test.
    pub run: fn(&Host) -> Outcome,
    /// What it needs of the machine.
    pub needs: Needs,
}

/// What a case needs. Where it is not there, the case is skipped and the reason named.
#[derive(Clone, Copy)]
pub struct Needs {
    /// A usable `/dev/kvm`.
    pub kvm: bool,
    /// Whether it must run as root.
    pub root: bool,
    /// Memory that must be available, MiB.
    pub memory_mib: u64,
    /// The only lane it makes sense in, and why.
    pub only_lane: Option<(Lane, &'static str)>,
    /// Linux test guests by name (`tests/linux/pack` makes them).
    pub linux: &'static [&'static str],
    /// Programs that must be installed.
    pub programs: &'static [&'static str],
    /// Whether it takes minutes and shows what other cases show in short: it runs with `--long`.
    pub long: bool,
    /// Devices that must be there, by their paths.
    pub devices: &'static [&'static str],
    /// Time limit in lane 1.
    pub limit: Duration,
}

/// Set by `tests/run --long`: cases that take minutes run too, and some of the others do more.
pub const LONG: &str = "CLOUDLET_TESTS_LONG";

/// Whether there is time for everything.
#[must_use]
pub fn is_long() -> bool {
    std::env::var_os(LONG).is_some()
}

/// Is there where KVM has neither VT-x nor SVM below it.
const NO_HARDWARE: &str = "/sys/module/kvm_pvm";

impl Needs {
    /// A command that starts no guest: no KVM. Lane 1 is enough, since the lanes differ in KVM only.
    const NO_GUEST: Self = Self {
        kvm: false,
        root: false,
        memory_mib: 64,
        only_lane: Some((Lane::One, "starts no guest")),
        linux: &[],
        programs: &[],
        devices: &[],
        long: false,
        limit: Duration::from_secs(30),
    };

    /// Starts embedded guests. Lane 1 is enough, unless the case asks for both.
    const GUEST: Self = Self {
        kvm: true,
        root: false,
        memory_mib: 512,
        only_lane: Some((Lane::One, "KVM makes no difference to it")),
        linux: &[],
        programs: &[],
        devices: &[],
        long: false,
        limit: Duration::from_secs(60),
    };

    /// Starts Linux guests, of these kernels. Their privileged code needs VT-x or SVM below KVM, in
    /// hardware or emulated.
    const fn linux(kernels: &'static [&'static str]) -> Self {
        Self {
            kvm: true,
            root: false,
            memory_mib: 512,
            only_lane: None,
            linux: kernels,
            programs: &[],
            devices: &[],
            long: false,
            limit: Duration::from_secs(60),
        }
    }

    /// As these, in lane 2 as well: for what nested paging, exits and vCPUs of another KVM change.
    const fn in_both_lanes(self) -> Self {
        Self {
            only_lane: None,
            ..self
        }
    }

    /// As these, and only where there is time for everything.
    const fn long(self) -> Self {
        Self { long: true, ..self }
    }

    /// As these, but as root.
    const fn as_root(self) -> Self {
        Self { root: true, ..self }
    }

    /// As these, with so much memory available.
    const fn with_memory_mib(self, memory_mib: u64) -> Self {
        Self { memory_mib, ..self }
    }

    /// As these, with these programs installed.
    const fn with_programs(self, programs: &'static [&'static str]) -> Self {
        Self { programs, ..self }
    }

    /// As these, with these devices.
    const fn with_devices(self, devices: &'static [&'static str]) -> Self {
        Self { devices, ..self }
    }

    /// As these, within `seconds` in lane 1.
    const fn within(self, seconds: u64) -> Self {
        Self {
            limit: Duration::from_secs(seconds),
            ..self
        }
    }
}

impl Case {
    /// Why this case cannot run here, if it cannot.
    #[must_use]
    pub fn reason_to_skip(&self, lane: Lane) -> Option<String> {
        let needs = &self.needs;
        if !needs.linux.is_empty() && lane == Lane::One && Path::new(NO_HARDWARE).exists() {
            return Some("Linux guests need VT-x or SVM".to_owned());
        }
        if let Some((only, why)) = needs.only_lane
            && only != lane
        {
            return Some(format!("lane {} only: {why}", only.number()));
        }
        if needs.long && !is_long() {
            return Some("takes minutes: runs with --long".to_owned());
        }
        if needs.kvm
            && std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_err()
        {
            return Some("no usable /dev/kvm".to_owned());
        }
        if let Some(missing) = needs.linux.iter().find(|name| !guests::is_there(name)) {
            return Some(format!(
                "no Linux test guest {missing} (tests/linux/ has what makes them)"
            ));
        }
        if let Some(missing) = needs.programs.iter().find(|name| !is_installed(name)) {
            return Some(format!("{missing} is not installed"));
        }
        if let Some(missing) = needs.devices.iter().find(|path| !Path::new(path).exists()) {
            return Some(format!("there is no {missing}"));
        }
        if needs.root && !is_root() {
            return Some("needs root".to_owned());
        }
        let available_mib = memory_available_mib();
        if available_mib < needs.memory_mib {
            return Some(format!(
                "needs {} MiB of memory, {available_mib} MiB are available",
                needs.memory_mib
            ));
        }
        None
    }
}

/// All cases, in the order in which they run: what later ones rely on comes first.
#[must_use]
pub fn all() -> Vec<Case> {
    [
        cli::CASES,
        lifecycle::CASES,
        console::CASES,
        starting::CASES,
        images::CASES,
        import::CASES,
        host_faults::CASES,
        isolation::CASES,
        disks::CASES,
        media::CASES,
        snapshots::CASES,
        bases::CASES,
        apps::CASES,
        agent::CASES,
        renewal::CASES,
        overlays::CASES,
        refusals::CASES,
        synthesis::CASES,
        linux::CASES,
        kernels::CASES,
        linux_disks::CASES,
        linux_cycles::CASES,
        balloon::CASES,
        net::CASES,
        dhcp::CASES,
        entry::CASES,
        debian::CASES,
        readme::CASES,
    ]
    .concat()
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// `MemAvailable` of proc_meminfo(5); 0 if it cannot be read.
fn memory_available_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
