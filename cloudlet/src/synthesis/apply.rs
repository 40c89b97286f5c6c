//! From a stored segment to pages in guest memory and blocks in disk layers. Nothing of a segment
//! is handed on before all of it is verified and decoded.

use cloudlet_overlay::format::SEGMENT_BYTES_MAX;
use cloudlet_overlay::{
    Index, PAGE_BYTES, PageAt, PageReader, Placement, Run, RunSource, SegmentDecoder, SegmentId,
    Space,
};
use cloudlet_vmm::devices::disk::{BlockNumber, Disk};
use cloudlet_vmm::memory::{Placer, RamPage};

use super::Error;
use crate::pages::ImagePages;

/// Pages copied from the base at a time.
const COPY_PAGES: usize = 32;
/// Absorbed pages placed at a time.
const ABSORBED_PAGES: u64 = 256;

/// Takes pages by the number of the first.
type Place<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), Error>;

/// Where an overlay goes.
pub struct Target {
    /// What the overlay says.
    pub index: Index,
    /// Who places memory pages; none if the overlay has no memory in it.
    pub placer: Option<Placer>,
    /// The VM's disks in order.
    pub disks: Vec<Disk>,
    /// The base VM's pages.
    pub base: ImagePages,
    /// Whether memory is left alone: it is placed page by page, to learn the order of touch.
    pub disks_only: bool,
}

/// What a thread needs to decode; each has its own.
pub struct Decoder {
    segment: SegmentDecoder,
    raw: Box<[u8]>,
}

impl Decoder {
    /// With room for any segment.
    #[must_use]
    pub fn new() -> Self {
        Self {
            segment: SegmentDecoder::new(),
            raw: vec![0; SEGMENT_BYTES_MAX].into(),
        }
    }
}

impl Target {
    /// Verifies, decodes and places the segment `id`: each slot at all of its places. Pages that are
    /// there already stay as they are.
    pub fn apply(&self, id: SegmentId, stored: &[u8], decoder: &mut Decoder) -> Result<(), Error> {
        let decoded = decoder
            .segment
            .decode(&self.index, id, stored, &mut decoder.raw)?;
        for (first, bytes) in decoded.runs() {
            self.place(first, bytes)?;
        }
        Ok(())
    }

    /// Whether nothing that the segment `id` would bring is missing: the guest has discarded it all.
    pub fn is_given_up(&self, id: SegmentId) -> bool {
        let Some(placer) = self.placer.as_ref().filter(|_| !self.disks_only) else {
            return false;
        };
        let is_there = |place: Placement| {
            place.first.space == Space::Memory
                && (0..u64::from(place.pages))
                    .all(|page| placer.is_placed(RamPage(place.first.page + page)))
        };
        self.index.segment_places(id).all(is_there)
    }

    /// Verifies and decodes the segment `id`, and hands its pages out.
    pub fn decode(
        &self,
        id: SegmentId,
        stored: &[u8],
        decoder: &mut Decoder,
    ) -> Result<Vec<u8>, Error> {
        Ok(decoder
            .segment
            .decode(&self.index, id, stored, &mut decoder.raw)?
            .bytes()
            .to_vec())
    }

    fn place(&self, first: PageAt, bytes: &[u8]) -> Result<(), Error> {
        match first.space {
            Space::Memory if self.disks_only => {}
            Space::Memory => {
                if let Some(placer) = &self.placer {
                    placer.place(RamPage(first.page), bytes)?;
                }
            }
            Space::Disk(number) => {
                self.disk(number)?
                    .apply_run(BlockNumber(first.page), bytes)?;
            }
        }
        Ok(())
    }

    fn disk(&self, number: u8) -> Result<&Disk, Error> {
        self.disks
            .get(usize::from(number))
            .ok_or(Error::NoDisk(number))
    }

    /// Places the memory pages that come from other pages of the base, and what lies between.
    pub fn place_derived_memory(&self) -> Result<(), Error> {
        let Some(placer) = self.placer.as_ref().filter(|_| !self.disks_only) else {
            return Ok(());
        };
        for run in self.index.runs_in(Space::Memory) {
            if let RunSource::BasePages(source) = run.source {
                self.copy_run(run, source, &mut |page, bytes| {
                    placer.place(RamPage(page), bytes)?;
                    Ok(())
                })?;
            }
        }
        while placer.place_base_pages(ABSORBED_PAGES)? > 0 {}
        placer.finish()?;
        Ok(())
    }

    /// Writes the blocks that are zero or other blocks of the base into the layers: before the
    /// VM runs, since they need no transfer. The disks hold them for pending until then.
    pub fn apply_derived_blocks(&self) -> Result<(), Error> {
        for (number, disk) in (0..).zip(&self.disks) {
            for run in self.index.runs_in(Space::Disk(number)) {
                match run.source {
                    RunSource::Literal { .. } => {}
                    RunSource::Zero => {
                        disk.apply_zero_run(BlockNumber(run.first.page), run.pages)?;
                    }
                    RunSource::BasePages(source) => {
                        self.copy_run(run, source, &mut |block, bytes| {
                            disk.apply_run(BlockNumber(block), bytes)?;
                            Ok(())
                        })?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Hands `run`'s pages out, a piece at a time, with the content of the base's pages from
    /// `source` on.
    fn copy_run(&self, run: &Run, source: PageAt, place: Place<'_>) -> Result<(), Error> {
        let mut buffer = [0; COPY_PAGES * PAGE_BYTES];
        let mut done = 0;
        while done < run.pages {
            let left = usize::try_from(run.pages - done).unwrap_or(usize::MAX);
            let bytes = &mut buffer[..left.min(COPY_PAGES) * PAGE_BYTES];
            self.base
                .read_run(source.plus(done), bytes)
                .map_err(Error::Base)?;
            place(run.first.page + done, bytes)?;
            done += left.min(COPY_PAGES) as u64;
        }
        Ok(())
    }

    /// One page of the base, for a fault.
    pub fn base_page(&self, page: PageAt) -> Result<[u8; PAGE_BYTES], Error> {
        let mut bytes = [0; PAGE_BYTES];
        self.base.read(page, &mut bytes).map_err(Error::Base)?;
        Ok(bytes)
    }
}
