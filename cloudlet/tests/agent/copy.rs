//! Trees, both ways.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
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
    // The contents alone; directories that are there stay as they are, files are replaced and keep
    // their mode.
    fs::remove_dir_all(back.join("guest")).unwrap();
    fs::create_dir(back.join("empty")).unwrap();
    fs::write(back.join("nothing"), b"something").unwrap();
    let mode = fs::Permissions::from_mode(0o604);
    fs::set_permissions(back.join("nothing"), mode).unwrap();
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

/// In both directions, as they are received by the same code.
#[test]
fn what_is_in_the_place_of_a_file_decides_what_becomes_of_it() {
    use std::os::unix::fs::chown;
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("new"), b"new").unwrap();
    fs::set_permissions(path("new"), fs::Permissions::from_mode(0o755)).unwrap();
    // Only root can have files of others.
    let is_root = fs::metadata(dir.path()).unwrap().uid() == 0;
    for way in ["put", "get"] {
        let copy = |to: &Path| match way {
            "put" => agent::put(agent.connect(), &path("new"), to.as_os_str(), &mut nothing),
            _ => agent::get(agent.connect(), path("new").as_os_str(), to, &mut nothing),
        };
        let within = path(way);
        fs::create_dir(&within).unwrap();
        // By its own name, and as the name of one in a directory.
        for (file, to) in [("old", within.join("old")), ("new", within.clone())] {
            let file = within.join(file);
            fs::write(&file, b"something older").unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
            if is_root {
                chown(&file, Some(1234), Some(4321)).unwrap();
            }
            let before = fs::metadata(&file).unwrap();
            copy(&to).unwrap();
            let after = fs::metadata(&file).unwrap();
            assert_eq!(fs::read(&file).unwrap(), b"new");
            assert_eq!(after.mode(), before.mode(), "{way}");
            assert_eq!(
                (after.uid(), after.gid()),
                (before.uid(), before.gid()),
                "{way}"
            );
        }
        fs::write(path("target"), b"target").unwrap();
        let link = within.join("link");
        symlink(path("target"), &link).unwrap();
        copy(&link).unwrap();
        assert!(!fs::symlink_metadata(&link).unwrap().is_symlink(), "{way}");
        assert_eq!(fs::metadata(&link).unwrap().mode() & 0o777, 0o755);
        assert_eq!(fs::read(path("target")).unwrap(), b"target", "{way}");
        // Neither one of these nor a link to it is replaced.
        let fifo = within.join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
        symlink(&fifo, within.join("to-fifo")).unwrap();
        for name in ["fifo", "to-fifo"] {
            let before = fs::symlink_metadata(within.join(name)).unwrap();
            let error = copy(&within.join(name)).unwrap_err().to_string();
            assert!(error.contains("neither a file nor"), "{way}: {error}");
            let after = fs::symlink_metadata(within.join(name)).unwrap();
            assert_eq!(after.ino(), before.ino(), "{way}");
        }
    }
}

#[test]
fn holes_are_neither_sent_nor_filled() {
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("lastlog");
    let file = fs::File::create_new(&source).unwrap();
    file.write_all_at(b"first", 0).unwrap();
    file.write_all_at(b"somebody", 100 << 30).unwrap();
    file.set_len(200 << 30).unwrap();
    let (guest, back) = (dir.path().join("guest"), dir.path().join("back"));
    let mut shown = (0, 0);
    let mut show = |done, total| shown = (done, total);
    agent::put(agent.connect(), &source, guest.as_os_str(), &mut show).unwrap();
    let got = agent::get(agent.connect(), guest.as_os_str(), &back, &mut show).unwrap();
    assert_eq!(shown, (200 << 30, 200 << 30));
    assert_eq!(got.bytes, 200 << 30);
    for path in [&guest, &back] {
        let made = fs::File::open(path).unwrap();
        assert_eq!(made.metadata().unwrap().len(), 200 << 30);
        assert!(made.metadata().unwrap().blocks() <= 32);
        let mut bytes = [0; 8];
        made.read_exact_at(&mut bytes, 100 << 30).unwrap();
        assert_eq!(&bytes, b"somebody");
    }
}

/// A version 2 of `struct vfs_cap_data` (linux/capability.h): effective, `CAP_NET_BIND_SERVICE`.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn capabilities_go_into_a_guest_and_none_comes_out_of_it() {
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let name = "security.capability";
    fs::create_dir(path("tree")).unwrap();
    for file in ["ping", "plain", "noted"] {
        fs::write(path("tree").join(file), "words").unwrap();
    }
    let set = |file: &str, name: &str, value: &[u8]| {
        let path = path("tree").join(file);
        rustix::fs::setxattr(&path, name, value, rustix::fs::XattrFlags::empty())
    };
    // Only root may set them, and the agent of a guest is root.
    if set("ping", name, &CAPABILITY) == Err(rustix::io::Errno::PERM) {
        eprintln!("not root: capabilities cannot be set here");
        return;
    }
    set("noted", "user.note", b"x").unwrap();
    let get = |file: &std::path::Path| {
        let mut value = [0; 64];
        let length = rustix::fs::getxattr(file, name, &mut value[..])?;
        Ok::<_, rustix::io::Errno>(value[..length].to_vec())
    };

    let guest = path("guest");
    let put = agent::put(
        agent.connect(),
        &path("tree"),
        guest.as_os_str(),
        &mut |_, _| {},
    );
    assert_eq!(put.unwrap().stripped, 1, "the note is left out");
    assert_eq!(get(&guest.join("ping")).unwrap(), CAPABILITY);
    assert!(get(&guest.join("plain")).is_err());
    assert_eq!(fs::read(guest.join("ping")).unwrap(), b"words");

    let back = path("back");
    let got = agent::get(agent.connect(), guest.as_os_str(), &back, &mut |_, _| {}).unwrap();
    assert_eq!(got.stripped, 1, "the capability is left out");
    assert!(get(&back.join("ping")).is_err());
    assert_eq!(fs::read(back.join("ping")).unwrap(), b"words");
}
