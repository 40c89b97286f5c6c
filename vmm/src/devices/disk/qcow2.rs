//! qcow2 images as input: copied once into a raw file, before there is a VM.
//!
//! An image may come from anywhere, so its header is checked here before the library that knows the
//! format is let near it. A header that names another file of the host, a backing file or a data
//! file, is refused: the image's author would choose which file the guest gets to read. Whoever
//! calls [`copy`] does so in a process that can open nothing and whose memory is limited: what is
//! wrong with the tables behind the header ends that process at worst.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use imago::qcow2::Qcow2;
use imago::{FormatAccess, Mapping};
use thiserror::Error;

use super::medium::bytes_of;
use super::{LAYER_BYTES_MAX, SECTOR};

/// What a qcow2 image begins with.
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the header that are looked at: all of version 3.
const HEADER_BYTES: usize = 104;
/// Sizes of a cluster, as powers of two (qcow2 specification, `cluster_bits`, and QEMU's limit).
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Entries of the first-level table at most: QEMU's limit of 32 MiB.
const L1_ENTRIES_MAX: u64 = 4 << 20;
/// Incompatible feature bits.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
/// Bytes read and written at a time.
const PIECE_BYTES: usize = 1 << 20;
/// Bytes that are looked at for zeros.
const GRAIN_BYTES: usize = 64 << 10;

/// Why a qcow2 image cannot be used.
#[derive(Debug, Error)]
pub enum Qcow2Error {
    /// Not a qcow2 image.
    #[error("it is no qcow2 image")]
    Magic,
    /// Another version of the format.
    #[error("it has version {0} of the format; there are 2 and 3")]
    Version(u32),
    /// A reference to another image.
    #[error(
        "it lies on a backing file, and references to other files are not followed: put both into \
         one with `qemu-img convert -O qcow2 IMAGE NEW`"
    )]
    BackingFile,
    /// A reference to a file with its contents.
    #[error(
        "its contents are in another file, and references to other files are not followed: put both \
         into one with `qemu-img convert -O qcow2 IMAGE NEW`"
    )]
    DataFile,
    /// It was in use, or is broken.
    #[error("it was not closed in order, or is damaged: see `qemu-img check -r all IMAGE`")]
    Unclean,
    /// Its tables lead beyond its end.
    #[error(
        "parts of it are missing: it is longer by what its tables say (was it copied whole? see \
         `qemu-img check IMAGE`)"
    )]
    Cut,
    /// An encrypted image.
    #[error("it is encrypted")]
    Encrypted,
    /// Features that are not known here.
    #[error(
        "it needs features that are not supported here ({0:#x}), such as zstd compression: rewrite \
         it with `qemu-img convert -O qcow2 IMAGE NEW`"
    )]
    Features(u64),
    /// A size no disk can have.
    #[error("its disk has {0} bytes: it must be a multiple of 512, not 0, and at most 4 TiB")]
    Size(u64),
    /// A field that does not fit the others.
    #[error("its {0} is out of range")]
    Field(&'static str),
    /// There is no room for the raw file.
    #[error("its contents need {needed} bytes, and there is room for {room}")]
    Room {
        /// Bytes of data in it.
        needed: u64,
        /// Bytes that there are.
        room: u64,
    },
    /// The system refused, or the tables are wrong.
    #[error("it could not be {0}")]
    Io(&'static str, #[source] io::Error),
}

/// Whether `file` begins as a qcow2 image does.
///
/// # Errors
/// The system's.
pub fn is_qcow2(file: &File) -> io::Result<bool> {
    let mut magic = [0; MAGIC.len()];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == MAGIC),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn big_endian_u32(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(bytes.get(at..at + 4).unwrap_or(&[0; 4]));
    u32::from_be_bytes(field)
}

fn big_endian_u64(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from(big_endian_u32(bytes, at)) << 32 | u64::from(big_endian_u32(bytes, at + 4))
}

/// The header, as far as its fields decide whether the image can be used. All are big-endian.
fn check_header(bytes: &[u8; HEADER_BYTES]) -> Result<u64, Qcow2Error> {
    let word = |at: usize| big_endian_u32(bytes, at);
    let long = |at: usize| big_endian_u64(bytes, at);
    if !bytes.starts_with(&MAGIC) {
        return Err(Qcow2Error::Magic);
    }
    let features = match word(4) {
        2 => 0,
        3 => long(72),
        version => return Err(Qcow2Error::Version(version)),
    };
    if long(8) != 0 {
        return Err(Qcow2Error::BackingFile);
    }
    if features & DATA_FILE != 0 {
        return Err(Qcow2Error::DataFile);
    }
    if features & (DIRTY | CORRUPT) != 0 {
        return Err(Qcow2Error::Unclean);
    }
    if features != 0 {
        return Err(Qcow2Error::Features(features));
    }
    if word(32) != 0 {
        return Err(Qcow2Error::Encrypted);
    }
    let (cluster_bits, size) = (word(20), long(24));
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(Qcow2Error::Field("cluster size"));
    }
    if !(SECTOR..=LAYER_BYTES_MAX).contains(&size) || !size.is_multiple_of(SECTOR) {
        return Err(Qcow2Error::Size(size));
    }
    // A second-level table is a cluster of entries of 8 bytes, each for a cluster.
    let l1_entries = size.div_ceil(1 << (2 * cluster_bits - 3));
    let given = u64::from(word(36));
    if given < l1_entries || given > L1_ENTRIES_MAX {
        return Err(Qcow2Error::Field("table size"));
    }
    Ok(size)
}

