//! The receiver against entries that no sender makes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

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
        &[Entry::Hole(5)],
        &[directory(b""), Entry::Hole(5)],
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

#[test]
fn holes_arrive_as_holes_and_are_not_sent() {
    use std::os::unix::fs::{FileExt, MetadataExt};

    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    let sparse = fs::File::create_new(from.join("lastlog")).unwrap();
    sparse.write_all_at(b"first", 0).unwrap();
    sparse.write_all_at(b"somebody", 100 << 30).unwrap();
    sparse.set_len(200 << 30).unwrap();
    fs::File::create_new(from.join("hole"))
        .unwrap()
        .set_len(7 << 30)
        .unwrap();
    fs::write(from.join("plain"), vec![0; 100_000]).unwrap();
    let mut receiver = Receiver::new(&to, None, 0o777).unwrap();
    let mut bytes = 0;
    let extent = send(&from, &mut |entry| {
        if let Entry::Data(data) = entry {
            bytes += data.len();
        }
        receiver.take(entry)
    })
    .unwrap();
    assert!(bytes < 150_000, "{bytes}");
    assert_eq!(extent.bytes, (207 << 30) + 100_000);
    assert_eq!(receiver.complete().unwrap().bytes, extent.bytes);
    for (name, length) in [
        ("lastlog", 200 << 30),
        ("hole", 7 << 30),
        ("plain", 100_000),
    ] {
        let made = fs::metadata(to.join(name)).unwrap();
        assert_eq!(made.len(), length, "{name}");
        assert!(made.blocks() <= 256, "{name}");
    }
    let made = fs::File::open(to.join("lastlog")).unwrap();
    let mut read = [0; 8];
    made.read_exact_at(&mut read, 100 << 30).unwrap();
    assert_eq!(&read, b"somebody");
    made.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(&read, b"first\0\0\0");
}

#[test]
fn a_hole_beyond_every_file_is_an_error() {
    let hole = Entry::Hole(u64::MAX);
    let end = Entry::Data(b"");
    let (result, left) = take(&[file(b""), hole, hole, end]);
    assert!(matches!(result, Err(Error::Io { .. })));
    assert_eq!(left, 0);
}

#[test]
fn a_file_that_is_shorter_than_it_says_ends_where_it_ends() {
    // The kernel says 4096 bytes and no blocks of all of these.
    let path = Path::new("/sys/kernel/mm/transparent_hugepage/enabled");
    let Ok(expected) = fs::read(path) else { return };
    let mut sent = Vec::new();
    send(path, &mut |entry| {
        match entry {
            Entry::Data(data) => sent.extend_from_slice(data),
            Entry::Hole(length) => panic!("a hole of {length}"),
            _ => {}
        }
        Ok::<(), Error>(())
    })
    .unwrap();
    assert_eq!(sent, expected);
}
