//! Compressed archives, and what is none.

use std::io::Write;

use super::*;

/// An empty file named `f`, by `xz -9`, and by `xz --lzma2=dict=1GiB`.
const XZ: &[u8] = b"\
    \xfd\x37\x7a\x58\x5a\x00\x00\x04\xe6\xd6\xb4\x46\x02\x00\x21\x01\x1c\x00\x00\x00\x10\xcf\
    \x58\xcc\xe0\x27\xff\x00\x4d\x5d\x00\x33\x00\x33\x50\x18\x68\x89\x83\x01\xdc\xe2\x6e\x34\
    \x0a\xe3\xd2\xb4\x05\x36\x3a\x5a\xb7\x70\x0e\x73\x3d\xc5\x1b\x81\x32\x50\xcc\x38\xb9\xaa\
    \x28\xe5\xb5\xce\xf5\xb9\xa8\xb7\x8d\x93\xc9\xa3\x93\xd8\x88\xe4\x01\xbf\xc6\x64\x9f\xb9\
    \xfb\x8e\x75\x30\x14\x14\x41\xc2\xb8\x8c\x5c\x5e\xf0\xfa\xa2\xde\xa2\x18\x5e\x00\x00\x00\
    \x00\x00\x90\x69\xc2\x66\xc9\xcb\xc5\x0e\x00\x01\x69\x80\x50\x00\x00\x00\x7f\x35\x45\x96\
    \xb1\xc4\x67\xfb\x02\x00\x00\x00\x00\x04\x59\x5a";
const XZ_HUGE: &[u8] = b"\
    \xfd\x37\x7a\x58\x5a\x00\x00\x04\xe6\xd6\xb4\x46\x02\x00\x21\x01\x24\x00\x00\x00\x5e\x1f\
    \xc7\xf9\xe0\x27\xff\x00\x4d\x5d\x00\x33\x00\x33\x50\x18\x68\x89\x83\x01\xdc\xe2\x6e\x34\
    \x0a\xe3\xd2\xb4\x05\x36\x3a\x5a\xb7\x70\x0e\x73\x3d\xc5\x1b\x81\x32\x50\xcc\x38\xb9\xaa\
    \x28\xe5\xb5\xce\xf5\xb9\xa8\xb7\x8d\x93\xc9\xa3\x93\xd8\x88\xe4\x01\xbf\xc6\x64\x9f\xb9\
    \xfb\x8e\x75\x30\x14\x14\x41\xc2\xb8\x8c\x5c\x5e\xf0\xfa\xa2\xde\xa2\x18\x5e\x00\x00\x00\
    \x00\x00\x90\x69\xc2\x66\xc9\xcb\xc5\x0e\x00\x01\x69\x80\x50\x00\x00\x00\x7f\x35\x45\x96\
    \xb1\xc4\x67\xfb\x02\x00\x00\x00\x00\x04\x59\x5a";

fn archive() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_path("f").unwrap();
    header.set_mode(0o644);
    header.set_size(0);
    header.set_cksum();
    builder.append(&header, io::empty()).unwrap();
    builder.into_inner().unwrap()
}

fn all(bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let mut unpacked = Vec::new();
    unpack(bytes)?.read_to_end(&mut unpacked)?;
    Ok(unpacked)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

#[test]
fn every_compression_is_unpacked() {
    let plain = archive();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(&plain).unwrap();
    let packed = [
        plain.clone(),
        gzip(&plain),
        zstd::encode_all(&plain[..], 1).unwrap(),
        bzip2.finish().unwrap(),
    ];
    for packed in packed {
        assert!(all(&packed).unwrap() == plain);
    }
    let xz = all(XZ).unwrap();
    assert_eq!(sniff::what(&xz), What::Tar);
}

#[test]
fn zstd_has_frames_to_be_skipped_wherever_they_are() {
    let plain = [archive(), vec![7; 100_000]].concat();
    let (first, second) = plain.split_at(700);
    let skipped =
        |number: u8| [&[0x50 + number, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], b"what"].concat();
    let frame = |part| zstd::encode_all(part, 1).unwrap();
    let packed = [
        skipped(0),
        skipped(15),
        frame(first),
        skipped(7),
        frame(second),
        skipped(1),
    ];
    assert!(all(&packed.concat()).unwrap() == plain);
}

#[test]
fn an_xz_that_asks_for_too_much_memory_is_refused_with_a_command() {
    let error = all(XZ_HUGE).unwrap_err();
    let Error::Read(source) = error else {
        panic!("{error}");
    };
    assert!(source.to_string().contains("xz -dc"), "{source}");
}

#[test]
fn what_is_no_archive_is_refused_packed_or_not() {
    let mut iso = vec![0; 40_000];
    iso[0x8001..0x8006].copy_from_slice(b"CD001");
    for bytes in [
        iso.clone(),
        gzip(&iso),
        zstd::encode_all(&iso[..], 1).unwrap(),
    ] {
        let error = all(&bytes).unwrap_err();
        assert!(matches!(error, Error::Foreign(_)));
        let text = error.to_string();
        assert!(
            text.contains("an ISO image") && text.contains("bsdtar"),
            "{text}"
        );
    }
    assert!(matches!(all(b""), Err(Error::Empty)));
    assert!(matches!(all(&gzip(b"")), Err(Error::Empty)));
    assert!(matches!(all(b"text"), Err(Error::Unknown)));
    assert!(matches!(all(&gzip(&gzip(&archive()))), Err(Error::Twice)));
    assert!(matches!(all(&gzip(&archive())[..30]), Err(Error::Read(_))));
}
