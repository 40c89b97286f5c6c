//! Archives unpacked: gzip, zstd, xz and bzip2 by what they begin with, each with a bound on the memory
//! that its author can ask for. What is inside is looked at again, so that only tar archives come out.

use std::io::{self, BufReader, Chain, Cursor, Read};

use bzip2::bufread::MultiBzDecoder;
use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;

use super::sniff::{self, Foreign, HEAD_LEN, Packing, What};

/// Memory for an xz dictionary: `xz -9` asks for 64 MiB. The others have bounds of their own: 128 MiB
/// for zstd's window, 4 MB for bzip2.
const XZ_KIB_MAX: u32 = 128 << 10;
/// Bytes that are read at a time.
const BUFFER_LEN: usize = 256 << 10;

/// Why something is no archive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("cannot read the archive")]
    Read(#[from] io::Error),
    /// It has no byte.
    #[error("the file is empty, and an archive has entries")]
    Empty,
    /// It is something else, by name.
    #[error("it is {}, which is not read here: {}", .0.name, .0.help)]
    Foreign(Foreign),
    /// It is something else.
    #[error("it is no tar archive, and nothing else that is known here")]
    Unknown,
    /// It is compressed twice.
    #[error("it is compressed twice: unpack it once, and import the result from `-`")]
    Twice,
}

/// Looks at what `source` is, and unpacks it: what comes out is a tar archive, or begins with zeros as one
/// without entries does.
///
/// # Errors
/// It is no tar archive, compressed or not, or cannot be read.
pub fn unpack<'a>(source: impl Read + 'a) -> Result<Box<dyn Read + 'a>, Error> {
    let (what, source) = look(source)?;
    let What::Packed(packing) = what else {
        return archive(what, source);
    };
    let source = BufReader::with_capacity(BUFFER_LEN, source);
    let unpacked: Box<dyn Read> = match packing {
        Packing::Gzip => Box::new(MultiGzDecoder::new(source)),
        Packing::Zstd => Box::new(zstd::Decoder::with_buffer(source)?),
        Packing::Xz => Box::new(Xz(XzReader::new_mem_limit(source, true, XZ_KIB_MAX))),
        Packing::Bzip2 => Box::new(MultiBzDecoder::new(source)),
    };
    let (what, unpacked) = look(unpacked)?;
    archive(what, unpacked)
}

type Looked<R> = Chain<Cursor<Vec<u8>>, R>;

/// What a source is, and the source as it was.
fn look<R: Read>(mut source: R) -> io::Result<(What, Looked<R>)> {
    let mut head = Vec::new();
    source
        .by_ref()
        .take(HEAD_LEN as u64)
        .read_to_end(&mut head)?;
    Ok((sniff::what(&head), Cursor::new(head).chain(source)))
}

fn archive<'a>(what: What, source: impl Read + 'a) -> Result<Box<dyn Read + 'a>, Error> {
    match what {
        // Whether zeros are more than an archive's end, whoever reads it sees.
        What::Tar | What::Zeros => Ok(Box::new(BufReader::with_capacity(BUFFER_LEN, source))),
        What::Empty => Err(Error::Empty),
        What::Packed(_) => Err(Error::Twice),
        What::Foreign(foreign) => Err(Error::Foreign(foreign)),
        What::Unknown => Err(Error::Unknown),
    }
}

/// An xz stream whose author asks for too much memory is told from a damaged one.
struct Xz<R: Read>(XzReader<R>);

impl<R: Read> Read for Xz<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::OutOfMemory => io::Error::other(
                "it takes more than 128 MiB to unpack: `xz -dc FILE | cloudlet image import - OUT` reads it",
            ),
            _ => error,
        })
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
