//! Demand fetches: ranges that a stopped vCPU or a parked disk request waits for. They have a
//! connection of their own, kept alive between them, and the stream is silent while one runs.

use super::Error;
use super::cause::Cause;
use super::link::Kind;
use super::remote::{Http, Lane, Remote, Source};
use super::retry::Retrier;
use super::stream::{check_range, read_file};

/// See the module's description. Made by [`Remote::demand`].
#[derive(Debug)]
pub struct Demand {
    remote: Remote,
    lane: Lane,
}

impl Demand {
    pub(super) fn new(remote: Remote) -> Demand {
        Demand {
            remote,
            lane: Lane::new(Kind::Demand),
        }
    }

    /// Connects ahead of time, so that the first fetch needs only one round trip.
    ///
    /// # Errors
    /// As one try of a fetch; a fetch after a failure here simply connects by itself.
    pub fn connect(&mut self) -> Result<(), Error> {
        let Source::Http(http) = &self.remote.inner.source else {
            return Ok(());
        };
        self.lane
            .connect(&self.remote.inner.context, http)
            .map_err(|cause| match cause {
                Cause::Cancelled => Error::Cancelled,
                cause => Error::Transfer {
                    place: self.remote.place(),
                    offset: 0,
                    tries: 1,
                    cause,
                },
            })
    }

    /// Fills `buf` with the bytes from `offset` on. The stream waits meanwhile, but not while
    /// this waits before a further try: then the stream is the better chance.
    ///
    /// # Errors
    /// [`Error::NoRanges`], [`Error::OutOfRange`], [`Error::Transfer`] when all tries are used up,
    /// [`Error::Cancelled`].
    pub fn read_range(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        check_range(&self.remote, offset, buf.len())?;
        if !self.remote.supports_ranges() {
            return Err(Error::NoRanges {
                place: self.remote.place(),
            });
        }
        let remote = self.remote.clone();
        let context = &remote.inner.context;
        let mut retrier = Retrier::new(Kind::Demand);
        let mut filled = 0;
        while filled < buf.len() {
            let start = offset + u64::try_from(filled).unwrap_or(0);
            let before = filled;
            let outstanding = context.link.demand();
            let result = match &remote.inner.source {
                Source::File { .. } => fill(&mut filled, buf, |at, rest| {
                    read_file(&remote, Kind::Demand, offset + at, rest)
                }),
                Source::Http(http) => self.fetch(http, start, &mut filled, buf, retrier.is_again()),
            };
            drop(outstanding);
            if filled > before {
                retrier.progressed(&context.options, filled - before);
            }
            if let Err(cause) = result {
                self.lane.connection = None;
                let missing = offset + u64::try_from(filled).unwrap_or(0);
                retrier.failed(context, || remote.place(), missing, false, cause)?;
            }
        }
        Ok(())
    }

    fn fetch(
        &mut self,
        http: &Http,
        start: u64,
        filled: &mut usize,
        buf: &mut [u8],
        again: bool,
    ) -> Result<(), Cause> {
        let context = &self.remote.inner.context;
        let rest = u64::try_from(buf.len() - *filled).unwrap_or(u64::MAX);
        self.lane
            .request(context, http, start, Some(start + rest), again)?;
        let lane = &mut self.lane;
        fill(filled, buf, |_, rest| lane.read(context, rest))
    }
}

/// Reads until `buf` is full; `filled` is kept up to date, also when `read` fails.
fn fill(
    filled: &mut usize,
    buf: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<usize, Cause>,
) -> Result<(), Cause> {
    while *filled < buf.len() {
        let at = u64::try_from(*filled).unwrap_or(0);
        match read(at, &mut buf[*filled..])? {
            0 => return Err(Cause::Cut),
            count => *filled += count,
        }
    }
    Ok(())
}
