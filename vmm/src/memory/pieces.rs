//! Planning of the mappings: which stretch of RAM is backed by what.
//!
//! Pure: takes runs of pages, gives a list of pieces that covers RAM. A delta is often scattered,
//! and each change of backing is one more mapping for the kernel to hold (`vm.max_map_count`,
//! 65530 by default, counts all of a process) and about 6 us to set up and register, as much as
//! copying several pages. So short stretches between
//! delta runs are absorbed into them, and the longer the list, the longer a stretch may be, until
//! the list fits. What is absorbed has to be placed by the pager like the delta itself: base pages
//! from the base's file, zero pages as zeros.

use super::layout::{LayoutError, PageRun, RamLayout};

/// Pieces a plan has at the most: far below the default `vm.max_map_count`, and some 12 ms to map.
pub const PIECES_MAX: usize = 2048;
/// Base pages between two delta runs that are cheaper to copy than to map.
const BASE_GAP: u64 = 8;
/// Zero pages beside a delta run that are cheaper to place than to map.
const ZERO_GAP: u64 = 16;

/// Why runs of pages make no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A run lies outside RAM.
    #[error("a run of the delta does not fit into RAM")]
    Run(#[source] LayoutError),
    /// A page is named twice.
    #[error("page {page} is named twice in the delta")]
    Twice {
        /// The first page of the second run that has it.
        page: u64,
    },
}

/// What is behind a piece of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backing {
    /// The base's memory file, mapped privately.
    Base,
    /// Anonymous memory that reads as zeros.
    Zero,
    /// Anonymous memory whose pages are placed by the pager.
    Delta,
}

/// A stretch of RAM with one backing, inside one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Its pages.
    pub run: PageRun,
    /// What is behind them.
    pub backing: Backing,
}

/// How RAM is put together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// The pieces, in order, from the first page of RAM to the last.
    pub pieces: Vec<Piece>,
    /// The pages whose contents come from outside: the delta as given, in order, neighbours joined.
    pub delta: Vec<PageRun>,
    /// Pages of the base inside delta pieces, in order.
    pub absorbed_base: Vec<PageRun>,
    /// Zero pages inside delta pieces, in order.
    pub absorbed_zero: Vec<PageRun>,
}

impl Plan {
    /// A plan with one backing for all of RAM.
    pub(super) fn whole(layout: &RamLayout, backing: Backing) -> Self {
        let pieces = layout.regions().iter().map(|region| Piece {
            run: region.run(),
            backing,
        });
        Self {
            pieces: pieces.collect(),
            delta: Vec::new(),
            absorbed_base: Vec::new(),
            absorbed_zero: Vec::new(),
        }
    }

    /// The pages of all pieces with a backing, in order.
    pub(super) fn runs_of(&self, backing: Backing) -> impl Iterator<Item = PageRun> + '_ {
        self.pieces
            .iter()
            .filter(move |piece| piece.backing == backing)
            .map(|piece| piece.run)
    }
}

/// Plans RAM of which the pages of `delta` come from outside, those of `zero` are zero, and the
/// rest is the base's, or zero if there is no base. The runs may come in any order. At most
/// `pieces_max` pieces come out, but never fewer than one a region.
///
/// # Errors
/// [`PlanError`] if a run is empty, lies outside RAM, or overlaps another.
pub(super) fn plan(
    layout: &RamLayout,
    has_base: bool,
    delta: &[PageRun],
    zero: &[PageRun],
    pieces_max: usize,
) -> Result<Plan, PlanError> {
    let named = named_runs(layout, delta, zero)?;
    let rest = if has_base {
        Backing::Base
    } else {
        Backing::Zero
    };
    let segments: Vec<Vec<Piece>> = layout
        .regions()
        .iter()
        .map(|region| cover(&region.run(), &named, rest))
        .collect();
    let delta = named.iter().filter(|piece| piece.backing == Backing::Delta);
    let delta = joined(delta.map(|piece| piece.run));
    let mut level = 0;
    loop {
        let mut plan = Plan {
            pieces: Vec::new(),
            delta: Vec::new(),
            absorbed_base: Vec::new(),
            absorbed_zero: Vec::new(),
        };
        for region in &segments {
            coarsen(region, level, &mut plan);
        }
        if plan.pieces.len() <= pieces_max || level >= u64::BITS {
            plan.delta = delta;
            return Ok(plan);
        }
        level += 1;
    }
}

