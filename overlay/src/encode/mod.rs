//! From a changed VM to an overlay file: compare, plan, compress in parallel, write.
//!
//! The pages that may have changed are read twice. The first pass ([`classify`]) decides for
//! each page whether it is the base's page after all, zero, the same as another page of the
//! base, or literal. With that, the run table and the length of the index are known ([`plan`]).
//! The second pass compresses the literal pages, segment by segment, on all cores and writes
//! them in order; a bounded number of segments is in memory at any time. The index is written
//! last, into the place that was left for it.

mod classify;
mod plan;

use std::io::{self, Seek, SeekFrom, Write};

use thiserror::Error;
use zstd::bulk::Compressor;

use crate::base_hashes::BaseHashes;
use crate::bytes::{to_u64, to_usize};
use crate::decode::StoredPart;
use crate::digest::{BaseId, OverlayId};
use crate::format::{
    FormatError, META_BYTES_MAX, Prefix, RUNS_MAX, SEGMENT_BYTES_MAX, SEGMENTS_MAX,
    STATE_BYTES_MAX, SegmentEntry, Tables, run_table, write_trailer,
};
use crate::page::{PAGE_BYTES, PageAt, PageReader, SPACE_PAGES_MAX, Space, SpaceSize};
use crate::parallel;

use plan::Plan;

/// zstd levels that are accepted. Beyond 9 encoding slows down a lot and gains a few percent.
pub const LEVELS: std::ops::RangeInclusive<i32> = 1..=19;
/// The level that overlays get. On the memory of a feature database it gives 67.0 MB where level 3
/// gives 66.2, and decodes at 910 MB/s where that decodes at 590.
pub const LEVEL_DEFAULT: i32 = 1;

/// What to encode.
#[derive(Clone, Copy, Debug)]
pub struct DeltaSpec<'a> {
    /// The base that the delta is against.
    pub base: BaseId,
    /// All spaces of the VM, in any order, with their sizes now and in the base.
    pub spaces: &'a [SpaceSize],
    /// Pages that are needed early, in the order in which they are needed. Those that have not
    /// changed are left out by themselves.
    pub early: &'a [PageAt],
    /// All other pages that may have changed, in any order. A page that is listed twice counts
    /// once, at its earliest place.
    pub rest: &'a [PageAt],
    /// Machine state; opaque here.
    pub state: &'a [u8],
    /// Anything else that a reader must know before it starts the VM; opaque here.
    pub meta: &'a [u8],
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

/// What the encoder is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Comparing pages.
    Compare {
        /// Pages compared.
        done: u64,
        /// Pages to compare.
        total: u64,
    },
    /// Compressing and writing literal pages.
    Compress {
        /// Pages written.
        done: u64,
        /// Pages to write.
        total: u64,
    },
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
    /// There is no such zstd level.
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

/// Encodes a delta into `out`, which begins where the overlay file begins and is empty behind
/// that. `out` is best an unfinished file that is given its name when this has returned.
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
    let level = options.level;
    if !LEVELS.contains(&level) {
        return Err(EncodeError::Level { level });
    }
    let threads = parallel::threads(options.threads);

    let listed = plan::list_pages(&spaces, spec.early, spec.rest)?;
    let classes = classify::classify(&listed, &spaces, pages, base, threads, progress)?;
    let plan = Plan::new(listed, &classes);
    drop(classes);
    check_limit(
        "the number of segments",
        plan.segments.len(),
        to_usize(SEGMENTS_MAX),
    )?;
    let runs = plan.literal.len() + plan.derived.len();
    check_limit(
        "the number of runs of changed pages",
        runs,
        to_usize(RUNS_MAX),
    )?;

    let mut compressor = Compressor::new(level).map_err(EncodeError::Compress)?;
    let mut part = |raw: &[u8]| {
        StoredPart::compress(&mut compressor, raw, &mut Vec::new()).map_err(EncodeError::Compress)
    };
    let state = part(spec.state)?;
    let run_table = part(&run_table(&plan.literal, &plan.derived))?;
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    let tables = Tables {
        base: spec.base,
        spaces: &spaces,
        meta: spec.meta,
        literal_runs: count(plan.literal.len()),
        derived_runs: count(plan.derived.len()),
        run_table: &run_table,
        state: &state,
        early_segments: count(plan.early_segments),
    };

    let (segments, prefix) = write_file(&tables, &plan, pages, (level, threads), out, progress)?;
    let early = &segments[..plan.early_segments];
    Ok(Summary {
        id: prefix.id(),
        total_bytes: prefix.total_bytes(),
        index_bytes: prefix.index_bytes(),
        state_stored_bytes: prefix.state_stored_bytes(),
        early_bytes: early
            .iter()
            .map(|segment| u64::from(segment.stored_bytes))
            .sum(),
        segments: prefix.segments(),
        early_segments: prefix.early_segments(),
        ..plan.summary(prefix.id())
    })
}

