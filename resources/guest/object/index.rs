//! The database: descriptors in lists of like ones, each list in one piece of memory, and two levels
//! of centres in front, so that a search touches the centres and a few lists. Everything has a hash
//! that is checked when it is used.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::descriptor::{DIMS, likeness, likeness_wide, widen};
use crate::hash::Hash;
use crate::math::{Random, sqrt};

/// Bytes of a record: a descriptor, then its label, its picture's number, and zeroes.
pub const RECORD: usize = 208;
/// Rounds of making centres.
const ROUNDS: usize = 5;
/// Most centres of a level.
const BRANCH_MAX: usize = 24;
/// Records of the sample from which centres are made, a list.
const SAMPLE: usize = 16;
/// What a centre's length is scaled to.
const CENTRE_LENGTH: f32 = 390.0;
/// Groups looked into for lists.
const GROUPS: usize = 3;

/// A list: where it is, and its hash.
#[derive(Clone, Copy, Default)]
struct List {
    start: u32,
    count: u32,
    hash: u64,
}

/// A record that a search found.
#[derive(Clone, Copy)]
pub struct Found {
    pub likeness: i32,
    pub label: u8,
    pub picture: u16,
}

/// The database.
pub struct Index {
    branch: usize,
    /// Groups' centres, then each group's lists' centres: blocks of `branch` descriptors.
    centres: Vec<u8>,
    centre_hashes: Vec<u64>,
    lists: Vec<List>,
    lists_hash: u64,
    records: Vec<u8>,
}

/// Makes records, one after the other.
pub trait Source {
    /// How many there are.
    fn count(&self) -> usize;
    /// Writes record `number`: descriptor, label, picture.
    fn write(&self, number: usize, out: &mut [u8]);
}

fn hash_of(seed: usize, bytes: &[u8]) -> u64 {
    let mut hash = Hash::new(seed as u64);
    hash.bytes(bytes);
    hash.finish()
}

/// A descriptor as wider numbers.
type Wide = [i16; DIMS];

fn wide(descriptor: &[u8]) -> Wide {
    let mut wide = [0; DIMS];
    for (to, from) in wide.iter_mut().zip(widen(descriptor)) {
        *to = from;
    }
    wide
}

fn nearest(centres: &[Wide], descriptor: &Wide) -> usize {
    let mut best = (i32::MIN, 0);
    for (i, centre) in centres.iter().enumerate() {
        let like = likeness_wide(centre, descriptor);
        if like > best.0 {
            best = (like, i);
        }
    }
    best.1
}

/// Centres of the descriptors: `count` of them, by rounds of assigning and averaging.
fn centres_of(sample: &[Wide], count: usize, random: &mut Random) -> Vec<Wide> {
    if sample.is_empty() {
        return vec![[0; DIMS]; count];
    }
    let mut centres: Vec<Wide> = (0..count)
        .map(|_| sample[(random.bits() % sample.len() as u64) as usize])
        .collect();
    let mut sums = vec![[0i32; DIMS]; count];
    for _ in 0..ROUNDS {
        sums.fill([0; DIMS]);
        for descriptor in sample {
            let sums = &mut sums[nearest(&centres, descriptor)];
            for (sum, number) in sums.iter_mut().zip(descriptor) {
                *sum += i32::from(*number);
            }
        }
        for (centre, sums) in centres.iter_mut().zip(&sums) {
            let square: f32 = sums.iter().map(|&s| s as f32 * s as f32).sum();
            if square > 0.0 {
                let factor = CENTRE_LENGTH / sqrt(square);
                for (number, &sum) in centre.iter_mut().zip(sums) {
                    *number = (sum as f32 * factor).clamp(-127.0, 127.0) as i16;
                }
            }
        }
    }
    centres
}

