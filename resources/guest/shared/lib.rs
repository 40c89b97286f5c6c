//! What the guest's programs have in common: memory functions, heap, the interface between runtime
//! and applications, and (by path, the same files as the host's) protocol and hash.
#![no_std]

extern crate alloc;

pub mod abi;
pub mod app;
#[path = "../../src/hash.rs"]
pub mod hash;
pub mod heap;
pub mod lanes;
pub mod math;
mod mem;
#[path = "../../src/protocol.rs"]
pub mod protocol;
pub mod words;
