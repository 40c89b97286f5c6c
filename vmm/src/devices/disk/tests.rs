//! Layers that were cut, forged or caught by a crash, and blocks that arrive late.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;

const SIZE: u64 = 40 * 4096 + 512;

fn base(dir: &Path, bytes: u64) -> File {
    let path = dir.join("base");
    let contents: Vec<u8> = (0..bytes).map(|at| pattern(at / BLOCK_U64)).collect();
    fs::write(&path, contents).unwrap();
    File::open(path).unwrap()
}

/// What the base has in each byte of block `block`.
fn pattern(block: u64) -> u8 {
    u8::try_from(block % 200).unwrap() + 1
}

fn block(disk: &Disk, number: u64) -> u8 {
    let mut contents = [0; BLOCK];
    disk.read_blocks(BlockNumber(number), &mut contents)
        .unwrap();
    let first = contents[0];
    assert!(contents.iter().take(512).all(|byte| *byte == first));
    first
}

/// Writes whole blocks as the pending ones are written, which needs no guest memory.
fn put(disk: &Disk, number: u64, contents: Option<u8>) {
    disk.set_pending(PendingBlocks::new(
        disk.blocks(),
        [(number, 1)],
        Box::new(|_| {}),
    ));
    let filled = contents.map(|byte| [byte; BLOCK]);
    assert!(
        disk.apply_block(BlockNumber(number), filled.as_ref())
            .unwrap()
    );
}

#[test]
fn an_image_of_a_disk_is_what_the_guest_sees() {
    let dir = tempfile::tempdir().unwrap();
    let layer = Layer::temporary(tempfile::tempfile().unwrap(), SIZE).unwrap();
    let disk = Disk::new(Some(base(dir.path(), 10 * 4096 + 512)), layer).unwrap();
    put(&disk, 0, Some(250));
    put(&disk, 2, None);
    put(&disk, 40, Some(251));
    let image = tempfile::tempfile().unwrap();
    let mut told = Vec::new();
    disk.write_image(&image, &mut |at| told.push(at)).unwrap();
    assert_eq!(image.metadata().unwrap().len(), SIZE);
    assert!(told.is_sorted() && told.last() == Some(&SIZE));
    let flat = Disk::read_only(image).unwrap();
    for number in 0..disk.blocks() {
        assert_eq!(block(&flat, number), block(&disk, number), "block {number}");
    }
    assert_eq!(block(&flat, 0), 250);
    assert_eq!(block(&flat, 2), 0);
    assert_eq!(block(&flat, 40), 251);
}

#[test]
fn a_layer_opens_as_it_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    let layer = Layer::create(&path, SIZE, BaseMark::default()).unwrap();
    assert!(matches!(Layer::open(&path), Err(LayerError::InUse)));
    assert!(matches!(
        Layer::create(&path, SIZE, BaseMark::default()),
        Err(LayerError::Create(_))
    ));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "leftovers");
    let disk = Disk::new(Some(base(dir.path(), 10 * 4096 + 512)), layer).unwrap();
    assert_eq!((disk.bytes(), disk.blocks()), (SIZE, 41));
    assert_eq!(
        [0, 9, 10, 11, 40, 99].map(|at| block(&disk, at)),
        [1, 10, 11, 0, 0, 0]
    );
    put(&disk, 3, Some(77));
    put(&disk, 40, Some(88));
    put(&disk, 9, None);
    disk.flush().unwrap();
    let changes = disk.changed_runs();
    let copy_path = dir.path().join("copy");
    disk.copy_layer(&File::create_new(&copy_path).unwrap())
        .unwrap();
    drop(disk);
    for path in [path, copy_path] {
        let layer = Layer::open(&path).unwrap();
        let disk = Disk::new(Some(base(dir.path(), 10 * 4096 + 512)), layer).unwrap();
        assert_eq!(disk.changed_runs(), changes);
        assert_eq!([3, 40, 9, 8].map(|at| block(&disk, at)), [77, 88, 0, 9]);
        assert_eq!(
            changes
                .iter()
                .map(|run| (run.first, run.count, run.kind))
                .collect::<Vec<_>>(),
            [
                (3, 1, BlockKind::Present),
                (9, 1, BlockKind::Zero),
                (40, 1, BlockKind::Present)
            ]
        );
        // Over every kind and the disk's end, in one piece as block by block.
        let count = disk.blocks() + 3;
        let mut all = vec![1; usize::try_from(count).unwrap() * BLOCK];
        disk.read_blocks(BlockNumber(0), &mut all).unwrap();
        for (number, piece) in (0..count).zip(all.as_chunks().0) {
            let mut one = [1; BLOCK];
            disk.read_blocks(BlockNumber(number), &mut one).unwrap();
            assert_eq!(piece, &one, "block {number}");
            assert_eq!(
                one[0],
                if number < disk.blocks() {
                    block(&disk, number)
                } else {
                    0
                }
            );
        }
        let mut inside = vec![0; 4 * BLOCK];
        disk.read_blocks(BlockNumber(38), &mut inside).unwrap();
        assert_eq!(inside, &all[38 * BLOCK..42 * BLOCK]);
    }
}

