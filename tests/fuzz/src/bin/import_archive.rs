//! Archives and layers of imported images: whatever they say, the tree has names that a directory can
//! have, counts that agree, and contents for each file. OCI's JSON files and what is made of them.
//!
//! The modules are compiled in by path, since the crate around them would bring all of the program
//! into an instrumented build.

#![no_main]

use std::collections::HashMap;

use cloudlet_fuzz::Input;
use libfuzzer_sys::fuzz_target;

#[path = "../../../../cloudlet/src/import/archive.rs"]
pub mod archive;
#[path = "../../../../cloudlet/src/import/entry.rs"]
pub mod entry;
#[path = "../../../../cloudlet/src/import/oci.rs"]
pub mod oci;
#[path = "../../../../cloudlet/src/import/spool.rs"]
pub mod spool;
#[path = "../../../../cloudlet/src/import/tree.rs"]
pub mod tree;

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
        header.set_entry_type(tar::EntryType::new(KINDS[usize::from(kind) % KINDS.len()]));
        let pick = |at: u8| NAMES[usize::from(at) % NAMES.len()].as_bytes();
        let gnu = header.as_gnu_mut().expect("it is one");
        gnu.name[..pick(name).len()].copy_from_slice(pick(name));
        gnu.linkname[..pick(target).len()].copy_from_slice(pick(target));
        header.set_size(if flags & 1 == 0 {
            len.into()
        } else {
            u64::MAX >> (len % 64)
        });
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
    }
    bytes
}

fn json(bytes: &[u8]) {
    if let Ok(index) = oci::parse::<oci::Index>(bytes, "index") {
        let _ = oci::pick(&index);
    }
    let _ = oci::parse::<oci::Manifest>(bytes, "manifest");
    if let Ok(config) = oci::parse::<oci::Config>(bytes, "configuration") {
        let tree = Tree::new();
        if let Ok(Some(script)) = entry::script(&config, &tree, &MemorySpool::new(0)) {
            assert!(!script.contains('\0'));
        }
    }
    let text = String::from_utf8_lossy(bytes);
    if let Ok(path) = oci::path_of("/dir".as_ref(), &text) {
        assert_eq!(path.parent(), Some("/dir/blobs/sha256".as_ref()));
    }
}

fn check(tree: &Tree, spool: &MemorySpool) {
    let mut seen: HashMap<NodeId, u32> = HashMap::new();
    let mut left = vec![ROOT];
    while let Some(id) = left.pop() {
        for (name, id) in tree.names(id) {
            assert!(!name.is_empty() && name.len() <= 255 && name != b"." && name != b"..");
            assert!(!name.iter().any(|byte| b"/\0\n".contains(byte)));
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
            let bytes = spool.load(blob, SPACE).expect("a name has its contents");
            assert_eq!(bytes.len() as u64, blob.len);
        }
    }
}
