//! Disk images of formats that are not read here, and the command that makes one of them into one that
//! is. Taken as the bytes of a disk they would give the guest a disk that makes no sense.
//!
//! What a file begins or ends with is no proof: a guest may have written that to its disk. So it is a
//! reason to refuse it and never to read it in another way, and `format=raw` takes the file as it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes that are looked at, at the beginning and at the end.
const LOOK: usize = 512;

/// A format that is not read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Foreign {
    /// What people call it.
    name: &'static str,
    program: Program,
}

/// What makes something readable of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    /// qemu-img, with its own name for the format.
    QemuImg(&'static str),
    /// One that unpacks files of which the name has this behind it.
    Unpack(&'static str, &'static str),
}

/// Where a format shows: offset, what is there, and which it is. The values are those of block/ in
/// QEMU's source and of file(1)'s magic.
const AT_BEGINNING: [(usize, &[u8], Foreign); 14] = [
    (0, b"KDMV", image("VMDK", "vmdk")),
    (0, b"COWD", image("VMDK", "vmdk")),
    (0, b"# Disk DescriptorFile", image("VMDK", "vmdk")),
    (0x40, &0xbeda_107f_u32.to_le_bytes(), image("VDI", "vdi")),
    (0, b"vhdxfile", image("VHDX", "vhdx")),
    (0, b"conectix", image("VHD", "vpc")),
    (0, b"QED\0", image("QED", "qed")),
    (0, b"WithoutFreeSpace", image("Parallels", "parallels")),
    (0, b"WithouFreSpacExt", image("Parallels", "parallels")),
    (0, b"\x1f\x8b\x08", packed("gzip", "gunzip", "gz")),
    (0, b"\xfd7zXZ\0", packed("xz", "unxz", "xz")),
    (0, b"BZh", packed("bzip2", "bunzip2", "bz2")),
    (0, b"\x28\xb5\x2f\xfd", packed("zstd", "unzstd", "zst")),
    (0, b"PK\x03\x04", packed("zip", "unzip", "zip")),
];
/// The last sector of a VHD image of fixed size, whose disk lies before it.
const FIXED_VHD: &[u8] = b"conectix";

const fn image(name: &'static str, qemu: &'static str) -> Foreign {
    Foreign {
        name,
        program: Program::QemuImg(qemu),
    }
}

const fn packed(name: &'static str, program: &'static str, suffix: &'static str) -> Foreign {
    Foreign {
        name,
        program: Program::Unpack(program, suffix),
    }
}

impl Foreign {
    /// Which format `file`, of `len` bytes, looks like.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn look(file: &File, len: u64) -> io::Result<Option<Self>> {
        let head = read_some(file, 0)?;
        let shows =
            |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
        let found = AT_BEGINNING
            .iter()
            .find(|(at, magic, _)| shows(*at, magic))
            .map(|(_, _, format)| *format);
        if found.is_some() {
            return Ok(found);
        }
        let tail = read_some(file, len.saturating_sub(LOOK as u64))?;
        Ok((len > LOOK as u64 && tail.starts_with(FIXED_VHD)).then_some(image("VHD", "vpc")))
    }

    /// What to do about the image at `path`.
    pub(super) fn advice(self, path: &Path) -> String {
        let (name, path) = (self.name, path.display());
        let how = match self.program {
            Program::QemuImg(format) => format!(
                "it looks like a {name} image, which is not read here: make another of it with \
                 `qemu-img convert -f {format} -O qcow2 {path} {path}.qcow2`"
            ),
            Program::Unpack(program, suffix) => format!(
                "it looks compressed ({name}): unpack it first (`{program}` makes a file of one whose \
                 name ends with .{suffix})"
            ),
        };
        format!("{how}; or say format=raw behind its name if a guest had it as its disk")
    }
}

/// So many bytes from `at` on, or as many as there are.
fn read_some(file: &File, at: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; LOOK];
    let mut got = 0;
    while got < LOOK {
        match file.read_at(&mut bytes[got..], at + got as u64) {
            Ok(0) => break,
            Ok(count) => got += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(got);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(bytes: &[u8]) -> Option<&'static str> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let found = Foreign::look(&file, bytes.len() as u64).unwrap();
        found.map(|format| format.name)
    }

    #[test]
    fn images_of_other_programs_are_known() {
        for (at, magic, format) in AT_BEGINNING {
            let mut bytes = vec![0; 4096];
            bytes[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(look(&bytes), Some(format.name));
            // Cut, or elsewhere.
            assert_eq!(look(&bytes[..at + magic.len() - 1]), None);
            bytes.insert(0, 0);
            assert_eq!(look(&bytes), None);
        }
        let mut fixed = vec![0; 4096];
        fixed[3584..3592].copy_from_slice(FIXED_VHD);
        assert_eq!(look(&fixed), Some("VHD"));
        for plain in [&[][..], &[0; 511], &[0; 4096], b"\xeb\x63\x90"] {
            assert_eq!(look(plain), None);
        }
    }

    #[test]
    fn the_command_that_helps_is_named() {
        let said = image("VDI", "vdi").advice(Path::new("/a/b.vdi"));
        assert!(said.contains("VDI image"), "{said}");
        assert!(
            said.contains("qemu-img convert -f vdi -O qcow2 /a/b.vdi /a/b.vdi.qcow2"),
            "{said}"
        );
        let said = packed("xz", "unxz", "xz").advice(Path::new("/a"));
        assert!(said.contains("unxz"), "{said}");
    }
}
