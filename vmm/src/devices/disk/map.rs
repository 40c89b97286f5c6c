//! Two bits for each block: where its contents are.
//!
//! | bits | kind | contents |
//! | --- | --- | --- |
//! | 00 | base | the base image's, or zeros beyond its end |
//! | 01 | present | the layer's |
//! | 10 | zero | zeros |
//! | 11 | | no such kind: refused |
//!
//! Block n has bits 2(n mod 4) and 2(n mod 4)+1 of byte n/4. The map also knows which of its own
//! 4 KiB pages differ from the file.

/// Where a block's contents are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockKind {
    /// In the base image, or zeros where there is none.
    Base,
    /// In the layer.
    Present,
    /// Nowhere: it is all zeros.
    Zero,
}

/// Neighbouring blocks of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRun {
    /// The first block.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// What they are.
    pub kind: BlockKind,
}

/// Bytes in a page of the map.
pub(super) const MAP_PAGE: usize = 4096;

/// The map of one layer.
#[derive(Debug)]
pub(super) struct BlockMap {
    blocks: u64,
    /// Whole pages. Allocated zeroed, so that the untouched part of a large disk's map costs
    /// nothing.
    bytes: Vec<u8>,
    /// A bit for each page.
    dirty: Vec<u64>,
}

/// Bytes of a map for `blocks` blocks, in whole pages.
pub(super) fn map_bytes(blocks: u64) -> u64 {
    let page = MAP_PAGE as u64;
    blocks.div_ceil(4).div_ceil(page) * page
}

impl BlockMap {
    /// A map in which every block is the base's. The caller has checked the number of blocks
    /// against a limit.
    pub(super) fn new(blocks: u64) -> Self {
        let len = usize::try_from(map_bytes(blocks)).unwrap_or(0);
        let pages = len / MAP_PAGE;
        Self {
            blocks,
            bytes: vec![0; len],
            dirty: vec![0; pages.div_ceil(64)],
        }
    }

