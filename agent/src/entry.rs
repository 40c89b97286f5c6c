//! The process of an imported image: the file that says what it is, and starting it as that says.
//!
//! The file is made where the image is imported and read in the guest. Its fields end with a zero byte
//! each: [`MAGIC`], user, group, further groups (numbers behind commas), directory, the number of
//! variables, the variables as `NAME=VALUE`, and the program with its arguments up to the file's end.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Gid, Uid};

use crate::protocol::PATH_MAX;
use crate::sys;

/// What the file begins with: the format and its version.
pub const MAGIC: &[u8] = b"cloudlet-entry-1";
/// Longest file: the room that execve(2) has for words and variables with Linux' usual stack.
pub const LEN_MAX: usize = 2 << 20;
/// Most words and variables together.
pub const WORDS_MAX: usize = 4096;
/// Longest of them (`MAX_ARG_STRLEN` of linux/binfmts.h, with its end).
pub const WORD_LEN_MAX: usize = (128 << 10) - 1;
/// Most further groups.
pub const GROUPS_MAX: usize = 1024;
/// The highest user or group: as engines have it, and never -1, which changes nothing.
pub const ID_MAX: u32 = i32::MAX as u32;

/// Why a file or a process is not one that can be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// The file is not what it should be, or would not be.
    #[error(
        "the image's process cannot be told: its {0} is too long, missing, or none that can be"
    )]
    Field(&'static str),
    /// The directory is none and cannot be made.
    #[error("cannot use the directory {0:?}")]
    Directory(PathBuf, #[source] io::Error),
    /// The user cannot be changed to.
    #[error("cannot become user {uid}, group {gid}")]
    Ids {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The program cannot be run.
    #[error("cannot run {0:?}")]
    Program(PathBuf, #[source] io::Error),
}

impl Error {
    /// What a shell would end with: 127 for a program that is not there, 126 for one that cannot be
    /// run, 125 for everything before.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Program(_, error) if error.kind() == io::ErrorKind::NotFound => 127,
            Self::Program(..) | Self::Directory(..) => 126,
            _ => 125,
        }
    }
}

/// A process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Its directory, below `/`; one that is not there is made.
    pub directory: Vec<u8>,
    /// Its variables, each `NAME=VALUE`.
    pub environment: Vec<Vec<u8>>,
    /// The program, which is looked for in its own `PATH`, and its arguments; at least one.
    pub arguments: Vec<Vec<u8>>,
}

