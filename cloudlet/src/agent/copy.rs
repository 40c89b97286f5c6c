//! Trees to the guest and from it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use cloudlet_agent::connection;
use cloudlet_agent::protocol::{Reply, Request};
use cloudlet_agent::tree::{self, Entry, Extent, Receiver};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Error, Session, words};

/// Bits of a mode that are kept of what comes from a guest: nothing that changes who runs a file.
const MODES: u16 = 0o777;
/// How long an agent that closed the connection may take to say why.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(2);

/// What a path is called in the directory that it is copied into: its last component; nothing for a
/// path that ends with `.` or `..`, whose contents are copied.
fn name_of(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|&byte| byte != b'/');
    let path = &path[..end.map_or(0, |end| end + 1)];
    match path.rsplit(|&byte| byte == b'/').next() {
        Some(b"." | b"..") | None => b"",
        Some(name) => name,
    }
}

/// Copies `source` on the host to `path` in the guest; `progress` sees bytes done and in all.
///
/// # Errors
/// See [`Error`].
pub fn put(
    stream: UnixStream,
    source: &Path,
    path: &OsStr,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Extent, Error> {
    // What is not there is no reason to ask the guest for anything.
    std::fs::metadata(source).map_err(|error| tree::Error::Io {
        doing: "read",
        path: source.to_owned(),
        source: error,
    })?;
    let request = Request::Put {
        path: path.as_bytes(),
        name: name_of(source.as_os_str().as_bytes()),
    };
    let mut session = Session::open(stream, &request)?;
    let mut done = 0;
    let mut total = 0;
    let extent = tree::send(source, &mut |entry: Entry<'_>| {
        match entry {
            Entry::Extent(extent) => total = extent.bytes,
            Entry::Data(bytes) => done += length(bytes),
            Entry::Hole(length) => done += length,
            _ => {}
        }
        progress(done, total);
        session.send_entry(entry)
    })?;
    session.take_done()?;
    Ok(extent)
}

/// Copies `path` in the guest to `destination` on the host; `progress` sees bytes done and in all.
///
/// # Errors
/// See [`Error`].
pub fn get(
    stream: UnixStream,
    path: &OsStr,
    destination: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Extent, Error> {
    let name = Some(OsStr::from_bytes(name_of(path.as_bytes())));
    let name = name.filter(|name| !name.is_empty());
    let mut receiver = Receiver::new(destination, name, MODES)?;
    let mut session = Session::open(stream, &Request::Get(path.as_bytes()))?;
    let mut extent = Extent::default();
    let mut done = 0;
    loop {
        match session.incoming.reply()? {
            Reply::Tree(entry) => {
                match entry {
                    Entry::Extent(announced) => extent = announced,
                    Entry::Data(bytes) => done += length(bytes),
                    Entry::Hole(length) => done = done.saturating_add(length),
                    _ => {}
                }
                progress(done, extent.bytes);
                receiver.take(entry)?;
            }
            Reply::Error(why) => return Err(Error::Refused(words(why))),
            _ => return Err(Error::Unexpected),
        }
        if let Some(received) = receiver.complete() {
            return Ok(Extent {
                bytes: received.bytes,
                entries: received.entries,
                skipped: extent.skipped,
                stripped: extent.stripped.saturating_add(received.unprivileged),
            });
        }
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

impl Session {
    /// Sends a part of a tree, unless the agent has said meanwhile that it cannot go on.
    fn send_entry(&mut self, entry: Entry<'_>) -> Result<(), Error> {
        let mut watched = [PollFd::new(&self.stream, PollFlags::IN)];
        // Where it cannot be asked, sending will find out.
        if let Ok(1..) = poll(&mut watched, Some(&Timespec::default())) {
            return self.take_done();
        }
        match self.outgoing.request(&Request::Tree(entry)) {
            Err(connection::Error::Io(error)) => {
                // The agent may have said why before it closed the connection.
                let _ = self.stream.set_read_timeout(Some(LAST_WORDS_TIMEOUT));
                match self.take_done() {
                    Err(Error::Refused(why)) => Err(Error::Refused(why)),
                    _ => Err(connection::Error::Io(error).into()),
                }
            }
            sent => Ok(sent?),
        }
    }

    /// Takes the agent's last word on a tree.
    fn take_done(&mut self) -> Result<(), Error> {
        match self.incoming.reply()? {
            Reply::Done => Ok(()),
            Reply::Error(why) => Err(Error::Refused(words(why))),
            _ => Err(Error::Unexpected),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_last_components() {
        for (path, name) in [
            ("a", "a"),
            ("/a/b", "b"),
            ("a/b//", "b"),
            ("", ""),
            ("/", ""),
            (".", ""),
            ("a/.", ""),
            ("a/..", ""),
            ("../", ""),
            ("a/.b", ".b"),
        ] {
            assert_eq!(name_of(path.as_bytes()), name.as_bytes(), "{path:?}");
        }
    }
}
