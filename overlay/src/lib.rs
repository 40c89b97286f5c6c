//! Bases and deltas of VM state as pure bytes: the overlay format, diff, dedup, encode, decode.
//!
//! A VM state is a base plus a delta. This crate knows what a delta is and nothing about where
//! its pages come from or go to: no KVM, no sockets, no unsafe code. Memory and disks are alike
//! to it, as spaces of 4 KiB pages ([`Space`], [`PageAt`]).
//!
//! Reading order: [`page`] (the words), [`format`](mod@format) (the layout of an overlay file,
//! and how a bad one is refused), [`decode`] (from stored segments to pages), [`mod@encode`] (from a
//! changed VM to a file), [`base_hashes`] and [`manifest`] (what is kept beside a base),
//! [`mod@verify`] (a whole file checked).
//!
//! Everything that is parsed here is hostile until proved otherwise: lengths are checked against
//! limits before memory is taken for them, every reference is checked before anybody follows it,
//! and no input makes this code panic.

#![forbid(unsafe_code)]

pub mod base_hashes;
mod bytes;
mod codec;
pub mod decode;
pub mod digest;
pub mod encode;
pub mod format;
pub mod manifest;
pub mod page;
mod parallel;
mod stages;
#[cfg(test)]
mod testing;
pub mod verify;

pub use base_hashes::BaseHashes;
pub use codec::{LEVEL_DEFAULT, LEVEL_STORED, LEVELS};
pub use decode::{DecodedSegment, SegmentDecoder, decode_state};
pub use digest::{BaseId, Digest, OverlayId};
pub use encode::{
    BaseContent, ChangedPages, DeltaSpec, EncodeError, Options, Progress, Summary, encode,
};
pub use format::{
    Codec, FormatError, Index, PREFIX_BYTES, PageContent, Place, Placement, Prefix, Run, RunSource,
    Segment, SegmentId, TRAILER_BYTES, check_trailer,
};
pub use manifest::{Manifest, SpaceFile, StoredFile};
pub use page::{PAGE_BYTES, PageAt, PageReader, PageSpan, Space, SpaceSize};
pub use verify::{VerifyError, VerifyReport, read_head, verify};