impl Entry {
    /// The file's bytes.
    ///
    /// # Errors
    /// A field is too long, or has a zero byte; the process has no program.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        self.check()?;
        let groups: Vec<String> = self.groups.iter().map(u32::to_string).collect();
        let numbers = [self.uid.to_string(), self.gid.to_string(), groups.join(",")];
        let count = self.environment.len().to_string();
        let fields = std::iter::once(MAGIC)
            .chain(numbers.iter().map(String::as_bytes))
            .chain([self.directory.as_slice(), count.as_bytes()])
            .chain(self.environment.iter().map(Vec::as_slice))
            .chain(self.arguments.iter().map(Vec::as_slice));
        let mut bytes = Vec::new();
        for field in fields {
            bytes.extend_from_slice(field);
            bytes.push(0);
        }
        if bytes.len() > LEN_MAX {
            return Err(Error::Field("command with its environment"));
        }
        Ok(bytes)
    }

    /// Reads the file's bytes.
    ///
    /// # Errors
    /// They are not what [`Entry::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > LEN_MAX {
            return Err(Error::Field("command with its environment"));
        }
        // What follows the last zero byte would be a field without an end.
        let bytes = bytes.strip_suffix(&[0]).ok_or(Error::Field("end"))?;
        let mut fields = bytes.split(|&byte| byte == 0);
        let mut next = |what| fields.next().ok_or(Error::Field(what));
        if next("format")? != MAGIC {
            return Err(Error::Field("format"));
        }
        let uid = number(next("user")?, ID_MAX).ok_or(Error::Field("user"))?;
        let gid = number(next("group")?, ID_MAX).ok_or(Error::Field("group"))?;
        let groups = numbers(next("groups")?).ok_or(Error::Field("groups"))?;
        let directory = next("directory")?.to_vec();
        let most = u32::try_from(WORDS_MAX).unwrap_or(u32::MAX);
        let count = number(next("environment")?, most).ok_or(Error::Field("environment"))?;
        let mut words = fields.take(WORDS_MAX + 1).map(<[u8]>::to_vec);
        let environment = words
            .by_ref()
            .take(usize::try_from(count).unwrap_or(WORDS_MAX))
            .collect::<Vec<_>>();
        if environment.len() != usize::try_from(count).unwrap_or(usize::MAX) {
            return Err(Error::Field("environment"));
        }
        let entry = Self {
            uid,
            gid,
            groups,
            directory,
            environment,
            arguments: words.collect(),
        };
        entry.check()?;
        Ok(entry)
    }

    fn check(&self) -> Result<(), Error> {
        let has_zero = |word: &Vec<u8>| word.contains(&0);
        if self.uid > ID_MAX {
            return Err(Error::Field("user"));
        }
        if self.gid > ID_MAX {
            return Err(Error::Field("group"));
        }
        if self.groups.len() > GROUPS_MAX || self.groups.iter().any(|&group| group > ID_MAX) {
            return Err(Error::Field("groups"));
        }
        if self.directory.len() > PATH_MAX || has_zero(&self.directory) {
            return Err(Error::Field("directory"));
        }
        let is_bad = |word: &Vec<u8>| word.len() > WORD_LEN_MAX || has_zero(word);
        let unnamed = |word: &Vec<u8>| !word.iter().skip(1).any(|&byte| byte == b'=');
        let words = self.environment.len() + self.arguments.len();
        let mut environment = self.environment.iter();
        if words > WORDS_MAX || environment.any(|word| is_bad(word) || unnamed(word)) {
            return Err(Error::Field("environment"));
        }
        if self.arguments.is_empty() || self.arguments.iter().any(is_bad) {
            return Err(Error::Field("command"));
        }
        Ok(())
    }

    /// Makes this process the one that the entry says. Returns only if that cannot be.
    fn exec(&self) -> Error {
        let directory = Path::new("/").join(OsStr::from_bytes(&self.directory));
        if let Err(error) = enter(&directory) {
            return Error::Directory(directory, error);
        }
        if let Err(source) = self.take_ids() {
            let (uid, gid) = (self.uid, self.gid);
            return Error::Ids { uid, gid, source };
        }
        let program = OsStr::from_bytes(&self.arguments[0]);
        let mut command = Command::new(program);
        command
            .args(
                self.arguments[1..]
                    .iter()
                    .map(|word| OsStr::from_bytes(word)),
            )
            .env_clear();
        for variable in &self.environment {
            // A name may begin with the sign: as the C library has it.
            let name_len = 1 + variable[1..]
                .iter()
                .position(|&byte| byte == b'=')
                .unwrap_or(0);
            let (name, value) = variable.split_at(name_len);
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(&value[1..]));
        }
        Error::Program(program.into(), command.exec())
    }

    /// Only this thread changes; there is no other.
    fn take_ids(&self) -> io::Result<()> {
        let groups: Vec<Gid> = self
            .groups
            .iter()
            .map(|&group| Gid::from_raw(group))
            .collect();
        rustix::thread::set_thread_groups(&groups)?;
        let gid = Gid::from_raw(self.gid);
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        let uid = Uid::from_raw(self.uid);
        Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
    }
}

/// Engines make a missing directory as root, for all to read.
fn enter(directory: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)?;
    std::env::set_current_dir(directory)
}

fn number(text: &[u8], most: u32) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    let number = text.parse::<u32>().ok().filter(|number| *number <= most)?;
    // One way to write each.
    (number.to_string() == text).then_some(number)
}

