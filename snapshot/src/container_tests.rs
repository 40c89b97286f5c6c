//! Round trips of the container, and every way to damage one.

use proptest::prelude::*;

use super::*;

fn sample() -> Vec<u8> {
    let mut writer = Writer::new();
    writer.section("cpu/0", 3, vec![1, 2, 3]).unwrap();
    writer.section("serial", 1, Vec::new()).unwrap();
    writer.section("virtio-rng", 7, vec![9; 300]).unwrap();
    writer.finish()
}

#[test]
fn sections_come_back_in_any_order() {
    let bytes = sample();
    let mut reader = Reader::parse(&bytes).unwrap();
    assert_eq!(
        reader.names().collect::<Vec<_>>(),
        ["cpu/0", "serial", "virtio-rng"]
    );
    assert_eq!(reader.take("virtio-rng").unwrap(), (7, &[9; 300][..]));
    assert_eq!(
        reader.take_version("cpu/0", 2..=3).unwrap(),
        (3, &[1, 2, 3][..])
    );
    assert_eq!(reader.take_optional("clock"), None);
    assert_eq!(reader.take("serial").unwrap(), (1, &[][..]));
    reader.finish().unwrap();
}

#[test]
fn what_nobody_takes_is_named() {
    let bytes = sample();
    let mut reader = Reader::parse(&bytes).unwrap();
    reader.take("serial").unwrap();
    let error = reader.finish().unwrap_err();
    assert_eq!(
        error.to_string(),
        "sections that nothing here restores: cpu/0, virtio-rng"
    );
}

#[test]
fn a_section_is_taken_once_and_in_a_known_version() {
    let bytes = sample();
    let mut reader = Reader::parse(&bytes).unwrap();
    let error = reader.take_version("cpu/0", 4..=5).unwrap_err();
    assert!(matches!(
        error,
        ContainerError::SectionVersion {
            found: 3,
            oldest: 4,
            ..
        }
    ));
    assert!(matches!(
        reader.take("cpu/0"),
        Err(ContainerError::Missing { .. })
    ));
    assert!(matches!(
        reader.take("nothing"),
        Err(ContainerError::Missing { .. })
    ));
}

#[test]
fn the_writer_refuses_bad_sections() {
    let mut writer = Writer::new();
    writer.section("a", 1, vec![0]).unwrap();
    assert!(matches!(
        writer.section("a", 1, vec![]),
        Err(ContainerError::Duplicate { .. })
    ));
    for name in ["", "A", "a b", &"x".repeat(NAME_BYTES_MAX + 1), "ä"] {
        assert!(matches!(
            writer.section(name, 1, vec![]),
            Err(ContainerError::Name { .. })
        ));
    }
    let huge = vec![0; CONTAINER_BYTES_MAX];
    assert!(matches!(
        writer.section("huge", 1, huge),
        Err(ContainerError::TooLong { .. })
    ));
    for i in 1..SECTIONS_MAX {
        writer.section(&format!("s{i}"), 1, vec![]).unwrap();
    }
    let one_more = writer.section("one-more", 1, vec![]);
    assert!(matches!(
        one_more,
        Err(ContainerError::TooManySections { .. })
    ));
    assert!(Reader::parse(&writer.finish()).is_ok());
}

#[test]
fn every_flipped_bit_is_noticed() {
    let good = sample();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            assert!(Reader::parse(&bad).is_err(), "byte {at} bit {bit}");
        }
    }
}

#[test]
fn every_truncation_and_every_tail_is_noticed() {
    let good = sample();
    for length in 0..good.len() {
        assert!(Reader::parse(&good[..length]).is_err(), "cut to {length}");
    }
    let mut longer = good;
    longer.push(0);
    assert!(matches!(
        Reader::parse(&longer),
        Err(ContainerError::Length { .. })
    ));
}

/// A forger can make the hashes right; layout and limits still hold.
#[test]
fn a_forged_directory_is_checked_field_by_field() {
    let reseal = |edit: &dyn Fn(&mut [u8])| {
        let mut bytes = sample();
        edit(&mut bytes);
        let hash = blake3::hash(&bytes[PREFIX_BYTES..PREFIX_BYTES + 3 * ENTRY_BYTES]);
        bytes[32..64].copy_from_slice(hash.as_bytes());
        Reader::parse(&bytes).map(|_| ()).unwrap_err()
    };
    let entry = |n: usize, at: usize| PREFIX_BYTES + n * ENTRY_BYTES + at;
    assert!(matches!(
        reseal(&|b| b[entry(0, 0)] = b'A'),
        ContainerError::Name { .. }
    ));
    assert!(matches!(
        reseal(&|b| b[entry(0, 0)] = 0),
        ContainerError::Name { .. }
    ));
    assert!(matches!(
        reseal(&|b| b[entry(0, 0)] = 0xff),
        ContainerError::Entry { .. }
    ));
    assert!(matches!(
        reseal(&|b| b[entry(0, 40)] = b'x'),
        ContainerError::Entry { .. }
    ));
    assert!(matches!(
        reseal(&|b| b[entry(0, 53)] = 1),
        ContainerError::Entry { .. }
    ));
    assert!(matches!(
        reseal(&|b| b[entry(1, 56)] ^= 1),
        ContainerError::Entry { .. }
    ));
    assert!(matches!(
        reseal(&|b| b[entry(2, 71)] = 0xff),
        ContainerError::Entry { .. }
    ));
    assert!(matches!(
        reseal(&|b| b[entry(2, 64)] -= 1),
        ContainerError::SectionHash { .. }
    ));
    let twice = reseal(&|b| {
        let name: Vec<u8> = b[entry(0, 0)..entry(0, NAME_BYTES_MAX)].to_vec();
        b[entry(1, 0)..entry(1, NAME_BYTES_MAX)].copy_from_slice(&name);
    });
    assert!(matches!(twice, ContainerError::Duplicate { .. }));
}

#[test]
fn counts_and_lengths_out_of_range_are_refused_before_use() {
    let edit = |at: usize, value: &[u8]| {
        let mut bytes = sample();
        bytes[at..at + value.len()].copy_from_slice(value);
        Reader::parse(&bytes).map(|_| ()).unwrap_err()
    };
    assert!(matches!(edit(8, &[2]), ContainerError::Format { found: 2 }));
    assert!(matches!(
        edit(12, &[0xff; 4]),
        ContainerError::TooManySections { .. }
    ));
    assert!(matches!(
        edit(12, &[0xff, 0, 0, 0]),
        ContainerError::Length { .. }
    ));
    assert!(matches!(
        edit(16, &[0xff; 8]),
        ContainerError::Length { .. }
    ));
    assert!(matches!(edit(24, &[1]), ContainerError::DirectoryHash));
}

proptest! {
    #[test]
    fn whatever_is_written_is_read(
        sections in prop::collection::btree_map(
            "[a-z0-9._/-]{1,48}",
            (any::<u32>(), prop::collection::vec(any::<u8>(), 0..200)),
            0..20,
        )
    ) {
        let mut writer = Writer::new();
        for (name, (version, content)) in &sections {
            writer.section(name, *version, content.clone()).unwrap();
        }
        let bytes = writer.finish();
        let mut reader = Reader::parse(&bytes).unwrap();
        for (name, (version, content)) in &sections {
            prop_assert_eq!(reader.take(name).unwrap(), (*version, content.as_slice()));
        }
        reader.finish().unwrap();
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(noise);
        prop_assert!(Reader::parse(&bytes).is_err());
    }
}
