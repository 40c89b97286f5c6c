//! One VM in one process.

pub mod boot;
pub mod bus;
pub mod config;
pub mod cpu;
pub mod crash;
pub mod devices;
pub mod exit;
pub mod footprint;
pub mod machine;
pub mod memory;
pub mod seccomp;
pub mod socket_path;
mod sparse;
pub mod threads;
