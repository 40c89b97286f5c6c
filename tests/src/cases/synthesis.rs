//! Synthesis from files and over HTTP: that the VM is the one that was overlaid, however its bytes
//! came, and that it never runs on a hole.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::overlays::{BASE, overlay};
use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::http::{Fault, Server};
use crate::{ensure, ensure_eq};

const NEEDS: Needs = Needs::GUEST.with_memory_mib(1024).within(120);

pub(super) const CASES: &[Case] = &[
    Case {
        name: "every_way_of_synthesis_ends_in_the_same_memory",
        run: same_memory,
        needs: NEEDS.in_both_lanes(),
    },
    Case {
        name: "a_synthesised_vm_answers_and_verifies",
        run: answers,
        needs: NEEDS,
    },
    Case {
        name: "early_start_answers_before_the_overlay_is_there",
        run: early,
        needs: NEEDS.in_both_lanes(),
    },
    Case {
        name: "a_connection_that_is_cut_is_resumed",
        run: cut_once,
        needs: NEEDS,
    },
    Case {
        name: "a_server_that_always_cuts_ends_the_vm",
        run: |host| hopeless(host, Fault::CutAt, &[]),
        needs: NEEDS,
    },
    Case {
        name: "a_server_that_stalls_ends_the_vm",
        run: |host| hopeless(host, Fault::StallAt, &["--stall", "1"]),
        needs: NEEDS,
    },
    Case {
        name: "a_flipped_byte_ends_the_vm",
        run: |host| hopeless(host, Fault::FlipAt, &[]),
        needs: NEEDS,
    },
    Case {
        name: "an_overlay_that_changes_ends_the_vm_and_another_tag_does_not",
        run: changing,
        needs: NEEDS,
    },
    Case {
        name: "a_synthesis_without_its_base_says_so",
        run: no_base,
        needs: NEEDS,
    },
    Case {
        name: "a_damaged_overlay_file_makes_no_vm",
        run: damaged,
        needs: NEEDS,
    },
];

/// An overlay served over HTTP.
struct Served {
    file: PathBuf,
    server: Server,
    url: String,
}

fn served(host: &Host) -> Outcome<Served> {
    let file = overlay(host)?;
    serve(host, file)
}

fn serve(host: &Host, file: PathBuf) -> Outcome<Served> {
    let dir = host.path("served");
    fs::create_dir(&dir)?;
    let name = "dev.overlay";
    fs::rename(&file, dir.join(name))?;
    let server = Server::start(dir.clone())?;
    let url = server.url(name);
    Ok(Served {
        file: dir.join(name),
        server,
        url,
    })
}

/// Whether two files hold the same bytes, read piece by piece.
fn same_bytes(left: &Path, right: &Path) -> Outcome<bool> {
    let (mut left, mut right) = (fs::File::open(left)?, fs::File::open(right)?);
    if left.metadata()?.len() != right.metadata()?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let got = left.read(&mut a)?;
        if got == 0 {
            return Ok(true);
        }
        right.read_exact(&mut b[..got])?;
        if a[..got] != b[..got] {
            return Ok(false);
        }
    }
}

/// Synthesises without letting the guest run, and writes its memory to a snapshot directory.
fn memory_of(host: &Host, name: &str, location: &str, options: &[&str]) -> Outcome<PathBuf> {
    let mut args = vec!["synthesize", location, "--name", name, "--paused", "--wait"];
    args.extend_from_slice(options);
    host.ok(&args)?;
    let dir = host.path(format!("{name}.snap"));
    host.ok(&["snapshot", name, &dir.to_string_lossy()])?;
    host.ok(&["stop", name])?;
    Ok(dir.join("memory"))
}