/// Writes all parts of the file, prefix and index last, into the place left for them. `effort` is
/// the level and the number of threads.
fn write_file<W: Write + Seek>(
    tables: &Tables<'_>,
    plan: &Plan,
    pages: &dyn PageReader,
    effort: (i32, usize),
    out: &mut W,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Vec<SegmentEntry>, Prefix), EncodeError> {
    let start = out.stream_position().map_err(EncodeError::Write)?;
    let head_bytes = crate::PREFIX_BYTES + tables.index_bytes(plan.segments.len());
    let first_part = start + to_u64(head_bytes);
    out.seek(SeekFrom::Start(first_part))
        .map_err(EncodeError::Write)?;
    out.write_all(&tables.state.bytes)
        .map_err(EncodeError::Write)?;
    let segments = write_segments(plan, pages, effort, out, progress)?;
    let (head, prefix) = tables.head(&segments).map_err(EncodeError::Format)?;
    write_trailer(out, &prefix).map_err(EncodeError::Write)?;
    out.seek(SeekFrom::Start(start))
        .map_err(EncodeError::Write)?;
    out.write_all(&head).map_err(EncodeError::Write)?;
    out.seek(SeekFrom::Start(start + prefix.total_bytes()))
        .map_err(EncodeError::Write)?;
    out.flush().map_err(EncodeError::Write)?;
    Ok((segments, prefix))
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

/// What a thread needs to compress segments.
struct Worker {
    level: i32,
    /// Made for the first segment, where a failure has somewhere to go.
    compressor: Option<Compressor<'static>>,
    raw: Vec<u8>,
    stored: Vec<u8>,
}

impl Worker {
    fn new(level: i32) -> Self {
        Self {
            level,
            compressor: None,
            raw: vec![0; SEGMENT_BYTES_MAX],
            stored: Vec::new(),
        }
    }

    /// Compresses the first `bytes` bytes of `raw`.
    fn compress(&mut self, bytes: usize) -> io::Result<StoredPart> {
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            none => none.insert(Compressor::new(self.level)?),
        };
        StoredPart::compress(compressor, &self.raw[..bytes], &mut self.stored)
    }
}

/// Compresses and writes all segments; gives their entries in the index.
fn write_segments<W: Write>(
    plan: &Plan,
    pages: &dyn PageReader,
    (level, threads): (i32, usize),
    out: &mut W,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<SegmentEntry>, EncodeError> {
    let mut entries = Vec::with_capacity(plan.segments.len());
    let mut done = 0;
    let total = plan.literal_pages;
    progress(Progress::Compress { done, total });
    parallel::ordered(
        threads,
        plan.segments.len(),
        || Worker::new(level),
        |worker, number| compress_segment(plan, number, pages, worker),
        |number, part: StoredPart| {
            out.write_all(&part.bytes).map_err(EncodeError::Write)?;
            // A segment has at most SEGMENT_PAGES runs and SEGMENT_BYTES_MAX bytes.
            entries.push(SegmentEntry {
                stored_bytes: u32::try_from(part.bytes.len()).unwrap_or(u32::MAX),
                runs: u16::try_from(plan.segments[number].len()).unwrap_or(u16::MAX),
                codec: part.codec,
                hash: part.hash,
            });
            done += to_u64(part.raw_bytes / PAGE_BYTES);
            progress(Progress::Compress { done, total });
            Ok(())
        },
    )?;
    Ok(entries)
}

fn compress_segment(
    plan: &Plan,
    number: usize,
    pages: &dyn PageReader,
    worker: &mut Worker,
) -> Result<StoredPart, EncodeError> {
    let mut used = 0;
    for run in &plan.literal[plan.segments[number].clone()] {
        // Segments were cut to at most SEGMENT_PAGES.
        let end = used + usize::try_from(run.pages).unwrap_or(usize::MAX) * PAGE_BYTES;
        let (first, count) = (run.first, run.pages);
        pages
            .read_run(first, &mut worker.raw[used..end])
            .map_err(|source| EncodeError::Read {
                first,
                pages: count,
                source,
            })?;
        used = end;
    }
    worker.compress(used).map_err(EncodeError::Compress)
}

#[cfg(test)]
mod tests;
