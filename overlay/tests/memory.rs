//! What encoding takes in memory does not grow with the VM. The VM is made as it is read, and this
//! file is a test program of its own, so what is resident here is the encoder's.

use std::fs;
use std::io::{self, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use cloudlet_overlay::{
    BaseId, DeltaSpec, Digest, LEVEL_STORED, Options, PAGE_BYTES, PageAt, PageReader, PageSpan,
    Space, SpaceSize, encode,
};

/// MiB that encoding may add: two threads with a few segments each, and the tables.
const GROWTH_MAX_MIB: u64 = 40;

/// A VM of which every page is another, and the highest resident size while its pages were read.
struct Made {
    peak_kib: AtomicU64,
}

impl PageReader for Made {
    fn read(&self, at: PageAt, into: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        *into = [1; PAGE_BYTES];
        into[..8].copy_from_slice(&at.page.to_le_bytes());
        if at.page.is_multiple_of(256) {
            self.peak_kib.fetch_max(resident_kib(), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A file that nobody keeps.
struct Nowhere;

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Nowhere {
    fn seek(&mut self, _: SeekFrom) -> io::Result<u64> {
        Ok(0)
    }
}

/// Resident anonymous memory of this process.
fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.unwrap().split_whitespace().next().unwrap();
    number.parse().unwrap()
}

/// MiB that encoding a VM of `mib` MiB adds.
fn growth_mib(mib: u64, level: i32) -> u64 {
    let pages = mib << 8;
    let spaces = [SpaceSize {
        space: Space::Memory,
        pages,
        base_pages: 0,
    }];
    let changed = vec![PageSpan {
        first: PageAt::memory(0),
        pages,
    }];
    let spec = DeltaSpec {
        base: BaseId(Digest::of(b"")),
        spaces: &spaces,
        early: &[],
        changed: &changed,
        state: &[],
        meta: &[],
    };
    let made = Made {
        peak_kib: AtomicU64::new(0),
    };
    let idle = resident_kib();
    let options = Options { level, threads: 2 };
    let summary = encode(&spec, &made, None, &mut Nowhere, options, &mut |_| {}).unwrap();
    assert_eq!(summary.literal_pages, pages);
    made.peak_kib.into_inner().saturating_sub(idle) >> 10
}

#[test]
fn memory_is_bounded_whatever_the_size_of_the_vm() {
    for (mib, level) in [(512, LEVEL_STORED), (256, 1)] {
        let growth = growth_mib(mib, level);
        assert!(growth <= GROWTH_MAX_MIB, "{growth} MiB for {mib} MiB");
    }
}
