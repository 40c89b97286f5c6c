//! An application on the disk: a header block, then the image, then the data, each from a 4 KiB
//! boundary. The header is written last, between flushes, so that a disk holds a whole application
//! or none. The first writable disk belongs to the runtime whole: what is behind the application is
//! discarded.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};

use shared::hash::hash;
use shared::protocol::{DATA_MAX, IMAGE_MAX, Install, NAME_MAX, PARAMS_MAX};

use crate::app::{Placing, Space};
use crate::block::{BlockError, Disk, SECTOR};

const BLOCK: usize = 4096;
const MAGIC: [u8; 8] = *b"CLAPPSTO";
const VERSION: u64 = 1;
// Where things are in the header block.
const NUMBERS: usize = 8; // version, image_len, data_len, image_hash, data_hash, name_len, params_len
const NAME: usize = 64;
const PARAMS: usize = NAME + NAME_MAX;
const CHECK: usize = BLOCK - 8;
const _: () = assert!(PARAMS + PARAMS_MAX <= CHECK);

fn failed(doing: &str, error: &BlockError) -> String {
    format!("{doing} the application: {error}")
}

fn sector_of(block: u64) -> u64 {
    block * (BLOCK / SECTOR) as u64
}

fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK as u64)
}

/// Writes whole blocks; the last one padded with zeroes.
fn write_run(disk: &mut Disk, block: u64, bytes: &[u8]) -> Result<(), BlockError> {
    let whole = bytes.len() - bytes.len() % BLOCK;
    disk.write(sector_of(block), &bytes[..whole])?;
    if whole < bytes.len() {
        let mut last = Box::new([0; BLOCK]);
        last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
        disk.write(sector_of(block + (whole / BLOCK) as u64), &last[..])?;
    }
    Ok(())
}

fn read_run(disk: &mut Disk, block: u64, out: &mut [u8]) -> Result<(), BlockError> {
    let whole = out.len() - out.len() % BLOCK;
    disk.read(sector_of(block), &mut out[..whole])?;
    if whole < out.len() {
        let mut last = Box::new([0; BLOCK]);
        disk.read(sector_of(block + (whole / BLOCK) as u64), &mut last[..])?;
        let rest = out.len() - whole;
        out[whole..].copy_from_slice(&last[..rest]);
    }
    Ok(())
}

/// Writes an application to the disk.
pub fn save(disk: &mut Disk, install: &Install, image: &[u8], data: &[u8]) -> Result<(), String> {
    let total = 1 + blocks(install.image_len) + blocks(install.data_len);
    if total * BLOCK as u64 > disk.bytes() {
        return Err(format!(
            "the application needs {total} blocks, more than the disk has"
        ));
    }
    let mut head = Box::new([0; BLOCK]);
    let mut write = || {
        disk.write(0, &head[..])?;
        disk.flush()?;
        let data_block = 1 + blocks(install.image_len);
        write_run(disk, 1, image)?;
        write_run(disk, data_block, data)?;
        let end = sector_of(total);
        disk.discard(end, disk.bytes() / SECTOR as u64 - end)?;
        disk.flush()?;
        head[..8].copy_from_slice(&MAGIC);
        let (name, params) = (install.name.as_bytes(), install.params.as_bytes());
        let numbers = [
            VERSION,
            install.image_len,
            install.data_len,
            install.image_hash,
            install.data_hash,
            name.len() as u64,
            params.len() as u64,
        ];
        for (slot, number) in head[NUMBERS..NAME].chunks_exact_mut(8).zip(numbers) {
            slot.copy_from_slice(&number.to_le_bytes());
        }
        head[NAME..NAME + name.len()].copy_from_slice(name);
        head[PARAMS..PARAMS + params.len()].copy_from_slice(params);
        let check = hash(&head[..CHECK]);
        head[CHECK..].copy_from_slice(&check.to_le_bytes());
        disk.write(0, &head[..])?;
        disk.flush()
    };
    write().map_err(|error| failed("writing", &error))
}

/// What the disk holds.
fn read_header(disk: &mut Disk) -> Result<Install, String> {
    let mut head = Box::new([0; BLOCK]);
    disk.read(0, &mut head[..])
        .map_err(|error| failed("reading", &error))?;
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&head[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if head[..8] != MAGIC {
        return Err("the disk holds no application".into());
    }
    let field = |index: usize| number(NUMBERS + 8 * index);
    let text = |at: usize, len: u64, max: usize| {
        let len = usize::try_from(len).ok().filter(|&len| len <= max)?;
        core::str::from_utf8(&head[at..at + len])
            .ok()
            .map(ToString::to_string)
    };
    let install = Install {
        name: text(NAME, field(5), NAME_MAX).unwrap_or_default(),
        params: text(PARAMS, field(6), PARAMS_MAX).unwrap_or_default(),
        image_len: field(1),
        data_len: field(2),
        image_hash: field(3),
        data_hash: field(4),
    };
    let good = number(CHECK) == hash(&head[..CHECK])
        && field(0) == VERSION
        && install.image_len <= IMAGE_MAX
        && install.data_len <= DATA_MAX;
    if good {
        Ok(install)
    } else {
        Err("the header of the application on the disk is damaged".into())
    }
}

/// Reads the application on the disk into its place and checks it.
pub fn load(disk: &mut Disk, space: Space) -> Result<(Install, Placing), String> {
    let install = read_header(disk)?;
    let mut placing = Placing::begin(space, install.image_len, install.data_len)?;
    let mut block = 1;
    while placing.missing() > 0 {
        let run = placing.next(space)?;
        read_run(disk, block, run).map_err(|error| failed("reading", &error))?;
        block += blocks(run.len() as u64);
        placing.advance(run.len());
    }
    check(&mut placing, &install, space)?;
    Ok((install, placing))
}

/// Compares what is in place with what was announced.
pub fn check(placing: &mut Placing, install: &Install, space: Space) -> Result<(), String> {
    let (image, data) = placing.bytes(space)?;
    for (what, bytes, want) in [
        ("image", image, install.image_hash),
        ("data", data, install.data_hash),
    ] {
        let got = hash(bytes);
        if got != want {
            return Err(format!(
                "the {what} is damaged: hash {got:016x}, announced {want:016x}"
            ));
        }
    }
    Ok(())
}