/// Bits of a table's entry that are the offset of a table or of a cluster's contents.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The second-level entry is of a compressed cluster; its contents are zeros.
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Looks whether everything that the tables name lies within the image's `bytes`: what is read behind
/// the end of a file is zeros, and so would be what is missing.
///
/// As `qemu-img check` does, a cluster that begins before the end is taken for one that was not
/// allocated whole, which is the case with the last one of a good image.
///
/// # Errors
/// `UnexpectedEof` if something does not; the system's.
fn check_tables(
    image: &File,
    bytes: u64,
    header: &[u8; HEADER_BYTES],
    size: u64,
) -> io::Result<()> {
    let cluster_bits = big_endian_u32(header, 20);
    let entries = size.div_ceil(1 << (2 * cluster_bits - 3));
    let within = |end: Option<u64>| end.filter(|end| *end <= bytes).map(drop);
    let cut = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let first_level = big_endian_u64(header, 40);
    within(first_level.checked_add(8 * entries)).ok_or_else(cut)?;
    // A cluster, of 2 MiB at the most.
    let mut table = vec![0; 1 << cluster_bits];
    let mut entry = [0; 8];
    for index in 0..entries {
        image.read_exact_at(&mut entry, first_level + 8 * index)?;
        let at = u64::from_be_bytes(entry) & OFFSET;
        if at == 0 {
            continue;
        }
        within(at.checked_add(1 << cluster_bits)).ok_or_else(cut)?;
        image.read_exact_at(&mut table, at)?;
        let (entries, _) = table.as_chunks::<8>();
        let all_there = entries
            .iter()
            .all(|entry| is_there(u64::from_be_bytes(*entry), cluster_bits, bytes));
        if !all_there {
            return Err(cut());
        }
    }
    Ok(())
}

/// Whether what a second-level entry names is in a file of `bytes` bytes.
fn is_there(entry: u64, cluster_bits: u32, bytes: u64) -> bool {
    if entry & COMPRESSED == 0 {
        let at = entry & OFFSET;
        return at == 0 || entry & ZERO != 0 || at < bytes;
    }
    // Offset, and how many sectors follow the one that it is in; the last one may be cut short.
    let offset_bits = 62 - (cluster_bits - 8);
    let at = entry & ((1 << offset_bits) - 1);
    let more = (entry & !COMPRESSED & !(1 << 63)) >> offset_bits;
    let last = (at / SECTOR + more) * SECTOR;
    at < bytes && last < bytes
}

