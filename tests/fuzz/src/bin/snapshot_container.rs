//! A machine state container, raw and with right hashes: refused, or written back the same.

#![no_main]

use cloudlet_snapshot::{FORMAT_VERSION, MAGIC, Reader, Writer};
use libfuzzer_sys::fuzz_target;

const PREFIX_BYTES: usize = 64;
const ENTRY_BYTES: usize = 104;

fn check(bytes: &[u8]) {
    let Ok(mut reader) = Reader::parse(bytes) else {
        return;
    };
    let names: Vec<&str> = reader.names().collect();
    let mut writer = Writer::new();
    for name in names {
        let (version, content) = reader.take(name).expect("it was named");
        writer
            .section(name, version, content)
            .expect("it was in a container");
    }
    reader.finish().expect("all was taken");
    assert_eq!(writer.finish(), bytes);
}

/// Makes the hashes, counts and offsets of a container right, as far as there are bytes.
fn repaired(count: u8, data: &[u8]) -> Vec<u8> {
    let count = usize::from(count % 6);
    let contents = PREFIX_BYTES + count * ENTRY_BYTES;
    let mut bytes = vec![0; PREFIX_BYTES];
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().max(contents), 0);
    let total = bytes.len();
    let mut offset = contents;
    for number in 0..count {
        let at = PREFIX_BYTES + number * ENTRY_BYTES;
        let left = total - offset;
        // The last section takes what is left.
        let length = if number + 1 == count {
            left
        } else {
            left.min(bytes[at + 64].into())
        };
        bytes[at + 52..at + 56].fill(0);
        bytes[at + 56..at + 64].copy_from_slice(&(offset as u64).to_le_bytes());
        bytes[at + 64..at + 72].copy_from_slice(&(length as u64).to_le_bytes());
        let hash = blake3::hash(&bytes[offset..offset + length]);
        bytes[at + 72..at + 104].copy_from_slice(hash.as_bytes());
        offset += length;
    }
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes[12] = u8::try_from(count).unwrap();
    bytes[16..24].copy_from_slice(&(total as u64).to_le_bytes());
    let hash = blake3::hash(&bytes[PREFIX_BYTES..contents]);
    bytes[32..64].copy_from_slice(hash.as_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    match data {
        [mode, count, rest @ ..] if mode % 2 == 0 => check(&repaired(*count, rest)),
        [_, rest @ ..] => check(rest),
        [] => {}
    }
});
