//! `synthesis`: from the start of `cloudlet synthesize` to the first answer and to the complete
//! overlay, with early start and without, over links of several rates, for both applications.
//!
//! Every figure is a median of five runs, so the recogniser's 100 MiB database makes the whole
//! bench take half an hour, most of it at 10 Mbit/s. `BENCH_OBJECT_MIB=N` makes the database
//! smaller and the bench shorter; its figures are then those of a smaller VM. `BENCH_RATES=38,max`
//! measures at some of the rates only.
//!
//! The lower bound is the head and the early segments of the overlay at the link's rate. A link
//! without a limit has no such bound, and its figures no reference.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use cloudlet::control;
use cloudlet::serve::{ServeOptions, Server};
use cloudlet_resources::client::{Answer, Client};
use cloudlet_resources::{digits, protocol};

use super::vms::milliseconds;
use super::{Figure, RUNS_MIN, Sheet};
use crate::failure::{Failure, Outcome};
use crate::host::{Host, Lane};
use crate::{ensure, ensure_eq};

/// MiB of the recogniser's database, if not its default.
const OBJECT_MIB_VARIABLE: &str = "BENCH_OBJECT_MIB";
const OBJECT_MIB: u32 = 100;
/// RAM of the base VM in MiB: the database, and room to build it.
const MEMORY_MIB: &str = "512";
/// Which of the rates are measured, if not all.
const RATES_VARIABLE: &str = "BENCH_RATES";
/// Link rates by name, in Mbit/s; one has no limit.
const RATES: [(&str, Option<u32>); 4] = [
    ("10", Some(10)),
    ("38", Some(38)),
    ("100", Some(100)),
    ("max", None),
];
/// Longest wait for anything; 100 MiB take 84 s at 10 Mbit/s.
const LIMIT: Duration = Duration::from_secs(300);

const BASE: &str = "base";
const ORIGINAL: &str = "original";
const COPY: &str = "copy";
const OVERLAY: &str = "app.overlay";

/// An application as the bench uses it.
struct App {
    name: &'static str,
    params: String,
    /// What is rehearsed for the overlay, and then asked first.
    request: &'static str,
    /// Which held-back picture goes with it.
    sample: Option<usize>,
}

fn apps() -> Outcome<[App; 2]> {
    Ok([
        App {
            name: "fluid",
            params: String::new(),
            request: "frame 3 640 480",
            sample: None,
        },
        App {
            name: "object",
            params: format!("mib={}", object_mib()?),
            request: "recognise",
            sample: Some(0),
        },
    ])
}

fn object_mib() -> Outcome<u32> {
    match std::env::var(OBJECT_MIB_VARIABLE) {
        Ok(text) => text
            .parse()
            .map_err(|_| Failure::new(format!("{OBJECT_MIB_VARIABLE}={text}: not MiB"))),
        Err(_) => Ok(OBJECT_MIB),
    }
}

fn rates() -> Outcome<Vec<(&'static str, Option<u32>)>> {
    let Ok(text) = std::env::var(RATES_VARIABLE) else {
        return Ok(RATES.to_vec());
    };
    let find = |name: &str| {
        let found = RATES.iter().find(|rate| rate.0 == name).copied();
        found.ok_or_else(|| Failure::new(format!("{RATES_VARIABLE}={text}: no rate {name:?}")))
    };
    text.split(',').map(find).collect()
}

impl App {
    fn attachment(&self) -> Outcome<&'static [u8]> {
        let Some(number) = self.sample else {
            return Ok(&[]);
        };
        let picture = digits::held_back().nth(number);
        let picture = picture.ok_or_else(|| Failure::new(format!("no picture {number}")))?;
        Ok(picture.pixels)
    }

    fn ask(&self, vsock: &Path) -> Outcome<Answer> {
        let stream = UnixStream::connect(vsock)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut client = Client::connect(stream, protocol::PORT)?;
        Ok(client.call(self.request, self.attachment()?)?)
    }
}

/// One way of synthesis.
#[derive(Clone, Copy)]
struct Way {
    link: &'static str,
    rate_mbit: Option<u32>,
    early: bool,
}

/// Milliseconds since the start of the command.
struct Times {
    first_answer: f64,
    complete: f64,
}

/// An overlay with what is known of it, on a host that has its base.
struct Overlaid {
    host: Host,
    server: Server,
    app: App,
    /// The answer of the VM that was overlaid.
    answer: Answer,
    /// Bytes of the overlay before the first answer is possible.
    needed_bytes: u64,
}

