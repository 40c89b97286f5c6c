//! The end-to-end suite as a program: runs the built `cloudlet` as a user would.
//!
//!     suite [--lane 1|2] [--json] [--from CASE] [--shard K/N] [PATTERN...]
//!                        run all cases, or those with PATTERN in their name, from CASE on; of these
//!                        every N-th from the K-th on
//!     suite --list       name them
//!
//! A line for each case, totals at the end, exit code 1 if any failed, 2 for a wrong call.

use std::process::ExitCode;

use cloudlet_tests::cases::{self, Case};
use cloudlet_tests::failure::{Failure, Outcome};
use cloudlet_tests::host::Lane;
use cloudlet_tests::process;
use cloudlet_tests::runner::{self, Verdict};

struct Options {
    lane: Lane,
    json: bool,
    list: bool,
    help: bool,
    one: Option<String>,
    from: Option<String>,
    shard: (usize, usize),
    patterns: Vec<String>,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("suite: {message}");
            return ExitCode::from(2);
        }
    };
    if options.help {
        println!(
            "suite [--lane 1|2] [--json] [--from CASE] [--shard K/N] [PATTERN...]\n\
             suite --list [--shard K/N] [PATTERN...]\n\n\
             Runs the end-to-end cases, all or those with a PATTERN in their name, from CASE on,\n\
             every N-th of them from the K-th on, against\n\
             CLOUDLET_BIN or the cloudlet beside this program."
        );
        return ExitCode::SUCCESS;
    }
    if options.list {
        return match chosen(&options) {
            Ok(cases) => {
                cases.iter().for_each(|case| println!("{}", case.name));
                ExitCode::SUCCESS
            }
            Err(failure) => {
                eprintln!("{failure}");
                ExitCode::from(2)
            }
        };
    }
    let result = match &options.one {
        Some(name) => run_one(name, options.lane).map(|()| true),
        None => run_all(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(if options.one.is_some() { 1 } else { 2 })
        }
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        lane: Lane::One,
        json: false,
        list: false,
        help: false,
        one: None,
        from: None,
        shard: (1, 1),
        patterns: Vec::new(),
    };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--lane" => {
                options.lane = match arguments.next().as_deref() {
                    Some("1") => Lane::One,
                    Some("2") => Lane::Two,
                    _ => return Err("--lane takes 1 or 2".to_owned()),
                }
            }
            "--json" => options.json = true,
            "--list" => options.list = true,
            "--from" => options.from = Some(arguments.next().ok_or("--from takes a name")?),
            "--shard" => {
                let shard = arguments.next().as_deref().and_then(shard);
                options.shard = shard.ok_or("--shard takes K/N, the K-th of N")?;
            }
            "--help" | "-h" => options.help = true,
            "--one" => options.one = Some(arguments.next().ok_or("--one takes a name")?),
            flag if flag.starts_with('-') => return Err(format!("unknown option {flag}")),
            _ => options.patterns.push(argument),
        }
    }
    Ok(options)
}

/// `K/N`.
fn shard(text: &str) -> Option<(usize, usize)> {
    let (number, of) = text.split_once('/')?;
    let (number, of) = (number.parse().ok()?, of.parse().ok()?);
    (1..=of).contains(&number).then_some((number, of))
}

/// The cases that were asked for. A shard's stay its own, wherever it begins.
fn chosen(options: &Options) -> Outcome<Vec<Case>> {
    let (number, of) = options.shard;
    let cases = runner::select(cases::all(), &options.patterns)?;
    let cases = cases.into_iter().skip(number - 1).step_by(of).collect();
    runner::from(cases, options.from.as_deref())
}

/// What the child process of a run does: one case, here.
fn run_one(name: &str, lane: Lane) -> Outcome {
    let case: Option<Case> = cases::all().into_iter().find(|case| case.name == name);
    runner::run_here(
        &case.ok_or_else(|| Failure::new(format!("no case {name}")))?,
        lane,
    )
}

/// Runs the cases that were asked for; whether none failed.
fn run_all(options: &Options) -> Outcome<bool> {
    process::adopt_orphans()?;
    let _held = options.lane.hold()?;
    let (mut passed, mut failed, mut skipped) = (0_u32, 0_u32, 0_u32);
    for case in chosen(options)? {
        let lane = options.lane.number().to_string();
        let arguments = ["--lane", &lane, "--one", case.name].map(str::to_owned);
        let report = runner::run_case(&case, options.lane, &arguments);
        match report.verdict {
            Verdict::Pass => passed += 1,
            Verdict::Fail => failed += 1,
            Verdict::Skip => skipped += 1,
        }
        if options.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            println!("{}", report.line());
        }
    }
    if !options.json {
        println!("suite: {passed} passed, {failed} failed, {skipped} skipped");
    }
    Ok(failed == 0)
}
