//! From a changed VM to an overlay, in one pass: read, compare, find, compress, write.
//!
//! Pages come in an order of the caller's, the early ones first. Each is read once ([`read`]) and
//! is either what the base has there after all, zero, the same as a page of the base, the same as
//! one that has a slot already ([`slots`]), or gets a slot. Slots are put into segments as they come
//! ([`plan`]), and each segment goes to a [`Sink`] when it is full ([`sink`]). Reading and
//! compressing use all cores; a bounded number of segments is in memory at any time, and beside them
//! a table of bounded size. So what encoding takes in memory does not grow with the VM, but for the
//! index of a file, whose size the format bounds.

mod plan;
mod read;
mod sink;
mod slots;

use std::collections::HashSet;
use std::io::{self, Seek, Write};

use thiserror::Error;

use crate::base_hashes::BaseHashes;
use crate::bytes::to_u64;
use crate::codec::{LEVEL_DEFAULT, LEVELS, PartEncoder};
use crate::digest::{BaseId, OverlayId};
use crate::format::{FormatError, META_BYTES_MAX, STATE_BYTES_MAX};
use crate::page::{PageAt, PageReader, PageSpan, SPACE_PAGES_MAX, Space, SpaceSize};
use crate::{parallel, stages};

use plan::{Counts, Planner};
use read::{Jobs, Pool, Reader};
use sink::FileSink;

pub use sink::{SealedSegment, Sink};

/// What to encode.
#[derive(Clone, Copy)]
pub struct DeltaSpec<'a> {
    /// The base that the delta is against.
    pub base: BaseId,
    /// All spaces of the VM, in any order, with their sizes now and in the base.
    pub spaces: &'a [SpaceSize],
    /// Pages that are needed early, in the order in which they are needed. Those that have not
    /// changed are left out by themselves, and one that is listed twice counts once.
    pub early: &'a [PageAt],
    /// All pages that may have changed, the early ones among them, in the order of their places.
    pub changed: &'a dyn ChangedPages,
    /// Machine state; opaque here.
    pub state: &'a [u8],
    /// Anything else that a reader must know before it starts the VM; opaque here.
    pub meta: &'a [u8],
}

/// Pages that may have changed.
pub trait ChangedPages {
    /// Spans of them in the order of their places, none over another. What this gives may be made
    /// as it goes, so that nobody has to hold the whole list.
    fn spans(&self) -> Box<dyn Iterator<Item = PageSpan> + '_>;

    /// How many pages that is.
    fn pages(&self) -> u64 {
        self.spans().map(|span| span.pages).sum()
    }
}

impl ChangedPages for Vec<PageSpan> {
    fn spans(&self) -> Box<dyn Iterator<Item = PageSpan> + '_> {
        Box::new(self.iter().copied())
    }
}

/// The base, where it is at hand: without it no page is known to be unchanged.
#[derive(Clone, Copy)]
pub struct BaseContent<'a> {
    /// Reads the base's pages.
    pub pages: &'a dyn PageReader,
    /// Hashes of all its pages, to find pages that have moved.
    pub hashes: Option<&'a BaseHashes>,
}

/// How to encode.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// zstd level, one of [`LEVELS`]; [`LEVEL_DEFAULT`] unless told.
    pub level: i32,
    /// Number of threads; 0 for one a core.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            level: LEVEL_DEFAULT,
            threads: 0,
        }
    }
}

/// How far the encoder has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pages that are done with.
    pub done: u64,
    /// All pages.
    pub total: u64,
}

/// What came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Name of the overlay.
    pub id: OverlayId,
    /// Length of the file in bytes.
    pub total_bytes: u64,
    /// Length of the index in bytes.
    pub index_bytes: u64,
    /// Stored length of the machine state in bytes.
    pub state_stored_bytes: u64,
    /// Stored length of the early segments in bytes.
    pub early_bytes: u64,
    /// Number of segments.
    pub segments: u32,
    /// How many of them are early ones.
    pub early_segments: u32,
    /// Different pages that were listed.
    pub listed_pages: u64,
    /// Of these, the ones that have not changed.
    pub unchanged_pages: u64,
    /// The ones that are zero.
    pub zero_pages: u64,
    /// The ones that are the same as another page of the base.
    pub base_pages: u64,
    /// The ones that are the same as a page in a segment.
    pub repeated_pages: u64,
    /// The ones that are in segments.
    pub literal_pages: u64,
}