/// All named runs in order, checked; neighbours of one kind joined.
fn named_runs(
    layout: &RamLayout,
    delta: &[PageRun],
    zero: &[PageRun],
) -> Result<Vec<Piece>, PlanError> {
    let kinds = [(delta, Backing::Delta), (zero, Backing::Zero)];
    let mut named = Vec::with_capacity(delta.len().saturating_add(zero.len()));
    for (runs, backing) in kinds {
        for run in runs {
            layout.check(run).map_err(PlanError::Run)?;
            named.push(Piece { run: *run, backing });
        }
    }
    named.sort_unstable_by_key(|piece| piece.run.first);
    if let Some(pair) = named
        .windows(2)
        .find(|pair| pair[1].run.first < pair[0].run.end())
    {
        return Err(PlanError::Twice {
            page: pair[1].run.first.0,
        });
    }
    let mut out: Vec<Piece> = Vec::with_capacity(named.len());
    for piece in named {
        push(&mut out, piece);
    }
    Ok(out)
}

/// Adds a piece behind the last one, joined with it where they are alike.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last) if last.backing == piece.backing && last.run.end() == piece.run.first => {
            last.run.count += piece.run.count;
        }
        _ => pieces.push(piece),
    }
}

fn joined(runs: impl Iterator<Item = PageRun>) -> Vec<PageRun> {
    let mut pieces = Vec::new();
    for run in runs {
        push(
            &mut pieces,
            Piece {
                run,
                backing: Backing::Delta,
            },
        );
    }
    pieces.into_iter().map(|piece| piece.run).collect()
}

/// Covers a region with the named pieces and the rest between them. Neighbours differ.
fn cover(region: &PageRun, named: &[Piece], rest: Backing) -> Vec<Piece> {
    let start = named.partition_point(|piece| piece.run.end() <= region.first);
    let mut out = Vec::new();
    let mut at = region.first;
    for piece in &named[start..] {
        let Some(run) = piece.run.overlap(region) else {
            break;
        };
        if at < run.first {
            let gap = PageRun {
                first: at,
                count: run.first.0 - at.0,
            };
            push(
                &mut out,
                Piece {
                    run: gap,
                    backing: rest,
                },
            );
        }
        push(
            &mut out,
            Piece {
                run,
                backing: piece.backing,
            },
        );
        at = run.end();
    }
    if at < region.end() {
        let gap = PageRun {
            first: at,
            count: region.end().0 - at.0,
        };
        push(
            &mut out,
            Piece {
                run: gap,
                backing: rest,
            },
        );
    }
    out
}

