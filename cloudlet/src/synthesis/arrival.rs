//! The arrival of an overlay: the threads that fetch, decode and place it while the VM runs, and
//! what they report. Whatever goes wrong ends the arrival once, with a reason; nobody is left
//! waiting for a segment that will not come.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use cloudlet_overlay::{PageAt, PageContent, SegmentId, Space};
use cloudlet_vmm::threads::{ThreadHook, ThreadKind};
use serde::Serialize;

use super::apply::{Decoder, Target};
use super::queue::{Arrived, Queue};
use super::segments::SegmentTable;
use super::{Error, chain};
use crate::control::SpacePage;
use crate::fetch::{Demand, Error as FetchError, Kind, Remote, Stream};

/// Most decoding threads: beyond four, memory bandwidth is the limit.
const WORKERS_MAX: usize = 4;

/// Something that the VM's owner must act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// All of the overlay is applied.
    Complete,
    /// It will not be.
    Failed(String),
}

/// Called on the thread where it happens.
pub type Notify = Arc<dyn Fn(Notice) + Send + Sync>;

/// How far the arrival has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ArrivalStats {
    /// Whether all is applied.
    pub complete: bool,
    /// Bytes received in order.
    pub stream_bytes: u64,
    /// Bytes received on demand.
    pub demand_bytes: u64,
    /// Length of the overlay.
    pub total_bytes: u64,
    /// Segments that somebody waited for.
    pub demanded_segments: u64,
    /// Segments still to be applied.
    pub remaining_segments: u32,
}

/// An overlay on its way.
pub struct Arrival {
    target: Target,
    remote: Remote,
    total_len: u64,
    table: SegmentTable,
    queue: Queue,
    demanded: AtomicU64,
    complete: AtomicBool,
    ended: AtomicBool,
    notify: Notify,
    touched: Option<Mutex<Vec<SpacePage>>>,
}

/// The threads of an arrival, which end by themselves when it is complete or has failed.
#[derive(Debug)]
pub struct ArrivalThreads(Vec<JoinHandle<()>>);

impl ArrivalThreads {
    /// Waits for all of them.
    pub fn join(self) {
        for thread in self.0 {
            // A thread that panicked has been reported by the panic itself.
            let _ = thread.join();
        }
    }
}

impl Arrival {
    /// An arrival into `target` from `remote`, with no thread yet. With `record` the order of
    /// touch is kept.
    #[must_use]
    pub fn new(
        target: Target,
        remote: Remote,
        total_len: u64,
        record: bool,
        notify: Notify,
    ) -> Arc<Self> {
        let count = u32::try_from(target.index.segments().len())
            .expect("the format limits the number of segments");
        Arc::new(Self {
            target,
            remote,
            total_len,
            table: SegmentTable::new(count),
            queue: Queue::default(),
            demanded: AtomicU64::new(0),
            complete: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            notify,
            touched: record.then(Mutex::default),
        })
    }

    /// Where the overlay goes.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Starts the threads. `stream` stands behind the head, and `demand` has read it; when recording
    /// nothing is streamed.
    pub fn start(
        self: &Arc<Self>,
        stream: Stream,
        demand: Demand,
        hook: &ThreadHook,
    ) -> Result<ArrivalThreads, Error> {
        let mut threads = Vec::new();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for number in 0..cores.min(WORKERS_MAX) {
            let this = Arc::clone(self);
            let name = format!("worker{number}");
            threads.push(spawn(name, ThreadKind::Worker, hook, self, move || {
                this.work()
            })?);
        }
        if self.remote.supports_ranges() {
            let this = Arc::clone(self);
            let body = move || this.bring_demanded(demand);
            threads.push(spawn(
                "fetch-demand".into(),
                ThreadKind::Fetch,
                hook,
                self,
                body,
            )?);
        }
        if self.touched.is_none() {
            let this = Arc::clone(self);
            let body = move || this.bring_all(stream);
            threads.push(spawn(
                "fetch-stream".into(),
                ThreadKind::Fetch,
                hook,
                self,
                body,
            )?);
        }
        Ok(ArrivalThreads(threads))
    }

    /// The fetch thread of the stream: every segment that nobody has asked for and that the guest
    /// has not given up, in order.
    fn bring_all(&self, mut stream: Stream) -> Result<(), Error> {
        for (number, segment) in (0..).zip(self.target.index.segments()) {
            let id = SegmentId(number);
            if !self.table.claim(id) {
                continue;
            }
            if self.target.is_given_up(id) {
                self.table.applied(id);
                continue;
            }
            stream.seek_to(segment.offset);
            let mut stored = self.queue.buffer();
            stored.resize(segment.stored_bytes as usize, 0);
            stream.read_exact(&mut stored)?;
            if !self.queue.push_streamed(Arrived { id, stored }) {
                return Ok(());
            }
        }
        if self.table.remaining() == 0 {
            self.complete()?;
        }
        Ok(())
    }

    /// The fetch thread of the demands.
    fn bring_demanded(&self, mut demand: Demand) -> Result<(), Error> {
        // A failure here shows again at the first demand, and is retried then.
        let _ = demand.connect();
        while let Some(id) = self.queue.next_demand() {
            let stored = self.read_segment(id, &mut demand)?;
            self.queue.push_demanded(Arrived { id, stored });
        }
        Ok(())
    }

