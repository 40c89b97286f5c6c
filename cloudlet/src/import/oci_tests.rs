//! OCI images as skopeo writes them, and such as nobody should.

use std::fs;

use serde_json::{Value, json};

use super::*;
use crate::import::spool::FileSpool;
use crate::import::tree::{Kind, Tree};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(dir.path().join("oci-layout"), "{}").unwrap();
        Self { dir }
    }

    /// Stores contents and describes them.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digits = hex(&Sha256::digest(bytes));
        fs::write(self.dir.path().join("blobs/sha256").join(&digits), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": format!("sha256:{digits}"), "size": bytes.len() })
    }

    /// An image of these layers, in an index of its own kind if `nested`.
    fn image(&self, layers: &[Value], nested: bool) {
        let about = json!({
            "architecture": "amd64", "os": "linux",
            "config": { "Env": ["A=b"], "Cmd": ["run"], "User": null },
        });
        let config = self.blob("config", about.to_string().as_bytes());
        let manifest = json!({ "config": config, "layers": layers }).to_string();
        let mut entry = self.blob(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.as_bytes(),
        );
        if nested {
            entry["platform"] = json!({ "architecture": "amd64", "os": "linux" });
            let other = json!({
                "mediaType": "m", "digest": "sha256:0", "size": 1,
                "platform": { "architecture": "arm64", "os": "linux" },
            });
            let inner = json!({ "manifests": [other, entry] }).to_string();
            entry = self.blob("application/vnd.oci.image.index.v1+json", inner.as_bytes());
        }
        self.index(&json!({ "manifests": [entry] }));
    }

    fn index(&self, index: &Value) {
        fs::write(self.dir.path().join("index.json"), index.to_string()).unwrap();
    }

    fn layout(&self) -> super::Layout<'_> {
        super::Layout::Directory(self.dir.path())
    }

    fn read(&self) -> Result<(Image, Tree), Error> {
        let contents = tempfile::tempdir().unwrap();
        let mut spool = FileSpool::new(contents.path(), 1 << 20);
        let mut tree = Tree::new();
        read(&self.layout(), None, &mut tree, &mut spool, 1 << 20).map(|image| (image, tree))
    }
}

