//! What `docker save` writes, in both of its forms, and such as nobody should.

use std::fs;

use serde_json::{Value, json};

use super::super::hex;
use super::super::spool::FileSpool;
use super::*;

fn layer(name: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let empty = std::io::empty();
    builder.append_data(&mut header, name, empty).unwrap();
    builder.into_inner().unwrap()
}

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// An image of one layer, packed by gzip if it is to be, with a file of that name.
    fn image(&self, file: &str, tags: &[&str], packed: bool) -> Value {
        let layer = layer(file);
        let hash = |bytes: &[u8]| hex(&Sha256::digest(bytes));
        let about = json!({
            "architecture": "amd64", "os": "linux", "config": { "Cmd": [file] },
            "rootfs": { "diff_ids": [format!("sha256:{}", hash(&layer))] },
        });
        let about = about.to_string();
        let config = format!("{}.json", hash(about.as_bytes()));
        self.write(&config, about.as_bytes());
        let name = format!("{file}/layer.tar");
        if packed {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut gzip, &layer).unwrap();
            self.write(&name, &gzip.finish().unwrap());
        } else {
            self.write(&name, &layer);
        }
        json!({ "Config": config, "RepoTags": tags, "Layers": [name] })
    }

    fn manifest(&self, entries: &Value) {
        self.write(MANIFEST, entries.to_string().as_bytes());
    }

    fn read(&self, name: Option<&str>) -> Result<(Image, Tree), Error> {
        let contents = tempfile::tempdir().unwrap();
        let mut spool = FileSpool::new(contents.path(), 1 << 20);
        let mut tree = Tree::new();
        let layout = Layout::Directory(self.dir.path());
        let images = images(&layout).expect("it is of this form");
        let image = read(&layout, &images, name, &mut tree, &mut spool, 1 << 20)?;
        Ok((image, tree))
    }
}

#[test]
fn an_image_is_read_and_chosen_by_its_name() {
    let case = Case::new();
    let (one, other) = (
        case.image("a", &["web:latest", "web:1"], false),
        case.image("b", &["db:1"], true),
    );
    case.manifest(&json!([one]));
    let (image, tree) = case.read(None).unwrap();
    assert_eq!(image.config.cmd.unwrap(), ["a"]);
    assert!(tree.find(b"a").is_some());

    case.manifest(&json!([one, other]));
    for (name, file) in [("web", b"a"), ("web:1", b"a"), ("db:1", b"b")] {
        let (_, tree) = case.read(Some(name)).unwrap();
        assert!(tree.find(file).is_some(), "{name}");
    }
    for name in [None, Some("db")] {
        let error = case.read(name).unwrap_err().to_string();
        assert!(error.contains("db:1, web:1, web:latest"), "{error}");
    }
}

#[test]
fn contents_that_are_not_what_their_hash_says_are_refused() {
    let case = Case::new();
    let entry = case.image("a", &[], false);
    case.manifest(&json!([entry]));
    case.read(None).unwrap();
    case.write("a/layer.tar", &layer("b"));
    assert!(matches!(case.read(None), Err(Error::Contents { .. })));
    let config = entry["Config"].as_str().unwrap();
    case.write(config, b"{}");
    assert!(matches!(case.read(None), Err(Error::Contents { .. })));
}

#[test]
fn names_that_lead_out_and_other_forms_are_refused() {
    let case = Case::new();
    let good = case.image("a", &[], false);
    for (key, value) in [
        ("Config", json!("../../etc/passwd")),
        ("Config", json!("config.json")),
        ("Layers", json!(["../../etc/passwd"])),
        ("Layers", json!([])),
        ("Layers", json!(vec!["a/layer.tar"; LAYERS_MAX + 1])),
    ] {
        let mut bad = good.clone();
        bad[key] = value;
        case.manifest(&json!([bad]));
        assert!(case.read(None).is_err(), "{key}");
    }
    // A file of a root file system that has the same name.
    for other in [
        json!({ "name": "app" }),
        json!([]),
        json!([{ "src": "icon" }]),
    ] {
        case.manifest(&other);
        assert!(images(&Layout::Directory(case.dir.path())).is_none());
    }
}
