//! Trees, both ways.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use cloudlet::agent::{self, Error};

use crate::util::{Agent, listing, noise};

fn nothing(_: u64, _: u64) {}

/// A directory with one of everything.
fn plant(dir: &Path) {
    fs::create_dir_all(dir.join("deep/er/est")).unwrap();
    fs::create_dir(dir.join("empty")).unwrap();
    fs::write(dir.join("deep/er/est/file"), noise(300_000, 1)).unwrap();
    fs::write(dir.join("nothing"), b"").unwrap();
    fs::write(dir.join("odd \n name"), b"odd").unwrap();
    symlink("/no/such", dir.join("dangling")).unwrap();
    symlink("deep", dir.join("inside")).unwrap();
    for (name, mode) in [
        ("nothing", 0o604),
        ("deep/er/est/file", 0o755),
        ("empty", 0o711),
    ] {
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_007, 89);
    for name in ["nothing", "empty", "deep/er/est"] {
        let file = fs::File::open(dir.join(name)).unwrap();
        file.set_modified(time).unwrap();
    }
}

#[test]
fn trees_go_and_come_back() {
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("tree");
    plant(&source);
    let guest = dir.path().join("guest");
    let sent = agent::put(agent.connect(), &source, guest.as_os_str(), &mut nothing).unwrap();
    assert_eq!(listing(&guest), listing(&source));
    assert_eq!((sent.bytes, sent.entries, sent.skipped), (300_003, 10, 0));
    let back = dir.path().join("back");
    fs::create_dir(&back).unwrap();
    // Into a directory, by its own name.
    let got = agent::get(agent.connect(), guest.as_os_str(), &back, &mut nothing).unwrap();
    assert_eq!(listing(&back.join("guest")), listing(&source));
    assert_eq!(got, sent);
    // The contents alone; directories that are there stay as they are, files are replaced.
    fs::remove_dir_all(back.join("guest")).unwrap();
    fs::create_dir(back.join("empty")).unwrap();
    fs::write(back.join("nothing"), b"something").unwrap();
    let contents = guest.join(".");
    agent::get(agent.connect(), contents.as_os_str(), &back, &mut nothing).unwrap();
    let but_empty = |dir| {
        let mut all = listing(dir);
        all.retain(|line| !line.starts_with("\"empty\""));
        all
    };
    assert_eq!(but_empty(&back), but_empty(&source));
    assert_eq!(
        fs::metadata(back.join("empty"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o755
    );
}

#[test]
fn large_files_are_shown_and_come_through_whole() {
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("file"), noise(100 << 20, 2)).unwrap();
    let mut shown = Vec::new();
    agent::put(
        agent.connect(),
        &path("file"),
        path("there").as_os_str(),
        &mut |done, total| shown.push((done, total)),
    )
    .unwrap();
    assert_eq!(shown.last(), Some(&(100 << 20, 100 << 20)));
    agent::get(
        agent.connect(),
        path("there").as_os_str(),
        &path("back"),
        &mut nothing,
    )
    .unwrap();
    assert!(fs::read(path("back")).unwrap() == fs::read(path("file")).unwrap());
}

#[test]
fn destinations_are_as_with_cp() {
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("file"), b"new").unwrap();
    fs::create_dir(path("d")).unwrap();
    symlink("d", path("link")).unwrap();
    let get = |to: &Path| agent::get(agent.connect(), path("file").as_os_str(), to, &mut nothing);
    get(&path("link")).unwrap();
    assert_eq!(fs::read(path("d/file")).unwrap(), b"new");
    fs::write(path("d/old"), b"old").unwrap();
    get(&path("d/old")).unwrap();
    assert_eq!(fs::read(path("d/old")).unwrap(), b"new");
    let message = |result: Result<_, Error>| format!("{:?}", result.unwrap_err());
    assert!(message(get(&path("none/"))).contains("Slash"));
    assert!(message(get(&path("none/file"))).contains("none"));
    fs::create_dir(path("d/x")).unwrap();
    fs::create_dir_all(path("e/file")).unwrap();
    assert!(message(get(&path("e"))).contains("put in place"));
    let put =
        |from: &Path, to: &Path| agent::put(agent.connect(), from, to.as_os_str(), &mut nothing);
    put(&path("file"), &path("put")).unwrap();
    assert_eq!(fs::read(path("put")).unwrap(), b"new");
    put(&path("d"), &path("e")).unwrap();
    assert_eq!(fs::read(path("e/d/old")).unwrap(), b"new");
    // Nothing is left of what failed.
    assert!(
        !listing(dir.path())
            .iter()
            .any(|line| line.contains("partial"))
    );
}

#[test]
fn failures_have_reasons() {
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let missing = path("missing");
    let got = agent::get(
        agent.connect(),
        missing.as_os_str(),
        &path("x"),
        &mut nothing,
    );
    match got {
        Err(Error::Refused(why)) => assert!(
            why.contains("missing") && why.contains("No such file"),
            "{why}"
        ),
        other => panic!("{other:?}"),
    }
    assert!(!path("x").exists());
    let put = agent::put(agent.connect(), &missing, OsStr::new("/tmp"), &mut nothing);
    assert!(matches!(put, Err(Error::Tree(_))), "{put:?}");
    // The agent fails long before everything is sent, and its reason arrives.
    fs::write(path("large"), noise(64 << 20, 3)).unwrap();
    let full = agent::put(
        agent.connect(),
        &path("large"),
        OsStr::new("/dev/fd/no"),
        &mut nothing,
    );
    match full {
        Err(Error::Refused(why)) => assert!(why.contains("cannot"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn special_files_are_left_out() {
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("tree")).unwrap();
    fs::write(path("tree/a"), b"a").unwrap();
    drop(std::os::unix::net::UnixListener::bind(path("tree/socket")).unwrap());
    let got = agent::get(
        agent.connect(),
        path("tree").as_os_str(),
        &path("to"),
        &mut nothing,
    );
    assert_eq!(got.unwrap().skipped, 1);
    assert_eq!(listing(&path("to")).len(), 1);
}
