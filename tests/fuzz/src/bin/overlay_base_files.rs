//! The files beside a base, page hashes and manifest: refused, or written back the same.

#![no_main]

use cloudlet_overlay::{BaseHashes, Manifest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(manifest) = Manifest::parse(data) {
        assert_eq!(manifest.to_bytes().expect("it was parsed"), data);
    }
    let mut hashes = data.to_vec();
    hashes.extend_from_slice(blake3::hash(data).as_bytes());
    for bytes in [data, &hashes] {
        if let Ok(hashes) = BaseHashes::read(&mut &bytes[..]) {
            let mut again = Vec::new();
            hashes.write(&mut again).expect("a vector takes all");
            assert_eq!(again, bytes);
            let page = std::array::from_fn(|at| data.get(at).copied().unwrap_or(1));
            let _ = hashes.find(cloudlet_overlay::Space::Memory, &page);
        }
    }
});
