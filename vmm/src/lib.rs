//! One VM in one process.

pub mod bus;
pub mod devices;
pub mod memory;
pub mod seccomp;
