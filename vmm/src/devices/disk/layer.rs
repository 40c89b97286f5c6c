//! The layer file: what a VM has written over its base image.
//!
//! ```text
//! offset 0          header, one block (see `header`)
//! offset 4096       map: two bits a block, whole blocks (see `map.rs`)
//! offset D          block 0, block 1, ...: each at its fixed place, holes where nothing was written
//! ```
//!
//! All numbers are little-endian. The file has its full length from the start, so a shorter one was
//! cut. A block's contents are written before the map says that they are there, and [`Layer::flush`]
//! keeps that order on the medium: contents, `fdatasync`, map, `fdatasync`. Whatever a crash leaves
//! is therefore a layer that opens, in which every block has its contents of the last flush or
//! later ones. The map's entries stand alone, so that a page of it that was half written is a mix
//! of old and new entries, both of which hold.
//!
//! A sync that failed may have lost what it was to write, and the next one would not say so. From
//! then on every flush fails.
//!
//! A layer means something over its own base only. It keeps a mark of that base, chosen by whoever
//! opens files, and [`Layer::check_base`] compares.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use cloudlet_snapshot::{AtomicError, AtomicFile};
use thiserror::Error;

use super::map::{BlockMap, MAP_PAGE, map_bytes};
use super::{BLOCK, BLOCK_U64, SECTOR};

const MAGIC: [u8; 8] = *b"CLDLAYER";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 80;
const MAP_OFFSET: u64 = BLOCK_U64;
/// Largest disk a layer can be made for: 4 TiB. Its map takes 256 MiB of address space, and memory
/// only where blocks were changed.
pub const LAYER_BYTES_MAX: u64 = 4 << 40;
/// Pages of the map written between two syncs.
const FLUSH_PAGES_MAX: usize = 256;

/// What a layer knows its base by: a digest of the caller's choice, all zeros where there is no
/// base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BaseMark(pub [u8; 32]);

/// Why there is no layer.
#[derive(Debug, Error)]
pub enum LayerError {
    /// A size no disk can have.
    #[error("a disk of {0} bytes: it must be a multiple of 512, not 0, and at most 4 TiB")]
    Size(u64),
    /// Not a layer file, or not one of this version.
    #[error("this is no layer file: {0}")]
    Header(&'static str),
    /// The file ends early, or late.
    #[error("the layer file has {found} bytes and should have {expected}")]
    Length {
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// The map holds what no map can.
    #[error("the layer's map is damaged at byte {0:#x} of the file")]
    Map(u64),
    /// Another process has it open.
    #[error("the layer file is in use by another VM")]
    InUse,
    /// It was made for a disk of another size.
    #[error("the layer is for a disk of {layer} bytes, this one has {disk}")]
    OtherSize {
        /// Bytes of its disk.
        layer: u64,
        /// Bytes of the disk it was to be used for.
        disk: u64,
    },
    /// It was made over another base.
    #[error("the layer was made over another base image, or the image was changed since")]
    OtherBase,
    /// It did not appear at its place.
    #[error("the layer file could not be made")]
    Create(#[source] AtomicError),
    /// The system refused.
    #[error("the layer file could not be {0}")]
    Io(&'static str, #[source] io::Error),
}

/// A layer file, open and locked against other processes.
#[derive(Debug)]
pub struct Layer {
    pub(super) file: File,
    pub(super) virtual_bytes: u64,
    base: BaseMark,
    pub(super) data_offset: u64,
    pub(super) map: Mutex<BlockMap>,
    /// The file has no name, so nothing of it survives the process and no flush is needed.
    temporary: bool,
    /// Held during a flush, so that an older page of the map never follows a newer one.
    flushing: Mutex<()>,
    /// A sync has failed.
    failed: AtomicBool,
}

impl Layer {
    /// Makes a layer at `path`, which must not exist, for a disk of `virtual_bytes` over the base
    /// with this mark. It appears there whole.
    ///
    /// # Errors
    /// When the size is no disk's or the system refuses; nothing is left behind then.
    pub fn create(path: &Path, virtual_bytes: u64, base: BaseMark) -> Result<Self, LayerError> {
        geometry(virtual_bytes)?;
        let unfinished = AtomicFile::create(path).map_err(LayerError::Create)?;
        let file = unfinished
            .file()
            .try_clone()
            .map_err(|source| LayerError::Io("created", source))?;
        let layer = Self::format(file, virtual_bytes, base, false)?;
        unfinished.commit_new().map_err(LayerError::Create)?;
        Ok(layer)
    }

    /// Makes a layer in `file`, which is empty and has no name (`O_TMPFILE`): it goes with the VM.
    ///
    /// # Errors
    /// When the size is no disk's or the system refuses.
    pub fn temporary(file: File, virtual_bytes: u64) -> Result<Self, LayerError> {
        Self::format(file, virtual_bytes, BaseMark::default(), true)
    }

    /// Opens the layer at `path`.
    ///
    /// # Errors
    /// When it is not a whole, sound layer, another process uses it, or the system refuses.
    pub fn open(path: &Path) -> Result<Self, LayerError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| LayerError::Io("opened", source))?;
        Self::from_file(file)
    }

    /// As [`Layer::open`], on a file that is open already, for reading and writing.
    ///
    /// # Errors
    /// As [`Layer::open`].
    pub fn from_file(file: File) -> Result<Self, LayerError> {
        let io = |source| LayerError::Io("read", source);
        lock(&file)?;
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => LayerError::Header("it is too short"),
                _ => io(error),
            })?;
        let (virtual_bytes, base) = parse_header(&header)?;
        let (data_offset, expected) = geometry(virtual_bytes)?;
        let found = file.metadata().map_err(io)?.len();
        if found != expected {
            return Err(LayerError::Length { expected, found });
        }
        let mut map = BlockMap::new(virtual_bytes.div_ceil(BLOCK_U64));
        let mut page = [0; MAP_PAGE];
        for index in 0..map.bytes().len() / MAP_PAGE {
            let at = MAP_OFFSET + u64::try_from(index * MAP_PAGE).unwrap_or(u64::MAX - MAP_OFFSET);
            file.read_exact_at(&mut page, at).map_err(io)?;
            if !map.load_page(index, &page) {
                return Err(LayerError::Map(at));
            }
        }
        Ok(Self {
            base,
            ..Self::with(file, virtual_bytes, data_offset, map, false)
        })
    }

