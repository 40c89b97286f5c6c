//! What can go wrong with one request, and which of it is worth another try.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::head::HeadError;
use super::link::Closed;
use super::location::LocationError;
use crate::files;

/// Why one attempt failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The host name has no address, or no name server answered.
    #[error("the host name {host:?} could not be resolved")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// The name resolves to nothing.
    #[error("the host name {0:?} has no address")]
    NoAddress(String),
    /// No connection.
    #[error("could not connect to {address}")]
    Connect {
        /// The last address tried.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A socket could not be set up.
    #[error("could not set up the socket")]
    Socket(#[source] io::Error),
    /// The host name cannot be checked against a certificate.
    #[error("{0:?} is no name that a certificate can prove")]
    TlsName(String),
    /// The handshake or a record failed.
    #[error("TLS failed")]
    Tls(#[source] rustls::Error),
    /// The file of trusted certificates is unusable.
    #[error("could not read trusted certificates from {}", path.display())]
    Roots {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// There is nothing to trust.
    #[error("no trusted certificates in {0}")]
    NoRoots(String),
    /// The request could not be sent.
    #[error("could not send the request")]
    Send(#[source] io::Error),
    /// The connection broke.
    #[error("the connection broke")]
    Receive(#[source] io::Error),
    /// The server is there but sends nothing.
    #[error("the server sent nothing useful for {:.1} s", .0.as_secs_f64())]
    Stalled(Duration),
    /// The server closed the connection too early.
    #[error("the server closed the connection in the middle of a response")]
    Cut,
    /// The response head is unusable.
    #[error("the server sent an unusable response")]
    Head(#[source] HeadError),
    /// A status other than success or redirect.
    #[error("the server answered with status {0}")]
    Status(u16),
    /// A redirect without or with an unusable target.
    #[error("the server sent an unusable redirect")]
    Redirect(#[source] LocationError),
    /// A redirect from https to http.
    #[error("the server redirects to {0}, which is not encrypted")]
    Downgrade(String),
    /// Redirects without end.
    #[error("the server redirects more than {0} times")]
    Redirects(usize),
    /// No length, or a transfer coding instead of one.
    #[error("the server does not say how long the response is (Content-Length)")]
    NoLength,
    /// The body is not the file's own bytes.
    #[error("the server sent the file in the coding {0:?}")]
    Coding(String),
    /// 206 without, or with another range than was asked for.
    #[error("the server sent another range ({got}) than was asked for ({asked})")]
    WrongRange {
        /// What was asked for.
        asked: String,
        /// What came.
        got: String,
    },
    /// Ranges were served before and are not now.
    #[error("the server stopped serving ranges")]
    RangeIgnored,
    /// It is not the same file any more.
    #[error("the file changed during the transfer: its length was {was} and is {now} bytes")]
    Changed {
        /// Its length at the start, in bytes.
        was: u64,
        /// Its length now.
        now: u64,
    },
    /// A local file could not be read.
    #[error("could not read the file")]
    File(#[source] io::Error),
    /// The file with certificate authorities is not there, or is none.
    #[error(transparent)]
    Open(#[from] files::Error),
    /// A local file is no regular file.
    #[error("it is {0}, and a regular file is needed")]
    NotAFile(&'static str),
    /// A local file became shorter.
    #[error("the file became shorter while it was read")]
    Shrunk,
    /// The link was closed.
    #[error("the transfer was cancelled")]
    Cancelled,
}

impl From<Closed> for Cause {
    fn from(_: Closed) -> Self {
        Cause::Cancelled
    }
}

impl Cause {
    /// Sorts a failed read.
    pub(super) fn of_read(error: io::Error, stall: Duration) -> Cause {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Cause::Stalled(stall),
            io::ErrorKind::UnexpectedEof => Cause::Cut,
            _ => match error.downcast::<rustls::Error>() {
                Ok(tls) => Cause::Tls(tls),
                Err(error) => Cause::Receive(error),
            },
        }
    }

    /// Whether another try may succeed. While the first request is still open (`opening`), a
    /// name or port that is not there is taken for a mistake in the URL.
    pub(super) fn is_transient(&self, opening: bool) -> bool {
        match self {
            Cause::Resolve { .. } | Cause::NoAddress(_) | Cause::Connect { .. } => !opening,
            Cause::Send(_) | Cause::Receive(_) | Cause::Stalled(_) | Cause::Cut => true,
            Cause::Socket(_) => true,
            Cause::Status(status) => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            Cause::Tls(error) => !matches!(
                error,
                rustls::Error::InvalidCertificate(_)
                    | rustls::Error::AlertReceived(_)
                    | rustls::Error::PeerIncompatible(_)
            ),
            _ => false,
        }
    }

    /// Whether this is how an idle connection ends that the server closed before the request.
    pub(super) fn is_stale(&self) -> bool {
        matches!(self, Cause::Send(_) | Cause::Receive(_) | Cause::Cut)
    }
}
