//! File systems made of trees, held against e2fsck and read back with debugfs. Without e2fsprogs these
//! tests look at nothing, which is a failure where `CI` is set.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use proptest::prelude::*;

use super::super::spool::{FileSpool, Spool};
use super::super::tree::{Attributes, Kind};
use super::*;

pub(super) const LEN: u64 = 64 << 20;

pub(super) struct Made {
    pub(super) dir: tempfile::TempDir,
    pub(super) tree: Tree,
    pub(super) spool: FileSpool,
}

impl Made {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let contents = dir.path().join("contents");
        std::fs::create_dir(&contents).unwrap();
        Self {
            spool: FileSpool::new(&contents, 1 << 40),
            tree: Tree::new(),
            dir,
        }
    }

    pub(super) fn put(&mut self, path: &[u8], attributes: Attributes, kind: Kind) {
        self.tree
            .put(path, attributes, kind, &mut self.spool)
            .unwrap();
    }

    pub(super) fn file(&mut self, path: &[u8], attributes: Attributes, contents: &[u8]) {
        let len = contents.len() as u64;
        let blob = self.spool.store(&mut &*contents, len).unwrap();
        self.put(path, attributes, Kind::File(blob));
    }

    pub(super) fn plan(&self) -> Plan<'_> {
        plan(&self.tree, &self.dir.path().join("contents")).unwrap()
    }

    pub(super) fn write(&self, len: u64) -> Result<PathBuf, Error> {
        let image = self.dir.path().join("image");
        let file = File::create(&image).unwrap();
        let mut last = 0;
        self.plan().write(&file, len, &mut |done, total| {
            assert!(last < done && done <= total, "{done} of {total}");
            last = done;
        })?;
        Ok(image)
    }

    /// Writes it, and has e2fsck look at it.
    pub(super) fn checked(&self, len: u64) -> PathBuf {
        let image = self.write(len).unwrap();
        check(&image);
        image
    }
}

fn program(name: &str) -> Command {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(OsString::from(":/usr/sbin:/sbin"));
    let mut command = Command::new(name);
    command.env("PATH", path).env("LC_ALL", "C");
    command.env_remove("DEBUGFS_PAGER");
    command
}

/// e2fsck has nothing to say but how much there is.
fn check(image: &Path) {
    let output = program("e2fsck").args(["-f", "-n"]).arg(image).output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let passes = |line: &&str| !line.starts_with("Pass ") && !line.starts_with("cloudlet: ");
    let complaints: Vec<&str> = said.lines().filter(passes).collect();
    assert!(output.status.success() && complaints.is_empty(), "{said}");
}

/// What debugfs answers to a request.
pub(super) fn ask(image: &Path, request: &str) -> String {
    let output = program("debugfs")
        .arg("-R")
        .arg(request)
        .arg(image)
        .output();
    String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
}

pub(super) fn installed() -> bool {
    let found = program("debugfs").arg("-V").output().is_ok();
    let must = std::env::var_os("CI").is_some();
    assert!(found || !must, "e2fsprogs is not installed");
    found
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

pub(super) const PLAIN: Attributes = Attributes {
    mode: 0o644,
    uid: 0,
    gid: 0,
    mtime: 1,
    nanos: 0,
};

#[test]
fn everything_arrives_with_its_attributes() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    made.file(
        b"a/big",
        attributes(0o4755, 100_000, 7, 12345),
        &vec![7; 300_000],
    );
    made.put(
        b"a/link",
        PLAIN,
        Kind::Symlink(b"/some where/\"else\"".to_vec()),
    );
    let long = "x".repeat(3000);
    made.put(b"a/long", PLAIN, Kind::Symlink(long.clone().into_bytes()));
    for len in [59, 60] {
        let name = format!("a/link-{len}");
        made.put(name.as_bytes(), PLAIN, Kind::Symlink(vec![b'y'; len]));
    }
    made.put(b"null", attributes(0o666, 0, 0, 1), Kind::Character(1, 3));
    made.put(b"disk", attributes(0o660, 0, 6, 1), Kind::Block(259, 300));
    made.put(b"pipe", attributes(0o600, 0, 0, 1), Kind::Fifo);
    made.file(b"empty", PLAIN, b"");
    for number in 0..200 {
        let name = format!("links/with-a-name-that-takes-some-room-{number}");
        made.tree
            .link(name.as_bytes(), b"a/big", &mut made.spool)
            .unwrap();
    }
    let image = made.checked(LEN);
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
    assert_eq!(ask(&image, "cat /a/long"), long);
    assert!(ask(&image, "stat /a/link-59").contains("Fast link dest"));
    assert_eq!(ask(&image, "cat /a/link-60"), "y".repeat(60));
    assert!(ask(&image, "stat /null").contains("character special"));
    assert!(ask(&image, "stat /disk").contains("259:300"));
    assert!(ask(&image, "stat /pipe").contains("FIFO"));
    assert!(ask(&image, "stat /empty").contains("Size: 0"));
    let out = made.dir.path().join("out");
    let dump = "dump /links/with-a-name-that-takes-some-room-150";
    ask(&image, &format!("{dump} {}", out.display()));
    assert_eq!(std::fs::read(out).unwrap(), vec![7; 300_000]);
}

