//! qcow2 images of any bytes: refused, or copied; never a panic and no more than fits.
//!
//! Most inputs get a header whose checked fields hold, so that the tables behind it are reached.

#![no_main]

use std::os::unix::fs::FileExt;

use cloudlet_fuzz::Input;
use cloudlet_vmm::devices::disk::qcow2;
use libfuzzer_sys::fuzz_target;

const ROOM: u64 = 1 << 20;

/// Header of version 3 and the beginning of the first-level table.
fn forge(input: &mut Input<'_>) -> Vec<u8> {
    let cluster_bits = 9 + u32::from(input.byte() % 4);
    let cluster = 1_usize << cluster_bits;
    let mut bytes = vec![0; cluster];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &cluster_bits.to_be_bytes());
    put(24, &(u64::from(input.byte() % 64 + 1) * 512).to_be_bytes());
    put(36, &16_u32.to_be_bytes());
    put(40, &(cluster as u64).to_be_bytes());
    put(48, &input.array::<16>());
    put(80, &input.array::<16>());
    put(96, &4_u32.to_be_bytes());
    put(100, &(104 + u32::from(input.byte() % 8)).to_be_bytes());
    // Two entries that hold; the rest is the input's.
    bytes.extend(((1 << 63) | (2 * cluster as u64)).to_be_bytes());
    bytes.extend(((1 << 63) | (3 * cluster as u64)).to_be_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut bytes = if input.byte() % 4 == 0 {
        Vec::new()
    } else {
        forge(&mut input)
    };
    bytes.extend_from_slice(input.0);
    let image = tempfile::tempfile().expect("a temporary file");
    image.write_all_at(&bytes, 0).expect("an image");
    let out = tempfile::tempfile().expect("a temporary file");
    let mut most = 0;
    let copied = qcow2::copy(image, &out, ROOM, &mut |done, _| {
        most = done;
        Ok(())
    });
    assert!(most <= ROOM, "more than there is room for");
    if let Ok(size) = copied {
        assert_eq!(out.metadata().expect("a length").len(), size);
    }
});
