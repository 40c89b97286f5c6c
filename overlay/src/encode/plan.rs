//! From classified pages to runs and segments.

use std::ops::Range;

use super::classify::Class;
use super::{EncodeError, Summary};
use crate::bytes::{to_u64, to_usize};
use crate::digest::OverlayId;
use crate::format::{DerivedRun, EARLY_SEGMENT_PAGES, LiteralRun, RUN_PAGES_MAX, SEGMENT_PAGES};
use crate::page::{PageAt, SpaceSize};

/// Rank of a page that is not an early one.
const REST: u32 = u32::MAX;

/// A page that may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Listed {
    pub(super) at: PageAt,
    /// Position among the early pages, or [`REST`].
    rank: u32,
}

/// All pages once, in the order of their places.
pub(super) fn list_pages(
    spaces: &[SpaceSize],
    early: &[PageAt],
    rest: &[PageAt],
) -> Result<Vec<Listed>, EncodeError> {
    super::check_limit("the number of early pages", early.len(), to_usize(REST - 1))?;
    let early = (0..).zip(early).map(|(rank, at)| Listed { at: *at, rank });
    let rest = rest.iter().map(|at| Listed {
        at: *at,
        rank: REST,
    });
    let mut listed: Vec<Listed> = early.chain(rest).collect();
    listed.sort_unstable();
    listed.dedup_by_key(|page| page.at);
    let mut spaces = spaces.iter();
    let mut size = spaces.next();
    for Listed { at, .. } in &listed {
        while size.is_some_and(|size| size.space < at.space) {
            size = spaces.next();
        }
        if !size.is_some_and(|size| size.space == at.space && at.page < size.pages) {
            return Err(EncodeError::NoSuchPage { at: *at });
        }
    }
    Ok(listed)
}

/// What will be in the file.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Literal runs in the order of the segments.
    pub(super) literal: Vec<LiteralRun>,
    pub(super) derived: Vec<DerivedRun>,
    /// For each segment its part of `literal`.
    pub(super) segments: Vec<Range<usize>>,
    pub(super) early_segments: usize,
    pub(super) literal_pages: u64,
    listed_pages: u64,
    unchanged_pages: u64,
    zero_pages: u64,
    base_pages: u64,
}

impl Plan {
    pub(super) fn new(listed: Vec<Listed>, classes: &[Class]) -> Self {
        let mut plan = Self {
            listed_pages: to_u64(listed.len()),
            ..Self::default()
        };
        let mut early = Vec::new();
        let mut rest = Vec::new();
        for (page, class) in listed.into_iter().zip(classes) {
            match class {
                Class::Unchanged => plan.unchanged_pages += 1,
                Class::Zero => {
                    plan.zero_pages += 1;
                    plan.add_derived(page.at, None);
                }
                Class::BasePage(source) => {
                    plan.base_pages += 1;
                    plan.add_derived(page.at, Some(u64::from(*source)));
                }
                Class::Literal if page.rank == REST => rest.push(page.at),
                Class::Literal => early.push(page),
            }
        }
        plan.literal_pages = to_u64(early.len() + rest.len());
        plan.add_early(early);
        plan.add_rest(&rest);
        plan
    }

    /// Adds a derived page, which comes after all those before, to the last run if it goes on.
    fn add_derived(&mut self, at: PageAt, base_page: Option<u64>) {
        if let Some(run) = self.derived.last_mut()
            && run.pages < RUN_PAGES_MAX
            && run.first.plus(run.pages) == at
            && run.base_page.map(|first| first + run.pages) == base_page
        {
            run.pages += 1;
            return;
        }
        self.derived.push(DerivedRun {
            first: at,
            pages: 1,
            base_page,
        });
    }

    /// Segments in the order of need; inside one, where order has no meaning, by place.
    fn add_early(&mut self, mut early: Vec<Listed>) {
        early.sort_unstable_by_key(|page| page.rank);
        for chunk in early.chunks_mut(EARLY_SEGMENT_PAGES) {
            chunk.sort_unstable();
            self.add_segment(chunk.iter().map(|page| page.at));
        }
        self.early_segments = self.segments.len();
    }

    /// Segments in the order of places, none of them in two spaces.
    fn add_rest(&mut self, rest: &[PageAt]) {
        for space in rest.chunk_by(|one, next| one.space == next.space) {
            for chunk in space.chunks(SEGMENT_PAGES) {
                self.add_segment(chunk.iter().copied());
            }
        }
    }

    fn add_segment(&mut self, pages: impl Iterator<Item = PageAt>) {
        let start = self.literal.len();
        for at in pages {
            match self.literal[start..].last_mut() {
                Some(run) if run.first.plus(run.pages) == at => run.pages += 1,
                _ => self.literal.push(LiteralRun {
                    first: at,
                    pages: 1,
                }),
            }
        }
        self.segments.push(start..self.literal.len());
    }

    /// The counts of pages; the caller knows the rest.
    pub(super) fn summary(&self, id: OverlayId) -> Summary {
        Summary {
            id,
            total_bytes: 0,
            index_bytes: 0,
            state_stored_bytes: 0,
            early_bytes: 0,
            segments: 0,
            early_segments: 0,
            listed_pages: self.listed_pages,
            unchanged_pages: self.unchanged_pages,
            zero_pages: self.zero_pages,
            base_pages: self.base_pages,
            literal_pages: self.literal_pages,
        }
    }
}
