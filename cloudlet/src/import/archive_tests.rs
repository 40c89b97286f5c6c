//! Archives as tar writes them, layers with whiteouts, and archives that lie.

use std::io::Write;

use super::super::spool::MemorySpool;
use super::super::tree::{NodeId, ROOT};
use super::*;

const SPACE: u64 = 1 << 20;

fn header(kind: EntryType, len: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(len);
    header.set_mode(0o100_750);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(9);
    header
}

/// An archive of entries: kind, path, contents or target.
fn archive(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for &(kind, path, text) in entries {
        let linked = matches!(kind, EntryType::Symlink | EntryType::Link);
        let len = if linked { 0 } else { text.len() as u64 };
        let mut header = header(kind, len);
        // The builder would refuse what these tests are about.
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        if linked {
            header.as_gnu_mut().unwrap().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        if kind == EntryType::Char {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        let contents = if linked { "" } else { text };
        builder.append(&header, contents.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

struct Made {
    tree: Tree,
    spool: MemorySpool,
}

impl Made {
    fn new() -> Self {
        Self {
            tree: Tree::new(),
            spool: MemorySpool::new(SPACE),
        }
    }

    fn read(&mut self, bytes: &[u8], kind: Kind) -> Result<(), Error> {
        read(bytes, &mut self.tree, &mut self.spool, kind, len_max(SPACE))
    }

    fn contents(&self, path: &str) -> Vec<u8> {
        match self
            .tree
            .node(self.tree.find(path.as_bytes()).unwrap())
            .kind
        {
            Node::File(blob) => self.spool.load(blob, SPACE).unwrap(),
            _ => panic!("{path} is no file"),
        }
    }

    fn paths(&self) -> Vec<String> {
        fn inside(tree: &Tree, id: NodeId, path: &str, found: &mut Vec<String>) {
            for (name, id) in tree.names(id) {
                let path = format!("{path}/{}", String::from_utf8_lossy(name));
                found.push(path.clone());
                inside(tree, id, &path, found);
            }
        }
        let mut found = Vec::new();
        inside(&self.tree, ROOT, "", &mut found);
        found
    }
}

fn whole(bytes: &[u8]) -> Result<Made, Error> {
    let mut made = Made::new();
    made.read(bytes, Kind::Whole).map(|()| made)
}

#[test]
fn all_kinds_arrive_with_their_attributes() {
    let bytes = archive(&[
        (EntryType::Directory, "d/", ""),
        (EntryType::Regular, "d/f", "contents"),
        (EntryType::Symlink, "s", "d/f"),
        (EntryType::Link, "h", "d/f"),
        (EntryType::Fifo, "p", ""),
        (EntryType::Char, "c", ""),
    ]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&bytes).unwrap();
    let zstd = zstd::encode_all(&bytes[..], 1).unwrap();
    for bytes in [&bytes, &gzip.finish().unwrap(), &zstd] {
        let made = whole(bytes).unwrap();
        assert_eq!(made.paths(), ["/c", "/d", "/d/f", "/h", "/p", "/s"]);
        let file = made.tree.node(made.tree.find(b"s").unwrap());
        assert_eq!(file.names, 2);
        let expected = Attributes {
            mode: 0o750,
            uid: 7,
            gid: 8,
            mtime: 9,
            nanos: 0,
        };
        assert_eq!(file.attributes, expected);
    }
}

#[test]
fn long_names_of_both_kinds_arrive() {
    let long = "n".repeat(200);
    let deep = format!("{long}/{long}");
    let bytes = archive(&[
        (
            EntryType::GNULongName,
            "././@LongLink",
            &format!("{deep}\0"),
        ),
        (EntryType::Regular, "short", "1"),
        (
            EntryType::XHeader,
            "pax",
            &format!("{} path={deep}2\n18 uid=4000000000\n", deep.len() + 11),
        ),
        (EntryType::Regular, "short", "2"),
        (EntryType::Regular, "short", "3"),
    ]);
    let made = whole(&bytes).unwrap();
    assert_eq!(
        made.paths(),
        [
            format!("/{long}"),
            format!("/{deep}"),
            format!("/{deep}2"),
            "/short".into()
        ]
    );
    let second = made.tree.find(format!("{deep}2").as_bytes()).unwrap();
    assert_eq!(made.tree.node(second).attributes.uid, 4_000_000_000);
}

#[test]
fn layers_have_whiteouts_and_whole_archives_have_not() {
    let lower = archive(&[
        (EntryType::Regular, "d/a", ""),
        (EntryType::Regular, "d/b", ""),
        (EntryType::Regular, "o/old", ""),
        (EntryType::Regular, "x", ""),
    ]);
    let upper = archive(&[
        (EntryType::Regular, "o/new", ""),
        (EntryType::Regular, "o/.wh..wh..opq", ""),
        (EntryType::Regular, "d/.wh.a", ""),
        (EntryType::Regular, ".wh.x", ""),
        (EntryType::Regular, ".wh.", ""),
        (EntryType::Regular, ".wh..wh.plnk", ""),
    ]);
    let mut made = Made::new();
    made.read(&lower, Kind::Layer).unwrap();
    made.read(&upper, Kind::Layer).unwrap();
    assert_eq!(made.paths(), ["/d", "/d/b", "/o", "/o/new"]);

    assert!(
        whole(&upper)
            .unwrap()
            .paths()
            .contains(&"/.wh.x".to_owned())
    );
}

#[test]
fn whiteouts_cannot_lead_out() {
    let mut made = Made::new();
    for path in ["../.wh.etc", "a/../.wh.b", ".wh...", "x/.wh..."] {
        let bytes = archive(&[(EntryType::Regular, path, "")]);
        assert!(made.read(&bytes, Kind::Layer).is_err(), "{path}");
    }
}

#[test]
fn paths_that_lead_out_are_refused() {
    for entry in [
        (EntryType::Regular, "../x", ""),
        (EntryType::Directory, "a/../..", ""),
        (EntryType::Link, "x", "../../etc/passwd"),
        (EntryType::Link, "x", "/etc/passwd"),
    ] {
        assert!(whole(&archive(&[entry])).is_err(), "{entry:?}");
    }
    // A link that leads out leads to the root of the tree.
    let made = whole(&archive(&[
        (EntryType::Symlink, "s", "/../../"),
        (EntryType::Regular, "s/x", ""),
    ]))
    .unwrap();
    assert_eq!(made.paths(), ["/s", "/x"]);
}

#[test]
fn lengths_that_lie_are_refused() {
    // Contents that do not fit.
    let mut huge = header(EntryType::Regular, SPACE + 1);
    huge.set_path("f").unwrap();
    huge.set_cksum();
    assert!(whole(huge.as_bytes()).is_err());
    // Fewer contents than the header says.
    let mut cut = header(EntryType::Regular, 1000);
    cut.set_path("f").unwrap();
    cut.set_cksum();
    assert!(whole(&[&cut.as_bytes()[..], &[0; 512]].concat()).is_err());
    // Records about one entry that do not end.
    for kind in [
        EntryType::GNULongName,
        EntryType::GNULongLink,
        EntryType::XHeader,
    ] {
        let mut endless = header(kind, 1 << 40);
        endless.set_cksum();
        let error = whole(endless.as_bytes()).err();
        assert!(
            matches!(error, Some(Error::Record(len)) if len == 1 << 40),
            "{kind:?}"
        );
    }
    // A size that another record contradicts: what follows is no header, or none at all.
    for record in ["10 size=5\n", "12 size=900\n"] {
        let bytes = archive(&[
            (EntryType::XHeader, "pax", record),
            (EntryType::Regular, "f", ""),
        ]);
        assert!(whole(&bytes[..1536]).is_err());
    }
    // Numbers that are none.
    for text in ["12 size=-10\n", "11 size=1x\n", "7 uid=\n", "10 mtime=\n"] {
        let bytes = archive(&[
            (EntryType::XHeader, "pax", text),
            (EntryType::Regular, "f", ""),
        ]);
        assert!(matches!(whole(&bytes), Err(Error::Number(_))), "{text}");
    }
}

#[test]
fn an_archive_that_unpacks_without_end_is_stopped() {
    let mut endless = header(EntryType::Directory, 1 << 30);
    endless.set_path("d").unwrap();
    endless.set_cksum();
    let bytes = [&endless.as_bytes()[..], &vec![0; 1 << 20]].concat();
    let packed = zstd::encode_all(&bytes[..], 1).unwrap();
    let mut made = Made::new();
    let error = read(
        &packed[..],
        &mut made.tree,
        &mut made.spool,
        Kind::Whole,
        64 << 10,
    );
    assert!(error.unwrap_err().to_string().contains("cannot read"));
}

#[test]
fn unknown_kinds_and_no_entries_are_refused() {
    let unknown = archive(&[(EntryType::new(b'Q'), "q", "")]);
    assert!(matches!(
        whole(&unknown),
        Err(Error::Kind { kind: 'Q', .. })
    ));
    for bytes in [vec![0; 1024], vec![0; 10_240], vec![0; 512]] {
        assert!(matches!(whole(&bytes), Err(Error::Nothing)));
        // A layer may change nothing.
        Made::new().read(&bytes, Kind::Layer).unwrap();
    }
    let mut damaged = archive(&[(EntryType::Regular, "a", ""), (EntryType::Regular, "b", "")]);
    damaged[512] ^= 1;
    assert!(matches!(whole(&damaged), Err(Error::Header)));
}

#[test]
fn the_size_of_a_record_counts() {
    let bytes = archive(&[
        (EntryType::XHeader, "pax", "11 size=17\n"),
        (EntryType::Regular, "f", ""),
    ]);
    let end = bytes.len() - 1024;
    let mut body = b"seventeen bytes.\n".to_vec();
    body.resize(512, 0);
    let next = archive(&[(EntryType::Regular, "g", "next")]);
    let made = whole(&[&bytes[..end], &body, &next].concat()).unwrap();
    assert_eq!(made.contents("f"), b"seventeen bytes.\n");
    assert_eq!(made.contents("g"), b"next");
}

#[test]
fn values_of_records_may_have_line_feeds() {
    let bytes = archive(&[
        (
            EntryType::XHeader,
            "pax",
            "22 comment=a\n8 uid=5\n\n13 path=long\n",
        ),
        (EntryType::Regular, "short", ""),
    ]);
    let made = whole(&bytes).unwrap();
    assert_eq!(made.paths(), ["/long"]);
    let file = made.tree.node(made.tree.find(b"long").unwrap());
    assert_eq!(file.attributes.uid, 7);
}

#[test]
fn a_hard_link_and_a_whiteout_of_its_file_go_together_in_either_order() {
    let lower = archive(&[(EntryType::Regular, "etc/old", "1")]);
    let link = (EntryType::Link, "etc/new", "etc/old");
    let hide = (EntryType::Regular, "etc/.wh.old", "");
    let opaque = (EntryType::Regular, "etc/.wh..wh..opq", "");
    let above = (EntryType::Regular, ".wh.etc", "");
    for entries in [
        [link, hide],
        [hide, link],
        [link, opaque],
        [opaque, link],
        [link, above],
        [above, link],
    ] {
        let mut made = Made::new();
        made.read(&lower, Kind::Layer).unwrap();
        made.read(&archive(&entries), Kind::Layer).unwrap();
        assert_eq!(made.paths(), ["/etc", "/etc/new"], "{entries:?}");
        assert_eq!(made.contents("etc/new"), b"1");
        let file = made.tree.node(made.tree.find(b"etc/new").unwrap());
        assert_eq!(file.names, 1);
        // What is hidden is gone for the layers above.
        let late = archive(&[(EntryType::Link, "late", "etc/old")]);
        assert!(made.read(&late, Kind::Layer).is_err());
    }
}

#[test]
fn times_of_headers_may_be_before_1970_and_after_2106() {
    for seconds in [-315_619_200_i64, -1, 1 << 33] {
        let mut header = header(EntryType::Regular, 0);
        header.set_path("f").unwrap();
        let field = &mut header.as_gnu_mut().unwrap().mtime;
        *field = [if seconds < 0 { 0xff } else { 0 }; 12];
        field[0] |= 0x80;
        field[4..].copy_from_slice(&seconds.to_be_bytes());
        header.set_cksum();
        let made = whole(header.as_bytes()).unwrap();
        let file = made.tree.node(made.tree.find(b"f").unwrap());
        assert_eq!(file.attributes.mtime, seconds);
    }
}

#[test]
fn capabilities_and_users_own_attributes_are_kept() {
    let capability: &[u8] = b"\x01\0\0\x02\n\0\0\0\n\0\0\0\0\0\0\0\0\0\0\0";
    let records = [
        (&b"SCHILY.xattr.security.capability"[..], capability),
        (b"SCHILY.xattr.user.note", b"a=b"),
        (b"SCHILY.xattr.security.selinux", b"system_u"),
        (b"SCHILY.acl.access", b"user::rwx"),
    ];
    let mut bytes = Vec::new();
    for (path, kind) in [("ping", EntryType::Regular), ("dir", EntryType::Directory)] {
        let mut body = Vec::new();
        for (key, value) in records {
            // The length counts its own digits, two of them here.
            let len = 2 + key.len() + value.len() + 3;
            body.extend_from_slice(format!("{len} ").as_bytes());
            body.extend_from_slice(&[key, b"=", value, b"\n"].concat());
        }
        let mut about = header(EntryType::XHeader, body.len() as u64);
        about.set_cksum();
        bytes.extend_from_slice(about.as_bytes());
        body.resize(body.len().next_multiple_of(512), 0);
        bytes.extend_from_slice(&body);
        bytes.extend_from_slice(&archive(&[(kind, path, "")])[..512]);
    }
    let mut made = Made::new();
    made.read(&bytes, Kind::Whole).unwrap();
    let xattrs = |path: &str| {
        let id = made.tree.find(path.as_bytes()).unwrap();
        made.tree.node(id).xattrs.clone()
    };
    let own = |name: &[u8], value: &[u8]| (name.to_vec(), value.to_vec());
    let note = own(b"user.note", b"a=b");
    assert_eq!(
        xattrs("ping"),
        [own(b"security.capability", capability), note.clone()]
    );
    assert_eq!(xattrs("dir"), [note]);
    let left_out: Vec<_> = made.tree.left_out().iter().collect();
    let expected = [
        ("security.capability", 1),
        ("security.selinux", 2),
        ("system.posix_acl_access", 2),
    ];
    assert_eq!(left_out, expected);
}
