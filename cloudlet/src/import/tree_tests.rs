//! Paths that lead elsewhere, links, and what layers hide.

use super::super::spool::MemorySpool;
use super::*;

const SOME: Attributes = Attributes {
    mode: 0o640,
    uid: 1,
    gid: 2,
    mtime: 3,
    nanos: 4,
};

struct Case {
    tree: Tree,
    spool: MemorySpool,
}

impl Case {
    fn new() -> Self {
        Self {
            tree: Tree::new(),
            spool: MemorySpool::new(1 << 20),
        }
    }

    fn file(&mut self, path: &str) -> Result<(), Error> {
        let blob = self
            .spool
            .store(&mut path.as_bytes(), path.len() as u64)
            .unwrap();
        self.tree
            .put(path.as_bytes(), SOME, Kind::File(blob), &mut self.spool)
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<(), Error> {
        let kind = Kind::Symlink(target.as_bytes().to_vec());
        self.tree.put(path.as_bytes(), SOME, kind, &mut self.spool)
    }

    fn dir(&mut self, path: &str) -> Result<(), Error> {
        self.tree
            .put_directory(path.as_bytes(), SOME, &mut self.spool)
    }

    fn link(&mut self, path: &str, target: &str) -> Result<(), Error> {
        self.tree
            .link(path.as_bytes(), target.as_bytes(), &mut self.spool)
    }

    /// All paths, sorted.
    fn paths(&self) -> Vec<String> {
        fn inside(tree: &Tree, id: NodeId, path: &str, found: &mut Vec<String>) {
            for (name, id) in tree.names(id) {
                let path = format!("{path}/{}", String::from_utf8_lossy(name));
                found.push(path.clone());
                inside(tree, id, &path, found);
            }
        }
        let mut found = Vec::new();
        inside(&self.tree, ROOT, "", &mut found);
        found
    }

    /// The contents of the file that `path` leads to.
    fn contents(&self, path: &str) -> String {
        let id = self.tree.find(path.as_bytes()).unwrap();
        match self.tree.node(id).kind {
            Kind::File(blob) => String::from_utf8(self.spool.load(blob, 1000).unwrap()).unwrap(),
            _ => panic!("{path} is no file"),
        }
    }
}

#[test]
fn paths_that_lead_out_are_refused() {
    let mut case = Case::new();
    for bad in ["../a", "a/../../b", "a/..", "", "/", "a\0b"] {
        assert!(matches!(case.file(bad), Err(Error::Path(_))), "{bad:?}");
    }
    assert!(case.file(&"x".repeat(256)).is_err());
    assert!(case.file(&"x/".repeat(2049)).is_err());
    assert!(case.file(&format!("{}y", "x/".repeat(DEPTH_MAX))).is_err());
    assert!(case.paths().is_empty());
    case.file(&"x".repeat(255)).unwrap();
    case.file("//./a//./b").unwrap();
    assert_eq!(case.contents("/a/b"), "//./a//./b");
}

#[test]
fn links_are_followed_inside_of_the_tree_alone() {
    let mut case = Case::new();
    case.dir("usr/lib").unwrap();
    case.symlink("lib", "usr/lib").unwrap();
    case.symlink("out", "../../../../usr").unwrap();
    case.symlink("usr/up", "/../usr/lib/").unwrap();
    case.file("lib/a").unwrap();
    case.file("out/b").unwrap();
    case.file("usr/up/c").unwrap();
    assert_eq!(
        case.paths(),
        [
            "/lib",
            "/out",
            "/usr",
            "/usr/b",
            "/usr/lib",
            "/usr/lib/a",
            "/usr/lib/c",
            "/usr/up"
        ]
    );
}

#[test]
fn ways_that_end_nowhere_are_refused() {
    let mut case = Case::new();
    case.symlink("a", "b").unwrap();
    case.symlink("b", "a").unwrap();
    case.file("file").unwrap();
    for bad in ["a/x", "file/x"] {
        assert!(matches!(case.file(bad), Err(Error::NotThere(_))), "{bad}");
        assert!(case.dir(bad).is_err(), "{bad}");
    }
    for bad in ["", "x\0", &"x".repeat(TARGET_LEN_MAX + 1)] {
        assert!(case.symlink("s", bad).is_err());
    }
}

#[test]
fn a_parent_that_is_a_link_to_nothing_is_made_inside() {
    let mut case = Case::new();
    case.symlink("var/run", "/run").unwrap();
    case.symlink("out", "../../../x/./y/").unwrap();
    case.symlink("late", "out/z").unwrap();
    case.file("var/run/app/pid").unwrap();
    case.dir("late/d").unwrap();
    assert_eq!(
        case.paths(),
        [
            "/late",
            "/out",
            "/run",
            "/run/app",
            "/run/app/pid",
            "/var",
            "/var/run",
            "/x",
            "/x/y",
            "/x/y/z",
            "/x/y/z/d"
        ]
    );
    let long = "n".repeat(NAME_LEN_MAX + 1);
    case.symlink("long", &long).unwrap();
    assert!(matches!(case.file("long/x"), Err(Error::NotThere(_))));
}

#[test]
fn links_lead_no_deeper_than_paths() {
    let mut case = Case::new();
    let step = "d/".repeat(100);
    case.dir(&step).unwrap();
    case.symlink("s0", &step).unwrap();
    let made = (1..40).try_for_each(|number| {
        let before = format!("s{}/{step}", number - 1);
        case.dir(&before)?;
        case.symlink(&format!("s{number}"), &before)
    });
    assert!(matches!(made, Err(Error::NotThere(_))));
    // Links to what is not there either.
    case.symlink("deep", &"e/".repeat(DEPTH_MAX)).unwrap();
    assert!(matches!(case.file("deep/x"), Err(Error::NotThere(_))));
}

#[test]
fn a_name_is_replaced_by_what_comes_later() {
    let mut case = Case::new();
    case.file("a/b").unwrap();
    case.symlink("a", "/etc").unwrap();
    assert_eq!(case.paths(), ["/a"]);
    case.dir("a").unwrap();
    case.file("a/c").unwrap();
    assert_eq!(case.paths(), ["/a", "/a/c"]);
    // Attributes of a directory may come after what is in it.
    case.dir("a").unwrap();
    assert_eq!(case.paths(), ["/a", "/a/c"]);
    let id = case.tree.find(b"a").unwrap();
    assert_eq!(case.tree.node(id).attributes, SOME);
}

#[test]
fn hard_links_share_and_outlive_each_other() {
    let mut case = Case::new();
    case.file("a").unwrap();
    case.link("d/b", "./a").unwrap();
    case.link("d/b", "a").unwrap();
    case.link("a", "a").unwrap();
    let id = case.tree.find(b"d/b").unwrap();
    assert_eq!(case.tree.node(id).names, 2);
    case.symlink("a", "elsewhere").unwrap();
    assert_eq!(case.contents("d/b"), "a");
    assert!(matches!(case.link("x", "missing"), Err(Error::Link(_))));
    assert!(matches!(case.link("x", "d"), Err(Error::Link(_))));
    assert!(case.link("x", "../a").is_err());
}

#[test]
fn contents_without_a_name_make_room() {
    let mut case = Case {
        tree: Tree::new(),
        spool: MemorySpool::new(4096),
    };
    for _ in 0..100 {
        case.file("a/b").unwrap();
        case.tree.begin_layer();
        case.tree.hide(b"a").unwrap();
        case.tree.end_layer(&mut case.spool);
    }
}

#[test]
fn layers_hide_what_lies_below_and_not_what_is_their_own() {
    let mut case = Case::new();
    for path in ["d/old", "d/sub/old", "e/old", "f"] {
        case.file(path).unwrap();
    }
    case.tree.begin_layer();
    case.file("d/sub/new").unwrap();
    case.tree.hide_inside(b"d").unwrap();
    case.file("d/late").unwrap();
    case.file("e").unwrap();
    case.tree.hide(b"e").unwrap();
    case.tree.hide(b"f").unwrap();
    case.tree.hide(b"missing/x").unwrap();
    assert_eq!(
        case.paths(),
        ["/d", "/d/late", "/d/sub", "/d/sub/new", "/e"]
    );
    assert!(case.tree.hide(b"/").is_err());
    assert!(case.tree.hide(b"../f").is_err());
}