    /// Refuses to be used for a disk of another size, or over another base.
    ///
    /// # Errors
    /// [`LayerError::OtherSize`], [`LayerError::OtherBase`].
    pub fn check_base(&self, disk: u64, base: BaseMark) -> Result<(), LayerError> {
        let layer = self.virtual_bytes;
        if layer != disk {
            return Err(LayerError::OtherSize { layer, disk });
        }
        if self.base != base {
            return Err(LayerError::OtherBase);
        }
        Ok(())
    }

    /// Size of the disk this layer is for.
    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    fn format(
        file: File,
        virtual_bytes: u64,
        base: BaseMark,
        temporary: bool,
    ) -> Result<Self, LayerError> {
        let io = |source| LayerError::Io("written", source);
        let (data_offset, len) = geometry(virtual_bytes)?;
        lock(&file)?;
        file.set_len(len).map_err(io)?;
        file.write_all_at(&header(virtual_bytes, base), 0)
            .map_err(io)?;
        let map = BlockMap::new(virtual_bytes.div_ceil(BLOCK_U64));
        Ok(Self {
            base,
            ..Self::with(file, virtual_bytes, data_offset, map, temporary)
        })
    }

    fn with(file: File, bytes: u64, data_offset: u64, map: BlockMap, temporary: bool) -> Self {
        Self {
            file,
            virtual_bytes: bytes,
            base: BaseMark::default(),
            data_offset,
            map: Mutex::new(map),
            temporary,
            flushing: Mutex::new(()),
            failed: AtomicBool::new(false),
        }
    }

    /// File offset of the byte at `at` of the disk.
    pub(super) fn offset(&self, at: u64) -> u64 {
        self.data_offset + at
    }