/// The names in a directory as debugfs lists them, in its way of writing bytes (`\xNN`).
pub(super) fn listed(image: &Path, path: &str) -> Vec<String> {
    let rows = ask(image, &format!("ls -p {path}"));
    let name = |row: &str| Some(row.split('/').nth(5)?.to_owned());
    rows.lines()
        .filter_map(name)
        // Nodes of a tree look like an entry without a name.
        .filter(|name| !["", ".", ".."].contains(&name.as_str()))
        .collect()
}

#[test]
fn names_are_taken_as_they_are() {
    if !installed() {
        return;
    }
    let long = "n".repeat(255);
    let names: [&[u8]; 13] = [
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
        b"carriage\rreturn",
        b"line\tfeed\x1b[2J",
        long.as_bytes(),
    ];
    let mut made = Made::new();
    for name in names {
        made.file(&[b"files/", name].concat(), PLAIN, name);
        made.file(&[b"dirs/", name, b"/", name].concat(), PLAIN, name);
    }
    let image = made.checked(LEN);
    let out = made.dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    // It restores owners, which takes a privilege, and names and contents, which does not.
    for dir in ["files", "dirs"] {
        ask(&image, &format!("rdump /{dir} {}", out.display()));
    }
    for name in names {
        use std::os::unix::ffi::OsStrExt;
        let name_os = std::ffi::OsStr::from_bytes(name);
        for path in [
            out.join("files").join(name_os),
            out.join("dirs").join(name_os).join(name_os),
        ] {
            assert_eq!(std::fs::read(&path).unwrap(), name, "{path:?}");
        }
    }
}

#[test]
fn times_reach_from_1901_to_2446() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    for (name, time) in [
        (&b"before"[..], -1),
        (b"first", -(1 << 31)),
        (b"now", 1_700_000_000),
        (b"after", 1 << 31),
        (b"last", (3 << 32) + (1 << 31) - 1),
    ] {
        let mut attributes = attributes(0o644, 0, 0, time);
        attributes.nanos = 999_999_999;
        made.file(name, attributes, b"");
    }
    let image = made.checked(LEN);
    // Two bits below the nanoseconds say how often the seconds went round.
    for (name, time) in [
        ("before", "0xffffffff:ee6b27fc"),
        ("first", "0x80000000:ee6b27fc"),
        ("now", "0x6553f100:ee6b27fc"),
        ("after", "0x80000000:ee6b27fd"),
        ("last", "0x7fffffff:ee6b27ff"),
    ] {
        let stat = ask(&image, &format!("stat /{name}"));
        assert!(stat.contains(&format!("mtime: {time}")), "{stat}");
    }
}

#[test]
fn a_source_has_its_own_lost_and_found() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    made.file(b"lost+found/#12", PLAIN, b"found");
    let image = made.checked(LEN);
    assert_eq!(ask(&image, "cat /lost+found/#12"), "found");
    assert!(ask(&image, "stat <11>").contains("Size: 16384"));
    let mut made = Made::new();
    made.file(b"lost+found", PLAIN, b"no directory");
    let image = made.checked(LEN);
    assert!(ask(&image, "stat <11>").contains("Type: directory"));
}

#[test]
fn holes_stay_holes() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    let len = 200 << 30;
    let last = 4096 * 1234..4096 * 1234 + 292;
    let mut parts: Vec<_> = (1..1000_u64).map(|at| at << 20..(at << 20) + 10).collect();
    parts.insert(0, last.clone());
    parts.sort_by_key(|part| part.start);
    let all = parts.iter().map(|part| part.end - part.start).sum::<u64>();
    let bytes = vec![b'x'; usize::try_from(all).unwrap()];
    let blob = made.spool.store_sparse(&mut &*bytes, len, &parts).unwrap();
    made.put(b"lastlog", PLAIN, Kind::File(blob));
    let empty = made
        .spool
        .store_sparse(&mut io::empty(), 1 << 40, &[])
        .unwrap();
    made.put(b"hole", PLAIN, Kind::File(empty));
    let mut zeros = vec![0; 1 << 20];
    zeros[1 << 19] = 1;
    made.file(b"zeros", PLAIN, &zeros);
    let image = made.checked(LEN);
    let stat = ask(&image, "stat /lastlog");
    // A block of each part, and of the tree over more extents than the inode holds.
    assert!(stat.contains(&format!("Size: {len}")), "{stat}");
    assert!(
        stat.contains(&format!("Blockcount: {}", (1000 + 3) * 8)),
        "{stat}"
    );
    let stat = ask(&image, "stat /hole");
    assert!(stat.contains(&format!("Size: {}", 1_u64 << 40)) && stat.contains("Blockcount: 0"));
    assert!(ask(&image, "stat /zeros").contains("Blockcount: 8\n"));
    assert_eq!(ask(&image, "cat /zeros").as_bytes(), zeros);
    let place = ask(&image, "bmap /lastlog 1234");
    let place: u64 = place.trim().parse().unwrap();
    let mut block = [0; 4096];
    let file = File::open(&image).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut block, place * 4096).unwrap();
    assert!(block[..292].iter().all(|&byte| byte == b'x') && block[292..] == [0; 4096 - 292]);
}