fn layer(name: &str, contents: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(contents.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    builder
        .append_data(&mut header, name, contents.as_bytes())
        .unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn layers_come_in_order_and_the_configuration_is_kept() {
    for nested in [false, true] {
        let layout = Case::new();
        let layers = [
            layout.blob(TAR, &layer("a", "1")),
            layout.blob(TAR, &layer("a", "second")),
            layout.blob(TAR, &layer("b", "")),
        ];
        layout.image(&layers, nested);
        assert!(is_image(&layout.layout()));
        let (image, tree) = layout.read().unwrap();
        assert_eq!(image.config.env.unwrap(), ["A=b"]);
        assert_eq!(image.config.cmd.unwrap(), ["run"]);
        assert_eq!(image.config.user, None);
        let a = tree.node(tree.find(b"a").unwrap());
        assert!(matches!(a.kind, Kind::File(blob) if blob.len == 6));
        assert!(tree.find(b"b").is_some());
    }
}

#[test]
fn contents_that_are_not_what_their_hash_says_are_refused() {
    let layout = Case::new();
    let good = layer("a", "1");
    let described = layout.blob(TAR, &good);
    layout.image(std::slice::from_ref(&described), false);
    let digits = described["digest"].as_str().unwrap()[7..].to_owned();
    let path = layout.dir.path().join("blobs/sha256").join(digits);
    layout.read().unwrap();
    let mut flipped = good.clone();
    flipped[600] ^= 1;
    for bad in [
        flipped,
        [&good[..], b"more"].concat(),
        good[..good.len() - 1].to_vec(),
    ] {
        fs::write(&path, bad).unwrap();
        assert!(matches!(layout.read(), Err(Error::Contents { .. })));
    }
    // The manifest as well.
    fs::write(&path, &good).unwrap();
    let text = fs::read_to_string(layout.dir.path().join("index.json")).unwrap();
    let index: Value = serde_json::from_str(&text).unwrap();
    let digits = index["manifests"][0]["digest"].as_str().unwrap()[7..].to_owned();
    let manifest = layout.dir.path().join("blobs/sha256").join(digits);
    let changed = fs::read_to_string(&manifest)
        .unwrap()
        .replace("config", "confih");
    fs::write(&manifest, changed).unwrap();
    assert!(matches!(layout.read(), Err(Error::Contents { .. })));
}

#[test]
fn a_hash_is_no_path() {
    let digits = "0".repeat(64);
    let name = name_of(&format!("sha256:{digits}")).unwrap();
    assert_eq!(name, format!("blobs/sha256/{digits}"));
    for bad in [
        "sha256:../../../../etc/passwd".to_owned(),
        format!("sha256:{}", &digits[1..]),
        format!("sha256:/{}", &digits[1..]),
        format!("sha256:{}", "A".repeat(64)),
        format!("sha512:{digits}"),
        digits,
        String::new(),
    ] {
        assert!(matches!(name_of(&bad), Err(Error::Digest(_))), "{bad}");
    }
}

#[test]
fn other_machines_several_images_and_odd_layers_are_refused() {
    let layout = Case::new();
    let layers = [layout.blob("application/vnd.oci.image.layer.v1.tar+encrypted", b"")];
    layout.image(&layers, false);
    assert!(matches!(layout.read(), Err(Error::LayerType(_))));

    let layers = [layout.blob("application/x-squashfs", b"")];
    layout.image(&layers, false);
    assert!(matches!(layout.read(), Err(Error::LayerType(_))));

    let many = vec![layout.blob(TAR, &layer("a", "")); LAYERS_MAX + 1];
    layout.image(&many, false);
    assert!(matches!(layout.read(), Err(Error::Layers)));

    let entry = |architecture: &str| {
        json!({
            "mediaType": "m", "digest": "sha256:0", "size": 1,
            "platform": { "architecture": architecture, "os": "linux" },
        })
    };
    layout.index(&json!({ "manifests": [entry("arm64")] }));
    assert!(matches!(layout.read(), Err(Error::Platform)));
    let mut other = entry("amd64");
    other["digest"] = json!("sha256:1");
    layout.index(&json!({ "manifests": [entry("amd64"), other] }));
    assert!(matches!(layout.read(), Err(Error::Count(2))));
    layout.index(&json!({ "manifests": [] }));
    assert!(matches!(layout.read(), Err(Error::Count(0))));
    layout.index(&json!({ "manifests": 7 }));
    assert!(matches!(layout.read(), Err(Error::Syntax { .. })));
}

#[test]
fn json_has_an_end() {
    let layout = Case::new();
    let long = vec![b' '; usize::try_from(JSON_LEN_MAX).unwrap() + 1];
    fs::write(layout.dir.path().join("index.json"), long).unwrap();
    assert!(matches!(layout.read(), Err(Error::TooLong { .. })));
    let huge = json!({ "mediaType": "m", "digest": "sha256:0", "size": JSON_LEN_MAX + 1 });
    layout.index(&json!({ "manifests": [huge] }));
    assert!(matches!(layout.read(), Err(Error::TooLong { .. })));
}

#[test]
fn an_index_of_itself_comes_to_an_end() {
    // Hashes forbid a real circle; a deep chain is the nearest thing.
    let layout = Case::new();
    let kind = "application/vnd.oci.image.index.v1+json";
    let mut entry = layout.blob(kind, b"{\"manifests\":[]}");
    for _ in 0..INDEX_DEPTH_MAX + 1 {
        let index = json!({ "manifests": [entry] }).to_string();
        entry = layout.blob(kind, index.as_bytes());
    }
    layout.index(&json!({ "manifests": [entry] }));
    assert!(matches!(layout.read(), Err(Error::Count(0))));
}
