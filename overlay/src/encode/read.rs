//! What any thread does: reads pages once and compares them with the base; compresses segments.

use std::sync::{Mutex, PoisonError};

use super::plan::Chunk;
use super::sink::SealedSegment;
use super::{BaseContent, EncodeError};
use crate::bytes::{to_u64, to_usize};
use crate::codec::PartEncoder;
use crate::digest::Digest;
use crate::page::{PAGE_BYTES, PageAt, PageReader, PageSpan, Space, SpaceSize, is_zero};
use crate::stages::Work;

/// Pages read in one job.
pub(super) const JOB_PAGES: u64 = 256;

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// What a reader takes it for if the delta does not mention it.
    Unchanged,
    /// All bytes are zero.
    Zero,
    /// The same as this page of the base.
    BasePage(PageAt),
    /// Anything else, with the hash of its contents.
    Own(Digest),
}

/// Pages that were read, in the order of their job.
pub(super) struct Batch {
    pub(super) pages: Vec<(PageAt, Class)>,
    /// Their bytes.
    pub(super) bytes: Vec<u8>,
}

/// Buffers for reuse: none of them is allocated for each batch anew.
#[derive(Default)]
pub(super) struct Pool(Mutex<Vec<Vec<u8>>>);

impl Pool {
    /// One with whatever it held.
    pub(super) fn take(&self) -> Vec<u8> {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spare.pop().unwrap_or_default()
    }

    pub(super) fn give(&self, buffer: Vec<u8>) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spare.push(buffer);
    }
}

/// What the threads share.
pub(super) struct Reader<'a> {
    pub(super) spaces: &'a [SpaceSize],
    pub(super) pages: &'a dyn PageReader,
    pub(super) base: Option<BaseContent<'a>>,
    pub(super) level: i32,
    pub(super) pool: &'a Pool,
}

/// What a thread keeps.
pub(super) struct Context {
    parts: PartEncoder,
    base: Vec<u8>,
}

impl Work for Reader<'_> {
    type Context = Context;
    type Job = Vec<PageSpan>;
    type Batch = Batch;
    type Piece = Chunk;
    type Done = SealedSegment;
    type Error = EncodeError;

    fn context(&self) -> Context {
        Context {
            parts: PartEncoder::new(self.level),
            base: Vec::new(),
        }
    }

    fn batch(&self, context: &mut Context, job: Vec<PageSpan>) -> Result<Batch, EncodeError> {
        let count: u64 = job.iter().map(|span| span.pages).sum();
        let mut bytes = self.pool.take();
        // At most JOB_PAGES.
        bytes.resize(usize::try_from(count).unwrap_or(usize::MAX) * PAGE_BYTES, 0);
        let mut pages = Vec::with_capacity(bytes.len() / PAGE_BYTES);
        let mut rest = bytes.as_mut_slice();
        for span in &job {
            let length = usize::try_from(span.pages).unwrap_or(usize::MAX) * PAGE_BYTES;
            let (now, after) = rest.split_at_mut(length);
            rest = after;
            self.span(span, now, &mut context.base, &mut pages)?;
        }
        Ok(Batch { pages, bytes })
    }

    fn finish(&self, context: &mut Context, chunk: Chunk) -> Result<SealedSegment, EncodeError> {
        let (part, spare) = context
            .parts
            .encode(chunk.bytes, self.pool.take())
            .map_err(EncodeError::Compress)?;
        self.pool.give(spare);
        Ok(SealedSegment {
            number: chunk.number,
            early: chunk.early,
            runs: chunk.runs,
            part,
        })
    }
}

