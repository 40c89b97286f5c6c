//! The background stream: the file in order, from some offset on, with what it takes to keep it
//! going: resuming, skipping, and a receive window that leaves room for demand fetches.

use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::Error;
use super::cause::Cause;
use super::http::Context;
use super::link::Kind;
use super::remote::{Http, Lane, Remote, Source};
use super::retry::Retrier;
use super::window::{Step, Window};

/// Largest piece that is skipped at once, in bytes.
const SKIP_BYTES: usize = 64 * 1024;

/// See the module's description. Made by [`Remote::stream`].
#[derive(Debug)]
pub struct Stream {
    remote: Remote,
    lane: Lane,
    position: u64,
    window: Window,
    retrier: Retrier,
    discarded: u64,
    /// Where bytes go that are only received to be skipped; empty until there are some.
    skipped: Vec<u8>,
}

impl Stream {
    pub(super) fn new(remote: Remote, lane: Option<Lane>, position: u64) -> Stream {
        let window = Window::new(remote.link().rate());
        let lane = lane.unwrap_or_else(|| Lane::new(Kind::Stream));
        let retrier = Retrier::new(Kind::Stream);
        let mut stream = Stream {
            remote,
            lane,
            position,
            window,
            retrier,
            discarded: 0,
            skipped: Vec::new(),
        };
        stream.seek_to(position);
        stream
    }

    /// Offset of the next byte.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes that were received only to be skipped.
    pub fn discarded(&self) -> u64 {
        self.discarded
    }

    /// Goes on at `offset`. A short way ahead is received and thrown away, which is faster than a
    /// new request; anything else is requested anew by the next read.
    pub fn seek_to(&mut self, offset: u64) {
        self.position = offset;
        let short = u64::try_from(2 * self.window.bytes()).unwrap_or(u64::MAX);
        let ahead = offset.checked_sub(self.lane.at);
        let near = ahead.is_some_and(|ahead| ahead <= short || !self.remote.supports_ranges());
        if self.lane.has_body() && !near {
            self.lane.connection = None;
        }
    }

    /// Reads at least one byte, or none at the end of the file or for an empty `buf`. Blocks for
    /// the link's rate, while a demand fetch is outstanding, and during tries after a failure.
    ///
    /// # Errors
    /// [`Error::Transfer`] when all tries are used up, [`Error::Cancelled`].
    pub fn read_some(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        if self.position >= self.remote.len() || buf.is_empty() {
            return Ok(0);
        }
        let remote = self.remote.clone();
        let context = &remote.inner.context;
        loop {
            let result = match &remote.inner.source {
                Source::File { .. } => read_file(&remote, Kind::Stream, self.position, buf),
                Source::Http(http) => self.read_http(context, http, buf),
            };
            match result {
                Ok(count) => {
                    self.position += u64::try_from(count).unwrap_or(0);
                    self.retrier.progressed(&context.options, count);
                    return Ok(count);
                }
                Err(cause) => {
                    let offset = self.position;
                    self.retrier
                        .failed(context, || remote.place(), offset, false, cause)?;
                }
            }
        }
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// As [`Stream::read_some`], and [`Error::OutOfRange`] if the file ends before.
    pub fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), Error> {
        check_range(&self.remote, self.position, buf.len())?;
        let mut filled = 0;
        while filled < buf.len() {
            filled += self.read_some(&mut buf[filled..])?;
        }
        Ok(())
    }

    fn read_http(
        &mut self,
        context: &Context,
        http: &Http,
        buf: &mut [u8],
    ) -> Result<usize, Cause> {
        loop {
            if !self.lane.has_body() {
                self.lane
                    .request(context, http, self.position, None, self.retrier.is_again())?;
            }
            self.set_window()?;
            let skip = self.position.saturating_sub(self.lane.at);
            let count = if skip == 0 {
                self.lane.read(context, buf)?
            } else {
                self.skipped.resize(SKIP_BYTES, 0);
                let piece = usize::try_from(skip).unwrap_or(usize::MAX).min(SKIP_BYTES);
                self.lane.read(context, &mut self.skipped[..piece])?
            };
            if count == 0 {
                return Err(Cause::Cut);
            }
            self.adjust_window(count)?;
            if skip == 0 {
                return Ok(count);
            }
            self.discarded += u64::try_from(count).unwrap_or(0);
        }
    }

    /// Gives a new connection its receive window.
    fn set_window(&mut self) -> Result<(), Cause> {
        if std::mem::take(&mut self.lane.is_new)
            && let Some(connection) = &self.lane.connection
            && let Some(bytes) = self
                .window
                .connected(connection.round_trip(), Instant::now())
        {
            self.window.granted(connection.set_window(bytes)?);
        }
        Ok(())
    }

    fn adjust_window(&mut self, count: usize) -> Result<(), Cause> {
        match (
            self.window.arrived(count, Instant::now()),
            &self.lane.connection,
        ) {
            (Step::Grow(bytes), Some(connection)) => {
                self.window.granted(connection.set_window(bytes)?);
            }
            // What is missing is then asked for over a new connection.
            (Step::Release, Some(_)) if self.remote.supports_ranges() => {
                self.lane.connection = None;
            }
            _ => {}
        }
        Ok(())
    }
}

impl io::Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.read_some(buf)?)
    }
}

/// Reads a piece of a local file, at the link's pace.
pub(super) fn read_file(
    remote: &Remote,
    kind: Kind,
    offset: u64,
    buf: &mut [u8],
) -> Result<usize, Cause> {
    let Source::File { file, .. } = &remote.inner.source else {
        return Ok(0);
    };
    let link = remote.link();
    let granted = link.take(kind, buf.len())?;
    let result = loop {
        match file.read_at(&mut buf[..granted], offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other,
        }
    };
    link.settle(kind, granted, *result.as_ref().unwrap_or(&0));
    match result {
        Ok(0) => Err(Cause::Shrunk),
        Ok(count) => Ok(count),
        Err(error) => Err(Cause::File(error)),
    }
}

/// Whether the file has `count` bytes from `offset` on.
pub(super) fn check_range(remote: &Remote, offset: u64, count: usize) -> Result<(), Error> {
    let count = u64::try_from(count).unwrap_or(u64::MAX);
    let len = remote.len();
    match offset.checked_add(count) {
        Some(end) if end <= len => Ok(()),
        _ => Err(Error::OutOfRange {
            place: remote.place(),
            len,
            offset,
            count,
        }),
    }
}
