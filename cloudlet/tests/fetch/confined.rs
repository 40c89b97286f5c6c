//! Fetching under the seccomp filter of fetch threads, as it is done in a VMM process: the remote
//! is opened before, everything else happens on filtered threads. The filter would end the whole
//! test program, so this runs in a process of its own: the test binary again.

use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use cloudlet::fetch::{Link, Location, Options, Rate, Remote};
use cloudlet::serve::{Fate, ServeOptions, Shape};
use cloudlet_vmm::seccomp::{ThreadKind, install, prepare};

use crate::tls::certify;
use crate::util::{Folder, http, read_all, serve};

/// Set for the child process.
const CHILD: &str = "FETCH_TEST_CONFINED";

/// Cuts every tenth chunk, so that connecting again happens under the filter too.
struct Scissors(AtomicU64);

impl Shape for Scissors {
    fn next_chunk(&self, _: u64, _: &str, _: u64, _: &mut [u8]) -> Fate {
        if self.0.fetch_add(1, Ordering::Relaxed) % 10 == 9 {
            Fate::Cut
        } else {
            Fate::Send
        }
    }
}

#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    prepare(std::io::stderr().as_fd().try_clone_to_owned().expect("dup")).expect("prepares");
    let folder = Folder::new(3_000_000);
    let [ca, certificate, key] = certify(&folder, "right", &["127.0.0.1", "localhost"]);
    let scissors = || Some(Arc::new(Scissors(AtomicU64::new(0))) as Arc<dyn Shape>);
    let plain = serve(
        &folder,
        ServeOptions {
            shape: scissors(),
            ..Default::default()
        },
    );
    let tls = Some((certificate, key));
    let secure = serve(
        &folder,
        ServeOptions {
            shape: scissors(),
            tls,
            ..Default::default()
        },
    );
    let by_name = secure.url("file.bin").replace("127.0.0.1", "localhost");
    for location in [
        http(&plain),
        http(&secure),
        by_name.parse().expect("a URL"),
        Location::from(folder.file()),
    ] {
        fetch(
            &location,
            Options {
                ca: Some(ca.clone()),
                ..Options::default()
            },
            &folder.bytes,
        );
    }
    eprintln!("all fetched");
}

/// Brings the whole file and some ranges on two filtered threads.
fn fetch(location: &Location, options: Options, expected: &[u8]) {
    let rate = Rate::from_mbit(200.0).expect("a rate");
    let remote = Remote::open(location, options, &Link::new(Some(rate))).expect("opens");
    let mut demand = remote.demand();
    let mut stream = remote.stream(0);
    thread::scope(|scope| {
        let named = |name: &str| thread::Builder::new().name(name.to_owned());
        let body = || {
            install(ThreadKind::Fetch).expect("installs");
            assert!(read_all(&mut stream) == expected);
        };
        named("fetch-stream")
            .spawn_scoped(scope, body)
            .expect("starts");
        let body = || {
            install(ThreadKind::Fetch).expect("installs");
            // A failure shows again at the first demand.
            let _ = demand.connect();
            for offset in (0..2_900_000).step_by(300_000) {
                let mut bytes = vec![0; 70_000];
                demand.read_range(offset, &mut bytes).expect("fetches");
                let start = usize::try_from(offset).expect("small");
                assert!(bytes == expected[start..start + 70_000]);
            }
        };
        named("fetch-demand")
            .spawn_scoped(scope, body)
            .expect("starts");
    });
}

#[test]
fn fetching_passes_the_filter() {
    let output = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "confined::child", "--nocapture"])
        .env(CHILD, "1")
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("starts");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{:?}\n{text}", output.status);
    assert!(text.contains("all fetched"), "{text}");
}
