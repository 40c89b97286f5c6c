//! What a file is, by how it begins. What is no tar archive is named, with the command that makes one
//! of it: a disk image of zeros, taken for an archive without entries, would become an empty root.

use tar::Header;

/// How much of a file is looked at: a btrfs has its name behind the first 64 KiB.
pub const HEAD_LEN: usize = 68 << 10;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Nothing at all.
    Empty,
    /// A tar archive.
    Tar,
    /// Something that is unpacked first.
    Packed(Packing),
    /// Zeros: an archive without entries begins so, and so do disks.
    Zeros,
    /// Something else that is known.
    Foreign(Foreign),
    /// Something else.
    Unknown,
}

/// Compressions that are read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// RFC 1952.
    Gzip,
    /// RFC 8878; may begin with a frame to be skipped, as pzstd writes it.
    Zstd,
    /// The XZ container.
    Xz,
    /// bzip2.
    Bzip2,
}

/// Something that is not read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foreign {
    /// Its name, with an article.
    pub name: &'static str,
    /// What reads it, as the beginning of a pipe or a command of its own.
    pub help: &'static str,
}

const UNPACKED: &str = "`bsdtar -cf - @FILE | cloudlet image import - OUT` imports what is in it";
const DISK: &str = "`virt-tar-out -a FILE / - | cloudlet image import - OUT` imports what is in it, and \
                    `cloudlet run --disk FILE` takes it as it is";
const QCOW2: &str =
    "`virt-tar-out -a FILE / - | cloudlet image import - OUT` imports what is in it";
const MOUNTED: &str =
    "`mount -o loop,ro FILE /mnt && cloudlet image import /mnt OUT` imports what is in it";

/// What begins with given bytes at a given place. Those that can be inside of others come last.
const KNOWN: &[(usize, &[u8], &str, &str)] = &[
    (
        0,
        b"\x04\x22\x4d\x18",
        "compressed by lz4",
        "`lz4 -dc FILE | cloudlet image import - OUT` reads it",
    ),
    (
        0,
        b"LZIP",
        "compressed by lzip",
        "`lzip -dc FILE | cloudlet image import - OUT` reads it",
    ),
    (
        0,
        b"\x89LZO\0",
        "compressed by lzop",
        "`lzop -dc FILE | cloudlet image import - OUT` reads it",
    ),
    (
        0,
        b"\x5d\0\0",
        "compressed by lzma",
        "`xz -dc FILE | cloudlet image import - OUT` reads it",
    ),
    (
        0,
        b"\x1f\x9d",
        "compressed by compress",
        "`gzip -dc FILE | cloudlet image import - OUT` reads it",
    ),
    (0, b"QFI\xfb", "a qcow2 disk image", QCOW2),
    (0, b"QED\0", "a QED disk image", QCOW2),
    (0, b"KDMV", "a VMDK disk image", QCOW2),
    (0, b"# Disk DescriptorFile", "a VMDK disk image", QCOW2),
    (0, b"vhdxfile", "a VHDX disk image", QCOW2),
    (0, b"conectix", "a VHD disk image", QCOW2),
    (64, b"\x7f\x10\xda\xbe", "a VDI disk image", QCOW2),
    (
        0,
        b"hsqs",
        "a squashfs file system",
        "`sqfs2tar FILE | cloudlet image import - OUT` imports what is in it",
    ),
    (0, b"XFSB", "an XFS file system", MOUNTED),
    (0, b"PK\x03\x04", "a zip archive", UNPACKED),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACKED),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACKED),
    (0, b"070701", "a cpio archive", UNPACKED),
    (0, b"070702", "a cpio archive", UNPACKED),
    (0, b"070707", "a cpio archive", UNPACKED),
    (0, b"\xc7\x71", "a cpio archive", UNPACKED),
    (0, b"\xed\xab\xee\xdb", "an RPM package", UNPACKED),
    (
        0,
        b"!<arch>\ndebian",
        "a Debian package",
        "`dpkg-deb --fsys-tarfile FILE | cloudlet image import - OUT` imports what is in it",
    ),
    (0, b"!<arch>\n", "an ar archive", UNPACKED),
    (
        0,
        b"\x7fELF",
        "a program",
        "a root file system is a directory or an archive of one",
    ),
    (0x8001, b"CD001", "an ISO image", UNPACKED),
    (0x8001, b"BEA01", "a UDF image", MOUNTED),
    (0x438, b"\x53\xef", "an ext file system", MOUNTED),
    (0x400, b"\xe2\xe1\xf5\xe0", "an EROFS file system", MOUNTED),
    (0x1_0040, b"_BHRfS_M", "a btrfs file system", MOUNTED),
    (0x200, b"EFI PART", "a disk image with a GPT", DISK),
    (0x1000, b"EFI PART", "a disk image with a GPT", DISK),
    (0x36, b"FAT", "a FAT file system", MOUNTED),
    (0x52, b"FAT32", "a FAT file system", MOUNTED),
    (0x3, b"NTFS    ", "an NTFS file system", MOUNTED),
    (0x1fe, b"\x55\xaa", "a disk image with a boot sector", DISK),
];