    /// The stored bytes of the segment `id`, over the connection for demands.
    pub(super) fn read_segment(
        &self,
        id: SegmentId,
        demand: &mut Demand,
    ) -> Result<Vec<u8>, Error> {
        let mut stored = self.queue.buffer();
        if let Some(segment) = self.target.index.segment(id) {
            stored.resize(segment.stored_bytes as usize, 0);
            demand.read_range(segment.offset, &mut stored)?;
        }
        Ok(stored)
    }

    /// A worker thread.
    fn work(&self) -> Result<(), Error> {
        let mut decoder = Decoder::new();
        while let Some(Arrived { id, stored }) = self.queue.pop() {
            self.apply(id, &stored, &mut decoder)?;
            self.queue.recycle(stored);
        }
        Ok(())
    }

    /// Applies a segment that the caller has claimed.
    pub(super) fn apply(
        &self,
        id: SegmentId,
        stored: &[u8],
        decoder: &mut Decoder,
    ) -> Result<(), Error> {
        self.target.apply(id, stored, decoder)?;
        if self.table.applied(id) {
            self.complete()?;
        }
        Ok(())
    }

    /// All segments are applied: what needs no transfer follows, and everybody goes home.
    fn complete(&self) -> Result<(), Error> {
        if self.complete.swap(true, Ordering::AcqRel) || self.touched.is_some() {
            return Ok(());
        }
        self.target.place_derived_memory()?;
        self.end();
        (self.notify)(Notice::Complete);
        Ok(())
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.queue.close();
        self.remote.link().close();
    }

    /// What to say of `error`.
    fn words(&self, error: &Error) -> String {
        self.remote.explain(chain(error))
    }

    /// Ends the arrival with a reason; the first one counts.
    pub fn fail(&self, reason: String) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            self.queue.close();
            self.remote.link().close();
            (self.notify)(Notice::Failed(reason));
        }
    }

    /// Ends the arrival because the VM ends.
    pub fn cancel(&self) {
        self.end();
    }

    /// Asks for `id` before everything else, unless it is on its way. Never waits.
    pub(super) fn demand(&self, id: SegmentId) {
        // A server that sends whole files only brings it in its turn.
        if self.remote.supports_ranges() && self.claim(id) {
            self.queue.demand(id);
        }
    }

    /// Whether the caller is to bring and apply `id`, for somebody who waits for it.
    pub(super) fn claim(&self, id: SegmentId) -> bool {
        let claimed = self.table.claim(id);
        if claimed {
            self.demanded.fetch_add(1, Ordering::Relaxed);
        }
        claimed
    }

    /// A disk request waits for `block` of disk `number`. Never waits itself.
    pub fn demand_block(&self, number: u8, block: u64) {
        let at = PageAt::disk(number, block);
        if let Some(PageContent::Literal { segment, .. }) = self.target.index.lookup(at) {
            self.touch(at);
            self.demand(segment);
        }
    }

    /// Notes that `at` was touched, if the order is recorded.
    pub(super) fn touch(&self, at: PageAt) {
        if let Some(touched) = &self.touched {
            let space = match at.space {
                Space::Memory => 0,
                Space::Disk(number) => number + 1,
            };
            touched
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((space, at.page));
        }
    }

    /// Whether the order of touch is recorded, and pages are placed one by one.
    #[must_use]
    pub fn is_recording(&self) -> bool {
        self.touched.is_some()
    }

    /// The order of touch so far, if it is recorded.
    #[must_use]
    pub fn touched(&self) -> Option<Vec<SpacePage>> {
        let touched = self.touched.as_ref()?;
        Some(
            touched
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        )
    }

    /// The connection for demands, for whoever brings segments itself.
    pub(super) fn demand_connection(&self) -> Demand {
        self.remote.demand()
    }

    /// How far it has come.
    #[must_use]
    pub fn stats(&self) -> ArrivalStats {
        let link = self.remote.link();
        ArrivalStats {
            complete: self.complete.load(Ordering::Acquire) && self.table.remaining() == 0,
            stream_bytes: link.received(Kind::Stream),
            demand_bytes: link.received(Kind::Demand),
            total_bytes: self.total_len,
            demanded_segments: self.demanded.load(Ordering::Relaxed),
            remaining_segments: self.table.remaining(),
        }
    }
}

/// Starts a thread of `kind` whose failure fails the arrival.
fn spawn(
    name: String,
    kind: ThreadKind,
    hook: &ThreadHook,
    arrival: &Arc<Arrival>,
    body: impl FnOnce() -> Result<(), Error> + Send + 'static,
) -> Result<JoinHandle<()>, Error> {
    let (hook, arrival) = (Arc::clone(hook), Arc::clone(arrival));
    let run = move || match hook(kind) {
        Err(error) => arrival.fail(format!(
            "cannot confine a thread: {}",
            chain(error.as_ref())
        )),
        Ok(()) => match body() {
            Ok(()) | Err(Error::Fetch(FetchError::Cancelled)) => {}
            Err(error) => arrival.fail(arrival.words(&error)),
        },
    };
    std::thread::Builder::new()
        .name(name)
        .spawn(run)
        .map_err(Error::Spawn)
}
