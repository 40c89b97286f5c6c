//! Where a kernel or an initrd comes from: bytes of the program, or a file that somebody opened.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestRam;

/// Bytes copied from a file to guest memory at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// Something to load into guest memory.
#[derive(Debug, Clone, Copy)]
pub enum Image<'a> {
    /// Embedded in the program.
    Bytes(&'a [u8]),
    /// A file. Its position is neither used nor moved.
    File(&'a File),
}

/// Why a part of an image did not get into guest memory.
#[derive(Debug)]
pub(super) enum LoadError {
    /// The file could not be read.
    Read(io::Error),
    /// Guest memory has no such place.
    Guest(GuestMemoryError),
}

impl Image<'_> {
    /// Bytes in it.
    pub(super) fn bytes(&self) -> io::Result<u64> {
        match self {
            Image::Bytes(bytes) => u64::try_from(bytes.len()).map_err(io::Error::other),
            Image::File(file) => Ok(file.metadata()?.len()),
        }
    }

    /// Fill `buffer` from `offset` on.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Image::Bytes(bytes) => {
                let len = u64::try_from(buffer.len()).map_err(io::Error::other)?;
                buffer.copy_from_slice(part(bytes, offset, len)?);
                Ok(())
            }
            Image::File(file) => file.read_exact_at(buffer, offset),
        }
    }

    /// Copy `len` bytes from `offset` on to guest memory at `to`.
    pub(super) fn load(
        &self,
        offset: u64,
        len: u64,
        guest: &GuestRam,
        to: GuestAddress,
    ) -> Result<(), LoadError> {
        if let Image::Bytes(bytes) = self {
            let bytes = part(bytes, offset, len).map_err(LoadError::Read)?;
            return guest.write_slice(bytes, to).map_err(LoadError::Guest);
        }
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut done = 0;
        while done < len {
            let count = usize::try_from(len - done)
                .unwrap_or(usize::MAX)
                .min(CHUNK_BYTES);
            let chunk = &mut buffer[..count];
            self.read_at(chunk, offset.saturating_add(done))
                .map_err(LoadError::Read)?;
            let at = GuestAddress(to.0.saturating_add(done));
            guest.write_slice(chunk, at).map_err(LoadError::Guest)?;
            done +=
                u64::try_from(count).map_err(|error| LoadError::Read(io::Error::other(error)))?;
        }
        Ok(())
    }
}

/// A part of embedded bytes.
fn part(bytes: &[u8], offset: u64, len: u64) -> io::Result<&[u8]> {
    let range = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(len).ok())
        .and_then(|(start, len)| Some(start..start.checked_add(len)?));
    range
        .and_then(|range| bytes.get(range))
        .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
}
