//! For tests: a VM in memory, and the plainest way to apply an overlay to it.

use std::collections::BTreeMap;
use std::io::{self, Cursor};

use crate::bytes::to_usize;
use crate::page::{PAGE_BYTES, PageAt, PageReader, PageSpan, Space, SpaceSize};
use crate::{
    BaseContent, BaseId, DeltaSpec, Digest, Index, Options, PageContent, Prefix, SegmentDecoder,
    SegmentId, Summary, encode,
};

pub(crate) type Page = [u8; PAGE_BYTES];

/// Pages of all spaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pages(pub(crate) BTreeMap<Space, Vec<Page>>);

impl PageReader for Pages {
    fn read(&self, at: PageAt, into: &mut Page) -> io::Result<()> {
        let page = self
            .0
            .get(&at.space)
            .and_then(|pages| pages.get(usize::try_from(at.page).ok()?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        *into = *page;
        Ok(())
    }
}

impl Pages {
    pub(crate) fn count(&self, space: Space) -> u64 {
        self.0.get(&space).map_or(0, |pages| pages.len() as u64)
    }

    pub(crate) fn get(&self, at: PageAt) -> Page {
        let mut page = [0; PAGE_BYTES];
        self.read(at, &mut page).unwrap();
        page
    }
}

pub(crate) fn base_id() -> BaseId {
    BaseId(Digest::of(b"the base"))
}

/// A page that is the same for the same seed: half of it compresses well, half does not.
pub(crate) fn page(seed: u64) -> Page {
    let mut out = [0; PAGE_BYTES];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut out[..PAGE_BYTES / 2]);
    out
}

/// Sizes of the spaces of `now` over `base`.
pub(crate) fn sizes(base: &Pages, now: &Pages) -> Vec<SpaceSize> {
    now.0
        .iter()
        .map(|(&space, pages)| SpaceSize {
            space,
            pages: pages.len() as u64,
            base_pages: base.count(space),
        })
        .collect()
}

/// All pages of a VM.
pub(crate) fn spans(pages: &Pages) -> Vec<PageSpan> {
    pages
        .0
        .iter()
        .map(|(&space, pages)| PageSpan {
            first: PageAt { space, page: 0 },
            pages: pages.len() as u64,
        })
        .collect()
}

/// Encodes all pages of `now`, the early ones first.
pub(crate) fn encode_all(
    base: &Pages,
    now: &Pages,
    early: &[PageAt],
    content: Option<BaseContent<'_>>,
    options: Options,
) -> (Vec<u8>, Summary) {
    let (spaces, changed) = (sizes(base, now), spans(now));
    let spec = DeltaSpec {
        base: base_id(),
        spaces: &spaces,
        early,
        changed: &changed,
        state: b"machine state machine state machine state",
        meta: b"{\"meta\":1}",
    };
    let mut out = Cursor::new(Vec::new());
    let summary = encode(&spec, now, content, &mut out, options, &mut |_| {}).unwrap();
    (out.into_inner(), summary)
}

/// A small overlay with every kind of run, early and other segments, raw and compressed ones.
pub(crate) fn sample() -> (Pages, Pages, Vec<u8>) {
    let mut base = Pages::default();
    base.0.insert(Space::Memory, (0..80).map(page).collect());
    base.0
        .insert(Space::Disk(0), (100..120).map(page).collect());
    let mut now = base.clone();
    let memory = now.0.get_mut(&Space::Memory).unwrap();
    memory[3] = [0; PAGE_BYTES];
    memory[4] = [0; PAGE_BYTES];
    memory[10] = page(20);
    memory[11] = page(21);
    for number in [1, 2, 5, 30, 31, 32, 60] {
        memory[number] = page(1000 + number as u64);
    }
    memory.extend((0..20).map(|n| page(2000 + n)));
    memory[40] = page(101);
    memory[62] = page(1060);
    memory[63] = page(1030);
    let mut noise = [0; PAGE_BYTES];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let disk = now.0.get_mut(&Space::Disk(0)).unwrap();
    disk[7] = noise;
    disk[9] = page(1031);
    let early = [60, 5, 1, 2, 31].map(PageAt::memory);
    let hashes = hashes(&base);
    let content = BaseContent {
        pages: &base,
        hashes: Some(&hashes),
    };
    let (bytes, _) = encode_all(&base, &now, &early, Some(content), Options::default());
    (base, now, bytes)
}

/// Hashes of all pages.
pub(crate) fn hashes(base: &Pages) -> crate::BaseHashes {
    let spaces: Vec<_> = base
        .0
        .iter()
        .map(|(&space, pages)| (space, pages.len() as u64))
        .collect();
    crate::BaseHashes::build(&spaces, base, 2).unwrap()
}

/// Prefix and index of an overlay.
pub(crate) fn head(bytes: &[u8]) -> (Prefix, Index) {
    let prefix = Prefix::parse(bytes.first_chunk().unwrap()).unwrap();
    let start = usize::try_from(prefix.index_offset()).unwrap();
    let end = start + usize::try_from(prefix.index_bytes()).unwrap();
    let index = Index::parse(&prefix, &bytes[start..end]).unwrap();
    (prefix, index)
}

/// Stored bytes of a segment.
pub(crate) fn stored<'a>(bytes: &'a [u8], index: &Index, id: SegmentId) -> &'a [u8] {
    let segment = index.segment(id).unwrap();
    let start = usize::try_from(segment.offset).unwrap();
    &bytes[start..start + to_usize(segment.stored_bytes)]
}

/// Applies an overlay in two ways, segment by segment and page by page; both must agree.
pub(crate) fn apply(base: &Pages, bytes: &[u8]) -> Pages {
    let (_, index) = head(bytes);
    let mut decoder = SegmentDecoder::new();
    let mut literal: BTreeMap<PageAt, Page> = BTreeMap::new();
    let mut slots: BTreeMap<(u32, u32), Page> = BTreeMap::new();
    let mut raw = vec![0; crate::format::SEGMENT_BYTES_MAX];
    for (number, _) in (0..).zip(index.segments()) {
        let id = SegmentId(number);
        let decoded = decoder
            .decode(&index, id, stored(bytes, &index, id), &mut raw)
            .unwrap();
        for (slot, page) in (0..).zip(decoded.bytes().as_chunks().0) {
            slots.insert((number, slot), *page);
        }
        for (first, run) in decoded.runs() {
            for (n, page) in run.as_chunks().0.iter().enumerate() {
                let before = literal.insert(first.plus(n as u64), *page);
                assert!(before.is_none(), "a page is placed twice");
            }
        }
    }
    let mut out = Pages::default();
    for size in index.spaces() {
        let pages = (0..size.pages).map(|page| {
            let at = PageAt {
                space: size.space,
                page,
            };
            let content = index.lookup(at).unwrap();
            match content {
                PageContent::Unchanged => base.get(at),
                PageContent::Zero => [0; PAGE_BYTES],
                PageContent::BasePage(at) => base.get(at),
                PageContent::Literal { segment, slot } => {
                    assert_eq!(slots[&(segment.0, slot)], literal[&at]);
                    literal[&at]
                }
            }
        });
        out.0.insert(size.space, pages.collect());
        assert_eq!(
            index.lookup(PageAt {
                space: size.space,
                page: size.pages
            }),
            None
        );
    }
    out
}
