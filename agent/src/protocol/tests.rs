//! Frames and what is in them: whatever comes, whole or in pieces.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::tree::{Entry, Extent, Meta};

fn word() -> impl Strategy<Value = Vec<u8>> {
    vec(1..=255_u8, 0..40)
}

/// Every kind of request, of given words.
fn requests<'a>(words: &'a [Vec<u8>], number: u16) -> Vec<Request<'a>> {
    let slices: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
    let size = Size {
        rows: number,
        columns: !number,
    };
    let exec = Exec {
        arguments: slices.clone(),
        environment: vec![b"A=", b"=B=c"],
        directory: slices[0],
        terminal: number.is_multiple_of(2).then_some(size),
    };
    let meta = Meta {
        mode: number & 0o7777,
        seconds: -i64::from(number),
        nanos: number.into(),
    };
    let extent = Extent {
        stripped: number.into(),
        bytes: number.into(),
        entries: 1,
        skipped: u64::MAX,
    };
    let name = &b"name"[..];
    let target = &b"../target"[..];
    vec![
        Request::Hello(Entropy([number.to_le_bytes()[0]; ENTROPY_LEN])),
        Request::Exec(exec),
        Request::Put {
            path: slices[0],
            name: slices[slices.len() - 1],
        },
        Request::Get(slices[0]),
        Request::Sync,
        Request::Console(size),
        Request::Renew,
        Request::PowerOff,
        Request::Stdin(slices[0]),
        Request::StdinEnd,
        Request::Taken(Stream::Stdout, number.into()),
        Request::Taken(Stream::Stderr, number.into()),
        Request::Signal(number.into()),
        Request::Resize(size),
        Request::Tree(Entry::Extent(extent)),
        Request::Tree(Entry::Directory { name: b"", meta }),
        Request::Tree(Entry::File { name, meta }),
        Request::Tree(Entry::Link { name, meta, target }),
        Request::Tree(Entry::Capability(&[7; 12])),
        Request::Tree(Entry::Data(slices[0])),
        Request::Tree(Entry::Hole(u64::from(number) + 1)),
        Request::Tree(Entry::Up),
    ]
}

/// Every kind of reply.
fn replies<'a>(bytes: &'a [u8], text: &'a str, number: u8) -> Vec<Reply<'a>> {
    let trimmed = Trimmed {
        path: bytes,
        bytes: u64::MAX - u64::from(number),
        error: text,
    };
    vec![
        Reply::Hello,
        Reply::Output(Stream::Stdout, bytes),
        Reply::Output(Stream::Stderr, bytes),
        Reply::Taken(number.into()),
        Reply::Exit(End::Code(number), text),
        Reply::Exit(End::Signal(number % 64 + 1), text),
        Reply::Exit(End::NotFound, text),
        Reply::Exit(End::NotRun, text),
        Reply::Trimmed(trimmed),
        Reply::Done,
        Reply::Error(text),
        Reply::Tree(Entry::Up),
    ]
}