#[test]
fn extended_attributes_lie_in_the_inode_or_in_a_block() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    let capability = (
        b"security.capability".to_vec(),
        b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(),
    );
    let user = |name: &str, len| (format!("user.{name}").into_bytes(), vec![b'v'; len]);
    for (name, xattrs) in [
        ("inode", vec![capability.clone()]),
        (
            "block",
            vec![
                user("b", 3000),
                user("a", 0),
                capability.clone(),
                user("odd", 7),
            ],
        ),
        ("none", vec![(b"security.other".to_vec(), Vec::new())]),
    ] {
        made.file(name.as_bytes(), PLAIN, name.as_bytes());
        made.tree.set_xattrs(name.as_bytes(), xattrs).unwrap();
    }
    made.tree.set_xattrs(b"/", vec![user("root", 1)]).unwrap();
    let image = made.checked(LEN);
    let value = |file: &str, name: &str| {
        let out = made.dir.path().join("value");
        let _ = std::fs::remove_file(&out);
        ask(
            &image,
            &format!("ea_get -f {} {file} {name}", out.display()),
        );
        std::fs::read(out).ok()
    };
    for file in ["/inode", "/block"] {
        assert_eq!(
            value(file, "security.capability"),
            Some(capability.1.clone())
        );
    }
    assert_eq!(value("/block", "user.b"), Some(vec![b'v'; 3000]));
    assert_eq!(value("/block", "user.a"), Some(Vec::new()));
    assert_eq!(value("/block", "user.odd"), Some(vec![b'v'; 7]));
    assert_eq!(value("/", "user.root"), Some(vec![b'v']));
    assert!(ask(&image, "stat /inode").contains("File ACL: 0"));
    assert!(!ask(&image, "stat /block").contains("File ACL: 0"));
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
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

/// What a random tree is made of: a path's parts by number, and what is there.
fn entries() -> impl Strategy<Value = Vec<(Vec<u8>, u8, u16)>> {
    let part = prop_oneof![
        4 => prop::collection::vec(1..=255_u8, 1..8),
        1 => prop::collection::vec(prop::num::u8::ANY, 200..=255),
    ];
    let path = prop::collection::vec(part, 1..4);
    let joined = path.prop_map(|parts| parts.join(&b'/'));
    prop::collection::vec((joined, any::<u8>(), any::<u16>()), 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_tree_makes_a_sound_file_system(entries in entries()) {
        let mut made = Made::new();
        for (path, kind, number) in &entries {
            let attributes = attributes(u32::from(*number), (*number).into(), 0, (*number).into());
            let len = u64::from(*number);
            // What cannot be is refused, and the rest goes on.
            let _ = match kind % 8 {
                0 => made.tree.put_directory(path, attributes, &mut made.spool),
                1 => made.tree.link(path, &entries[0].0, &mut made.spool),
                2 => made.tree.put(path, attributes, Kind::Symlink(vec![b't'; usize::from(*number % 4200)]), &mut made.spool),
                3 => made.tree.put(path, attributes, Kind::Character((*number % 4096).into(), (*number).into()), &mut made.spool),
                4 => made.tree.set_xattrs(path, vec![(b"user.x".to_vec(), vec![1; usize::from(*number % 4000)])]),
                kind => {
                    let map = 0..if kind == 5 { len } else { len / 7 };
                    let mut source = io::repeat(kind);
                    let blob = made.spool.store_sparse(&mut source, len << 4, &[map]).unwrap();
                    made.tree.put(path, attributes, Kind::File(blob), &mut made.spool)
                }
            };
        }
        let plan = made.plan();
        if installed() && plan.smallest() < 1 << 30 {
            made.checked(plan.smallest());
        }
    }
}
