//! File systems that are large in some way, and what no ext4 can have.

use super::super::spool::Spool;
use super::super::tree::Kind;
use super::layout::{Layout, MIB};
use super::tests::{LEN, Made, PLAIN, ask, installed, listed};
use super::*;

#[test]
fn large_directories_have_a_tree() {
    if !installed() {
        return;
    }
    // Short names, names of full length, and a tree of two levels of nodes.
    for (count, len) in [(40_000, 12), (300, 255), (9_000, 255)] {
        let mut made = Made::new();
        for number in 0..count {
            let mut name = format!("d/{number:0len$}").into_bytes();
            // Hashes differ for bytes above 127 between signed and unsigned characters.
            name[4] = 0x80 | (number % 127) as u8;
            made.put(&name, PLAIN, Kind::Fifo);
        }
        let image = made.checked(1 << 30);
        assert_eq!(listed(&image, "/d").len(), count, "{len}");
        let tree = ask(&image, "htree_dump /d");
        let levels = usize::from(count == 9_000);
        assert!(
            tree.contains(&format!("Indirect levels: {levels}")),
            "{}",
            &tree[..300]
        );
    }
}

#[test]
fn many_directories_in_one_are_counted_as_one() {
    if !installed() {
        return;
    }
    for (count, links) in [(64_998, 65_000), (64_999, 1)] {
        let mut made = Made::new();
        for number in 0..count {
            let name = format!("d/{number}");
            made.tree
                .put_directory(name.as_bytes(), PLAIN, &mut made.spool)
                .unwrap();
        }
        let image = made.checked(1 << 30);
        assert!(ask(&image, "stat /d").contains(&format!("Links: {links}")));
    }
}

#[test]
fn what_does_not_fit_says_what_is_needed() {
    let mut made = Made::new();
    made.file(b"f", PLAIN, &vec![1; 60 << 20]);
    for number in 0..20_000 {
        made.put(format!("d/{number}").as_bytes(), PLAIN, Kind::Fifo);
    }
    let Err(Error::TooSmall { needed_mib }) = made.write(LEN) else {
        panic!("it does not fit");
    };
    assert!((65..100).contains(&needed_mib), "{needed_mib}");
    assert_eq!(made.plan().smallest(), needed_mib * MIB);
    let less = made.write((needed_mib - 1) * MIB);
    assert!(matches!(less, Err(Error::TooSmall { .. })), "{less:?}");
    if installed() {
        made.checked(needed_mib * MIB);
    }
}

#[test]
fn what_no_ext4_can_have_is_refused() {
    let mut made = Made::new();
    made.put(b"f", PLAIN, Kind::Fifo);
    for number in 0..65_000 {
        let name = format!("d/{number}");
        made.tree
            .link(name.as_bytes(), b"f", &mut made.spool)
            .unwrap();
    }
    let contents = made.dir.path().join("contents");
    assert!(matches!(
        plan(&made.tree, &contents),
        Err(Error::Names(65_001))
    ));
    let mut made = Made::new();
    made.put(b"d", PLAIN, Kind::Block(4096, 0));
    assert!(matches!(
        plan(&made.tree, &contents),
        Err(Error::Device { .. })
    ));
}

/// The image's own size, bitmaps and tables of all sizes that `--size` takes.
#[test]
fn empty_file_systems_of_all_sizes_are_sound() {
    if !installed() {
        return;
    }
    // Of one group, with a last group that is too small, with copies in a last group, with two blocks
    // of descriptors, the largest.
    for mib in [
        64,
        127,
        128,
        129,
        133,
        384,
        400,
        3 * 1024,
        17 * 1024 + 7,
        1 << 20,
    ] {
        Made::new().checked(mib << 20);
    }
}

#[test]
fn copies_of_the_superblock_lie_where_readers_look() {
    let with: Vec<u64> = (0..130).filter(|&group| Layout::has_super(group)).collect();
    assert_eq!(with, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
}

/// Files larger than a group, and one that takes more extents than an inode holds.
#[test]
fn files_go_over_groups() {
    if !installed() {
        return;
    }
    let mut made = Made::new();
    let source = || (0_u64..).flat_map(u64::to_le_bytes);
    struct Numbers<I>(I);
    impl<I: Iterator<Item = u8>> io::Read for Numbers<I> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            Ok(buffer
                .iter_mut()
                .zip(&mut self.0)
                .map(|(to, byte)| *to = byte)
                .count())
        }
    }
    let len = 300 << 20;
    let blob = made.spool.store(&mut Numbers(source()), len).unwrap();
    made.put(b"big", PLAIN, Kind::File(blob));
    made.file(b"small", PLAIN, b"small");
    let needed = made.plan().smallest();
    let image = made.checked(needed);
    let out = made.dir.path().join("out");
    ask(&image, &format!("dump /big {}", out.display()));
    let same = std::fs::read(&out).unwrap() == std::fs::read(made.spool.path(blob)).unwrap();
    assert!(same);
    assert_eq!(ask(&image, "cat /small"), "small");
}
