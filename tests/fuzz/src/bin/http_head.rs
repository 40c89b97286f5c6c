//! Heads of HTTP responses and requests: an answer, within limits, that agrees with itself.
//!
//! The two parsers are compiled in by path, since the crate around them would bring all of the
//! program into an instrumented build.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../../../cloudlet/src/fetch/head.rs"]
pub mod head;

/// The name by which the request's parser finds the other one.
mod fetch {
    pub use super::head;
}

#[path = "../../../../cloudlet/src/serve/request.rs"]
mod request;

use head::{ContentRange, HEAD_BYTES_MAX, Head};

fuzz_target!(|data: &[u8]| {
    check_response(data);
    check_response(&[b"HTTP/1.1 206 P\r\nContent-Range: bytes ", data].concat());
    check_request(data);
    check_request(&[b"GET /", data].concat());
    check_tags(&String::from_utf8_lossy(data));
});

/// A tag at the head of a list is found whatever follows it.
fn check_tags(rest: &str) {
    assert!(request::lists_tag(&format!("\"x\",{rest}"), "\"x\"", false));
    let strong = request::lists_tag(rest, "\"x\"", false);
    assert!(!strong || request::lists_tag(rest, "\"x\"", true));
}

fn check_response(bytes: &[u8]) {
    let Ok(Some((head, length))) = Head::parse(bytes) else {
        return;
    };
    assert!(length <= bytes.len() && length <= HEAD_BYTES_MAX);
    if let Some(ContentRange::Part { first, last, total }) = head.content_range {
        assert!(first <= last && last < total);
    }
    // What follows a head changes nothing in it.
    assert_eq!(Head::parse(&bytes[..length]), Ok(Some((head, length))));
}

fn check_request(bytes: &[u8]) {
    let Ok(Some((request, length))) = request::Request::parse(bytes) else {
        return;
    };
    assert!(length <= bytes.len());
    assert!(
        request
            .path
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.'))
    );
    if let Some(range) = request.range {
        for len in [0, 1, 4096, u64::MAX] {
            if let Some((offset, count)) = range.within(len) {
                assert!(count > 0 && count <= len && offset <= len - count);
            }
        }
    }
    assert_eq!(
        request::Request::parse(&bytes[..length]),
        Ok(Some((request, length)))
    );
}
