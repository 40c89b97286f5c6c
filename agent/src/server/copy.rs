//! Trees to and from the host. Paths are seen from the root directory.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::Error;
use crate::connection::{Incoming, Outgoing};
use crate::protocol::{Reply, Request};
use crate::tree::{self, Receiver};

/// The host is trusted with all bits of a mode.
const MODES: u16 = 0o7777;

fn from_root(path: &[u8]) -> PathBuf {
    Path::new("/").join(OsStr::from_bytes(path))
}

/// Receives a tree.
pub(super) fn put(
    path: &[u8],
    name: &[u8],
    incoming: &mut Incoming<impl Read>,
    outgoing: &mut Outgoing<impl Write>,
) -> Result<(), Error> {
    let name = Some(OsStr::from_bytes(name)).filter(|name| !name.is_empty());
    let mut receiver = Receiver::new(&from_root(path), name, MODES)?;
    while receiver.complete().is_none() {
        match incoming.request()? {
            Request::Tree(entry) => receiver.take(entry)?,
            _ => return Err(Error::Unexpected),
        }
    }
    Ok(outgoing.reply(&Reply::Done)?)
}

/// Sends a tree.
pub(super) fn get(path: &[u8], outgoing: &mut Outgoing<impl Write>) -> Result<(), Error> {
    let mut sink =
        |entry: tree::Entry<'_>| -> Result<(), Error> { Ok(outgoing.reply(&Reply::Tree(entry))?) };
    tree::send(&from_root(path), &mut sink)?;
    Ok(())
}
