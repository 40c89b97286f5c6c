//! The stored bytes of a segment with a right hash: refused, or decoded to exactly its pages.
//!
//! Half of the inputs are noise, the other half zstd frames with a few bytes changed.

#![no_main]

use std::cell::RefCell;

use cloudlet_fuzz::{Forged, Input};
use cloudlet_overlay::format::SEGMENT_BYTES_MAX;
use cloudlet_overlay::{Index, PAGE_BYTES, PREFIX_BYTES, Prefix, SegmentDecoder, SegmentId};
use libfuzzer_sys::fuzz_target;

thread_local! {
    /// As in the product, one decoder and one buffer live through good and bad segments.
    static DECODER: RefCell<(SegmentDecoder, Vec<u8>)> =
        RefCell::new((SegmentDecoder::new(), vec![0; SEGMENT_BYTES_MAX]));
}

/// Pages made of the input, compressed, with up to seven bytes changed.
fn damaged_frame(input: &mut Input<'_>, pages: u16) -> Vec<u8> {
    let edits: Vec<[u8; 3]> = (0..input.byte() % 8).map(|_| input.array()).collect();
    let mut raw = input.0.to_vec();
    raw.resize(usize::from(pages) * PAGE_BYTES, 0);
    let mut frame = zstd::bulk::compress(&raw, 1).expect("zstd compresses anything");
    let length = frame.len();
    for [low, high, value] in edits {
        frame[usize::from(u16::from_le_bytes([low, high])) % length] = value;
    }
    frame
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (mode, split) = (input.byte(), input.byte());
    let pages = u16::from(input.byte()) + 1;
    let stored = if mode % 2 == 0 {
        damaged_frame(&mut input, pages)
    } else {
        input.0.to_vec()
    };
    let codec = u8::from(stored.len() != usize::from(pages) * PAGE_BYTES);

    let mut space = [0; 24];
    space[8..16].copy_from_slice(&1000_u64.to_le_bytes());
    // One run, or two with a gap.
    let first = (u16::from(split) % pages).max(1);
    let runs = if first < pages {
        vec![(0, first), (500, pages - first)]
    } else {
        vec![(0, pages)]
    };
    let mut entry = [0; 40];
    entry[..4].copy_from_slice(&u32::try_from(stored.len()).unwrap().to_le_bytes());
    entry[4] = u8::try_from(runs.len()).unwrap();
    entry[6] = codec;
    entry[8..].copy_from_slice(blake3::hash(&stored).as_bytes());
    let mut forged = Forged {
        spaces: vec![space],
        segments: vec![entry],
        literal_runs: u8::try_from(runs.len()).unwrap(),
        ..Forged::default()
    };
    for (page, pages) in &runs {
        forged.run_table.extend_from_slice(&u32::to_le_bytes(*page));
        forged
            .run_table
            .extend_from_slice(&(pages - 1).to_le_bytes());
        forged.run_table.extend_from_slice(&[0, 1]);
    }
    let head = forged.head();
    let (prefix, index) = head.split_first_chunk::<PREFIX_BYTES>().unwrap();
    let prefix = Prefix::parse(prefix).expect("a right prefix");
    // A stored length that cannot be is refused here already.
    let Ok(index) = Index::parse(&prefix, index) else {
        return;
    };
    DECODER.with_borrow_mut(|(decoder, out)| {
        let Ok(decoded) = decoder.decode(&index, SegmentId(0), &stored, out) else {
            return;
        };
        let lengths: Vec<_> = decoded
            .runs()
            .map(|(at, bytes)| (at.page, bytes.len()))
            .collect();
        let expected: Vec<_> = runs
            .iter()
            .map(|(page, pages)| (u64::from(*page), usize::from(*pages) * PAGE_BYTES))
            .collect();
        assert_eq!(lengths, expected);
    });
});
