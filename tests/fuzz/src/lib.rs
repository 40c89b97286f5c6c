//! What the fuzz targets share: inputs that get past the hashes, which a fuzzer cannot guess.
//!
//! A target sees raw bytes half of the time, and the other half bytes in a layout whose hashes
//! and lengths have been made right, so that the checks behind them are reached.

#![forbid(unsafe_code)]

use cloudlet_overlay::format::{FORMAT_VERSION, MAGIC, PREFIX_BYTES};

/// Takes bytes off the front of an input; zeros where it has ended.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let take = N.min(self.0.len());
        let (now, rest) = self.0.split_at(take);
        out[..take].copy_from_slice(now);
        self.0 = rest;
        out
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }
}

/// An index and what the prefix says of it.
#[derive(Default)]
pub struct Forged {
    /// Entries of 24 bytes.
    pub spaces: Vec<[u8; 24]>,
    /// Entries of 40 bytes.
    pub segments: Vec<[u8; 40]>,
    /// How many of them are early ones.
    pub early_segments: u8,
    /// Number of literal runs.
    pub literal_runs: u8,
    /// Number of derived runs.
    pub derived_runs: u8,
    /// The run table as stored.
    pub run_table: Vec<u8>,
    /// 0 for a raw run table, 1 for zstd.
    pub run_table_codec: u8,
    /// The meta.
    pub meta: Vec<u8>,
}

impl Forged {
    /// Prefix and index with right lengths and hashes.
    pub fn head(&self) -> Vec<u8> {
        let index = [
            self.spaces.as_flattened(),
            self.segments.as_flattened(),
            &self.run_table,
            &self.meta,
        ]
        .concat();
        let stored: u64 = self
            .segments
            .iter()
            .map(|entry| u64::from(u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]])))
            .sum();
        let total = (PREFIX_BYTES + index.len() + 48) as u64 + stored;
        let mut head = vec![0; PREFIX_BYTES];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        put(0, &MAGIC);
        put(8, &FORMAT_VERSION.to_le_bytes());
        put(12, &count(self.spaces.len()));
        put(48, blake3::hash(&index).as_bytes());
        put(80, blake3::hash(b"").as_bytes());
        put(112, &total.to_le_bytes());
        put(120, &count(self.meta.len()));
        put(124, &count(self.segments.len()));
        put(128, &count(usize::from(self.early_segments)));
        put(132, &count(usize::from(self.literal_runs)));
        put(136, &count(usize::from(self.derived_runs)));
        put(140, &count(self.run_table.len()));
        put(152, &[self.run_table_codec]);
        head.extend_from_slice(&index);
        head
    }
}
