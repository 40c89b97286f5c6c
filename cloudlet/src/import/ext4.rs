//! Writing a tree as an ext4 file system with e2fsprogs: mke2fs makes it empty, debugfs fills it by a
//! list of commands, e2fsck says whether all is well. Names go into the list quoted, and never to
//! where debugfs would take them for something else.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::tree::{Attributes, Kind, NodeId, ROOT, Tree};

/// What debugfs reads at once (BUFSIZ), less a little.
const LINE_LEN_MAX: usize = 8000;
/// A directory gets another block before so many links: each takes at most 264 bytes of one.
const LINKS_A_BLOCK: usize = 12;
/// Bytes of the file system an inode: what mke2fs takes by itself.
const BYTES_AN_INODE: u64 = 16384;
/// Inodes that no file has.
const INODES_RESERVED: u64 = 11;
/// Where e2fsprogs is where the user's PATH has no administrator's programs.
const MORE_PATH: &str = "/usr/sbin:/sbin";
/// The time of what has none: the release of Debian 12, as in `resources/linux/build-debian`.
const EPOCH: &str = "1686355200";
/// The identity of all of these file systems.
const UUID: &str = "6b1c2f0e-636c-6f75-646c-65740d0a1a0a";

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program is not there or cannot be started.
    #[error("cannot start {0} (apt-get install e2fsprogs)")]
    Start(&'static str, #[source] io::Error),
    /// A program failed.
    #[error("{program} could not do it: {words}")]
    Failed {
        /// Which.
        program: &'static str,
        /// What it said.
        words: String,
    },
    /// A name is too long for debugfs, with its quotes.
    #[error("{0:?} is too long")]
    Long(String),
    /// The file or the list cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Makes the file `image` of `len` bytes with the file system that `tree` describes. `contents` is
/// where its contents are; the list of commands is put beside that.
///
/// # Errors
/// As [`Error`] says; `image` is of no use then.
pub fn write(tree: &Tree, contents: &Path, image: &Path, len: u64) -> Result<(), Error> {
    let write_error = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Write { path, source }
    };
    let file = File::create(image).map_err(write_error(image))?;
    file.set_len(len).map_err(write_error(image))?;
    let list = contents.with_extension("list");
    let commands = File::create(&list).map_err(write_error(&list))?;
    let mut writer = Writer {
        tree,
        out: BufWriter::new(commands),
        inodes: 0,
        first_names: HashMap::new(),
    };
    writer.all().map_err(|error| match error {
        Stop::Long(name) => Error::Long(name),
        Stop::Io(source) => Error::Write {
            path: list.clone(),
            source,
        },
    })?;
    let inodes = writer.inodes + INODES_RESERVED;
    make(image, inodes.max(len / BYTES_AN_INODE) + 1, len)?;
    fill(image, &list, contents)?;
    check(image, inodes)
}

fn make(image: &Path, inodes: u64, len: u64) -> Result<(), Error> {
    let journal = format!("size={}", (len >> 25).clamp(4, 32));
    let inodes = inodes.to_string();
    let options = format!("hash_seed={UUID},lazy_itable_init=0,lazy_journal_init=0,nodiscard");
    let arguments = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-m",
        "0",
        "-L",
        "cloudlet",
        "-U",
        UUID,
        "-N",
        &inodes,
        "-O",
        "^resize_inode",
        "-J",
        &journal,
        "-E",
        &options,
    ];
    let output = run(program("mke2fs").args(arguments).arg(image), "mke2fs")?;
    succeeded(&output, "mke2fs", output.status.success())
}

/// debugfs ends with 0 whatever happens: what counts is that it complains of nothing.
fn fill(image: &Path, list: &Path, contents: &Path) -> Result<(), Error> {
    let mut debugfs = program("debugfs");
    debugfs.arg("-w").arg("-f").arg(list).arg(image);
    let output = run(debugfs.current_dir(contents), "debugfs")?;
    // The first line is its version.
    let complaints = output.stderr.split(|&byte| byte == b'\n').skip(1);
    let quiet = complaints.flatten().next().is_none();
    succeeded(&output, "debugfs", quiet && output.status.success())
}

/// A last look by those who know: the file system is sound, and has as many files as were written.
fn check(image: &Path, inodes: u64) -> Result<(), Error> {
    let output = run(program("e2fsck").args(["-f", "-n"]).arg(image), "e2fsck")?;
    succeeded(&output, "e2fsck", output.status.success())?;
    let said = String::from_utf8_lossy(&output.stdout);
    let count = said
        .lines()
        .rev()
        .find_map(|line| line.split_once(": ")?.1.split_once('/')?.0.parse().ok());
    succeeded(&output, "debugfs", count == Some(inodes))
}

fn program(name: &str) -> Command {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    if !path.is_empty() {
        path.push(":");
    }
    path.push(OsString::from(MORE_PATH));
    let mut command = Command::new(name);
    command
        .env("PATH", path)
        .env("LC_ALL", "C")
        .env("E2FSPROGS_FAKE_TIME", EPOCH)
        .env_remove("DEBUGFS_PAGER")
        .env_remove("MKE2FS_CONFIG")
        .stdin(Stdio::null());
    command
}

fn run(command: &mut Command, name: &'static str) -> Result<Output, Error> {
    command
        .output()
        .map_err(|source| Error::Start(name, source))
}

