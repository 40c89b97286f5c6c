//! Numbers and records of headers, and sparse files as GNU tar writes them.

use std::ops::Range;

use super::super::archive::{Kind, len_max, read};
use super::super::spool::{MemorySpool, Spool};
use super::super::tree::{self, Tree};
use super::*;

const SPACE: u64 = 1 << 20;

#[test]
fn times_of_pax_records_have_signs_and_fractions() {
    for (text, expected) in [
        ("9", Some((9, 0))),
        ("9.5", Some((9, 500_000_000))),
        ("9.0000000019", Some((9, 1))),
        ("-315619200", Some((-315_619_200, 0))),
        ("-1.25", Some((-2, 750_000_000))),
        ("-0.25", Some((-1, 750_000_000))),
        ("17179869184.", Some((1 << 34, 0))),
        ("-9223372036854775808.5", None),
        ("9.-5", None),
        ("", None),
        ("x", None),
        (".5", None),
    ] {
        assert_eq!(time(text.as_bytes()), expected, "{text}");
    }
}

#[test]
fn numbers_of_headers_have_two_forms() {
    let binary = |first: u8, value: i64| [&[first, 0, 0, 0][..], &value.to_be_bytes()].concat();
    let negative = [&[0xff; 4][..], &(-5_i64).to_be_bytes()].concat();
    for (field, expected) in [
        (&b"0000017\0"[..], Some(15)),
        (b"     17 \0", Some(15)),
        (b"\0\0\0\0", Some(0)),
        (b"77777777777", Some((1 << 33) - 1)),
        (b"9\0", None),
        (b"-1\0", None),
        (b"7777777777777777777777777", None),
        (&binary(0x80, 1 << 40), Some(1 << 40)),
        (&binary(0x81, 0), None),
        (&negative, Some(-5)),
    ] {
        assert_eq!(number(field, "size").ok(), expected, "{field:?}");
    }
    assert!(matches!(
        length(&negative, "size"),
        Err(Error::Number("size"))
    ));
}

#[test]
fn records_that_lie_about_their_length_are_refused() {
    for bad in [
        "8 path=a\n",
        "11 path=a\n",
        "path=a\n",
        "8 path=a",
        "5 a\n\n\n",
        "-1 path=a\n",
        "99999999999999999999 a=b\n",
        "2 \n",
        "1 \n",
        "0 a=b\n",
    ] {
        let added = Next::default().add(bad.as_bytes());
        assert!(matches!(added, Err(Error::Records)), "{bad:?}");
    }
}

/// The tree of an archive that has one file of contents after a header that `change` has changed.
fn file(
    records: &str,
    body: &[u8],
    change: impl FnOnce(&mut [u8; 512]),
    more: &[u8],
) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let mut add = |kind: u8, len: usize, body: &[u8], change: &mut dyn FnMut(&mut [u8; 512])| {
        let mut header = Header::new_gnu();
        header.set_path("f").unwrap();
        header.set_entry_type(EntryType::new(kind));
        header.set_mode(0o644);
        header.set_size(len as u64);
        change(header.as_mut_bytes());
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    };
    if !records.is_empty() {
        add(b'x', records.len(), records.as_bytes(), &mut |_| {});
    }
    let mut change = Some(change);
    let all = [more, body].concat();
    add(b'0', body.len(), &all, &mut |header| {
        if let Some(change) = change.take() {
            change(header);
        }
    });
    bytes.resize(bytes.len() + 1024, 0);
    let (mut tree, mut spool) = (Tree::new(), MemorySpool::new(SPACE));
    read(
        &bytes[..],
        &mut tree,
        &mut spool,
        Kind::Whole,
        len_max(SPACE),
    )?;
    match tree.node(tree.find(b"f").expect("it is there")).kind {
        tree::Kind::File(blob) => Ok(spool.load(blob, SPACE)?),
        _ => panic!("it is a file"),
    }
}

fn record(key: &str, value: &str) -> String {
    let len = key.len() + value.len() + 3;
    let digits = |len: usize| len.to_string().len();
    let len = len + digits(len + digits(len));
    format!("{len} {key}={value}\n")
}

fn expected(len: usize, parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (at, part) in parts {
        bytes[*at..*at + part.len()].copy_from_slice(part);
    }
    bytes
}

