//! A Debian guest as a user has one: built by `image build`, published as a base VM, customised by
//! `cp` and `exec`, made an overlay of, and synthesised in a fresh process with early start.

use std::fs;
use std::path::Path;
use std::time::Duration;

use cloudlet_resources::FLUID_LINUX_ELF;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::linux::{self, DEBIAN, OBJECT, SPEECH};
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "debian_fluid_is_synthesised_with_its_state",
        run: fluid,
        needs: needs(&[DEBIAN]),
    },
    Case {
        name: "debian_speech_is_synthesised_and_recognises",
        run: speech,
        needs: needs(&[DEBIAN, SPEECH]),
    },
    Case {
        name: "debian_object_is_synthesised_and_recognises",
        run: object,
        needs: needs(&[DEBIAN, OBJECT]).long(),
    },
];

const fn needs(guests: &'static [&'static str]) -> Needs {
    Needs::linux(guests).with_memory_mib(2048).within(150)
}

/// How long an application may take until it serves, in lane 1's time.
const SERVES: Duration = Duration::from_secs(60);
/// How long a guest may take to take a request while its overlay comes.
const ANSWERS: Duration = Duration::from_secs(20);
/// Slow enough for the guest to run while its overlay comes: Mbit/s.
const RATE: &str = "100";

/// Publishes the image as the base VM `deb` and starts the VM `dev` of it.
fn customisable(host: &Host) -> Outcome {
    let image = linux::dir(DEBIAN)?;
    host.ok(&[
        "base",
        "create",
        "deb",
        "--image",
        text(&image)?,
        "--memory",
        "192",
    ])?;
    host.ok(&["restore", "deb", "--name", "dev"])?;
    let uname = host.ok(&["exec", "dev", "--", "uname", "-sn"])?;
    ensure_eq!(uname.trim(), "Linux cloudlet", "uname");
    Ok(())
}

/// Makes an overlay of `dev`, which runs `application`, ends it, and synthesises `again` of the overlay.
fn synthesised(host: &Host, application: &str) -> Outcome {
    host.ok(&["overlay", "create", "app.overlay", "--from", "dev"])?;
    if let Some(dir) = std::env::var_os("CLOUDLET_CORPUS") {
        keep(host, dir.as_ref(), application)?;
    }
    host.ok(&["stop", "dev"])?;
    host.ok(&[
        "synthesize",
        "app.overlay",
        "--name",
        "again",
        "--rate",
        RATE,
    ])?;
    Ok(())
}

/// Waits until `dev` has made its socket. It looks by itself, in steps: being asked keeps it from its
/// work.
fn await_socket(host: &Host, path: &str) -> Outcome {
    let wait = format!("until test -S {path}; do sleep 0.3; done");
    let exec = host.spawn(&["exec", "dev", "--", "sh", "-c", &wait])?;
    exec.wait(host.limit(SERVES))?.expect_code(0).map(drop)
}

fn fluid(host: &Host) -> Outcome {
    customisable(host)?;
    let program = host.path("fluid");
    fs::write(&program, FLUID_LINUX_ELF)?;
    make_executable(&program)?;
    host.ok(&["cp", text(&program)?, "dev:/usr/local/bin/"])?;
    let serve = "setsid fluid serve /run/fluid.sock tanks=8 particles=1000 warmup=0 rate_hz=0 \
                 </dev/null >/dev/null 2>&1 &";
    host.ok(&["exec", "dev", "--", "sh", "-c", serve])?;
    let wait = host.limit(ANSWERS).as_secs().to_string();
    let ask = |vm: &str, request: &[&str]| {
        let words = ["exec", "--wait", &wait, vm, "--", "fluid", "ask"];
        host.ok(&[&words[..], &["/run/fluid.sock"], request].concat())
    };
    await_socket(host, "/run/fluid.sock")?;
    ask("dev", &["poke", "3", "0.5", "0.5", "2"])?;
    let frame = ["frame", "3", "160", "120"];
    let before = ask("dev", &frame)?;
    ensure!(
        before.contains("tank 3 step 1 "),
        "no frame of a poked tank: {before}"
    );
    synthesised(host, "fluid")?;
    ensure_eq!(
        ask("again", &frame)?,
        before,
        "the frame after the synthesis"
    );
    let verified = ask("again", &["verify"])?;
    ensure!(verified.starts_with("fluid 8 tanks"), "damaged: {verified}");
    // The state goes on from where it was, and another request has another answer.
    let poked = ask("again", &["poke", "3", "0.5", "0.5", "2"])?;
    ensure!(
        poked.contains("tank 3 step 2 "),
        "the state was lost: {poked}"
    );
    Ok(())
}

/// What `pocketsphinx-testdata` has recordings of.
const SAID: [&str; 5] = [
    "ten of clubs",
    "four queen of clubs",
    "seven of clubs",
    "five five",
    "eight of spades four of clubs seven of hearts",
];

