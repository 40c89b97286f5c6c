//! The head of a request, from a client's bytes to a checked path and range.

use httparse::Status;

use crate::fetch::head::digits;

/// Longest request head, in bytes.
pub(super) const HEAD_BYTES_MAX: usize = 8 * 1024;
/// Most header fields of a request.
const FIELDS_MAX: usize = 48;

/// Why a request was refused, as the status that says so.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("status {0}")]
pub struct RequestError(
    /// HTTP status code.
    pub u16,
);

const BAD_REQUEST: RequestError = RequestError(400);
const NOT_FOUND: RequestError = RequestError(404);
const NOT_ALLOWED: RequestError = RequestError(405);
const TOO_LARGE: RequestError = RequestError(431);

/// A byte range as asked for (RFC 9110, 14.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeSpec {
    /// From an offset up to and including another, or to the end.
    From(u64, Option<u64>),
    /// The last so many bytes.
    Last(u64),
}

impl RangeSpec {
    /// First offset and number of bytes in a file of `len` bytes; `None` if it has none of them.
    pub fn within(self, len: u64) -> Option<(u64, u64)> {
        match self {
            RangeSpec::From(first, last) if first < len => {
                let last = last.unwrap_or(u64::MAX).min(len - 1);
                Some((first, last - first + 1))
            }
            RangeSpec::Last(count) if count > 0 && len > 0 => {
                let count = count.min(len);
                Some((len - count, count))
            }
            _ => None,
        }
    }
}

/// What the server uses of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Whether only the head is wanted.
    pub head_only: bool,
    /// Decoded, relative to the directory, without empty, `.`, `..` or hidden parts.
    pub path: String,
    /// The range, if one was asked for in a form that is served.
    pub range: Option<RangeSpec>,
    /// The range counts only for a file with this entity tag.
    pub if_range: Option<String>,
    /// The file is wanted only if it has one of these entity tags, as the field lists them.
    pub if_match: Option<String>,
    /// The file is wanted only if it has none of these.
    pub if_none_match: Option<String>,
    /// Whether another request may follow.
    pub keep_alive: bool,
}

impl Request {
    /// Parses the request at the start of `bytes`. `None` asks for more bytes; otherwise the
    /// request and the length of its head.
    ///
    /// # Errors
    /// The status to refuse it with.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, RequestError> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut parsed = httparse::Request::new(&mut fields);
        let length = match parsed.parse(&bytes[..bytes.len().min(HEAD_BYTES_MAX)]) {
            Ok(Status::Complete(length)) => length,
            Ok(Status::Partial) if bytes.len() >= HEAD_BYTES_MAX => return Err(TOO_LARGE),
            Ok(Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(TOO_LARGE),
            Err(_) => return Err(BAD_REQUEST),
        };
        let head_only = match parsed.method {
            Some("GET") => false,
            Some("HEAD") => true,
            _ => return Err(NOT_ALLOWED),
        };
        let mut request = Request {
            head_only,
            path: decode_path(origin_form(parsed.path.unwrap_or_default()))?,
            range: None,
            if_range: None,
            if_match: None,
            if_none_match: None,
            keep_alive: parsed.version == Some(1),
        };
        let mut ranges = 0;
        for field in parsed.headers.iter() {
            match field.name.to_ascii_lowercase().as_str() {
                "range" => {
                    ranges += 1;
                    request.range = parse_range(field.value);
                }
                "if-range" => {
                    request.if_range = Some(String::from_utf8_lossy(field.value).into_owned());
                }
                "if-match" => add_to_list(&mut request.if_match, field.value),
                "if-none-match" => add_to_list(&mut request.if_none_match, field.value),
                "connection" => {
                    let options = String::from_utf8_lossy(field.value).to_ascii_lowercase();
                    request.keep_alive &= !options.split(',').any(|one| one.trim() == "close");
                }
                // A body would be taken for the next request.
                "transfer-encoding" => return Err(BAD_REQUEST),
                "content-length" if digits(field.value) != Some(0) => return Err(BAD_REQUEST),
                _ => {}
            }
        }
        if ranges > 1 {
            request.range = None;
        }
        Ok(Some((request, length)))
    }
}

