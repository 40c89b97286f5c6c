//! The agent in Linux guests, and the protocol that the host speaks with it.
//!
//! | module | room for |
//! | --- | --- |
//! | [`protocol`] | frames, requests, replies: bytes, no system calls |
//! | [`connection`] | frames over a socket |
//! | [`entry`] | the process of an imported image: what it is, and starting it |
//! | [`tree`] | files and directories as frames: sending them, and receiving them without being fooled |
//! | [`sparse`] | where sparse files have data |
//! | [`server`] | the agent itself: sessions, commands, trimming |
//! | `sys` | the calls that need `unsafe` |
#![deny(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod connection;
pub mod entry;
pub mod protocol;
pub mod server;
pub mod sparse;
#[allow(unsafe_code)]
mod sys;
pub mod tree;

pub use sys::{EXIT_CODE_PORT, tell_exit_code};
