//! The library behind the program: what a cloudlet host is made of, from directories to VMs.
//!
//! | module | what |
//! | --- | --- |
//! | [`paths`], [`registry`], [`store`] | where things live: directories, VMs by name, base VMs |
//! | [`image`], [`sparse`], [`pages`] | a VM's state as files, and its pages as the delta engine reads them |
//! | [`sockets`] | Unix sockets at paths of any length |
//! | [`files`] | the gate for files that a user names |
//! | [`hold`] | directories of base VMs and snapshots that VMs run on |
//! | [`boot_image`] | a kernel, an initial RAM disk and a root that belong together |
//! | [`import`] | such an image made of a directory, an archive or an OCI image |
//! | [`launch`], [`process`], [`control`] | starting a VMM process, being one, talking to one |
//! | [`fetch`], [`synthesis`] | bytes of an overlay, and the VM they become |
//! | [`agent`] | talking to the agent of a Linux guest |
//! | [`guest`], [`picture`] | talking to the embedded guest |
//! | [`serve`] | a directory of overlays over HTTP |
//! | [`plain`] | words of others for a terminal |
#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod agent;
pub mod boot_image;
pub mod control;
pub mod fetch;
pub mod files;
pub mod guest;
pub mod hold;
pub mod image;
pub mod import;
pub mod launch;
pub mod pages;
pub mod paths;
pub mod picture;
pub mod plain;
pub mod process;
pub mod registry;
pub mod report;
pub mod serve;
pub mod sockets;
pub mod sparse;
pub mod store;
pub mod synthesis;
pub mod vsock;
