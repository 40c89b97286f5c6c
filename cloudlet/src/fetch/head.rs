//! The head of an HTTP response, from the bytes a server sent to the few facts the client uses.
//! Everything here is the server's claim: sizes are limited, repeated or contradictory fields refused.

use httparse::Status;

/// Longest head, in bytes, status line and final empty line included.
pub const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most header fields of one head.
pub const FIELDS_MAX: usize = 64;
/// Longest value kept (entity tag, date, redirect target), in bytes.
const VALUE_BYTES_MAX: usize = 2048;

/// Why a response head was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HeadError {
    /// Not HTTP/1.x.
    #[error("the response is not HTTP/1.1")]
    Syntax(#[source] httparse::Error),
    /// Longer than [`HEAD_BYTES_MAX`].
    #[error("the response head is longer than {HEAD_BYTES_MAX} bytes")]
    TooLong,
    /// More fields than [`FIELDS_MAX`].
    #[error("the response head has more than {FIELDS_MAX} fields")]
    TooManyFields,
    /// A field that may be there once is there twice.
    #[error("the response head has more than one {0} field")]
    Repeated(&'static str),
    /// A field whose value makes no sense.
    #[error("the response head's {name} field {value:?} is malformed")]
    Value {
        /// Name of the field.
        name: &'static str,
        /// What stood there, shortened.
        value: String,
    },
}

/// `Content-Range` (RFC 9110, 14.4), with a known total length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentRange {
    /// Bytes `first..=last` of `total`.
    Part {
        /// Offset of the first byte.
        first: u64,
        /// Offset of the last byte.
        last: u64,
        /// Length of the whole file.
        total: u64,
    },
    /// The range that was asked for lies outside a file of this length.
    Unsatisfied {
        /// Length of the whole file.
        total: u64,
    },
}

/// What the client uses of a response head.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Head {
    /// Status code.
    pub status: u16,
    /// Length of the body in bytes.
    pub content_length: Option<u64>,
    /// Which part of the file the body is.
    pub content_range: Option<ContentRange>,
    /// Entity tag, with its quotes (and `W/` if weak).
    pub etag: Option<String>,
    /// Date of the last change, as the server wrote it.
    pub last_modified: Option<String>,
    /// Target of a redirect.
    pub location: Option<String>,
    /// Set if the body is sent with a transfer coding (`chunked`).
    pub transfer_encoding: Option<String>,
    /// Set if the body is compressed or otherwise not the file's own bytes.
    pub content_encoding: Option<String>,
    /// Whether the server says that it serves byte ranges.
    pub accept_ranges: bool,
    /// Whether the connection can carry another request after the body.
    pub keep_alive: bool,
}

impl Head {
    /// Parses the head at the start of `bytes`. `None` asks for more bytes; otherwise the head and
    /// its length in bytes, after which the body starts.
    ///
    /// # Errors
    /// The head breaks HTTP, a limit, or contradicts itself.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>, HeadError> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut response = httparse::Response::new(&mut fields);
        let window = &bytes[..bytes.len().min(HEAD_BYTES_MAX)];
        let length = match response.parse(window) {
            Ok(Status::Complete(length)) => length,
            Ok(Status::Partial) if bytes.len() >= HEAD_BYTES_MAX => return Err(HeadError::TooLong),
            Ok(Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyFields),
            Err(source) => return Err(HeadError::Syntax(source)),
        };
        let mut head = Head {
            status: response.code.unwrap_or(0),
            keep_alive: response.version == Some(1),
            ..Head::default()
        };
        for field in response.headers.iter() {
            head.take(field.name, field.value)?;
        }
        Ok(Some((head, length)))
    }

    fn take(&mut self, name: &str, value: &[u8]) -> Result<(), HeadError> {
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let length = digits(value).ok_or_else(|| bad("Content-Length", value))?;
                once("Content-Length", &mut self.content_length, length)
            }
            "content-range" => {
                let range = content_range(value).ok_or_else(|| bad("Content-Range", value))?;
                once("Content-Range", &mut self.content_range, range)
            }
            "etag" => once("ETag", &mut self.etag, text("ETag", value)?),
            "last-modified" => once(
                "Last-Modified",
                &mut self.last_modified,
                text("Last-Modified", value)?,
            ),
            "location" => once("Location", &mut self.location, text("Location", value)?),
            "transfer-encoding" => {
                let coding = text("Transfer-Encoding", value)?;
                once("Transfer-Encoding", &mut self.transfer_encoding, coding)
            }
            "content-encoding" => {
                let coding = text("Content-Encoding", value)?;
                if coding.eq_ignore_ascii_case("identity") {
                    return Ok(());
                }
                once("Content-Encoding", &mut self.content_encoding, coding)
            }
            "connection" => {
                let options = text("Connection", value)?;
                let mut options = options.split(',').map(str::trim);
                self.keep_alive &= !options.any(|option| option.eq_ignore_ascii_case("close"));
                Ok(())
            }
            "accept-ranges" => {
                let units = text("Accept-Ranges", value)?;
                self.accept_ranges |= units.eq_ignore_ascii_case("bytes");
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn once<T>(name: &'static str, slot: &mut Option<T>, value: T) -> Result<(), HeadError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(HeadError::Repeated(name)),
    }
}