    /// Makes everything written so far survive a crash of the host.
    ///
    /// # Errors
    /// The system's. A page of the map that could not be written is tried again at the next flush;
    /// after a failed sync every flush fails.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.temporary {
            return Ok(());
        }
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // The pages are copied before the contents are synced: every entry in them is about
            // contents that were written by now.
            let pages = self.map().take_dirty(FLUSH_PAGES_MAX);
            let result = self.flush_pages(&pages);
            if result.is_err() {
                let mut map = self.map();
                pages
                    .iter()
                    .for_each(|(page, _)| map.set_dirty(*page, true));
            }
            if result.is_err() || pages.len() < FLUSH_PAGES_MAX {
                return result;
            }
        }
    }

    /// Gives the lock up, for whoever uses the layer next: nothing is written from here on.
    pub(super) fn unlock(&self) {
        // The end of the process does the same a moment later.
        let _ = self.file.unlock();
    }

    fn flush_pages(&self, pages: &[(usize, Vec<u8>)]) -> io::Result<()> {
        self.sync()?;
        for (page, bytes) in pages {
            let at = u64::try_from(page * MAP_PAGE).map_err(|_| io::ErrorKind::InvalidInput)?;
            self.file.write_all_at(bytes, MAP_OFFSET + at)?;
        }
        if pages.is_empty() {
            Ok(())
        } else {
            self.sync()
        }
    }

    fn sync(&self) -> io::Result<()> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(io::Error::other("an earlier sync of the layer failed"));
        }
        let result = self.file.sync_data();
        if result.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    pub(super) fn map(&self) -> std::sync::MutexGuard<'_, BlockMap> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the room of `len` bytes at `at` of the disk back to the file system, if it can.
    pub(super) fn punch(&self, at: u64, len: u64) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (Ok(at), Ok(len)) = (i64::try_from(self.offset(at)), i64::try_from(len)) else {
            return;
        };
        // SAFETY: a call on an open descriptor of our own; no memory is passed.
        // A file system without holes keeps the room; the map says zero all the same.
        let _ = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, len) };
    }

    /// Writes this layer as it is now into `out`, an empty file, with holes where it has them.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn copy_to(&self, out: &File) -> io::Result<()> {
        let map = self.map();
        out.set_len(self.offset(map.blocks() * BLOCK_U64))?;
        out.write_all_at(&header(self.virtual_bytes, self.base), 0)?;
        for (index, page) in (0_u64..).zip(map.bytes().chunks(MAP_PAGE)) {
            if page.iter().any(|byte| *byte != 0) {
                out.write_all_at(page, MAP_OFFSET + index * BLOCK_U64)?;
            }
        }
        let mut buffer = vec![0; 64 * BLOCK];
        for run in map.changed() {
            if run.kind != super::BlockKind::Present {
                continue;
            }
            let mut at = self.offset(run.first * BLOCK_U64);
            let end = at + run.count * BLOCK_U64;
            while at < end {
                let part = usize::try_from(end - at)
                    .unwrap_or(usize::MAX)
                    .min(buffer.len());
                let part = buffer.get_mut(..part).ok_or(io::ErrorKind::InvalidInput)?;
                self.file.read_exact_at(part, at)?;
                out.write_all_at(part, at)?;
                at += u64::try_from(part.len()).unwrap_or(0);
            }
        }
        Ok(())
    }
}

/// Data offset and file length for a disk of `virtual_bytes`, if it can be one.
fn geometry(virtual_bytes: u64) -> Result<(u64, u64), LayerError> {
    let fits = (SECTOR..=LAYER_BYTES_MAX).contains(&virtual_bytes);
    if !fits || !virtual_bytes.is_multiple_of(SECTOR) {
        return Err(LayerError::Size(virtual_bytes));
    }
    let blocks = virtual_bytes.div_ceil(BLOCK_U64);
    let data_offset = MAP_OFFSET + map_bytes(blocks);
    Ok((data_offset, data_offset + blocks * BLOCK_U64))
}

/// magic 8 | version 4 | block size 4 | virtual bytes 8 | map offset 8 | data offset 8 | mark 32 |
/// check 8
fn header(virtual_bytes: u64, base: BaseMark) -> [u8; HEADER_BYTES] {
    let data_offset = geometry(virtual_bytes).map_or(0, |(offset, _)| offset);
    let mut bytes = [0; HEADER_BYTES];
    let fields = [
        &MAGIC[..],
        &VERSION.to_le_bytes(),
        &u32::try_from(BLOCK).unwrap_or(0).to_le_bytes(),
        &virtual_bytes.to_le_bytes(),
        &MAP_OFFSET.to_le_bytes(),
        &data_offset.to_le_bytes(),
        &base.0,
    ];
    let check = fnv(fields.into_iter().flatten()).to_le_bytes();
    for (slot, byte) in bytes
        .iter_mut()
        .zip(fields.into_iter().flatten().chain(&check))
    {
        *slot = *byte;
    }
    bytes
}

/// FNV-1a, 64 bits. It guards against damage; a forger is free to make any disk anyway.
fn fnv<'a>(bytes: impl Iterator<Item = &'a u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Size and mark in a header; everything else in it follows from those.
fn parse_header(bytes: &[u8; HEADER_BYTES]) -> Result<(u64, BaseMark), LayerError> {
    let (magic, rest) = bytes.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(LayerError::Header("the magic number is missing"));
    }
    let (version, rest) = rest.split_at(4);
    if version != VERSION.to_le_bytes() {
        return Err(LayerError::Header("its version is not known here"));
    }
    let mut size = [0; 8];
    size.copy_from_slice(rest.get(4..12).unwrap_or(&[0; 8]));
    let virtual_bytes = u64::from_le_bytes(size);
    geometry(virtual_bytes)?;
    let mut base = BaseMark::default();
    base.0.copy_from_slice(rest.get(28..60).unwrap_or(&[0; 32]));
    if header(virtual_bytes, base) != *bytes {
        return Err(LayerError::Header("its fields do not fit each other"));
    }
    Ok((virtual_bytes, base))
}

/// Locks the file against other processes for as long as it is open.
fn lock(file: &File) -> Result<(), LayerError> {
    file.try_lock().map_err(|error| match error {
        std::fs::TryLockError::WouldBlock => LayerError::InUse,
        std::fs::TryLockError::Error(source) => LayerError::Io("locked", source),
    })
}
