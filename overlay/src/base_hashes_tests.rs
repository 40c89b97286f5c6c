//! Hashes made, written, read, and looked for.

use super::*;
use crate::testing::{Pages, hashes, page};

fn sample() -> (Pages, BaseHashes) {
    let mut pages = Pages::default();
    let mut memory: Vec<_> = (0..600).map(page).collect();
    memory[10] = [0; PAGE_BYTES];
    memory[20] = page(5);
    pages.0.insert(Space::Memory, memory);
    pages.0.insert(Space::Disk(2), vec![page(9000)]);
    let made = hashes(&pages);
    (pages, made)
}

#[test]
fn content_is_found_at_its_first_place() {
    let (_, hashes) = sample();
    assert_eq!(hashes.find(Space::Memory, &page(599)), Some(599));
    assert_eq!(hashes.find(Space::Memory, &page(5)), Some(5));
    assert_eq!(hashes.find(Space::Memory, &page(20)), None);
    assert_eq!(hashes.find(Space::Memory, &[0; PAGE_BYTES]), None);
    assert_eq!(hashes.find(Space::Disk(2), &page(9000)), Some(0));
    assert_eq!(hashes.find(Space::Disk(3), &page(9000)), None);
    let expected: PageHash = array_at(blake3::hash(&page(7)).as_bytes(), 0);
    assert_eq!(hashes.get(PageAt::memory(7)), Some(&expected));
    assert_eq!(hashes.get(PageAt::memory(600)), None);
    let zero: PageHash = array_at(blake3::hash(&[0; PAGE_BYTES]).as_bytes(), 0);
    assert_eq!(hashes.get(PageAt::memory(10)), Some(&zero));
}

#[test]
fn a_file_goes_both_ways_and_damage_is_noticed() {
    let (_, hashes) = sample();
    let mut file = Vec::new();
    hashes.write(&mut file).unwrap();
    assert_eq!(file.len(), 16 + 2 * 16 + 601 * 16 + 32);
    let back = BaseHashes::read(&mut file.as_slice()).unwrap();
    assert_eq!(back.find(Space::Memory, &page(77)), Some(77));
    for at in (0..file.len()).step_by(7).chain(0..64) {
        let mut bad = file.clone();
        bad[at] ^= 1;
        assert!(BaseHashes::read(&mut bad.as_slice()).is_err(), "byte {at}");
    }
    for length in (0..file.len()).step_by(97) {
        assert!(
            BaseHashes::read(&mut &file[..length]).is_err(),
            "cut to {length}"
        );
    }
    file.push(0);
    assert!(matches!(
        BaseHashes::read(&mut file.as_slice()),
        Err(HashesError::Damaged)
    ));
}

#[test]
fn a_head_that_claims_a_lot_takes_no_memory() {
    let (_, hashes) = sample();
    let mut file = Vec::new();
    hashes.write(&mut file).unwrap();
    file[24..32].copy_from_slice(&SPACE_PAGES_MAX.to_le_bytes());
    assert!(matches!(
        BaseHashes::read(&mut file.as_slice()),
        Err(HashesError::Read(_))
    ));
    file[24..32].copy_from_slice(&(SPACE_PAGES_MAX + 1).to_le_bytes());
    assert!(matches!(
        BaseHashes::read(&mut file.as_slice()),
        Err(HashesError::Entry { entry: 0 })
    ));
    file[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        BaseHashes::read(&mut file.as_slice()),
        Err(HashesError::Entry { .. })
    ));
}

#[test]
fn bad_spaces_and_holes_are_errors() {
    let (pages, _) = sample();
    let build = |spaces: &[(Space, u64)]| BaseHashes::build(spaces, &pages, 1).unwrap_err();
    let twice = build(&[(Space::Memory, 1), (Space::Memory, 1)]);
    assert!(matches!(twice, HashesError::Space { .. }));
    let large = build(&[(Space::Memory, SPACE_PAGES_MAX + 1)]);
    assert!(matches!(large, HashesError::Space { .. }));
    let unknown = build(&[(Space::Disk(DISKS_MAX), 1)]);
    assert!(matches!(unknown, HashesError::Space { .. }));
    let hole = build(&[(Space::Memory, 601)]);
    assert!(matches!(hole, HashesError::ReadBase { .. }));
}
