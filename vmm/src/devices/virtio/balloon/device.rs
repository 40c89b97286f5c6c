//! The queues of the balloon.

use std::io;
use std::sync::Arc;

use super::handle::{BalloonHandle, Shared};
use super::statistics::{BUFFER_BYTES_MAX, Statistics};
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::{CHAINS_A_TURN_MAX, DeviceError, DeviceIo};
use crate::memory::{
    Afterwards, DiscardError, Discarder, PAGE_BYTES, pages_of_frames, whole_pages,
};

/// Feature bits, section 5.5.3.
pub mod feature {
    /// There is a queue of statistics.
    pub const STATS_VQ: u64 = 1 << 1;
    /// The driver may take pages out again rather than let the guest run out of memory.
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// The driver names free pages when it is asked.
    pub const FREE_PAGE_HINT: u64 = 1 << 3;
    /// The driver fills free pages with `poison_val`.
    pub const PAGE_POISON: u64 = 1 << 4;
    /// The driver reports free pages of its own accord.
    pub const REPORTING: u64 = 1 << 5;
    /// All that the device offers.
    pub(in super::super) const ALL: u64 =
        STATS_VQ | DEFLATE_ON_OOM | FREE_PAGE_HINT | PAGE_POISON | REPORTING;
}

// Queue numbers, section 5.5.2. All features are offered, so that drivers which number the queues of
// those that they accept come to the same.
pub(super) const INFLATE_QUEUE: usize = 0;
pub(super) const DEFLATE_QUEUE: usize = 1;
pub(super) const STATS_QUEUE: usize = 2;
pub(super) const HINT_QUEUE: usize = 3;
pub(super) const REPORT_QUEUE: usize = 4;

/// Bytes of configuration space: `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`.
pub(super) const CONFIG_BYTES: usize = 16;
pub(super) const NUM_PAGES: usize = 0;
pub(super) const ACTUAL: usize = 4;
pub(super) const HINT_COMMAND: usize = 8;
pub(super) const POISON: usize = 12;

/// Bytes of page numbers looked at in one chain: 1024 pages. Linux sends 256 at a time; pages beyond
/// the limit go into the balloon and keep their memory.
const FRAME_BYTES_MAX: usize = 4096;
/// Pages that one turn discards: 64 MiB, some milliseconds.
const PAGES_A_TURN_MAX: u64 = 16 << 10;
/// System calls that one turn makes for it.
const CALLS_A_TURN_MAX: u64 = 2048;
/// Chains of hints taken in one turn; each may name all of RAM.
const HINTS_A_TURN_MAX: u32 = 64;

/// The device.
#[derive(Debug)]
pub struct Balloon {
    pub(super) shared: Arc<Shared>,
    pub(super) discarder: Discarder,
    pub(super) config: [u8; CONFIG_BYTES],
    /// What the driver accepted; `None` while there is no driver.
    pub(super) features: Option<u64>,
    /// The driver has to look at the configuration, whether it changed or not.
    pub(super) announce: bool,
    /// Bytes of the report at the head of its queue that are done.
    pub(super) report_done: usize,
    chain: Chain,
}

/// What is left of one turn.
struct Turn {
    pages: u64,
    calls: u64,
}

impl Turn {
    fn new() -> Self {
        Self {
            pages: PAGES_A_TURN_MAX,
            calls: CALLS_A_TURN_MAX,
        }
    }

    fn is_over(&self) -> bool {
        self.pages == 0 || self.calls == 0
    }

    fn spend(&mut self, pages: u64, calls: u64) {
        self.pages = self.pages.saturating_sub(pages);
        self.calls = self.calls.saturating_sub(calls);
    }
}

fn refused(error: DiscardError) -> DeviceError {
    DeviceError::Host {
        what: "giving guest memory back",
        source: io::Error::other(error),
    }
}