impl Index {
    /// Makes the database.
    pub fn build(source: &impl Source) -> Result<Index, String> {
        let count = source.count();
        let mut records = Vec::new();
        records
            .try_reserve_exact(count * RECORD)
            .map_err(|_| format!("there is no memory for {} bytes", count * RECORD))?;
        // About as many lists as a list has records, within bounds.
        let branch = (1..BRANCH_MAX)
            .find(|b| b * b * b * b >= count)
            .unwrap_or(BRANCH_MAX);
        let mut index = Index {
            branch,
            centres: Vec::with_capacity((branch + 1) * branch * DIMS),
            centre_hashes: Vec::with_capacity(branch + 1),
            lists: vec![List::default(); branch * branch],
            lists_hash: 0,
            records,
        };
        let centres = index.make_centres(source);
        let lists = index.fill(source, &centres);
        index.order(lists);
        index.seal();
        Ok(index)
    }

    /// Makes the centres, and returns them as wider numbers, block after block.
    fn make_centres(&mut self, source: &impl Source) -> Vec<Wide> {
        let branch = self.branch;
        let count = (branch * branch * SAMPLE).min(source.count());
        let stride = source.count() / count;
        let mut record = [0; RECORD];
        let mut sample = Vec::with_capacity(count);
        for i in 0..count {
            source.write(i * stride, &mut record);
            sample.push(wide(&record[..DIMS]));
        }
        let mut random = Random::new(1);
        let mut centres = centres_of(&sample, branch, &mut random);
        let mut members = vec![Vec::new(); branch];
        for descriptor in sample {
            members[nearest(&centres, &descriptor)].push(descriptor);
        }
        for members in &members {
            centres.extend_from_slice(&centres_of(members, branch, &mut random));
        }
        self.centres
            .extend(centres.iter().flatten().map(|number| *number as u8));
        centres
    }

    fn block(&self, block: usize) -> &[u8] {
        let len = self.branch * DIMS;
        &self.centres[block * len..(block + 1) * len]
    }

    /// Writes all records, in the order of the source; returns the list of each.
    fn fill(&mut self, source: &impl Source, centres: &[Wide]) -> Vec<u16> {
        let mut record = [0; RECORD];
        let mut lists = Vec::with_capacity(source.count());
        for number in 0..source.count() {
            source.write(number, &mut record);
            let descriptor = wide(&record[..DIMS]);
            let block = |number: usize| &centres[number * self.branch..][..self.branch];
            let group = nearest(block(0), &descriptor);
            let list = group * self.branch + nearest(block(1 + group), &descriptor);
            self.lists[list].count += 1;
            lists.push(list as u16);
            self.records.extend_from_slice(&record);
        }
        let mut start = 0;
        for list in &mut self.lists {
            list.start = start;
            start += list.count;
        }
        lists
    }

    /// Moves each record into its list, in place: whoever is where another belongs changes with it.
    fn order(&mut self, mut lists: Vec<u16>) {
        let mut next: Vec<u32> = self.lists.iter().map(|list| list.start).collect();
        for list in 0..self.lists.len() {
            let end = self.lists[list].start + self.lists[list].count;
            while next[list] < end {
                let at = next[list] as usize;
                let home = usize::from(lists[at]);
                let to = next[home] as usize;
                next[home] += 1;
                if to != at {
                    lists.swap(at, to);
                    let (low, high) = self.records.split_at_mut(to.max(at) * RECORD);
                    let low = &mut low[to.min(at) * RECORD..][..RECORD];
                    low.swap_with_slice(&mut high[..RECORD]);
                }
            }
        }
    }

    fn list_bytes(&self, list: List) -> &[u8] {
        &self.records[list.start as usize * RECORD..][..list.count as usize * RECORD]
    }

    fn hash_lists(&self) -> u64 {
        let mut hash = Hash::new(self.branch as u64);
        for list in &self.lists {
            hash.word(u64::from(list.start) << 32 | u64::from(list.count));
            hash.word(list.hash);
        }
        for centres in &self.centre_hashes {
            hash.word(*centres);
        }
        hash.finish()
    }

    fn seal(&mut self) {
        for i in 0..self.lists.len() {
            self.lists[i].hash = hash_of(i, self.list_bytes(self.lists[i]));
        }
        self.centre_hashes = (0..=self.branch)
            .map(|i| hash_of(i, self.block(i)))
            .collect();
        self.lists_hash = self.hash_lists();
    }