/// What begins with `head`, which is the first [`HEAD_LEN`] bytes or all there are.
#[must_use]
pub fn what(head: &[u8]) -> What {
    if head.is_empty() {
        return What::Empty;
    }
    if let Some(block) = head.first_chunk::<512>()
        && is_header(block)
    {
        return What::Tar;
    }
    match head {
        [0x1f, 0x8b, ..] => return What::Packed(Packing::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            return What::Packed(Packing::Zstd);
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => return What::Packed(Packing::Xz),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => return What::Packed(Packing::Bzip2),
        _ => {}
    }
    let found = KNOWN
        .iter()
        .find(|(at, magic, _, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    match found {
        Some(&(_, _, name, help)) => What::Foreign(Foreign { name, help }),
        None if head.iter().all(|&byte| byte == 0) => What::Zeros,
        None => What::Unknown,
    }
}

/// Whether a block is the header of an entry: it has the right sum. Old archives have it of signed
/// bytes.
#[must_use]
pub fn is_header(block: &[u8; 512]) -> bool {
    let Ok(said) = Header::from_byte_slice(block).cksum() else {
        return false;
    };
    let bytes = || block[..148].iter().chain(&[b' '; 8]).chain(&block[156..]);
    let unsigned: i64 = bytes().map(|&byte| i64::from(byte)).sum();
    let signed: i64 = bytes().map(|&byte| i64::from(byte.cast_signed())).sum();
    [unsigned, signed].contains(&said.into()) && block.iter().any(|&byte| byte != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(head: &[u8]) -> &'static str {
        match what(head) {
            What::Foreign(foreign) => foreign.name,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_archive_has_a_name_and_a_command() {
        for &(at, magic, expected, help) in KNOWN {
            let mut head = vec![0; HEAD_LEN];
            head[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(name(&head), expected);
            assert!(help.contains('`') || help.contains("directory"), "{help}");
            // It may end right there, or before.
            assert_eq!(name(&head[..at + magic.len()]), expected);
            let cut = what(&head[..at + magic.len() - 1]);
            assert!(cut != what(&head), "{expected}");
        }
    }

    #[test]
    fn an_ext_file_system_on_a_disk_with_a_boot_sector_is_the_former() {
        let mut head = vec![0; HEAD_LEN];
        head[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
        head[0x438..0x43a].copy_from_slice(b"\x53\xef");
        assert_eq!(name(&head), "an ext file system");
    }

    #[test]
    fn compressions_archives_and_nothing_are_told_apart() {
        for (head, expected) in [
            (&b""[..], What::Empty),
            (&[0; 1024], What::Zeros),
            (b"{\"json\": 1}", What::Unknown),
            (b"\x1f\x8b\x08", What::Packed(Packing::Gzip)),
            (b"\x28\xb5\x2f\xfd", What::Packed(Packing::Zstd)),
            (b"\x5e\x2a\x4d\x18", What::Packed(Packing::Zstd)),
            (b"\xfd7zXZ\0", What::Packed(Packing::Xz)),
            (b"BZh9", What::Packed(Packing::Bzip2)),
        ] {
            assert_eq!(what(head), expected, "{head:?}");
        }
        let mut header = Header::new_gnu();
        header.set_path("\u{e9}").unwrap();
        header.set_size(0);
        header.set_cksum();
        assert_eq!(what(header.as_bytes()), What::Tar);
        // A sum of signed bytes.
        let sum = header.cksum().unwrap() - 2 * 256;
        header.as_old_mut().cksum[..7].copy_from_slice(format!("{sum:07o}").as_bytes());
        assert_eq!(what(header.as_bytes()), What::Tar);
        header.as_mut_bytes()[0] ^= 1;
        assert_eq!(what(header.as_bytes()), What::Unknown);
    }
}
