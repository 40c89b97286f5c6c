//! The agent of Linux guests.

use super::{Case, Needs};
use crate::failure::Outcome;
use crate::host::Host;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[Case {
    name: "a_guest_without_an_agent_is_told_apart",
    run: no_agent,
    needs: Needs::GUEST,
}];

/// The code of `cloudlet exec` when it fails itself.
const EXEC_FAILED: i32 = 125;

fn no_agent(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    let exec = |name| host.fails(&["exec", name, "--", "true"], EXEC_FAILED);
    let said = exec("web")?;
    ensure!(said.contains("no agent answers"), "{said}");
    let said = host.fails(&["cp", "web:/etc/passwd", "."], 1)?;
    ensure!(said.contains("no agent answers"), "{said}");
    ensure!(!host.path("passwd").exists(), "a file came of it");
    let said = host.fails(&["sync", "web"], 1)?;
    ensure!(said.contains("no agent answers"), "{said}");
    host.ok(&["pause", "web"])?;
    let said = exec("web")?;
    ensure!(said.contains("web is paused"), "{said}");
    let said = exec("none")?;
    ensure!(said.contains("no VM named none"), "{said}");
    for (from, to) in [("a", "b"), ("web:a", "web:b")] {
        let said = host.fails(&["cp", from, to], 1)?;
        ensure_eq!(said.lines().count(), 1, "sentences in {:?}", said);
    }
    // The guest took no harm.
    host.ok(&["resume", "web"])?;
    host.install_fluid("web")
}
