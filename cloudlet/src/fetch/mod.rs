//! Where overlay bytes come from: a local file, or a file behind an HTTP or HTTPS server.
//! A [`Remote`] is read in two ways at once, each by a thread of the caller's: a [`Stream`] from
//! some offset on, in order and in the background, and [`Demand`] fetches of ranges that somebody
//! waits for, over a connection of their own. Both share one [`Link`], on which demand fetches
//! have strict priority and a rate holds for both together.
//!
//! Servers are not trusted: heads are limited and checked field by field, a range must be the one
//! that was asked for, a file that changes on the way is an error, and every wait has a limit.
//! What the bytes mean is not known here; the overlay's hashes decide whether they are right.
//!
//! No thread is started here, so that each thread's seccomp filter stays its owner's business.

mod cause;
mod demand;
pub mod head;
mod http;
mod identity;
mod link;
mod location;
mod remote;
mod retry;
mod stream;
mod tls;
mod transport;
mod window;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use cause::Cause;
pub use demand::Demand;
pub(crate) use link::Bucket;
pub use link::{Closed, Kind, Link, Rate, RateError};
pub use location::{Location, LocationError, Url};
pub use remote::Remote;
pub use retry::Trouble;
pub use stream::Stream;
pub(crate) use tls::server_config;
pub(crate) use transport::Transport;

/// How to fetch.
#[derive(Clone)]
pub struct Options {
    /// PEM file of the certificates to trust for https, instead of the system's.
    pub ca: Option<PathBuf>,
    /// Longest time to connect, and again for a TLS handshake.
    pub connect_timeout: Duration,
    /// Longest time without bytes (or with a mere trickle) before a connection is given up.
    pub stall_timeout: Duration,
    /// Further tries after a failed one. Progress of 64 KiB starts the count anew.
    pub retries: u32,
    /// Is told when a fetch is in trouble and when it is out of it again, on the fetching thread.
    pub on_trouble: Option<TroubleHook>,
}

/// See [`Options::on_trouble`].
pub type TroubleHook = Arc<dyn Fn(&Trouble<'_>) + Send + Sync>;

impl Default for Options {
    /// 5 s to connect, 10 s without bytes, 5 further tries, the system's certificates.
    fn default() -> Self {
        Options {
            ca: None,
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
            retries: 5,
            on_trouble: None,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("ca", &self.ca)
            .field("connect_timeout", &self.connect_timeout)
            .field("stall_timeout", &self.stall_timeout)
            .field("retries", &self.retries)
            .field("on_trouble", &self.on_trouble.is_some())
            .finish()
    }
}

/// Why a fetch ended without its bytes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Tried, perhaps several times, in vain.
    #[error("fetching {place} failed at byte {offset} (tries: {tries})")]
    Transfer {
        /// Path or URL.
        place: String,
        /// First byte that is missing.
        offset: u64,
        /// How many tries were made since the last progress.
        tries: u32,
        /// Why the last one failed.
        #[source]
        cause: Cause,
    },
    /// A range was asked for that the file does not have.
    #[error("{place} has {len} bytes, and {count} from {offset} on were asked for")]
    OutOfRange {
        /// Path or URL.
        place: String,
        /// Length of the file in bytes.
        len: u64,
        /// Start of the range.
        offset: u64,
        /// Length of the range.
        count: u64,
    },
    /// A demand fetch from a server that sends whole files only.
    #[error("the server of {place} does not serve ranges: it can only be read in order")]
    NoRanges {
        /// The URL.
        place: String,
    },
    /// The link was closed.
    #[error("the transfer was cancelled")]
    Cancelled,
}

impl From<Closed> for Error {
    fn from(_: Closed) -> Self {
        Error::Cancelled
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        std::io::Error::other(error)
    }
}
