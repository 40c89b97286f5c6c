//! The agent's program as the one that starts an image's process: what becomes of it, by its output and
//! its exit code.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

use cloudlet_agent::entry::Entry;

fn run(entry: &[u8]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("entry");
    std::fs::write(&path, entry).unwrap();
    Command::new(env!("CARGO_BIN_EXE_cloudlet-agent"))
        .arg("--run-entry")
        .arg(path)
        .env("UNSET", "set")
        .output()
        .unwrap()
}

fn words(words: &[&str]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

fn shell(script: &str) -> Entry {
    Entry {
        environment: words(&["PATH=/usr/bin:/bin", "A=it's $HOME `id`\n\""]),
        arguments: words(&["sh", "-c", script]),
        ..Entry::default()
    }
}

/// Whether this process may become others.
fn is_root() -> bool {
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

#[test]
fn the_process_is_as_the_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("a/b");
    let mut entry = shell("id -u; id -g; id -G; pwd; echo \"$A\"; echo ${UNSET-none}; exit 12");
    entry.directory = below.to_str().unwrap().into();
    (entry.uid, entry.gid, entry.groups) = (1001, 1002, vec![7, 9]);
    let output = run(&entry.encode().unwrap());
    if !is_root() {
        // Nobody else may change to other users.
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        return;
    }
    let said = String::from_utf8(output.stdout).unwrap();
    let below = below.display();
    let expected = format!("1001\n1002\n1002 7 9\n{below}\nit's $HOME `id`\n\"\nnone\n");
    assert_eq!(said, expected);
    assert_eq!(output.status.code(), Some(12));
    // The directory is made as engines make it, for all to read.
    let made = std::fs::metadata(dir.path().join("a")).unwrap();
    assert_eq!((made.uid(), made.mode() & 0o777), (0, 0o755));
}

#[test]
fn what_cannot_be_run_ends_as_in_a_shell() {
    if !is_root() {
        // See above: everything ends with 125 then.
        return;
    }
    let code = |entry: &Entry| run(&entry.encode().unwrap()).status.code();
    let mut entry = shell("");
    entry.arguments = words(&["no-such-program"]);
    assert_eq!(code(&entry), Some(127));
    entry.arguments = words(&["/dev/null"]);
    assert_eq!(code(&entry), Some(126));
    entry.directory = b"/dev/null/x".to_vec();
    assert_eq!(code(&entry), Some(126));
    assert_eq!(run(b"#!/bin/sh\n").status.code(), Some(125));
    let missing = Command::new(env!("CARGO_BIN_EXE_cloudlet-agent"))
        .args(["--run-entry".as_ref(), Path::new("/no/such/file")])
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(125));
}
