//! The container of machine state, and files that appear whole or not at all.
//!
//! This crate knows no device: what is in a section is the business of whoever saved it. It
//! promises three things. A container is read completely or refused ([`Reader::finish`] names the
//! sections that nobody took). A damaged container is refused before a byte of it is handed out.
//! A file or directory written through [`AtomicFile`] or [`AtomicDir`] is at its place complete
//! and on stable storage, or not there.

#![forbid(unsafe_code)]

mod atomic;
mod container;

pub use atomic::{AtomicDir, AtomicError, AtomicFile, place_directory, sweep_leftovers};
pub use container::{
    CONTAINER_BYTES_MAX, ContainerError, FORMAT_VERSION, MAGIC, NAME_BYTES_MAX, Reader,
    SECTIONS_MAX, Writer,
};
