//! Archives and layers of imported images: whatever they say, the tree has names that a directory can
//! have, counts that agree, and contents for each file. Compressed ones, sparse files, and container
//! images' JSON files with what is made of them.
//!
//! The modules are compiled in by path, since the crate around them would bring all of the program
//! into an instrumented build.

#![no_main]

use std::collections::HashMap;

use cloudlet_fuzz::Input;
use libfuzzer_sys::fuzz_target;

#[path = "../../../../cloudlet/src/import/archive.rs"]
pub mod archive;
#[path = "../../../../cloudlet/src/import/choose.rs"]
pub mod choose;
#[path = "../../../../cloudlet/src/import/docker.rs"]
pub mod docker;
#[path = "../../../../cloudlet/src/import/entries.rs"]
pub mod entries;
#[path = "../../../../cloudlet/src/import/entry.rs"]
pub mod entry;
#[path = "../../../../cloudlet/src/import/layout.rs"]
pub mod layout;
#[path = "../../../../cloudlet/src/import/oci.rs"]
pub mod oci;
#[path = "../../../../cloudlet/src/import/sniff.rs"]
pub mod sniff;
#[path = "../../../../cloudlet/src/import/sparse.rs"]
pub mod sparse;
#[path = "../../../../cloudlet/src/import/spool.rs"]
pub mod spool;
#[path = "../../../../cloudlet/src/import/tree.rs"]
pub mod tree;
#[path = "../../../../cloudlet/src/import/unpack.rs"]
pub mod unpack;
#[path = "../../../../cloudlet/src/import/xattrs.rs"]
pub mod xattrs;

use archive::Kind;
use spool::{MemorySpool, Spool};
use tree::{NodeId, ROOT, Tree};

/// All contents together, and all of an archive.
const SPACE: u64 = 64 << 10;
const ARCHIVE_LEN_MAX: u64 = 1 << 20;

/// As in the module that these are from.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fuzz_target!(|data: &[u8]| {
    let mut tree = Tree::new();
    let mut spool = MemorySpool::new(SPACE);
    let mut input = Input(data);
    match input.byte() % 4 {
        0 => read(input.0, &mut tree, &mut spool, Kind::Whole),
        1 => read(input.0, &mut tree, &mut spool, Kind::Layer),
        2 => {
            while !input.0.is_empty() {
                let layer = forged(&mut input);
                read(&layer, &mut tree, &mut spool, Kind::Layer);
            }
        }
        _ => json(input.0),
    }
    check(&tree, &spool);
});

fn read(bytes: &[u8], tree: &mut Tree, spool: &mut MemorySpool, kind: Kind) {
    // An error is an answer as well; the tree is checked all the same.
    let _ = archive::read(bytes, tree, spool, kind, ARCHIVE_LEN_MAX);
}

/// Up to eight entries with right checksums, of few different names so that they meet.
fn forged(input: &mut Input<'_>) -> Vec<u8> {
    const KINDS: &[u8] = b"01234567LKxgSQ\0";
    const NAMES: [&str; 12] = [
        "a",
        "b",
        "a/b",
        "a/b/c",
        "/a",
        ".wh.a",
        "a/.wh.b",
        "a/.wh..wh..opq",
        ".wh..wh..opq",
        "../a",
        ".",
        "b/../a",
    ];
    let mut bytes = Vec::new();
    for _ in 0..input.byte() % 8 {
        let [kind, name, target, len, flags] = input.array();
        let mut header = tar::Header::new_gnu();
        let kind = KINDS[usize::from(kind) % KINDS.len()];
        header.set_entry_type(tar::EntryType::new(kind));
        let pick = |at: u8| NAMES[usize::from(at) % NAMES.len()].as_bytes();
        let gnu = header.as_gnu_mut().expect("it is one");
        gnu.name[..pick(name).len()].copy_from_slice(pick(name));
        gnu.linkname[..pick(target).len()].copy_from_slice(pick(target));
        header.set_size(if flags & 1 == 0 {
            len.into()
        } else {
            u64::MAX >> (len % 64)
        });
        if kind == b'S' {
            forge_map(input, header.as_mut_bytes());
        }
        header.set_mode(flags.into());
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        let body = input.0.len().min(len.into());
        let (now, rest) = input.0.split_at(body);
        bytes.extend_from_slice(now);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        input.0 = rest;
        if flags & 2 != 0 {
            bytes.extend(records(input));
        }
    }
    bytes
}

