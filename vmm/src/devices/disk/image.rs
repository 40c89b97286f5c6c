//! A disk as one flat file: sparse, with holes where it is zero.

use std::fs::File;
use std::io;

use super::cow::{Disk, DiskError};
use crate::sparse;

/// Bytes that are read and written in one go; whole blocks.
const CHUNK_BYTES: u64 = 1 << 20;

impl Disk {
    /// Writes the disk as the guest sees it to `image`, whose former contents are dropped, and
    /// tells `progress` after each piece how far it has come, in bytes. The guest is paused. Does
    /// not sync.
    ///
    /// # Errors
    /// The system's; the file is then incomplete.
    pub fn write_image(
        &self,
        image: &File,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), DiskError> {
        self.copy_data(image, progress)
            .map_err(|source| DiskError::Io("copied", source))
    }

    fn copy_data(&self, image: &File, progress: &mut dyn FnMut(u64)) -> io::Result<()> {
        image.set_len(0)?;
        image.set_len(self.bytes())?;
        let mut buffer = Vec::new();
        self.shared().for_data(|kind, range| {
            let mut at = range.start;
            while at < range.end {
                let len = (range.end - at).min(CHUNK_BYTES);
                buffer.clear();
                buffer.resize(usize::try_from(len).unwrap_or(0), 0);
                self.shared().read_kind(kind, at, &mut buffer)?;
                sparse::write_nonzero(image, at, &buffer)?;
                at += len;
                progress(at);
            }
            Ok(())
        })
    }
}