const RECOGNISE: &str = "set -e
    data=/usr/share/pocketsphinx/test/data/cards model=/usr/share/pocketsphinx/model/en-us
    lib=/usr/lib/x86_64-linux-gnu
    export LD_LIBRARY_PATH=$lib/blas:$lib/lapack
    pocketsphinx_batch -hmm $model/en-us -dict $model/cmudict-en-us.dict -jsgf $data/cards.gram \
        -ctl $data/cards.fileids -cepdir $data -cepext .wav -adcin yes -adchdr 44 \
        -hyp /tmp/said >/tmp/log 2>&1 || { tail /tmp/log; exit 1; }
    cat /tmp/said";

fn speech(host: &Host) -> Outcome {
    customisable(host)?;
    let inside = linux::dir(SPEECH)?.join("usr/.");
    host.ok(&["cp", text(&inside)?, "dev:/usr"])?;
    let wait = host.limit(ANSWERS).as_secs().to_string();
    let ask = |vm: &str| host.ok(&["exec", "--wait", &wait, vm, "--", "sh", "-c", RECOGNISE]);
    let before = ask("dev")?;
    for said in SAID {
        ensure!(
            before.contains(said),
            "{said:?} was not recognised: {before}"
        );
    }
    synthesised(host, "speech")?;
    ensure_eq!(
        ask("again")?,
        before,
        "what is recognised after the synthesis"
    );
    Ok(())
}

/// Python with numpy holds 26 MB of features of pictures; a request is a picture that it has not seen.
const OBJECT_PY: &[u8] = include_bytes!("../../linux/object.py");
const ASK_PY: &[u8] = include_bytes!("../../linux/object_ask.py");
const DIGITS: &[u8] = include_bytes!("../../../resources/data/digits.bin");
const OBJECT_SH: &str = "
    lib=/usr/lib/x86_64-linux-gnu
    export LD_LIBRARY_PATH=$lib/blas:$lib/lapack PYTHONDONTWRITEBYTECODE=1
    cd /srv";
/// Held-back pictures that are asked for, and what they show.
const SHOWN: [(&str, &str); 4] = [("0", "4"), ("1", "9"), ("6", "6"), ("8", "7")];

fn object(host: &Host) -> Outcome {
    customisable(host)?;
    let inside = linux::dir(OBJECT)?.join("usr/.");
    host.ok(&["cp", text(&inside)?, "dev:/usr"])?;
    let files = [
        ("object.py", OBJECT_PY),
        ("object_ask.py", ASK_PY),
        ("digits.bin", DIGITS),
    ];
    for (name, bytes) in files {
        let file = host.path(name);
        fs::write(&file, bytes)?;
        host.ok(&["cp", text(&file)?, "dev:/srv/"])?;
    }
    let wait = host.limit(ANSWERS).as_secs().to_string();
    let run = |vm: &str, words: &str| {
        host.ok(&[
            "exec",
            "--wait",
            &wait,
            vm,
            "--",
            "sh",
            "-c",
            &format!("{OBJECT_SH}; {words}"),
        ])
    };
    let serve = "setsid python3.11 object.py digits.bin /run/object.sock \
                 </dev/null >/run/object.log 2>&1 &";
    run("dev", serve)?;
    await_socket(host, "/run/object.sock")?;
    let ask = |vm: &str, number: &str| {
        let words = format!("python3.11 object_ask.py digits.bin /run/object.sock {number}");
        run(vm, &words)
    };
    let mut before = Vec::new();
    for (number, digit) in SHOWN {
        let answer = ask("dev", number)?;
        ensure!(
            answer.starts_with(&format!("shows {digit}: digit {digit} ")),
            "picture {number} was not recognised: {answer}"
        );
        before.push(answer);
    }
    synthesised(host, "object")?;
    for ((number, _), before) in SHOWN.iter().zip(&before) {
        ensure_eq!(
            ask("again", number)?,
            *before,
            "the answer after the synthesis"
        );
    }
    let verified = run("again", "python3.11 object_ask.py verify /run/object.sock")?;
    ensure!(
        verified.trim().ends_with("26505216 bytes sound"),
        "{verified}"
    );
    Ok(())
}

/// Copies the overlay and the base VM to where `tests/corpus` wants them.
fn keep(host: &Host, dir: &Path, application: &str) -> Outcome {
    let overlay = dir.join(format!("{application}.overlay"));
    fs::copy(host.path("app.overlay"), overlay)?;
    let base = host.json(&["base", "show", "deb"])?;
    let field = |name: &str| base[name].as_str().unwrap_or_default().to_owned();
    let to = dir.join("bases").join(field("id"));
    fs::create_dir_all(&to)?;
    for entry in fs::read_dir(field("dir"))? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn make_executable(path: &Path) -> Outcome {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    Ok(fs::set_permissions(path, mode)?)
}

fn text(path: &Path) -> Outcome<&str> {
    path.to_str()
        .ok_or_else(|| Failure::new("a path of the tests is not UTF-8"))
}