#[test]
fn sizes_no_disk_has_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for size in [0, 511, 513, LAYER_BYTES_MAX + 512, u64::MAX, u64::MAX - 511] {
        let path = dir.path().join("layer");
        assert!(
            matches!(
                Layer::create(&path, size, BaseMark::default()),
                Err(LayerError::Size(_))
            ),
            "{size}"
        );
        assert!(!path.exists());
    }
    let large = Layer::temporary(tempfile::tempfile().unwrap(), 512).unwrap();
    let file = base(dir.path(), 1024);
    assert!(matches!(
        Disk::new(Some(file), large),
        Err(DiskError::BaseTooLarge { .. })
    ));
    assert!(matches!(
        Disk::read_only(base(dir.path(), 1000)),
        Err(DiskError::Size(1000))
    ));
    assert!(matches!(
        Disk::read_only(base(dir.path(), 0)),
        Err(DiskError::Size(0))
    ));
}

#[test]
fn every_bit_of_the_header_counts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    drop(Layer::create(&path, SIZE, BaseMark::default()).unwrap());
    let good = fs::read(&path).unwrap();
    for bit in 0..80 * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bad).unwrap();
        assert!(Layer::open(&path).is_err(), "bit {bit}");
    }
    for len in [0, 7, 79, 80, 4096, 8191, good.len() - 1] {
        fs::write(&path, &good[..len]).unwrap();
        assert!(Layer::open(&path).is_err(), "cut to {len}");
    }
    fs::write(&path, [&good[..], &[0]].concat()).unwrap();
    assert!(matches!(Layer::open(&path), Err(LayerError::Length { .. })));
    // Entries of the map: the kind that does not exist, and blocks that do not.
    for (at, byte) in [(4096, 0b11), (4096 + 10, 0b0000_0100), (8191, 1)] {
        let mut bad = good.clone();
        bad[at] = byte;
        fs::write(&path, &bad).unwrap();
        assert!(
            matches!(Layer::open(&path), Err(LayerError::Map(_))),
            "{at}"
        );
    }
    fs::write(&path, good).unwrap();
    Layer::open(&path).unwrap();
}

#[test]
fn a_layer_is_its_own_bases_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    let mark = BaseMark([7; 32]);
    drop(Layer::create(&path, SIZE, mark).unwrap());
    let layer = Layer::open(&path).unwrap();
    layer.check_base(SIZE, mark).unwrap();
    let mut other = mark;
    other.0[31] = 8;
    assert!(matches!(
        layer.check_base(SIZE, other),
        Err(LayerError::OtherBase)
    ));
    assert!(matches!(
        layer.check_base(SIZE + 512, mark),
        Err(LayerError::OtherSize { .. })
    ));
}

/// The kernel tells of a lost write once; whoever syncs again is told that all is well.
#[test]
fn after_a_failed_sync_no_flush_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    let layer = Layer::create(&path, SIZE, BaseMark::default()).unwrap();
    let disk_file = layer.file.try_clone().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let put = |from: &dyn AsRawFd| {
        // SAFETY: both descriptors are open and owned by this test, which goes on owning them.
        assert!(unsafe { libc::dup2(from.as_raw_fd(), layer.file.as_raw_fd()) } >= 0);
    };
    layer.flush().unwrap();
    // A socket cannot be synced.
    put(&socket);
    layer.flush().unwrap_err();
    put(&disk_file);
    layer.flush().unwrap_err();
}

