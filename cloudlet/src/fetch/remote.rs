//! The file to fetch: opened once, its identity remembered, every later response held against it
//! (`identity.rs`).
//! The first request asks for everything from byte 0, and its connection becomes the first stream,
//! so that opening costs one round trip and no byte twice.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::cause::Cause;
use super::demand::Demand;
use super::head::Head;
use super::http::{Connection, Context};
use super::identity::{Ask, Identity};
use super::link::{Kind, Link};
use super::location::{Location, Url};
use super::retry::Retrier;
use super::stream::Stream;
use super::{Error, Options};
use crate::files;

/// Redirects followed for one request.
const REDIRECTS_MAX: usize = 5;

/// An opened file, here or elsewhere. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct Remote {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) context: Context,
    pub(super) source: Source,
}

#[derive(Debug)]
pub(super) enum Source {
    File { file: File, path: PathBuf, len: u64 },
    Http(Box<Http>),
}

impl Remote {
    /// Opens `location`: afterwards length and abilities are known, and for HTTP the first bytes
    /// are on their way. Closing `link` cancels this and all that follows; name resolution and
    /// connecting notice it only when they end.
    ///
    /// # Errors
    /// [`Error::Transfer`] with the cause, [`Error::Cancelled`].
    pub fn open(location: &Location, options: Options, link: &Arc<Link>) -> Result<Remote, Error> {
        let context = Context::new(options, Arc::clone(link));
        let source = match location {
            Location::File(path) => open_file(path.clone()).map_err(|cause| Error::Transfer {
                place: location.to_string(),
                offset: 0,
                tries: 1,
                cause,
            })?,
            Location::Http(url) => Source::Http(Box::new(Http::open(&context, url)?)),
        };
        Ok(Remote {
            inner: Arc::new(Inner { context, source }),
        })
    }

    /// Length of the file in bytes.
    pub fn len(&self) -> u64 {
        match &self.inner.source {
            Source::File { len, .. } => *len,
            Source::Http(http) => http.identity.len(),
        }
    }

    /// Whether there is nothing in the file.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether ranges can be fetched. A server that cannot is read in order only:
    /// [`Demand::read_range`] is refused, and a stream that is cut starts again at byte 0 and
    /// skips what it had.
    pub fn supports_ranges(&self) -> bool {
        match &self.inner.source {
            Source::File { .. } => true,
            Source::Http(http) => http.identity.ranges(),
        }
    }

    /// How a response differed from the first one in what a server changes with the file, in words. Its
    /// bytes were taken all the same.
    pub fn replaced(&self) -> Option<&str> {
        match &self.inner.source {
            Source::File { .. } => None,
            Source::Http(http) => http.identity.replaced(),
        }
    }

    /// `words` about bytes that are not the author's; they may be those of another version.
    pub fn explain(&self, words: String) -> String {
        match self.replaced() {
            Some(how) => {
                format!("{words} (the file may have been replaced during the transfer: {how})")
            }
            None => words,
        }
    }

    /// Path or URL, for messages.
    pub fn place(&self) -> String {
        match &self.inner.source {
            Source::File { path, .. } => path.display().to_string(),
            Source::Http(http) => http.origin.to_string(),
        }
    }

    /// The link, for its counters and to close it.
    pub fn link(&self) -> &Arc<Link> {
        &self.inner.context.link
    }

    /// A reader of the whole file from `offset` on. Nothing is sent before it is read from.
    pub fn stream(&self, offset: u64) -> Stream {
        let lane = match &self.inner.source {
            Source::Http(http) => http
                .first
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
            Source::File { .. } => None,
        };
        Stream::new(self.clone(), lane, offset)
    }

    /// A reader of ranges, with a connection of its own.
    pub fn demand(&self) -> Demand {
        Demand::new(self.clone())
    }
}

fn open_file(path: PathBuf) -> Result<Source, Cause> {
    // Whoever reports the cause names the file.
    let file = files::open(&path).map_err(|error| match error {
        files::Error::Open { source, .. } => Cause::File(source),
        files::Error::Kind { kind, .. } => Cause::NotAFile(kind),
        other => Cause::Open(other),
    })?;
    let metadata = file.metadata().map_err(Cause::File)?;
    if !metadata.is_file() {
        return Err(Cause::NotAFile("a block device"));
    }
    Ok(Source::File {
        file,
        path,
        len: metadata.len(),
    })
}

/// A file behind a server.
#[derive(Debug)]
pub(super) struct Http {
    /// As the user gave it; a further try after a failure starts here.
    origin: Url,
    /// Where redirects led the last time.
    resolved: Mutex<Url>,
    pub(super) identity: Identity,
    /// The connection that [`Http::open`] made, until the first stream takes it.
    first: Mutex<Option<Lane>>,
}