impl Overlaid {
    fn new(app: App, sheet: &Sheet) -> Outcome<Self> {
        let host = Host::new(Lane::One)?;
        host.ok(&["base", "create", BASE, "--builtin", "--memory", MEMORY_MIB])?;
        host.ok(&["restore", BASE, "--name", ORIGINAL])?;
        let install = ["app", "install", ORIGINAL, app.name, "--params"];
        host.ok(&[&install[..], &[&*app.params]].concat())?;
        let answer = app.ask(&host.vm_dir(ORIGINAL).join("vsock.sock"))?;
        let directory = host.path("served");
        std::fs::create_dir(&directory)?;
        let file = directory.join(OVERLAY).to_string_lossy().into_owned();
        let create = ["overlay", "create", &file, "--from", ORIGINAL];
        let mut create = [&create[..], &["--train", app.request]].concat();
        let sample = app.sample.map(|number| number.to_string());
        if let Some(sample) = &sample {
            create.extend_from_slice(&["--train-sample", sample]);
        }
        host.spawn(&create)?.wait(LIMIT)?.expect_code(0)?;
        host.ok(&["stop", ORIGINAL])?;
        let shown = host.json(&["overlay", "show", &file])?;
        let field = |name: &str| {
            let bytes = shown[name].as_u64();
            bytes.ok_or_else(|| Failure::new(format!("no {name} in {shown}")))
        };
        let needed_bytes = field("head_bytes")? + field("early_bytes")?;
        ensure!(field("early_segments")? > 0, "no early segments: {shown}");
        sheet.note(&format!(
            "{}: an overlay of {} bytes, the first request needs {needed_bytes}",
            app.name,
            field("bytes")?,
        ));
        Ok(Self {
            server: Server::bind(&directory, "127.0.0.1:0", ServeOptions::default())?,
            host,
            app,
            answer,
            needed_bytes,
        })
    }

    /// Milliseconds that the needed bytes take on a link.
    fn bound_ms(&self, rate_mbit: u32) -> f64 {
        // Sizes are far below 2^53; a Mbit/s is 1000 bits a millisecond.
        self.needed_bytes as f64 * 8.0 / (f64::from(rate_mbit) * 1e3)
    }

    /// Synthesises once; the answer must be the original's.
    fn synthesise(&self, way: Way) -> Outcome<Times> {
        let url = self.server.url(OVERLAY);
        let rate = way.rate_mbit.map(|rate| rate.to_string());
        let mut args = vec!["synthesize", &*url, "--name", COPY];
        if let Some(rate) = &rate {
            args.extend_from_slice(&["--rate", rate]);
        }
        if !way.early {
            args.push("--no-early-start");
        }
        let started = Instant::now();
        self.host.spawn(&args)?.wait(LIMIT)?.expect_code(0)?;
        let directory = self.host.vm_dir(COPY);
        let (first, complete) = thread::scope(|scope| {
            let complete = scope.spawn(|| {
                wait_complete(&directory.join("control.sock"))?;
                Outcome::Ok(started.elapsed())
            });
            let answer = self.app.ask(&directory.join("vsock.sock"));
            let first = answer.map(|answer| (answer, started.elapsed()));
            (first, complete.join())
        });
        let (answer, first_answer) = first?;
        let complete = complete.map_err(|_| Failure::new("the waiting thread panicked"))??;
        ensure_eq!(answer, self.answer, "the answer of the synthesised VM");
        self.host.ok(&["stop", COPY])?;
        Ok(Times {
            first_answer: milliseconds(first_answer),
            complete: milliseconds(complete),
        })
    }

    /// Both figures of one way.
    fn measure(&self, way: Way, sheet: &mut Sheet) -> Outcome {
        let start = if way.early { "early" } else { "full" };
        let name = format!("synthesis.{}.{}.{start}", self.app.name, way.link);
        let runs = (0..RUNS_MIN).map(|_| self.synthesise(way));
        let runs = runs.collect::<Outcome<Vec<_>>>()?;
        let first_name = format!("{name}.first_answer");
        sheet.put(&match way.rate_mbit.filter(|_| way.early) {
            Some(rate) => {
                let bound = self.bound_ms(rate);
                let pairs: Vec<_> = runs.iter().map(|run| (run.first_answer, bound)).collect();
                Figure::beside(first_name, "ms", &pairs, "lower bound: needed bytes / rate")?
            }
            None => {
                let times: Vec<_> = runs.iter().map(|run| run.first_answer).collect();
                Figure::from_runs(first_name, "ms", &times)?
            }
        })?;
        let times: Vec<_> = runs.iter().map(|run| run.complete).collect();
        sheet.put(&Figure::from_runs(
            format!("{name}.complete"),
            "ms",
            &times,
        )?)
    }
}

fn wait_complete(socket: &Path) -> Outcome {
    let mut client = control::Client::connect(socket)?;
    client.set_timeout(LIMIT)?;
    client.call(&control::Request::WaitComplete, &mut |_, _, _| {})?;
    Ok(())
}

/// `synthesis`
pub(super) fn run(sheet: &mut Sheet) -> Outcome {
    let rates = rates()?;
    for app in apps()? {
        let overlaid = Overlaid::new(app, sheet)?;
        for &(link, rate_mbit) in &rates {
            for early in [true, false] {
                let way = Way {
                    link,
                    rate_mbit,
                    early,
                };
                overlaid.measure(way, sheet)?;
            }
        }
    }
    Ok(())
}
