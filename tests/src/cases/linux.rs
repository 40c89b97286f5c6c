//! Kernels that Debian ships, with nothing changed in them. A boot takes its time in lane 2, so
//! each shows several things.

use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::linux::LinuxGuest;
use crate::process::Process;
use crate::{ensure, ensure_eq, process};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_guest_without_acpi_has_no_power_button",
        run: no_button,
        needs: Needs::GUEST,
    },
    Case {
        name: "linux_6_1_has_its_cpus_and_devices",
        run: looks_round,
        needs: Needs::linux(&["6.1"]),
    },
    Case {
        name: "linux_cloud_kernel_shuts_down_when_asked",
        run: shuts_down,
        needs: Needs::linux(&["6.1-cloud"]),
    },
    Case {
        name: "linux_6_12_has_memory_above_4_gib",
        run: much_memory,
        needs: Needs::linux(&["6.12"]).with_memory_mib(1024),
    },
    Case {
        name: "linux_clones_have_the_date_and_random_numbers_of_their_own",
        run: clones,
        needs: Needs::linux(&["6.1"]).with_memory_mib(1024),
    },
];

/// The modules of every device that a VM has without options, and the power button's.
const MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
];

/// Says what there is, what the kernel complains of (but for the PCI that there is not), and that
/// this was all.
const LOOK: &str = "
    echo cpus: $(nproc)
    echo memory: $(sed -n 's/MemTotal: *//p' /proc/meminfo)
    echo virtio: $(cat /sys/bus/virtio/devices/*/device)
    echo clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
    for flag in x2apic tsc_deadline_timer; do
        grep -q -w $flag /proc/cpuinfo && echo flag: $flag
    done
    dmesg | grep -i 'x2apic enabled' | sed 's/^.*\\] /kernel: /'
    dmesg -r | grep '^<[0-3]>' | grep -v 'PCI: Fatal: No config space' | sed 's/^/error: /'
    echo looked
";

/// Waits until the power button is pressed. What happens before the device is open is lost.
const WAIT_FOR_BUTTON: &str = "
    exec 3</dev/input/event0
    echo waiting
    dd bs=24 count=1 <&3 >/dev/null 2>&1
    echo pressed
";

#[track_caller]
fn says(console: &str, line: &str) -> Outcome {
    ensure!(
        console.contains(&format!("{line}\r\n")),
        "no line {line:?} in\n{console}"
    );
    Ok(())
}

fn no_button(host: &Host) -> Outcome {
    host.boot("vm", &[])?;
    let error = host.fails(&["shutdown", "vm"], 1)?;
    ensure!(error.contains("no power button"), "{error}");
    host.ok(&["pause", "vm"])?;
    let error = host.fails(&["shutdown", "vm"], 1)?;
    ensure!(error.contains("paused"), "{error}");
    ensure_eq!(host.status("vm")?["discovery"], "cmdline", "discovery");
    Ok(())
}

fn looks_round(host: &Host) -> Outcome {
    let script = [LOOK, "sleep 1000"].concat();
    let guest = LinuxGuest::new(host, "6.1", MODULES, &script)?;
    let options = ["--cpus", "2", "--memory", "256", "--disk", "empty:8"];
    guest.boot(host, "vm", &options)?;
    let console = guest.wait_for(host, "vm", "looked\r\n")?;
    says(&console, "cpus: 2")?;
    // The ids of virtio 1.2, section 5: entropy, socket, balloon, disk. No device is there twice.
    says(&console, "virtio: 0x0004 0x0013 0x0005 0x0002")?;
    says(&console, "clock: kvm-clock")?;
    says(&console, "flag: x2apic")?;
    says(&console, "flag: tsc_deadline_timer")?;
    says(&console, "kernel: x2apic enabled")?;
    ensure!(!console.contains("error: "), "{console}");
    let status = host.status("vm")?;
    ensure_eq!(status["boot"], "linux64", "boot protocol");
    ensure_eq!(status["discovery"], "acpi", "discovery");
    host.ok(&["stop", "vm"]).map(drop)
}

fn shuts_down(host: &Host) -> Outcome {
    let script = [LOOK, WAIT_FOR_BUTTON].concat();
    let guest = LinuxGuest::new(host, "6.1-cloud", MODULES, &script)?;
    let args = guest.run_args(&["--name", "vm", "--cpus", "4", "--memory", "512"]);
    let vm = Process::spawn(&mut host.command(&args), Stdio::piped())?;
    let console = guest.wait_for(host, "vm", "waiting")?;
    says(&console, "cpus: 4")?;
    ensure!(!console.contains("error: "), "{console}");
    host.shut_down("vm")?;
    let finished = vm
        .wait(host.limit(Duration::from_secs(10)))?
        .expect_code(0)?;
    ensure!(finished.stdout.contains("pressed"), "{}", finished.stdout);
    Ok(())
}

fn much_memory(host: &Host) -> Outcome {
    let script = [
        LOOK,
        "grep 'System RAM' /proc/iomem; echo waiting; sleep 1000",
    ]
    .concat();
    let guest = LinuxGuest::new(host, "6.12", MODULES, &script)?;
    let pid = guest.boot(host, "vm", &["--memory", "4096"])?;
    let console = guest.wait_for(host, "vm", "waiting")?;
    says(&console, "100000000-13fffffff : System RAM")?;
    says(&console, "kernel: x2apic enabled")?;
    ensure!(!console.contains("error: "), "{console}");
    let kib: u64 = console
        .lines()
        .find_map(|line| line.strip_prefix("memory: ")?.strip_suffix(" kB"))
        .and_then(|kib| kib.parse().ok())
        .ok_or_else(|| Failure::new(console.clone()))?;
    ensure!((3_800_000..4_194_304).contains(&kib), "{kib} KiB");
    // This guest does nothing about its power button.
    let error = host.fails(&["shutdown", "vm", "--timeout", "1"], 1)?;
    ensure!(error.contains("has not shut down"), "{error}");
    let shutdown = host.spawn(&["shutdown", "vm"])?;
    std::thread::sleep(host.limit(Duration::from_secs(1)));
    process::signal_pid(pid, libc::SIGKILL)?;
    let error = shutdown
        .wait(host.limit(Duration::from_secs(10)))?
        .expect_code(1)?
        .stderr;
    ensure!(error.contains("its process was killed"), "{error}");
    Ok(())
}

fn host_secs() -> Outcome<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

/// The words behind `key` in the last whole line of `console` that begins with it.
fn last<'a>(console: &'a str, key: &str) -> Option<&'a str> {
    let whole = &console[..console.rfind('\n')?];
    whole
        .lines()
        .rev()
        .find_map(|line| line.trim_end().strip_prefix(key))
}

fn clones(host: &Host) -> Outcome {
    let script = "
        while :; do
            echo random: $(head -c 8 /dev/urandom | hexdump -e '8/1 \"%02x\"')
            echo forks: $(dmesg | grep -c 'due to virtual machine fork')
            echo barks: $(dmesg | grep -c -e lockup -e 'rcu.*stall' -e 'clocksource.*unstable')
            echo date: $(date +%s)
            sleep 1
        done
    ";
    let guest = LinuxGuest::new(host, "6.1", MODULES, script)?;
    guest.boot(host, "vm", &["--memory", "128", "--cpus", "2"])?;
    let console = guest.wait_for(host, "vm", "date: ")?;
    ensure_eq!(last(&console, "forks: "), Some("0"), "forks before any");
    host.ok(&["snapshot", "vm", "snap"])?;
    host.ok(&["stop", "vm"])?;
    // Longer than any tolerance, and than the watchdog's patience.
    std::thread::sleep(Duration::from_secs(25));
    let begin = host_secs()?;
    host.ok(&["restore", "snap", "--name", "c", "--clones", "2"])?;
    let mut random = Vec::new();
    for name in ["c-1", "c-2"] {
        // The second line that a clone says is wholly its own.
        let count = |text: &str| text.matches("date: ").count();
        let console = host.wait_until("two dates", Duration::from_secs(20), || {
            let console = host.console(name);
            (count(&console) >= 2 && console.ends_with('\n')).then_some(console)
        })?;
        let end = host_secs()?;
        let date: u64 = last(&console, "date: ").unwrap_or_default().parse()?;
        ensure!(
            (begin.saturating_sub(1)..=end + 1).contains(&date),
            "{name} says it is {date}; here it was {begin} to {end}"
        );
        ensure_eq!(last(&console, "barks: "), Some("0"), "watchdogs of {name}");
        ensure_eq!(last(&console, "forks: "), Some("1"), "forks of {name}");
        random.push(last(&console, "random: ").unwrap_or_default().to_owned());
    }
    ensure!(
        random[0].len() == 16 && random[0] != random[1],
        "{random:?}"
    );
    Ok(())
}
