//! Keeps the house tidy: which crate may use which, paths that the documents name, what must not
//! be in the tree. Each rule says what to do about a finding.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which workspace crates each may use: in the product, and in its tests and build script besides.
const MAY_USE: &[(&str, &[&str], &[&str])] = &[
    ("cloudlet-overlay", &[], &[]),
    ("cloudlet-snapshot", &[], &[]),
    ("cloudlet-resources", &[], &[]),
    ("cloudlet-agent", &[], &[]),
    (
        "cloudlet-vmm",
        &["cloudlet-snapshot"],
        &["cloudlet-resources"],
    ),
    (
        "cloudlet",
        &[
            "cloudlet-agent",
            "cloudlet-overlay",
            "cloudlet-snapshot",
            "cloudlet-resources",
            "cloudlet-vmm",
        ],
        &[],
    ),
    (
        "tests",
        &[
            "cloudlet",
            "cloudlet-agent",
            "cloudlet-overlay",
            "cloudlet-snapshot",
            "cloudlet-resources",
            "cloudlet-vmm",
        ],
        &[],
    ),
];

/// Crate roots that promise to hold no unsafe code.
const FORBID_UNSAFE: &[&str] = &["overlay/src/lib.rs", "snapshot/src/lib.rs"];

/// Documents whose backticked paths must exist.
const DOCUMENTS: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
];

/// A source file longer than this has a room in it that a newcomer will not find.
const LINES_MAX: usize = 700;

/// What marks unfinished work, each split so that this file does not find itself.
const STUB_MARKERS: &[&str] = &[
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("dbg", "!("),
    concat!("#[ig", "nore"),
    concat!("allow(dead", "_code)"),
    concat!("TO", "DO"),
];

/// Places on somebody's machine.
const MACHINE_PATHS: &[&str] = &[concat!("/ho", "me/"), concat!("/ro", "ot/")];

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests
        .parent()
        .expect("tests is a folder of the workspace")
        .to_owned()
}

/// The files that git tracks or would track, with a given end of their names.
fn files(ends: &[&str]) -> Vec<String> {
    let output = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(root())
        .output()
        .expect("git runs");
    assert!(
        output.status.success(),
        "git ls-files: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let names = String::from_utf8(output.stdout).expect("names are UTF-8");
    let names = names
        .split('\0')
        .filter(|name| !name.is_empty() && root().join(name).is_file());
    let names = names.filter(|name| ends.is_empty() || ends.iter().any(|end| name.ends_with(end)));
    let names: Vec<String> = names.map(str::to_owned).collect();
    assert!(
        !names.is_empty(),
        "no files with {ends:?}: is this a git work tree?"
    );
    names
}

fn read(name: &str) -> String {
    let bytes = fs::read(root().join(name)).expect("a listed file is readable");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Fails with all findings at once.
fn expect_none(rule: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

#[test]
fn dependencies_point_one_way() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let name_of = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    let members: Vec<String> = packages.iter().map(name_of).collect();
    let mut findings = Vec::new();
    for package in packages {
        let name = name_of(package);
        let Some((_, product, tests)) = MAY_USE.iter().find(|(of, _, _)| *of == name) else {
            findings.push(format!("{name} is new: say in MAY_USE what it may use"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let used = name_of(dependency);
            let in_product = dependency["kind"].is_null();
            let allowed = product.contains(&used.as_str())
                || (!in_product && (tests.contains(&used.as_str()) || used == name));
            if members.contains(&used) && !allowed {
                findings.push(format!("{name} uses {used}"));
            }
        }
    }
    expect_none("a crate may use only what stands below it", &findings);
}

#[test]
fn every_crate_has_the_workspace_lints() {
    let manifests = files(&["Cargo.toml"]);
    let lacks = |name: &&String| {
        let text = read(name);
        text.contains("workspace = true") && !text.contains("[lints]\nworkspace = true")
    };
    let findings: Vec<String> = manifests
        .iter()
        .filter(|name| *name != "Cargo.toml")
        .filter(lacks)
        .cloned()
        .collect();
    expect_none("add `[lints] workspace = true`", &findings);
}

#[test]
fn paths_in_the_documents_exist() {
    let mut findings = Vec::new();
    for document in DOCUMENTS {
        assert!(root().join(document).is_file(), "{document} is missing");
        for path in paths_in(&read(document)) {
            if !root().join(&path).exists() {
                findings.push(format!("{document} names {path}"));
            }
        }
    }
    expect_none("a document names a path that is not there", &findings);
}

/// The first word of each `code span` that looks like a path in the tree.
fn paths_in(markdown: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in markdown.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for span in line.split('`').skip(1).step_by(2) {
            let word = span.split_whitespace().next().unwrap_or_default();
            let plain = |c: char| c.is_ascii_alphanumeric() || "_./-".contains(c);
            let path_like = word.contains('/') || word.ends_with(".md");
            let inside = word.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '.');
            if path_like && inside && word.chars().all(plain) && !word.contains("..") {
                found.push(word.to_owned());
            }
        }
    }
    found
}

#[test]
fn spans_that_are_paths_are_found() {
    let text =
        "see `a/b.rs` and `c/d --flag`, not `/dev/kvm`, `x::y`, `N/M*` or\n```\n`e/f`\n```\n";
    assert_eq!(paths_in(text), ["a/b.rs", "c/d"]);
    assert_eq!(paths_in("`README.md` of `word`"), ["README.md"]);
}

#[test]
fn no_stub_markers() {
    let mut findings = Vec::new();
    for name in files(&[".rs", ".sh", ".toml", ".ld", "/run", "/boot", "/init"]) {
        for (number, line) in read(&name).lines().enumerate() {
            if STUB_MARKERS.iter().any(|marker| line.contains(marker)) {
                findings.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    expect_none("finish it, or leave it out", &findings);
}

#[test]
fn unsafe_is_forbidden_where_promised() {
    let lacks = |name: &&&str| !read(name).contains("#![forbid(unsafe_code)]");
    let findings: Vec<String> = FORBID_UNSAFE
        .iter()
        .filter(lacks)
        .map(|name| (*name).to_owned())
        .collect();
    expect_none(
        "this crate root must say #![forbid(unsafe_code)]",
        &findings,
    );
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let lacks = |name: &String| !read(name).starts_with("//!");
    let findings: Vec<String> = files(&[".rs"]).into_iter().filter(lacks).collect();
    expect_none("open the file with //! and what the room is for", &findings);
}

#[test]
fn no_source_file_is_too_long() {
    let long = |name: &String| read(name).lines().count() > LINES_MAX;
    let findings: Vec<String> = files(&[".rs"]).into_iter().filter(long).collect();
    expect_none("split it: a newcomer will not find the room", &findings);
}

#[test]
fn no_path_of_one_machine() {
    let above = root()
        .parent()
        .expect("a work tree is not the root folder")
        .to_owned();
    let above = format!("{}/", above.display());
    let mut findings = Vec::new();
    for name in files(&[
        ".rs", ".md", ".toml", ".sh", ".ld", "/run", "/boot", "/init",
    ]) {
        for (number, line) in read(&name).lines().enumerate() {
            let machine = MACHINE_PATHS.iter().any(|path| line.contains(path));
            // A clone in the root folder or in /tmp says nothing about a machine.
            let here = !["//", "/tmp/"].contains(&above.as_str()) && line.contains(&above);
            if machine || here {
                findings.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    expect_none("a path of one machine does not belong here", &findings);
}
