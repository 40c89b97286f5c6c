//! `demo`: the whole of it on the embedded guest, in a directory of its own that is gone
//! afterwards, but for the frames it leaves.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloudlet::control::{Client, Request};
use cloudlet::guest::{self, AppRequest};
use cloudlet::launch::{BootSource, DiskSource, OverlaySource, Source, Vmm};
use cloudlet::paths::Paths;
use cloudlet::serve::{ServeOptions, Server};
use cloudlet::store::{Base, Store};
use cloudlet::synthesis;
use cloudlet_overlay::LEVEL_DEFAULT;
use serde_json::{Value, json};

use super::output::{Output, megabytes, table};
use super::scratch::Scratch;
use super::stop::stop_quietly;
use super::{Host, app, base, overlay};
use crate::cli::{AppInstall, AppName, Demo, NewVm};

const TAG: &str = "unikernel";
/// RAM of the embedded guest: the recogniser's database, and room to build it.
const MEMORY_MIB: u64 = 512;
const DISK_LEN: u64 = 64 << 20;
/// The held-back picture that the first request sends.
const SAMPLE: usize = 0;
/// The tank whose frame is shown.
const FRAME: &str = "frame 3 640 480";
/// How that tank is used before: its liquid falls for a while.
const STIR: &str = "advance 3 60";

pub(super) fn demo(host: &Host, args: &Demo) -> Result<()> {
    fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let dir = Scratch::new(&std::env::temp_dir(), "cloudlet-demo-")?;
    let demo = DemoHost {
        host: Host {
            paths: Paths::below(dir.path()),
            output: Output::new(host.output.is_json()),
        },
        dir: dir.path().to_owned(),
        rate: args.rate,
    };
    let (boot, published) = demo.make_base()?;
    let object = demo.run_object(args.database)?;
    let fluid = demo.run_fluid(&args.out)?;

    let mut result = object.json();
    result["boot_ms"] = json!(ms(boot));
    result["base_create_ms"] = json!(ms(published));
    result["rate_mbit"] = json!(args.rate);
    result["fluid"] = fluid.json();
    result["frames"] = json!([args.out.join("before.png"), args.out.join("after.png")]);
    ensure!(
        object.answers_match,
        "the synthesised recogniser answered otherwise than the original"
    );
    ensure!(
        fluid.answers_match,
        "the synthesised simulation answered otherwise than the original"
    );
    host.output
        .result(&result, || describe(boot, published, args, &object, &fluid));
    Ok(())
}

/// What was measured with one application.
struct Measured {
    install: Duration,
    overlay_bytes: u64,
    encode: Duration,
    needed_bytes: u64,
    rate: f64,
    early: Synthesised,
    full_first_answer: Duration,
    answers_match: bool,
    accuracy: Option<f64>,
}

/// What was measured in one synthesis with early start.
struct Synthesised {
    first_answer: Duration,
    first_answer_bytes: u64,
    complete: Duration,
}

impl Measured {
    /// Time that the bytes which the first request needs take on the link.
    fn bound(&self) -> Duration {
        // Sizes far below 2^52 are exact in a double.
        Duration::from_secs_f64(self.needed_bytes as f64 * 8.0 / (self.rate * 1e6))
    }

    fn json(&self) -> Value {
        json!({
            "install_ms": ms(self.install),
            "overlay_bytes": self.overlay_bytes,
            "overlay_encode_ms": ms(self.encode),
            "first_answer_ms": ms(self.early.first_answer),
            "first_answer_bytes": self.early.first_answer_bytes,
            "bound_ms": ms(self.bound()),
            "complete_ms": ms(self.early.complete),
            "full_first_answer_ms": ms(self.full_first_answer),
            "answers_match": self.answers_match,
            "accuracy": self.accuracy,
        })
    }
}

struct DemoHost {
    host: Host,
    dir: PathBuf,
    rate: f64,
}

impl DemoHost {
    fn say(&self, text: &str) {
        self.host.output.say(text);
    }

    /// Boots the embedded guest and publishes it.
    fn make_base(&self) -> Result<(Duration, Duration)> {
        let start = Instant::now();
        let vmm = self.start(
            "base",
            Source::Boot(BootSource {
                kernel: None,
                initrd: None,
                cmdline: String::new(),
                disks: vec![DiskSource {
                    empty_len: DISK_LEN,
                    ..DiskSource::default()
                }],
                cpus: 1,
                memory_mib: MEMORY_MIB,
                cpu_model: "host".into(),
                discovery: "auto".into(),
                balloon: true,
            }),
        )?;
        guest::wait_ready(&vmm.dir.vsock_socket())?;
        let boot = start.elapsed();
        self.say(&format!("booted the embedded guest in {}", in_ms(boot)));
        let start = Instant::now();
        let base = base::publish(&self.host, &self.store()?, &mut self.client(&vmm)?, TAG)?;
        let published = start.elapsed();
        self.say(&format!(
            "published it as base VM {} in {}",
            short(&base),
            in_ms(published)
        ));
        stop_quietly(&vmm.dir)?;
        Ok((boot, published))
    }

