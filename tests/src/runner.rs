//! Runs cases one by one, each in a process of its own with a time limit, and reports a line for
//! each. A case that hangs is killed with its process group; VMs that it leaves are ended too.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cases::Case;
use crate::failure::{Failure, Outcome};
use crate::host::{Host, Lane};
use crate::process;

/// Output of a failed case that is shown, from its end.
const SHOWN_LEN_MAX: u64 = 64 << 10;

/// How one case came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It held.
    Pass,
    /// It did not, or it hung.
    Fail,
    /// It could not run here.
    Skip,
}

/// One line of the report.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The case's name.
    pub name: &'static str,
    /// The lane it ran in.
    pub lane: u8,
    /// How it came out.
    pub verdict: Verdict,
    /// How long it took, milliseconds.
    pub took_ms: u128,
    /// Why it was skipped, or what it printed when it failed.
    pub detail: String,
}

impl Report {
    /// The report as a person reads it. `tests/run` counts these lines by their first words.
    #[must_use]
    pub fn line(&self) -> String {
        let Self {
            name,
            lane,
            took_ms,
            detail,
            ..
        } = self;
        match self.verdict {
            Verdict::Pass => format!("[lane {lane}] pass {name} ({took_ms} ms)"),
            Verdict::Fail => {
                let detail = detail.trim_end().replace('\n', "\n    ");
                format!("[lane {lane}] FAIL {name} ({took_ms} ms)\n    {detail}")
            }
            Verdict::Skip => format!("[lane {lane}] skip {name}: {detail}"),
        }
    }
}

/// Runs `case` inside this process: what the runner's child does.
pub fn run_here(case: &Case, lane: Lane) -> Outcome {
    let host = Host::new(lane)?;
    (case.run)(&host).map_err(|failure| Failure::new(format!("{failure}{}", host.evidence())))
}

/// Runs `case` in a child process of this program, started with `arguments`.
pub fn run_case(case: &Case, lane: Lane, arguments: &[String]) -> Report {
    let report = |verdict, took: Duration, detail| Report {
        name: case.name,
        lane: lane.number(),
        verdict,
        took_ms: took.as_millis(),
        detail,
    };
    if let Some(reason) = case.reason_to_skip(lane) {
        return report(Verdict::Skip, Duration::ZERO, reason);
    }
    let started = Instant::now();
    let result = std::env::current_exe().map_err(fault).and_then(|program| {
        run_child(
            Command::new(program).args(arguments),
            lane.scale(case.needs.limit),
        )
    });
    process::end_children();
    match result {
        Ok(()) => report(Verdict::Pass, started.elapsed(), String::new()),
        Err(failure) => report(Verdict::Fail, started.elapsed(), failure),
    }
}

fn fault(error: io::Error) -> String {
    format!("the harness itself failed: {error}")
}

/// Runs `command` to its end or its limit; the error is what to show to a person.
fn run_child(command: &mut Command, limit: Duration) -> Result<(), String> {
    let mut output = tempfile::tempfile().map_err(fault)?;
    let status = wait_for_child(command, limit, &output).map_err(fault)?;
    if status.is_some_and(|status| status.success()) {
        return Ok(());
    }
    let shown = tail(&mut output).map_err(fault)?;
    Err(match status {
        Some(status) if status.code().is_none() => format!("{shown}\nended by {status}"),
        Some(_) => shown,
        None => format!("{shown}\nhung: killed after {limit:?}"),
    })
}

/// The exit status, or `None` if the time was up and the group was killed.
fn wait_for_child(
    command: &mut Command,
    limit: Duration,
    output: &File,
) -> io::Result<Option<ExitStatus>> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?)
        .process_group(0)
        .spawn()?;
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(Duration::from_millis(5));
    }
    process::kill_group(child.id());
    child.wait()?;
    Ok(None)
}

