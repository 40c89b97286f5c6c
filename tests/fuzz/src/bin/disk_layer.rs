//! Layer files of any bytes: refused, or a layer that can be read, written and flushed.
//!
//! Half of the inputs get a header that holds, so that the map behind it is reached.

#![no_main]

use std::os::unix::fs::FileExt;

use cloudlet_fuzz::Input;
use cloudlet_vmm::devices::disk::{BLOCK, BaseMark, BlockNumber, Disk, Layer};
use libfuzzer_sys::fuzz_target;

const DISK_BYTES: u64 = 37 * 4096 + 512;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("layer");
    drop(Layer::create(&path, DISK_BYTES, BaseMark::default()).expect("a layer"));
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .expect("the layer");
    if input.byte() % 2 == 0 {
        file.write_all_at(input.0, 4096).expect("a map");
    } else {
        let length = u64::from(input.byte()) * 700;
        file.set_len(length).expect("a length");
        file.write_all_at(input.0, 0).expect("a header");
    }
    drop(file);
    let Ok(layer) = Layer::open(&path) else {
        return;
    };
    let Ok(disk) = Disk::new(None, layer) else {
        return;
    };
    let mut block = [0; BLOCK];
    for number in 0..disk.blocks().min(64) {
        disk.read_blocks(BlockNumber(number), &mut block)
            .expect("a block of a sound layer");
    }
    let blocks: u64 = disk.changed_runs().iter().map(|run| run.count).sum();
    assert!(blocks <= disk.blocks());
    disk.flush().expect("a flush");
});