fn same_memory(host: &Host) -> Outcome {
    let served = served(host)?;
    let file = served.file.to_string_lossy().into_owned();
    let original = host.path("dev.snap");
    host.ok(&["snapshot", "dev", &original.to_string_lossy()])?;
    let ways: [(&str, &str, &[&str]); 4] = [
        ("file-early", &file, &[]),
        ("file-full", &file, &["--no-early-start"]),
        ("http-early", &served.url, &[]),
        ("http-full", &served.url, &["--no-early-start"]),
    ];
    for (name, location, options) in ways {
        let memory = memory_of(host, name, location, options)?;
        ensure!(
            same_bytes(&memory, &original.join("memory"))?,
            "the memory of {name} is not the original's"
        );
        fs::remove_file(memory)?;
    }
    Ok(())
}

fn answers(host: &Host) -> Outcome {
    let file = overlay(host)?;
    let file = file.to_string_lossy();
    for (name, option) in [("early", None), ("full", Some("--no-early-start"))] {
        let mut args = vec!["synthesize", &*file, "--name", name, "--wait"];
        args.extend(option);
        host.ok(&args)?;
        ensure_eq!(host.state(name)?, "running", "state of {name}");
        host.ok(&["call", name, "verify"])?;
        host.ok(&["call", name, "stats"])?;
    }
    Ok(())
}

fn early(host: &Host) -> Outcome {
    let file = overlay(host)?;
    let trained = [
        "overlay",
        "create",
        &file.to_string_lossy(),
        "--from",
        "dev",
        "--force",
    ];
    host.ok(&[&trained[..], &["--train", "frame 0"]].concat())?;
    let served = serve(host, file)?;
    let bytes = fs::metadata(&served.file)?.len();
    let rate = rate_for(bytes, 6);
    host.ok(&[
        "synthesize",
        &served.url,
        "--name",
        "early",
        "--rate",
        &rate,
    ])?;
    host.ok(&["call", "early", "frame", "0"])?;
    let synthesis = host.status("early")?["synthesis"].clone();
    let count = |key: &str| synthesis[key].as_u64().unwrap_or(u64::MAX / 2);
    let received = count("stream_bytes") + count("demand_bytes");
    ensure!(
        received < bytes * 3 / 4,
        "answered after {received} of {bytes} bytes: {synthesis}"
    );
    host.wait_until(
        "the overlay to be there",
        std::time::Duration::from_secs(30),
        || (host.status("early").ok()?["synthesis"]["complete"] == true).then_some(()),
    )?;
    host.ok(&["call", "early", "verify"])?;
    Ok(())
}

/// The rate for `--rate` at which so many bytes take so many seconds.
fn rate_for(bytes: u64, seconds: u64) -> String {
    // Mbit/s with a thousandth's resolution.
    let kbit = (bytes * 8 / 1000 / seconds).max(10);
    format!("{}.{:03}", kbit / 1000, kbit % 1000)
}

fn cut_once(host: &Host) -> Outcome {
    let served = served(host)?;
    let bytes = fs::metadata(&served.file)?.len();
    for (name, options) in [("early", &[][..]), ("full", &["--no-early-start"])] {
        served.server.set_fault(Fault::CutOnceAt(bytes / 2));
        let mut args = vec!["synthesize", &*served.url, "--name", name, "--wait"];
        args.extend_from_slice(options);
        host.ok(&args)?;
        host.ok(&["call", name, "verify"])?;
    }
    // A server that gives whole files only, so that the index at the end comes by in its turn.
    served.server.set_fault(Fault::NoRanges);
    host.ok(&["synthesize", &*served.url, "--name", "whole", "--wait"])?;
    host.ok(&["call", "whole", "verify"])?;
    Ok(())
}

/// The overlay never arrives whole: both kinds of start must end with one sentence, and no VM must
/// be left that runs.
fn hopeless(host: &Host, fault: fn(u64) -> Fault, options: &[&str]) -> Outcome {
    let served = served(host)?;
    let bytes = fs::metadata(&served.file)?.len();
    served.server.set_fault(fault(bytes * 3 / 4));
    for (name, start) in [("early", &[][..]), ("full", &["--no-early-start"])] {
        let mut args = vec!["synthesize", &*served.url, "--name", name, "--wait"];
        args.extend_from_slice(options);
        args.extend_from_slice(start);
        let finished = host
            .spawn(&args)?
            .wait(host.limit(std::time::Duration::from_secs(60)))?
            .expect_code(1)?;
        ensure_eq!(
            finished.stderr.lines().count(),
            1,
            "sentences in {:?}",
            finished.stderr
        );
        ensure_ended(host, name)?;
    }
    Ok(())
}