    fn run_object(&self, database: u32) -> Result<Measured> {
        let (_, pixels) = app::sample(SAMPLE)?;
        let request = AppRequest {
            text: "recognise".into(),
            attachment: pixels,
        };
        self.run_app(
            AppName::Object,
            [&format!("mib={database}"), ""],
            &request,
            &mut |vsock, _| {
                let (right, count) = recognise_all(vsock)?;
                Ok(Some(right as f64 / count as f64))
            },
        )
    }

    fn run_fluid(&self, out: &Path) -> Result<Measured> {
        let request = AppRequest {
            text: FRAME.into(),
            attachment: Vec::new(),
        };
        self.run_app(
            AppName::Fluid,
            ["", STIR],
            &request,
            &mut |vsock, before| {
                let after = guest::call(vsock, &request)?;
                app::save(&out.join("before.png"), &before.text, &before.blob)?;
                app::save(&out.join("after.png"), &after.text, &after.blob)?;
                Ok(None)
            },
        )
    }

    /// Customises a VM of the base, makes its overlay, and synthesises it again, with early start
    /// and without. The application gets `params`, and the request `use_it` before the overlay is
    /// made, if that is not empty. `look` is shown the synthesised VM and the original's answer.
    fn run_app(
        &self,
        name: AppName,
        [params, use_it]: [&str; 2],
        request: &AppRequest,
        look: &mut dyn FnMut(&Path, &Answer) -> Result<Option<f64>>,
    ) -> Result<Measured> {
        let original = self.start("original", self.base_source()?)?;
        let start = Instant::now();
        let install = AppInstall {
            name: "original".into(),
            app: name,
            data: None,
            params: params.into(),
        };
        let said = app::install(&self.host, &install)?;
        let install = start.elapsed();
        self.say(&format!("installed {name:?} in {}: {said}", in_ms(install)));
        if !use_it.is_empty() {
            let used = AppRequest {
                text: use_it.into(),
                attachment: Vec::new(),
            };
            guest::call(&original.dir.vsock_socket(), &used)?;
        }
        let answer = guest::call(&original.dir.vsock_socket(), request)?;

        let start = Instant::now();
        let file = self.dir.join("app.overlay");
        let summary = overlay::encode(&self.host, "original", &file, Some(request), LEVEL_DEFAULT)?;
        let encode = start.elapsed();
        let overlay_bytes = summary["bytes"].as_u64().unwrap_or(0);
        self.say(&format!(
            "made its overlay of {} in {}",
            megabytes(overlay_bytes),
            in_ms(encode)
        ));
        stop_quietly(&original.dir)?;
        let shown = synthesis::show(&file)?;
        let mut server = Server::bind(&self.dir, "127.0.0.1:0", ServeOptions::default())?;
        let url = server.url("app.overlay");

        let (early_answer, early, accuracy) = self.synthesise(&url, request, &answer, look)?;
        let (full_answer, full_first_answer) = self.synthesise_whole(&url, request)?;
        server.stop();
        fs::remove_file(&file)?;
        Ok(Measured {
            install,
            overlay_bytes,
            encode,
            needed_bytes: shown.head_bytes + shown.early_bytes,
            rate: self.rate,
            early,
            full_first_answer,
            answers_match: same(&answer, &early_answer) && same(&answer, &full_answer),
            accuracy,
        })
    }

    /// With early start: the first answer, then the rest, then a check of every byte.
    fn synthesise(
        &self,
        url: &str,
        request: &AppRequest,
        original: &Answer,
        look: &mut dyn FnMut(&Path, &Answer) -> Result<Option<f64>>,
    ) -> Result<(Answer, Synthesised, Option<f64>)> {
        let start = Instant::now();
        let vmm = self.start("early", self.overlay_source(url, true)?)?;
        let vsock = vmm.dir.vsock_socket();
        let answer = guest::call(&vsock, request)?;
        let first_answer = start.elapsed();
        let mut client = self.client(&vmm)?;
        let status = client.ask(&Request::Status)?;
        let received = |key: &str| status["synthesis"][key].as_u64().unwrap_or(0);
        let first_answer_bytes = received("stream_bytes") + received("demand_bytes");
        self.say(&format!(
            "synthesised with early start: first answer ({}) after {}, with {} of the overlay",
            answer.text,
            in_ms(first_answer),
            megabytes(first_answer_bytes)
        ));
        let progress = self.host.output.progress();
        client.call(&Request::WaitComplete, &mut |step, done, total| {
            progress.show(step, done, total);
        })?;
        progress.finish();
        let complete = start.elapsed();
        let verified = guest::call(
            &vsock,
            &AppRequest {
                text: "verify".into(),
                ..Default::default()
            },
        )?;
        self.say(&format!(
            "complete after {}; its own check: {}",
            in_ms(complete),
            verified.text
        ));
        let looked = look(&vsock, original)?;
        stop_quietly(&vmm.dir)?;
        Ok((
            answer,
            Synthesised {
                first_answer,
                first_answer_bytes,
                complete,
            },
            looked,
        ))
    }

