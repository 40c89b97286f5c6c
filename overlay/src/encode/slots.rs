//! Contents that have a slot already, so that the same contents at another place become a further
//! place of that slot. The table has a fixed size, whatever the VM's: what it has forgotten is
//! stored once more.

use crate::bytes::{to_usize, u32_at};
use crate::digest::Digest;

/// Most entries: 38 MiB, for the last 4 GiB of contents.
const ENTRIES_MAX: usize = 1 << 20;
const ENTRIES_MIN: usize = 1 << 10;
/// Entries that the same bits of a hash lead to.
const WAYS: usize = 4;
/// Places that one slot gets before its contents are stored anew. Whoever waits for one of them
/// waits for all that its segment brings, so the bound is small.
pub(super) const PLACES_MAX: u32 = 64;

#[derive(Clone, Copy)]
struct Entry {
    /// All of the BLAKE3: equal hashes are equal contents.
    hash: Digest,
    slot: u32,
    /// How many places it has; 0 for an entry that is not in use.
    places: u32,
}

/// The table.
pub(super) struct SlotTable {
    entries: Vec<Entry>,
}

impl SlotTable {
    /// For about as many different contents as `pages`.
    pub(super) fn new(pages: u64) -> Self {
        let wanted = usize::try_from(pages).unwrap_or(ENTRIES_MAX);
        let count = wanted
            .clamp(ENTRIES_MIN, ENTRIES_MAX)
            .next_power_of_two()
            .min(ENTRIES_MAX);
        let free = Entry {
            hash: Digest([0; 32]),
            slot: 0,
            places: 0,
        };
        Self {
            entries: vec![free; count],
        }
    }

    fn bucket(&mut self, hash: &Digest) -> &mut [Entry] {
        let buckets = self.entries.len() / WAYS;
        let start = to_usize(u32_at(&hash.0, 0)) % buckets * WAYS;
        &mut self.entries[start..start + WAYS]
    }

    /// The slot with these contents, which gets one more place by that; none if it is not known or
    /// has places enough.
    pub(super) fn find(&mut self, hash: &Digest) -> Option<u32> {
        let found = self
            .bucket(hash)
            .iter_mut()
            .find(|entry| entry.places > 0 && entry.hash == *hash)?;
        if found.places >= PLACES_MAX {
            return None;
        }
        found.places += 1;
        Some(found.slot)
    }

    /// Contents of `hash` are in `slot`. The oldest in their bucket are forgotten for them.
    pub(super) fn set(&mut self, hash: &Digest, slot: u32) {
        let bucket = self.bucket(hash);
        let same = bucket
            .iter()
            .position(|entry| entry.places > 0 && entry.hash == *hash);
        let at = same.unwrap_or_else(|| {
            let age = |(at, entry): &(usize, &Entry)| (entry.places > 0, entry.slot, *at);
            bucket.iter().enumerate().min_by_key(age).map_or(0, |x| x.0)
        });
        bucket[at] = Entry {
            hash: *hash,
            slot,
            places: 1,
        };
    }

    /// The slot with the contents of `hash` is `slot` after all.
    pub(super) fn move_to(&mut self, hash: &Digest, from: u32, slot: u32) {
        let bucket = self.bucket(hash).iter_mut();
        for entry in bucket.filter(|entry| entry.places > 0 && entry.slot == from) {
            if entry.hash == *hash {
                entry.slot = slot;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_found_until_their_slot_has_places_enough() {
        let mut table = SlotTable::new(0);
        let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
        assert_eq!(table.find(&one), None);
        table.set(&one, 7);
        for _ in 1..PLACES_MAX {
            assert_eq!(table.find(&one), Some(7));
        }
        assert_eq!(table.find(&one), None);
        table.set(&one, 9);
        assert_eq!(table.find(&one), Some(9));
        assert_eq!(table.find(&other), None);
        table.move_to(&one, 9, 4);
        assert_eq!(table.find(&one), Some(4));
    }

    #[test]
    fn the_table_keeps_its_size_and_forgets_the_oldest() {
        let mut table = SlotTable::new(u64::MAX);
        assert_eq!(table.entries.len(), ENTRIES_MAX);
        let mut small = SlotTable::new(5);
        let hashes: Vec<Digest> = (0..100_000u32)
            .map(|n| Digest::of(&n.to_le_bytes()))
            .collect();
        for (slot, hash) in (0..).zip(&hashes) {
            small.set(hash, slot);
        }
        assert_eq!(small.entries.len(), ENTRIES_MIN);
        let known = |hashes: &[Digest], small: &mut SlotTable| {
            hashes
                .iter()
                .filter(|hash| small.find(hash).is_some())
                .count()
        };
        assert_eq!(known(&hashes[..50_000], &mut small), 0);
        assert_eq!(known(&hashes[99_900..], &mut small), 100);
        assert!(
            small
                .find(&hashes[99_999])
                .is_some_and(|slot| slot == 99_999)
        );
        assert_eq!(table.find(&hashes[0]), None);
    }
}