fn bad(name: &'static str, value: &[u8]) -> HeadError {
    let shown = &value[..value.len().min(80)];
    HeadError::Value {
        name,
        value: String::from_utf8_lossy(shown).into_owned(),
    }
}

/// Visible ASCII and spaces only, of limited length.
fn text(name: &'static str, value: &[u8]) -> Result<String, HeadError> {
    let fine = |byte: &u8| (0x20..0x7f).contains(byte);
    if value.len() > VALUE_BYTES_MAX || !value.iter().all(fine) {
        return Err(bad(name, value));
    }
    Ok(String::from_utf8_lossy(value).trim().to_owned())
}

/// A decimal number without sign, and within `u64`.
pub(crate) fn digits(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

fn content_range(value: &[u8]) -> Option<ContentRange> {
    let rest = value.strip_prefix(b"bytes ")?;
    let slash = rest.iter().position(|byte| *byte == b'/')?;
    let total = digits(&rest[slash + 1..])?;
    let part = &rest[..slash];
    if part == b"*" {
        return Some(ContentRange::Unsatisfied { total });
    }
    let dash = part.iter().position(|byte| *byte == b'-')?;
    let (first, last) = (digits(&part[..dash])?, digits(&part[dash + 1..])?);
    (first <= last && last < total).then_some(ContentRange::Part { first, last, total })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(fields: &str) -> Result<Head, HeadError> {
        let bytes = format!("HTTP/1.1 206 Partial Content\r\n{fields}\r\nbody");
        let (head, length) = Head::parse(bytes.as_bytes())?.expect("a whole head");
        assert_eq!(&bytes[length..], "body");
        Ok(head)
    }

    #[test]
    fn a_whole_head() {
        let head = head(
            "content-length: 5\r\nContent-Range: bytes 5-9/100\r\nETag: \"a-b\"\r\n\
             Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\nX-Other: \u{e4}\r\n",
        )
        .expect("fine");
        assert_eq!(head.status, 206);
        assert_eq!(head.content_length, Some(5));
        assert_eq!(
            head.content_range,
            Some(ContentRange::Part {
                first: 5,
                last: 9,
                total: 100
            })
        );
        assert_eq!(head.etag.as_deref(), Some("\"a-b\""));
        assert!(head.keep_alive);
    }

    #[test]
    fn connection_close_and_old_versions_end_the_connection() {
        assert!(!head("Connection: foo, Close\r\n").expect("fine").keep_alive);
        let old = Head::parse(b"HTTP/1.0 200 OK\r\n\r\n")
            .expect("fine")
            .expect("whole");
        assert!(!old.0.keep_alive);
    }

    #[test]
    fn nonsense_is_refused() {
        for (fields, name) in [
            (
                "Content-Length: 5\r\nContent-Length: 5\r\n",
                "Content-Length",
            ),
            ("ETag: \"a\"\r\nEtag: \"b\"\r\n", "ETag"),
        ] {
            assert_eq!(head(fields), Err(HeadError::Repeated(name)));
        }
        for fields in [
            "Content-Length: +5\r\n",
            "Content-Length: 99999999999999999999\r\n",
            "Content-Length: \r\n",
            "Content-Range: bytes 5-4/100\r\n",
            "Content-Range: bytes 5-100/100\r\n",
            "Content-Range: bytes 5-9/*\r\n",
            "Content-Range: lines 5-9/100\r\n",
            "Location: /\u{e4}\r\n",
        ] {
            assert!(
                matches!(head(fields), Err(HeadError::Value { .. })),
                "{fields:?}"
            );
        }
        assert!(matches!(
            Head::parse(b"SSH-2.0-x\r\n\r\n"),
            Err(HeadError::Syntax(_))
        ));
    }

    #[test]
    fn limits_hold() {
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "a".repeat(HEAD_BYTES_MAX));
        assert_eq!(Head::parse(endless.as_bytes()), Err(HeadError::TooLong));
        let many = "X: a\r\n".repeat(FIELDS_MAX + 1);
        assert_eq!(head(&many), Err(HeadError::TooManyFields));
        assert_eq!(Head::parse(b"HTTP/1.1 200 OK\r\nX: a\r\n"), Ok(None));
    }

    proptest! {
        /// Whatever arrives: an answer, no panic, and never a head longer than what was given.
        #[test]
        fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            if let Ok(Some((_, length))) = Head::parse(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }

        /// The same behind a good status line, where the field parsers are reached, and every
        /// prefix of a good head only ever asks for more.
        #[test]
        fn random_fields(
            name in "(Content-Length|Content-Range|ETag|Location|Connection|Transfer-Encoding|X)",
            value in "[ -~]{0,60}|bytes [0-9*]{0,20}-[0-9]{0,20}/[0-9*]{0,20}",
        ) {
            let bytes = format!("HTTP/1.1 200 OK\r\n{name}: {value}\r\n\r\n").into_bytes();
            if let Ok(Some((head, length))) = Head::parse(&bytes) {
                prop_assert_eq!(length, bytes.len());
                prop_assert_eq!(head.status, 200);
                if let Some(ContentRange::Part { first, last, total }) = head.content_range {
                    prop_assert!(first <= last && last < total);
                }
                for end in 0..bytes.len() {
                    prop_assert_eq!(Head::parse(&bytes[..end]), Ok(None));
                }
            }
        }
    }
}