    /// Without early start, for comparison.
    fn synthesise_whole(&self, url: &str, request: &AppRequest) -> Result<(Answer, Duration)> {
        let start = Instant::now();
        let vmm = self.start("full", self.overlay_source(url, false)?)?;
        let answer = guest::call(&vmm.dir.vsock_socket(), request)?;
        let first_answer = start.elapsed();
        self.say(&format!(
            "synthesised without early start: first answer after {}",
            in_ms(first_answer)
        ));
        stop_quietly(&vmm.dir)?;
        Ok((answer, first_answer))
    }

    fn start(&self, name: &str, source: Source) -> Result<Vmm> {
        let options = NewVm {
            name: Some(name.into()),
            ..NewVm::default()
        };
        self.host.start(&options, true, "demo", source)
    }

    fn client(&self, vmm: &Vmm) -> Result<Client> {
        Ok(Client::connect(&vmm.dir.control_socket())?)
    }

    fn store(&self) -> Result<Store> {
        Ok(Store::open(self.host.paths.store()?))
    }

    fn base_source(&self) -> Result<Source> {
        let base = self.store()?.find(TAG)?;
        Ok(Source::Image {
            dir: base.dir.clone(),
            base: Some(base.id.to_string()),
        })
    }

    fn overlay_source(&self, url: &str, early_start: bool) -> Result<Source> {
        Ok(Source::Overlay(OverlaySource {
            location: url.to_owned(),
            early_start,
            record: false,
            rate_mbit: Some(self.rate),
            ca: None,
            stall_secs: 10.0,
            expect: None,
        }))
    }
}

type Answer = cloudlet_resources::client::Answer;

/// Whether two answers to the same request are of the same state: word for word, pixel for pixel.
fn same(one: &Answer, other: &Answer) -> bool {
    one == other
}

/// How many of the held-back pictures the recogniser behind `vsock` gets right.
fn recognise_all(vsock: &Path) -> Result<(usize, usize)> {
    let mut client = guest::connect(vsock)?;
    let (mut right, mut count) = (0, 0);
    for digit in cloudlet_resources::digits::held_back() {
        let answer = client.call("recognise", digit.pixels)?;
        let label = answer.text.split_whitespace().nth(1).unwrap_or_default();
        right += usize::from(label == digit.label.to_string());
        count += 1;
    }
    ensure!(count > 0, "there are no held-back pictures");
    Ok((right, count))
}

fn short(base: &Base) -> String {
    base.id.to_string()[..12].to_owned()
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e5).round() / 100.0
}

fn in_ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

fn describe(
    boot: Duration,
    published: Duration,
    args: &Demo,
    object: &Measured,
    fluid: &Measured,
) -> String {
    let row = |name: &str, cell: &dyn Fn(&Measured) -> String| {
        vec![name.to_owned(), cell(object), cell(fluid)]
    };
    let rows = [
        ["", "object", "fluid"].map(String::from).to_vec(),
        row("install and warm up", &|m| in_ms(m.install)),
        row("overlay", &|m| megabytes(m.overlay_bytes)),
        row("encode, with rehearsal", &|m| in_ms(m.encode)),
        row("first answer, early start", &|m| {
            in_ms(m.early.first_answer)
        }),
        row("  received by then", &|m| {
            megabytes(m.early.first_answer_bytes)
        }),
        row("  lower bound", &|m| in_ms(m.bound())),
        row("complete", &|m| in_ms(m.early.complete)),
        row("first answer, whole overlay", &|m| {
            in_ms(m.full_first_answer)
        }),
        row("same answers", &|m| {
            if m.answers_match { "yes" } else { "NO" }.to_owned()
        }),
    ];
    let accuracy = object.accuracy.map_or(String::new(), |right| {
        format!("\naccuracy on held-back pictures: {:.1} %", right * 100.0)
    });
    format!(
        "\nboot {}, base VM {}, link {} Mbit/s\n{}{accuracy}\nframes: {} and {}",
        in_ms(boot),
        in_ms(published),
        args.rate,
        table(&rows),
        args.out.join("before.png").display(),
        args.out.join("after.png").display(),
    )
}