impl Balloon {
    /// An empty balloon over the RAM of `discarder`.
    ///
    /// # Errors
    /// When an eventfd cannot be made.
    pub fn new(discarder: Discarder) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared::new(discarder.layout().pages())?),
            discarder,
            config: [0; CONFIG_BYTES],
            features: None,
            announce: false,
            report_done: 0,
            chain: Chain::default(),
        })
    }

    /// The host's side.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle {
            shared: Arc::clone(&self.shared),
            discarder: self.discarder.clone(),
        }
    }

    pub(super) fn has(&self, feature: u64) -> bool {
        self.features.is_some_and(|all| all & feature != 0)
    }

    pub(super) fn field(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.config[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn set_field(&mut self, at: usize, value: u32) {
        self.config[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Takes the host's wishes into the configuration; true if that changed it.
    pub(super) fn take_wishes(&mut self) -> bool {
        let before = self.config;
        let (num_pages, command) = {
            let control = self.shared.lock();
            (control.num_pages, control.hint_command)
        };
        self.set_field(NUM_PAGES, num_pages);
        self.set_field(HINT_COMMAND, command);
        self.config != before
    }

    /// What pages whose contents the guest does not need may read as; `None` if they must stay.
    fn afterwards(&self) -> Option<Afterwards> {
        match (self.has(feature::PAGE_POISON), self.field(POISON)) {
            (false, _) => Some(Afterwards::Any),
            (true, 0) => Some(Afterwards::Zeros),
            (true, _) => None,
        }
    }

    /// Takes pages into the balloon; false if there may be more to do.
    pub(super) fn inflate(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, DeviceError> {
        let broken = DeviceError::queue;
        let Some(queue) = io.queues.get_mut(INFLATE_QUEUE) else {
            return Ok(true);
        };
        let mut turn = Turn::new();
        while !turn.is_over() {
            if !queue
                .pop(io.guest, &mut self.chain)
                .map_err(broken(INFLATE_QUEUE))?
            {
                return Ok(true);
            }
            let mut bytes = [0; FRAME_BYTES_MAX];
            let len = self.chain.readable.read_at(io.guest, 0, &mut bytes);
            let frames: Vec<u32> = bytes[..len]
                .as_chunks::<4>()
                .0
                .iter()
                .map(|frame| u32::from_le_bytes(*frame))
                .collect();
            let (runs, outside) = pages_of_frames(self.discarder.layout(), &frames);
            let mut discarded = 0;
            for run in &runs {
                discarded += self
                    .discarder
                    .discard(run, Afterwards::Any)
                    .map_err(refused)?;
            }
            turn.spend(discarded, 1 + u64::try_from(runs.len()).unwrap_or(u64::MAX));
            let inflated: u64 = runs.iter().map(|run| run.count).sum();
            {
                let status = &mut self.shared.lock().status;
                status.inflated_pages = status.inflated_pages.saturating_add(inflated);
                status.discarded_pages = status.discarded_pages.saturating_add(discarded);
                status.refused = status.refused.saturating_add(outside);
            }
            queue
                .push_used(io.guest, &self.chain, 0)
                .map_err(broken(INFLATE_QUEUE))?;
        }
        Ok(false)
    }

    /// Lets pages out of the balloon: they come back when they are touched. False if there may be
    /// more to do.
    pub(super) fn deflate(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, DeviceError> {
        let broken = DeviceError::queue;
        let Some(queue) = io.queues.get_mut(DEFLATE_QUEUE) else {
            return Ok(true);
        };
        for _ in 0..CHAINS_A_TURN_MAX {
            if !queue
                .pop(io.guest, &mut self.chain)
                .map_err(broken(DEFLATE_QUEUE))?
            {
                return Ok(true);
            }
            let frames = u64::try_from(self.chain.readable.len() / 4).unwrap_or(u64::MAX);
            {
                let status = &mut self.shared.lock().status;
                status.deflated_pages = status.deflated_pages.saturating_add(frames);
            }
            queue
                .push_used(io.guest, &self.chain, 0)
                .map_err(broken(DEFLATE_QUEUE))?;
        }
        Ok(false)
    }

    /// Reads the statistics in the buffer at the head of the queue, which stays there: to use it is
    /// to ask for the next ones.
    pub(super) fn read_statistics(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let Some(queue) = io.queues.get_mut(STATS_QUEUE) else {
            return Ok(());
        };
        if queue
            .pop(io.guest, &mut self.chain)
            .map_err(DeviceError::queue(STATS_QUEUE))?
        {
            queue.put_back();
            let mut bytes = [0; BUFFER_BYTES_MAX];
            let len = self.chain.readable.read_at(io.guest, 0, &mut bytes);
            let statistics = Statistics::parse(&bytes[..len]);
            self.shared.lock().status.statistics = Some((statistics, std::time::Instant::now()));
        }
        Ok(())
    }

    /// Asks the driver for new statistics. Without a buffer to ask with, those that were asked for
    /// before are on their way.
    pub(super) fn ask_statistics(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let Some(queue) = io.queues.get_mut(STATS_QUEUE) else {
            return Ok(());
        };
        let broken = DeviceError::queue;
        if queue
            .pop(io.guest, &mut self.chain)
            .map_err(broken(STATS_QUEUE))?
        {
            queue
                .push_used(io.guest, &self.chain, 0)
                .map_err(broken(STATS_QUEUE))?;
        }
        if io.enable_kicks(STATS_QUEUE)? {
            io.come_back(STATS_QUEUE);
        }
        Ok(())
    }

    /// Collects hints of free pages; false if there may be more to do.
    pub(super) fn collect_hints(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, DeviceError> {
        let broken = DeviceError::queue;
        let Some(queue) = io.queues.get_mut(HINT_QUEUE) else {
            return Ok(true);
        };
        for _ in 0..HINTS_A_TURN_MAX {
            if !queue
                .pop(io.guest, &mut self.chain)
                .map_err(broken(HINT_QUEUE))?
            {
                return Ok(true);
            }
            let mut command = [0; 4];
            let has_command = self.chain.readable.read_at(io.guest, 0, &mut command) == 4;
            {
                let mut control = self.shared.lock();
                if has_command {
                    control.command_seen(u32::from_le_bytes(command));
                }
                for piece in self.chain.writable.range(0, usize::MAX) {
                    let layout = self.discarder.layout();
                    for run in whole_pages(layout, piece.address.0, piece.len.into()) {
                        control.hint(&run);
                    }
                }
            }
            queue
                .push_used(io.guest, &self.chain, 0)
                .map_err(broken(HINT_QUEUE))?;
        }
        Ok(false)
    }

    /// Discards reported pages; false if there may be more to do. A long report takes several turns,
    /// and is acknowledged at its end.
    pub(super) fn take_reports(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, DeviceError> {
        let broken = DeviceError::queue;
        let mut turn = Turn::new();
        while !turn.is_over() {
            let Some(queue) = io.queues.get_mut(REPORT_QUEUE) else {
                return Ok(true);
            };
            if !queue
                .pop(io.guest, &mut self.chain)
                .map_err(broken(REPORT_QUEUE))?
            {
                return Ok(true);
            }
            let len = self.chain.writable.len();
            let room = usize::try_from(turn.pages * PAGE_BYTES).unwrap_or(usize::MAX);
            let start = self.report_done.min(len);
            let end = len.min(start.saturating_add(room));
            self.discard_report(start, end - start, &mut turn)?;
            let Some(queue) = io.queues.get_mut(REPORT_QUEUE) else {
                return Ok(true);
            };
            if end < len {
                self.report_done = end;
                queue.put_back();
                return Ok(false);
            }
            self.report_done = 0;
            queue
                .push_used(io.guest, &self.chain, 0)
                .map_err(broken(REPORT_QUEUE))?;
        }
        Ok(false)
    }

    /// Discards the pages that `len` bytes of the report in hand name, from `start` on.
    fn discard_report(
        &mut self,
        start: usize,
        len: usize,
        turn: &mut Turn,
    ) -> Result<(), DeviceError> {
        let afterwards = self.afterwards();
        let (mut reported, mut discarded) = (0, 0);
        turn.spend(u64::try_from(len).unwrap_or(u64::MAX) / PAGE_BYTES, 1);
        for piece in self.chain.writable.range(start, len) {
            for run in whole_pages(self.discarder.layout(), piece.address.0, piece.len.into()) {
                reported += run.count;
                turn.spend(0, 1);
                if let Some(afterwards) = afterwards {
                    discarded += self.discarder.discard(&run, afterwards).map_err(refused)?;
                }
            }
        }
        let status = &mut self.shared.lock().status;
        status.reported_pages = status.reported_pages.saturating_add(reported);
        status.discarded_pages = status.discarded_pages.saturating_add(discarded);
        Ok(())
    }
}
