//! The head of an overlay: all that has to be known before the VM can start.

use serde::{Deserialize, Serialize};

use cloudlet_overlay::{FormatError, Index, OverlayId, PREFIX_BYTES, Prefix, Space, decode_state};
use cloudlet_vmm::memory::{PageRun, RamPage};

use crate::fetch::Stream;
use crate::image::Description;

/// What an overlay says about its VM beside its pages, as JSON in the overlay's meta.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// The VM as an image of it would be described.
    pub image: Description,
}

/// Why the head cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// Bytes could not be fetched.
    #[error(transparent)]
    Fetch(#[from] crate::fetch::Error),
    /// It is no overlay, or a damaged one.
    #[error("this is no overlay that can be used")]
    Format(#[from] FormatError),
    /// The meta is no JSON of ours.
    #[error("the overlay's description of its VM cannot be understood")]
    Meta(#[source] serde_json::Error),
    /// Another overlay than the one that was asked for.
    #[error("this is overlay {found}, not {expected}")]
    Unexpected {
        /// Its id.
        found: OverlayId,
        /// The id that was asked for.
        expected: String,
    },
    /// The file is not as long as it says.
    #[error("the overlay should have {expected} bytes and has {found}: it was cut short")]
    Length {
        /// By its prefix.
        expected: u64,
        /// By its source.
        found: u64,
    },
    /// The description and the spaces contradict each other.
    #[error("the overlay's description does not fit its {0}")]
    Contradiction(Space),
}

/// A head whose hashes are right.
#[derive(Debug)]
pub struct Head {
    /// The prefix.
    pub prefix: Prefix,
    /// The index.
    pub index: Index,
    /// The machine state.
    pub state: Vec<u8>,
    /// The description.
    pub meta: Meta,
}

impl Head {
    /// Reads the head from the beginning of `stream`, in a file of `file_len` bytes.
    pub fn read(
        stream: &mut Stream,
        file_len: u64,
        expect: Option<&str>,
    ) -> Result<Self, HeadError> {
        let mut bytes = [0; PREFIX_BYTES];
        if file_len < PREFIX_BYTES as u64 {
            return Err(HeadError::Length {
                expected: PREFIX_BYTES as u64,
                found: file_len,
            });
        }
        stream.read_exact(&mut bytes)?;
        let prefix = Prefix::parse(&bytes)?;
        check_expected(&prefix, file_len, expect)?;
        let index = Index::parse(&prefix, &read_part(stream, prefix.index_bytes())?)?;
        let state = decode_state(&prefix, &read_part(stream, prefix.state_stored_bytes())?)?;
        let meta: Meta = serde_json::from_slice(index.meta()).map_err(HeadError::Meta)?;
        check_meta(&meta, &index)?;
        Ok(Self {
            prefix,
            index,
            state,
            meta,
        })
    }

    /// The runs of memory pages that are in the delta with a content of their own, and those that
    /// are zero.
    #[must_use]
    pub fn memory_runs(&self) -> (Vec<PageRun>, Vec<PageRun>) {
        let mut delta = Vec::new();
        let mut zero = Vec::new();
        for run in self.index.runs_in(Space::Memory) {
            let pages = PageRun {
                first: RamPage(run.first.page),
                count: run.pages,
            };
            match run.source {
                cloudlet_overlay::RunSource::Zero => zero.push(pages),
                _ => delta.push(pages),
            }
        }
        (delta, zero)
    }
}

fn check_expected(prefix: &Prefix, file_len: u64, expect: Option<&str>) -> Result<(), HeadError> {
    if let Some(expected) = expect
        && prefix.id().to_string() != expected
    {
        let expected = expected.to_owned();
        return Err(HeadError::Unexpected {
            found: prefix.id(),
            expected,
        });
    }
    if prefix.total_bytes() != file_len {
        return Err(HeadError::Length {
            expected: prefix.total_bytes(),
            found: file_len,
        });
    }
    Ok(())
}

/// Reads a part whose length the prefix has limited.
fn read_part(stream: &mut Stream, len: u64) -> Result<Vec<u8>, HeadError> {
    let len = usize::try_from(len).expect("the prefix limits its parts to what memory can hold");
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn check_meta(meta: &Meta, index: &Index) -> Result<(), HeadError> {
    let page = cloudlet_overlay::PAGE_BYTES as u64;
    let described = std::iter::once((Space::Memory, meta.image.memory_bytes)).chain(
        (0..)
            .map(Space::Disk)
            .zip(meta.image.disks.iter().map(|disk| disk.bytes)),
    );
    let mut count = 0;
    for (space, bytes) in described {
        count += 1;
        if index.space(space).map(|size| size.pages) != Some(bytes.div_ceil(page)) {
            return Err(HeadError::Contradiction(space));
        }
    }
    match index.spaces().get(count) {
        Some(more) => Err(HeadError::Contradiction(more.space)),
        None => Ok(()),
    }
}
