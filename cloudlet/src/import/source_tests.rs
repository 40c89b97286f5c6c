//! Sources of every kind, and names that choose.

use std::fs;
use std::process::Command;

use super::*;

const LEN: u64 = 1 << 20;

fn read(path: &Path) -> Result<Root, Error> {
    let work = tempfile::tempdir().unwrap();
    Source::new(path).read(work.path(), LEN)
}

/// A root file system of one layer as an OCI image's directory, whose name is `1.0`.
fn image(dir: &Path) {
    use serde_json::json;
    use sha2::Digest;
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |bytes: &[u8], kind: &str| {
        let digits = super::super::hex(&sha2::Sha256::digest(bytes));
        fs::write(blobs.join(&digits), bytes).unwrap();
        json!({ "mediaType": kind, "digest": format!("sha256:{digits}"), "size": bytes.len() })
    };
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_path("inside").unwrap();
    header.set_size(0);
    header.set_cksum();
    layer.append(&header, io::empty()).unwrap();
    let layer = blob(
        &layer.into_inner().unwrap(),
        "application/vnd.oci.image.layer.v1.tar",
    );
    let about = json!({ "architecture": "amd64", "os": "linux" }).to_string();
    let config = blob(about.as_bytes(), "config");
    let manifest = json!({ "config": config, "layers": [layer] }).to_string();
    let mut entry = blob(
        manifest.as_bytes(),
        "application/vnd.oci.image.manifest.v1+json",
    );
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "1.0" });
    let index = json!({ "manifests": [entry] }).to_string();
    fs::write(dir.join("index.json"), index).unwrap();
    fs::write(dir.join("oci-layout"), "{}").unwrap();
}

fn pack(dir: &Path, name: &str, archive: &Path) {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(dir).arg("-cf").arg(archive).arg(name);
    assert!(tar.status().unwrap().success());
}

#[test]
fn an_image_is_read_from_a_directory_and_from_archives_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("image");
    image(&from);
    let (flat, deep) = (dir.path().join("flat.tar"), dir.path().join("deep.tar"));
    pack(&from, ".", &flat);
    pack(dir.path(), "image", &deep);
    for path in [&from, &flat, &deep] {
        for name in ["", ":1.0"] {
            let mut named = path.as_os_str().to_owned();
            named.push(name);
            let root = read(Path::new(&named)).unwrap();
            assert!(root.name.starts_with("oci sha256:"), "{}", root.name);
            assert!(root.tree.find(b"inside").is_some());
            assert!(root.tree.find(b"index.json").is_none());
        }
        let mut named = path.as_os_str().to_owned();
        named.push(":2.0");
        let error = read(Path::new(&named)).unwrap_err().to_string();
        assert!(error.contains("1.0"), "{error}");
    }
}

#[test]
fn a_root_file_system_has_no_names_to_choose_by() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("root");
    fs::create_dir(&from).unwrap();
    fs::write(from.join("manifest.json"), "{}").unwrap();
    let archive = dir.path().join("root.tar");
    pack(&from, ".", &archive);
    for (path, what) in [(&from, "a directory"), (&archive, "a tar archive")] {
        assert_eq!(read(path).unwrap().name, what);
        let mut named = path.as_os_str().to_owned();
        named.push(":x");
        assert!(matches!(read(Path::new(&named)), Err(Error::NoImages)));
    }
}

#[test]
fn what_is_there_with_its_whole_name_is_that() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, colon) = (dir.path().join("a"), dir.path().join("a:1"));
    fs::write(&plain, "").unwrap();
    fs::write(&colon, "").unwrap();
    let source = |path: &Path| {
        let source = Source::new(path);
        (source.path, source.name)
    };
    assert_eq!(source(&colon), (Some(colon.clone()), None));
    assert_eq!(
        source(&dir.path().join("a:web:2")),
        (Some(plain), Some("web:2".into()))
    );
    let missing = dir.path().join("b:1");
    assert_eq!(source(&missing), (Some(missing.clone()), None));
    assert_eq!(source(Path::new("-")), (None, None));
    assert_eq!(source(Path::new("-:web")), (None, Some("web".into())));
}
