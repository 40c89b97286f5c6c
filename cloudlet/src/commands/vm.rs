//! `ps`, `status`, `balloon`, `pause`, `resume`, `shutdown`, `sync`.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use cloudlet::control::{Client, Request};
use cloudlet::launch::{End, Report, end_of};
use cloudlet::registry::{self, VmDir};
use serde_json::{Value, json};

use super::Host;
use super::output::{megabytes, table, text_of};
use super::stop::{GONE_LIMIT, ends_within};
use crate::cli::{Balloon, Shutdown};

/// How long a VM may take to answer `ps`.
pub(super) const PS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one may take to answer `status`: it may be writing a snapshot.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn ps(host: &Host) -> Result<()> {
    let vms = registry::list(&host.paths.vms()?)?;
    let states: Vec<Value> = vms.iter().map(|dir| state_of(dir, PS_TIMEOUT)).collect();
    let mut rows = vec![
        ["NAME", "STATE", "PID", "CPUS", "MEMORY", "BASE"]
            .map(String::from)
            .to_vec(),
    ];
    for state in &states {
        let columns = ["name", "state", "pid", "cpus", "memory_mib", "base"];
        rows.push(
            columns
                .iter()
                .map(|column| match column {
                    &"state" => state_in_words(state),
                    column => text_of(state, column),
                })
                .collect(),
        );
    }
    host.output.list(&states, &rows);
    Ok(())
}

/// What `dir`'s VM says of itself within `limit`, or how it ended.
pub(super) fn state_of(dir: &VmDir, limit: Duration) -> Value {
    let name = dir.name.as_str();
    if !dir.is_alive() {
        let mut ended = how_ended(&Report::of(dir));
        ended["name"] = json!(name);
        ended["state"] = json!("ended");
        return ended;
    }
    let asked = Client::reach(dir).and_then(|mut client| {
        client.set_timeout(limit)?;
        client.ask(&Request::Status)
    });
    asked.unwrap_or_else(|_| {
        let pid = dir.holder().map(|holder| holder.pid);
        json!({ "name": name, "state": "busy", "pid": pid })
    })
}

/// How a VM ended, for scripts: `guest_code` where the code is that of the guest's own process.
pub(super) fn how_ended(report: &Report) -> Value {
    let words = [&report.words, &report.end]
        .into_iter()
        .find(|words| !words.is_empty());
    json!({
        "end": report.end,
        "exit_code": report.code,
        "guest_code": report.guest_code(),
        "report": words,
    })
}

/// The state of `ps`: that of an ended VM says how it ended.
fn state_in_words(state: &Value) -> String {
    match (&state["end"], &state["exit_code"]) {
        (Value::String(end), Value::Number(code)) => format!("{end} ({code})"),
        (Value::String(end), _) => end.clone(),
        _ => text_of(state, "state"),
    }
}

pub(super) fn status(host: &Host, name: &str) -> Result<()> {
    let dir = host.find(name)?;
    let mut state = state_of(&dir, STATUS_TIMEOUT);
    if state["balloon"].is_object() {
        // Makes the guest say how its memory does, so that it stands in the status; not every guest
        // has a driver for the balloon.
        let _ = host.ask(name, &Request::Balloon { target_mib: None });
        state = state_of(&dir, STATUS_TIMEOUT);
    }
    host.output.result(&state, || describe(&state));
    Ok(())
}

fn describe(state: &Value) -> String {
    let mut rows = Vec::new();
    add_rows(state, "", &mut rows);
    table(&rows)
}

/// Adds a row for each field of an object, and for those of objects in it.
fn add_rows(object: &Value, prefix: &str, rows: &mut Vec<Vec<String>>) {
    for (key, value) in object.as_object().into_iter().flatten() {
        if value.is_object() {
            add_rows(value, &format!("{prefix}{key}."), rows);
        } else {
            rows.push(vec![format!("{prefix}{key}"), text_of(object, key)]);
        }
    }
}

