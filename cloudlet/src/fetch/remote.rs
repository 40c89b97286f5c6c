//! The file to fetch: opened once, its identity remembered, every later response held against it.
//! The first request asks for everything from byte 0, and its connection becomes the first stream,
//! so that opening costs one round trip and no byte twice.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::cause::Cause;
use super::demand::Demand;
use super::head::{ContentRange, Head};
use super::http::{Connection, Context};
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
            Source::Http(http) => http.identity().len,
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
            Source::Http(http) => http.identity().ranges,
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
    let file = files::open(&path)?;
    let metadata = file.metadata().map_err(Cause::File)?;
    if !metadata.is_file() {
        return Err(Cause::NotAFile);
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
    identity: OnceLock<Identity>,
    /// The connection that [`Http::open`] made, until the first stream takes it.
    first: Mutex<Option<Lane>>,
}

/// What tells this file from another one under the same URL.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    len: u64,
    ranges: bool,
    etag: Option<String>,
    last_modified: Option<String>,
}

impl Http {
    fn open(context: &Context, url: &Url) -> Result<Http, Error> {
        let http = Http {
            origin: url.clone(),
            resolved: Mutex::new(url.clone()),
            identity: OnceLock::new(),
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

    /// Set by the first response that was admitted, before [`Http::open`] returns.
    fn identity(&self) -> &Identity {
        const NOTHING: &Identity = &Identity {
            len: 0,
            ranges: false,
            etag: None,
            last_modified: None,
        };
        self.identity.get().unwrap_or(NOTHING)
    }

    /// Checks that `head` answers a request for the bytes from `from` to `until` (exclusive, or
    /// the end) of the same file as ever, and returns the offset at which its body starts.
    fn admit(&self, head: &Head, from: u64, until: Option<u64>) -> Result<u64, Cause> {
        if let Some(coding) = &head.content_encoding {
            return Err(Cause::Coding(coding.clone()));
        }
        match (head.status, head.content_range) {
            (200, _) => {
                let len = body_length(head)?;
                self.same_file(head, len, head.accept_ranges)?;
                if self.identity().ranges && (from > 0 || until.is_some()) {
                    return Err(Cause::RangeIgnored);
                }
                Ok(0)
            }
            (206, Some(ContentRange::Part { first, last, total })) => {
                self.same_file(head, total, true)?;
                let end = until.unwrap_or(total);
                // `last` is below `total`, so neither of the sums below can overflow.
                if first != from || last + 1 != end || body_length(head)? != last - first + 1 {
                    return Err(wrong_range(from, until, format!("{first}-{last}/{total}")));
                }
                Ok(from)
            }
            (206, _) => Err(wrong_range(from, until, "none named".into())),
            (416, Some(ContentRange::Unsatisfied { total })) => {
                self.same_file(head, total, true)?;
                if total == 0 && from == 0 {
                    Ok(0)
                } else {
                    Err(Cause::Status(416))
                }
            }
            (status, _) => Err(Cause::Status(status)),
        }
    }

    /// The first response sets the identity, each further one has to match it.
    fn same_file(&self, head: &Head, len: u64, ranges: bool) -> Result<(), Cause> {
        let (etag, last_modified) = (head.etag.clone(), head.last_modified.clone());
        let seen = Identity {
            len,
            ranges,
            etag,
            last_modified,
        };
        let known = self.identity.get_or_init(|| seen.clone());
        let changed = |what, was: &Option<String>, now: &Option<String>| {
            let show = |value: &Option<String>| value.clone().unwrap_or_else(|| "absent".into());
            Err(Cause::Changed {
                what,
                was: show(was),
                now: show(now),
            })
        };
        if known.len != seen.len {
            let (was, now) = (Some(known.len.to_string()), Some(seen.len.to_string()));
            return changed("length", &was, &now);
        }
        // A 416 describes no representation, so it need not repeat the validators.
        if head.status == 416 {
            return Ok(());
        }
        if known.etag != seen.etag {
            return changed("entity tag", &known.etag, &seen.etag);
        }
        if known.etag.is_none() && known.last_modified != seen.last_modified {
            return changed("date of change", &known.last_modified, &seen.last_modified);
        }
        Ok(())
    }

    /// The request for the bytes from `from` to `until`.
    fn request(&self, url: &Url, from: u64, until: Option<u64>) -> String {
        let last = until
            .map(|until| until.saturating_sub(1).to_string())
            .unwrap_or_default();
        let mut text = format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: cloudlet/{}\r\nAccept: */*\r\n\
             Accept-Encoding: identity\r\nRange: bytes={from}-{last}\r\n",
            url.target(),
            url.authority(),
            env!("CARGO_PKG_VERSION"),
        );
        // A weak tag cannot vouch for bytes (RFC 9110, 13.1.5); it is compared afterwards.
        if let Some(etag) = self.identity.get().and_then(|known| known.etag.as_deref())
            && !etag.starts_with("W/")
        {
            text.push_str("If-Range: ");
            text.push_str(etag);
            text.push_str("\r\n");
        }
        text.push_str("\r\n");
        text
    }
}

fn body_length(head: &Head) -> Result<u64, Cause> {
    match head.content_length {
        Some(length) if head.transfer_encoding.is_none() => Ok(length),
        _ => Err(Cause::NoLength),
    }
}

fn wrong_range(from: u64, until: Option<u64>, got: String) -> Cause {
    let last = until
        .map(|until| until.saturating_sub(1).to_string())
        .unwrap_or_default();
    Cause::WrongRange {
        asked: format!("{from}-{last}"),
        got,
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
    /// which is before `from` if the server sends whole files only.
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
        for _ in 0..=REDIRECTS_MAX {
            let head = self.exchange(context, &url, &http.request(&url, from, until))?;
            if matches!(head.status, 301 | 302 | 303 | 307 | 308) {
                // Its body is of no use; a new connection costs less than reading it.
                self.connection = None;
                let target = head.location.as_deref().ok_or(Cause::Status(head.status))?;
                let next = url.join(target).map_err(Cause::Redirect)?;
                if url.is_tls() && !next.is_tls() {
                    return Err(Cause::Downgrade(next.to_string()));
                }
                url = next;
                continue;
            }
            self.at = http.admit(&head, from, until)?;
            if head.status == 416 {
                self.connection = None;
            }
            *http.resolved.lock().unwrap_or_else(PoisonError::into_inner) = url;
            return Ok(());
        }
        Err(Cause::Redirects(REDIRECTS_MAX))
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
