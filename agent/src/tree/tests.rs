//! The receiver against entries that no sender makes.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

const META: Meta = Meta {
    mode: 0o644,
    seconds: 5,
    nanos: 6,
};

fn directory(name: &[u8]) -> Entry<'_> {
    Entry::Directory { name, meta: META }
}

fn file(name: &[u8]) -> Entry<'_> {
    Entry::File { name, meta: META }
}

/// Takes `entries` in a fresh directory; the error, and how many names are left there.
fn take(entries: &[Entry<'_>]) -> (Result<bool, Error>, usize) {
    let dir = tempfile::tempdir().unwrap();
    let mut receiver = Receiver::new(&dir.path().join("to"), None, 0o777).unwrap();
    let taken = entries.iter().try_for_each(|entry| receiver.take(*entry));
    let result = taken.map(|()| receiver.complete().is_some());
    drop(receiver);
    (result, fs::read_dir(dir.path()).unwrap().count())
}

#[test]
fn entries_come_in_order_or_not_at_all() {
    let (data, end) = (Entry::Data(b"x"), Entry::Data(b""));
    let link = Entry::Link {
        name: b"l",
        meta: META,
        target: b"t",
    };
    for wrong in [
        &[Entry::Up][..],
        &[data],
        &[end],
        &[link],
        &[file(b""), Entry::Up],
        &[file(b""), file(b"f")],
        &[file(b""), end, end],
        &[directory(b""), Entry::Up, Entry::Up],
        &[directory(b""), Entry::Up, directory(b"")],
        &[directory(b""), data],
        &[directory(b""), Entry::Extent(Extent::default())],
        &[directory(b""), file(b"f"), link],
        &[directory(b""), file(b"f"), directory(b"d")],
    ] {
        let (result, _) = take(wrong);
        assert!(
            matches!(result, Err(Error::Invalid(Invalid::Order))),
            "{wrong:?}: {result:?}"
        );
    }
    assert!(matches!(take(&[file(b""), data]), (Ok(false), 0)));
    assert!(matches!(take(&[file(b""), data, end]), (Ok(true), 1)));
    assert!(matches!(take(&[directory(b""), Entry::Up]), (Ok(true), 1)));
}

#[test]
fn depth_is_limited() {
    let mut entries = vec![directory(b"")];
    entries.extend([directory(b"d"); DEPTH_MAX - 1]);
    assert!(matches!(take(&entries), (Ok(false), 1)));
    entries.push(directory(b"d"));
    let (result, _) = take(&entries);
    assert!(matches!(result, Err(Error::Invalid(Invalid::Depth))));
}

#[test]
fn a_tree_too_deep_is_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let deep: PathBuf = std::iter::repeat_n("d", DEPTH_MAX).collect();
    fs::create_dir_all(dir.path().join(deep)).unwrap();
    let sent = send(dir.path(), &mut |_| Ok::<(), Error>(()));
    assert!(matches!(sent, Err(Error::Invalid(Invalid::Depth))));
}

#[test]
fn only_the_kept_bits_of_modes_are_set() {
    let dir = tempfile::tempdir().unwrap();
    for (modes, kept) in [(0o777, 0o755), (0o7777, 0o6755)] {
        let path = dir.path().join(modes.to_string());
        let mut receiver = Receiver::new(&path, None, modes).unwrap();
        let meta = Meta {
            mode: 0o6755,
            ..META
        };
        receiver.take(Entry::File { name: b"", meta }).unwrap();
        receiver.take(Entry::Data(b"")).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, kept);
    }
}