impl Reader<'_> {
    /// Reads and classifies contiguous pages.
    fn span(
        &self,
        span: &PageSpan,
        now: &mut [u8],
        there: &mut Vec<u8>,
        pages: &mut Vec<(PageAt, Class)>,
    ) -> Result<(), EncodeError> {
        let first = span.first;
        self.pages
            .read_run(first, now)
            .map_err(|source| EncodeError::Read {
                first,
                pages: span.pages,
                source,
            })?;
        let in_base = self.base_pages(first.space).saturating_sub(first.page);
        let in_base = usize::try_from(in_base.min(span.pages)).unwrap_or(usize::MAX);
        let compared = self.base.map_or(0, |_| in_base * PAGE_BYTES);
        if there.len() < compared {
            there.resize(compared, 0);
        }
        let there = &mut there[..compared];
        if let Some(base) = self.base
            && in_base > 0
        {
            base.pages
                .read_run(first, there)
                .map_err(|source| EncodeError::ReadBase {
                    first,
                    pages: to_u64(in_base),
                    source,
                })?;
        }
        let base_pages: &[[u8; PAGE_BYTES]] = there.as_chunks().0;
        for (number, page) in now.as_chunks().0.iter().enumerate() {
            let class = if base_pages.get(number) == Some(page) {
                Class::Unchanged
            } else if is_zero(page) {
                // Behind the end of the base, zero is what a page is if nobody says otherwise.
                if number < in_base {
                    Class::Zero
                } else {
                    Class::Unchanged
                }
            } else {
                self.find_in_base(first.space, page)?
            };
            pages.push((first.plus(to_u64(number)), class));
        }
        Ok(())
    }

    fn base_pages(&self, space: Space) -> u64 {
        self.spaces
            .iter()
            .find(|size| size.space == space)
            .map_or(0, |size| size.base_pages)
    }

    /// Looks for the same content elsewhere in the base, first in the same space. The hashes are
    /// truncated, and may be those of another base altogether, so the bytes decide.
    fn find_in_base(&self, space: Space, page: &[u8; PAGE_BYTES]) -> Result<Class, EncodeError> {
        let hash = Digest::of(page);
        let own = Class::Own(hash);
        let Some((base, hashes)) = self.base.and_then(|base| Some((base, base.hashes?))) else {
            return Ok(own);
        };
        let others = self.spaces.iter().map(|size| size.space);
        let spaces = std::iter::once(space).chain(others.filter(|other| *other != space));
        for space in spaces {
            let Some(number) = hashes.find_hash(space, &hash) else {
                continue;
            };
            let first = PageAt {
                space,
                page: u64::from(number),
            };
            if first.page >= self.base_pages(space) {
                continue;
            }
            let mut there = [0; PAGE_BYTES];
            base.pages
                .read(first, &mut there)
                .map_err(|source| EncodeError::ReadBase {
                    first,
                    pages: 1,
                    source,
                })?;
            if there == *page {
                return Ok(Class::BasePage(first));
            }
        }
        Ok(own)
    }
}

/// Cuts an iterator of spans into jobs of at most [`JOB_PAGES`] pages and as many spans.
pub(super) struct Jobs<I> {
    spans: I,
    rest: Option<PageSpan>,
}

impl<I> Jobs<I> {
    pub(super) fn new(spans: I) -> Self {
        Self { spans, rest: None }
    }
}

impl<I: Iterator<Item = Result<PageSpan, EncodeError>>> Iterator for Jobs<I> {
    type Item = Result<Vec<PageSpan>, EncodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut job = Vec::new();
        let mut room = JOB_PAGES;
        while room > 0 {
            let mut span = match self.rest.take() {
                Some(rest) => rest,
                None => match self.spans.next() {
                    Some(Ok(span)) => span,
                    Some(Err(error)) => return Some(Err(error)),
                    None => break,
                },
            };
            if span.pages > room {
                self.rest = Some(PageSpan {
                    first: span.first.plus(room),
                    pages: span.pages - room,
                });
                span.pages = room;
            }
            room -= span.pages;
            job.push(span);
        }
        (!job.is_empty()).then_some(Ok(job))
    }
}

/// Number of pages as a length in memory; batches are far below its range.
pub(super) fn page_bytes(bytes: &[u8], number: usize) -> &[u8] {
    &bytes[number * PAGE_BYTES..(number + 1) * PAGE_BYTES]
}

/// The position of a slot in its chunk.
pub(super) fn inside(slot: u32, first: u32) -> usize {
    to_usize(slot.saturating_sub(first))
}
