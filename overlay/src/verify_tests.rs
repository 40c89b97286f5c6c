//! Whole files, each damaged in each place.

use std::io::Cursor;

use super::*;
use crate::digest::Digest;
use crate::testing::{head, sample, stored};

fn check(bytes: &[u8]) -> Result<VerifyReport, VerifyError> {
    verify(&mut Cursor::new(bytes), &mut |_, _| {})
}

#[test]
fn a_good_file_is_reported() {
    let (_, _, bytes) = sample();
    let mut seen = Vec::new();
    let report = verify(&mut Cursor::new(&bytes), &mut |done, total| {
        seen.push((done, total))
    })
    .unwrap();
    assert_eq!(report.total_bytes, bytes.len() as u64);
    assert_eq!((report.segments, report.literal_pages), (3, 28));
    assert_eq!(seen.last(), Some(&(report.total_bytes, report.total_bytes)));
    let (prefix, index) = read_head(&mut Cursor::new(&bytes)).unwrap();
    assert_eq!(prefix.id(), report.id);
    assert_eq!(index.segments().len(), 3);
}

#[test]
fn every_flipped_byte_is_noticed() {
    let (_, _, good) = sample();
    for at in 0..good.len() {
        // All of the head and the trailer, and a part of the segments.
        if at > 1500 && at + 100 < good.len() && !at.is_multiple_of(53) {
            continue;
        }
        let mut bad = good.clone();
        for flip in [1, 0x80, 0xff] {
            bad[at] = good[at] ^ flip;
            assert!(check(&bad).is_err(), "byte {at} with {flip:#x}");
        }
    }
}

#[test]
fn every_truncation_and_every_tail_is_noticed() {
    let (_, _, good) = sample();
    for length in (0..1500)
        .chain((1500..good.len()).step_by(211))
        .chain([good.len() - 1])
    {
        assert!(
            matches!(check(&good[..length]), Err(VerifyError::Read { .. })),
            "cut to {length}"
        );
    }
    let offset = good.len() as u64;
    let longer = [good.as_slice(), &[0]].concat();
    assert!(matches!(check(&longer), Err(VerifyError::Tail { offset: at }) if at == offset));
}

#[test]
fn the_place_of_the_first_error_is_named() {
    let (_, _, mut bytes) = sample();
    let (_, index) = head(&bytes);
    let segment = &index.segments()[1];
    let at = usize::try_from(segment.offset).unwrap();
    bytes[at + 5] ^= 1;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    match check(&bytes) {
        Err(VerifyError::Format { offset, source }) => {
            assert_eq!(offset, segment.offset);
            assert_eq!(
                source.to_string(),
                "segment 1 is damaged or forged (wrong hash)"
            );
        }
        other => panic!("{other:?}"),
    }
}

/// Replaces the stored bytes of segment 0 by ones of the same length, and makes all hashes right.
fn forge_segment(replacement: impl FnOnce(usize) -> Vec<u8>) -> Result<VerifyReport, VerifyError> {
    let (_, _, mut bytes) = sample();
    let (prefix, index) = head(&bytes);
    let old = stored(&bytes, &index, SegmentId(0)).len();
    let new = replacement(old);
    assert_eq!(new.len(), old);
    let at = usize::try_from(index.segments()[0].offset).unwrap();
    bytes[at..at + old].copy_from_slice(&new);
    let index_at = usize::try_from(prefix.index_offset()).unwrap();
    let entry = index_at + index.spaces().len() * crate::format::SPACE_ENTRY_BYTES;
    bytes[entry + 8..entry + 40].copy_from_slice(&Digest::of(&new).0);
    let end = index_at + usize::try_from(prefix.index_bytes()).unwrap();
    let hash = Digest::of(&bytes[index_at..end]);
    bytes[48..80].copy_from_slice(&hash.0);
    let id = Digest::of(&bytes[..PREFIX_BYTES]);
    let trailer = bytes.len() - 32;
    bytes[trailer..].copy_from_slice(&id.0);
    check(&bytes)
}

/// A zstd frame of `raw`, padded by a skippable frame to `bytes` bytes.
fn padded_frame(raw: &[u8], bytes: usize) -> Vec<u8> {
    let mut frame = zstd::bulk::Compressor::new(19)
        .unwrap()
        .compress(raw)
        .unwrap();
    let padding = bytes - frame.len() - 8;
    frame.extend_from_slice(&0x184D_2A50_u32.to_le_bytes());
    frame.extend_from_slice(&u32::try_from(padding).unwrap().to_le_bytes());
    frame.resize(bytes, 0);
    frame
}

#[test]
fn segments_that_decompress_to_another_length_are_refused() {
    let decoded = |result| match result {
        Err(VerifyError::Format { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    let noise = decoded(forge_segment(|bytes| vec![0x55; bytes]));
    assert!(matches!(
        noise,
        FormatError::Decompress {
            place: Place::Segment(0),
            ..
        }
    ));
    let longer = decoded(forge_segment(|bytes| {
        padded_frame(&vec![0; 100 << 20], bytes)
    }));
    assert!(matches!(
        longer,
        FormatError::Decompress {
            place: Place::Segment(0),
            ..
        }
    ));
    let shorter = decoded(forge_segment(|bytes| padded_frame(&[0; 4096], bytes)));
    assert!(matches!(
        shorter,
        FormatError::Length {
            place: Place::Segment(0),
            found: 4096,
            ..
        }
    ));
    forge_segment(|bytes| padded_frame(&[0; 5 * 4096], bytes)).unwrap();
}

#[test]
fn a_decoder_survives_bad_segments_and_bad_calls() {
    let (_, _, bytes) = sample();
    let (_, index) = head(&bytes);
    let mut decoder = SegmentDecoder::new();
    let mut raw = vec![0; SEGMENT_BYTES_MAX];
    let good = stored(&bytes, &index, SegmentId(0));
    let error = decoder
        .decode(&index, SegmentId(3), good, &mut raw)
        .unwrap_err();
    assert!(matches!(error, FormatError::Limit { .. }));
    let error = decoder
        .decode(&index, SegmentId(1), good, &mut raw)
        .unwrap_err();
    assert!(matches!(error, FormatError::Length { .. }));
    let error = decoder
        .decode(&index, SegmentId(0), good, &mut raw[..100])
        .unwrap_err();
    assert!(matches!(error, FormatError::Length { .. }));
    let mut bad = good.to_vec();
    bad[0] ^= 1;
    let error = decoder
        .decode(&index, SegmentId(0), &bad, &mut raw)
        .unwrap_err();
    assert!(matches!(
        error,
        FormatError::Hash {
            place: Place::Segment(0)
        }
    ));
    let decoded = decoder
        .decode(&index, SegmentId(0), good, &mut raw)
        .unwrap();
    // Four places of its own, two further ones.
    assert_eq!(decoded.runs().count(), 6);
}