/// Hands `bytes` to a decoder in pieces of `step`, and every frame to `see`.
fn in_pieces(bytes: &[u8], step: usize, mut see: impl FnMut(Frame<'_>)) -> Result<(), Error> {
    let mut decoder = Decoder::default();
    for mut piece in bytes.chunks(step) {
        decoder.fill(&mut piece).unwrap();
        while let Some(frame) = decoder.next_frame()? {
            see(frame);
        }
    }
    assert!(!decoder.is_within_frame());
    Ok(())
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(
        words in vec(word(), 1..5),
        text in "\\PC{0,50}",
        number: u16,
        step in 1_usize..500,
    ) {
        let requests = requests(&words, number);
        let mut bytes = Vec::new();
        for request in &requests {
            request.encode(&mut bytes).unwrap();
        }
        let mut expected = requests.iter();
        in_pieces(&bytes, step, |frame| {
            assert_eq!(Request::decode(frame).as_ref(), Ok(expected.next().unwrap()));
        })
        .unwrap();
        assert!(expected.next().is_none());

        let replies = replies(&words[0], &text, number.to_le_bytes()[0]);
        let mut bytes = Vec::new();
        for reply in &replies {
            reply.encode(&mut bytes).unwrap();
        }
        let mut expected = replies.iter();
        in_pieces(&bytes, step, |frame| {
            assert_eq!(Reply::decode(frame).as_ref(), Ok(expected.next().unwrap()));
        })
        .unwrap();
        assert!(expected.next().is_none());
    }

    #[test]
    fn no_bytes_break_a_decoder(bytes in vec(any::<u8>(), 0..300), step in 1_usize..50) {
        let mut decoder = Decoder::default();
        for mut piece in bytes.chunks(step) {
            decoder.fill(&mut piece).unwrap();
            let Ok(_) = decoder.has_frame() else { break };
            while let Ok(Some(frame)) = decoder.next_frame() {
                let _ = (Request::decode(frame), Reply::decode(frame));
            }
        }
    }

    #[test]
    fn frames_that_are_cut_or_go_on_are_malformed(number: u16, at in 0_usize..100) {
        for request in requests(&[b"word".to_vec()], number) {
            if matches!(request, Request::Stdin(_) | Request::Tree(Entry::Data(_))) {
                continue;
            }
            let mut bytes = Vec::new();
            request.encode(&mut bytes).unwrap();
            let (kind, payload) = (bytes[0], &bytes[HEADER_LEN..]);
            let is_refused = |payload| Request::decode(Frame { kind, payload }).is_err();
            let longer = [payload, b"\0"].concat();
            prop_assert!(is_refused(&longer));
            prop_assert!(at >= payload.len() || is_refused(&payload[..at]));
        }
    }
}

#[test]
fn limits_hold_before_anything_is_kept() {
    let mut decoder = Decoder::default();
    let [a, b, c, d] = u32::try_from(PAYLOAD_MAX + 1).unwrap().to_le_bytes();
    decoder
        .fill(&[kind::STDIN, 0, 0, 0, a, b, c, d][..])
        .unwrap();
    assert_eq!(decoder.next_frame(), Err(Error::TooLong(PAYLOAD_MAX + 1)));
    for bad in [[0x7f, 0, 0, 0], [kind::STDIN, 0, 1, 0], [0; 4]] {
        let mut decoder = Decoder::default();
        decoder.fill(&[bad, [0; 4]].concat()[..]).unwrap();
        assert_eq!(decoder.has_frame(), Err(Error::Kind(bad[0])));
    }
    // One that is too long is not begun.
    let mut out = b"before".to_vec();
    let long = vec![b'x'; PAYLOAD_MAX + 1];
    assert!(Request::Stdin(&long).encode(&mut out).is_err());
    assert_eq!(out, b"before");
    let mut out = Vec::new();
    Request::Stdin(&long[1..]).encode(&mut out).unwrap();
    assert_eq!(out.len(), HEADER_LEN + PAYLOAD_MAX);
    // Words that the system could not take.
    for words in [vec![], vec![&b"a\0b"[..]]] {
        let exec = Exec {
            arguments: words,
            ..Exec::default()
        };
        let mut out = Vec::new();
        Request::Exec(exec).encode(&mut out).unwrap();
        let frame = Frame {
            kind: kind::EXEC,
            payload: &out[HEADER_LEN..],
        };
        assert_eq!(Request::decode(frame), Err(Error::Malformed("exec")));
    }
}

#[test]
fn texts_are_cut_between_characters() {
    let long = "ö".repeat(TEXT_MAX);
    let mut out = Vec::new();
    Reply::Error(&long).encode(&mut out).unwrap();
    let frame = Frame {
        kind: kind::ERROR,
        payload: &out[HEADER_LEN..],
    };
    assert_eq!(Reply::decode(frame), Ok(Reply::Error(&long[..TEXT_MAX])));
}
