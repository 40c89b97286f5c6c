//! The head of an overlay: all that has to be known before the VM can start.

use serde::{Deserialize, Serialize};

use cloudlet_overlay::{
    FormatError, Index, OverlayId, PREFIX_BYTES, Prefix, RunSource, Space, decode_state,
};
use cloudlet_vmm::memory::{PageRun, RamPage};

use crate::fetch::{Demand, Remote, Stream};
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
    /// A space is not one that the base has.
    #[error(
        "the overlay has {pages} pages of {space} over {base_pages}, and its base VM has {found}: \
         an overlay cannot be larger than its base"
    )]
    Size {
        /// The space.
        space: Space,
        /// Its pages by the overlay.
        pages: u64,
        /// The base's pages by the overlay.
        base_pages: u64,
        /// The base's pages.
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

/// A head, and what goes on reading behind it.
#[derive(Debug)]
pub struct Opened {
    /// The head.
    pub head: Head,
    /// Stands at the first segment.
    pub stream: Stream,
    /// The connection for ranges.
    pub demand: Demand,
}

impl Head {
    /// Reads the head of the overlay at `remote`: the prefix, then the index at the end of the file
    /// by its range, then the machine state. Where a server gives no ranges, the file passes by once
    /// for its index, and comes again for the rest.
    pub fn read(remote: &Remote, expect: Option<&str>) -> Result<Opened, HeadError> {
        let (mut stream, mut demand) = (remote.stream(0), remote.demand());
        let mut bytes = [0; PREFIX_BYTES];
        if remote.len() < PREFIX_BYTES as u64 {
            return Err(HeadError::Length {
                expected: PREFIX_BYTES as u64,
                found: remote.len(),
            });
        }
        stream.read_exact(&mut bytes)?;
        let prefix = Prefix::parse(&bytes)?;
        check_expected(&prefix, remote.len(), expect)?;
        let mut bytes = buffer(prefix.index_bytes());
        if remote.supports_ranges() {
            demand.read_range(prefix.index_offset(), &mut bytes)?;
        } else {
            stream.seek_to(prefix.index_offset());
            stream.read_exact(&mut bytes)?;
            stream = remote.stream(prefix.state_offset());
        }
        let index = Index::parse(&prefix, &bytes)?;
        let mut bytes = buffer(prefix.state_stored_bytes());
        stream.read_exact(&mut bytes)?;
        let state = decode_state(&prefix, &bytes)?;
        let meta: Meta = serde_json::from_slice(index.meta()).map_err(HeadError::Meta)?;
        check_meta(&meta, &index)?;
        let head = Self {
            prefix,
            index,
            state,
            meta,
        };
        Ok(Opened {
            head,
            stream,
            demand,
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
                RunSource::Zero => zero.push(pages),
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

/// Room for a part whose length the prefix has limited.
fn buffer(len: u64) -> Vec<u8> {
    vec![0; usize::try_from(len).expect("the prefix limits its parts to what memory can hold")]
}

/// Holds the sizes that an overlay gives against those of its base, `base`: whatever the overlay
/// says, neither mappings nor layers become larger than the base that somebody of this host chose.
pub(crate) fn check_sizes(index: &Index, base: &[(Space, u64)]) -> Result<(), HeadError> {
    for size in index.spaces() {
        let found = base.iter().find(|(space, _)| *space == size.space);
        let found = found.map_or(0, |(_, pages)| *pages);
        if size.base_pages != found || size.pages > found {
            return Err(HeadError::Size {
                space: size.space,
                pages: size.pages,
                base_pages: size.base_pages,
                found,
            });
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use cloudlet_overlay::verify::read_head;
    use cloudlet_overlay::{
        BaseId, DeltaSpec, Digest, Options, PAGE_BYTES, PageAt, PageReader, SpaceSize, encode,
    };

    use super::*;

    /// A VM whose pages nobody asks for.
    struct NoPages;

    impl PageReader for NoPages {
        fn read(&self, _: PageAt, _: &mut [u8; PAGE_BYTES]) -> std::io::Result<()> {
            Err(std::io::ErrorKind::NotFound.into())
        }
    }

    fn index(spaces: &[(Space, u64, u64)]) -> Index {
        let spaces: Vec<SpaceSize> = spaces
            .iter()
            .map(|&(space, pages, base_pages)| SpaceSize {
                space,
                pages,
                base_pages,
            })
            .collect();
        let spec = DeltaSpec {
            base: BaseId(Digest::of(b"")),
            spaces: &spaces,
            early: &[],
            changed: &Vec::new(),
            state: &[],
            meta: &[],
        };
        let mut out = Cursor::new(Vec::new());
        let options = Options::default();
        encode(&spec, &NoPages, None, &mut out, options, &mut |_| {}).unwrap();
        read_head(&mut out).unwrap().1
    }

    #[test]
    fn an_overlay_is_not_larger_than_its_base() {
        let base = [(Space::Memory, 100), (Space::Disk(0), 50)];
        let check = |spaces: &[(Space, u64, u64)]| check_sizes(&index(spaces), &base);
        let (memory, disk) = ((Space::Memory, 100, 100), (Space::Disk(0), 50, 50));
        check(&[memory, disk]).unwrap();
        check(&[memory]).unwrap();
        check(&[(Space::Memory, 90, 100)]).unwrap();
        for bad in [
            (Space::Memory, 101, 100),
            (Space::Memory, 100, 99),
            (Space::Memory, 1 << 28, 1 << 28),
            (Space::Disk(0), 51, 50),
            (Space::Disk(0), 50, 0),
            (Space::Disk(1), 1, 0),
        ] {
            let refused = check(&[bad]).unwrap_err();
            assert!(matches!(refused, HeadError::Size { .. }), "{bad:?}");
        }
    }
}
