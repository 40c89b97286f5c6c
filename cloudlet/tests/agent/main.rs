//! The agent as it is embedded, driven over a Unix socket by the program's own side of the protocol.

mod copy;
mod exec;
mod hostile;
mod util;
