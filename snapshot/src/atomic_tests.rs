//! What is visible at which moment, and what is cleaned up.

use super::*;

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_file_appears_whole_and_replaces() {
    let room = tempfile::tempdir().unwrap();
    let target = room.path().join("state");
    fs::write(&target, "old").unwrap();
    let mut file = AtomicFile::create(&target).unwrap();
    file.write_all(b"new").unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"old");
    file.commit().unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o600);
    assert_eq!(entries(room.path()), ["state"]);
}

#[test]
fn a_dropped_file_leaves_nothing() {
    let room = tempfile::tempdir().unwrap();
    let mut file = AtomicFile::create(room.path().join("state")).unwrap();
    file.write_all(b"half").unwrap();
    assert_eq!(entries(room.path()).len(), 1);
    drop(file);
    assert!(entries(room.path()).is_empty());
}

#[test]
fn commit_new_does_not_replace() {
    let room = tempfile::tempdir().unwrap();
    let target = room.path().join("state");
    AtomicFile::create(&target).unwrap().commit_new().unwrap();
    let mut second = AtomicFile::create(&target).unwrap();
    second.write_all(b"second").unwrap();
    assert!(matches!(
        second.commit_new(),
        Err(AtomicError::Exists { .. })
    ));
    assert_eq!(fs::read(&target).unwrap(), b"");
    assert_eq!(entries(room.path()), ["state"]);
}

#[test]
fn a_directory_appears_whole_and_never_replaces() {
    let room = tempfile::tempdir().unwrap();
    let target = room.path().join("base");
    let first = AtomicDir::create(&target).unwrap();
    let second = AtomicDir::create(&target).unwrap();
    for directory in [&first, &second] {
        fs::write(directory.path().join("memory"), "pages").unwrap();
        fs::create_dir(directory.path().join("sub")).unwrap();
        fs::write(directory.path().join("sub/x"), "y").unwrap();
    }
    assert!(!target.exists());
    first.commit().unwrap();
    assert_eq!(fs::read(target.join("sub/x")).unwrap(), b"y");
    assert!(matches!(second.commit(), Err(AtomicError::Exists { .. })));
    assert!(matches!(
        AtomicDir::create(&target),
        Err(AtomicError::Exists { .. })
    ));
    assert_eq!(entries(room.path()), ["base"]);
}

#[test]
fn targets_without_a_name_or_place_are_refused() {
    assert!(matches!(
        AtomicFile::create("/"),
        Err(AtomicError::NoName { .. })
    ));
    assert!(matches!(
        AtomicDir::create("x/.."),
        Err(AtomicError::NoName { .. })
    ));
    let room = tempfile::tempdir().unwrap();
    let error = AtomicFile::create(room.path().join("none/state")).unwrap_err();
    assert!(matches!(
        error,
        AtomicError::Io {
            doing: "create",
            ..
        }
    ));
}

#[test]
fn a_sweep_takes_the_dead_and_leaves_the_living() {
    let room = tempfile::tempdir().unwrap();
    let dead_file = room.path().join(".unfinished-1-0-state.tmp");
    let dead_directory = room.path().join(".unfinished-1-1-base.tmp");
    fs::write(&dead_file, "half").unwrap();
    fs::create_dir(&dead_directory).unwrap();
    fs::write(dead_directory.join("memory"), "half").unwrap();
    fs::write(room.path().join("other.tmp"), "not ours").unwrap();
    let file = AtomicFile::create(room.path().join("state")).unwrap();
    let directory = AtomicDir::create(room.path().join("base")).unwrap();
    assert_eq!(sweep_leftovers(room.path()).unwrap(), 2);
    file.commit().unwrap();
    directory.commit().unwrap();
    assert_eq!(entries(room.path()), ["base", "other.tmp", "state"]);
}
