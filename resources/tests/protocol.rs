//! The control protocol: what is sent arrives, what is hostile is refused, and the client keeps to it.

use std::io::{Cursor, Read, Write};

use cloudlet_resources::client::{Client, ClientError};
use cloudlet_resources::hash::{Hash, hash};
use cloudlet_resources::protocol::{
    BLOB_MAX, Frame, FrameError, HEADER_LEN, Header, Incoming, Install, Kind, TEXT_MAX, parse,
};
use proptest::prelude::*;

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Status),
        Just(Kind::Install),
        Just(Kind::Load),
        Just(Kind::Call),
        Just(Kind::Verify),
        Just(Kind::Ok),
        Just(Kind::Error),
    ]
}

prop_compose! {
    fn frame()(kind in kind(), text in ".{0,40}", blob in prop::collection::vec(any::<u8>(), 0..300))
        -> Frame
    {
        Frame { kind, text, blob }
    }
}

proptest! {
    #[test]
    fn frames_survive_any_cutting(frames in prop::collection::vec(frame(), 1..4), cut in 1usize..50) {
        let bytes: Vec<u8> = frames.iter().flat_map(|f| f.encode().unwrap()).collect();
        let (mut incoming, mut got) = (Incoming::default(), Vec::new());
        for mut part in bytes.chunks(cut) {
            while !part.is_empty() {
                let (taken, frame) = incoming.feed(part).unwrap();
                part = &part[taken..];
                got.extend(frame);
            }
        }
        prop_assert_eq!(got, frames);
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok((taken, _)) = parse(&bytes) {
            prop_assert!(taken <= bytes.len());
        }
    }

    #[test]
    fn a_changed_byte_never_takes_more_than_is_there(f in frame(), at in any::<prop::sample::Index>(), by in 1u8..) {
        let mut bytes = f.encode().unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= by;
        if let Ok((taken, frame)) = parse(&bytes) {
            prop_assert!(taken <= bytes.len());
            if let Some(frame) = frame {
                let again = frame.encode().unwrap();
                prop_assert_eq!(&again, &bytes[..taken]);
            }
        }
    }

    #[test]
    fn a_hash_does_not_depend_on_the_cutting(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 1usize..70) {
        let mut h = Hash::new(0);
        for part in bytes.chunks(cut) {
            h.bytes(part);
        }
        prop_assert_eq!(h.finish(), hash(&bytes));
    }

    #[test]
    fn floats_hash_as_their_bytes(floats in prop::collection::vec(any::<f32>(), 0..50)) {
        let mut h = Hash::new(0);
        h.floats(&floats);
        let bytes: Vec<u8> = floats.iter().flat_map(|f| f.to_le_bytes()).collect();
        prop_assert_eq!(h.finish(), hash(&bytes));
    }

    #[test]
    fn any_flipped_bit_changes_the_hash(mut bytes in prop::collection::vec(any::<u8>(), 1..200), bit in any::<prop::sample::Index>()) {
        let before = hash(&bytes);
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert_ne!(hash(&bytes), before);
    }
}

#[test]
fn headers_out_of_bounds_are_refused() {
    let good = Header::new(Kind::Call, 1, 2).unwrap().encode();
    let cases: [(usize, &[u8], FrameError); 6] = [
        (0, b"X", FrameError::Magic),
        (4, &[0x7f], FrameError::Kind(0x7f)),
        (5, &[9], FrameError::Version(9)),
        (7, &[1], FrameError::Reserved),
        (8, &[0xff; 4], FrameError::TextLength(u32::MAX)),
        (12, &[0xff; 4], FrameError::BlobLength(u32::MAX)),
    ];
    for (at, bytes, error) in cases {
        let mut bad = good;
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        assert_eq!(Header::decode(&bad), Err(error));
        assert_eq!(parse(&bad), Err(error));
    }
    assert!(Header::new(Kind::Call, TEXT_MAX, BLOB_MAX).is_ok());
    assert!(Header::new(Kind::Call, TEXT_MAX + 1, 0).is_err());
    assert!(Header::new(Kind::Call, 0, BLOB_MAX + 1).is_err());
}

#[test]
fn install_frames_out_of_bounds_are_refused() {
    let good = Install {
        name: "fluid".into(),
        params: "tanks=3".into(),
        image_len: 100,
        data_len: 0,
        image_hash: 1,
        data_hash: 2,
    };
    assert_eq!(Install::from_frame(&good.to_frame()), Ok(good.clone()));
    for bad in [
        Install {
            name: String::new(),
            ..good.clone()
        },
        Install {
            name: "a b".into(),
            ..good.clone()
        },
        Install {
            name: "a".repeat(65),
            ..good.clone()
        },
        Install {
            params: "p".repeat(1025),
            ..good.clone()
        },
        Install {
            image_len: 0,
            ..good.clone()
        },
        Install {
            image_len: u64::MAX,
            ..good.clone()
        },
        Install {
            data_len: u64::MAX,
            ..good.clone()
        },
    ] {
        assert_eq!(
            Install::from_frame(&bad.to_frame()),
            Err(FrameError::Install)
        );
    }
    let mut short = good.to_frame();
    short.blob.pop();
    assert_eq!(Install::from_frame(&short), Err(FrameError::Install));
}

/// A stream that answers with what was prepared, and keeps what is written.
struct Prepared {
    answer: Cursor<Vec<u8>>,
    written: Vec<u8>,
}

impl Read for Prepared {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.answer.read(out)
    }
}

impl Write for Prepared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.written.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn prepared(answer: &[u8]) -> Prepared {
    Prepared {
        answer: Cursor::new(answer.to_vec()),
        written: Vec::new(),
    }
}

#[test]
fn the_client_asks_and_understands() {
    let frame = |kind, text: &str| {
        Frame {
            kind,
            text: text.into(),
            blob: vec![7; 3],
        }
        .encode()
        .unwrap()
    };
    let mut answers = b"OK 1024\n".to_vec();
    answers.extend(frame(Kind::Ok, "fine"));
    answers.extend(frame(Kind::Error, "no such tank"));
    answers.extend(frame(Kind::Status, ""));
    answers.extend(&frame(Kind::Ok, "cut")[..HEADER_LEN + 1]);
    let mut client = Client::connect(prepared(&answers), 1024).unwrap();
    let answer = client.call("frame 0", b"x").unwrap();
    assert_eq!((answer.text.as_str(), answer.blob), ("fine", vec![7; 3]));
    let asked = &client.stream().written[b"CONNECT 1024\n".len()..];
    let (_, asked) = parse(asked).unwrap();
    assert_eq!(
        asked.unwrap(),
        Frame {
            kind: Kind::Call,
            text: "frame 0".into(),
            blob: b"x".to_vec()
        }
    );
    assert!(matches!(client.verify(), Err(ClientError::Refused(text)) if text == "no such tank"));
    assert!(matches!(
        client.status(),
        Err(ClientError::Unexpected(Kind::Status))
    ));
    assert!(matches!(client.load(), Err(ClientError::Io(_))));
}

#[test]
fn a_socket_that_does_not_connect_is_an_error() {
    for answer in [&b""[..], b"NO\n", b"OK 10", &[b'x'; 500]] {
        let client = Client::connect(prepared(answer), 1024);
        assert!(matches!(client, Err(ClientError::Handshake(_))));
    }
}
