//! `stop`: asks a VM to end, and ends the process of one that does not answer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cloudlet::control::{Client, Error, Request};
use cloudlet::registry::{Held, Holder, VmDir};
use serde_json::json;

use super::Host;
use super::output::tell;
use crate::cli::Stop;

/// How long a VM may take to answer where nothing else is said; it may be writing a snapshot.
pub(crate) const ANSWER_SECS: u64 = 30;
/// How long one that has answered may take to end: what its guest wrote to named layers is flushed.
const END_LIMIT: Duration = Duration::from_secs(60);
/// How long a process may take to go once it was killed, or has said that it goes.
pub(super) const GONE_LIMIT: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(2);

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// In order, or it had ended already.
    InOrder,
    /// It has, but a thread of this process waits in the kernel.
    Stuck { pid: u32 },
    /// Its process was killed.
    Killed,
}

/// Ends a VM; one that has ended is forgotten.
pub(super) fn stop(host: &Host, args: &Stop) -> Result<()> {
    let name = args.name.as_str();
    let limit = (!args.force).then(|| Duration::from_secs(args.timeout));
    let end = end(&host.find(name)?, limit)?;
    match end {
        End::InOrder => {}
        End::Stuck { pid } => tell(&format!(
            "cloudlet: {name} is stopped. Its process {pid} cannot end before the file server \
             answers, or is itself ended, that it waits for in the kernel"
        )),
        End::Killed if args.force => {}
        End::Killed => tell(&format!(
            "cloudlet: {name} did not answer within {} s and was killed: what its guest had not \
             flushed is lost",
            args.timeout
        )),
    }
    let state = match end {
        End::Killed => "killed",
        End::InOrder | End::Stuck { .. } => "stopped",
    };
    host.output
        .result(&json!({ "name": name, "state": state }), String::new);
    Ok(())
}

/// Ends a VM that only the calling command knows.
pub(super) fn stop_quietly(dir: &VmDir) -> Result<()> {
    end(dir, Some(Duration::from_secs(ANSWER_SECS))).map(drop)
}

/// Ends the VM of `dir` and removes what it leaves. It is asked first if there is a `limit` for its
/// answer.
fn end(dir: &VmDir, limit: Option<Duration>) -> Result<End> {
    let mut end = End::InOrder;
    if dir.is_alive() {
        let holder = dir.holder();
        // A handle that is taken now is to this VM's process, and not to one of the same id later.
        let held = holder.and_then(|holder| holder.open().ok().flatten());
        let asked = limit.map(|limit| ask(dir, limit)).transpose()?;
        match asked.unwrap_or(Asked::Silent) {
            Asked::Ends if ends_within(dir, END_LIMIT) => {
                end = after_end(holder, held.as_ref());
            }
            _ => {
                kill(dir, holder, held.as_ref())?;
                end = End::Killed;
            }
        }
    }
    dir.remove()?;
    Ok(end)
}

/// What came of the request to end.
enum Asked {
    /// It ends.
    Ends,
    /// There was no answer.
    Silent,
}

fn ask(dir: &VmDir, limit: Duration) -> Result<Asked> {
    let asked = Client::reach(dir).and_then(|mut client| {
        client.set_timeout(limit)?;
        client.ask(&Request::Stop)
    });
    match asked {
        Ok(_) => Ok(Asked::Ends),
        Err(error) if error.is_timeout() => Ok(Asked::Silent),
        // It may be gone before its answer is read.
        Err(Error::Io(_) | Error::Ended) => Ok(Asked::Ends),
        Err(_) if !dir.is_alive() => Ok(Asked::Ends),
        // It has its name and nobody listens.
        Err(Error::Connect { .. }) => Ok(Asked::Silent),
        Err(error) => Err(error).context("cannot stop it"),
    }
}

/// The name is free a moment before the process is gone, and with it the locks of layers and base VMs,
/// interfaces and ports: whoever has stopped a VM finds them free. A VM that was stopped before it ran may
/// have a process that cannot go.
fn after_end(holder: Option<Holder>, held: Option<&Held>) -> End {
    match (holder, held) {
        (Some(holder), Some(held)) if !held.ends_within(GONE_LIMIT) => {
            End::Stuck { pid: holder.pid }
        }
        _ => End::InOrder,
    }
}

fn kill(dir: &VmDir, holder: Option<Holder>, held: Option<&Held>) -> Result<()> {
    let name = &dir.name;
    let (Some(holder), Some(held)) = (holder, held) else {
        bail!("{name} does not end, and its process cannot be found from here");
    };
    let pid = holder.pid;
    held.kill()
        .with_context(|| format!("cannot kill process {pid} of {name}"))?;
    if ends_within(dir, GONE_LIMIT) {
        return Ok(());
    }
    let place = holder.stuck_in().unwrap_or_default();
    bail!(
        "{name} was killed and cannot end: a thread of process {pid} waits in the kernel ({place}) \
         for a disk or a file server, and ends with that wait; the name is free then"
    )
}

/// Whether the VM of `dir` has ended by the end of `limit`.
pub(super) fn ends_within(dir: &VmDir, limit: Duration) -> bool {
    let start = Instant::now();
    while dir.is_alive() {
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}