impl Http {
    fn open(context: &Context, url: &Url) -> Result<Http, Error> {
        let http = Http {
            origin: url.clone(),
            resolved: Mutex::new(url.clone()),
            identity: Identity::default(),
            first: Mutex::new(None),
        };
        let mut retrier = Retrier::new(Kind::Stream);
        let mut lane = Lane::new(Kind::Stream);
        loop {
            match lane.request(context, &http, 0, None, retrier.is_again()) {
                Ok(()) => break,
                Err(cause) => retrier.failed(context, || url.to_string(), 0, true, cause)?,
            }
        }
        retrier.progressed(&context.options, 1);
        *http.first.lock().unwrap_or_else(PoisonError::into_inner) = Some(lane);
        Ok(http)
    }

    /// The request for `ask`. No If-Range: a server that makes tags of its own would send the whole.
    fn request(&self, url: &Url, ask: Ask) -> String {
        format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: cloudlet/{}\r\nAccept: */*\r\n\
             Accept-Encoding: identity\r\n{}\r\n",
            url.target(),
            url.authority(),
            env!("CARGO_PKG_VERSION"),
            ask.field(),
        )
    }
}

/// One of the two ways to the server: a connection at a time, and where its body has got to.
pub(super) struct Lane {
    kind: Kind,
    pub(super) connection: Option<Connection>,
    /// Offset in the file of the next byte of the body.
    pub(super) at: u64,
    /// Whether the connection is new since somebody last asked.
    pub(super) is_new: bool,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane")
            .field("kind", &self.kind)
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

impl Lane {
    pub(super) fn new(kind: Kind) -> Lane {
        Lane {
            kind,
            connection: None,
            at: 0,
            is_new: false,
        }
    }

    /// Connects ahead of the first request.
    pub(super) fn connect(&mut self, context: &Context, http: &Http) -> Result<(), Cause> {
        let url = http
            .resolved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if !self
            .connection
            .as_ref()
            .is_some_and(|connection| connection.is_free_for(&url))
        {
            self.connection = Some(Connection::open(context, &url)?);
            self.is_new = true;
        }
        Ok(())
    }

    /// Requests bytes `from..until` (or to the end). Afterwards the body starts at `self.at`,
    /// which is before `from` if the server sends whole files only; without `until` it may end before
    /// the file does.
    pub(super) fn request(
        &mut self,
        context: &Context,
        http: &Http,
        from: u64,
        until: Option<u64>,
        again: bool,
    ) -> Result<(), Cause> {
        let result = self.follow(context, http, from, until, again);
        if result.is_err() {
            self.connection = None;
        }
        result
    }

    fn follow(
        &mut self,
        context: &Context,
        http: &Http,
        from: u64,
        until: Option<u64>,
        again: bool,
    ) -> Result<(), Cause> {
        let mut url = if again {
            http.origin.clone()
        } else {
            http.resolved
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone()
        };
        let mut ask = http.identity.ask(from, until);
        let mut redirects = 0;
        loop {
            let head = self.exchange(context, &url, &http.request(&url, ask))?;
            if matches!(head.status, 301 | 302 | 303 | 307 | 308) {
                // Its body is of no use; a new connection costs less than reading it.
                self.connection = None;
                let target = head.location.as_deref().ok_or(Cause::Status(head.status))?;
                let next = url.join(target).map_err(Cause::Redirect)?;
                if url.is_tls() && !next.is_tls() {
                    return Err(Cause::Downgrade(next.to_string()));
                }
                url = next;
                redirects += 1;
                if redirects > REDIRECTS_MAX {
                    return Err(Cause::Redirects(REDIRECTS_MAX));
                }
                continue;
            }
            match http.identity.admit(&head, ask) {
                Ok(start) => self.at = start,
                Err(cause) => {
                    // There are two ways at the most after the first: none of them leads back.
                    ask = http.identity.other_way(ask, until, &cause).ok_or(cause)?;
                    // Where its body ends may not be known.
                    self.connection = None;
                    continue;
                }
            }
            if head.status == 416 {
                self.connection = None;
            }
            *http.resolved.lock().unwrap_or_else(PoisonError::into_inner) = url;
            return Ok(());
        }
    }

    /// One request, over the connection that is there if it can carry it. A server may close an
    /// idle connection at any time; that shows only now, and is no failure.
    fn exchange(&mut self, context: &Context, url: &Url, request: &str) -> Result<Head, Cause> {
        if let Some(idle) = self
            .connection
            .as_mut()
            .filter(|idle| idle.is_free_for(url))
        {
            match idle.exchange(context, self.kind, request) {
                Err(cause) if cause.is_stale() => {}
                other => return other,
            }
        }
        self.connection = None;
        let connection = self.connection.insert(Connection::open(context, url)?);
        self.is_new = true;
        connection.exchange(context, self.kind, request)
    }

    /// Reads from the body; zero at its end.
    pub(super) fn read(&mut self, context: &Context, buf: &mut [u8]) -> Result<usize, Cause> {
        let Some(connection) = &mut self.connection else {
            return Ok(0);
        };
        let result = connection.read(context, self.kind, buf);
        match &result {
            Ok(count) => self.at += u64::try_from(*count).unwrap_or(0),
            Err(_) => self.connection = None,
        }
        result
    }

    /// Whether a body is under way.
    pub(super) fn has_body(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(|connection| connection.body_left() > 0)
    }
}
