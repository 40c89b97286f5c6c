//! Servers that lie, and what they get.

use std::io::Write;
use std::time::{Duration, Instant};

use cloudlet::fetch::{Cause, Error, Link, Options, Remote};

use crate::util::{Scripted, asked_from, asked_range, impatient, noise, read_all};

/// Opens what `response` describes, and returns why it does not work.
fn refused(response: &str) -> Cause {
    let server = Scripted::saying(response);
    let mut stream = match Remote::open(&server.location(), impatient(), &Link::new(None)) {
        Ok(remote) => remote.stream(0),
        Err(Error::Transfer { cause, .. }) => return cause,
        Err(other) => panic!("{other:?}"),
    };
    loop {
        match stream.read_some(&mut [0; 100]) {
            Ok(0) => panic!("{response:?} was taken for a whole file"),
            Ok(_) => {}
            Err(Error::Transfer { cause, .. }) => return cause,
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn bad_responses_are_refused_with_their_reason() {
    let ok = "HTTP/1.1 206 P\r\nContent-Length: 4\r\n";
    let wrong_range = [
        format!("{ok}\r\nabcd"),
        format!("{ok}Content-Range: bytes 1-4/5\r\n\r\nabcd"),
        format!("{ok}Content-Range: bytes 0-3/8\r\n\r\nabcd"),
        format!("{ok}Content-Range: bytes 0-4/5\r\n\r\nabcd"),
    ];
    for response in &wrong_range {
        assert!(
            matches!(refused(response), Cause::WrongRange { .. }),
            "{response:?}"
        );
    }
    let head = [
        format!("{ok}Content-Range: bytes 0-3/*\r\n\r\nabcd"),
        format!("{ok}Content-Length: 5\r\n\r\nabcd"),
        format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "a".repeat(20_000)),
        "X: y\r\n".repeat(3000),
        format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(100)),
        "SSH-2.0-OpenSSH\r\n".into(),
    ];
    for response in &head {
        assert!(matches!(refused(response), Cause::Head(_)), "{response:?}");
    }
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n";
    assert!(matches!(refused(chunked), Cause::NoLength));
    assert!(matches!(
        refused("HTTP/1.1 200 OK\r\n\r\nabcd"),
        Cause::NoLength
    ));
    let gzip = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Encoding: gzip\r\n\r\nabcd";
    assert!(matches!(refused(gzip), Cause::Coding(coding) if coding == "gzip"));
    assert!(matches!(
        refused("HTTP/1.1 403 No\r\n\r\n"),
        Cause::Status(403)
    ));
    assert!(matches!(
        refused("HTTP/1.1 503 Busy\r\n\r\n"),
        Cause::Status(503)
    ));
    assert!(matches!(
        refused("HTTP/1.1 101 Up\r\n\r\n"),
        Cause::Status(101)
    ));
    assert!(matches!(
        refused(&"HTTP/1.1 100 C\r\n\r\n".repeat(9)),
        Cause::Status(100)
    ));
    assert!(matches!(
        refused("HTTP/1.1 302 F\r\n\r\n"),
        Cause::Status(302)
    ));
    assert!(matches!(
        refused("HTTP/1.1 302 F\r\nLocation: ftp://h/\r\n\r\n"),
        Cause::Redirect(_)
    ));
    assert!(matches!(
        refused("HTTP/1.1 302 F\r\nLocation: /x\r\n\r\n"),
        Cause::Redirects(5)
    ));
    assert!(matches!(refused(""), Cause::Cut));
    assert!(matches!(
        refused("HTTP/1.1 200 OK\r\nContent-Le"),
        Cause::Cut
    ));
    assert!(matches!(
        refused("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabcd"),
        Cause::Cut
    ));
}

/// A head or a body that comes byte by byte is a stall, however long it goes on.
#[test]
fn a_trickle_is_a_stall() {
    for start in ["", "HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n"] {
        let server = Scripted::new(move |_, _, socket| {
            let mut result = socket.write_all(start.as_bytes());
            while result.is_ok() {
                std::thread::sleep(Duration::from_millis(20));
                result = socket.write_all(b"x");
            }
            false
        });
        let begin = Instant::now();
        let error = Remote::open(&server.location(), impatient(), &Link::new(None))
            .and_then(|remote| remote.stream(0).read_exact(&mut [0; 5000]))
            .expect_err("stalls");
        assert!(
            matches!(
                error,
                Error::Transfer {
                    cause: Cause::Stalled(_),
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(
            begin.elapsed() < Duration::from_secs(5),
            "{:?}",
            begin.elapsed()
        );
    }
}

fn whole(len: usize, extra: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n{extra}\r\n")
}

fn part(from: usize, to: usize, len: usize, extra: &str) -> String {
    let (last, count) = (to - 1, to - from);
    format!(
        "HTTP/1.1 206 P\r\nContent-Length: {count}\r\nContent-Range: bytes {from}-{last}/{len}\r\n{extra}\r\n"
    )
}

/// Without ranges there is still the stream, and after a cut it skips what it had.
#[test]
fn a_server_without_ranges_is_read_in_order() {
    let bytes = noise(3, 300_000);
    let sent = bytes.clone();
    let server = Scripted::new(move |number, _, socket| {
        let end = if number == 0 { 100_000 } else { sent.len() };
        let head = whole(sent.len(), "ETag: \"a\"\r\n");
        socket
            .write_all(head.as_bytes())
            .and_then(|()| socket.write_all(&sent[..end]))
            .is_ok()
            && number > 0
    });
    let remote = Remote::open(&server.location(), impatient(), &Link::new(None)).expect("opens");
    assert!(!remote.supports_ranges());
    let error = remote
        .demand()
        .read_range(0, &mut [0; 5])
        .expect_err("no ranges");
    assert!(matches!(error, Error::NoRanges { .. }));
    let mut stream = remote.stream(0);
    assert!(read_all(&mut stream) == bytes);
    assert!(
        (1..=100_000).contains(&stream.discarded()),
        "{}",
        stream.discarded()
    );
    stream.seek_to(299_990);
    let mut end = [0; 10];
    stream.read_exact(&mut end).expect("skips all");
    assert!(end == bytes[299_990..]);
}

/// What the second response may differ in from the first, and what it may not. Whose bytes they are, the
/// hashes of what is in them decide: servers behind one name may each have tags of their own.
#[test]
fn every_response_is_held_against_the_first() {
    let second = |response: String| {
        let server = Scripted::new(move |number, request, socket| {
            let response = match number {
                0 => format!(
                    "{}abcd",
                    part(0, 8, 8, "ETag: \"a\"\r\nLast-Modified: x\r\n")
                ),
                _ => {
                    // It would get the whole file of a server with another tag.
                    assert!(!request.contains("If-Range"), "{request}");
                    response.clone()
                }
            };
            let _ = socket.write_all(response.as_bytes());
            false
        });
        let remote = Remote::open(&server.location(), impatient(), &Link::new(None));
        let mut bytes = [0; 4];
        remote
            .expect("opens")
            .demand()
            .read_range(4, &mut bytes)
            .map(|()| bytes)
    };
    let cause = |response| match second(response) {
        Err(Error::Transfer { cause, .. }) => cause,
        other => panic!("{other:?}"),
    };
    let same = "ETag: \"a\"\r\nLast-Modified: y\r\n";
    for fields in [same, "ETag: \"b\"\r\n", "ETag: W/\"a\"\r\n", ""] {
        assert_eq!(
            second(part(4, 8, 8, fields) + "efgh").expect("fine"),
            *b"efgh",
            "{fields}"
        );
    }
    assert!(matches!(
        cause(part(4, 8, 9, same) + "efgh"),
        Cause::Changed { was: 8, now: 9 }
    ));
    assert!(matches!(
        cause(whole(9, "ETag: \"b\"\r\n") + "abcdefghi"),
        Cause::Changed { was: 8, now: 9 }
    ));
    assert!(matches!(
        cause(whole(8, same) + "abcdefgh"),
        Cause::RangeIgnored
    ));
    assert!(matches!(
        cause(part(3, 7, 8, same) + "defg"),
        Cause::WrongRange { .. }
    ));
    assert!(matches!(
        cause(part(4, 7, 8, same) + "efg"),
        Cause::WrongRange { .. }
    ));
    assert!(matches!(
        cause("HTTP/1.1 412 P\r\n\r\n".into()),
        Cause::Status(412)
    ));
}

/// Bytes behind a response are not taken for the next one.
#[test]
fn responses_cannot_be_smuggled() {
    let server = Scripted::new(|_, request, socket| {
        let from = asked_from(request);
        let mut response = part(from, if from == 0 { 8 } else { from + 1 }, 8, "");
        response.push_str(&"abcdefgh"[from..if from == 0 { 8 } else { from + 1 }]);
        let forged = part(5, 6, 8, "") + "X";
        socket.write_all((response + &forged).as_bytes()).is_ok()
    });
    let remote = Remote::open(&server.location(), impatient(), &Link::new(None)).expect("opens");
    let mut demand = remote.demand();
    let mut byte = [0];
    for (offset, expected) in [(4, b'e'), (5, b'f'), (6, b'g')] {
        demand.read_range(offset, &mut byte).expect("fetches");
        assert_eq!(byte[0], expected);
    }
}

/// One that recovers in time is no error.
#[test]
fn a_busy_server_is_asked_again() {
    let server = Scripted::new(|number, _, socket| {
        let response = match number {
            0 | 1 => "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n".to_owned(),
            _ => part(0, 4, 4, "") + "abcd",
        };
        socket.write_all(response.as_bytes()).is_ok()
    });
    let remote = Remote::open(&server.location(), Options::default(), &Link::new(None));
    assert_eq!(read_all(&mut remote.expect("opens").stream(0)), b"abcd");
}

#[test]
fn redirects_are_followed() {
    let target = Scripted::new(|_, request, socket| {
        let from = asked_from(request);
        let head = part(from, 4, 4, "ETag: \"t\"\r\n");
        assert!(
            request.starts_with("GET /b?key=1 HTTP/1.1\r\n"),
            "{request}"
        );
        socket
            .write_all((head + &"abcd"[from..]).as_bytes())
            .is_ok()
    });
    let address = target.address;
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = asked.clone();
    let server = Scripted::new(move |_, request, socket| {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let to = match request.split(' ').nth(1) {
            Some("/x") => "./y#z".to_owned(),
            _ => format!("http://{address}/b?key=1"),
        };
        let head = format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n");
        socket.write_all(head.as_bytes()).is_ok()
    });
    let remote = Remote::open(&server.location(), impatient(), &Link::new(None)).expect("opens");
    assert_eq!(read_all(&mut remote.stream(0)), b"abcd");
    let mut end = [0; 2];
    remote.demand().read_range(2, &mut end).expect("fetches");
    assert_eq!(&end, b"cd");
    assert_eq!(
        asked.load(std::sync::atomic::Ordering::Relaxed),
        2,
        "later requests go straight on"
    );
}

/// Opens, reads all of it in order and a range of its own; the ranges that were asked for.
fn read_both_ways(server: &Scripted, expected: &[u8]) -> bool {
    let remote = Remote::open(&server.location(), impatient(), &Link::new(None)).expect("opens");
    assert_eq!(remote.len(), u64::try_from(expected.len()).expect("small"));
    assert!(read_all(&mut remote.stream(0)) == expected);
    if remote.supports_ranges() {
        let mut middle = [0; 100];
        remote
            .demand()
            .read_range(1000, &mut middle)
            .expect("fetches");
        assert!(middle == expected[1000..1100]);
    }
    remote.supports_ranges()
}

/// A server that makes the whole up as it goes says no length; asked for a part of it, it does.
#[test]
fn a_whole_without_a_length_is_fetched_in_ranges() {
    let bytes = noise(5, 10_000_000);
    let sent = bytes.clone();
    let server = Scripted::new(move |_, request, socket| {
        let range = asked_range(request).filter(|(from, last)| {
            // All of it is no part.
            *from > 0 || last.is_some_and(|last| last + 1 < sent.len())
        });
        let Some((from, last)) = range else {
            let _ = socket.write_all(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
            );
            return false;
        };
        let to = last.map_or(sent.len(), |last| last + 1);
        let head = part(from, to, sent.len(), "");
        socket
            .write_all(head.as_bytes())
            .and_then(|()| socket.write_all(&sent[from..to]))
            .is_ok()
    });
    assert!(read_both_ways(&server, &bytes), "no ranges");
}

/// Where ranges are forbidden or not understood, the whole may be had.
#[test]
fn a_server_that_refuses_ranges_is_asked_without() {
    let bytes = noise(6, 100_000);
    for refusal in [
        "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n".to_owned(),
        "HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n".to_owned(),
        "HTTP/1.1 416 No\r\nContent-Length: 0\r\nContent-Range: bytes */100000\r\n\r\n".to_owned(),
        // Without a length, and no better for a part.
        "HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n<html>".to_owned(),
    ] {
        let sent = bytes.clone();
        let server = Scripted::new(move |number, request, socket| {
            if asked_range(request).is_some() {
                let _ = socket.write_all(refusal.as_bytes());
                return !refusal.contains("close");
            }
            // It is cut the first time, and begun anew without a range.
            let end = if number < 2 { 40_000 } else { sent.len() };
            let head = whole(sent.len(), "Accept-Ranges: bytes\r\n");
            socket
                .write_all(head.as_bytes())
                .and_then(|()| socket.write_all(&sent[..end]))
                .is_ok()
                && end == sent.len()
        });
        assert!(!read_both_ways(&server, &bytes), "ranges");
    }
}
