//! Manifests and files that are not what they should be.

use std::fs;

use super::*;

/// An image with a few bytes for each file.
fn image() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut root = vec![0; 4096];
    root[1024 + 0x38..1024 + 0x3a].copy_from_slice(&EXT4_MAGIC);
    fs::write(dir.path().join(KERNEL), b"kernel").unwrap();
    fs::write(dir.path().join(INITRD), b"initrd").unwrap();
    fs::write(dir.path().join(ROOT), root).unwrap();
    write_manifest(dir.path(), "console=ttyS0", 4096);
    dir
}

fn write_manifest(dir: &Path, cmdline: &str, root_len: u64) {
    let digest = |bytes| Digest {
        bytes,
        sha256: String::new(),
    };
    let manifest = Manifest {
        format: FORMAT,
        source: "a test".into(),
        cmdline: cmdline.into(),
        files: Files {
            kernel: digest(6),
            initrd: digest(6),
            root: digest(root_len),
        },
        packages: Vec::new(),
    };
    fs::write(dir.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
}

#[test]
fn a_complete_image_opens() {
    let dir = image();
    let image = BootImage::open(dir.path()).unwrap();
    assert_eq!(image.manifest.cmdline, "console=ttyS0");
    assert_eq!(image.root, dir.path().join(ROOT));
}

#[test]
fn a_missing_file_is_named() {
    for name in [KERNEL, INITRD, ROOT, MANIFEST] {
        let dir = image();
        fs::remove_file(dir.path().join(name)).unwrap();
        let error = BootImage::open(dir.path()).unwrap_err();
        assert!(
            matches!(&error, Error::File(error) if error.is_not_found()),
            "{error:?}"
        );
        assert!(error.to_string().ends_with(name), "{error}");
    }
}

#[test]
fn a_file_of_another_length_or_kind_is_refused() {
    let dir = image();
    write_manifest(dir.path(), "", 4095);
    let error = BootImage::open(dir.path()).unwrap_err();
    assert!(matches!(
        error,
        Error::Length {
            actual: 4096,
            expected: 4095,
            ..
        }
    ));

    let dir = image();
    fs::write(dir.path().join(ROOT), vec![0; 4096]).unwrap();
    let error = BootImage::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::NoFileSystem { .. }));

    let dir = image();
    let initrd = dir.path().join(INITRD);
    fs::remove_file(&initrd).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &initrd,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let error = BootImage::open(dir.path()).unwrap_err();
    assert!(
        matches!(error, Error::File(files::Error::Inside { .. })),
        "{error:?}"
    );
}

#[test]
fn command_lines_are_short_and_printable() {
    let dir = image();
    for bad in ["a\nb", "a\0", "é", &"x".repeat(CMDLINE_LEN_MAX + 1)] {
        write_manifest(dir.path(), bad, 4096);
        let error = BootImage::open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Cmdline), "{bad:?}");
    }
    write_manifest(dir.path(), &"x".repeat(CMDLINE_LEN_MAX), 4096);
    BootImage::open(dir.path()).unwrap();
}

#[test]
fn other_manifests_are_refused() {
    let dir = image();
    let path = dir.path().join(MANIFEST);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"format\":1", "\"format\":2")).unwrap();
    assert!(matches!(BootImage::open(dir.path()), Err(Error::Format(2))));
    fs::write(&path, "{}").unwrap();
    assert!(matches!(
        BootImage::open(dir.path()),
        Err(Error::Syntax { .. })
    ));
    let long = vec![b' '; usize::try_from(MANIFEST_LEN_MAX).unwrap() + 1];
    fs::write(&path, long).unwrap();
    assert!(matches!(
        BootImage::open(dir.path()),
        Err(Error::File(files::Error::TooLong { .. }))
    ));
}