/// Why a delta could not be encoded.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// A space is listed twice, or has a number or size over the limits.
    #[error("{space} is listed twice or too large ({pages} pages, {base_pages} in the base)")]
    Space {
        /// The space.
        space: Space,
        /// Its pages.
        pages: u64,
        /// Its pages in the base.
        base_pages: u64,
    },
    /// A page is outside the spaces.
    #[error("the VM has no {at}")]
    NoSuchPage {
        /// The page.
        at: PageAt,
    },
    /// The changed pages are not listed in the order of their places.
    #[error("{at} is listed twice or too late among the changed pages")]
    Order {
        /// The page.
        at: PageAt,
    },
    /// Something is over a limit of the format.
    #[error("{what} is {found}, the limit is {limit}")]
    Limit {
        /// What.
        what: &'static str,
        /// How much there is.
        found: u64,
        /// How much there may be.
        limit: u64,
    },
    /// There is no such level.
    #[error("compression level {level} is not one of {} to {}", LEVELS.start(), LEVELS.end())]
    Level {
        /// The level.
        level: i32,
    },
    /// A page of the VM could not be read.
    #[error("cannot read {pages} pages from {first}")]
    Read {
        /// First page.
        first: PageAt,
        /// Number of pages.
        pages: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A page of the base could not be read.
    #[error("cannot read {pages} pages from {first} in the base")]
    ReadBase {
        /// First page.
        first: PageAt,
        /// Number of pages.
        pages: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The codec failed.
    #[error("cannot compress")]
    Compress(#[source] io::Error),
    /// The overlay could not be written.
    #[error("cannot write the overlay")]
    Write(#[source] io::Error),
    /// What was made breaks a rule of the format.
    #[error("the overlay does not fit the format")]
    Format(#[source] FormatError),
}

fn check_limit(what: &'static str, found: usize, limit: usize) -> Result<(), EncodeError> {
    if found > limit {
        return Err(EncodeError::Limit {
            what,
            found: to_u64(found),
            limit: to_u64(limit),
        });
    }
    Ok(())
}

/// Encodes a delta into `out`, where the overlay file begins at the place it stands at and is empty
/// behind that. `out` is best an unfinished file that is given its name when this has returned.
/// `progress` is called on the calling thread.
///
/// # Errors
/// Something listed does not exist or is over a limit, or reading or writing failed. `out` then
/// holds a file that no reader takes for an overlay.
pub fn encode<W: Write + Seek>(
    spec: &DeltaSpec<'_>,
    pages: &dyn PageReader,
    base: Option<BaseContent<'_>>,
    out: &mut W,
    options: Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Summary, EncodeError> {
    let spaces = check_spec(spec)?;
    check_level(options)?;
    let mut parts = PartEncoder::new(options.level);
    let (state, _) = parts
        .encode(spec.state.to_vec(), Vec::new())
        .map_err(EncodeError::Compress)?;
    let mut file = FileSink::new(out, state).map_err(EncodeError::Write)?;
    let delta = Delta {
        spaces: &spaces,
        early: spec.early,
        changed: spec.changed,
        pages,
        base,
    };
    let counts = delta.send(&mut file, options, progress)?;
    let (prefix, early_bytes) = file.finish(spec.base, &spaces, spec.meta, parts)?;
    Ok(Summary {
        id: prefix.id(),
        total_bytes: prefix.total_bytes(),
        index_bytes: prefix.index_bytes(),
        state_stored_bytes: prefix.state_stored_bytes(),
        early_bytes,
        segments: prefix.segments(),
        early_segments: prefix.early_segments(),
        listed_pages: counts.listed(),
        unchanged_pages: counts.unchanged,
        zero_pages: counts.zero,
        base_pages: counts.base,
        repeated_pages: counts.repeated,
        literal_pages: counts.literal,
    })
}

fn check_level(options: Options) -> Result<(), EncodeError> {
    let level = options.level;
    if LEVELS.contains(&level) {
        Ok(())
    } else {
        Err(EncodeError::Level { level })
    }
}

/// Pages on their way to a sink.
#[derive(Clone, Copy)]
struct Delta<'a> {
    spaces: &'a [SpaceSize],
    early: &'a [PageAt],
    changed: &'a dyn ChangedPages,
    pages: &'a dyn PageReader,
    base: Option<BaseContent<'a>>,
}

impl Delta<'_> {
    /// Sends all of them, the early ones first.
    fn send(
        self,
        sink: &mut dyn Sink,
        options: Options,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Counts, EncodeError> {
        let pool = Pool::default();
        let reader = Reader {
            spaces: self.spaces,
            pages: self.pages,
            base: self.base,
            level: options.level,
            pool: &pool,
        };
        let threads = parallel::threads(options.threads);
        let mut planner = Planner::new(sink, &pool, self.changed.pages(), progress);
        stages::run(
            threads,
            &reader,
            Jobs::new(self.early_spans()),
            &mut planner,
        )?;
        let done = planner.end_early();
        let rest = Jobs::new(self.other_spans(&done));
        stages::run(threads, &reader, rest, &mut planner)?;
        planner.end()?;
        Ok(planner.counts)
    }

    /// The early pages once each, in the order in which they are needed.
    fn early_spans(&self) -> impl Iterator<Item = Result<PageSpan, EncodeError>> + '_ {
        let mut seen = HashSet::new();
        let first = self.early.iter().filter(move |at| seen.insert(**at));
        first.map(|at| {
            self.check(&PageSpan {
                first: *at,
                pages: 1,
            })
        })
    }

    /// The changed pages but for those that are `done`, checked as they come.
    fn other_spans<'b>(
        &'b self,
        done: &'b HashSet<PageAt>,
    ) -> impl Iterator<Item = Result<PageSpan, EncodeError>> + 'b {
        let mut end: Option<PageAt> = None;
        let ordered = self.changed.spans().map(move |span| {
            let at = span.first;
            if end.is_some_and(|end| at < end) {
                return Err(EncodeError::Order { at });
            }
            end = Some(at.plus(span.pages));
            self.check(&span)
        });
        ordered.flat_map(move |span| {
            let (pieces, error) = match span {
                Ok(span) => (Some(without(span, done)), None),
                Err(error) => (None, Some(Err(error))),
            };
            pieces.into_iter().flatten().map(Ok).chain(error)
        })
    }

    fn check(&self, span: &PageSpan) -> Result<PageSpan, EncodeError> {
        let size = self
            .spaces
            .iter()
            .find(|size| size.space == span.first.space);
        let pages = size.map_or(0, |size| size.pages);
        if span.end() <= pages {
            return Ok(*span);
        }
        let outside = span.first.page.max(pages);
        Err(EncodeError::NoSuchPage {
            at: PageAt {
                space: span.first.space,
                page: outside,
            },
        })
    }
}

/// The parts of a span that are not `done`.
fn without(span: PageSpan, done: &HashSet<PageAt>) -> impl Iterator<Item = PageSpan> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if done.is_empty() {
            return (std::mem::replace(&mut at, span.pages) == 0 && span.pages > 0).then_some(span);
        }
        while at < span.pages && done.contains(&span.first.plus(at)) {
            at += 1;
        }
        let start = at;
        while at < span.pages && !done.contains(&span.first.plus(at)) {
            at += 1;
        }
        (at > start).then(|| PageSpan {
            first: span.first.plus(start),
            pages: at - start,
        })
    })
}

/// Checks the spec against the limits of the format; gives the spaces in order.
fn check_spec(spec: &DeltaSpec<'_>) -> Result<Vec<SpaceSize>, EncodeError> {
    check_limit("the length of the meta", spec.meta.len(), META_BYTES_MAX)?;
    check_limit(
        "the length of the machine state",
        spec.state.len(),
        STATE_BYTES_MAX,
    )?;
    let mut spaces = spec.spaces.to_vec();
    spaces.sort_unstable_by_key(|size| size.space);
    for (number, size) in spaces.iter().enumerate() {
        let twice = number > 0 && spaces[number - 1].space == size.space;
        let large = size.pages > SPACE_PAGES_MAX || size.base_pages > SPACE_PAGES_MAX;
        if twice || large || size.space.code().is_none() {
            let SpaceSize {
                space,
                pages,
                base_pages,
            } = *size;
            return Err(EncodeError::Space {
                space,
                pages,
                base_pages,
            });
        }
    }
    Ok(spaces)
}

#[cfg(test)]
mod tests;
