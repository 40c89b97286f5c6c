//! What the agent says to the host: replies within limits; and of a tree, nothing but what belongs
//! below the destination, whatever the stream says and whichever links it makes.

#![no_main]

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use cloudlet_agent::protocol::{Decoder, Frame, HEADER_LEN, Reply};
use cloudlet_agent::tree::{Entry, Meta, Receiver};
use cloudlet_fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// Names that a hostile guest would try, and some to build with.
const NAMES: [&[u8]; 8] = [
    b"a",
    b"b",
    b"",
    b"..",
    b".",
    b"../outside",
    b"link",
    b".cloudlet-partial-1-0",
];
const TARGETS: [&[u8]; 4] = [b"../outside", b"..", b"/", b"a"];

static PLACE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::Builder::new().tempdir_in("/dev/shm");
    let dir = dir.or_else(|_| tempfile::tempdir()).expect("a directory");
    fs::create_dir(dir.path().join("outside")).expect("a directory");
    fs::write(dir.path().join("outside/kept"), "kept").expect("a file");
    dir
});

fuzz_target!(|data: &[u8]| {
    let mut decoder = Decoder::default();
    let _ = decoder.fill(data);
    while let Ok(Some(frame)) = decoder.next_frame() {
        check(frame);
    }
    if let Some((&kind, payload)) = data.split_first() {
        check(Frame { kind, payload });
    }
    receive(data);
});

fn check(frame: Frame<'_>) {
    let Ok(reply) = Reply::decode(frame) else {
        return;
    };
    let mut again = Vec::new();
    reply.encode(&mut again).expect("it was short enough");
    assert_eq!(again[0], frame.kind);
    assert_eq!(&again[HEADER_LEN..], frame.payload);
}

/// Makes a tree of what `data` says, beside a directory that must stay as it is.
fn receive(data: &[u8]) {
    let root = PLACE.path();
    let inside = root.join("inside");
    let _ = fs::remove_dir_all(&inside);
    fs::create_dir(&inside).expect("a directory");
    let mut receiver = Receiver::new(&inside, None, 0o777).expect("a destination");
    let mut input = Input(data);
    // Hidden from the limits of a directory that cannot be read again afterwards.
    let meta = Meta {
        mode: 0o700,
        seconds: 1,
        nanos: 1,
    };
    let _ = receiver.take(Entry::Directory { name: b"", meta });
    while !input.0.is_empty() {
        let name = NAMES[usize::from(input.byte()) % NAMES.len()];
        let target = TARGETS[usize::from(input.byte()) % TARGETS.len()];
        let entry = match input.byte() % 8 {
            0 => Entry::Directory { name, meta },
            1 => Entry::File { name, meta },
            2 => Entry::Link { name, meta, target },
            3 => Entry::Data(b"data"),
            4 => Entry::Data(b""),
            6 => Entry::Capability(&[1; 20]),
            5 => Entry::Hole(u64::MAX >> (input.byte() % 64)),
            _ => Entry::Up,
        };
        if receiver.take(entry).is_err() {
            break;
        }
    }
    drop(receiver);
    assert_eq!(names(root), ["inside", "outside"]);
    assert_eq!(names(&root.join("outside")), ["kept"]);
    let kept = fs::read(root.join("outside/kept")).expect("it is there");
    assert_eq!(kept, b"kept");
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("it is there");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
