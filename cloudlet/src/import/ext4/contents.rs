//! The contents of files, read from where the spool has them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cloudlet_agent::sparse;

use super::layout::BLOCK_LEN;
use super::{BLOCK, Run};
use crate::import::spool::Blob;

/// Bytes that are looked at in one go.
const CHUNK_LEN: usize = 256 << 10;

/// A file's contents by its number.
#[derive(Debug)]
pub(super) struct Contents {
    dir: PathBuf,
    chunk: Vec<u8>,
}

impl Contents {
    /// Those in the numbered files of `dir`.
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            chunk: vec![0; CHUNK_LEN],
        }
    }

    /// Opens a file's contents.
    pub(super) fn open(&self, blob: Blob) -> io::Result<File> {
        File::open(self.dir.join(blob.number.to_string()))
    }

    /// The runs of blocks that have something in them. Blocks of zeros are holes, wherever the host has
    /// holes: the same contents give the same file system.
    pub(super) fn runs(&mut self, blob: Blob) -> io::Result<Vec<Run>> {
        let mut runs = Vec::new();
        if blob.len == 0 {
            return Ok(runs);
        }
        let file = self.open(blob)?;
        let mut at = 0;
        for stretch in sparse::data(&file, blob.len) {
            let stretch = stretch?;
            // Holes of the host need not begin and end with blocks.
            let start = at.max(stretch.start / BLOCK_LEN * BLOCK_LEN);
            at = stretch.end.next_multiple_of(BLOCK_LEN).min(blob.len);
            self.look(&file, start, at, &mut runs)?;
        }
        Ok(runs)
    }

    /// Adds the runs between `start`, the beginning of a block, and `end`.
    fn look(&mut self, file: &File, start: u64, end: u64, runs: &mut Vec<Run>) -> io::Result<()> {
        let mut at = start;
        while at < end {
            let len = (end - at).min(CHUNK_LEN as u64);
            // At most a chunk.
            let chunk = &mut self.chunk[..len as usize];
            file.read_exact_at(chunk, at)?;
            for (block, bytes) in (at / BLOCK_LEN..).zip(chunk.chunks(BLOCK)) {
                if is_zero(bytes) {
                    continue;
                }
                match runs.last_mut() {
                    Some(run) if run.start + run.len == block => run.len += 1,
                    _ => runs.push(Run {
                        start: block,
                        len: 1,
                    }),
                }
            }
            at += len;
        }
        Ok(())
    }
}

/// Compiled to a comparison of whole registers.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |all, byte| all | byte) == 0
}
