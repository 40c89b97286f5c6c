//! The memory balloon on behalf of clients: its target, what it says, and pauses that leave the
//! guest's free pages out.

use std::time::{Duration, Instant};

use cloudlet_vmm::devices::virtio::balloon::{BalloonHandle, BalloonStatus, feature};
use cloudlet_vmm::machine::{Hinted, Machine};
use cloudlet_vmm::memory::PAGE_BYTES;
use serde_json::{Value, json};

use super::Failure;

/// How long a guest may take to name its free pages before a snapshot or an overlay is made with
/// those that it has named.
const HINT_PATIENCE: Duration = Duration::from_secs(2);
/// How long a guest may take to say how its memory does; afterwards what it said last is shown.
const STATISTICS_PATIENCE: Duration = Duration::from_millis(500);
/// Longest turn of the event loop meanwhile.
const TURN: Duration = Duration::from_millis(10);

const MIB_PAGES: u64 = (1 << 20) / PAGE_BYTES;

/// Names of the features that a driver may accept.
const FEATURES: [(u64, &str); 5] = [
    (feature::STATS_VQ, "statistics"),
    (feature::DEFLATE_ON_OOM, "deflate-on-oom"),
    (feature::FREE_PAGE_HINT, "hinting"),
    (feature::PAGE_POISON, "page-poison"),
    (feature::REPORTING, "reporting"),
];

/// Sets the memory that the guest may keep, if one is given, and says how the balloon does.
pub(super) fn serve(machine: &mut Machine, target_mib: Option<u64>) -> Result<Value, Failure> {
    let pages = machine.config().memory_bytes / PAGE_BYTES;
    let balloon = machine.balloon().cloned();
    let balloon =
        balloon.ok_or("this VM has no memory balloon: it was started with --no-balloon")?;
    if let Some(target) = target_mib {
        let kept = target.checked_mul(MIB_PAGES);
        let kept = kept
            .filter(|kept| (1..=pages).contains(kept))
            .ok_or(format!(
                "{target} MiB is no target for this VM: it has {} MiB",
                pages / MIB_PAGES
            ))?;
        if balloon.status().features == 0 {
            return Err(
                "no driver in the guest has taken up the memory balloon: it may still boot, or \
                        have none (Linux: virtio_balloon)"
                    .into(),
            );
        }
        balloon.set_wanted_pages(pages - kept);
    }
    if machine.is_running() {
        await_statistics(machine, &balloon)?;
    }
    Ok(describe(&balloon, pages))
}

/// Asks for statistics and lets the VM run until they come, or not.
fn await_statistics(machine: &mut Machine, balloon: &BalloonHandle) -> Result<(), Failure> {
    let asked = Instant::now();
    if !balloon.poll_statistics() {
        return Ok(());
    }
    let is_new = |status: &BalloonStatus| status.statistics.is_some_and(|(_, when)| when > asked);
    while !is_new(&balloon.status()) && asked.elapsed() < STATISTICS_PATIENCE {
        // If this ends the VM, the main loop's next turn says so again.
        if machine.turn(Some(TURN))?.is_some() {
            break;
        }
    }
    Ok(())
}

/// How the balloon of a VM with `pages` pages does. All of it but the target is the guest's word.
pub(super) fn describe(balloon: &BalloonHandle, pages: u64) -> Value {
    let status = balloon.status();
    let kept_mib = |taken: u64| pages.saturating_sub(taken) / MIB_PAGES;
    let accepted = FEATURES.iter().filter(|(bit, _)| status.has(*bit));
    let mut value = json!({
        "target_mib": kept_mib(status.wanted_pages),
        "actual_mib": kept_mib(status.actual_pages),
        "features": accepted.map(|(_, name)| *name).collect::<Vec<_>>(),
        "inflated_bytes": status.inflated_pages.saturating_mul(PAGE_BYTES),
        "deflated_bytes": status.deflated_pages.saturating_mul(PAGE_BYTES),
        "reported_bytes": status.reported_pages.saturating_mul(PAGE_BYTES),
        "discarded_bytes": status.discarded_pages.saturating_mul(PAGE_BYTES),
    });
    if let Some((statistics, when)) = status.statistics {
        let age_ms = u64::try_from(when.elapsed().as_millis()).unwrap_or(u64::MAX);
        value["statistics"] = statistics
            .iter()
            .map(|(name, value)| (name.to_owned(), json!(value)))
            .collect();
        value["statistics_age_ms"] = json!(age_ms);
    }
    value
}

/// Does `work` while the vCPUs stand still and what the guest does not use is given back; afterwards
/// they are as they were.
pub(super) fn held(
    machine: &mut Machine,
    work: impl FnOnce(&mut Machine) -> Result<Value, Failure>,
) -> Result<Value, Failure> {
    let was_running = machine.is_running();
    let result = pause(machine).and_then(|hinted| {
        let mut result = work(machine)?;
        if hinted.asked {
            result["hinted_pages"] = json!(hinted.pages);
            result["discarded_pages"] = json!(hinted.discarded);
        }
        Ok(result)
    });
    if was_running {
        machine.resume()?;
    }
    result
}

/// Pauses the VM without the guest's free pages.
pub(super) fn pause(machine: &mut Machine) -> Result<Hinted, Failure> {
    Ok(machine.pause_without_free_pages(HINT_PATIENCE)?)
}
