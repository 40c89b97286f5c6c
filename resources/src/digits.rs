//! The pictures that the recogniser is made from and tested with (`data/README.md` says whose they
//! are).

const RECORDS: &[u8] = include_bytes!("../data/digits.bin");

/// Pixels of a picture: 8 rows of 8, 0 to 16 each.
pub const PIXELS: usize = 64;
/// Every so many-th picture is held back.
const HELD_BACK_EVERY: usize = 5;

/// A picture and what it shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picture {
    /// The digit, 0 to 9.
    pub label: u8,
    /// The pixels: the attachment of a `recognise` request.
    pub pixels: &'static [u8],
}

fn records() -> impl Iterator<Item = (usize, &'static [u8])> {
    RECORDS.chunks_exact(1 + PIXELS).enumerate()
}

fn held(index: usize) -> bool {
    index % HELD_BACK_EVERY == HELD_BACK_EVERY - 1
}

/// The pictures that the recogniser may see: the data to install it with. A record is a label byte
/// and 64 pixel bytes.
#[must_use]
pub fn training() -> Vec<u8> {
    records()
        .filter(|(i, _)| !held(*i))
        .flat_map(|(_, record)| record)
        .copied()
        .collect()
}

/// The pictures that it has not seen.
pub fn held_back() -> impl Iterator<Item = Picture> {
    records()
        .filter(|(i, _)| held(*i))
        .map(|(_, record)| Picture {
            label: record[0],
            pixels: &record[1..],
        })
}
