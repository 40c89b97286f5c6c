//! What the pager asks when a page is missing. A page whose bytes are at hand is placed at once;
//! one whose segment is still on its way has its segment moved to the front.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cloudlet_overlay::{PAGE_BYTES, PageAt, PageContent, SegmentId};
use cloudlet_vmm::memory::{PageRun, PageSource, Placer, RamPage, SourceError};

use super::Error;
use super::apply::Decoder;
use super::arrival::Arrival;
use crate::fetch::Demand;

/// The pages of an overlay that is arriving.
pub struct DeltaSource {
    arrival: Arc<Arrival>,
    /// How to bring a segment on the pager thread itself: where that takes no waiting.
    direct: Option<Mutex<Direct>>,
}

struct Direct {
    demand: Demand,
    decoder: Decoder,
    /// Decoded segments, when recording: each is wanted page by page.
    decoded: HashMap<SegmentId, Vec<u8>>,
}

impl DeltaSource {
    /// Of `arrival`. With `direct` a missing segment is read on the faulting path itself, which is
    /// right for a local file at full speed.
    #[must_use]
    pub fn new(arrival: Arc<Arrival>, direct: bool) -> Self {
        let direct = (direct || arrival.is_recording()).then(|| {
            Mutex::new(Direct {
                demand: arrival.demand_connection(),
                decoder: Decoder::new(),
                decoded: HashMap::new(),
            })
        });
        Self { arrival, direct }
    }

    fn bring(&self, page: RamPage, id: SegmentId, slot: u32, placer: &Placer) -> Result<(), Error> {
        let Some(direct) = &self.direct else {
            self.arrival.demand(id);
            return Ok(());
        };
        // Only the pager thread takes the lock; what it guards is whole between two faults.
        let mut direct = direct.lock().unwrap_or_else(PoisonError::into_inner);
        if self.arrival.is_recording() {
            self.arrival.touch(PageAt::memory(page.0));
            let bytes = direct.decoded(&self.arrival, id)?;
            let start = slot as usize * PAGE_BYTES;
            placer.place(page, &bytes[start..start + PAGE_BYTES])?;
        } else if self.arrival.claim(id) {
            let Direct {
                demand, decoder, ..
            } = &mut *direct;
            let stored = self.arrival.read_segment(id, demand)?;
            self.arrival.apply(id, &stored, decoder)?;
        }
        Ok(())
    }
}

impl Direct {
    fn decoded(&mut self, arrival: &Arrival, id: SegmentId) -> Result<&[u8], Error> {
        if !self.decoded.contains_key(&id) {
            let stored = arrival.read_segment(id, &mut self.demand)?;
            let bytes = arrival.target().decode(id, &stored, &mut self.decoder)?;
            self.decoded.insert(id, bytes);
        }
        Ok(&self.decoded[&id])
    }
}

impl PageSource for DeltaSource {
    fn on_fault(&self, page: RamPage, placer: &Placer) -> Result<(), SourceError> {
        match self.arrival.target().index.lookup(PageAt::memory(page.0)) {
            Some(PageContent::Literal { segment, slot }) => {
                self.bring(page, segment, slot, placer)?;
            }
            Some(PageContent::BasePage(source)) => {
                placer.place(page, &self.arrival.target().base_page(source)?)?;
            }
            Some(PageContent::Zero) => {
                placer.zero(&PageRun {
                    first: page,
                    count: 1,
                })?;
            }
            Some(PageContent::Unchanged) | None => {
                return Err(format!("page {:#x} is not in the overlay", page.0).into());
            }
        }
        Ok(())
    }
}