fn numbers(text: &[u8]) -> Option<Vec<u32>> {
    if text.is_empty() {
        return Some(Vec::new());
    }
    let words = text.split(|&byte| byte == b',').take(GROUPS_MAX + 1);
    words.map(|word| number(word, ID_MAX)).collect()
}

/// Makes this process the one that the file at `path` tells of. Returns only if that cannot be.
#[must_use]
pub fn run(path: &Path) -> Error {
    let mut bytes = Vec::new();
    let limit = LEN_MAX as u64 + 1;
    let read = File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
    if let Err(error) = read {
        return Error::Read(path.into(), error);
    }
    sys::reset_signals();
    match Entry::decode(&bytes) {
        Ok(entry) => entry.exec(),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<Vec<u8>> {
        words.iter().map(|word| word.as_bytes().to_vec()).collect()
    }

    fn entry() -> Entry {
        Entry {
            uid: 1001,
            gid: 7,
            groups: vec![8, 9],
            directory: b"/srv/app".to_vec(),
            environment: words(&["A=it's\n\"", "=odd=1", "B="]),
            arguments: words(&["/bin/sh", "", "a b"]),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let bare = Entry {
            arguments: words(&["x"]),
            ..Entry::default()
        };
        for entry in [entry(), bare] {
            assert_eq!(Entry::decode(&entry.encode().unwrap()).unwrap(), entry);
        }
    }

    #[test]
    fn other_files_are_refused() {
        let good = entry().encode().unwrap();
        // Every file that ends early lacks a field, or its last field's end.
        let whole = good.len() - b"\0a b\0".len();
        for len in 0..whole {
            if len < good.len() - b"/bin/sh\0\0a b\0".len() + 1 || good[len - 1] != 0 {
                assert!(Entry::decode(&good[..len]).is_err(), "{len}");
            }
        }
        let text = String::from_utf8(good).unwrap();
        for (from, to) in [
            ("entry-1", "entry-2"),
            ("1001", "-1"),
            ("1001", "4294967295"),
            ("1001", "2147483648"),
            ("1001", "01001"),
            ("1001", "+1001"),
            ("\x007\0", "\0\0"),
            ("8,9", "8,,9"),
            ("8,9", "8, 9"),
            ("\x003\0A", "\x007\0A"),
            ("\x003\0A", "\x004097\0A"),
            ("B=", "B"),
        ] {
            assert!(text.contains(from), "{from:?}");
            let bad = text.replacen(from, to, 1);
            assert!(Entry::decode(bad.as_bytes()).is_err(), "{from:?} {to:?}");
        }
        assert!(Entry::decode(&vec![0; LEN_MAX + 1]).is_err());
    }

    #[test]
    fn what_no_process_can_have_is_not_written() {
        let bad = [
            Entry {
                uid: u32::MAX,
                ..entry()
            },
            Entry {
                gid: u32::MAX,
                ..entry()
            },
            Entry {
                groups: vec![0; GROUPS_MAX + 1],
                ..entry()
            },
            Entry {
                directory: b"a\0b".to_vec(),
                ..entry()
            },
            Entry {
                environment: words(&["A"]),
                ..entry()
            },
            Entry {
                environment: words(&["=A"]),
                ..entry()
            },
            Entry {
                arguments: Vec::new(),
                ..entry()
            },
            Entry {
                arguments: words(&["a\0b"]),
                ..entry()
            },
            Entry {
                arguments: vec![vec![b'x'; WORD_LEN_MAX + 1]],
                ..entry()
            },
            Entry {
                arguments: vec![b"x".to_vec(); WORDS_MAX],
                ..entry()
            },
            Entry {
                arguments: vec![vec![b'x'; WORD_LEN_MAX]; 17],
                ..entry()
            },
        ];
        for entry in bad {
            assert!(entry.encode().is_err(), "{:.200}", format!("{entry:?}"));
        }
    }
}