/// The VM is gone, or has ended and says why.
fn ensure_ended(host: &Host, name: &str) -> Outcome {
    host.wait_until(
        &format!("the end of {name}"),
        std::time::Duration::from_secs(20),
        || {
            let listed = host.json_lines(&["ps"]).ok()?;
            let vm = listed.iter().find(|vm| vm["name"] == name);
            vm.is_none_or(|vm| vm["state"] == "ended").then_some(())
        },
    )?;
    let report = host
        .json_lines(&["ps"])?
        .into_iter()
        .find(|vm| vm["name"] == name);
    if let Some(vm) = report {
        let text = vm["report"].as_str().unwrap_or_default();
        ensure!(
            text.contains("overlay"),
            "the report does not say why: {vm}"
        );
    }
    Ok(())
}

fn changing(host: &Host) -> Outcome {
    let served = served(host)?;
    let bytes = fs::metadata(&served.file)?.len();
    for (name, start) in [("early", &[][..]), ("full", &["--no-early-start"])] {
        // Another tag alone is another server's: the hashes decide.
        served.server.set_fault(Fault::RetagAt(bytes / 2));
        let kept = format!("{name}-kept");
        let args = ["synthesize", &*served.url, "--name", &kept, "--wait"];
        host.ok(&[&args[..], start].concat())?;
        host.ok(&["call", &kept, "verify"])?;
        host.ok(&["stop", &kept])?;
        served.server.set_fault(Fault::ReplaceAt(bytes / 2));
        let args = ["synthesize", &*served.url, "--name", name, "--wait"];
        let finished = host.run(&[&args[..], start].concat())?.expect_code(1)?;
        ensure_eq!(
            finished.stderr.lines().count(),
            1,
            "sentences in {:?}",
            finished.stderr
        );
        ensure!(
            finished
                .stderr
                .contains("replaced during the transfer: its entity tag was"),
            "not said so: {}",
            finished.stderr
        );
        ensure_ended(host, name)?;
    }
    Ok(())
}

fn no_base(host: &Host) -> Outcome {
    let file = overlay(host)?;
    host.ok(&["stop", "dev"])?;
    let id = host.json(&["base", "show", BASE])?["id"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    host.ok(&["base", "rm", BASE, "--all"])?;
    let stderr = host.fails(&["synthesize", &file.to_string_lossy(), "--name", "web"], 1)?;
    ensure!(
        stderr.contains(&id[..12]),
        "the base is not named: {stderr}"
    );
    ensure_eq!(host.json_lines(&["ps"])?.len(), 0, "VMs that are left");
    Ok(())
}

fn damaged(host: &Host) -> Outcome {
    let file = overlay(host)?;
    let whole = fs::read(&file)?;
    let name = file.to_string_lossy().into_owned();
    let refuse = |what: &str, bytes: &[u8]| {
        fs::write(&file, bytes)?;
        for start in [&[][..], &["--no-early-start"]] {
            let args = ["synthesize", &name, "--name", "web", "--wait"];
            let finished = host.run(&[&args[..], start].concat())?;
            ensure!(
                finished.code() == 1 && finished.stderr.lines().count() == 1,
                "{what} {start:?}: exit code {}, {}",
                finished.code(),
                finished.stderr
            );
            ensure_ended(host, "web")?;
        }
        Ok::<(), Failure>(())
    };
    let mut flipped = whole.clone();
    // Prefix, segments, index.
    for at in [0, 40, whole.len() / 4, whole.len() / 2, whole.len() - 60] {
        flipped[at] ^= 1;
        refuse(&format!("flipped at {at}"), &flipped)?;
        flipped[at] ^= 1;
    }
    refuse("cut", &whole[..whole.len() / 2])?;
    refuse("empty", b"")
}
