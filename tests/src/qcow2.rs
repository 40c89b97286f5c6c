//! qcow2 images for the cases: what a disk has in it, as a tool of another project would write it.

/// Bytes in a cluster.
const CLUSTER: usize = 64 << 10;
/// Entries of a second-level table.
const ENTRIES: usize = CLUSTER / 8;

/// An image of the disk `raw`, with nothing where a cluster is zero.
#[must_use]
pub fn image(raw: &[u8]) -> Vec<u8> {
    let clusters = raw.len().div_ceil(CLUSTER);
    let tables = clusters.div_ceil(ENTRIES);
    let mut bytes = vec![0; (2 + tables) * CLUSTER];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &16_u32.to_be_bytes());
    put(24, &(raw.len() as u64).to_be_bytes());
    put(36, &u32::try_from(tables).unwrap_or(u32::MAX).to_be_bytes());
    put(40, &(CLUSTER as u64).to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    for table in 0..tables {
        let entry = (1 << 63) | ((2 + table) * CLUSTER) as u64;
        put(CLUSTER + 8 * table, &entry.to_be_bytes());
    }
    for (index, cluster) in raw.chunks(CLUSTER).enumerate() {
        if cluster.iter().all(|byte| *byte == 0) {
            continue;
        }
        let entry = (1 << 63) | bytes.len() as u64;
        let at = 2 * CLUSTER + 8 * index;
        bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
        bytes.extend_from_slice(cluster);
        bytes.resize(bytes.len().next_multiple_of(CLUSTER), 0);
    }
    bytes
}

/// Makes the image say that it lies on the file `name`.
pub fn set_backing_file(image: &mut [u8], name: &str) {
    image[8..16].copy_from_slice(&512_u64.to_be_bytes());
    let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
    image[16..20].copy_from_slice(&len.to_be_bytes());
    image[512..512 + name.len()].copy_from_slice(name.as_bytes());
}
