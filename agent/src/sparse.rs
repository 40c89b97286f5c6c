//! Where sparse files have data: a `lastlog` of many gigabytes is a few blocks and one long hole.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The stretches of the first `len` bytes of `file` that hold data, in order and not empty, as far as
/// its file system says: one that knows of no holes has data all over. Moves the file's position, and
/// may be used while the caller moves it too. Ends after the first error.
pub fn data<F: AsFd>(file: F, len: u64) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let next = stretch(&file, at, len).transpose();
        at = match &next {
            Some(Ok(stretch)) => stretch.end,
            Some(Err(_)) | None => len,
        };
        next
    })
}

fn stretch(file: impl AsFd, at: u64, len: u64) -> io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
        Ok(start) if start < len => start,
        // Nothing but a hole follows: lseek(2).
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL) => return Ok(Some(at..len)),
        Err(error) => return Err(error.into()),
    };
    let end = match rustix::fs::seek(&file, SeekFrom::Hole(start)) {
        Ok(end) => end,
        // It was cut meanwhile.
        Err(Errno::NXIO) => len,
        Err(error) => return Err(error.into()),
    };
    Ok(Some(start..end.clamp(start + 1, len)))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn data_is_found_between_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(&[7; 4096], 1 << 20).unwrap();
        file.write_all_at(&[9; 4096], 1 << 30).unwrap();
        let found = |len| data(&file, len).map(Result::unwrap).collect::<Vec<_>>();
        let (first, second) = ((1 << 20)..(1 << 20) + 4096, (1 << 30)..(1 << 30) + 4096);
        assert_eq!(found(1 << 40), [first.clone(), second.clone()]);
        assert_eq!(found((1 << 30) + 5), [first, (1 << 30)..(1 << 30) + 5]);
        assert_eq!(found(0), []);
    }

    #[test]
    fn a_file_that_cannot_tell_has_data_all_over() {
        let file = File::open("/proc/self/status").unwrap();
        let found: Vec<_> = data(&file, 100).map(Result::unwrap).collect();
        assert_eq!(found.first().map(|stretch| stretch.start), Some(0));
        assert_eq!(found.last().map(|stretch| stretch.end), Some(100));
    }
}
