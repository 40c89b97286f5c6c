//! What is known of a file behind a server: its length and how it can be asked for. Every response is
//! held against that.
//!
//! Which bytes belong to the file, its length and the hashes of what is in it decide. An entity tag does
//! not: servers behind one name may each make their own. One that differs is noted for the reader of an
//! error.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::cause::Cause;
use super::head::{ContentRange, Head};

/// Bytes of a piece, where the whole has no length.
const PIECE_BYTES: u64 = 4 << 20;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// The bytes from the first number on, up to the second (exclusive) or to the end.
    Range(u64, Option<u64>),
    /// The file from byte 0 on, without a word of ranges.
    Whole,
}

impl Ask {
    /// The request's field, with its line's end; empty if there is none.
    pub(super) fn field(self) -> String {
        match self {
            Ask::Range(from, until) => format!("Range: bytes={}\r\n", range(from, until)),
            Ask::Whole => String::new(),
        }
    }
}

/// As in a `Range` field.
fn range(from: u64, until: Option<u64>) -> String {
    let last = until.map(|until| until.saturating_sub(1).to_string());
    format!("{from}-{}", last.unwrap_or_default())
}

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Identity {
    known: OnceLock<Known>,
    /// The server refused a range and gave the whole.
    refuses_ranges: AtomicBool,
    /// The server says no length of the whole, but one of a part.
    in_pieces: AtomicBool,
    /// How a later response differed.
    replaced: OnceLock<String>,
}

/// What the first response that was admitted said.
#[derive(Debug)]
struct Known {
    len: u64,
    ranges: bool,
    etag: Option<String>,
    last_modified: Option<String>,
}

impl Identity {
    /// Length in bytes; 0 before the first response.
    pub(super) fn len(&self) -> u64 {
        self.known.get().map_or(0, |known| known.len)
    }

    /// Whether ranges can be asked for.
    pub(super) fn ranges(&self) -> bool {
        self.known.get().is_some_and(|known| known.ranges)
    }

    /// What was different in a later response, in words, if anything was.
    pub(super) fn replaced(&self) -> Option<&str> {
        self.replaced.get().map(String::as_str)
    }

    /// How to ask for the bytes from `from` to `until`, or to the end. What comes may end before.
    pub(super) fn ask(&self, from: u64, until: Option<u64>) -> Ask {
        if self.refuses_ranges.load(Ordering::Relaxed) {
            return Ask::Whole;
        }
        let in_pieces = self.in_pieces.load(Ordering::Relaxed);
        let piece = in_pieces.then(|| {
            // Never all of it: that would be the whole again.
            let piece = PIECE_BYTES.min(self.len().div_ceil(2)).max(1);
            from.saturating_add(piece).min(self.len())
        });
        Ask::Range(from, until.or(piece))
    }

    /// How else to ask for the bytes from `from` to `until`, when `asked` led to `cause`.
    pub(super) fn other_way(&self, asked: Ask, until: Option<u64>, cause: &Cause) -> Option<Ask> {
        let is_opening = self.known.get().is_none();
        match (asked, cause) {
            // A part has a length where ranges work.
            (Ask::Range(0, None), Cause::NoLength) if is_opening => Some(Ask::Range(0, Some(1))),
            // A reader in order can skip what it has.
            (Ask::Range(..), Cause::Status(403 | 416)) if until.is_none() => Some(Ask::Whole),
            _ => None,
        }
    }

    /// Checks that `head` answers `asked` for the same file as ever, and returns the offset at which its
    /// body starts.
    pub(super) fn admit(&self, head: &Head, asked: Ask) -> Result<u64, Cause> {
        if let Some(coding) = &head.content_encoding {
            return Err(Cause::Coding(coding.clone()));
        }
        let is_opening = self.known.get().is_none();
        let start = match (asked, head.status, head.content_range) {
            (Ask::Whole, 200, _) => {
                self.same_file(head, body_length(head)?, false)?;
                0
            }
            (Ask::Range(from, until), 200, _) => {
                self.same_file(head, body_length(head)?, head.accept_ranges)?;
                if self.ranges() && (from > 0 || until.is_some()) {
                    return Err(Cause::RangeIgnored);
                }
                0
            }
            (Ask::Range(from, until), 206, Some(ContentRange::Part { first, last, total })) => {
                let end = until.unwrap_or(total);
                // `last` is below `total`, so neither of the sums below can overflow.
                let fits = first == from && last + 1 == end;
                self.same_length(total)?;
                if !fits || body_length(head)? != last - first + 1 {
                    let got = format!("{first}-{last}/{total}");
                    return Err(wrong_range(from, until, got));
                }
                self.same_file(head, total, true)?;
                from
            }
            (Ask::Range(from, until), 206, _) => {
                return Err(wrong_range(from, until, "none named".into()));
            }
            (Ask::Range(from, _), 416, Some(ContentRange::Unsatisfied { total })) => {
                self.same_length(total)?;
                if total > 0 || from > 0 {
                    return Err(Cause::Status(416));
                }
                self.same_file(head, 0, true)?;
                0
            }
            (_, status, _) => return Err(Cause::Status(status)),
        };
        if is_opening {
            let refuses_ranges = asked == Ask::Whole;
            self.refuses_ranges.store(refuses_ranges, Ordering::Relaxed);
            let in_pieces = matches!(asked, Ask::Range(0, Some(_))) && head.status == 206;
            self.in_pieces.store(in_pieces, Ordering::Relaxed);
        }
        Ok(start)
    }

    fn same_length(&self, len: u64) -> Result<(), Cause> {
        match self.known.get() {
            Some(known) if known.len != len => Err(Cause::Changed {
                was: known.len,
                now: len,
            }),
            _ => Ok(()),
        }
    }

    /// The first response says what the file is; each further one has to have its length.
    fn same_file(&self, head: &Head, len: u64, ranges: bool) -> Result<(), Cause> {
        self.same_length(len)?;
        let known = self.known.get_or_init(|| Known {
            len,
            ranges,
            etag: head.etag.clone(),
            last_modified: head.last_modified.clone(),
        });
        // A 416 describes no representation, so it need not repeat the validators.
        if head.status == 416 {
            return Ok(());
        }
        let (what, was, now) = if known.etag != head.etag {
            ("entity tag", &known.etag, &head.etag)
        } else {
            ("date of change", &known.last_modified, &head.last_modified)
        };
        if was != now {
            let show = |value: &Option<String>| value.clone().unwrap_or_else(|| "absent".into());
            let _ = self
                .replaced
                .set(format!("its {what} was {} and is {}", show(was), show(now)));
        }
        Ok(())
    }
}

fn body_length(head: &Head) -> Result<u64, Cause> {
    match head.content_length {
        Some(length) if head.transfer_encoding.is_none() => Ok(length),
        _ => Err(Cause::NoLength),
    }
}

fn wrong_range(from: u64, until: Option<u64>, got: String) -> Cause {
    Cause::WrongRange {
        asked: range(from, until),
        got,
    }
}