/// Joins neighbouring short segments and delta runs into delta pieces and adds the result to the
/// plan. Each level doubles what is short; from level 1 on, short segments are joined even where
/// no delta run is among them.
fn coarsen(segments: &[Piece], level: u32, plan: &mut Plan) {
    let short = |gap: u64| {
        gap.checked_shl(level)
            .filter(|s| s >> level == gap)
            .unwrap_or(u64::MAX)
    };
    let joins = |piece: &Piece| match piece.backing {
        Backing::Delta => true,
        Backing::Base => piece.run.count <= short(BASE_GAP),
        Backing::Zero => piece.run.count <= short(ZERO_GAP),
    };
    let mut rest = segments;
    while let Some(first) = rest.first() {
        let group_len = rest.iter().take_while(|piece| joins(piece)).count();
        let group = &rest[..group_len];
        let wanted = level > 0 || group.iter().any(|piece| piece.backing == Backing::Delta);
        if group_len < 2 || !wanted {
            let taken = group_len.max(1);
            plan.pieces.extend_from_slice(&rest[..taken]);
            rest = &rest[taken..];
            continue;
        }
        let count = group.iter().map(|piece| piece.run.count).sum();
        let run = PageRun {
            first: first.run.first,
            count,
        };
        plan.pieces.push(Piece {
            run,
            backing: Backing::Delta,
        });
        for piece in group {
            match piece.backing {
                Backing::Base => plan.absorbed_base.push(piece.run),
                Backing::Zero => plan.absorbed_zero.push(piece.run),
                Backing::Delta => {}
            }
        }
        rest = &rest[group_len..];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::layout::{PAGE_BYTES, PageSet, RamPage};
    use crate::memory::{HOLE_START, RamLayout};

    fn layout(pages: u64) -> RamLayout {
        RamLayout::new(pages * PAGE_BYTES).unwrap()
    }

    fn backings(plan: &Plan) -> Vec<(u64, u64, Backing)> {
        plan.pieces
            .iter()
            .map(|p| (p.run.first.0, p.run.count, p.backing))
            .collect()
    }

    #[test]
    fn long_stretches_stay_and_short_ones_are_absorbed() {
        let delta = [
            PageRun::new(104, 10),
            PageRun::new(0, 100),
            PageRun::new(500, 10),
        ];
        let zero = [PageRun::new(114, 16), PageRun::new(600, 40)];
        let plan = plan(&layout(1000), true, &delta, &zero, PIECES_MAX).unwrap();
        assert_eq!(
            backings(&plan),
            [
                (0, 130, Backing::Delta),
                (130, 370, Backing::Base),
                (500, 10, Backing::Delta),
                (510, 90, Backing::Base),
                (600, 40, Backing::Zero),
                (640, 360, Backing::Base),
            ]
        );
        assert_eq!(plan.absorbed_base, [PageRun::new(100, 4)]);
        assert_eq!(plan.absorbed_zero, [PageRun::new(114, 16)]);
        assert_eq!(plan.delta, [delta[1], delta[0], delta[2]]);
    }

    #[test]
    fn without_a_base_the_rest_is_zero() {
        let plan = plan(
            &layout(100),
            false,
            &[PageRun::new(50, 10)],
            &[],
            PIECES_MAX,
        )
        .unwrap();
        assert_eq!(
            backings(&plan),
            [
                (0, 50, Backing::Zero),
                (50, 10, Backing::Delta),
                (60, 40, Backing::Zero)
            ]
        );
    }

    #[test]
    fn pieces_end_at_the_hole() {
        let layout = RamLayout::new(HOLE_START + 100 * PAGE_BYTES).unwrap();
        let edge = HOLE_START / PAGE_BYTES;
        let delta = [PageRun::new(edge - 10, 20)];
        let plan = plan(&layout, true, &delta, &[], PIECES_MAX).unwrap();
        assert_eq!(
            backings(&plan),
            [
                (0, edge - 10, Backing::Base),
                (edge - 10, 10, Backing::Delta),
                (edge, 10, Backing::Delta),
                (edge + 10, 90, Backing::Base),
            ]
        );
        assert_eq!(plan.delta, delta);
    }

    #[test]
    fn bad_runs_are_refused() {
        let refused = |delta: &[(u64, u64)], zero: &[(u64, u64)]| {
            let runs = |list: &[(u64, u64)]| {
                list.iter()
                    .map(|run| PageRun::new(run.0, run.1))
                    .collect::<Vec<_>>()
            };
            plan(&layout(100), true, &runs(delta), &runs(zero), PIECES_MAX).is_err()
        };
        assert!(refused(&[(0, 0)], &[]));
        assert!(refused(&[(99, 2)], &[]));
        assert!(refused(&[(u64::MAX, 2)], &[]));
        assert!(refused(&[(10, 5), (14, 1)], &[]));
        assert!(refused(&[(10, 5)], &[(9, 2)]));
        assert!(!refused(&[(10, 5)], &[(9, 1), (15, 85)]));
    }

    proptest! {
        #[test]
        fn plans_cover_ram_and_keep_every_page_what_it_is(
            pages in 1u64..3000,
            has_base: bool,
            pieces_max in 1usize..200,
            cuts in prop::collection::vec((0u64..3000, 0u8..3), 0..400),
        ) {
            let layout = layout(pages);
            let mut cuts: Vec<_> = cuts.into_iter().filter(|cut| cut.0 < pages).collect();
            cuts.sort_unstable();
            cuts.dedup_by_key(|cut| cut.0);
            let ends = cuts.iter().skip(1).map(|cut| cut.0).chain([pages]);
            let runs: Vec<_> = cuts
                .iter()
                .zip(ends)
                .map(|(&(first, kind), end)| (PageRun::new(first, end - first), kind))
                .collect();
            let pick = |kind| runs.iter().filter(|r| r.1 == kind).map(|r| r.0).collect::<Vec<_>>();
            let (delta, zero) = (pick(1), pick(2));
            let plan = plan(&layout, has_base, &delta, &zero, pieces_max).unwrap();

            prop_assert!(plan.pieces.len() <= pieces_max);
            let mut at = RamPage(0);
            for piece in &plan.pieces {
                prop_assert_eq!(piece.run.first, at);
                prop_assert!(piece.run.count > 0);
                at = piece.run.end();
            }
            prop_assert_eq!(at.0, pages);

            let set = |runs: &[PageRun]| {
                let mut set = PageSet::new(pages);
                for run in runs { set.insert_run(run); }
                set
            };
            let pieces = |backing| set(&plan.runs_of(backing).collect::<Vec<_>>());
            let (in_delta, in_base, in_zero) =
                (pieces(Backing::Delta), pieces(Backing::Base), pieces(Backing::Zero));
            let (want_delta, want_zero) = (set(&delta), set(&zero));
            let (base, zeros) = (set(&plan.absorbed_base), set(&plan.absorbed_zero));
            prop_assert_eq!(&set(&plan.delta), &want_delta);
            for page in (0..pages).map(RamPage) {
                let kind = (want_delta.contains(page), want_zero.contains(page));
                let now = (in_delta.contains(page), in_base.contains(page), in_zero.contains(page),
                    base.contains(page), zeros.contains(page));
                let ok = match kind {
                    (true, _) => now == (true, false, false, false, false),
                    (_, false) if has_base => now == (false, true, false, false, false)
                        || now == (true, false, false, true, false),
                    _ => now == (false, false, true, false, false)
                        || now == (true, false, false, false, true),
                };
                prop_assert!(ok, "page {} is {:?}, but {:?}", page.0, kind, now);
            }
        }
    }
}
