//! File systems made of trees, looked at with debugfs. Without e2fsprogs there is nothing to test.

use super::super::spool::{FileSpool, Spool};
use super::*;

const LEN: u64 = 64 << 20;

struct Made {
    dir: tempfile::TempDir,
    tree: Tree,
    spool: FileSpool,
}

impl Made {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let contents = dir.path().join("contents");
        std::fs::create_dir(&contents).unwrap();
        Self {
            spool: FileSpool::new(&contents, LEN),
            tree: Tree::new(),
            dir,
        }
    }

    fn put(&mut self, path: &[u8], attributes: Attributes, kind: Kind) {
        self.tree
            .put(path, attributes, kind, &mut self.spool)
            .unwrap();
    }

    fn file(&mut self, path: &[u8], attributes: Attributes, contents: &[u8]) {
        let len = contents.len() as u64;
        let blob = self.spool.store(&mut &*contents, len).unwrap();
        self.put(path, attributes, Kind::File(blob));
    }

    fn write(&self, len: u64) -> Result<PathBuf, Error> {
        let image = self.dir.path().join("image");
        write(&self.tree, &self.dir.path().join("contents"), &image, len)?;
        Ok(image)
    }
}

/// What debugfs answers to a request.
fn ask(image: &Path, request: &str) -> String {
    let output = program("debugfs")
        .arg("-R")
        .arg(request)
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn installed() -> bool {
    program("mke2fs").arg("-V").output().is_ok()
}

fn attributes(mode: u32, uid: u32, gid: u32, mtime: i64) -> Attributes {
    Attributes {
        mode,
        uid,
        gid,
        mtime,
        nanos: 0,
    }
}

#[test]
fn everything_arrives_with_its_attributes() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    let root = attributes(0o755, 0, 0, 1);
    made.file(
        b"a/big",
        attributes(0o4755, 100_000, 7, 12345),
        &vec![7; 300_000],
    );
    made.put(
        b"a/link",
        root,
        Kind::Symlink(b"/some where/\"else\"".to_vec()),
    );
    made.put(b"null", attributes(0o666, 0, 0, 1), Kind::Character(1, 3));
    made.put(b"disk", attributes(0o660, 0, 6, 1), Kind::Block(259, 300));
    made.put(b"pipe", attributes(0o600, 0, 0, 1), Kind::Fifo);
    made.file(b"lost+found/x", root, b"dropped");
    for number in 0..200 {
        let name = format!("links/with-a-name-that-takes-some-room-{number}");
        made.tree
            .link(name.as_bytes(), b"a/big", &mut made.spool)
            .unwrap();
    }
    let image = made.write(LEN).unwrap();
    let stat = ask(&image, "stat /a/big");
    for part in [
        "Mode:  04755",
        "User: 100000   Group:     7",
        "Size: 300000",
        "Links: 201",
        "mtime: 0x00003039",
    ] {
        assert!(stat.contains(part), "{part} is not in {stat}");
    }
    let link = ask(&image, "stat /a/link");
    assert!(
        link.contains("Fast link dest: \"/some where/\"else\"\""),
        "{link}"
    );
    assert!(ask(&image, "stat /null").contains("character special"));
    assert!(ask(&image, "stat /disk").contains("259:300"));
    assert!(ask(&image, "stat /pipe").contains("FIFO"));
    let out = made.dir.path().join("out");
    ask(
        &image,
        &format!(
            "dump /links/with-a-name-that-takes-some-room-150 {}",
            out.display()
        ),
    );
    assert_eq!(std::fs::read(out).unwrap(), vec![7; 300_000]);
}

#[test]
fn names_are_taken_as_they_are() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    let names: [&[u8]; 10] = [
        b"<2>",
        b"-f",
        b"#x",
        b"a \"b\" c",
        b"\"",
        b" ",
        b"a\\b",
        b"\xff\xfe",
        b"'",
        b"~",
    ];
    for name in names {
        made.file(name, attributes(0o600, 5, 0, 1), name);
        made.file(
            &[name, b"-dir/", name].concat(),
            attributes(0o600, 5, 0, 1),
            name,
        );
    }
    made.file(b"<8>/<2>", attributes(0o600, 5, 0, 1), b"x");
    let image = made.write(LEN).unwrap();
    // The root, inode 2, is as it was.
    let root = ask(&image, "stat <2>");
    assert!(
        root.contains("Type: directory") && root.contains("User:     0"),
        "{root}"
    );
    for name in names {
        let path = quoted(&[b"/", name, b"-dir/", name].concat());
        let stat = ask(&image, &format!("stat {}", String::from_utf8_lossy(&path)));
        // A request that is not UTF-8 cannot be made from here.
        assert!(
            stat.contains("User:     5") || name == b"\xff\xfe",
            "{name:?}: {stat}"
        );
    }
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    if !installed() {
        return;
    }
    let image = || {
        let mut made = Made::new();
        made.file(b"d/f", attributes(0o644, 0, 0, 77), b"contents");
        std::fs::read(made.write(LEN).unwrap()).unwrap()
    };
    let first = image();
    // Times have whole seconds.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!(first == image());
}

#[test]
fn what_does_not_fit_is_an_error() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    made.file(b"f", attributes(0o644, 0, 0, 1), &vec![1; 60 << 20]);
    assert!(matches!(
        made.write(LEN),
        Err(Error::Failed {
            program: "debugfs",
            ..
        })
    ));
}

#[test]
fn times_and_holes_are_kept() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    let times = [
        ("early", -315_619_200, "1960-01-01"),
        ("late", 5_000_000_000, "2128-06-11"),
        ("latest", 1 << 40, "2446-05-10"),
    ];
    for (name, mtime, _) in times {
        made.file(name.as_bytes(), attributes(0o644, 0, 0, mtime), b"x");
    }
    let stretch = 100 << 30..(100 << 30) + 8;
    let map = std::slice::from_ref(&stretch);
    let blob = made
        .spool
        .store_sparse(&mut &b"somebody"[..], 200 << 30, map);
    let some = attributes(0o644, 0, 0, 1);
    made.put(b"lastlog", some, Kind::File(blob.unwrap()));
    let image = made.write(LEN).unwrap();
    let stat = ask(&image, "stat /lastlog");
    assert!(stat.contains("Size: 214748364800"), "{stat}");
    assert!(stat.contains("Blockcount: 8"), "{stat}");
    for (name, _, date) in times {
        let stat = ask(&image, &format!("stat /{name}"));
        let year = &date[..4];
        let line = stat.lines().find(|line| line.contains("mtime:")).unwrap();
        assert!(line.contains(year), "{name}: {line}");
    }
}
