//! Images made by hand, good ones and others.

use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::*;

/// A cluster of a test's image.
#[derive(Debug, Clone, Copy)]
enum Cluster {
    /// Not there: zeros.
    Nothing,
    Zero,
    Data(u8),
    Compressed(u8),
}

fn put(bytes: &mut Vec<u8>, at: usize, field: &[u8]) {
    bytes.resize(bytes.len().max(at + field.len()), 0);
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// Header, first-level table, one second-level table, contents: a cluster each, or more.
fn image(cluster_bits: u32, clusters: &[Cluster]) -> Vec<u8> {
    let cluster = 1_usize << cluster_bits;
    let size = (clusters.len() * cluster) as u64;
    let mut bytes = vec![0; 3 * cluster];
    put(&mut bytes, 0, &MAGIC);
    put(&mut bytes, 4, &3_u32.to_be_bytes());
    put(&mut bytes, 20, &cluster_bits.to_be_bytes());
    put(&mut bytes, 24, &size.to_be_bytes());
    put(&mut bytes, 36, &1_u32.to_be_bytes());
    put(&mut bytes, 40, &(cluster as u64).to_be_bytes());
    put(&mut bytes, 96, &4_u32.to_be_bytes());
    put(&mut bytes, 100, &104_u32.to_be_bytes());
    put(
        &mut bytes,
        cluster,
        &((1 << 63) | (2 * cluster as u64)).to_be_bytes(),
    );
    for (index, kind) in clusters.iter().enumerate() {
        let next = bytes.len().next_multiple_of(cluster);
        let entry = match kind {
            Cluster::Nothing => 0,
            Cluster::Zero => 1,
            Cluster::Data(byte) => {
                put(&mut bytes, next, &vec![*byte; cluster]);
                (1 << 63) | next as u64
            }
            Cluster::Compressed(byte) => {
                let packed = miniz_oxide::deflate::compress_to_vec(&vec![*byte; cluster], 6);
                put(&mut bytes, next, &packed);
                let more = (packed.len() as u64 - 1) / 512;
                (1 << 62) | (more << (62 - (cluster_bits - 8))) | next as u64
            }
        };
        put(&mut bytes, 2 * cluster + 8 * index, &entry.to_be_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(cluster), 0);
    bytes
}

fn run(bytes: &[u8], room: u64) -> Result<File, Qcow2Error> {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let out = tempfile::tempfile().unwrap();
    let size = copy(file, &out, room, &mut |_, _| Ok(()))?;
    assert_eq!(out.metadata().unwrap().len(), size);
    Ok(out)
}

const KINDS: [Cluster; 6] = [
    Cluster::Data(7),
    Cluster::Nothing,
    Cluster::Compressed(9),
    Cluster::Zero,
    Cluster::Data(0),
    Cluster::Compressed(11),
];

#[test]
fn every_kind_of_cluster_is_read() {
    for cluster_bits in [9, 12, 16, 21] {
        let cluster = 1_usize << cluster_bits;
        let out = run(&image(cluster_bits, &KINDS), u64::MAX).unwrap();
        let mut contents = vec![1; cluster * KINDS.len()];
        out.read_exact_at(&mut contents, 0).unwrap();
        for (index, kind) in KINDS.iter().enumerate() {
            let expected = match kind {
                Cluster::Nothing | Cluster::Zero => 0,
                Cluster::Data(byte) | Cluster::Compressed(byte) => *byte,
            };
            let part = &contents[index * cluster..(index + 1) * cluster];
            assert!(
                part.iter().all(|byte| *byte == expected),
                "cluster {index} of 2^{cluster_bits} bytes"
            );
        }
        if cluster_bits >= 16 {
            // What is zero takes no room.
            let room = out.metadata().unwrap().blocks() * 512;
            assert!(room <= 3 * cluster as u64 + 4096, "{room} bytes");
        }
    }
}

#[test]
fn a_disk_may_end_within_a_cluster_and_the_image_too() {
    let mut bytes = image(16, &KINDS);
    put(&mut bytes, 24, &(5 * 65536 + 512_u64).to_be_bytes());
    run(&bytes, u64::MAX).unwrap();
    // Version 2, of which the header ends before.
    put(&mut bytes, 4, &2_u32.to_be_bytes());
    run(&bytes, u64::MAX).unwrap();
}

/// A part of the last cluster may be missing in a good image; anything more is not there any more.
#[test]
fn what_is_cut_off_is_missed() {
    let cut = |bytes: &[u8]| matches!(run(bytes, u64::MAX), Err(Qcow2Error::Cut));
    for cluster_bits in [9, 12, 16] {
        let cluster = 1_usize << cluster_bits;
        for last in [Cluster::Data(5), Cluster::Compressed(5)] {
            let bytes = image(cluster_bits, &[KINDS[0], KINDS[1], KINDS[2], last]);
            let start = bytes.len() - cluster;
            for len in (HEADER_BYTES..=start)
                .step_by(512.max(cluster / 8))
                .chain([start])
            {
                assert!(
                    cut(&bytes[..len]),
                    "{len} of {} bytes, {last:?}",
                    bytes.len()
                );
            }
        }
        let mut partial = image(cluster_bits, &[Cluster::Data(5)]);
        partial.truncate(3 * cluster + 100);
        let out = run(&partial, u64::MAX).unwrap();
        let mut contents = vec![1; 101];
        out.read_exact_at(&mut contents, 0).unwrap();
        assert_eq!((contents[99], contents[100]), (5, 0));
    }
    // Compressed data of several sectors, of which the last is missing.
    let mut bytes = image(16, &[Cluster::Compressed(5)]);
    let entry = (1_u64 << 62) | (2 << (62 - 8)) | (3 * 65536);
    put(&mut bytes, 2 * 65536, &entry.to_be_bytes());
    assert!(cut(&bytes[..3 * 65536 + 1024]));
    assert!(!cut(&bytes[..3 * 65536 + 1025]));
    // The first-level table, and what lies beyond everything.
    let end = bytes.len() as u64;
    put(&mut bytes, 40, &(end - 7).to_be_bytes());
    assert!(cut(&bytes));
    put(&mut bytes, 40, &u64::MAX.to_be_bytes());
    assert!(cut(&bytes));
}

#[test]
fn references_to_other_files_are_refused() {
    let mut backed = image(16, &KINDS);
    put(&mut backed, 8, &200_u64.to_be_bytes());
    put(&mut backed, 16, &11_u32.to_be_bytes());
    put(&mut backed, 200, b"/etc/shadow");
    assert!(matches!(
        run(&backed, u64::MAX),
        Err(Qcow2Error::BackingFile)
    ));
    let mut outside = image(16, &KINDS);
    put(&mut outside, 72, &DATA_FILE.to_be_bytes());
    put(&mut outside, 104, &0x4441_5441_u32.to_be_bytes());
    put(&mut outside, 108, &11_u32.to_be_bytes());
    put(&mut outside, 112, b"/etc/shadow");
    assert!(matches!(run(&outside, u64::MAX), Err(Qcow2Error::DataFile)));
    // The name alone, without the bit that says that it is used.
    put(&mut outside, 72, &0_u64.to_be_bytes());
    run(&outside, u64::MAX).unwrap();
}

#[test]
fn headers_out_of_range_are_refused() {
    let refused = |at: usize, field: &[u8]| {
        let mut bytes = image(16, &KINDS);
        put(&mut bytes, at, field);
        match run(&bytes, u64::MAX) {
            Err(Qcow2Error::Io(..)) | Ok(_) => panic!("{at}: not refused by our own checks"),
            Err(error) => error.to_string(),
        }
    };
    assert!(refused(0, b"QFI\0").contains("no qcow2"));
    assert!(refused(4, &4_u32.to_be_bytes()).contains("version 4"));
    assert!(refused(72, &1_u64.to_be_bytes()).contains("qemu-img check"));
    assert!(refused(72, &2_u64.to_be_bytes()).contains("qemu-img check"));
    for bit in 3..64 {
        assert!(refused(72, &(1_u64 << bit).to_be_bytes()).contains("qemu-img convert"));
    }
    assert!(refused(32, &2_u32.to_be_bytes()).contains("encrypted"));
    for cluster_bits in [0_u32, 8, 22, 63, 64, u32::MAX] {
        assert!(refused(20, &cluster_bits.to_be_bytes()).contains("cluster size"));
    }
    for size in [0_u64, 511, (4 << 40) + 512, u64::MAX] {
        assert!(refused(24, &size.to_be_bytes()).contains("4 TiB"));
    }
    // More than the table covers; more table than anybody needs.
    assert!(refused(24, &((512_u64 << 20) + 512).to_be_bytes()).contains("table size"));
    for entries in [0, (4 << 20) + 1, u32::MAX] {
        assert!(refused(36, &entries.to_be_bytes()).contains("table size"));
    }
}

#[test]
fn what_does_not_fit_is_not_begun() {
    let bytes = image(16, &KINDS);
    assert!(matches!(
        run(&bytes, 4 * 65536 - 1),
        Err(Qcow2Error::Room {
            needed: 262_144,
            ..
        })
    ));
    run(&bytes, 4 * 65536).unwrap();
    assert!(!is_qcow2(&run(&bytes, u64::MAX).unwrap()).unwrap());
    let file = tempfile::tempfile().unwrap();
    assert!(!is_qcow2(&file).unwrap());
    file.write_all_at(&bytes, 0).unwrap();
    assert!(is_qcow2(&file).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_image_breaks_the_reader(
        cluster_bits in prop::sample::select(vec![9_u32, 10, 16]),
        changes in prop::collection::vec((0_usize..4096, any::<u8>()), 1..8),
        entries in prop::collection::vec((0_usize..12, any::<u64>()), 0..4),
        len in prop::option::of(0_usize..8192),
    ) {
        let mut bytes = image(cluster_bits, &KINDS);
        let cluster = 1 << cluster_bits;
        for (at, byte) in changes {
            // Beyond the fields that our own checks look at, and the tables.
            let at = if at < 1024 { at % 128 } else { cluster + at % (cluster + 64) };
            bytes[at] = byte;
        }
        for (index, entry) in entries {
            put(&mut bytes, cluster + index % 7 * 8 + index / 7 * cluster, &entry.to_be_bytes());
        }
        bytes.truncate(len.unwrap_or(usize::MAX));
        // Whether it can be read is no matter, but it must end, with a word and not with a panic.
        let _ = run(&bytes, 1 << 20);
    }
}
