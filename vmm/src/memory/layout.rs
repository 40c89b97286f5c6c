//! Page numbers, runs and sets of pages, and where RAM sits in the guest's address space.
//!
//! Pure arithmetic: no mapping, no system call. A **RAM page number** is an offset in the memory
//! image divided by 4096; the image holds all RAM regions back to back, so page numbers have no
//! gap where the guest's address space has its hole below 4 GiB.

use vm_memory::GuestAddress;

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// Bytes in a page, for arithmetic on addresses and file offsets.
pub const PAGE_BYTES: u64 = 4096;
/// First guest address that is never RAM: the hole for devices and interrupt controllers.
pub const HOLE_START: u64 = 3 << 30;
/// First guest address after the hole, where the rest of RAM goes on.
pub const HOLE_END: u64 = 4 << 30;
/// The largest RAM a layout takes: it bounds every table that is sized by the number of pages.
pub const RAM_BYTES_MAX: u64 = 1 << 40;

const WORD_BITS: u64 = 64;

/// A length or index that is known to fit: the product runs on 64-bit targets only.
pub(crate) fn to_usize(value: u64) -> usize {
    const { assert!(usize::BITS == 64) };
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The other direction of [`to_usize`], as lossless as that.
pub(crate) fn to_u64(value: usize) -> u64 {
    const { assert!(usize::BITS == 64) };
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// What is wrong with a layout or with pages measured against it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// RAM is empty, not a whole number of pages, or larger than [`RAM_BYTES_MAX`].
    #[error("RAM of {bytes} bytes: it must be a multiple of 4096, from 4096 to {RAM_BYTES_MAX}")]
    Size {
        /// The bytes asked for.
        bytes: u64,
    },
    /// A run of pages is empty, or ends behind the last page of RAM.
    #[error("pages {first} + {count} lie outside RAM of {pages} pages, or are none")]
    Run {
        /// First page of the run.
        first: u64,
        /// Pages in the run.
        count: u64,
        /// Pages of RAM.
        pages: u64,
    },
}

/// The number of a RAM page: its offset in the memory image divided by 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RamPage(pub u64);

impl RamPage {
    /// Where the page starts in the memory image, in bytes.
    pub fn offset(self) -> u64 {
        self.0.saturating_mul(PAGE_BYTES)
    }
}

/// A run of neighbouring pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// First page.
    pub first: RamPage,
    /// Number of pages.
    pub count: u64,
}

impl PageRun {
    /// The run that starts at page `first` and has `count` pages.
    pub fn new(first: u64, count: u64) -> Self {
        Self {
            first: RamPage(first),
            count,
        }
    }

    /// The page behind the last one (at most `u64::MAX`, whatever the run claims).
    pub fn end(&self) -> RamPage {
        RamPage(self.first.0.saturating_add(self.count))
    }

    /// Bytes in the run.
    pub fn bytes(&self) -> u64 {
        self.count.saturating_mul(PAGE_BYTES)
    }

    /// Whether `page` is one of the run's.
    pub fn contains(&self, page: RamPage) -> bool {
        page >= self.first && page < self.end()
    }

    /// The pages that both runs have, if any.
    pub fn overlap(&self, other: &PageRun) -> Option<PageRun> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        (first < end).then(|| PageRun {
            first,
            count: end.0 - first.0,
        })
    }
}

/// One contiguous part of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// Where it starts in the guest's physical address space.
    pub gpa: GuestAddress,
    /// Where it starts in the memory image, in bytes.
    pub file_offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

impl RamRegion {
    /// The region's pages.
    pub fn run(&self) -> PageRun {
        PageRun::new(self.file_offset / PAGE_BYTES, self.len / PAGE_BYTES)
    }
}

/// Where RAM of a given size sits: `[0, min(size, 3 GiB))`, and the rest from 4 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamLayout {
    bytes: u64,
    regions: [RamRegion; 2],
    used: usize,
}

