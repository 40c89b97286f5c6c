//! The applications of the embedded guest: installed, asked, checked.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::process::Process;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "fluid_steps_and_draws",
        run: fluid,
        needs: Needs::GUEST,
    },
    Case {
        name: "object_recognises_held_back_pictures",
        run: object,
        needs: Needs::GUEST.with_memory_mib(1024),
    },
    Case {
        name: "requests_that_make_no_sense_are_refused",
        run: nonsense,
        needs: Needs::GUEST,
    },
    Case {
        name: "an_interrupted_demo_leaves_nothing",
        run: interrupted_demo,
        needs: Needs::GUEST.with_memory_mib(1024),
    },
];

fn fluid(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    host.install_fluid("web")?;
    let first = host.path("first.png");
    let second = host.path("second.png");
    host.ok(&[
        "call",
        "web",
        "frame",
        "0",
        "--save",
        &first.to_string_lossy(),
    ])?;
    let (width, height) = png_size(&first)?;
    ensure!(width >= 64 && height >= 64, "a frame of {width} x {height}");
    host.ok(&["call", "web", "poke", "0", "0.5", "0.5", "1.0"])?;
    host.wait_until(
        "another frame after a poke",
        Duration::from_secs(10),
        || {
            host.ok(&[
                "call",
                "web",
                "frame",
                "0",
                "--save",
                &second.to_string_lossy(),
            ])
            .ok()?;
            (fs::read(&first).ok()? != fs::read(&second).ok()?).then_some(())
        },
    )?;
    host.ok(&["call", "web", "verify"])?;
    Ok(())
}

/// Width and height of a PNG file (PNG specification, 11.2.2).
fn png_size(path: &Path) -> Outcome<(u32, u32)> {
    let bytes = fs::read(path)?;
    ensure!(
        bytes.starts_with(b"\x89PNG\r\n\x1a\n"),
        "{} is no PNG",
        path.display()
    );
    let number = |at: usize| {
        let field = bytes
            .get(at..at + 4)
            .and_then(|field| field.try_into().ok());
        field
            .map(u32::from_be_bytes)
            .ok_or_else(|| Failure::new("a short PNG"))
    };
    Ok((number(16)?, number(20)?))
}

fn object(host: &Host) -> Outcome {
    host.boot("web", &["--memory", "256"])?;
    host.ok(&["app", "install", "web", "object", "--params", "mib=8"])?;
    let first = host.ok(&["call", "web", "recognise", "--sample", "3"])?;
    ensure!(!first.trim().is_empty(), "no label");
    ensure_eq!(
        host.ok(&["call", "web", "recognise", "--sample", "3"])?,
        first,
        "the same picture"
    );
    host.ok(&["call", "web", "verify"])?;
    Ok(())
}

fn nonsense(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    host.fails(&["call", "web", "frame", "0"], 1)?;
    host.install_fluid("web")?;
    for request in [
        &["no-such-word"][..],
        &["frame", "99999999"],
        &["poke"],
        &["frame", "x"],
    ] {
        let finished = host
            .run(&[&["call", "web"], request].concat())?
            .expect_code(1)?;
        ensure_eq!(
            finished.stderr.lines().count(),
            1,
            "sentences in {:?}",
            finished.stderr
        );
    }
    host.fails(&["app", "install", "web", "no-such-app"], 2)?;
    host.ok(&["call", "web", "verify"])?;
    Ok(())
}

fn interrupted_demo(host: &Host) -> Outcome {
    let temporary = host.path("tmp");
    fs::create_dir(&temporary)?;
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let mut command = host.command(&["demo", "--database", "1"]);
        let demo = Process::spawn(command.env("TMPDIR", &temporary), Stdio::null())?;
        demo.wait_for_output("published", host.limit(Duration::from_secs(20)))?;
        ensure!(
            fs::read_dir(&temporary)?.count() > 0,
            "the demo works somewhere else than in TMPDIR"
        );
        demo.signal(signal)?;
        host.wait_until("the end of all processes", Duration::from_secs(10), || {
            host.processes().is_empty().then_some(())
        })?;
        ensure_eq!(fs::read_dir(&temporary)?.count(), 0, "directories left");
    }
    Ok(())
}