/// Stretches of an old sparse file's header, and its length.
fn forge_map(input: &mut Input<'_>, header: &mut [u8]) {
    for at in [386, 410, 434] {
        let [offset, len] = input.array();
        let text = format!("{offset:011o}\0{len:011o}\0");
        header[at..at + 24].copy_from_slice(text.as_bytes());
    }
    let [more, len] = input.array();
    header[482] = more & 1;
    header[483..494].copy_from_slice(format!("{len:011o}").as_bytes());
}

/// A few pax records about the next entry, as an entry.
fn records(input: &mut Input<'_>) -> Vec<u8> {
    const KEYS: [&str; 12] = [
        "path",
        "size",
        "mtime",
        "GNU.sparse.major",
        "GNU.sparse.size",
        "GNU.sparse.realsize",
        "GNU.sparse.offset",
        "GNU.sparse.numbytes",
        "GNU.sparse.numbytes",
        "GNU.sparse.map",
        "GNU.sparse.name",
        "uid",
    ];
    let mut body = String::new();
    for _ in 0..input.byte() % 8 {
        let [key, value, more] = input.array();
        let key = KEYS[usize::from(key) % KEYS.len()];
        let value = match more % 4 {
            0 => value.to_string(),
            1 => format!("-{value}.5"),
            2 => format!("{value},1,{more},2"),
            _ => u64::MAX.to_string(),
        };
        let len = key.len() + value.len() + 5;
        body.push_str(&format!("{len:02} {key}={value}\n"));
    }
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::XHeader);
    header.set_size(body.len() as u64);
    header.set_cksum();
    let mut bytes = [header.as_bytes(), body.as_bytes()].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn json(bytes: &[u8]) {
    if let Ok(index) = oci::parse::<oci::Index>(bytes, "index") {
        for name in [None, Some("a")] {
            if let Ok(entry) = choose::pick(&index.manifests, name, 3) {
                assert!(index.manifests.iter().any(|other| std::ptr::eq(other, entry)));
            }
        }
    }
    if let Ok(images) = oci::parse::<Vec<docker::Entry>>(bytes, "manifest") {
        let _ = docker::choose(&images, Some("a"));
    }
    let _ = oci::parse::<oci::Manifest>(bytes, "manifest");
    if let Ok(config) = oci::parse::<oci::Config>(bytes, "configuration") {
        let tree = Tree::new();
        let _ = entry::file(&config, &tree, &MemorySpool::new(0));
    }
    let text = String::from_utf8_lossy(bytes);
    if let Ok(name) = oci::name_of(&text) {
        let digits = name.strip_prefix("blobs/sha256/").expect("it is there");
        assert!(digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
    let _ = docker::digest_of(&text);
}

fn check(tree: &Tree, spool: &MemorySpool) {
    let mut seen: HashMap<NodeId, u32> = HashMap::new();
    let mut left = vec![ROOT];
    while let Some(id) = left.pop() {
        for (name, id) in tree.names(id) {
            assert!(!name.is_empty() && name.len() <= 255 && name != b"." && name != b"..");
            assert!(!name.iter().any(|byte| b"/\0".contains(byte)));
            let count = seen.entry(id).or_default();
            *count += 1;
            if *count == 1 {
                left.push(id);
            }
        }
    }
    for (id, count) in seen {
        let node = tree.node(id);
        assert_eq!(node.names, count);
        if let tree::Kind::File(blob) = node.kind {
            assert!(blob.taken <= SPACE);
            // Holes may be longer than all that there is room for.
            if blob.len <= SPACE {
                let bytes = spool.load(blob, SPACE).expect("a name has its contents");
                assert_eq!(bytes.len() as u64, blob.len);
            }
        }
    }
}