/// Shows a VM's balloon, after its target has been changed if there is a new one.
pub(super) fn balloon(host: &Host, args: &Balloon) -> Result<()> {
    let target_mib = args.target;
    let state = host.ask(&args.name, &Request::Balloon { target_mib })?;
    host.output.result(&state, || describe(&state));
    Ok(())
}

/// Makes a request whose only result is that it was carried out.
pub(super) fn change(host: &Host, name: &str, request: &Request) -> Result<()> {
    let result = host.ask(name, request)?;
    host.output.result(&result, String::new);
    Ok(())
}

/// Has a guest give back what it does not need.
pub(super) fn sync(host: &Host, name: &str) -> Result<()> {
    let trimmed = cloudlet::agent::sync(host.agent_of(name, Duration::ZERO)?)
        .with_context(|| format!("cannot sync {name}"))?;
    let total: u64 = trimmed
        .iter()
        .filter_map(|one| one.result.as_ref().ok())
        .sum();
    let list = trimmed.iter().map(|one| {
        let (bytes, error) = (one.result.as_ref().ok(), one.result.as_ref().err());
        json!({ "path": one.path, "trimmed_bytes": bytes, "error": error })
    });
    let value = json!({
        "name": name,
        "trimmed_bytes": total,
        "file_systems": list.collect::<Vec<_>>(),
    });
    host.output.result(&value, || {
        let lines = trimmed.iter().map(|one| match &one.result {
            Ok(bytes) => format!("{}: {} trimmed", one.path, megabytes(*bytes)),
            Err(why) => format!("{}: not trimmed: {why}", one.path),
        });
        lines.collect::<Vec<_>>().join("\n")
    });
    Ok(())
}

/// Asks the guest to shut down and waits for the VM's end, which is to be a power-off.
pub(super) fn shutdown(host: &Host, args: &Shutdown) -> Result<()> {
    let (name, dir) = (&args.name, host.find(&args.name)?);
    // Opened now: whoever the VM is attached to may remove its directory before we look.
    let report = File::open(dir.report()).context("cannot read the VM's report")?;
    let held = dir.holder().and_then(|holder| holder.open().ok().flatten());
    let asked = ask_to_shut_down(host, name)?;
    let limit = Duration::from_secs(args.timeout);
    if !ends_within(&dir, limit) {
        bail!(
            "{name} was asked by its {asked}, has not shut down within {limit:?} and runs on (`cloudlet \
             stop` ends it at once)"
        );
    }
    // What it had locked is free when its process is gone.
    let _ = held.is_none_or(|held| held.ends_within(GONE_LIMIT));
    match end_of(&report) {
        End::InOrder => {}
        End::Reported(words) => bail!("{name} has ended, but not by a power-off: {words}"),
        End::Killed => bail!("{name} has ended, but not by a power-off: its process was killed"),
    }
    let value = json!({ "name": name, "state": "shut down", "asked": asked });
    host.output
        .result(&value, || format!("{name}: shut down by its {asked}"));
    Ok(())
}

/// Asks a guest to shut down: its agent, else by the power button. Says which was asked.
fn ask_to_shut_down(host: &Host, name: &str) -> Result<&'static str> {
    let state = host.ask(name, &Request::Status)?;
    // A guest without a driver would be waited for, and none of a paused VM answers.
    let can_answer = state["vsock_driver"] == true && state["state"] == "running";
    let by_agent = if can_answer {
        let agent = host.agent_of(name, Duration::ZERO);
        agent.and_then(|agent| Ok(cloudlet::agent::power_off(agent)?))
    } else {
        Err(anyhow!("it has no vsock driver at work"))
    };
    let Err(no_agent) = by_agent else {
        return Ok("agent");
    };
    match host.ask(name, &Request::PowerButton) {
        Ok(_) => Ok("power button"),
        Err(error) if can_answer => Err(error.context(format!("by its agent: {no_agent:#}"))),
        Err(error) => Err(error),
    }
}