impl RamLayout {
    /// Lays out `bytes` of RAM.
    ///
    /// # Errors
    /// [`LayoutError::Size`] if `bytes` is no positive multiple of 4096 or above
    /// [`RAM_BYTES_MAX`].
    pub fn new(bytes: u64) -> Result<Self, LayoutError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) || bytes > RAM_BYTES_MAX {
            return Err(LayoutError::Size { bytes });
        }
        let low = bytes.min(HOLE_START);
        let high = bytes - low;
        let regions = [
            RamRegion {
                gpa: GuestAddress(0),
                file_offset: 0,
                len: low,
            },
            RamRegion {
                gpa: GuestAddress(HOLE_END),
                file_offset: low,
                len: high,
            },
        ];
        Ok(Self {
            bytes,
            regions,
            used: if high == 0 { 1 } else { 2 },
        })
    }

    /// The regions in order of address, which is also their order in the memory image.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions[..self.used]
    }

    /// Bytes of RAM: the length of the memory image.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE_BYTES
    }

    /// The page that holds a guest address, `None` if no RAM is there.
    pub fn page_at(&self, gpa: GuestAddress) -> Option<RamPage> {
        self.regions().iter().find_map(|region| {
            let offset = gpa.0.checked_sub(region.gpa.0)?;
            (offset < region.len).then(|| RamPage((region.file_offset + offset) / PAGE_BYTES))
        })
    }

    /// The guest address of a page, `None` if RAM has no such page.
    pub fn gpa_of(&self, page: RamPage) -> Option<GuestAddress> {
        self.regions().iter().find_map(|region| {
            region
                .run()
                .contains(page)
                .then(|| GuestAddress(region.gpa.0 + (page.offset() - region.file_offset)))
        })
    }

    /// Checks that a run is not empty and lies inside RAM.
    ///
    /// # Errors
    /// [`LayoutError::Run`] if it does not.
    pub fn check(&self, run: &PageRun) -> Result<(), LayoutError> {
        let end = run.first.0.checked_add(run.count);
        if run.count == 0 || end.is_none_or(|end| end > self.pages()) {
            return Err(LayoutError::Run {
                first: run.first.0,
                count: run.count,
                pages: self.pages(),
            });
        }
        Ok(())
    }
}

/// A set of RAM pages: a bit a page, iterated as runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// The empty set over `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; to_usize(pages.div_ceil(WORD_BITS))],
            pages,
        }
    }

    /// How many pages the set ranges over (not how many are in it).
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds a page; one out of range changes nothing.
    pub fn insert(&mut self, page: RamPage) {
        self.insert_run(&PageRun {
            first: page,
            count: 1,
        });
    }

    /// Adds the pages of a run as far as they are in range.
    pub fn insert_run(&mut self, run: &PageRun) {
        let end = run.end().0.min(self.pages);
        let mut at = run.first.0;
        while at < end {
            let (word, mask, next) = word_mask(at, end);
            self.words[word] |= mask;
            at = next;
        }
    }

    /// Takes the pages of a run out of the set.
    pub fn remove_run(&mut self, run: &PageRun) {
        let end = run.end().0.min(self.pages);
        let mut at = run.first.0;
        while at < end {
            let (word, mask, next) = word_mask(at, end);
            self.words[word] &= !mask;
            at = next;
        }
    }

    /// Adds a bitmap whose bit 0 stands for page `first`; bits out of range change nothing.
    pub fn insert_bits(&mut self, first: RamPage, bits: &[u64]) {
        let mut base = first.0;
        for &word in bits {
            let mut left = word;
            while left != 0 {
                let start = u64::from(left.trailing_zeros());
                let len = u64::from((left >> start).trailing_ones());
                self.insert_run(&PageRun::new(base.saturating_add(start), len));
                left &= if start + len == WORD_BITS {
                    0
                } else {
                    u64::MAX << (start + len)
                };
            }
            base = base.saturating_add(WORD_BITS);
        }
    }

    /// Adds every page of `other` that is in range.
    pub fn union_with(&mut self, other: &PageSet) {
        for run in other.runs() {
            self.insert_run(&run);
        }
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: RamPage) -> bool {
        page.0 < self.pages
            && self.words[to_usize(page.0 / WORD_BITS)] & (1 << (page.0 % WORD_BITS)) != 0
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The set as runs, as long as they can be, in order.
    pub fn runs(&self) -> Runs<'_> {
        Runs { set: self, at: 0 }
    }

    /// The pages in order.
    pub fn iter(&self) -> impl Iterator<Item = RamPage> + '_ {
        self.runs()
            .flat_map(|run| (run.first.0..run.end().0).map(RamPage))
    }

    /// The first page at or behind `from` that is in the set (`wanted`) or not in it.
    fn next(&self, from: u64, wanted: bool) -> u64 {
        let flip = if wanted { 0 } else { u64::MAX };
        let mut at = from;
        while at < self.pages {
            let word = (self.words[to_usize(at / WORD_BITS)] ^ flip) >> (at % WORD_BITS);
            if word != 0 {
                return (at + u64::from(word.trailing_zeros())).min(self.pages);
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        self.pages
    }
}

/// The runs of a [`PageSet`].
#[derive(Debug)]
pub struct Runs<'a> {
    set: &'a PageSet,
    at: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let first = self.set.next(self.at, true);
        if first >= self.set.pages {
            return None;
        }
        let end = self.set.next(first, false);
        self.at = end;
        Some(PageRun::new(first, end - first))
    }
}

