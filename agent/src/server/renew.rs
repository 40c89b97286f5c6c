//! What a guest does that goes on in another machine than before, as each clone of a snapshot does.
//!
//! Clones begin with the same state of the kernel's random number generator. So every session's first
//! frame brings bytes that the host has drawn for it alone, and they are in the generator before the
//! session's request is looked at, whoever was first to reach the guest. `renew` is what the host asks for
//! before it lets anybody else reach a restored guest.

use std::io::Write;

use super::Error;
use crate::connection::Outgoing;
use crate::protocol::{Entropy, Reply};
use crate::sys;

/// Makes the kernel's random numbers depend on `entropy`, from now on.
pub(super) fn add_entropy(entropy: &Entropy) -> Result<(), Error> {
    sys::reseed(&entropy.0).map_err(|error| Error::System("renew the random numbers", error))
}

/// The guest runs in another machine now. Until `Done` the host holds the network cards: what is to be
/// done before anybody is heard comes before it, and what takes the network comes after it. The random
/// numbers are new already.
pub(super) fn renew(outgoing: &mut Outgoing<impl Write>) -> Result<(), Error> {
    Ok(outgoing.reply(&Reply::Done)?)
}