fn tail(output: &mut File) -> io::Result<String> {
    let len = output.metadata()?.len();
    output.seek(io::SeekFrom::Start(len.saturating_sub(SHOWN_LEN_MAX)))?;
    let mut bytes = Vec::new();
    output.take(SHOWN_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The cases that `patterns` pick: all without one, else those whose name contains one of them.
pub fn select(cases: Vec<Case>, patterns: &[String]) -> Outcome<Vec<Case>> {
    let picks = |case: &Case, pattern: &String| case.name.contains(pattern.as_str());
    if let Some(unknown) = patterns
        .iter()
        .find(|pattern| !cases.iter().any(|case| picks(case, pattern)))
    {
        return Err(Failure::new(format!(
            "no case has {unknown:?} in its name (see --list)"
        )));
    }
    let wanted = |case: &Case| patterns.is_empty() || patterns.iter().any(|p| picks(case, p));
    Ok(cases.into_iter().filter(wanted).collect())
}

/// `cases` without those before the one named `first`.
pub fn from(mut cases: Vec<Case>, first: Option<&str>) -> Outcome<Vec<Case>> {
    if let Some(first) = first {
        let at = cases.iter().position(|case| case.name == first);
        let at = at.ok_or_else(|| Failure::new(format!("no case {first} among these")))?;
        cases.drain(..at);
    }
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    #[test]
    fn names_are_unique_and_plain() {
        let mut names: Vec<_> = cases::all().iter().map(|case| case.name).collect();
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(
            names.iter().all(|name| name.chars().all(plain)),
            "{names:?}"
        );
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn a_pattern_that_picks_nothing_is_an_error() {
        let picked = |patterns: &[&str]| {
            let patterns: Vec<_> = patterns.iter().map(|&word| word.to_owned()).collect();
            select(cases::all(), &patterns).map(|cases| cases.len())
        };
        assert!(picked(&["no such case"]).is_err());
        assert_eq!(picked(&[]).unwrap(), cases::all().len());
        assert_eq!(picked(&["cli_help"]).unwrap(), 1);
    }

    #[test]
    fn a_run_may_begin_at_a_case() {
        let all = || cases::all();
        assert_eq!(from(all(), None).unwrap().len(), all().len());
        assert_eq!(
            from(all(), Some(all()[1].name)).unwrap().len(),
            all().len() - 1
        );
        assert!(from(all(), Some("no such case")).is_err());
    }

    #[test]
    fn a_hung_child_is_killed_with_what_it_started() {
        let shell =
            |script: &str, limit| run_child(Command::new("/bin/sh").args(["-c", script]), limit);
        assert_eq!(shell("exit 0", Duration::from_secs(10)), Ok(()));
        assert_eq!(
            shell("echo no; exit 1", Duration::from_secs(10)).unwrap_err(),
            "no\n"
        );
        let killed = shell("kill -9 $$", Duration::from_secs(10)).unwrap_err();
        assert!(killed.contains("signal: 9"), "{killed}");
        let limit = Duration::from_secs(2);
        let hung = shell("sleep 60 & echo $!; wait", limit).unwrap_err();
        assert!(hung.contains("hung: killed after 2s"), "{hung}");
        let sleeper: u32 = hung.lines().next().unwrap().parse().unwrap();
        // A signal that was sent takes a moment to be carried out.
        let deadline = Instant::now() + Duration::from_secs(10);
        while process::is_alive(sleeper) {
            assert!(Instant::now() < deadline, "{sleeper} is still there");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn reports_are_lines_that_can_be_counted() {
        let report = |verdict, detail: &str| Report {
            name: "a",
            lane: 2,
            verdict,
            took_ms: 7,
            detail: detail.to_owned(),
        };
        assert_eq!(report(Verdict::Pass, "").line(), "[lane 2] pass a (7 ms)");
        assert_eq!(report(Verdict::Skip, "why").line(), "[lane 2] skip a: why");
        let failed = report(Verdict::Fail, "x\n[lane 2] pass b\n").line();
        assert_eq!(failed, "[lane 2] FAIL a (7 ms)\n    x\n    [lane 2] pass b");
    }
}
