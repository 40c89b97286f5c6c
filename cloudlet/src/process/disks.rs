//! Disks: the files behind them, opened before the control thread is confined.
//!
//! A base image is opened for reading only. One of another format than raw becomes a raw file first
//! (`image.rs`). What an image is does not follow from what is in it: see `commands/disk.rs`.
//!
//! What the guest writes goes to a layer: an unnamed file that is gone with the VM, or one that the
//! user has named, which the next VM finds again. A named layer knows its base by a mark: the BLAKE3 hash of the image's length, its first 2 MiB and 256
//! pieces spread over the rest. That is quick for an image of any size, and tells another image, or
//! one that was mounted or repaired since, but not every change of a byte.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cloudlet_vmm::config::DiskConfig;
use cloudlet_vmm::devices::disk::{BaseMark, Disk, Layer, Medium, qcow2};

use super::formats::Foreign;
use super::{Failure, image};
use crate::files;
use crate::image::DiskImage;
use crate::launch::{DiskFormat, DiskSource};
use crate::synthesis::chain;

/// Bytes at the image's beginning that its mark covers: partition tables, boot code, the
/// superblock of a first partition.
const MARK_HEAD_LEN: u64 = 2 << 20;
/// Pieces of the rest that it covers, and their length.
const MARK_PIECES: u64 = 256;
const MARK_PIECE_LEN: u64 = 4096;