/// A target as a client writes it to the server itself. One in absolute form, as to a proxy, has scheme
/// and host before that, and every server takes it (RFC 9112, 3.2.2); which host is meant does not
/// matter here.
fn origin_form(target: &str) -> &str {
    let scheme = ["http://", "https://"].into_iter().find(|scheme| {
        let start = target.get(..scheme.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    });
    let Some(rest) = scheme.and_then(|scheme| target.get(scheme.len()..)) else {
        return target;
    };
    match rest.find(['/', '?']) {
        Some(end) => &rest[end..],
        None => "/",
    }
}

/// A field that may be there several times is one list (RFC 9110, 5.3).
fn add_to_list(list: &mut Option<String>, value: &[u8]) {
    let value = String::from_utf8_lossy(value);
    match list {
        Some(list) => {
            list.push(',');
            list.push_str(&value);
        }
        None => *list = Some(value.into_owned()),
    }
}

/// Whether the entity tag `tag`, a strong one, is in `list` (RFC 9110, 13.1.1 and 13.1.2): `*` is any,
/// and a weak tag of the list counts only for a `weak` comparison. What is behind a malformed tag is not
/// read.
pub(super) fn lists_tag(list: &str, tag: &str, weak: bool) -> bool {
    if list.trim() == "*" {
        return true;
    }
    let mut rest = list;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let (is_weak, quoted) = match rest.strip_prefix("W/") {
            Some(quoted) => (true, quoted),
            None => (false, rest),
        };
        let inner = quoted.strip_prefix('"');
        let Some((opaque, behind)) = inner.and_then(|inner| inner.split_once('"')) else {
            return false;
        };
        if (weak || !is_weak)
            && tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')) == Some(opaque)
        {
            return true;
        }
        rest = behind;
    }
}

/// One range of bytes; anything else is as if it were not there (RFC 9110, 14.2).
fn parse_range(value: &[u8]) -> Option<RangeSpec> {
    let spec = value.strip_prefix(b"bytes=")?;
    let dash = spec.iter().position(|byte| *byte == b'-')?;
    let (first, last) = (&spec[..dash], &spec[dash + 1..]);
    if first.is_empty() {
        return digits(last).map(RangeSpec::Last);
    }
    let first = digits(first)?;
    if last.is_empty() {
        return Some(RangeSpec::From(first, None));
    }
    let last = digits(last)?;
    (first <= last).then_some(RangeSpec::From(first, Some(last)))
}