/// Copies what the guest is to see of the qcow2 image `image` into `out`, an empty file, with holes
/// where the image has nothing or zeros, and returns the disk's size. At most `room` bytes are
/// written. `progress` is told how many bytes of how many are there.
///
/// # Errors
/// When the image is not one that can be used, or the system refuses. Tables that lead astray may
/// end in a panic: see the top of this file.
pub fn copy(
    image: File,
    out: &File,
    room: u64,
    progress: &mut dyn FnMut(u64, u64) -> io::Result<()>,
) -> Result<u64, Qcow2Error> {
    let failed = |what| move |source| Qcow2Error::Io(what, source);
    let mut header = [0; HEADER_BYTES];
    // One of version 2 may end before.
    let mut got = 0;
    while let Some(rest) = header.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match image.read_at(rest, got as u64).map_err(failed("read"))? {
            0 => break,
            count => got += count,
        }
    }
    let size = check_header(&header)?;
    let bytes = bytes_of(&image).map_err(failed("examined"))?;
    check_tables(&image, bytes, &header, size).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Qcow2Error::Cut,
        _ => Qcow2Error::Io("read", error),
    })?;
    let storage = imago::file::File::try_from(image).map_err(failed("opened"))?;
    let mut disk =
        Qcow2::<imago::file::File>::open_image(storage, false).map_err(failed("opened"))?;
    if disk.implicit_backing_file().is_some() {
        return Err(Qcow2Error::BackingFile);
    }
    if disk.requires_external_data_file() {
        return Err(Qcow2Error::DataFile);
    }
    disk.set_backing(None);
    disk.set_data_file(None);
    let disk = FormatAccess::new(disk);
    if disk.size() != size {
        return Err(Qcow2Error::Field("size"));
    }
    let mut needed = 0;
    for_data(&disk, size, &mut |_, len| {
        needed += len;
        Ok(())
    })
    .map_err(failed("read"))?;
    if needed > room {
        return Err(Qcow2Error::Room { needed, room });
    }
    out.set_len(size).map_err(failed("copied"))?;
    let mut buffer = vec![0; PIECE_BYTES];
    let mut done = 0;
    for_data(&disk, size, &mut |first, len| {
        let mut at = first;
        while at < first + len {
            progress(done, needed)?;
            let part = usize::try_from(first + len - at).unwrap_or(PIECE_BYTES);
            let part = buffer.get_mut(..part.min(PIECE_BYTES)).unwrap_or_default();
            disk.read(&mut *part, at)?;
            write_data(out, part, at)?;
            at += part.len() as u64;
            done += part.len() as u64;
        }
        Ok(())
    })
    .map_err(failed("copied"))?;
    progress(done, needed).map_err(failed("reported on"))?;
    Ok(size)
}

/// Calls `each` with first byte and length of every run that the image has data for, in order.
fn for_data(
    disk: &FormatAccess<imago::file::File>,
    size: u64,
    each: &mut dyn FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        let (mapping, len) = disk.get_mapping(at, size - at)?;
        if len == 0 {
            return Err(io::Error::other("a table leads nowhere"));
        }
        match mapping {
            Mapping::Zero { .. } | Mapping::Eof { .. } => {}
            Mapping::Raw { .. } | Mapping::Special { .. } => each(at, len)?,
            _ => return Err(io::Error::other("a table has an entry of an unknown kind")),
        }
        at += len;
    }
    Ok(())
}

/// Writes what is not zero.
fn write_data(out: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    for (grain, at) in bytes.chunks(GRAIN_BYTES).zip((at..).step_by(GRAIN_BYTES)) {
        if grain.iter().any(|byte| *byte != 0) {
            out.write_all_at(grain, at)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "qcow2_tests.rs"]
mod tests;
