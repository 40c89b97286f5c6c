//! Where nothing can come of a command: it says so, instead of waiting or doing something else.

use std::time::{Duration, Instant};

use super::{Case, Needs};
use crate::failure::Outcome;
use crate::host::Host;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_paused_guest_is_not_waited_for_without_a_word",
        run: paused,
        needs: Needs::GUEST.within(120),
    },
    Case {
        name: "options_without_effect_are_refused",
        run: without_effect,
        needs: Needs::GUEST,
    },
];

/// So long that it can be stopped in the middle.
const LONG_START: &str = "tanks=32 particles=9000 warmup=1000";
/// How long the guest stays paused at a time.
const PAUSE: Duration = Duration::from_millis(500);
const LIMIT: Duration = Duration::from_secs(60);

fn paused(host: &Host) -> Outcome {
    host.boot("web", &["--memory", "512"])?;
    host.ok(&["pause", "web"])?;
    ensure_eq!(host.status("web")?["paused_by"], "request", "who paused it");
    for args in [
        &["call", "web", "verify"][..],
        &["app", "install", "web", "fluid"],
    ] {
        let said = host.fails(args, 1)?;
        ensure!(said.contains("`cloudlet resume web`"), "{args:?}: {said}");
    }
    host.ok(&["resume", "web"])?;
    ensure!(host.status("web")?["paused_by"].is_null(), "it runs");

    let install = ["app", "install", "web", "fluid", "--params", LONG_START];
    let mut waiting = host.spawn(&install)?;
    let deadline = Instant::now() + host.limit(LIMIT);
    while !waiting.stderr().contains("web is paused: this waits") {
        ensure!(Instant::now() < deadline, "not told: {}", waiting.stderr());
        host.ok(&["pause", "web"])?;
        std::thread::sleep(PAUSE);
        let early = waiting.stderr().contains("and so is its guest");
        host.ok(&["resume", "web"])?;
        if early {
            waiting = host.spawn(&install)?;
        }
    }
    // It goes on where it was.
    host.ok(&["stop", "web"])?;
    let said = waiting.wait(host.limit(LIMIT))?.expect_code(1)?.stderr;
    ensure_eq!(said.matches("is paused").count(), 1, "notices");
    Ok(())
}

fn without_effect(host: &Host) -> Outcome {
    for option in [["--initrd", "/dev/null"], ["--cmdline", "quiet"]] {
        let said = host.fails(&[&["run", "--detach"], &option[..]].concat(), 2)?;
        ensure!(said.contains("--kernel"), "{option:?}: {said}");
    }
    let said = host.fails(&["base", "rm", "none", "--force"], 2)?;
    ensure!(said.contains("--all"), "{said}");
    host.boot("web", &["--memory", "64"])?;
    let said = host.fails(&["balloon", "web", "--target", "32"], 1)?;
    ensure!(said.contains("no driver in the guest"), "{said}");
    let balloon = host.json(&["balloon", "web"])?;
    ensure_eq!(balloon["target_mib"], 64, "the target after a refusal");
    Ok(())
}