#[test]
fn sparse_files_of_all_pax_forms_are_read() {
    let right = expected(5000, &[(10, b"abc"), (4000, b"de")]);
    let first = [
        record("GNU.sparse.size", "5000"),
        record("GNU.sparse.numblocks", "3"),
        record("GNU.sparse.offset", "10"),
        record("GNU.sparse.numbytes", "3"),
        record("GNU.sparse.offset", "4000"),
        record("GNU.sparse.numbytes", "2"),
        record("GNU.sparse.offset", "5000"),
        record("GNU.sparse.numbytes", "0"),
    ];
    assert!(file(&first.concat(), b"abcde", |_| {}, b"").unwrap() == right);
    let second = [
        record("GNU.sparse.size", "5000"),
        record("GNU.sparse.map", "10,3,4000,2,5000,0"),
    ];
    assert!(file(&second.concat(), b"abcde", |_| {}, b"").unwrap() == right);
    let third = [
        record("GNU.sparse.major", "1"),
        record("GNU.sparse.minor", "0"),
        record("GNU.sparse.name", "f"),
        record("GNU.sparse.realsize", "5000"),
        record("path", "GNUSparseFile.1/f"),
    ]
    .concat();
    let mut body = b"3\n10\n3\n4000\n2\n5000\n0\n".to_vec();
    body.resize(512, 0);
    body.extend_from_slice(b"abcde");
    assert!(file(&third, &body, |_| {}, b"").unwrap() == right);
    // A map of more than a block.
    let mut body = b"100\n".to_vec();
    let mut parts = Vec::new();
    for number in 0..100 {
        body.extend_from_slice(format!("{}\n1\n", number * 50).as_bytes());
        parts.push((number * 50, &b"x"[..]));
    }
    body.resize(body.len().next_multiple_of(512), 0);
    body.extend_from_slice(&[b'x'; 100]);
    assert!(file(&third, &body, |_| {}, b"").unwrap() == expected(5000, &parts));
}

fn old(header: &mut [u8; 512], at: usize, stretch: &Range<usize>) {
    let text = format!("{:011o}\0{:011o}\0", stretch.start, stretch.len());
    header[at..at + 24].copy_from_slice(text.as_bytes());
}

#[test]
fn sparse_files_of_the_old_form_are_read() {
    let change = |more: bool, len: usize| {
        move |header: &mut [u8; 512]| {
            header[156] = b'S';
            old(header, 386, &(10..13));
            old(header, 410, &(4000..4002));
            if more {
                old(header, 434, &(4500..4501));
                old(header, 458, &(4600..4601));
            }
            header[482] = more.into();
            header[483..494].copy_from_slice(format!("{len:011o}").as_bytes());
        }
    };
    let right = [(10, &b"abc"[..]), (4000, b"de")];
    let made = file("", b"abcde", change(false, 5000), b"").unwrap();
    assert!(made == expected(5000, &right));
    let mut more = [0; 512];
    old(&mut more, 0, &(4700..4702));
    let right = [&right[..], &[(4500, b"f"), (4600, b"g"), (4700, b"hi")]].concat();
    let made = file("", b"abcdefghi", change(true, 5000), &more).unwrap();
    assert!(made == expected(5000, &right));
    // Data beyond the file's end, and less of it than the map says.
    assert!(file("", b"abcde", change(false, 4001), b"").is_err());
    assert!(matches!(
        file("", b"abc", change(false, 5000), b""),
        Err(Error::Sparse)
    ));
    // Blocks without end.
    more[504] = 1;
    assert!(file("", b"abcdefghi", change(true, 5000), &more).is_err());
}

#[test]
fn maps_that_lie_are_refused() {
    let with = |map: &str| {
        [
            record("GNU.sparse.size", "5000"),
            record("GNU.sparse.map", map),
        ]
        .concat()
    };
    for map in [
        "10,3,4000",
        "10,x",
        "",
        "18446744073709551615,5",
        "-1,5",
        "4998,5",
        "10,3,11,2",
        "10,6",
    ] {
        assert!(file(&with(map), b"abcde", |_| {}, b"").is_err(), "{map}");
    }
    for records in [
        record("GNU.sparse.map", "0,5"),
        record("GNU.sparse.major", "2"),
        record("GNU.sparse.numbytes", "5"),
    ] {
        assert!(file(&records, b"abcde", |_| {}, b"").is_err(), "{records}");
    }
    let third = [
        record("GNU.sparse.major", "1"),
        record("GNU.sparse.realsize", "5000"),
    ]
    .concat();
    for map in [
        "99999999999999999999999\n",
        "18446744073709551615\n",
        "1\n0\n",
        "1\n0\n600\n",
    ] {
        let mut body = map.as_bytes().to_vec();
        body.resize(517, b'0');
        assert!(file(&third, &body, |_| {}, b"").is_err(), "{map}");
    }
}
