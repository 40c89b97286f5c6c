//! The harness: temporary hosts that run the built program as a user would, the runner of the
//! end-to-end suite with its cases, and what the benches share.
//!
//! Nothing in here is part of the product. A case talks to the product only through its command
//! line, its files and its sockets; what a crate can show about itself is a unit test over there.

pub mod bench;
pub mod cases;
pub mod failure;
pub mod fuse;
pub mod guest;
pub mod host;
pub mod http;
pub mod inject;
pub mod linux;
pub mod namespace;
pub mod process;
pub mod qcow2;
pub mod runner;
pub mod terminal;
