//! What an overlay file has in it, and whether all of it is intact.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use cloudlet_overlay::verify::read_head;
use cloudlet_overlay::{RunSource, VerifyError};
use serde::Serialize;

use crate::files;

/// Bytes read at a time.
const READ_LEN: usize = 1 << 20;

/// Why an overlay file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// It is not there, or no file.
    #[error(transparent)]
    Open(#[from] files::Error),
    /// It is damaged, or no overlay.
    #[error("{path} is not intact")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The first thing that is wrong.
        #[source]
        source: VerifyError,
    },
}

/// What an overlay has in it.
#[derive(Debug, Serialize)]
pub struct Shown {
    /// Its id.
    pub id: String,
    /// The base VM it is against.
    pub base: String,
    /// Length of the file.
    pub bytes: u64,
    /// Bytes of prefix, machine state and index: what the VM needs to start.
    pub head_bytes: u64,
    /// Stored bytes of the segments that come first.
    pub early_bytes: u64,
    /// Number of segments.
    pub segments: u32,
    /// How many of them come first, in order of first touch.
    pub early_segments: u32,
    /// Pages that come from segments.
    pub literal_pages: u64,
    /// Pages that are zero.
    pub zero_pages: u64,
    /// Pages that are other pages of the base.
    pub base_pages: u64,
    /// RAM of the VM in bytes.
    pub memory_bytes: u64,
    /// Sizes of its disks in bytes.
    pub disk_bytes: Vec<u64>,
}

fn open(path: &Path) -> Result<BufReader<File>, InspectError> {
    let file = files::open(path)?;
    Ok(BufReader::with_capacity(READ_LEN, file))
}

fn damaged(path: &Path) -> impl FnOnce(VerifyError) -> InspectError {
    let path = path.to_owned();
    move |source| InspectError::Damaged { path, source }
}

/// Reads the head of the overlay at `path`.
pub fn show(path: &Path) -> Result<Shown, InspectError> {
    let (prefix, index) = read_head(&mut open(path)?).map_err(damaged(path))?;
    let pages_of = |wanted: fn(&RunSource) -> bool| {
        index
            .runs()
            .iter()
            .filter(|run| wanted(&run.source))
            .map(|run| run.pages)
            .sum()
    };
    let page = cloudlet_overlay::PAGE_BYTES as u64;
    let sizes: Vec<u64> = index
        .spaces()
        .iter()
        .map(|size| size.pages * page)
        .collect();
    let early = index
        .segments()
        .iter()
        .take(prefix.early_segments() as usize);
    Ok(Shown {
        id: prefix.id().to_string(),
        base: prefix.base().to_string(),
        bytes: prefix.total_bytes(),
        head_bytes: prefix.head_bytes(),
        early_bytes: early.map(|segment| u64::from(segment.stored_bytes)).sum(),
        segments: prefix.segments(),
        early_segments: prefix.early_segments(),
        literal_pages: pages_of(|source| matches!(source, RunSource::Literal { .. })),
        zero_pages: pages_of(|source| matches!(source, RunSource::Zero)),
        base_pages: pages_of(|source| matches!(source, RunSource::BasePages(_))),
        memory_bytes: sizes.first().copied().unwrap_or(0),
        disk_bytes: sizes.iter().skip(1).copied().collect(),
    })
}

/// Reads and checks the whole overlay at `path`; its length in bytes.
pub fn verify(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<u64, InspectError> {
    let report = cloudlet_overlay::verify(&mut open(path)?, progress).map_err(damaged(path))?;
    Ok(report.total_bytes)
}
