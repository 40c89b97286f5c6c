//! What the guest says of its memory (section 5.5.6.3): entries of a 16-bit tag and a 64-bit value,
//! in any order, each optional. Tags that are not known are skipped, and of two the last one counts.

/// Bytes of an entry.
const ENTRY_BYTES: usize = 10;
/// Bytes that are read of one buffer: several times what a driver has to say.
pub(super) const BUFFER_BYTES_MAX: usize = 64 * ENTRY_BYTES;
/// Names by tag, section 5.5.6.4.
const NAMES: [&str; 10] = [
    "swapped_in_bytes",
    "swapped_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "cache_bytes",
    "huge_page_allocations",
    "huge_page_failures",
];

/// The guest's statistics: its word, not checked against anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    values: [Option<u64>; NAMES.len()],
}

impl Statistics {
    /// Reads a buffer; what is no whole entry at its end is ignored.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        for entry in bytes.as_chunks::<ENTRY_BYTES>().0 {
            let [t0, t1, value @ ..] = *entry;
            let tag = usize::from(u16::from_le_bytes([t0, t1]));
            if let Some(slot) = statistics.values.get_mut(tag) {
                *slot = Some(u64::from_le_bytes(value));
            }
        }
        statistics
    }

    /// What the guest supplied, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        NAMES
            .iter()
            .zip(&self.values)
            .filter_map(|(name, value)| Some((*name, (*value)?)))
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, wanted: &str) -> Option<u64> {
        self.iter()
            .find_map(|(name, value)| (name == wanted).then_some(value))
    }
}
