//! VM synthesis: a base VM and an overlay become a running VM.
//!
//! The head of the overlay (prefix, index, machine state) is read first and says what every page
//! is. Then RAM is mapped, the VM may start, and the segments arrive:
//!
//! ```text
//!   fetch thread "stream"  --\                       /--> guest memory (userfaultfd)
//!                             >-- queue --> workers <
//!   fetch thread "demand"  --/     verify, decode     \--> disk layers
//!        ^                                             |
//!        +--- faults (pager), parked disk requests <---+
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `head.rs` | reading the head, from a stream or a file |
//! | `segments.rs` | which segments are claimed and applied |
//! | `queue.rs` | segments between link and workers, demands first |
//! | `apply.rs` | one segment: verified, decoded, placed |
//! | `arrival.rs` | the threads, and what they report |
//! | `source.rs` | what the pager asks when a page is missing |
//! | `inspect.rs` | `overlay show` and `overlay verify` |

mod apply;
mod arrival;
mod head;
mod inspect;
mod queue;
mod segments;
mod source;

pub use apply::Target;
pub use arrival::{Arrival, ArrivalStats, ArrivalThreads, Notice, Notify};
pub(crate) use head::check_sizes;
pub use head::{Head, HeadError, Meta, Opened};
pub use inspect::{Shown, show, verify};
pub use source::DeltaSource;

/// Why an overlay did not become part of the VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bytes could not be fetched.
    #[error(transparent)]
    Fetch(#[from] crate::fetch::Error),
    /// A segment is not what the index says.
    #[error("the overlay is damaged")]
    Format(#[from] cloudlet_overlay::FormatError),
    /// A page could not be placed in guest memory.
    #[error("cannot place pages")]
    Place(#[from] cloudlet_vmm::memory::PlaceError),
    /// A block could not be written into a disk's layer.
    #[error("cannot write into a disk's layer")]
    Disk(#[from] cloudlet_vmm::devices::disk::DiskError),
    /// A page could not be read from the base.
    #[error("cannot read the base VM")]
    Base(#[source] std::io::Error),
    /// The overlay names a disk that the VM does not have.
    #[error("the overlay names disk {0}, which the VM does not have")]
    NoDisk(u8),
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Spawn(#[source] std::io::Error),
}

/// The message of `error` and of all its causes.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