    /// Takes the bytes of page `index` from a file. False if they hold what no map can.
    pub(super) fn load_page(&mut self, index: usize, page: &[u8; MAP_PAGE]) -> bool {
        if page.iter().any(|byte| byte & byte >> 1 & 0x55 != 0) {
            return false;
        }
        if page.iter().all(|byte| *byte == 0) {
            return true;
        }
        let at = index * MAP_PAGE;
        let Some(slot) = self.bytes.get_mut(at..at + MAP_PAGE) else {
            return false;
        };
        slot.copy_from_slice(page);
        // Nothing may be said of blocks beyond the disk's end.
        let last = usize::try_from(self.blocks / 4).unwrap_or(usize::MAX);
        let used = 1_u8
            .checked_shl(u32::try_from(self.blocks % 4 * 2).unwrap_or(0))
            .unwrap_or(0);
        let beyond = self.bytes.get(last..).unwrap_or(&[]);
        match beyond.split_first() {
            Some((edge, rest)) => {
                edge & !(used.wrapping_sub(1)) == 0 && rest.iter().all(|byte| *byte == 0)
            }
            None => true,
        }
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What `block` is; blocks beyond the end are the base's, which has nothing there.
    pub(super) fn kind(&self, block: u64) -> BlockKind {
        let byte = usize::try_from(block / 4)
            .ok()
            .and_then(|at| self.bytes.get(at));
        match byte.copied().unwrap_or(0) >> (block % 4 * 2) & 3 {
            0 => BlockKind::Base,
            1 => BlockKind::Present,
            _ => BlockKind::Zero,
        }
    }

    /// The kind of `first` and how many blocks from there on, at most `count_max`, share it.
    pub(super) fn run(&self, first: u64, count_max: u64) -> BlockRun {
        let kind = self.kind(first);
        let same = bits(kind) * 0x55;
        let end = first
            .saturating_add(count_max)
            .min(self.blocks.max(first + 1));
        let mut block = first + 1;
        while block < end {
            let whole = block.is_multiple_of(4) && end - block >= 4;
            let byte = usize::try_from(block / 4)
                .ok()
                .and_then(|at| self.bytes.get(at));
            if whole && byte == Some(&same) {
                block += 4;
            } else if self.kind(block) == kind {
                block += 1;
            } else {
                break;
            }
        }
        BlockRun {
            first,
            count: block - first,
            kind,
        }
    }

    /// Says that the `count` blocks from `first` are of `kind`.
    pub(super) fn set(&mut self, first: u64, count: u64, kind: BlockKind) {
        let end = first.saturating_add(count).min(self.blocks);
        if first >= end {
            return;
        }
        let mut block = first;
        while block < end && !block.is_multiple_of(4) {
            self.set_one(block, kind);
            block += 1;
        }
        let whole_end = (end / 4).max(block / 4);
        let range = usize::try_from(block / 4).unwrap_or(usize::MAX)
            ..usize::try_from(whole_end).unwrap_or(usize::MAX);
        if let Some(bytes) = self.bytes.get_mut(range) {
            bytes.fill(bits(kind) * 0x55);
        }
        for block in block.max(whole_end * 4)..end {
            self.set_one(block, kind);
        }
        let page = |block: u64| usize::try_from(block / 4).unwrap_or(0) / MAP_PAGE;
        for page in page(first)..=page(end - 1) {
            self.set_dirty(page, true);
        }
    }

    fn set_one(&mut self, block: u64, kind: BlockKind) {
        let shift = block % 4 * 2;
        if let Some(byte) = usize::try_from(block / 4)
            .ok()
            .and_then(|at| self.bytes.get_mut(at))
        {
            *byte = *byte & !(3 << shift) | bits(kind) << shift;
        }
    }

    /// All runs that are not the base's, in order.
    pub(super) fn changed(&self) -> Vec<BlockRun> {
        let mut runs: Vec<BlockRun> = Vec::new();
        for (index, chunk) in (0_u64..).zip(self.bytes.chunks(8)) {
            if chunk.iter().all(|byte| *byte == 0) {
                continue;
            }
            for block in index * 32..(index * 32 + 32).min(self.blocks) {
                let kind = self.kind(block);
                match runs.last_mut() {
                    _ if kind == BlockKind::Base => {}
                    Some(run) if run.kind == kind && run.first + run.count == block => {
                        run.count += 1;
                    }
                    _ => runs.push(BlockRun {
                        first: block,
                        count: 1,
                        kind,
                    }),
                }
            }
        }
        runs
    }

    pub(super) fn set_dirty(&mut self, page: usize, dirty: bool) {
        if let Some(word) = self.dirty.get_mut(page / 64) {
            let bit = 1 << (page % 64);
            *word = if dirty { *word | bit } else { *word & !bit };
        }
    }

    /// Copies of up to `pages_max` pages that differ from the file, which then count as the file's.
    pub(super) fn take_dirty(&mut self, pages_max: usize) -> Vec<(usize, Vec<u8>)> {
        let mut taken = Vec::new();
        for word in 0..self.dirty.len() {
            while let Some(bits) = self.dirty.get(word).copied().filter(|bits| *bits != 0) {
                if taken.len() == pages_max {
                    return taken;
                }
                let page = word * 64 + usize::try_from(bits.trailing_zeros()).unwrap_or(0);
                self.set_dirty(page, false);
                let at = page * MAP_PAGE;
                if let Some(bytes) = self.bytes.get(at..at + MAP_PAGE) {
                    taken.push((page, bytes.to_vec()));
                }
            }
        }
        taken
    }

    /// The map's bytes as a file has them.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// The two bits of a kind.
fn bits(kind: BlockKind) -> u8 {
    match kind {
        BlockKind::Base => 0,
        BlockKind::Present => 1,
        BlockKind::Zero => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kind() -> impl Strategy<Value = BlockKind> {
        prop::sample::select(vec![BlockKind::Base, BlockKind::Present, BlockKind::Zero])
    }

    proptest! {
        #[test]
        fn agrees_with_a_list(
            blocks in 1_u64..200,
            sets in prop::collection::vec((0_u64..220, 0_u64..90, kind()), 0..20),
        ) {
            let mut map = BlockMap::new(blocks);
            let mut list = vec![BlockKind::Base; usize::try_from(blocks).unwrap()];
            for (first, count, kind) in sets {
                map.set(first, count, kind);
                for slot in list.iter_mut().skip(first.try_into().unwrap()).take(count.try_into().unwrap()) {
                    *slot = kind;
                }
            }
            for (block, kind) in (0..).zip(&list) {
                prop_assert_eq!(map.kind(block), *kind);
                let run = map.run(block, 1000);
                let same = list[usize::try_from(block).unwrap()..].iter().take_while(|k| *k == kind);
                prop_assert_eq!(run.count, same.count() as u64);
                prop_assert_eq!(map.run(block, 3).count, run.count.min(3));
            }
            let changed: Vec<(u64, BlockKind)> = map
                .changed()
                .iter()
                .flat_map(|run| (run.first..run.first + run.count).map(|block| (block, run.kind)))
                .collect();
            let expected: Vec<(u64, BlockKind)> =
                (0..).zip(list).filter(|(_, kind)| *kind != BlockKind::Base).collect();
            prop_assert_eq!(changed, expected);
            // Its own bytes load again.
            let mut copy = BlockMap::new(blocks);
            let page: [u8; MAP_PAGE] = map.bytes().try_into().unwrap();
            prop_assert!(copy.load_page(0, &page));
            prop_assert_eq!(copy.bytes(), map.bytes());
        }
    }

    #[test]
    fn impossible_pages_are_refused() {
        let mut page = [0; MAP_PAGE];
        page[7] = 0b0011_0000;
        assert!(!BlockMap::new(1000).load_page(0, &page));
        page[7] = 0b0010_0000;
        assert!(BlockMap::new(1000).load_page(0, &page));
        assert!(BlockMap::new(31).load_page(0, &page));
        assert!(
            !BlockMap::new(30).load_page(0, &page),
            "a block beyond the end"
        );
        assert!(!BlockMap::new(2).load_page(0, &page));
        assert!(!BlockMap::new(1000).load_page(1, &page));
    }

    #[test]
    fn dirty_pages_are_told_once() {
        let mut map = BlockMap::new(200_000);
        map.set(20_000, 1, BlockKind::Present);
        map.set(100_000, 40_000, BlockKind::Zero);
        let pages = |map: &mut BlockMap, max| {
            map.take_dirty(max)
                .iter()
                .map(|(page, _)| *page)
                .collect::<Vec<_>>()
        };
        assert_eq!(pages(&mut map, 2), [1, 6]);
        assert_eq!(pages(&mut map, 9), [7, 8]);
        assert!(map.take_dirty(9).is_empty());
    }
}