/// A disk as its source says. `progress` is told how far a conversion is.
pub(super) fn open(
    source: &DiskSource,
    scratch: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Disk, Failure> {
    let named = |error: Failure| -> Failure {
        let why = chain(error.as_ref());
        match &source.image {
            // The gate has named it already.
            Some(_) if error.is::<files::Error>() => format!("cannot use the disk image: {why}"),
            Some(path) => format!("cannot use the disk image {}: {why}", path.display()),
            None => format!("cannot make an empty disk: {why}"),
        }
        .into()
    };
    let made = match &source.image {
        Some(path) => open_image(path, source.format, scratch, progress)
            .and_then(|file| over(Some(file), source, scratch)),
        None => over(None, source, scratch),
    };
    made.map_err(named)
}

/// A disk over `base`, or an empty one.
fn over(base: Option<File>, source: &DiskSource, scratch: &Path) -> Result<Disk, Failure> {
    let len = match &base {
        Some(base) => Medium::of(base)?.bytes,
        None => source.empty_len,
    };
    match (base, &source.layer) {
        (Some(base), _) if source.read_only => Ok(Disk::read_only(base)?),
        (base, None) => temporary(base, len, scratch),
        (base, Some(path)) => {
            let layer = named_layer(path, base.as_ref(), len)
                .map_err(|error| format!("layer {}: {}", path.display(), chain(error.as_ref())))?;
            Ok(Disk::new(base, layer)?)
        }
    }
}

/// What is waited for while the disk is opened.
pub(super) fn what(source: &DiskSource) -> String {
    match (&source.image, &source.layer) {
        (Some(image), _) => format!("the disk image {}", image.display()),
        (None, Some(layer)) => format!("the disk's layer {}", layer.display()),
        (None, None) => "room for an empty disk".to_owned(),
    }
}

/// A disk over `base`, whose writes are gone with the VM.
pub(super) fn temporary(base: Option<File>, len: u64, scratch: &Path) -> Result<Disk, Failure> {
    let layer = Layer::temporary(tempfile::tempfile_in(scratch)?, len)?;
    Ok(Disk::new(base, layer)?)
}

/// What an image of the VM says of `disk`.
pub(super) fn describe(disk: &Disk) -> DiskImage {
    DiskImage {
        bytes: disk.bytes(),
        read_only: disk.is_read_only(),
    }
}

/// What the guest is told of a disk.
pub(super) fn config(source: &DiskSource) -> DiskConfig {
    DiskConfig {
        read_only: source.read_only,
        id: source.serial.clone(),
    }
}

/// The image as a raw file, for reading.
fn open_image(
    path: &Path,
    format: Option<DiskFormat>,
    scratch: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<File, Failure> {
    let file = files::open(path)?;
    match format {
        Some(DiskFormat::Raw) => Ok(file),
        Some(DiskFormat::Qcow2) => image::raw(file, scratch, progress),
        // Not a guess: a guest may have written that to a disk of its own.
        None if qcow2::is_qcow2(&file)? => Err(
            "it looks like a qcow2 image: say format=qcow2 behind its name if you know that it is \
             one, or format=raw if a guest had it as its disk"
                .into(),
        ),
        None => match Foreign::look(&file, Medium::of(&file)?.bytes)? {
            Some(format) => Err(format.advice(path).into()),
            None => Ok(file),
        },
    }
}

/// The layer at `path`, which is made if it is not there.
fn named_layer(path: &Path, base: Option<&File>, len: u64) -> Result<Layer, Failure> {
    let mark = match base {
        Some(base) => mark(base, len)?,
        None => BaseMark::default(),
    };
    match files::open_to_write(path) {
        Err(error) if error.is_not_found() => Ok(Layer::create(path, len, mark)?),
        opened => {
            let layer = Layer::from_file(opened?)?;
            layer.check_base(len, mark)?;
            Ok(layer)
        }
    }
}

/// What a layer knows the image by.
fn mark(image: &File, len: u64) -> io::Result<BaseMark> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&len.to_le_bytes());
    let mut buffer = vec![0; 64 << 10];
    let mut add = |at: u64, count: u64| {
        let (mut at, end) = (at, (at + count).min(len));
        while at < end {
            let part = usize::try_from(end - at).unwrap_or(usize::MAX);
            let part = part.min(buffer.len());
            let part = &mut buffer[..part];
            image.read_exact_at(part, at)?;
            hasher.update(part);
            at += part.len() as u64;
        }
        Ok::<_, io::Error>(())
    };
    add(0, MARK_HEAD_LEN)?;
    let step = len.saturating_sub(MARK_HEAD_LEN).div_ceil(MARK_PIECES);
    for piece in 0..MARK_PIECES {
        // Each in the middle of its part; they overlap where the rest is short.
        add(MARK_HEAD_LEN + piece * step + step / 2, MARK_PIECE_LEN)?;
    }
    Ok(BaseMark(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn image(path: &Path, len: usize) -> DiskSource {
        let contents: Vec<u8> = (0..len)
            .map(|at| u8::try_from(at / 512 % 251).unwrap())
            .collect();
        fs::write(path, contents).unwrap();
        DiskSource {
            image: Some(path.to_owned()),
            layer: Some(path.with_extension("layer")),
            ..DiskSource::default()
        }
    }

    fn refused(source: &DiskSource, scratch: &Path) -> String {
        match open(source, scratch, &mut |_, _| {}) {
            Ok(_) => panic!("not refused: {source:?}"),
            Err(error) => chain(error.as_ref()),
        }
    }

    #[test]
    fn a_named_layer_is_made_kept_and_bound_to_its_base() {
        let dir = tempfile::tempdir().unwrap();
        let source = image(&dir.path().join("a.img"), 5 << 20);
        let disk = open(&source, dir.path(), &mut |_, _| {}).unwrap();
        assert!(refused(&source, dir.path()).contains("in use by another VM"));
        drop(disk);
        drop(open(&source, dir.path(), &mut |_, _| {}).unwrap());

        // The same contents elsewhere are the same base.
        let copy = dir.path().join("copy.img");
        fs::copy(source.image.as_ref().unwrap(), &copy).unwrap();
        let moved = DiskSource {
            image: Some(copy.clone()),
            ..source.clone()
        };
        drop(open(&moved, dir.path(), &mut |_, _| {}).unwrap());

        // Another size, other contents, none at all.
        let file = File::options().write(true).open(&copy).unwrap();
        file.write_all_at(b"changed", 1024).unwrap();
        assert!(refused(&moved, dir.path()).contains("another base image"));
        file.set_len((5 << 20) + 512).unwrap();
        assert!(refused(&moved, dir.path()).contains("5242880 bytes"));
        let empty = DiskSource {
            image: None,
            empty_len: 5 << 20,
            ..source.clone()
        };
        assert!(refused(&empty, dir.path()).contains("another base image"));

        // A file that is something else is left as it is.
        let layer = source.layer.as_ref().unwrap();
        fs::write(layer, "letters").unwrap();
        assert!(refused(&source, dir.path()).contains("no layer file"));
        assert_eq!(fs::read(layer).unwrap(), b"letters");
    }

    #[test]
    fn what_a_guest_may_have_written_is_not_taken_for_qcow2() {
        let dir = tempfile::tempdir().unwrap();
        let mut source = image(&dir.path().join("a.img"), 1 << 20);
        source.layer = None;
        let file = File::options()
            .write(true)
            .open(source.image.as_ref().unwrap())
            .unwrap();
        file.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
        assert!(refused(&source, dir.path()).contains("format=raw"));
        source.format = Some(DiskFormat::Raw);
        let disk = open(&source, dir.path(), &mut |_, _| {}).unwrap();
        assert_eq!(disk.bytes(), 1 << 20);
    }

    #[test]
    fn the_mark_sees_the_beginning_the_length_and_every_large_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let len = 64 << 20;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        file.set_len(len).unwrap();
        let before = mark(&file, len).unwrap();
        assert_ne!(before, mark(&file, len - 512).unwrap());
        for at in [0, (2 << 20) - 1] {
            file.write_all_at(&[1], at).unwrap();
            assert_ne!(mark(&file, len).unwrap(), before, "byte {at}");
            file.write_all_at(&[0], at).unwrap();
        }
        assert_eq!(mark(&file, len).unwrap(), before);
        for start in [2_u64 << 20, 33 << 20, 63 << 20] {
            file.write_all_at(&vec![1; 1 << 20], start).unwrap();
            assert_ne!(mark(&file, len).unwrap(), before, "MiB at {start}");
            file.write_all_at(&vec![0; 1 << 20], start).unwrap();
        }
        // Images shorter than the head, and as short as can be.
        for len in [512, 4096, 2 << 20, (2 << 20) + 512] {
            mark(&file, len).unwrap();
        }
    }
}
