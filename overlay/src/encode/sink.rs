//! Where encoded segments go. Each stands alone, so whoever takes them need not wait for what
//! follows; a file is one such place.

use std::io::{self, Seek, SeekFrom, Write};

use super::EncodeError;
use crate::bytes::to_u64;
use crate::codec::{PartEncoder, StoredPart};
use crate::digest::{BaseId, Digest};
use crate::format::{Codec, DerivedRun, Prefix, RunTable, SegmentEntry, Tables, write_trailer};
use crate::page::{PageSpan, SpaceSize};

/// A segment with all that it takes to verify, decode and place it.
#[derive(Debug)]
pub struct SealedSegment {
    /// Its number, from 0; they come in this order.
    pub number: u32,
    /// Whether it holds what is needed early.
    pub early: bool,
    /// Where its slots go, in their order: each slot to one page.
    pub runs: Vec<PageSpan>,
    pub(crate) part: StoredPart,
}

impl SealedSegment {
    /// Pages in it.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.pages).sum()
    }

    /// The stored bytes.
    #[must_use]
    pub fn stored(&self) -> &[u8] {
        &self.part.bytes
    }

    /// How they are compressed.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.part.codec
    }

    /// Hash of the stored bytes.
    #[must_use]
    pub fn hash(&self) -> Digest {
        self.part.hash
    }
}

/// Takes what the encoder makes, as it makes it.
pub trait Sink {
    /// Takes the next segment.
    ///
    /// # Errors
    /// It could not be passed on; the encoder ends with that.
    fn segment(&mut self, segment: &SealedSegment) -> io::Result<()>;

    /// Takes pages that have no slot of their own. Slots that it names may be in a segment that has
    /// not been given to [`Sink::segment`] yet, but will be.
    ///
    /// # Errors
    /// As [`Sink::segment`].
    fn derived(&mut self, run: &DerivedRun) -> io::Result<()>;
}

/// Writes an overlay file: machine state and segments as they come, and index, trailer and prefix
/// when all are there. What it keeps is the index, which [`crate::format::RUNS_MAX`] bounds.
pub(super) struct FileSink<'a, W> {
    out: &'a mut W,
    start: u64,
    state: StoredPart,
    runs: RunTable,
    segments: Vec<SegmentEntry>,
    early_segments: u32,
    early_bytes: u64,
}

impl<'a, W: Write + Seek> FileSink<'a, W> {
    /// A file that begins where `out` stands.
    pub(super) fn new(out: &'a mut W, state: StoredPart) -> io::Result<Self> {
        let start = out.stream_position()?;
        out.seek(SeekFrom::Start(start + to_u64(crate::PREFIX_BYTES)))?;
        out.write_all(&state.bytes)?;
        Ok(Self {
            out,
            start,
            state,
            runs: RunTable::default(),
            segments: Vec::new(),
            early_segments: 0,
            early_bytes: 0,
        })
    }

    /// Writes the rest. Gives the prefix, and the stored length of the early segments.
    pub(super) fn finish(
        self,
        base: BaseId,
        spaces: &[SpaceSize],
        meta: &[u8],
        mut parts: PartEncoder,
    ) -> Result<(Prefix, u64), EncodeError> {
        let (literal_runs, derived_runs) = (self.runs.literal_runs(), self.runs.derived_runs());
        let (run_table, _) = parts
            .encode(self.runs.into_bytes(), Vec::new())
            .map_err(EncodeError::Compress)?;
        let tables = Tables {
            base,
            spaces,
            meta,
            literal_runs,
            derived_runs,
            run_table: &run_table,
            state: &self.state,
            early_segments: self.early_segments,
        };
        let (index, prefix) = tables.index(&self.segments).map_err(EncodeError::Format)?;
        let out = self.out;
        let mut write = || {
            out.write_all(&index)?;
            write_trailer(out, &prefix)?;
            out.seek(SeekFrom::Start(self.start))?;
            out.write_all(&prefix.to_bytes())?;
            out.seek(SeekFrom::Start(self.start + prefix.total_bytes()))?;
            out.flush()
        };
        write().map_err(EncodeError::Write)?;
        Ok((prefix, self.early_bytes))
    }
}

impl<W: Write + Seek> Sink for FileSink<'_, W> {
    fn segment(&mut self, segment: &SealedSegment) -> io::Result<()> {
        self.out.write_all(segment.stored())?;
        for run in &segment.runs {
            self.runs.push_literal(run);
        }
        // A segment has at most SEGMENT_PAGES runs and SEGMENT_BYTES_MAX bytes.
        let stored_bytes = u32::try_from(segment.stored().len()).unwrap_or(u32::MAX);
        self.segments.push(SegmentEntry {
            stored_bytes,
            runs: u16::try_from(segment.runs.len()).unwrap_or(u16::MAX),
            codec: segment.codec(),
            hash: segment.hash(),
        });
        if segment.early {
            self.early_segments += 1;
            self.early_bytes += u64::from(stored_bytes);
        }
        Ok(())
    }

    fn derived(&mut self, run: &DerivedRun) -> io::Result<()> {
        self.runs.push_derived(run);
        Ok(())
    }
}