    /// Checks the table of lists, which is small. Before anything else is used.
    fn check_table(&self) -> Result<(), String> {
        if self.hash_lists() == self.lists_hash {
            return Ok(());
        }
        Err("the table of lists is damaged".into())
    }

    fn checked_centres(&self, block: usize) -> Result<&[u8], String> {
        let centres = self.block(block);
        if hash_of(block, centres) == self.centre_hashes[block] {
            return Ok(centres);
        }
        Err(format!("the centres of block {block} are damaged"))
    }

    fn checked_list(&self, number: usize) -> Result<&[u8], String> {
        let list = self.lists[number];
        let bytes = self.list_bytes(list);
        if hash_of(number, bytes) == list.hash {
            return Ok(bytes);
        }
        Err(format!(
            "list {number} of {} records is damaged",
            list.count
        ))
    }

    /// The records most like a descriptor, best first, from the `probes` lists that are most like it;
    /// and how many records were looked at.
    pub fn search(
        &self,
        descriptor: &[u8],
        probes: usize,
        best: &mut [Option<Found>],
    ) -> Result<usize, String> {
        self.check_table()?;
        let mut groups: Vec<(i32, usize)> = self
            .checked_centres(0)?
            .chunks_exact(DIMS)
            .enumerate()
            .map(|(group, centre)| (likeness(centre, descriptor), group))
            .collect();
        groups.sort_unstable_by(|a, b| b.cmp(a));
        let mut lists = Vec::new();
        for &(_, group) in groups.iter().take(GROUPS) {
            let centres = self.checked_centres(1 + group)?;
            for (i, centre) in centres.chunks_exact(DIMS).enumerate() {
                let list = group * self.branch + i;
                if self.lists[list].count > 0 {
                    lists.push((likeness(centre, descriptor), list));
                }
            }
        }
        lists.sort_unstable_by(|a, b| b.cmp(a));
        let mut looked = 0;
        for &(_, list) in lists.iter().take(probes) {
            for record in self.checked_list(list)?.chunks_exact(RECORD) {
                looked += 1;
                offer(
                    best,
                    Found {
                        likeness: likeness(&record[..DIMS], descriptor),
                        label: record[DIMS],
                        picture: u16::from_le_bytes([record[DIMS + 1], record[DIMS + 2]]),
                    },
                );
            }
        }
        Ok(looked)
    }

    /// Checks everything; returns a hash over all of it.
    pub fn verify(&self) -> Result<u64, String> {
        self.check_table()?;
        for block in 0..=self.branch {
            self.checked_centres(block)?;
        }
        for list in 0..self.lists.len() {
            self.checked_list(list)?;
        }
        Ok(self.lists_hash)
    }

    /// Records and lists.
    pub fn counts(&self) -> (usize, usize) {
        (self.records.len() / RECORD, self.lists.len())
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> usize {
        self.records.len() + self.centres.len() + self.lists.len() * size_of::<List>()
    }

    /// For tests of the self-check: everything but the tables, to be spoilt.
    #[cfg(test)]
    pub fn records_mut(&mut self) -> &mut [u8] {
        &mut self.records
    }
}

/// Keeps the best, and of each picture only its best.
fn offer(best: &mut [Option<Found>], found: Found) {
    let like = |slot: &Option<Found>| slot.map_or(i32::MIN, |found| found.likeness);
    if best.last().is_none_or(|last| found.likeness <= like(last)) {
        return;
    }
    let same = |slot: &Option<Found>| slot.is_some_and(|other| other.picture == found.picture);
    let from = best.iter().position(same).unwrap_or(best.len() - 1);
    if found.likeness <= like(&best[from]) {
        return;
    }
    let mut at = from;
    while at > 0 && like(&best[at - 1]) < found.likeness {
        best[at] = best[at - 1];
        at -= 1;
    }
    best[at] = Some(found);
}