/// Decodes the path of a request target. Whatever could lead out of the directory, or to a hidden
/// file, is not found; the kernel checks again when the file is opened.
fn decode_path(target: &str) -> Result<String, RequestError> {
    let raw = target.split(['?', '#']).next().unwrap_or_default();
    let raw = raw.strip_prefix('/').ok_or(BAD_REQUEST)?;
    let mut bytes = Vec::with_capacity(raw.len());
    let mut rest = raw.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(BAD_REQUEST);
        };
        bytes.push(u8::try_from(high * 16 + low).map_err(|_| BAD_REQUEST)?);
    }
    let path = String::from_utf8(bytes).map_err(|_| NOT_FOUND)?;
    let hidden = |part: &str| part.is_empty() || part.starts_with('.') || part.contains('\0');
    if path.split('/').any(hidden) {
        return Err(NOT_FOUND);
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Request, RequestError> {
        Request::parse(text.as_bytes()).map(|whole| whole.expect("a whole head").0)
    }

    #[test]
    fn a_request() {
        let text =
            "GET /a%20b/c.bin?x HTTP/1.1\r\nHost: h\r\nRange: bytes=5-\r\nIf-Range: \"t\"\r\n\r\n";
        let request = parse(text).expect("fine");
        assert_eq!(request.path, "a b/c.bin");
        assert_eq!(request.range, Some(RangeSpec::From(5, None)));
        assert_eq!(request.if_range.as_deref(), Some("\"t\""));
        assert!(request.keep_alive && !request.head_only);
    }

    #[test]
    fn paths_that_lead_elsewhere_are_not_found() {
        for path in [
            "/../x",
            "/a/../x",
            "/%2e%2e/x",
            "/a/%2E%2e%2fx",
            "/.git",
            "/a/.x",
            "/a//b",
            "/",
            "/a/",
            "/a%00",
            "/%ff",
        ] {
            let result = parse(&format!("GET {path} HTTP/1.1\r\n\r\n"));
            assert_eq!(result, Err(NOT_FOUND), "{path}");
        }
        for path in [
            "x",
            "/%",
            "/%2",
            "/%zz",
            "ftp://h/x",
            "http:/x",
            "http:x",
            "*",
        ] {
            let result = parse(&format!("GET {path} HTTP/1.1\r\n\r\n"));
            assert_eq!(result, Err(BAD_REQUEST), "{path}");
        }
    }

    #[test]
    fn targets_in_absolute_form_mean_the_same() {
        for target in [
            "http://h/a/b",
            "HTTP://h:8080/a/b?x=/y",
            "https://[::1]/a/b",
        ] {
            let request = parse(&format!("GET {target} HTTP/1.1\r\n\r\n"));
            assert_eq!(
                request.map(|request| request.path),
                Ok("a/b".to_owned()),
                "{target}"
            );
        }
        for target in [
            "http://h",
            "http://h?a/b",
            "http://h/../x",
            "http:///",
            "http://h//x",
        ] {
            let request = parse(&format!("GET {target} HTTP/1.1\r\n\r\n"));
            let refused = matches!(request, Err(NOT_FOUND | BAD_REQUEST));
            assert!(refused, "{target}: {request:?}");
        }
    }

    #[test]
    fn entity_tags_are_found_in_lists() {
        let tag = "\"a-b\"";
        for list in [
            "*",
            " * ",
            "\"a-b\"",
            "\"x\", \"a-b\"",
            "\"x,\",,\"a-b\"",
            "W/\"x\" ,\t\"a-b\"",
        ] {
            assert!(
                lists_tag(list, tag, true) && lists_tag(list, tag, false),
                "{list}"
            );
        }
        let weak = "\"x\", W/\"a-b\"";
        assert!(lists_tag(weak, tag, true) && !lists_tag(weak, tag, false));
        for list in [
            "",
            ",",
            "a-b",
            "\"a-b",
            "\"a-b,\"",
            "w/\"a-b\"",
            "x, \"a-b\"",
            "\"\"",
            "*, *",
        ] {
            assert!(!lists_tag(list, tag, true), "{list}");
        }
        let twice = "GET /x HTTP/1.1\r\nIf-None-Match: \"x\"\r\nIf-None-Match: \"a-b\"\r\nIf-Match: *\r\n\r\n";
        let request = parse(twice).expect("fine");
        assert_eq!(request.if_none_match.as_deref(), Some("\"x\",\"a-b\""));
        assert_eq!(request.if_match.as_deref(), Some("*"));
    }

    #[test]
    fn what_is_not_served_is_refused() {
        assert_eq!(parse("POST /x HTTP/1.1\r\n\r\n"), Err(NOT_ALLOWED));
        assert_eq!(
            parse("GET /x HTTP/1.1\r\nContent-Length: 3\r\n\r\n"),
            Err(BAD_REQUEST)
        );
        assert_eq!(
            parse("GET /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            Err(BAD_REQUEST)
        );
        let long = format!("GET /x HTTP/1.1\r\nX: {}", "a".repeat(HEAD_BYTES_MAX));
        assert_eq!(Request::parse(long.as_bytes()), Err(TOO_LARGE));
    }

    #[test]
    fn ranges() {
        let of = |text: &str| parse_range(text.as_bytes());
        assert_eq!(of("bytes=0-0").and_then(|r| r.within(10)), Some((0, 1)));
        assert_eq!(of("bytes=5-99").and_then(|r| r.within(10)), Some((5, 5)));
        assert_eq!(of("bytes=5-").and_then(|r| r.within(10)), Some((5, 5)));
        assert_eq!(of("bytes=-3").and_then(|r| r.within(10)), Some((7, 3)));
        assert_eq!(of("bytes=-30").and_then(|r| r.within(10)), Some((0, 10)));
        assert_eq!(of("bytes=10-").map(|r| r.within(10)), Some(None));
        assert_eq!(of("bytes=-0").map(|r| r.within(10)), Some(None));
        assert_eq!(of("bytes=0-").map(|r| r.within(0)), Some(None));
        for ignored in [
            "bytes=5-4",
            "bytes=0-1,3-4",
            "lines=0-1",
            "bytes=a-",
            "bytes=+1-2",
        ] {
            assert_eq!(of(ignored), None, "{ignored}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = Request::parse(&bytes);
        }

        #[test]
        fn random_paths_stay_inside(path in "/[a-c./%2eEfF0-9]{0,30}") {
            if let Ok(path) = decode_path(&path) {
                prop_assert!(path.split('/').all(|part| !part.is_empty() && !part.starts_with('.')));
            }
        }
    }
}