fn succeeded(output: &Output, program: &'static str, succeeded: bool) -> Result<(), Error> {
    if succeeded {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.lines().rev().take(3).collect::<Vec<_>>();
    Err(Error::Failed {
        program,
        words: words.into_iter().rev().collect::<Vec<_>>().join("; "),
    })
}

/// Why the list is not complete.
#[derive(Debug)]
enum Stop {
    Long(String),
    Io(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Writes the list, directory by directory.
struct Writer<'a, W: Write> {
    tree: &'a Tree,
    out: W,
    inodes: u64,
    /// The first path of each file with several names.
    first_names: HashMap<NodeId, Vec<u8>>,
}

impl<W: Write> Writer<'_, W> {
    fn all(&mut self) -> Result<(), Stop> {
        let root = self.tree.node(ROOT).attributes;
        self.attributes(b".", 0o40000, root, None)?;
        self.directory(ROOT, &mut Vec::new())?;
        self.out.flush()?;
        Ok(())
    }

    /// Recursion is limited by the tree's depth.
    fn directory(&mut self, id: NodeId, path: &mut Vec<u8>) -> Result<(), Stop> {
        let mut links = 0;
        let entries: Vec<(Vec<u8>, NodeId)> = self
            .tree
            .names(id)
            .map(|(name, id)| (name.to_vec(), id))
            .collect();
        for (name, id) in &entries {
            // Every file system has one of its own.
            if path.is_empty() && name == b"lost+found" {
                continue;
            }
            let len = path.len();
            path.push(b'/');
            path.extend_from_slice(name);
            if let Some(first) = self.first_names.get(id).cloned() {
                if links % LINKS_A_BLOCK == 0 {
                    self.line(&[b"expand_dir ."])?;
                }
                links += 1;
                self.line(&[b"ln ", &quoted(&first), b" ", &quoted(name)])?;
            } else {
                self.node(name, *id, path)?;
            }
            path.truncate(len);
        }
        Ok(())
    }

    fn node(&mut self, name: &[u8], id: NodeId, path: &mut Vec<u8>) -> Result<(), Stop> {
        let node = self.tree.node(id);
        let word = quoted(name);
        self.inodes += 1;
        let kind = match &node.kind {
            Kind::Directory(_) => {
                self.line(&[b"mkdir ", &here(name)])?;
                self.line(&[b"cd ", &here(name)])?;
                self.directory(id, path)?;
                self.line(&[b"cd .."])?;
                0o40000
            }
            Kind::File(blob) => {
                self.line(&[b"write ", blob.number.to_string().as_bytes(), b" ", &word])?;
                0o100_000
            }
            Kind::Symlink(target) => {
                self.line(&[b"symlink ", &word, b" ", &quoted(target)])?;
                0o120_000
            }
            Kind::Character(major, minor) => {
                self.device(&word, 'c', *major, *minor)?;
                0o20000
            }
            Kind::Block(major, minor) => {
                self.device(&word, 'b', *major, *minor)?;
                0o60000
            }
            Kind::Fifo => {
                self.line(&[b"mknod ", &word, b" p"])?;
                0o10000
            }
        };
        let names = (node.names > 1).then_some(node.names);
        if names.is_some() {
            self.first_names.insert(id, path.clone());
        }
        self.attributes(name, kind, node.attributes, names)
    }

    fn device(&mut self, word: &[u8], kind: char, major: u32, minor: u32) -> Result<(), Stop> {
        let rest = format!(" {kind} {major} {minor}");
        self.line(&[b"mknod ", word, rest.as_bytes()])
    }

    fn attributes(
        &mut self,
        name: &[u8],
        kind: u32,
        attributes: Attributes,
        names: Option<u32>,
    ) -> Result<(), Stop> {
        let Attributes {
            mode,
            uid,
            gid,
            mtime,
            nanos,
        } = attributes;
        let (seconds, extra) = time(mtime, nanos);
        // A symbolic link's permissions mean nothing, and are all set.
        let mode = if kind == 0o120_000 { 0o777 } else { mode };
        let mut fields = vec![
            format!("mode 0{:o}", kind | mode),
            format!("mtime @{seconds}"),
            format!("mtime_extra {extra}"),
        ];
        if uid != 0 {
            fields.push(format!("uid {uid}"));
        }
        if gid != 0 {
            fields.push(format!("gid {gid}"));
        }
        if let Some(names) = names {
            fields.push(format!("links_count {names}"));
        }
        for field in fields {
            self.line(&[b"set_inode_field ", &here(name), b" ", field.as_bytes()])?;
        }
        Ok(())
    }

    fn line(&mut self, parts: &[&[u8]]) -> Result<(), Stop> {
        let line = parts.concat();
        if line.len() > LINE_LEN_MAX {
            let text = String::from_utf8_lossy(&line[..200]).into_owned();
            return Err(Stop::Long(text));
        }
        self.out.write_all(&line)?;
        Ok(self.out.write_all(b"\n")?)
    }
}

/// The two fields of a time: 32 bits of the seconds, which count as signed, and nanoseconds above two
/// bits that count spans of 2^32 seconds. What is out of their reach is the nearest that is not.
fn time(seconds: i64, nanos: u32) -> (u32, u32) {
    let seconds = seconds.clamp(i32::MIN.into(), (3 << 32) + i64::from(i32::MAX));
    let bytes = seconds.to_le_bytes();
    let low = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let span = (seconds - i64::from(low.cast_signed())) >> 32;
    (low, u32::try_from(span).unwrap_or(0) | nanos << 2)
}

/// A word that debugfs takes as it is: a quote is written twice.
fn quoted(word: &[u8]) -> Vec<u8> {
    let mut quoted = vec![b'"'];
    for &byte in word {
        quoted.extend_from_slice(if byte == b'"' {
            b"\"\""
        } else {
            std::slice::from_ref(&byte)
        });
    }
    quoted.push(b'"');
    quoted
}

/// A name in the directory where debugfs is. By itself, `<2>` would be the inode of that number.
fn here(name: &[u8]) -> Vec<u8> {
    quoted(&[b"./", name].concat())
}

#[cfg(test)]
#[path = "ext4_tests.rs"]
mod tests;
