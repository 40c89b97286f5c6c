//! Sparse files, as images are: where they have data, and writing without filling holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

/// Granularity of holes that are kept.
const PAGE: usize = 4096;

/// The stretches of `range` for which `file` has data, in order, as far as its file system says.
/// Moves the file's offset. Ends after the first error.
pub(crate) fn data(file: &File, range: Range<u64>) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let next = extent(file, at, range.end).transpose();
        at = match &next {
            Some(Ok(extent)) => extent.end,
            Some(Err(_)) | None => range.end,
        };
        next
    })
}

/// The first stretch of data from `at` on, up to `end`.
fn extent(file: &File, at: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    let Some(start) = seek(file, at, libc::SEEK_DATA)?.filter(|start| *start < end) else {
        return Ok(None);
    };
    let hole = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(end);
    Ok(Some(start..hole.clamp(start + 1, end)))
}

/// `lseek`; `None` if there is nothing of the kind behind `at`.
fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let at =
        libc::off_t::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: lseek touches no memory.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(found));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        // A block device knows of no holes: all of it is data.
        Some(libc::EINVAL) if is_block_device(file) => {
            Ok((whence == libc::SEEK_DATA).then_some(at.cast_unsigned()))
        }
        _ => Err(error),
    }
}

fn is_block_device(file: &File) -> bool {
    let metadata = file.metadata();
    metadata.is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Writes `bytes`, which begin on a page, to `offset`: not the pages that are zero, and neighbours
/// with one write.
pub(crate) fn write_nonzero(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut at = offset;
    let same = |one: &&[u8], other: &&[u8]| is_zero(one) == is_zero(other);
    let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
    let mut rest = bytes;
    for group in pages.chunk_by(same) {
        let len = group.iter().map(|page| page.len()).sum();
        let (part, after) = rest.split_at(len);
        if !is_zero(group[0]) {
            file.write_all_at(part, at)?;
        }
        rest = after;
        at += u64::try_from(len).unwrap_or(0);
    }
    Ok(())
}

/// Whether there is nothing but zeros in a page.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page.chunks(64)
        .all(|line| line.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn data_is_found_between_holes_and_zeros_make_none() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut bytes = vec![0; 5 * PAGE + 100];
        bytes[PAGE] = 1;
        bytes[2 * PAGE - 1] = 1;
        bytes[5 * PAGE + 99] = 1;
        write_nonzero(&file, 0x10000, &bytes).unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * 4096);
        let mut back = vec![9; bytes.len()];
        file.read_exact_at(&mut back, 0x10000).unwrap();
        assert_eq!(back, bytes);
        let extents: Vec<_> = data(&file, 0..1 << 20).map(Result::unwrap).collect();
        assert_eq!(extents, [0x11000..0x12000, 0x15000..0x16000]);
        let cut: Vec<_> = data(&file, 0x11800..0x15001).map(Result::unwrap).collect();
        assert_eq!(cut, [0x11800..0x12000, 0x15000..0x15001]);
        assert_eq!(data(&file, 0x16000..1 << 20).count(), 0);
    }

    #[test]
    fn zero_pages_are_found_wherever_the_other_byte_is() {
        let mut page = [0; PAGE];
        assert!(is_zero(&page));
        for at in [0, 1, 63, 64, 2047, PAGE - 1] {
            page[at] = 1;
            assert!(!is_zero(&page));
            page[at] = 0;
        }
    }
}