/// The word that holds bit `at`, the mask of its bits in `[at, end)`, and the bit to go on with.
pub(crate) fn word_mask(at: u64, end: u64) -> (usize, u64, u64) {
    let low = at % WORD_BITS;
    let next = (at - low + WORD_BITS).min(end);
    let len = next - at;
    let mask = if len == WORD_BITS {
        u64::MAX
    } else {
        ((1 << len) - 1) << low
    };
    (to_usize(at / WORD_BITS), mask, next)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn small_ram_is_one_region() {
        let layout = RamLayout::new(16 << 20).unwrap();
        assert_eq!(layout.regions().len(), 1);
        assert_eq!(layout.pages(), 4096);
        assert_eq!(layout.page_at(GuestAddress(0x1fff)), Some(RamPage(1)));
        assert_eq!(layout.page_at(GuestAddress(16 << 20)), None);
        assert_eq!(layout.gpa_of(RamPage(4095)), Some(GuestAddress(0xfff000)));
        assert_eq!(layout.gpa_of(RamPage(4096)), None);
    }

    #[test]
    fn large_ram_goes_on_behind_the_hole() {
        let layout = RamLayout::new(5 << 30).unwrap();
        let [low, high] = layout.regions() else {
            panic!("two regions")
        };
        assert_eq!((low.gpa.0, low.file_offset, low.len), (0, 0, 3 << 30));
        assert_eq!(
            (high.gpa.0, high.file_offset, high.len),
            (4 << 30, 3 << 30, 2 << 30)
        );
        assert_eq!(layout.page_at(GuestAddress(3 << 30)), None);
        assert_eq!(
            layout.page_at(GuestAddress(4 << 30)),
            Some(RamPage(3 << 18))
        );
        assert_eq!(layout.gpa_of(RamPage(3 << 18)), Some(GuestAddress(4 << 30)));
        assert_eq!(RamLayout::new(3 << 30).unwrap().regions().len(), 1);
    }

    #[test]
    fn impossible_sizes_and_runs_are_refused() {
        for bytes in [0, 1, 4095, RAM_BYTES_MAX + PAGE_BYTES, u64::MAX] {
            assert_eq!(RamLayout::new(bytes), Err(LayoutError::Size { bytes }));
        }
        let layout = RamLayout::new(PAGE_BYTES * 10).unwrap();
        assert!(layout.check(&PageRun::new(0, 10)).is_ok());
        for (first, count) in [(0, 0), (0, 11), (10, 1), (u64::MAX, 1), (5, u64::MAX)] {
            assert!(
                layout.check(&PageRun::new(first, count)).is_err(),
                "{first} + {count}"
            );
        }
    }

    proptest! {
        #[test]
        fn sets_behave_like_sets(
            pages in 1u64..400,
            steps in prop::collection::vec((any::<bool>(), 0u64..420, 0u64..150), 0..20),
        ) {
            let mut set = PageSet::new(pages);
            let mut model = BTreeSet::new();
            for (add, first, count) in steps {
                let run = PageRun::new(first, count);
                for page in (first..first + count).filter(|&page| page < pages) {
                    if add { model.insert(page); } else { model.remove(&page); }
                }
                if add { set.insert_run(&run) } else { set.remove_run(&run) }
            }
            prop_assert_eq!(set.iter().map(|page| page.0).collect::<Vec<_>>(),
                model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            for page in 0..pages + 70 {
                prop_assert_eq!(set.contains(RamPage(page)), model.contains(&page));
            }
            let mut last_end = None;
            for run in set.runs() {
                prop_assert!(run.count > 0);
                prop_assert!(last_end.is_none_or(|end| run.first.0 > end));
                last_end = Some(run.end().0);
            }
        }

        #[test]
        fn bitmaps_land_where_they_belong(
            first in 0u64..100,
            bits in prop::collection::vec(any::<u64>(), 0..4),
        ) {
            let mut set = PageSet::new(300);
            set.insert_bits(RamPage(first), &bits);
            for page in 0..300u64 {
                let expected = page.checked_sub(first).is_some_and(|bit| {
                    bits.get(to_usize(bit / 64)).is_some_and(|word| word >> (bit % 64) & 1 == 1)
                });
                prop_assert_eq!(set.contains(RamPage(page)), expected);
            }
        }
    }
}