#[test]
fn pending_blocks_arrive_once_and_wake_who_waits() {
    let dir = tempfile::tempdir().unwrap();
    let layer = Layer::temporary(tempfile::tempfile().unwrap(), SIZE).unwrap();
    let disk = Disk::new(Some(base(dir.path(), SIZE)), layer).unwrap();
    let demanded = Arc::new(Mutex::new(Vec::new()));
    let heard = demanded.clone();
    let demand = Box::new(move |block: BlockNumber| heard.lock().unwrap().push(block.0));
    disk.set_pending(PendingBlocks::new(
        disk.blocks(),
        [(5, 10), (39, 100)],
        demand,
    ));
    assert_eq!(disk.pending_blocks(), 12);

    let ready =
        |at: u64, len, overwrites| disk.is_ready(at * BLOCK_U64 + 512, len, overwrites, true);
    assert!(ready(0, 4 * 4096, false));
    assert!(!ready(3, 2 * 4096, false));
    assert_eq!(std::mem::take(&mut *demanded.lock().unwrap()), [5]);
    assert!(!ready(12, 8192, false));
    assert_eq!(std::mem::take(&mut *demanded.lock().unwrap()), [12, 13, 14]);
    let waiting = |disk: &Disk| {
        let count = disk.clone();
        count.take_arrived();
        let mut poll = libc::pollfd {
            fd: disk.arrived_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd that lives across the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
    };
    assert!(waiting(&disk));
    // Not what it waits for, then half of it, then all.
    assert!(
        disk.apply_block(BlockNumber(5), Some(&[200; BLOCK]))
            .unwrap()
    );
    assert!(
        !disk
            .apply_block(BlockNumber(5), Some(&[201; BLOCK]))
            .unwrap()
    );
    assert_eq!(
        disk.apply_run(BlockNumber(11), &[202; 3 * BLOCK]).unwrap(),
        3
    );
    let mut poll = libc::pollfd {
        fd: disk.arrived_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd that lives across the call.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 0) }, 0);
    assert_eq!(disk.apply_zero_run(BlockNumber(14), 100).unwrap(), 3);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 0) }, 1);
    assert!(ready(12, 8192, false));
    assert_eq!(
        [5, 11, 13, 14, 39, 40].map(|at| block(&disk, at)),
        [200, 202, 202, 0, 0, 0]
    );
    assert_eq!(disk.pending_blocks(), 5);

    // A block that is overwritten or discarded whole is not waited for, and not overwritten.
    assert!(disk.is_ready(6 * BLOCK_U64, 2 * BLOCK_U64, true, true));
    assert!(!disk.is_ready(6 * BLOCK_U64, 2 * BLOCK_U64 + 512, true, true));
    disk.write_zeroes(6 * BLOCK_U64, 2 * BLOCK_U64).unwrap();
    disk.discard(8 * BLOCK_U64, BLOCK_U64).unwrap();
    assert_eq!(disk.apply_run(BlockNumber(4), &[9; 6 * BLOCK]).unwrap(), 1);
    assert_eq!(
        [4, 5, 6, 7, 8, 9].map(|at| block(&disk, at)),
        [5, 200, 0, 0, 0, 9]
    );
    assert!(disk.apply_run(BlockNumber(10), &[9; 100]).is_err());
}

#[derive(Debug, Clone)]
enum Step {
    Put(u64, Option<u8>),
    Discard(u64, u64),
    Flush,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0_u64..40, prop::option::of(1_u8..)).prop_map(|(at, byte)| Step::Put(at, byte)),
        1 => (0_u64..40, 1_u64..8).prop_map(|(at, count)| Step::Discard(at, count)),
        1 => Just(Step::Flush),
        2 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// A crash leaves the file with any of its writes since the last sync missing. What the
    /// operating system had not been told to sync is taken as lost in the map, or as there: in
    /// either case the layer opens, and each block is as of the last flush or as it was later.
    #[test]
    fn a_crash_loses_nothing_that_was_flushed(steps in steps(), keep_map in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        let disk =
            Disk::new(Some(base(dir.path(), SIZE)), Layer::create(&path, SIZE, BaseMark::default()).unwrap()).unwrap();
        // For each block, what it may be: its value of the last flush, and all since.
        let mut may: Vec<Vec<u8>> = (0..40).map(|at| vec![pattern(at)]).collect();
        let mut flushed_map = fs::read(&path).unwrap()[4096..8192].to_vec();
        for step in steps {
            match step {
                Step::Put(at, byte) => {
                    put(&disk, at, byte);
                    may[usize::try_from(at).unwrap()].push(byte.unwrap_or(0));
                }
                Step::Discard(at, count) => {
                    let count = count.min(40 - at);
                    disk.discard(at * BLOCK_U64, count * BLOCK_U64).unwrap();
                    let range = usize::try_from(at).unwrap()..usize::try_from(at + count).unwrap();
                    may[range].iter_mut().for_each(|values| values.push(0));
                }
                Step::Flush => {
                    disk.flush().unwrap();
                    may.iter_mut().for_each(|values| *values = vec![*values.last().unwrap()]);
                    flushed_map = fs::read(&path).unwrap()[4096..8192].to_vec();
                }
                Step::Crash => {
                    let copy = dir.path().join("crashed");
                    fs::copy(&path, &copy).unwrap();
                    if !keep_map {
                        let file = OpenOptions::new().write(true).open(&copy).unwrap();
                        file.write_all_at(&flushed_map, 4096).unwrap();
                    }
                    let layer = Layer::open(&copy).unwrap();
                    let after = Disk::new(Some(base(dir.path(), SIZE)), layer).unwrap();
                    for (at, values) in (0..).zip(&may) {
                        prop_assert!(values.contains(&block(&after, at)), "block {}", at);
                    }
                }
            }
        }
    }
}
